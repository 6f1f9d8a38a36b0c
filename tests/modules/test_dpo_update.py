"""DPO's update: its gradient against one big left-padded batch and the textbook formula."""

import math
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.optim import AdamW
from transformers import LlamaConfig, LlamaForCausalLM

from rlmt.algorithms import DPO
from rlmt.models.logprobs import compute_logprobs
from rlmt.modules import RLMTModule
from rlmt.modules.update import PolicyUpdate
from rlmt.types import Experience, FinishReason, Prompt, RolloutBatch, Sampling, Scores, Split, Status

from .test_update import WAYS, set_way

CPU = torch.device("cpu")


def model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2))


def experience(temperature: float = 0.7) -> Experience:
    """Four prompts of three samples of very different lengths; the third prompt has no pair, its rewards are equal."""
    make = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(0, 61, (count,), generator=make).tolist()  # type: ignore[no-any-return]

    lengths = [1, 9, 4, 30, 2, 2, 17, 8, 5, 3, 12, 1]
    rollouts = RolloutBatch(
        prompts=[Prompt(i, [{"role": "user", "content": "?"}]) for i in range(4)],
        group_size=3,
        prompt_ids=[tokens(n) for n in (3, 21, 8, 1)],
        completion_ids=[tokens(n) for n in lengths],
        engine_logprobs=torch.randn(sum(lengths), generator=make) * 0.1 - 4,
        finish=[FinishReason.STOP] * 12,
        sampling=Sampling(temperature, 30),
        weight_version=0,
    )
    return Experience(
        rollouts=rollouts,
        texts=[""] * 12,
        splits=[Split("", "x", Status.OK)] * 12,
        thought_tokens=torch.tensor(lengths) - 1,
        scores=Scores(torch.tensor([1.0, 0, 2, 5, 4, 3, 1, 1, 1, 0, 1, 2]), {}, []),
        group=torch.arange(4).repeat_interleave(3),
        lengths=torch.tensor(lengths),
        engine_logprobs=rollouts.engine_logprobs,
    )


PAIRS = [[2, 1], [3, 5], [11, 9]]


def sequence_logprobs(policy: LlamaForCausalLM, rollouts: RolloutBatch, samples: list[int]) -> Tensor:
    """Log-probs at temperature 1 of whole completions, in one batch padded on the left: [n]."""
    rows = [rollouts.prompt_ids[i // rollouts.group_size] + rollouts.completion_ids[i] for i in samples]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
    attention = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    logits = policy(input_ids=ids, attention_mask=attention, position_ids=positions).logits[:, :-1]
    logprobs = torch.log_softmax(logits, -1).gather(2, ids[:, 1:, None]).squeeze(2)
    sizes = [len(rollouts.completion_ids[i]) for i in samples]
    return torch.stack([row[width - 1 - size :].sum() for row, size in zip(logprobs, sizes, strict=True)])


def gradients(policy: LlamaForCausalLM) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def prepared(algorithm: DPO, reference: LlamaForCausalLM, budget: int, temperature: float = 0.7) -> Experience:
    """As the module does it: pairs first, then the reference's log-probs of paired samples alone."""
    data = experience(temperature)
    algorithm.select(data)
    assert data.pairs is not None
    wanted = data.pairs.flatten().tolist()
    data.ref_logprobs = compute_logprobs(reference, data.rollouts, budget, CPU, algorithm.logprob_temperature, wanted)
    return data


def update(
    algorithm: DPO, policy: LlamaForCausalLM, data: Experience, budget: int
) -> tuple[list[Any], dict[str, float]]:
    run = PolicyUpdate(algorithm, budget, max_grad_norm=1e9)
    steps = []
    for step in run.steps(policy, data, 0, lambda part: part.backward()):
        assert step.problem is None
        steps.append(gradients(policy))
        policy.zero_grad()
    return steps, run.metrics()


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "ipo_sum", "length_normalized"])
@pytest.mark.parametrize("budget", [1, 60, 100_000])  # with the smallest each pair goes alone
@pytest.mark.parametrize("way", WAYS)
def test_gradient_is_that_of_one_big_padded_batch(kind: Any, budget: int, way: str) -> None:
    policy, reference, beta = model(0), model(1), 0.2
    algorithm = DPO(beta=beta, loss=kind, min_valid=2)
    data = prepared(algorithm, reference, budget)
    assert data.pairs is not None and data.pairs.tolist() == PAIRS

    chosen, rejected = (list(side) for side in zip(*PAIRS, strict=True))
    lp = [sequence_logprobs(policy, data.rollouts, side) for side in (chosen, rejected)]
    with torch.no_grad():
        ref = [sequence_logprobs(reference, data.rollouts, side) for side in (chosen, rejected)]
    delta = [now - before for now, before in zip(lp, ref, strict=True)]
    if kind in ("ipo", "length_normalized"):
        delta = [d / data.lengths[side] for d, side in zip(delta, (chosen, rejected), strict=True)]
    gap = delta[0] - delta[1]
    losses = (gap - 1 / (2 * beta)) ** 2 if kind.startswith("ipo") else -logsigmoid(beta * gap)
    losses.mean().backward()
    expected = gradients(policy)
    policy.zero_grad()

    set_way(policy, way)
    (step,), metrics = update(algorithm, policy, data, budget)
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(step[name], gradient, rtol=1e-5, atol=1e-5 * scale, msg=name)
    assert metrics["policy/loss"] == pytest.approx(losses.mean().item(), rel=1e-4)
    assert metrics["dpo/margin"] == pytest.approx(beta * gap.mean().item(), rel=1e-4)
    assert metrics["dpo/accuracy"] == pytest.approx((gap > 0).float().mean().item())
    assert metrics["dpo/chosen_logprobs"] == pytest.approx(lp[0].mean().item(), rel=1e-4)
    assert metrics["dpo/rejected_logprobs"] == pytest.approx(lp[1].mean().item(), rel=1e-4)


def test_samples_in_no_pair_are_not_computed() -> None:
    data = prepared(DPO(min_valid=2), model(1), 100)
    assert data.ref_logprobs is not None
    by_sample = data.ref_logprobs.split(data.rollouts.lengths)
    inside = {i for pair in PAIRS for i in pair}
    assert {i for i, part in enumerate(by_sample) if part.isfinite().all()} == inside
    assert {i for i, part in enumerate(by_sample) if part.isnan().all()} == set(range(12)) - inside


def test_the_policy_that_is_the_reference_has_the_loss_of_a_coin() -> None:
    policy = model(0)
    _, metrics = update(algorithm := DPO(min_valid=2), policy, prepared(algorithm, policy, 100), 100)
    assert metrics["policy/loss"] == pytest.approx(0.6931472, rel=1e-5)
    assert metrics["dpo/margin"] == pytest.approx(0.0, abs=1e-5)


def test_minibatches_hold_whole_pairs_and_add_up() -> None:
    """Means over the pairs of each minibatch: weighted by their pairs they are the whole batch's."""
    policy, reference = model(0), model(1)
    whole = DPO(min_valid=2)
    ((full,), _) = update(whole, policy, prepared(whole, reference, 60), 60)
    parts = DPO(min_valid=2, minibatches=4, update_epochs=2)  # a prompt each, one of them without a pair
    steps, metrics = update(parts, policy, prepared(parts, reference, 60), 60)
    assert len(steps) == 8 and sum(not step for step in steps) == 2
    for name, gradient in full.items():
        for epoch in (steps[:4], steps[4:]):
            total = sum(step[name] for step in epoch if step)
            torch.testing.assert_close(total / 3, gradient, rtol=1e-4, atol=1e-6)
    assert metrics["policy/skipped"] == 0.0


def test_a_step_without_pairs_does_not_move_the_policy() -> None:
    policy, algorithm = model(0), DPO(min_valid=2)
    optimizer = AdamW(policy.parameters(), lr=0.1, weight_decay=0.5)
    data = prepared(algorithm, model(1), 100)
    run = PolicyUpdate(algorithm, 100, 1.0)

    def take_step(step_data: Experience) -> dict[str, float]:
        for step in run.steps(policy, step_data, 0, lambda part: part.backward()):
            assert step.problem is None
            optimizer.step()
            optimizer.zero_grad()
        return run.metrics()

    take_step(data)  # AdamW has momentum now, and decays weights
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    data.scores.total.zero_()
    algorithm.select(data)
    assert data.pairs is not None and data.pairs.shape == (0, 2)
    assert compute_logprobs(policy, data.rollouts, 100, CPU, samples=[]).isnan().all()
    assert take_step(data) == {"policy/loss": 0.0, "policy/grad_norm": 0.0, "policy/skipped": 0.0}
    for name, value in policy.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_the_engine_is_compared_at_its_own_temperature_only(temperature: float) -> None:
    policy, algorithm = model(0), DPO(min_valid=2, update_epochs=2)
    data = prepared(algorithm, model(1), 100, temperature)
    _, metrics = update(algorithm, policy, data, 100)
    assert ("engine/mismatch_max" in metrics) == (temperature == 1.0)
    if temperature == 1.0:
        lp = compute_logprobs(policy, data.rollouts, 100, CPU)
        gaps = (lp - data.engine_logprobs).abs().split(data.rollouts.lengths)
        expected = max(float(gaps[i].max()) for pair in PAIRS for i in pair)
        assert metrics["engine/mismatch_max"] == pytest.approx(expected, rel=1e-5)


def test_the_engine_is_compared_before_any_step_only() -> None:
    policy, algorithm = model(0), DPO(min_valid=2, minibatches=2)
    data = prepared(algorithm, model(1), 100, temperature=1.0)
    lp = compute_logprobs(policy, data.rollouts, 100, CPU)
    gaps = [float(gap.max()) for gap in (lp - data.engine_logprobs).abs().split(data.rollouts.lengths)]
    run = PolicyUpdate(algorithm, 100, 1.0)
    for _ in run.steps(policy, data, 0, lambda part: part.backward()):
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(3)  # far from the weights that the engine sampled with
    of_pairs = [max(gaps[i] for i in pair) for pair in PAIRS]
    measured = run.metrics()["engine/mismatch_max"]
    assert any(measured == pytest.approx(gap, rel=1e-5) for gap in of_pairs)


def test_metrics_of_the_update_replace_those_of_a_rank_without_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """DPO sets a rank's own pair metrics to NaN where it has no pair; the update's cover the pairs of all ranks."""
    experience = SimpleNamespace(rollouts=[0, 1], metrics={"dpo/pairs": 0.0, "dpo/accuracy": math.nan})
    module = MagicMock()
    module.split.return_value = experience
    module.ask.return_value = False
    module.learning_rates.return_value = {}
    module.algorithm.dynamic_sampling = 0
    module._update_policy.return_value = {"dpo/accuracy": 0.75}
    module._timer.step.return_value = {}
    monkeypatch.setattr("rlmt.modules.rlmt.step_metrics", lambda generated, trained: dict(trained.metrics))
    outputs = RLMTModule.training_step(module, MagicMock(), 0)
    assert outputs["metrics"] == {"dpo/pairs": 0.0, "dpo/accuracy": 0.75}
    assert module.log_step.call_args.args[0] == outputs["metrics"]
