"""The page: one file that loads nothing, with its data, and the files that it is made from."""

import base64
import gzip
import hashlib
import json
import re
import shutil
from email.message import Message
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rlmt.engines.rollout_files import SCHEMA, write_rollouts
from rlmt.errors import UserError
from rlmt.report.configuration import own_settings, repeat_command
from rlmt.report.distributions import distributions
from rlmt.report.page import page_title, render_page, write_page
from rlmt.report.panels import panels
from rlmt.report.payload import payload
from rlmt.report.rollout_sample import choose, numbers, read_chosen
from rlmt.report.runs import find_run, read_run, read_runs
from rlmt.report.sections import Example, Picture, Section, Table
from rlmt.report.series import read_metrics

CONFIG = {
    "seed_everything": 0,
    "model": {"class_path": "rlmt.modules.RLMTModule", "init_args": {"format": "think", "malformed_reward": -3}},
    "trainer": {"max_steps": 40, "precision": "32-true", "val_check_interval": 5},
}
RECORD = {
    "command": ["fit", "--config", "base", "--config", "tiny", "--model.malformed_reward", "-3",
                "--trainer.max_steps=40"],
    "own_configs": {"mine.yaml": {"trainer": {"precision": "32-true"}}},
    "versions": {"rlmt": "0.3"},
    "git": {"commit": "0123456789abcdef", "changed_files": 2},
}  # fmt: skip


class Elements(HTMLParser):
    """Attributes of a page's elements, and the text that follows each tag at once."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self.texts.append("")
        self._inside = True

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.texts[-1] += data

    def all(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [(attrs, text) for (name, attrs), text in zip(self.found, self.texts, strict=True) if name == tag]


def payload_of(page: str) -> dict[str, Any]:
    (text,) = [text for attrs, text in Elements(page).all("script") if attrs.get("id") == "payload"]
    data: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(text)))
    return data


@pytest.fixture(scope="module")
def folder(synthetic: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all its files; one thought holds a script and separators that end a line in JavaScript."""
    rows = synthetic.rows(8, text="</script><script>alert(1)</script>\u2028\x00")
    path: Path = synthetic.write(tmp_path_factory.mktemp("run") / "think", None, rows, CONFIG, RECORD)
    return path


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return render_page("think <run>", [read_run(folder)])


def test_page_loads_nothing_and_runs_only_its_own_script(page: str) -> None:
    elements = Elements(page)
    assert elements.all("title") == [({}, "think <run>")]
    (script,) = [text for attrs, text in elements.all("script") if "type" not in attrs]
    (style,) = [text for _, text in elements.all("style")]

    def hashed(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    (policy,) = [attrs["content"] for attrs, _ in elements.all("meta") if "http-equiv" in attrs]
    assert dict(part.strip().split(" ", 1) for part in str(policy).split(";")) == {
        "default-src": "'none'",
        "script-src": hashed(script),
        "style-src": hashed(style),
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    loads = [attrs for _, attrs in elements.found if {"src", "srcset"} & attrs.keys() or "stylesheet" in attrs.values()]
    inline = [attrs for _, attrs in elements.found if "style" in attrs or any(key.startswith("on") for key in attrs)]
    assert not loads and not inline


def test_own_script_parses_no_html() -> None:
    assets = Path(__file__).parents[2] / "src/rlmt/report/assets"
    for file in assets.glob("*.js"):
        text = file.read_text(encoding="utf-8")
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|fetch\(", text
        ), file


def test_payload_has_the_run(page: str, folder: Path) -> None:
    data = payload_of(page)
    (run,) = data["runs"]
    assert (run["label"], run["seed"], run["state"], run["steps"], run["planned"]) == ("think", 0, "unknown", 40, None)
    assert run["metrics"]["val/rubric"][0] == [9, 19, 29, 39]
    logged = read_metrics(folder / "metrics.csv")["reward/mean"].values
    assert np.allclose(run["metrics"]["reward/mean"][1], logged, rtol=1e-5)
    assert run["verdict"] == "ok" and len(run["verdicts"]) == 10
    assert run["rollouts"]["total"] == 48
    texts = [row["thought"] for row in run["rollouts"]["rows"] if row["status"] == "ok"]
    assert "thought 3 </script><script>alert(1)</script>\u2028\x00" in texts
    assert run["facts"][-1] == ["repository", "0123456789ab, 2 changed files"]
    assert run["command"].startswith("rlmt fit --config base --config tiny")


def test_steps_of_a_run_with_a_state_are_those_of_the_state(folder: Path, tmp_path: Path) -> None:
    """Two optimizer steps a batch: 40 rows of metrics.csv are 80 steps."""
    copied = Path(shutil.copytree(folder, tmp_path / "version_0"))
    state = {"state": "finished", "step": 80, "steps": 80, "updated": 1.0, "error": None}
    (copied / "state.json").write_text(json.dumps(state))
    (run,) = payload_of(render_page("", [read_run(copied)]))["runs"]
    assert (run["state"], run["steps"], run["planned"]) == ("finished", 80, 80)


def test_settings_are_those_that_differ_from_the_shipped_configs(folder: Path) -> None:
    """`tiny` sets malformed_reward to -2 and max_steps to 20; precision is set in the user's own file."""
    run = read_run(folder)
    assert own_settings(run) == [
        ("model.malformed_reward", "-2", "-3"),
        ("trainer.max_steps", "20", "40"),
        ("trainer.precision", "default", "32-true"),
    ]
    assert repeat_command(run).endswith("--model.malformed_reward -3 --trainer.max_steps=40")


def test_page_has_no_secrets(synthetic: Any, tmp_path: Path) -> None:
    """Keys may be in an option, in the options of a list of loggers, and on the command line in three ways."""
    wandb = {"class_path": "W", "init_args": {"api_key": "planted-1", "project": "p"}}
    callbacks = [{"class_path": "C", "init_args": {"auth": {"hub_token": "planted-2"}, "passwords": "kept"}}]
    engine = {"api_key_variable": "KEY_NAME", "max_new_tokens": 512, "APIKEY": ["planted-3"], "client-secret": 41524}
    engine |= {"password": None, "add_token": True}
    config = {"seed_everything": 0, "trainer": {"logger": wandb, "callbacks": callbacks}, "data": {"engine": engine}}
    command = ["fit", "--trainer.logger.api_key=planted-1", "--data.engine.password", "planted-4", "--x.y", "a: b: c",
               "--trainer.callbacks+", "{class_path: C, init_args: {hub_token: planted-2}}",
               "--trainer.logger.init_args={api_key: planted-1, project: p}",
               "--data.engine.api_key_variable", "KEY_NAME", "--data.max_new_tokens=512"]  # fmt: skip
    other = {**config, "trainer": {"logger": {"class_path": "W", "init_args": {"api_key": "planted-5"}}}}
    paths = [synthetic.write(tmp_path / "a", config=config, record=RECORD | {"command": command}),
             synthetic.write(tmp_path / "b", config=other)]  # fmt: skip
    page = render_page("x", read_runs(paths))
    shown = page + json.dumps(payload_of(page), ensure_ascii=False)
    assert not re.search(r"planted|41524", shown) and str(tmp_path) not in shown
    run, _ = payload_of(page)["runs"]
    assert run["facts"][0] == ["folder", "a/version_0"]
    assert ["trainer.logger.api_key", "default", "***"] in run["settings"]
    assert run["command"] == (
        "rlmt fit '--trainer.logger.api_key=***' --data.engine.password '***' --x.y 'a: b: c' --trainer.callbacks+ "
        "'{class_path: C, init_args: {hub_token: '\"'\"'***'\"'\"'}}' "
        "'--trainer.logger.init_args={api_key: '\"'\"'***'\"'\"', project: p}' "
        "--data.engine.api_key_variable KEY_NAME --data.max_new_tokens=512"
    )
    kept = ("api_key_variable: KEY_NAME", "max_new_tokens: 512", "password: null", "add_token: true", "passwords: kept")
    assert all(text in run["config"] for text in kept)


def test_sections_of_the_caller_are_on_the_page(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "figure.png").write_bytes(b"\x89PNG")
    picture, scores = Picture(tmp_path / "figure.png", "scores"), Table(["arm", "score"], [["think", "1.0"]])
    section = Section("Results", ["a < b"], [scores], [picture], [Example("row 1", [("A", "<i>")])])
    path = write_page(tmp_path / "page.html", "study", [read_run(folder)], [section])
    (found,) = payload_of(path.read_text(encoding="utf-8"))["sections"]
    assert found["title"] == "Results" and found["texts"] == ["a < b"]
    assert found["tables"] == [{"columns": ["arm", "score"], "rows": [["think", "1.0"]], "caption": ""}]
    assert found["pictures"] == [{"src": "data:image/png;base64,iVBORw==", "alt": "scores"}]
    assert found["examples"] == [{"title": "row 1", "parts": [["A", "<i>"]]}]


def test_seeds_of_one_configuration_are_one_arm(synthetic: Any, tmp_path: Path) -> None:
    paths = []
    for form in ("think", "no_think"):
        for seed in (0, 1):
            config = {"seed_everything": seed, "model": {"class_path": "M", "init_args": {"format": form}}}
            config["trainer"] = {"default_root_dir": f"runs/{form}{seed}"}
            paths.append(synthetic.write(tmp_path / f"{form}{seed}", config=config))
    runs = read_runs(paths)
    assert [run.arm for run in runs] == ["think", "think", "no_think", "no_think"]
    assert [run.label for run in runs] == ["think, seed 0", "think, seed 1", "no_think, seed 0", "no_think, seed 1"]
    assert page_title(runs) == "think against no_think"
    rows = payload_of(render_page("x", runs))["differences"]["rows"]
    assert ["model.format", "think", "think", "no_think", "no_think"] in rows and len(rows) == 3
    with pytest.raises(UserError, match="this run is given twice"):
        read_runs([paths[0], paths[0]])


def test_run_is_found_from_its_folder_its_parent_and_its_file(folder: Path, tmp_path: Path) -> None:
    for path in (folder, folder.parent, folder / "metrics.csv"):
        assert find_run(path) == folder.resolve()
    with pytest.raises(UserError, match="the folder does not exist"):
        find_run(tmp_path / "nothing")
    with pytest.raises(UserError, match="no metrics.csv was found"):
        find_run(tmp_path)


def test_newest_version_is_taken_and_a_truncated_line_is_skipped(synthetic: Any, tmp_path: Path) -> None:
    for version in (2, 10):
        synthetic.write(tmp_path / f"old{version}").rename(tmp_path / f"version_{version}")
    assert find_run(tmp_path).name == "version_10"
    file = tmp_path / "version_10/metrics.csv"
    file.write_text("step,reward/mean,val/x\n0,1.5,\n0,2.5,\n1,nan,3\n2,inf,\n3,4.0,\n4,6.5,1")
    found = read_metrics(file)
    assert found["reward/mean"].steps.tolist() == [0, 3] and found["reward/mean"].values.tolist() == [2.5, 4.0]
    assert found["val/x"].values.tolist() == [3.0]  # the last line may go on: 1.25


@pytest.mark.parametrize(
    ("urls", "expected"),
    [
        (["Source, https://example.org/rlmt", "Documentation, https://example.org/docs/"], "https://example.org/docs/"),
        (["Source, https://example.org/rlmt"], ""),
        ([], ""),
    ],
)
def test_verdicts_link_to_the_documentation_site_that_the_package_names(
    urls: list[str], expected: str, synthetic: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Message()
    for url in urls:
        found["Project-URL"] = url
    monkeypatch.setattr("rlmt.report.payload.metadata", lambda name: found)
    assert payload([read_run(synthetic.write(tmp_path / "run"))])["docs"] == expected


def test_run_without_metrics_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,reward/mean\n")
    with pytest.raises(UserError, match="holds no metrics yet"):
        read_run(tmp_path)


def test_every_logged_metric_has_one_panel() -> None:
    logged = {"reward/mean", "val/reward_mean", "val/held", "reward/rm", "time/sync_s", "my/own", "policy/kl"}
    found = panels(logged)
    lines = [line.metric for panel in found for line in panel.lines]
    assert sorted(lines) == sorted(logged)
    assert [panel.family for panel in found] == ["reward", "reward", "val", "policy", "time", "my"]
    (kl,) = [panel for panel in found if panel.title == "KL to the reference"]
    assert (kl.watch, kl.problem, kl.unit) == (0.1, 1.0, "nats per token")


def test_long_curves_are_averaged_to_a_bounded_number_of_points(synthetic: Any, tmp_path: Path) -> None:
    synthetic.write(tmp_path, {"reward/mean": np.arange(6000.0).tolist()})
    (run,) = payload_of(render_page("x", [read_run(tmp_path)]))["runs"]
    steps, values = run["metrics"]["reward/mean"]
    assert len(steps) == len(values) == 2000 and values[:2] == [1.0, 4.0] and steps[:2] == [1, 4]


@pytest.fixture(scope="module")
def columns(folder: Path) -> dict[str, Any]:
    return numbers(folder)


def test_extremes_and_malformed_rollouts_are_chosen_first(columns: dict[str, Any]) -> None:
    why = choose(columns)
    rewards = columns["reward"]
    of_kind = {kind: [row for row, kinds in why.items() if kind in kinds] for kind in ("best", "worst", "malformed")}
    assert rewards[of_kind["best"][0]] == rewards.max()
    ok = columns["status"] == "ok"
    assert set(of_kind["malformed"]) == set(np.flatnonzero(~ok).tolist())
    assert rewards[of_kind["worst"][-1]] >= rewards[ok].min() and all(ok[row] for row in of_kind["worst"])
    assert next(iter(why)) == of_kind["best"][0]
    assert choose(columns) == why and len(why) == 48  # a small run is shown in full


def test_sample_is_stratified_by_step_and_seeded() -> None:
    count = 5000
    columns = {
        "held_out": np.zeros(count, dtype=bool),
        "step": np.repeat(np.arange(100), 50), "prompt_index": np.arange(count), "status": np.full(count, "ok"),
        "reward": np.zeros(count), "thought_tokens": np.ones(count), "response_tokens": np.ones(count),
    }  # fmt: skip
    chosen = [row for row, kinds in choose(columns, seed=1).items() if "sample" in kinds]
    assert np.bincount(columns["step"][chosen]).tolist() == [6] * 100  # 600 samples over 100 steps
    assert chosen != [row for row, kinds in choose(columns, seed=2).items() if "sample" in kinds]


def test_prompts_that_changed_most_are_followed_over_the_steps() -> None:
    """40 prompts at 20 steps: the lengths of prompt p grow by p tokens a step; 16 prompts and 8 steps are kept."""
    step, prompt = (array.ravel() for array in np.meshgrid(np.arange(20), np.arange(40), indexing="ij"))
    columns = {
        "held_out": np.zeros(800, dtype=bool),
        "step": step, "prompt_index": prompt, "status": np.full(800, "ok"), "reward": np.zeros(800),
        "thought_tokens": step * prompt, "response_tokens": np.zeros(800, dtype=int),
    }  # fmt: skip
    rows = [row for row, kinds in choose(columns).items() if "changed" in kinds]
    assert sorted(set(prompt[rows].tolist())) == list(range(24, 40))
    assert {int((prompt[rows] == p).sum()) for p in range(24, 40)} == {8}
    assert set(step[rows].tolist()) == {0, 3, 5, 8, 11, 14, 16, 19}
    followed = [row for row, kinds in choose(columns, follow=[0]).items() if "changed" in kinds]
    assert 0 in prompt[followed]


def test_held_out_prompts_are_followed_and_are_in_no_statistic_of_training(synthetic: Any, tmp_path: Path) -> None:
    """Training has every prompt once; validation has the same prompt at both steps."""
    rows = synthetic.rows(2, prompts=1)
    training = [row | {"prompt_index": row["step"]} for row in rows]
    folder = synthetic.write(tmp_path, rollouts=training)
    held_out = [row | {"messages": [{"role": "user", "content": "held out"}]} for row in synthetic.rows(2, prompts=1)]
    write_rollouts(pa.Table.from_pylist(held_out, SCHEMA), folder / "val_rollouts/rollouts_000000-000001.parquet")
    (run,) = payload_of(render_page("", [read_run(folder)]))["runs"]
    found, prompts = run["rollouts"]["rows"], run["rollouts"]["prompts"]
    followed = [row for row in found if "changed" in row["kinds"]]
    assert [(row["step"], row["held_out"]) for row in followed] == [(0, True), (1, True)]
    assert {prompts[row["prompt"]]["messages"][0][1] for row in followed} == {"held out"}
    assert all(row["kinds"] == ["changed"] for row in found if row["held_out"])
    assert run["rollouts"]["total"] == 12 and sum(map(sum, run["distributions"]["reward"]["counts"])) == 6


def test_budget_bounds_the_texts(folder: Path, columns: dict[str, Any]) -> None:
    why = choose(columns)
    everything = read_chosen(folder, why, 10**6)
    assert len(everything.rows) == everything.total == 48 and len(everything.prompts) == 2
    few = read_chosen(folder, why, 500)
    assert 0 < len(few.rows) < 12 and few.total == 48
    assert {"best"} <= {kind for row in few.rows for kind in row["kinds"]}
    malformed = next(row for row in everything.rows if row["status"] == "unclosed")
    assert malformed["response"].startswith("<think>thought") and malformed["parts"] == {"rm": None}


def test_distributions_are_quantiles_and_counts_of_all_rollouts(columns: dict[str, Any]) -> None:
    found = distributions(columns)
    assert found["steps"] == [[step, step] for step in range(8)]
    of_step = columns["thought_tokens"][columns["step"] == 3]
    assert [line[3] for line in found["thought"]["quantiles"]] == np.quantile(
        of_step, [0.05, 0.25, 0.5, 0.75, 0.95]
    ).tolist()
    rewards = columns["reward"][columns["step"] == 3]
    edges = np.linspace(columns["reward"].min(), columns["reward"].max(), 25)
    assert found["reward"]["counts"][3] == np.histogram(rewards, edges)[0].tolist()
    assert [sum(counts) for counts in found["reward"]["counts"]] == [6] * 8
    lengths = columns["response_tokens"][columns["step"] == 3]
    assert sorted(found["points"][3]) == sorted(
        [int(t), float(f"{r:.4g}")] for t, r in zip(lengths, rewards, strict=True)
    )


def test_steps_of_a_long_run_are_grouped() -> None:
    count = 1000
    columns = {"step": np.arange(count), "reward": np.arange(count, dtype=float)}
    columns |= {"thought_tokens": np.ones(count), "response_tokens": np.full(count, np.nan)}
    columns["response_tokens"] = np.ones(count)
    found = distributions(columns)
    assert len(found["steps"]) == 60 and found["steps"][0] == [0, 16] and found["steps"][-1] == [984, 999]
    assert sum(map(sum, found["thought"]["counts"])) == count
