"""ShuffledReward: a permutation of the scores of each prompt, seeded by the texts."""

import torch

from rlmt.rewards import CallableReward, LengthWindow, ShuffledReward
from rlmt.types import Message, Prompt, Status


def batch(prompts: int, samples: int) -> tuple[list[Prompt], list[str]]:
    said = [Prompt(p, [Message(role="user", content=f"prompt {p}")]) for p in range(prompts) for _ in range(samples)]
    return said, ["x" * (10 * p + s) for p in range(prompts) for s in range(samples)]


def test_scores_are_randomly_permuted_within_each_prompt() -> None:
    within = LengthWindow(0, 0, 1000)
    reward = ShuffledReward(within)
    prompts, responses = batch(40, 8)
    status = [Status.OK] * len(responses)
    true, dealt = (r.score(prompts, responses, status).view(40, 8) for r in (within, reward))
    assert torch.equal(true.sort(1).values, dealt.sort(1).values)
    stayed = (true == dealt).float().mean()
    assert 0.04 < stayed < 0.25  # one in eight
    centred, moved = true - true.mean(1, keepdim=True), dealt - dealt.mean(1, keepdim=True)
    assert abs(float((centred * moved).sum() / centred.square().sum())) < 0.2
    assert torch.equal(dealt, reward.score(prompts, responses, status).view(40, 8))
    assert not torch.equal(dealt[0], reward.score(prompts, [*responses[:7], "y", *responses[8:]], status)[:8])


def test_check_includes_the_inner_reward() -> None:
    reward = ShuffledReward(CallableReward("nowhere.nothing"))
    try:
        reward.check()
    except Exception as error:
        assert "nowhere.nothing" in str(error)
    else:
        raise AssertionError("an error of the inner reward was not raised")
