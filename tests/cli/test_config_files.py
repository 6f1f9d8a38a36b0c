"""Composition of config files: order, classes, lists, and values that YAML reads in another way."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlmt.cli.config_files import ConfigFiles, load_yaml, merge
from rlmt.errors import UserError

SHIPPED = Path(__file__).parents[2] / "configs"


def shipped(*names: str) -> list[dict[str, Any]]:
    return [yaml.safe_load((SHIPPED / f"{name}.yaml").read_text()) for name in names]


def test_class_path_holds_for_options_of_files_before_and_after_it() -> None:
    fragment = {"model": {"init_args": {"reward": {"init_args": {"dtype": "bfloat16"}}}}}
    named = {"model": {"class_path": "M", "init_args": {"reward": {"class_path": "R", "init_args": {"model": "x"}}}}}
    expected = {"class_path": "R", "init_args": {"dtype": "bfloat16", "model": "x"}}
    for order in ([fragment, named], [named, fragment]):
        merged = merge(order)
        assert merged["model"]["class_path"] == "M" and merged["model"]["init_args"]["reward"] == expected


def test_shipped_fragments_compose_in_any_order() -> None:
    """No two of these set the same key, apart from `qlora`, which stands last."""
    first = merge(shipped("base", "grpo", "early_stop"))
    for order in itertools.permutations(("base", "grpo", "early_stop")):
        merged = merge(shipped(*order))
        merged["trainer"]["max_steps"] = first["trainer"]["max_steps"]
        merged["trainer"]["val_check_interval"] = first["trainer"]["val_check_interval"]
        assert merged == first, order
    assert len(first["trainer"]["callbacks"]) == 9 and "callbacks+" not in first["trainer"]


def test_later_values_win_and_lists_replace() -> None:
    merged = merge(
        [{"trainer": {"max_steps": 1, "callbacks": ["a"]}}, {"trainer": {"max_steps": 2, "callbacks": ["b"]}}]
    )
    assert merged == {"trainer": {"max_steps": 2, "callbacks": ["b"]}}


def test_another_class_keeps_only_the_options_that_it_has() -> None:
    grpo = {"class_path": "rlmt.algorithms.GRPO", "init_args": {"normalize_std": True, "minibatches": 2}}
    dpo = {"class_path": "rlmt.algorithms.DPO", "init_args": {"beta": 0.2}}
    merged = merge([{"model": {"init_args": {"algorithm": value}}} for value in (grpo, dpo)])
    algorithm = merged["model"]["init_args"]["algorithm"]
    assert algorithm == {"class_path": "rlmt.algorithms.DPO", "init_args": {"minibatches": 2, "beta": 0.2}}
    by_name = merge([{"model": {"init_args": {"algorithm": value}}} for value in (grpo, "DPO")])
    assert by_name["model"]["init_args"]["algorithm"] == {"class_path": "DPO", "init_args": {"minibatches": 2}}


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({"class_path": "A", "init_args": {"x": 1}}, None, None),
        ({"class_path": "A", "init_args": {"x": 1}}, "ddp", "ddp"),
        ({"class_path": "A", "init_args": {"x": 1}}, {"y": 2}, {"class_path": "A", "init_args": {"x": 1, "y": 2}}),
        ("think", {"name": "think", "prefill": True}, {"name": "think", "prefill": True}),
        ({"name": "think", "prefill": True}, {"name": "no_think"}, {"name": "no_think"}),
        ("ddp", {"class_path": "A"}, {"class_path": "A"}),
    ],
)
def test_values_of_other_kinds_replace_each_other(before: Any, after: Any, expected: Any) -> None:
    assert (
        merge([{"trainer": {"strategy": before}}, {"trainer": {"strategy": after}}])["trainer"]["strategy"] == expected
    )


def test_quoted_numbers_and_none_are_read_as_what_they_are() -> None:
    text = "{a: '1e-6', b: \"2E3\", c: None, d: 'text', e: 1e-6, f: '0.5'}"
    assert load_yaml(text) == {"a": 1e-6, "b": 2000.0, "c": None, "d": "text", "e": 1e-6, "f": "0.5"}
    assert load_yaml("a:") == "a:"


def test_options_of_the_command_line_stand_behind_all_files(tmp_path: Path) -> None:
    for name, steps in (("a.yaml", 1), ("b.yaml", 2)):
        (tmp_path / name).write_text(f"trainer: {{max_steps: {steps}}}")
    files = ConfigFiles(["--trainer.max_steps", "5", "--config", f"{tmp_path}/a.yaml", f"--config={tmp_path}/b.yaml"])
    option, text, *others = files.args
    assert option == "--config" and yaml.safe_load(text) == {"trainer": {"max_steps": 2}}
    assert others == ["--trainer.max_steps", "5"]
    assert files.file_with("--trainer.max_steps") is None
    files.other_args = []
    assert files.file_with("--trainer.max_steps") == f"{tmp_path}/b.yaml"


def test_options_without_a_class_name_the_files(tmp_path: Path) -> None:
    (tmp_path / "part.yaml").write_text("model: {init_args: {format: think}}")
    with pytest.raises(
        UserError, match=r"part.yaml sets options of --model, but no config names its class; put --config"
    ):
        ConfigFiles(["--config", f"{tmp_path}/part.yaml"]).check_classes()
    ConfigFiles(["--config", f"{tmp_path}/part.yaml", "--model", "SFT"]).check_classes()
