"""The critic: initial weights, own parameters, and weights that it must not change."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForSequenceClassification

from rlmt.algorithms import PPO
from rlmt.errors import UserError
from rlmt.export.checkpoints import export
from rlmt.formats.thinking import ThinkingFormat
from rlmt.models import loading
from rlmt.models.adapters import CRITIC, LoRA, trainable_parameters, use_adapter
from rlmt.models.assets import save_policy_assets
from rlmt.models.critic import Critic, build_critic, check_critic
from rlmt.models.logprobs import token_logprobs
from rlmt.models.micro_batch import MicroBatch
from rlmt.modules import RLMTModule
from rlmt.rewards import FormatReward

LORA = LoRA(rank=4, alpha=8, target_modules=["q_proj", "v_proj"])


def batch() -> MicroBatch:
    """Two completions of 4 and 2 tokens to one prompt."""
    return MicroBatch(
        samples=[0, 1],
        shared_prompt=torch.tensor([[5, 6, 7]]),
        input_ids=torch.tensor([[8, 9, 10], [11, 0, 0]]),
        rows=torch.tensor([0, 0, 0, 0, 1, 1]),
        columns=torch.tensor([0, 1, 2, 3, 0, 1]),
        targets=torch.tensor([8, 9, 10, 12, 11, 13]),
    )


ROWS = ([5, 6, 7, 8, 9, 10], [5, 6, 7, 11])
"""Input ids of the two samples."""


@pytest.fixture
def policy(tiny: Path) -> Any:
    return loading.load_policy(tiny / "policy", "float32")


@pytest.fixture(scope="module")
def reward_model(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model of three layers with the policy's tokenizer."""
    folder = tmp_path_factory.mktemp("rewards") / "reward"
    tokenizer = loading.load_tokenizer(tiny / "policy")
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        initializer_range=0.3,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_critic_from_policy_copies_the_backbone_without_output_projection(policy: Any) -> None:
    critic = build_critic(policy)
    own = dict(critic.named_parameters())
    backbone = dict(policy.model.named_parameters())
    assert own.keys() == {f"backbone.{name}" for name in backbone} | {"head.weight", "head.bias"}
    assert all(torch.equal(own[f"backbone.{name}"], weight) for name, weight in backbone.items())
    assert not {p.data_ptr() for p in critic.parameters()} & {p.data_ptr() for p in policy.parameters()}
    assert critic(batch()).tolist() == [0.0] * 6
    assert len(trainable_parameters(critic)) == len(own) and all(p.requires_grad for p in own.values())


def test_critic_from_reward_model_predicts_its_scores(policy: Any, reward_model: Path) -> None:
    critic = build_critic(policy, str(reward_model))
    classifier: Any = LlamaForSequenceClassification.from_pretrained(reward_model)
    values = critic(batch())
    ends = [(0, 3), (0, 4), (0, 5), (0, 6), (1, 3), (1, 4)]
    for value, (row, end) in zip(values.tolist(), ends, strict=True):  # the score of each prefix
        assert value == pytest.approx(classifier(torch.tensor([ROWS[row][:end]])).logits.item(), abs=1e-5)
    assert len(set(values.tolist())) > 3
    assert values._base is None  # FSDP2 warns of outputs that are views
    assert all(p.requires_grad for p in critic.parameters())


def test_shared_critic_owns_only_a_head_and_has_gradients_in_the_policy(policy: Any) -> None:
    critic = build_critic(policy, shared=True)
    assert critic.state_dict().keys() == {"head.weight", "head.bias"}
    assert len(list(critic.parameters())) == len(trainable_parameters(critic)) == 2
    assert critic.updates_policy
    torch.nn.init.ones_(critic.head.weight)
    hidden = [policy.model(torch.tensor([row])).last_hidden_state[0, 2:].sum(1) for row in ROWS]
    torch.testing.assert_close(critic(batch()), torch.cat(hidden), rtol=1e-4, atol=1e-5)
    critic(batch(), head_only=True).sum().backward()
    assert all(p.grad is None for p in policy.parameters()) and critic.head.weight.grad is not None
    critic(batch()).sum().backward()
    assert policy.model.embed_tokens.weight.grad.abs().sum() > 0
    assert critic.train().backbone is policy.model and critic.to("cpu").backbone is policy.model


def test_shared_critic_has_its_own_adapter(policy: Any) -> None:
    LORA.add_to(policy)
    for parameter in trainable_parameters(policy):
        torch.nn.init.normal_(parameter, std=0.1)
    base = {n: p.clone() for n, p in policy.named_parameters() if "lora_" not in n}
    mine = {n: p.clone() for n, p in policy.named_parameters() if "lora_" in n}
    with torch.no_grad():
        before = token_logprobs(policy, batch(), 1.0).logprobs
    critic = build_critic(policy, shared=True, lora=LORA)
    torch.nn.init.ones_(critic.head.weight)
    assert not critic.updates_policy
    assert {tuple(m._active_adapter) for m in policy.modules() if isinstance(m, BaseTunerLayer)} == {("default",)}
    assert {n for n, p in policy.named_parameters() if p.requires_grad and f".{CRITIC}." not in n} == set(mine)
    ids = {id(p) for p in trainable_parameters(policy)}
    assert len(ids) == 8 and not ids & {id(p) for p in trainable_parameters(critic)}
    assert len(trainable_parameters(critic)) == 2 + 8
    assert critic.state_dict().keys() == {"head.weight", "head.bias"}

    first = critic(batch()).detach()  # a new adapter has no effect: the values are the frozen base's
    with use_adapter(policy, None):
        hidden = torch.cat([policy.model(torch.tensor([row])).last_hidden_state[0, 2:].sum(1) for row in ROWS])
    torch.testing.assert_close(first, hidden, rtol=1e-4, atol=1e-5)

    optimizer = torch.optim.SGD(trainable_parameters(critic), lr=0.1)
    for _ in range(2):
        with critic.active_adapter():
            critic(batch()).square().sum().backward()
        optimizer.step()
    assert not torch.allclose(critic(batch()), first)
    now = dict(policy.named_parameters())
    assert all(torch.equal(now[name], weight) for name, weight in (base | mine).items())
    assert {tuple(m._active_adapter) for m in policy.modules() if isinstance(m, BaseTunerLayer)} == {("default",)}
    with torch.no_grad():
        assert torch.equal(token_logprobs(policy, batch(), 1.0).logprobs, before)


def test_critic_adapter_is_neither_synced_nor_exported(policy: Any, tiny: Path, tmp_path: Path) -> None:
    plain = policy.state_dict().keys()
    torch.save(
        {
            "state_dict": {f"policy.{name}": weight for name, weight in policy.state_dict().items()}
            | {"policy.model.layers.0.self_attn.q_proj.lora_A.critic.weight": torch.zeros(4, 64)},
            "rlmt": {"format": ThinkingFormat("think").to_dict(), "policy": "a/policy"},
        },
        tmp_path / "last.ckpt",
    )
    save_policy_assets(
        tmp_path / "policy", policy.config, loading.load_tokenizer(tiny / "policy"), ThinkingFormat("think"), [1]
    )
    export(tmp_path / "last.ckpt", tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == plain

    LORA.add_to(policy)
    module = RLMTModule("a/policy", FormatReward(), PPO(), lora=LORA)
    module.policy = policy
    module.critic = build_critic(policy, shared=True, lora=LORA)
    assert {name for name, _ in module.policy_weights()} == plain
    adapter = module.policy_adapter()
    assert adapter is not None and len(adapter.tensors) == 8 and not any(CRITIC in name for name in adapter.tensors)
    assert {name for name in module.state_dict() if f".{CRITIC}." in name}  # a checkpoint stores it


def test_critic_copied_from_policy_trains_its_own_adapter(policy: Any) -> None:
    LORA.add_to(policy)
    critic = build_critic(policy, lora=LORA)
    assert len(trainable_parameters(critic)) == 2 + 8
    assert not {id(p) for p in trainable_parameters(critic)} & {id(p) for p in policy.parameters()}


def test_critic_from_reward_model_has_adapters_in_all_layers(policy: Any, reward_model: Path) -> None:
    LoRA(rank=4).add_to(policy)
    critic = build_critic(policy, str(reward_model), lora=LoRA(rank=4))
    trained = [name for name, p in critic.named_parameters() if p.requires_grad]
    assert len(trained) == 2 + 3 * 7 * 2  # A and B of seven projections in each of three layers, and the head
    assert all("lora_" in name or name.startswith("head.") for name in trained)
    classifier: Any = LlamaForSequenceClassification.from_pretrained(reward_model)
    last = classifier(torch.tensor([ROWS[0]])).logits.item()
    assert critic(batch())[3].item() == pytest.approx(last, abs=1e-5)


def test_critic_values_are_float32_under_autocast(policy: Any) -> None:
    critic = build_critic(policy)
    seen: list[torch.dtype] = []
    critic.head.register_forward_hook(lambda _, inputs, output: seen.extend([inputs[0].dtype, output.dtype]))
    torch.nn.init.ones_(critic.head.weight)
    with torch.autocast("cpu", torch.bfloat16):
        values = critic(batch())
    assert values.dtype is torch.float32 and seen == [torch.float32] * 2
    assert not torch.equal(values, values.bfloat16().float())


def test_shared_critic_state_dict_excludes_policy_weights(policy: Any) -> None:
    class Both(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.policy, self.critic = policy, Critic(policy.model, shared=True)

    both = Both()
    assert len(list(both.parameters())) == len(list(policy.parameters())) + 2
    others = {name for name in both.state_dict() if not name.startswith("policy.")}
    assert others == {"critic.head.weight", "critic.head.bias"}


def test_critic_init_with_another_tokenizer_raises_before_loading(tiny: Path, reward_model: Path) -> None:
    tokenizer = loading.load_tokenizer(tiny / "policy")
    check_critic("policy", "mine", tokenizer)
    check_critic(str(reward_model), str(tiny / "policy"), tokenizer)
    with pytest.raises(UserError, match=r"--model\.algorithm\.critic_init .*tokenizer of mine"):
        check_critic(str(tiny / "reward"), "mine", tokenizer)


def test_critic_init_that_is_no_reward_model_raises(tiny: Path, reward_model: Path, tmp_path: Path) -> None:
    tokenizer = loading.load_tokenizer(tiny / "policy")
    with pytest.raises(UserError, match=r"--model\.algorithm\.critic_init: .*nowhere"):
        check_critic("./nowhere", "mine", tokenizer)
    with pytest.raises(UserError, match=r"--model\.algorithm\.critic_init: .*outputs"):
        check_critic(str(tiny / "policy"), "mine", tokenizer)  # a policy: two labels by default
    small = Path(shutil.copytree(reward_model, tmp_path / "small"))
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with pytest.raises(UserError, match=r"--model\.algorithm\.critic_init .*100 tokens"):
        check_critic(str(small), str(tiny / "policy"), tokenizer)
    headless = Path(shutil.copytree(reward_model, tmp_path / "headless"))
    weights = headless / "model.safetensors"
    save_file({k: v for k, v in load_file(weights).items() if not k.startswith("score")}, weights, {"format": "pt"})
    with pytest.raises(UserError, match=r"--model\.algorithm\.critic_init: .*score"):
        build_critic(loading.load_policy(tiny / "policy", "float32"), str(headless))
