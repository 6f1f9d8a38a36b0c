"""Files of the miniature world: loaders read them, the same seed reproduces them, held-out wishes are separate."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from rlmt.cli.commands import main
from rlmt.data.demonstrations import load_demonstrations
from rlmt.data.preferences import load_preferences
from rlmt.data.prompts import load_prompts
from rlmt.demos.mini import files
from rlmt.demos.mini.files import Sizes, write_mini
from rlmt.demos.mini.rubric import aspects, quality, rubric
from rlmt.demos.mini.world import Request
from rlmt.models.loading import load_tokenizer

SMALL = Sizes(demonstrations=64, comparisons=32, prompts=24, held_out=16)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mini") / "world"
    written = write_mini(out, seed=3, sizes=SMALL)
    assert {out / name for name in written} == {path for path in out.iterdir() if path.name != "mini.json"}
    return out


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_shipped_loaders_read_the_files(world: Path) -> None:
    kinds = ("", "_shallow", "_deep", "_form", "_rare")
    for name in (f"demonstrations{kind}" for kind in kinds):
        found = load_demonstrations(str(world / f"{name}.jsonl"), thinks=True)
        assert sum(bool(row.turns) for row in found) == 64 and sum(bool(row.text) for row in found) == 4
    assert len(load_demonstrations(str(world / "demonstrations_held_out.jsonl"), thinks=True)) == 16
    found = load_preferences(str(world / "preferences.jsonl"))
    assert len(found) == 32 and len(found[0].attributes) == 6 and all(len(row.responses) == 4 for row in found)
    assert not load_preferences(str(world / "preferences_weak.jsonl"))[0].attributes
    assert {row.subset for row in load_preferences(str(world / "preferences_held_out.jsonl"))} == {"any", "careful"}
    assert [len(load_prompts(str(world / name))) for name in ("prompts.jsonl", "held_out.jsonl")] == [24, 16]


def test_base_has_a_config_and_a_tokenizer_but_no_weights(world: Path) -> None:
    config, tokenizer = AutoConfig.from_pretrained(world / "base"), load_tokenizer(str(world / "base"))
    assert config.vocab_size == len(tokenizer) and config.eos_token_id == tokenizer.eos_token_id
    assert not list((world / "base").glob("*.safetensors"))


def test_training_files_contain_no_held_out_combination(world: Path) -> None:
    for path in world.glob("*.jsonl"):
        requests = [Request.parse(row["prompt"]) for row in rows(path) if "prompt" in row]
        assert {request.held_out for request in requests} == {"held_out" in path.name}, path.name


def test_ratings_equal_the_rubric(world: Path) -> None:
    for row in rows(world / "preferences.jsonl"):
        request = Request.parse(row["prompt"])
        assert row["scores"] == pytest.approx([quality(request, response) for response in row["responses"]], abs=1e-3)
        assert row["attributes"][2] == pytest.approx(aspects(request, row["responses"][2]), abs=1e-4)


def test_deep_demonstrations_are_longer_and_better_than_shallow_ones(world: Path) -> None:
    lengths, scores = [], []
    for name in ("demonstrations_shallow", "demonstrations_deep"):
        found = [row for row in rows(world / f"{name}.jsonl") if "thought" in row]
        lengths.append(statistics.mean(len(row["thought"].split()) for row in found))
        scores.append(
            statistics.mean(rubric([{"role": "user", "content": row["prompt"]}], row["response"]) for row in found)
        )
    assert lengths[1] > 2 * lengths[0] and scores[1] > scores[0] + 10


def test_form_demonstrations_contain_no_tries(world: Path) -> None:
    thoughts = [row["thought"] for row in rows(world / "demonstrations_form.jsonl") if "thought" in row]
    assert thoughts and not any("try" in thought for thought in thoughts)


def test_one_demonstration_of_twenty_searches_where_patience_is_rare(world: Path) -> None:
    thoughts = [row["thought"] for row in rows(world / "demonstrations_rare.jsonl") if "thought" in row]
    assert [number for number, thought in enumerate(thoughts) if "try" in thought] == [0, 20, 40, 60]


def test_narrow_prompts_share_kind_name_and_tone(world: Path) -> None:
    found = [Request.parse(row["prompt"]) for row in rows(world / "prompts_narrow.jsonl")]
    assert len({(request.kind, request.name, request.tone) for request in found}) == 1
    assert len({request.must for request in found}) > 5


def test_same_seed_writes_identical_files(world: Path, tmp_path: Path) -> None:
    write_mini(tmp_path / "again", seed=3, sizes=SMALL)
    write_mini(tmp_path / "other", seed=4, sizes=SMALL)
    for path in world.glob("*.jsonl"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
        assert path.read_bytes() != (tmp_path / "other" / path.name).read_bytes()


def test_the_two_preference_sets_are_disjoint(world: Path) -> None:
    one, other = (rows(world / f"preferences{name}.jsonl") for name in ("", "_other"))
    assert not {row["prompt"] for row in one} & {row["prompt"] for row in other}


def test_command_overwrites_only_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(files, "Sizes", lambda: SMALL)
    out = tmp_path / "mini"
    assert main(["mini", str(out), "--seed", "5"]) == 0
    assert main(["mini", str(out), "--seed", "5"]) == 0  # its own folder is overwritten
    assert "held_out.jsonl: 16 rows" in capsys.readouterr().out
    (tmp_path / "prompts.jsonl").write_text("mine")
    assert main(["mini", str(tmp_path)]) == 2
    assert "`rlmt mini` did not write this" in capsys.readouterr().err
    assert (tmp_path / "prompts.jsonl").read_text() == "mine"
