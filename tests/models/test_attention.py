"""Models that cap their attention logits are computed with the cap, whatever transformers' default."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    Gemma2Config,
    LlamaConfig,
    VaultGemmaConfig,
)

from rlmt.errors import UserError
from rlmt.models.attention import attention_options
from rlmt.models.critic import build_critic
from rlmt.models.loading import load_policy, load_tokenizer, random_policy
from rlmt.models.reward_model import load_reward_model
from rlmt.rewards import ClassifierReward
from rlmt.types import Prompt, Status

CAP = 2.0
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.7,
    "num_labels": 1,
    "query_pre_attn_scalar": 8,
    "attn_logit_softcapping": CAP,
}


@pytest.fixture
def gemma_reward(tiny: Path, tmp_path: Path) -> Path:
    """A Gemma 2 reward model whose attention logits are often above the cap."""
    tokenizer = load_tokenizer(tiny / "policy")
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, max_position_embeddings=256, **SHAPE
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "gemma")  # type: ignore[no-untyped-call]
    tokenizer.save_pretrained(tmp_path / "gemma")
    return tmp_path / "gemma"


def reference_scores(folder: Path, texts: list[str], implementation: str) -> Tensor:
    """transformers' own scores of rendered conversations, one by one."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation=implementation).eval()
    tokenizer = load_tokenizer(folder)
    with torch.no_grad():
        rows = [tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"] for text in texts]
        return torch.cat([model(row).logits[0] for row in rows])


def test_reward_model_is_scored_with_its_cap(gemma_reward: Path) -> None:
    reward = ClassifierReward(str(gemma_reward))
    reward.load()
    prompt = Prompt(0, [{"role": "user", "content": "Tell me about red bees."}])
    responses = ["Sure: red", "No one knows.", "A bee is a bee.", "red red red", "x"]
    got = reward.score([prompt] * 5, responses, [Status.OK] * 5)
    texts = [reward.render(prompt.messages, response) for response in responses]
    capped, plain = (reference_scores(gemma_reward, texts, name) for name in ("eager", "sdpa"))
    assert (capped - plain).abs().max() > 0.05  # the case can fail
    torch.testing.assert_close(got, capped, atol=1e-5, rtol=1e-5)
    asked = ClassifierReward(str(gemma_reward), attn_implementation="eager")
    asked.load()
    assert torch.equal(asked.score([prompt] * 5, responses, [Status.OK] * 5), got)


@pytest.mark.parametrize("config", [Gemma2Config(**SHAPE), VaultGemmaConfig(**SHAPE)], ids=["gemma2", "vaultgemma"])
def test_implementation_that_ignores_the_cap_is_refused(config: Any) -> None:
    assert attention_options(config, None, "m") == {"attn_implementation": "eager"}
    assert attention_options(config, "flash_attention_2", "m") == {"attn_implementation": "flash_attention_2"}
    with pytest.raises(UserError, match=r"sdpa, which ignores the cap .* of m \(attn_logit_softcapping 2\)"):
        attention_options(config, "sdpa", "m")


def test_models_without_a_cap_keep_the_default() -> None:
    assert attention_options(LlamaConfig(), None, "m") == {}
    assert attention_options(Gemma2Config(attn_logit_softcapping=None), None, "m") == {}
    assert attention_options(LlamaConfig(), "sdpa", "m") == {"attn_implementation": "sdpa"}


def test_every_loader_honours_cap_and_option(gemma_reward: Path, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ignores the cap"):
        ClassifierReward(str(gemma_reward), attn_implementation="sdpa").check()
    assert load_reward_model(gemma_reward).config._attn_implementation == "eager"
    policy = load_policy(tiny / "policy", "float32")
    assert policy.config._attn_implementation == "sdpa"
    assert build_critic(policy, str(gemma_reward)).backbone.config._attn_implementation == "eager"
    critic = build_critic(policy, str(tiny / "reward"), attn_implementation="eager")
    assert critic.backbone.config._attn_implementation == "eager"
    config = Gemma2Config(vocab_size=64, **{k: v for k, v in SHAPE.items() if k != "num_labels"})
    config.save_pretrained(tmp_path / "policy")
    assert random_policy(tmp_path / "policy").config._attn_implementation == "eager"
    random_policy(tmp_path / "policy").save_pretrained(tmp_path / "policy")
    assert load_policy(tmp_path / "policy").config._attn_implementation == "eager"
