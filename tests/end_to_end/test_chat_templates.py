"""Commands on models with other chat templates: where a sample ends, dates, and templates that do not fit."""

import json
import shutil
from collections.abc import Callable
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rlmt.cli.commands import main
from rlmt.engines.rollout_files import read_rollouts
from rlmt.formats import FormatName, ThinkingFormat
from rlmt.formats.resolve import resolve_format
from rlmt.models import loading

from ..chat_templates import SHAPES

pytestmark = pytest.mark.usefixtures("no_plots")

ANSWER = "river it is."
QUESTION = [{"role": "user", "content": "Which?"}]


@pytest.fixture
def scripted_policy(tmp_path: Path) -> Callable[..., Path]:
    """`scripted_policy(shape, format, mark)`: writes ANSWER, the mark, and then other words without end."""

    def make(shape: str, name: FormatName, mark: str | None = None) -> Path:
        tokenizer = SHAPES[shape].tokenizer()
        format = resolve_format(ThinkingFormat(name), tokenizer, shape)
        script = f"<think>plan</think>{ANSWER}" if name == "think" and not format.prefill else ANSWER
        script = f"plan</think>{ANSWER}" if format.prefill else script
        ids = [format.render(QUESTION, tokenizer)[-1], *tokenizer(script, add_special_tokens=False)["input_ids"]]
        end = format.turn_end(tokenizer) if mark is None else tokenizer.convert_tokens_to_ids(mark)
        junk = tokenizer("sand!", add_special_tokens=False)["input_ids"]
        chain = [*ids, end, *junk]
        assert len(set(chain)) == len(chain)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
            embedding /= embedding.norm(dim=1, keepdim=True)
            for layer in model.model.layers:  # each token alone determines the next one
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
            head.zero_()
            for token, following in [*pairwise(chain), (junk[-1], junk[0])]:
                head[following] += 10 * embedding[token]
        folder = tmp_path / "policy"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


def options(policy: Path, folder: Path, format: str, *more: object) -> list[str]:
    """Options of RL commands on one prompt, scored by a window of 5 to 16 characters."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text(json.dumps({"messages": QUESTION}) + "\n")
    chosen = {
        "--model.policy": policy,
        "--model.format": format,
        "--model.reward": "LengthWindow",
        "--model.reward.min_chars": 5,
        "--model.reward.max_chars": 16,
        "--model.reward.margin": 4,
        "--data.prompts": prompts,
        "--data.batch_size": 1,
        "--data.group_size": 2,
        "--data.max_prompt_tokens": 128,
        "--data.max_new_tokens": 24,
        "--data.val_size": 0,
        "--trainer.default_root_dir": folder / "run",
        "--trainer.enable_progress_bar": "false",
        "--trainer.accelerator": "cpu",
    }
    configs = ["--config", "base", "--config", "grpo"]
    return [*configs, *(str(word) for pair in chosen.items() for word in pair), *map(str, more)]


def check_predictions(folder: Path) -> None:
    """Checks that all samples are ANSWER, ended by themselves and have the full reward."""
    (path,) = folder.rglob("predictions.parquet")
    samples = pq.read_table(path)
    for name, value in {"response": ANSWER, "finish": "stop", "status": "ok", "reward": 1.0}.items():
        assert samples[name].to_pylist() == [value] * 2


@pytest.mark.parametrize(("shape", "format"), [("Phi-3", "no_think"), ("OpenChat", "think")])
def test_chat_and_predict_end_where_the_template_ends_a_turn(
    shape: str,
    format: FormatName,
    scripted_policy: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    policy = scripted_policy(shape, format)
    prompt = ["--prompt", "Which?", "--format", format, "--temperature", "0", "--max_new_tokens", "24"]
    assert main(["chat", str(policy), *prompt, "--device", "cpu"]) == 0
    assert capsys.readouterr().out == ANSWER + "\n"
    assert main(["predict", *options(policy, tmp_path, format, "--data.engine", "TransformersEngine")]) == 0
    check_predictions(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["think", "no_think"])
@pytest.mark.parametrize("shape", list(SHAPES)[:14])
def test_every_template_is_right_or_refused_in_one_line(
    shape: str,
    format: FormatName,
    scripted_policy: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if (shape, format) == ("R1 distill", "no_think"):
        pytest.skip("refused: see test_templates_that_do_not_fit_are_refused_before_weights_are_read")
    policy = scripted_policy(shape, format)
    assert main(["predict", *options(policy, tmp_path, format, "--data.engine", "TransformersEngine")]) == 0
    check_predictions(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["Phi-3", "GLM-4.5", "OpenChat"])
def test_vllm_ends_where_the_template_ends_a_turn(
    shape: str, scripted_policy: Callable[..., Path], tmp_path: Path
) -> None:
    assert main(["predict", *options(scripted_policy(shape, "no_think"), tmp_path, "no_think")]) == 0
    check_predictions(tmp_path)


def test_export_keeps_all_stop_tokens(
    scripted_policy: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The policy ends its turn with a token that only generation_config.json names."""
    policy = scripted_policy("GLM-4.5", "no_think", "<|observation|>")
    tokenizer = SHAPES["GLM-4.5"].tokenizer()
    stops = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|user|>", "<|observation|>"])
    config = json.loads((policy / "generation_config.json").read_text()) | {"eos_token_id": stops[::2]}
    (policy / "generation_config.json").write_text(json.dumps(config))
    assert main(["predict", *options(policy, tmp_path, "no_think", "--data.engine", "TransformersEngine")]) == 0
    check_predictions(tmp_path)
    demonstrations = tmp_path / "demonstrations.jsonl"
    demonstrations.write_text(json.dumps({"prompt": "Which?", "response": ANSWER}) + "\n")
    chosen = {
        "--model.policy": policy,
        "--model.format": "no_think",
        "--model.optimizer.init_args.lr": 1e-9,
        "--data.path": demonstrations,
        "--data.batch_size": 1,
        "--data.max_length": 128,
        "--data.val_size": 0,
        "--trainer.max_steps": 1,
        "--trainer.default_root_dir": tmp_path / "run",
        "--trainer.enable_progress_bar": "false",
        "--trainer.accelerator": "cpu",
    }
    assert main(["fit", "--config", "sft", *(str(word) for pair in chosen.items() for word in pair)]) == 0
    exported = tmp_path / "exported"
    assert main(["export", str(tmp_path / "run" / "latest" / "checkpoints" / "last.ckpt"), str(exported)]) == 0
    assert "chat_template_kwargs {'enable_thinking': False}" in capsys.readouterr().out
    assert set(json.loads((exported / "generation_config.json").read_text())["eos_token_id"]) == set(stops)
    prompt = torch.tensor([ThinkingFormat.load(exported).render(QUESTION, tokenizer)])  # type: ignore[arg-type]
    model: Any = AutoModelForCausalLM.from_pretrained(exported)
    written = model.generate(prompt, do_sample=False, max_new_tokens=24)[0, prompt.shape[1] :].tolist()
    assert written[-1] == stops[2] and ThinkingFormat.load(exported).decode(written, tokenizer) == ANSWER
    assert main(["chat", str(exported), "--prompt", "Which?", "--temperature", "0", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == ANSWER + "\n"


@pytest.mark.parametrize(
    ("shape", "format", "message"),
    [
        ("ChatML without generation prompt", "no_think", "'<|im_start|>assistant' before an answer"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("named templates, none of them default", "think", "rag, tool_use and none named default"),
                ("R1 distill", "no_think", "opens a thought, unlike format no_think"),
                ("always an empty thought", "think", "closes an empty thought"),
                ("no template", "think", "no chat template"),
                ("Command A, with marks around responses", "think", "'<|START_RESPONSE|>' before an answer"),
                ("turns as lists of parts", "no_think", "omits the text of turns"),
                ("turns that end with plain text", "no_think", "no special token that could end a sample"),
            ]
        ),
    ],
)
def test_templates_that_do_not_fit_are_refused_before_weights_are_read(
    shape: str, format: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = tmp_path / "policy"  # without weights
    LlamaConfig(max_position_embeddings=512).save_pretrained(policy)
    SHAPES[shape].tokenizer().save_pretrained(policy)
    assert main(["fit", *options(policy, tmp_path, format, "--data.engine", "TransformersEngine")]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rlmt: error")]
    assert len(lines) == 1 and message in lines[0] and str(policy) in lines[0], lines


def set_clock(monkeypatch: pytest.MonkeyPatch, day: int) -> None:
    """Sets the clock that chat templates read."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return datetime(2026, 11, day)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)


@pytest.mark.slow
def test_run_and_replay_do_not_depend_on_the_day(
    tiny: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two steps and two more on the next day equal four steps; samples of one day are replayed on the next."""
    for name in ("policy", "reward"):
        template = Path(shutil.copytree(tiny / name, tmp_path / name)) / "chat_template.jinja"
        dated = "{{ bos_token }}" + ("<|system|>{{ strftime_now('%d %b %Y') }}<|end|>" if name == "policy" else "")
        if name == "reward":
            dated += "[SYS]{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}[/SYS]"
        template.write_text(template.read_text().replace("{{ bos_token }}", dated, 1))
    common = options(tmp_path / "policy", tmp_path, "no_think", "--data.engine", "TransformersEngine")
    common += ["--data.prompts", str(prompts_file), "--data.batch_size", "4", "--data.max_new_tokens", "12"]
    common += ["--model.reward", "ClassifierReward", "--model.reward.model", str(tmp_path / "reward")]

    def run(command: str, folder: str, day: int, *more: object) -> None:
        set_clock(monkeypatch, day)
        root = ["--trainer.default_root_dir", str(tmp_path / folder)]
        assert main([command, *common, *root, *map(str, more)]) == 0, capsys.readouterr().err

    run("fit", "unbroken", 26, "--trainer.max_steps", 4)
    run("fit", "broken", 26, "--trainer.max_steps", 2)
    run("fit", "broken", 27, "--trainer.max_steps", 4, "--ckpt_path", "last")
    states = []
    for name in ("unbroken", "broken"):
        checkpoint = torch.load(tmp_path / name / "latest" / "checkpoints" / "last.ckpt", weights_only=True)
        assert checkpoint["rlmt"]["format"]["date"] == "2024-07-26"
        states.append(checkpoint["state_dict"])
    first, second = (read_rollouts(tmp_path / name / "version_0" / "rollouts") for name in ("unbroken", "broken"))
    assert first["prompt_ids"].to_pylist() == second["prompt_ids"].to_pylist()
    assert first["reward"].to_pylist() == second["reward"].to_pylist()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    tokenizer = loading.load_tokenizer(tmp_path / "policy")
    assert "26 Jul 2024" in tokenizer.decode(first["prompt_ids"][0].as_py())
    assert b'"date": "2024-07-26"' in first.schema.metadata[b"rlmt"]
    replay = ["--data.engine", "ReplayEngine", "--data.engine.path", tmp_path / "unbroken" / "version_0" / "rollouts"]
    run("fit", "replayed", 27, *replay, "--trainer.max_steps", 1)
