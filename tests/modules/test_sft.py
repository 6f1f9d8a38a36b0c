"""The loss and gradient of SFT against one padded batch with labels, and runs from random weights."""

import copy
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from rlmt.data import SFTDataModule, load_prompts
from rlmt.data.demonstrations import EncodedDemonstration
from rlmt.data.supervised import RowBatch
from rlmt.engines.transformers import TransformersEngine
from rlmt.formats.thinking import ThinkingFormat
from rlmt.models import loading
from rlmt.models.varlen import VARLEN, register_varlen
from rlmt.modules import SFT, CosineWithWarmup
from rlmt.modules.optimizers import MuonAdamW
from rlmt.types import SampleRequest, Sampling

LENGTHS = [[(3, 9)], [(5, 1), (14, 20)], [(1, 4)], [(30, 2)], [(2, 40)]]
"""Tokens of prompt and target of each sequence of each row; a document has a prompt of 1."""


@pytest.fixture
def policy(small_llama: Callable[..., Any]) -> LlamaForCausalLM:
    made: LlamaForCausalLM = small_llama(LlamaForCausalLM)
    return made


def demonstrations() -> list[EncodedDemonstration]:
    make = torch.Generator().manual_seed(0)
    return [
        EncodedDemonstration(
            index,
            [torch.randint(0, 61, (prompt + target,), generator=make, dtype=torch.int32) for prompt, target in row],
            [prompt for prompt, _ in row],
        )
        for index, row in enumerate(LENGTHS)
    ]


def module(policy: LlamaForCausalLM, budget: int, prompt_weight: float = 0.0) -> SFT:
    made = SFT("unread", prompt_weight=prompt_weight, tokens_per_micro_batch=budget)
    made.policy = policy
    return made


def oracle(model: LlamaForCausalLM, rows: list[EncodedDemonstration], prompt_weight: float) -> Tensor:
    """One batch padded on the left, with an attention mask, full logits and labels of -100 where nothing counts."""
    sequences = [sequence.long().tolist() for row in rows for sequence in row.sequences]
    prompts = [prompt for row in rows for prompt in row.prompts]
    width = max(map(len, sequences))
    ids = torch.tensor([[0] * (width - len(s)) + s for s in sequences])
    attention = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in sequences])
    weights = torch.zeros(ids.shape)
    for i, (sequence, prompt) in enumerate(zip(sequences, prompts, strict=True)):
        start = width - len(sequence)
        weights[i, start + 1 : start + prompt] = prompt_weight
        weights[i, start + prompt :] = 1
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=attention, position_ids=positions).logits[:, :-1]
    labels = ids[:, 1:].masked_fill(weights[:, 1:] == 0, -100)
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
    return (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()


@pytest.mark.parametrize("budget", [1, 50, 10**6])
def test_validation_returns_loss_and_tokens_of_each_row(
    policy: LlamaForCausalLM, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, made, logged = demonstrations(), module(policy, budget, prompt_weight=0.5), dict[str, float]()
    monkeypatch.setattr(made, "log", lambda name, value, **options: logged.update({name: value}))
    with torch.no_grad():
        values = made.validation_step(RowBatch(rows), 0)["values"]["loss"]
        expected = torch.stack([oracle(policy, [row], 0.0) for row in rows])
    counts = torch.tensor([9.0, 21, 4, 2, 40])
    assert torch.equal(values[:, 1], counts)
    torch.testing.assert_close(values[:, 0], expected * counts, rtol=1e-5, atol=1e-5)
    assert logged["val/loss"] == pytest.approx(float(values[:, 0].sum() / counts.sum()), rel=1e-5)


@pytest.mark.parametrize("prompt_weight", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("budget", [1, 50, 10**6])
@pytest.mark.parametrize("packed", [False, True])
def test_gradient_is_that_of_one_padded_batch(
    policy: LlamaForCausalLM, budget: int, prompt_weight: float, packed: bool
) -> None:
    if packed:
        register_varlen()
        policy.set_attn_implementation(VARLEN)
    rows, reference, trained = demonstrations(), copy.deepcopy(policy), module(policy, budget, prompt_weight)
    expected = oracle(reference, rows, prompt_weight)
    expected.backward()
    parts = list(trained.losses(rows, prompt_weight))
    assert len(parts) == {1: 6, 50: 3 if packed else 4, 10**6: 1}[budget]
    total = sum(parts, torch.zeros(()))
    total.backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    for (name, wanted), found in zip(reference.named_parameters(), trained.policy.parameters(), strict=True):
        gap = (found.grad - wanted.grad).norm() / wanted.grad.norm()
        assert gap < 1e-5, (name, gap)


def test_assistant_only_is_transformers_own_loss(policy: LlamaForCausalLM) -> None:
    """Mean over the tokens whose labels are not -100, of one row, as transformers computes it."""
    row = demonstrations()[0]
    ids = row.sequences[0].long()[None]
    labels = ids.clone()
    labels[:, : row.prompts[0]] = -100
    (part,) = module(policy, 1000).losses([row], 0.0)
    assert part.item() == pytest.approx(policy(input_ids=ids, labels=labels).loss.item(), rel=1e-5)


def test_the_schedule_spans_the_epochs_of_the_run() -> None:
    sft = SFT(
        "unused",
        optimizer=lambda groups: torch.optim.SGD(groups, lr=1.0),
        scheduler=lambda optimizer: CosineWithWarmup(optimizer, warmup=0.2),
    )
    sft.policy = torch.nn.Linear(2, 2)  # type: ignore[assignment]
    sft.trainer = SimpleNamespace(estimated_stepping_batches=10)  # type: ignore[assignment]
    made = sft.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    # Two steps of warm-up, then half a cosine over eight.
    cosine = [1, 0.96194, 0.853553, 0.691342, 0.5, 0.308658, 0.146447, 0.0380602]
    assert rates == pytest.approx([1 / 3, 2 / 3, *cosine], abs=1e-5)


def fit(tiny: Path, file: Path, tmp_path: Path, steps: int, form: str = "think", **options: Any) -> SFT:
    torch.manual_seed(options.pop("seed", 0))
    made = SFT(str(tiny / "policy"), format=form, **options)  # type: ignore[arg-type]
    data = SFTDataModule(str(file), batch_size=16, max_length=1000, val_size=0)
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(made, datamodule=data)
    return made


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short random thoughts and responses to short prompts."""
    import json
    import random

    draw, words = random.Random(0), ["red", "green", "blue", "one", "two", "bee", "cat", "sun"]

    def text(most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, most)))

    path = tmp_path_factory.mktemp("made_up") / "rows.jsonl"
    rows = [{"prompt": f"Say {text(4)}", "thought": text(6), "response": text(6)} for _ in range(512)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_random_weights_depend_on_the_seed_alone(tiny: Path) -> None:
    torch.manual_seed(3)
    first = loading.random_policy(tiny / "policy")
    torch.rand(7)
    before = torch.get_rng_state()
    again = loading.random_policy(tiny / "policy")
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    torch.manual_seed(4)
    other = loading.random_policy(tiny / "policy")
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, loading.load_policy(tiny / "policy").lm_head.weight)


@pytest.mark.slow
def test_from_scratch_a_policy_learns_the_format(tiny: Path, made_up: Path, tmp_path: Path) -> None:
    """More than 98 % of 512 samples at temperature 1 are well formed."""
    trained = fit(
        *(tiny, made_up, tmp_path, 280),
        from_scratch=True,
        prompt_weight=0.2,
        optimizer=lambda groups: MuonAdamW(groups, lr=1e-2, muon_lr=0.02),
        scheduler=lambda optimizer: CosineWithWarmup(optimizer, warmup=0.1),
    )
    form, tokenizer = ThinkingFormat("think"), trained.tokenizer
    prompts = [form.render([{"role": "user", "content": f"Say {word}"}], tokenizer) for word in ("red cat", "two")]
    engine = TransformersEngine()
    assert trained.policy is not None
    engine.start(trained.policy.eval(), tokenizer, 256, torch.float32)
    engine.sync(iter(()), 0)
    requests = [SampleRequest(prompt, list(range(256))) for prompt in prompts]
    stops = form.stop_token_ids(tokenizer)
    samples = engine.generate(requests, Sampling(temperature=1.0, max_new_tokens=64, stop_token_ids=stops))
    splits = [form.split(form.decode(ids, tokenizer)) for ids in samples.completion_ids]
    assert sum(split.ok for split in splits) > 0.98 * len(splits)
    assert len({split.thought for split in splits if split.ok}) > 10  # samples, not one learnt by heart


def test_the_no_think_twin_takes_as_many_steps_on_the_same_rows(
    tiny: Path, made_up: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[list[int]]] = {"think": [], "no_think": []}
    real = SFT.training_step

    def note(self: SFT, batch: Any, batch_idx: int) -> None:
        seen[self.format.name].append([row.index for row in batch.rows])
        real(self, batch, batch_idx)

    monkeypatch.setattr(SFT, "training_step", note)
    for form in seen:
        fit(tiny, made_up, tmp_path, 3, form)
    assert seen["think"] == seen["no_think"] and len(seen["think"]) == 3


@pytest.mark.skipif("RLMT_PROMPTS" not in os.environ, reason="RLMT_PROMPTS names no file of real prompts")
@pytest.mark.parametrize("form", ["think", "no_think", "zero_think"])
def test_real_prompts_of_several_turns_and_long_texts(
    form: str, tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Real prompts with made-up answers: rows of several turns, texts of all kinds, long ones dropped and counted."""
    import json

    prompts = load_prompts(os.environ["RLMT_PROMPTS"])[:400]
    rows = []
    for before, prompt in zip(prompts, prompts[1:], strict=False):
        texts = [p.messages[-1]["content"] for p in (before, prompt)]
        answers = [f"<think>\nThey ask: {text[:50]}\n</think>\n\nHere is: {text[-200:]}" for text in texts]
        turns = [
            {"role": role, "content": content}
            for text, answer in zip(texts, answers, strict=True)
            for role, content in (("user", text), ("assistant", answer))
            if "think>" not in text and "response>" not in text
        ]
        if len(turns) == 4:
            rows.append({"messages": turns})
    path = tmp_path / "real.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        trained = fit(tiny, path, tmp_path, 3, form)
    assert "demonstrations over 1,000 tokens" in caplog.text
    assert trained.global_step == 3
