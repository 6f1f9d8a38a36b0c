"""`rlmt tiny`: reproducible files, tokenizers, the policy's format and the reward model's score."""

import hashlib
import json
import os
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rlmt.data.prompts import load_prompts
from rlmt.demos.tiny import TAGS, make_tiny, write_tiny
from rlmt.demos.tiny_models import Sizes
from rlmt.engines import TransformersEngine
from rlmt.errors import UserError
from rlmt.formats.thinking import ThinkingFormat
from rlmt.models.loading import load_policy, load_tokenizer
from rlmt.types import SampleRequest, Sampling

SMALL = Sizes(hidden=32, layers=1, heads=2, ffn=48, vocab=400, context=512)
CHAT = [{"role": "user", "content": "Tell me about bees."}]
HARD = "Hello  wörld\n\n 12345 a\tb e\u0301 Ġ \U0001f389 <think>x</think> \x00\u2028"


def _digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
def test_same_seed_writes_identical_files_in_another_process(tmp_path):
    code = (
        "import sys; from pathlib import Path; from rlmt.demos.tiny import write_tiny; "
        "from rlmt.demos.tiny_models import Sizes;"
        f"write_tiny(Path(sys.argv[1]), seed=3, sizes={SMALL!r})"
    )
    env = {**os.environ, "PYTHONHASHSEED": "77"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], check=True, env=env, capture_output=True)
    write_tiny(tmp_path / "b", seed=3, sizes=SMALL)
    write_tiny(tmp_path / "c", seed=4, sizes=SMALL)
    a, b, c = (_digests(tmp_path / name) for name in "abc")
    assert a == b
    assert a["policy/tokenizer.json"] == c["policy/tokenizer.json"]
    assert a["policy/model.safetensors"] != c["policy/model.safetensors"]
    assert a["reward/model.safetensors"] != c["reward/model.safetensors"]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_policy_tokenizer_round_trips(family, tmp_path):
    write_tiny(tmp_path, family=family, sizes=SMALL)
    tokenizer = load_tokenizer(tmp_path / "policy")
    assert load_policy(tmp_path / "policy").config.model_type == family
    # transformers adds NFC normalization to every Qwen2 tokenizer, whatever its tokenizer.json contains.
    expected = unicodedata.normalize("NFC", HARD) if family == "qwen2" else HARD
    assert tokenizer.decode(tokenizer.encode(HARD, add_special_tokens=False)) == expected
    for tag in TAGS:
        assert len(tokenizer.encode(tag, add_special_tokens=False)) == 1
        assert tag not in tokenizer.all_special_tokens
    turns = [{"role": "system", "content": "Be brief."}, *CHAT, {"role": "assistant", "content": "Ok."}, *CHAT]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(ids) == (
        "<|bos|><|system|>Be brief.<|end|><|user|>Tell me about bees.<|end|><|assistant|>Ok.<|end|>"
        "<|user|>Tell me about bees.<|end|><|assistant|>"
    )
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.encode("plain text")[0] == tokenizer.bos_token_id


def test_policy_thinks_in_half_of_its_samples(tiny):
    """Sampled as in training; the bounds are wide because the fixture's policy is smaller than the default one."""
    tokenizer, policy = load_tokenizer(tiny / "policy"), load_policy(tiny / "policy")
    prompts = [
        SampleRequest(ThinkingFormat().render([{"role": "user", "content": text}], tokenizer), list(range(32)))
        for text in ("Tell me about bees.", "Why do people sleep?")
    ]
    engine = TransformersEngine()
    engine.start(policy, tokenizer, 256, torch.float32)
    engine.sync([], 0)
    stops = ThinkingFormat().stop_token_ids(tokenizer)
    samples = engine.generate(prompts, Sampling(temperature=0.7, max_new_tokens=64, stop_token_ids=stops))
    shares = {}
    for name in ("think", "no_think"):
        format = ThinkingFormat(name)
        shares[name] = sum(format.split(format.decode(ids, tokenizer)).ok for ids in samples.completion_ids) / 64
    assert 0.15 < shares["think"] < 0.85
    assert 0.15 < shares["no_think"] < 0.85


def _scorer(tiny: Path):
    tokenizer = load_tokenizer(tiny / "reward")
    model = AutoModelForSequenceClassification.from_pretrained(tiny / "reward").eval()

    def score(prompt: str, response: str) -> float:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        with torch.no_grad():
            return model(torch.tensor([tokenizer.apply_chat_template(turns, return_dict=False)])).logits.item()

    return score


def test_reward_varies_and_rises_with_better_tokens(tiny):
    """Scores of new random responses are about N(0, 1). The score is nearly an average over tokens, so high-scoring
    tokens in half of a response raise it by several standard deviations."""
    tokenizer, score, rng = load_tokenizer(tiny / "policy"), _scorer(tiny), random.Random(9)
    prompts = [prompt.messages[0]["content"] for prompt in load_prompts(str(tiny / "prompts.jsonl"))]
    ordinary = [i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids]
    samples = [rng.choices(ordinary, k=24) for _ in range(96)]
    scores = torch.tensor([score(rng.choice(prompts), tokenizer.decode(ids)) for ids in samples])
    assert abs(scores.mean()) < 0.8
    assert 0.6 < scores.std() < 1.6

    alone = {i: score(prompts[0], tokenizer.decode([i] * 24)) for i in ordinary}
    best = sorted(ordinary, key=alone.__getitem__)[-20:]
    mixed = [[rng.choice(best) if rng.random() < 0.5 else i for i in ids] for ids in samples]
    lifted = torch.tensor([score(rng.choice(prompts), tokenizer.decode(ids)) for ids in mixed])
    assert lifted.mean() - scores.mean() > 2.5


def test_reward_tokenizer_differs_from_the_policys(tiny):
    policy, reward = load_tokenizer(tiny / "policy"), load_tokenizer(tiny / "reward")
    assert len(policy) != len(reward)
    assert not set(policy.all_special_tokens) & set(reward.all_special_tokens)
    turns = [{"role": "system", "content": "S"}, *CHAT, {"role": "assistant", "content": "Hi."}]
    text = reward.apply_chat_template(turns, tokenize=False)
    assert text == "<s>[SYS]S[/SYS][INST]Tell me about bees.[/INST]Hi.</s>"
    assert json.loads((tiny / "reward" / "config.json").read_text())["architectures"] == [
        "LlamaForSequenceClassification"
    ]


def test_built_in_prompts_are_distinct(tiny):
    prompts = load_prompts(str(tiny / "prompts.jsonl"))
    assert len({prompt.messages[0]["content"] for prompt in prompts}) == len(prompts) == 384


def test_corpus_replaces_built_in_prompts(tmp_path, prompts_file, capfd):
    write_tiny(tmp_path / "out", corpus=str(prompts_file), sizes=SMALL)
    assert capfd.readouterr() == ("", "")  # no bars of saving on a terminal, where the next prompt is
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["policy", "reward", "tiny.json"]


def test_only_own_files_are_overwritten(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    write_tiny(tmp_path, sizes=SMALL)
    first = _digests(tmp_path)
    (tmp_path / "policy" / "stale.bin").write_text("old")
    write_tiny(tmp_path, sizes=SMALL)
    assert _digests(tmp_path) == first

    (tmp_path / "other" / "policy").mkdir(parents=True)
    with pytest.raises(UserError, match="`rlmt tiny` did not write this"):
        make_tiny(tmp_path / "other")
    assert list((tmp_path / "other").rglob("*")) == [tmp_path / "other" / "policy"]
