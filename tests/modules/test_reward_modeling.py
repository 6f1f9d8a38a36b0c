"""Reward modelling against closed forms: Bradley-Terry, margins, centring, the regression, and what is reported."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from rlmt.data.preferences import EncodedComparison
from rlmt.data.supervised import RowBatch
from rlmt.errors import UserError
from rlmt.models.reward_model import load_reward_model
from rlmt.models.varlen import VARLEN, register_varlen
from rlmt.modules import RewardModeling

Make = Callable[..., RewardModeling]


@pytest.fixture
def module(small_llama: Callable[..., Any]) -> Make:
    """`module(budget, attributes, **options)`: always with the same weights."""

    def make(budget: int = 10**6, attributes: int = 0, **options: float) -> RewardModeling:
        made = RewardModeling("unread", tokens_per_micro_batch=budget, **options)
        made.model = small_llama(LlamaForSequenceClassification, num_labels=1, pad_token_id=0)
        if attributes:
            torch.manual_seed(1)
            made.attribute_head = nn.Linear(32, attributes)
        return made

    return make


def comparisons(attributes: int = 0) -> list[EncodedComparison]:
    """Two pairs and a ranking of four, of very different lengths."""
    make = torch.Generator().manual_seed(0)

    def tokens(*lengths: int) -> list[Tensor]:
        return [torch.randint(1, 61, (n,), generator=make, dtype=torch.int32) for n in lengths]

    def ratings(count: int) -> list[list[float]]:
        return torch.randn(count, attributes, generator=make).tolist()  # type: ignore[no-any-return]

    return [
        EncodedComparison(0, tokens(4, 11), [(0, 1)], [0.5], "a", ratings(2)),
        EncodedComparison(1, tokens(5, 2, 30, 7), [(1, 0), (2, 0), (2, 1), (2, 3), (3, 0)], [0.0] * 5, "b", ratings(4)),
        EncodedComparison(2, tokens(17, 3), [(0, 1)], [2.0], "b", ratings(2)),
    ]


def test_backward_of_the_float32_head_is_float32_under_autocast(module: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made = module(centering=0.1)
    monkeypatch.setattr(made, "manual_backward", Tensor.backward)
    made.trainer = SimpleNamespace(strategy=SingleDeviceStrategy())  # type: ignore[assignment]
    with torch.autocast("cpu", torch.bfloat16):
        for part in made.losses(comparisons()):
            made.accumulate_gradient(part.loss)
            assert torch.is_autocast_enabled("cpu")
    assert made.model is not None
    gradient: Any = made.model.score.weight.grad
    assert (gradient != gradient.bfloat16().float()).float().mean() > 0.9


def scores_of(model: LlamaForSequenceClassification, sequences: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Scores and last hidden states, one conversation at a time, by the model's own forward."""
    outputs = [model(input_ids=sequence.long()[None], output_hidden_states=True) for sequence in sequences]
    return (
        torch.cat([o.logits.flatten() for o in outputs]),
        torch.stack([o.hidden_states[-1][0, -1] for o in outputs]),
    )


@pytest.mark.parametrize(
    ("budget", "packed", "passes"), [(1, False, 3), (140, False, 2), (10**6, False, 1), (66, True, 2)]
)
@pytest.mark.parametrize("options", [{}, {"centering": 0.3}, {"attributes": 3, "attribute_weight": 0.7}])
def test_loss_and_gradient_are_the_formulas(
    budget: int, packed: bool, passes: int, options: dict[str, Any], module: Make
) -> None:
    trained, reference = module(budget, **options), module(**options)
    if packed:
        register_varlen()
        trained.trained_model.set_attn_implementation(VARLEN)
    rows = comparisons(options.get("attributes", 0))
    terms, ratings_seen = [], []
    for row in rows:
        scores, states = scores_of(reference.model, row.sequences)  # type: ignore[arg-type]
        for (better, worse), margin in zip(row.pairs, row.margins, strict=True):
            good, bad = scores[better], scores[worse]
            # -log sigmoid(x) = log(1 + exp(-x))
            term = torch.log1p(torch.exp(-(good - bad - margin)))
            terms.append(term + options.get("centering", 0.0) * (good + bad) ** 2)
        if reference.attribute_head is not None:
            ratings_seen.append((reference.attribute_head(states) - torch.tensor(row.attributes)) ** 2)
    expected = sum(terms, torch.zeros(())) / 7
    if ratings_seen:
        expected = expected + 0.7 * torch.cat(ratings_seen).mean()
    expected.backward()

    parts = list(trained.losses(rows))
    assert len(parts) == passes
    total = sum((part.loss for part in parts), torch.zeros(()))
    total.backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    for (name, wanted), found in zip(reference.named_parameters(), trained.parameters(), strict=True):
        gap = (found.grad - wanted.grad).norm() / wanted.grad.norm()
        assert gap < 1e-5, (name, gap)


@pytest.mark.parametrize("budget", [1, 140, 10**6])
def test_validation_returns_the_sums_of_each_row(budget: int, module: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made, rows = module(budget), comparisons()
    monkeypatch.setattr(made, "log", lambda *arguments, **options: None)
    with torch.no_grad():
        values = made.validation_step(RowBatch(rows), 0)["values"]
        differences = []
        for row in rows:
            scores, _ = scores_of(made.model, row.sequences)  # type: ignore[arg-type]
            differences.append([float(scores[better] - scores[worse]) for better, worse in row.pairs])
    losses = [
        [math.log1p(math.exp(margin - d)) for d, margin in zip(found, row.margins, strict=True)]
        for found, row in zip(differences, rows, strict=True)
    ]
    torch.testing.assert_close(values["loss"], torch.tensor([[sum(of_row), len(of_row)] for of_row in losses]))
    right = torch.tensor([[sum(d > 0 for d in of_row), float(len(of_row))] for of_row in differences])
    assert torch.equal(values["accuracy"], right)
    assert torch.equal(values["accuracy/a"], right[:1]) and torch.equal(values["accuracy/b"], right[1:])


def test_a_tie_costs_ln_2_and_pulls_the_scores_apart_by_a_half(module: Make) -> None:
    """d/dr of -log σ(r_c - r_j) is -σ(r_j - r_c) = -1/2 at a tie, and +1/2 for the other score."""
    trained = module()
    assert trained.model is not None
    with torch.no_grad():
        trained.model.score.weight.zero_()
    row = EncodedComparison(0, [torch.tensor([1, 2]), torch.tensor([3, 4, 5])], [(0, 1)], [0.0], None, [[], []])
    (part,) = trained.losses([row])
    assert part.loss.item() == pytest.approx(0.6931472)
    part.loss.backward()
    _, states = scores_of(trained.model, row.sequences)  # type: ignore[arg-type]
    assert torch.allclose(trained.model.score.weight.grad[0], (states[1] - states[0]) / 2, atol=1e-6)


def test_accuracies_and_loss_of_held_out_pairs(module: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Differences 1, 0 and -2 in subset a, 3 in subset b, over two batches: a tie is wrong."""
    made = module()
    logged: dict[str, Any] = {}
    monkeypatch.setattr(made, "log", lambda name, value, **options: logged.update({name: value}))
    data = SimpleNamespace(subsets=["a", "b"])
    made._trainer = SimpleNamespace(  # type: ignore[assignment]
        precision="32-true",
        world_size=1,
        strategy=None,
        accelerator=None,
        datamodule=data,
        state=SimpleNamespace(fn="validate"),
    )
    vars(made)["model_config"] = made.trained_model.config  # the module was not made from a folder
    made.setup("validate")
    made._trainer = None
    table = {1: 0.5, 2: -0.5, 3: 0.0, 4: 2.0, 5: 3.0}
    monkeypatch.setattr(
        "rlmt.modules.reward_modeling.last_token_states",
        lambda backbone, rows, device: torch.tensor([[table[int(row[0])]] for row in rows]),
    )
    monkeypatch.setattr("rlmt.modules.reward_modeling.score_states", lambda model, states: states[:, 0])

    def row(better: int, worse: int, subset: str) -> EncodedComparison:
        return EncodedComparison(0, [torch.tensor([better]), torch.tensor([worse])], [(0, 1)], [0.0], subset, [[], []])

    batches = [[row(1, 2, "a"), row(3, 3, "a"), row(3, 4, "a")], [row(5, 3, "b")]]
    found = [made.validation_step(RowBatch(batch), 0)["differences"].tolist() for batch in batches]
    assert sorted(found[0]) == [-2.0, 0.0, 1.0] and found[1] == [3.0]
    assert logged["val/accuracy"].compute().item() == pytest.approx(2 / 4)
    assert logged["val/accuracy/a"].compute().item() == pytest.approx(1 / 3)
    assert logged["val/accuracy/b"].compute().item() == 1.0
    # log(1 + e^-1), log 2, log(1 + e^2), log(1 + e^-3)
    expected = (0.3132617 + 0.6931472 + 2.1269280 + 0.0485874) / 4
    assert logged["val/loss"].compute().item() == pytest.approx(expected, abs=1e-6)


def test_what_training_starts_from(tiny: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    policy = LlamaForCausalLM.from_pretrained(tiny / "policy")
    from_policy = load_reward_model(tiny / "policy")
    assert torch.equal(from_policy.model.embed_tokens.weight, policy.model.embed_tokens.weight)
    assert from_policy.config.num_labels == 1 and from_policy.score.weight.shape == (1, 64)
    assert 0.3 < from_policy.score.weight.std().item() * 65 < 3
    assert torch.equal(load_reward_model(tiny / "policy").score.weight, from_policy.score.weight)

    kept = LlamaForSequenceClassification.from_pretrained(tiny / "reward")
    again = load_reward_model(tiny / "reward")
    assert torch.equal(again.score.weight, kept.score.weight)

    scratch = load_reward_model(tiny / "policy", from_scratch=True)
    assert not torch.equal(scratch.model.embed_tokens.weight, policy.model.embed_tokens.weight)

    kept.config.num_labels = 3
    LlamaForSequenceClassification(kept.config).save_pretrained(tmp_path / "three")
    with pytest.raises(UserError, match="classifier with 3 outputs where a reward model has one"):
        load_reward_model(tmp_path / "three")
    config = LlamaConfig.from_pretrained(tiny / "reward")
    config.num_hidden_layers += 1
    kept.save_pretrained(tmp_path / "short")
    config.architectures = ["LlamaForSequenceClassification"]
    config.save_pretrained(tmp_path / "short")
    with pytest.raises(UserError, match=r"the weights lack \d+ tensors"):
        load_reward_model(tmp_path / "short")
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="bert has no decoder classifier"):
        load_reward_model(tmp_path / "gpt")
