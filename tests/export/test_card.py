"""The model card: its metadata is the hub's, its code runs, and no path, URL or key is in it."""

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import ModelCard

from rlmt.errors import UserError
from rlmt.export.card import describe_reward, hub_name, shown
from rlmt.export.checkpoints import export
from rlmt.export.usage import QUESTION, Loading, policy_usage, reward_usage
from rlmt.formats.resolve import resolve_format
from rlmt.formats.thinking import ThinkingFormat
from rlmt.models.assets import save_policy_assets
from rlmt.models.loading import load_config, load_policy, load_tokenizer
from rlmt.rewards import ClassifierReward
from rlmt.types import Message

from ..chat_templates import SHAPES
from .test_merge import load_training_policy, make_base, write

CONFIG: dict[str, Any] = {
    "seed_everything": 3,
    "model": {
        "class_path": "rlmt.modules.RLMTModule",
        "init_args": {
            "policy": "org/base",
            "reward": {
                "class_path": "rlmt.rewards.WeightedSum",
                "init_args": {
                    "rewards": [
                        {"class_path": "rlmt.rewards.ClassifierReward", "init_args": {"model": "org/reward"}},
                        {
                            "class_path": "rlmt.rewards.JudgeReward",
                            "init_args": {
                                "endpoint": {
                                    "base_url": "https://secret.example/v1",
                                    "model": "judge-1",
                                    "api_key_variable": "SECRET_VARIABLE",
                                },
                                "ledger": "/home/secret/ledger",
                            },
                        },
                    ],
                    "weights": [1.0, 0.5],
                },
            },
            "algorithm": {"class_path": "rlmt.algorithms.GRPO", "init_args": {"kl_coef": 0.001}},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-6}},
            "malformed_reward": -2.0,
        },
    },
    "data": {
        "class_path": "rlmt.data.RolloutDataModule",
        "init_args": {"prompts": "org/prompts", "temperature": 0.9, "max_new_tokens": 8, "group_size": 4},
    },
    "trainer": {"max_steps": 9, "default_root_dir": "/home/secret/runs", "precision": "bf16-mixed"},
}


def write_run(tiny: Path, run: Path, policy: str = "org/base", config: Any = CONFIG) -> Path:
    """A run's folder with the tiny policy as its checkpoint, metrics and a picture."""
    model, format = load_policy(tiny / "policy"), ThinkingFormat(prefill=True)
    checkpoints = run / "checkpoints"
    save_policy_assets(checkpoints / "policy", model.config, load_tokenizer(tiny / "policy"), format, [1])
    record = {"module": "RLMTModule", "policy": policy, "format": format.to_dict(), "version": 4}
    state = {f"policy.{name}": tensor for name, tensor in model.state_dict().items()}
    saved = {"state_dict": state, "rlmt": record, "config": config, "run": {"version": 0, "step": 2}}
    torch.save(saved, checkpoints / "last.ckpt")
    with (run / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["step", "reward/mean", "val/reward_mean"], [0, 1.5, ""], [0, "", 1.25], [2, 2.5, ""]])
        writer.writerows([[2, "", 3.75], [3, 9.5, ""]])
    (run / "curves.png").write_bytes(b"png")
    return checkpoints / "last.ckpt"


@pytest.fixture(scope="module")
def exported(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("secret_folder")
    export(write_run(tiny, folder / "version_0"), folder / "model")
    return folder / "model"


def blocks(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def test_metadata_are_valid_for_the_hub(exported: Path) -> None:
    data = ModelCard.load(exported / "README.md").data.to_dict()
    assert data == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "org/base",
        "base_model_relation": "finetune",
        "datasets": ["org/prompts"],
        "tags": ["rlmt", "grpo", "think"],
    }
    assert "\n# license: " in (exported / "README.md").read_text(), "the licence is left to the user"


def test_card_states_settings_and_results_up_to_the_checkpoint(exported: Path) -> None:
    text = (exported / "README.md").read_text()
    for row in (
        "| base model | `org/base` |",
        "| data | `org/prompts` |",
        "| reward | WeightedSum (1 × ClassifierReward `org/reward` + 0.5 × JudgeReward `judge-1`) |",
        "| objective | GRPO |",
        "| learning rate | 1e-06 |",
        "| reward of malformed samples | -2.0 |",
        "| rollout step | 3 |",
        "| `val/reward_mean` | 1.25 (step 1) | 3.75 (step 3) |",
        "| `reward/mean` | 1.5 (step 1) | 2.5 (step 3) |",
        "![Curves of the run](curves.png)",
    ):
        assert row in text, row
    assert (exported / "curves.png").read_bytes() == b"png"


def test_no_file_has_a_path_or_a_key(exported: Path) -> None:
    for path in exported.iterdir():
        content = path.read_bytes()
        for private in (b"secret", b"SECRET", b"/tmp"):
            assert private not in content, (path.name, private)


def test_local_models_and_files_are_named_by_their_last_part(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts").mkdir()
    data = {"class_path": "D", "init_args": {"prompts": str(tmp_path / "prompts" / "mine.jsonl")}}
    ckpt = write_run(tiny, tmp_path / "run", str(tiny / "policy"), {"data": data})
    export(ckpt, tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "| base model | `policy` (local) |\n| data | `mine.jsonl` (local) |" in card.content
    assert card.data.base_model is None and card.data.datasets is None and str(tmp_path) not in card.content


def test_run_from_python_has_a_card_without_settings(tiny: Path, tmp_path: Path) -> None:
    ckpt = write_run(tiny, tmp_path / "run", config={})
    shutil.rmtree(tmp_path / "run" / "curves.png", ignore_errors=True)
    (tmp_path / "run" / "metrics.csv").unlink()
    export(ckpt, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| thinking format | `think` |" in text and "## Results" not in text


@pytest.mark.parametrize(
    ("source", "hub", "name"),
    [
        ("org/model", "org/model", "`org/model`"),
        ("gpt2", "gpt2", "`gpt2`"),
        ("/home/me/model", None, "`model` (local)"),
        ("data/mine.jsonl", None, "`mine.jsonl` (local)"),
        ("https://me:key@host/a/rows.parquet?token=key", None, "`rows.parquet` (local)"),
        ("tests/export", None, "`export` (local)"),
    ],
)
def test_hub_names_are_told_from_paths(source: str, hub: str | None, name: str) -> None:
    assert (hub_name(source), shown(source)) == (hub, name)


def test_rewards_are_named_with_model_function_or_service() -> None:
    served = {"model": "org/rm", "endpoints": [{"base_url": "http://10.0.0.1/v1"}]}
    assert describe_reward({"class_path": "rlmt.rewards.ServedReward", "init_args": served}) == "ServedReward `org/rm`"
    remote = {"class_path": "rlmt.rewards.RemoteReward", "init_args": {"endpoint": {"base_url": "http://10.0.0.1"}}}
    assert describe_reward(remote) == "RemoteReward"
    own = {"class_path": "rlmt.rewards.CallableReward", "init_args": {"function": "mine.long"}}
    assert describe_reward(own) == "CallableReward `mine.long`"


# The code -------------------------------------------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {"name": "think"},
    {"name": "no_think"},
    {"name": "think", "prefill": True},
    {"name": "think", "instruction": 'Say "hello" first.'},
    {"name": "zero_think"},
    {"name": "zero_think", "prefill": True, "instruction": "Be kind."},
    {"name": "zero_no_think", "prefill": True},
    {"name": "zero_no_think"},
]


@pytest.mark.parametrize("shape", SHAPES)
def test_code_renders_the_prompts_of_training_and_splits_as_it(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = SHAPES[shape].tokenizer()
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: tokenizer)
    for options in OPTIONS:
        try:
            format = resolve_format(ThinkingFormat(**options), tokenizer, "m")
        except UserError:
            continue  # the template does not fit the format
        usage, code = policy_usage(format, tokenizer, Loading("m")), dict[str, Any]()
        exec(usage.prompt, code)
        assert code["ids"] == format.render([Message(role="user", content=QUESTION)], tokenizer), options
        target = format.target("They like\nfood.", "Go to <b>Rome</b>.")
        split = format.split(target)
        assert code["split"](target) == {"thought": split.thought, "response": split.response}, options


def test_card_samples_with_transformers(
    exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(exported.parent)
    prompt, sample, _ = blocks((exported / "README.md").read_text())
    code: dict[str, Any] = {}
    exec(prompt + sample, code)
    assert code["options"]["temperature"] == 0.9 and code["options"]["max_new_tokens"] == 8
    completion = code["output"][0, len(code["ids"]) :].tolist()
    assert 1 <= len(completion) <= 8
    format, tokenizer = ThinkingFormat.load(exported), load_tokenizer(exported)
    assert code["completion"] == format.decode(completion, tokenizer)
    assert "'thought'" in capsys.readouterr().out


def test_adapters_card_samples_from_the_trained_policy(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_base(tiny, tmp_path / "base")
    policy = load_training_policy(base).eval()
    ckpt, out = write(tmp_path / "run", policy, base), tmp_path / "adapter"
    with pytest.raises(
        UserError, match="--push: the adapter's model .* is a local folder.* pass its hub name as --base"
    ):
        export(ckpt, out, what="adapter", push="me/adapter")
    export(ckpt, out, what="adapter")
    text = (out / "README.md").read_text()
    assert "library_name: peft" in text and 'LLM("base", enable_lora=True, max_lora_rank=8)' in text
    assert str(tmp_path) not in text
    monkeypatch.chdir(tmp_path)
    prompt, sample, _ = blocks(text)
    code: dict[str, Any] = {}
    exec(prompt + sample.replace("max_new_tokens=1024", "max_new_tokens=4"), code)
    ids = torch.arange(7, 39).view(1, 32)
    with torch.no_grad():
        torch.testing.assert_close(code["model"](ids).logits, policy(ids).logits, rtol=1e-4, atol=1e-4)


def test_tags_that_are_special_tokens_stay_in_the_completion(tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny / "policy")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]}, False)  # type: ignore[arg-type]
    format = resolve_format(ThinkingFormat("think"), tokenizer, "m")
    usage = policy_usage(format, tokenizer, Loading("m"))
    expression = next(line for line in usage.transformers.splitlines() if line.startswith("completion"))
    text = "<think>a</think>b"
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], *format.stop_token_ids(tokenizer)]
    code: dict[str, Any] = {"tokenizer": tokenizer, "ids": [], "output": torch.tensor([ids])}
    exec(expression, code)
    assert code["completion"] == text == format.decode(ids, tokenizer)


def test_reward_models_code_scores_as_the_reward(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny / "reward"
    pad = load_config(folder).pad_token_id
    usage, code = reward_usage(load_tokenizer(folder), pad, Loading(str(folder))), dict[str, Any]()
    exec(usage.prompt + "\n" + usage.transformers, code)
    reward = ClassifierReward(str(folder), dtype="float32")
    reward.load()
    [expected] = reward.score([_prompt()], ["Gladly."], [])
    assert code["score"] == pytest.approx(float(expected), abs=1e-5)


def _prompt() -> Any:
    from rlmt.types import Prompt

    return Prompt(0, [Message(role="user", content=QUESTION)])


@pytest.mark.slow
def test_card_samples_with_vllm(exported: Path, tmp_path: Path) -> None:
    prompt, _, sample = blocks((exported / "README.md").read_text())
    script = tmp_path / "sample.py"
    script.write_text(f'if __name__ == "__main__":\n{_indent(prompt + sample)}')
    # One process and a small cache: the defaults are for a machine that does nothing else.
    options = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment = {**os.environ, **options, "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    command = [sys.executable, script]
    done = subprocess.run(command, cwd=exported.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "'response'" in done.stdout


def _indent(code: str) -> str:
    return "".join(f"    {line}\n" for line in code.splitlines())
