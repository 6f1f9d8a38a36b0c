"""Tests the whole text path with random completions: split, reward text, metrics, parquet and the sample table.

    python benchmarks/fuzz.py [--cases 100000] [--seed 0]

A case is a completion as token ids: text of tags, parts of tags, whitespace, invisible characters, control characters
and random code points, or random tokens, or both. Each case passes through `RLMTModule.score` and everything after
it in a run. A scored text must contain no character of a thought, nothing may raise, and a rollout file must return
exactly what was written. To find characters of thoughts, each case contains marks: characters that occur once in it.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from rlmt.algorithms import GRPO
from rlmt.callbacks.sample_table import render_samples
from rlmt.engines.rollout_files import read_rollouts, rollout_table, write_rollouts
from rlmt.formats.thinking import ThinkingFormat
from rlmt.modules import RLMTModule
from rlmt.modules.metrics import length_metrics, reward_metrics
from rlmt.rewards import Reward
from rlmt.types import Experience, FinishReason, Prompt, RolloutBatch, Sampling, Status

FORMATS = [
    ThinkingFormat(name, prefill)  # type: ignore[arg-type]
    for name in ("think", "no_think", "zero_think", "zero_no_think")
    for prefill in (False, True)
    if not (name == "no_think" and prefill)
]
TAGS = ("<think>", "</think>", "<response>", "</response>")
PIECES = (
    *TAGS * 3,
    *("<think", "think>", "</think", "/think>", "</ think>", "<THINK>", "<\u200bthink>", "<", ">", "</", "[NULL]"),
    *("\n", " ", "\t", "\r\n", "\u2028", "\u00a0", "\u200b", "\u2060", "\ufeff", "\u3164", "\u0301", "\u202e"),
    *("\x00", "\x1b[31m", "\x7f", "\x85", "\ufffd", "\uffff", "\ue000", "\ue0010\ue001", "\U0010ffff", "\U0001f600"),
    *(
        "<|im_end|>",
        "<|endoftext|>",
        "<s>",
        "</s>",
        "<query>",
        "</query>",
        "a",
        "answer",
        "\u4f60\u597d",
        '"',
        "\\",
        "|",
    ),
)
MARKS = 0xF0000
"""First of the private-use code points that mark positions in a case."""


class Recorder(Reward):
    """Scores any text and records the texts that it receives."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], statuses: Sequence[Status]) -> Tensor:
        """See `Reward.score`."""
        self.seen = list(responses)
        return torch.tensor([float(len(text) % 11) for text in responses])


class TextPath:
    """The text path for one format.

    Args:
        policy: Folder of a policy, for its tokenizer.
        format: The format.
        folder: Folder for rollout files.
    """

    def __init__(self, policy: Path, format: ThinkingFormat, folder: Path) -> None:
        self.format, self.folder, self.reward = format, folder, Recorder()
        self.module = RLMTModule(str(policy), self.reward, GRPO(), format=format)
        self.tokenizer = self.module.tokenizer
        self.statuses: Counter[str] = Counter()

    def check(self, completions: list[list[int]]) -> None:
        """Runs cases through the text path; raises AssertionError if a check fails."""
        experience = self.module.score(self.module.split(rollouts(completions)))
        for text, scored, split in zip(experience.texts, experience.scores.texts, experience.splits, strict=True):
            self.statuses[split.status.value] += 1
            hidden = thought_marks(text, self.format)
            assert (scored is None) == (not split.ok), (text, split)
            assert scored is None or not hidden & set(scored), (text, scored)
            assert scored is None or not any(tag in scored for tag in self.format.tags), (text, scored)
        assert self.reward.seen == [text for text in experience.scores.texts if text is not None]
        metrics = reward_metrics(experience) | length_metrics(experience)
        assert all(value == value for name, value in metrics.items() if name != "reward/reward"), metrics
        assert (experience.thought_tokens <= experience.lengths).all() and (experience.thought_tokens >= 0).all()
        self.check_file(experience)
        render_samples(experience, 0, 4, 60, 120, colour=True).encode()

    def check_file(self, experience: Experience) -> None:
        """Checks that a rollout file returns what was written."""
        path = self.folder / "rollouts_000000-000000.parquet"
        write_rollouts(rollout_table(experience, 0, self.format.to_dict()), path)
        table = read_rollouts(path)
        expected = {
            "text": experience.texts,
            "thought": [split.thought for split in experience.splits],
            "response": [split.response for split in experience.splits],
            "status": [split.status.value for split in experience.splits],
            "scored_text": experience.scores.texts,
            "completion_ids": experience.rollouts.completion_ids,
            "engine_logprobs": [t.tolist() for t in experience.engine_logprobs.split(experience.rollouts.lengths)],
            "reward": experience.scores.total.tolist(),
            "messages": [p.messages for p in experience.rollouts.prompts for _ in range(2)],
        }
        for name, values in expected.items():
            assert table[name].to_pylist() == values, name


def rollouts(completions: list[list[int]]) -> RolloutBatch:
    """Makes a batch with two samples per prompt."""
    prompts = [
        Prompt(k, [{"role": "user", "content": f"\x00 {PIECES[k % len(PIECES)]} x"}])
        for k in range(len(completions) // 2)
    ]
    return RolloutBatch(
        prompts=prompts,
        group_size=2,
        prompt_ids=[[1]] * len(prompts),
        completion_ids=completions,
        engine_logprobs=-torch.arange(sum(map(len, completions)), dtype=torch.float32) / 7,
        finish=[FinishReason.STOP if k % 3 else FinishReason.LENGTH for k in range(len(completions))],
        sampling=Sampling(temperature=1.0, max_new_tokens=512),
        weight_version=0,
    )


def thought_marks(text: str, format: ThinkingFormat) -> set[str]:
    """Returns the marks inside a thought: before the first close tag, or anywhere if the format allows no thought."""
    region = text.partition("</think>")[0]
    if not format.thinks:
        region = text if "<think>" in text or "</think>" in text else ""
    return {char for char in region if ord(char) >= MARKS and text.count(char) == 1}


def marked(pieces: Sequence[str]) -> str:
    """Joins the pieces to one text, with a unique mark after every second one."""
    return "".join(f"{piece}{chr(MARKS + k)}" if k % 2 else piece for k, piece in enumerate(pieces))


def random_case(rng: random.Random, path: TextPath) -> list[int]:
    """Makes the token ids of one case."""
    size = len(path.tokenizer)
    pieces = [rng.choice(PIECES) if rng.random() < 0.8 else random_text(rng) for _ in range(rng.randint(0, 12))]
    if rng.random() < 0.3:  # a nearly well-formed case
        pieces = ["<think>", *pieces[:4], "</think>", "<response>" if path.format.zero else "", *pieces[4:6], "fine"]
    ids: list[int] = path.tokenizer(marked(pieces), add_special_tokens=False)["input_ids"]
    for _ in range(rng.choice((0, 0, 0, 1, 5))):
        ids.insert(rng.randint(0, len(ids)), rng.randrange(size))
    if rng.random() < 0.1:
        ids = [rng.randrange(size) for _ in range(rng.randint(1, 40))]
    return ids or [path.format.stop_token_ids(path.tokenizer)[0]]


def random_text(rng: random.Random) -> str:
    """Makes a text of random code points without surrogates and marks."""
    points = (rng.choice((rng.randrange(0x80), rng.randrange(0xD800), rng.randrange(0xE000, MARKS))) for _ in range(4))
    return "".join(map(chr, points))


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000, help="number of completions")
    parser.add_argument("--seed", type=int, default=0, help="seed of the cases")
    args = parser.parse_args()
    from rlmt.demos.tiny import write_tiny
    from rlmt.demos.tiny_models import Sizes

    rng, size = random.Random(args.seed), 100
    with tempfile.TemporaryDirectory(prefix="rlmt-fuzz-") as folder:
        tiny = Path(folder, "tiny")
        write_tiny(tiny, sizes=Sizes(hidden=64, layers=2, heads=2, ffn=128, vocab=512, context=1024))
        paths = [TextPath(tiny / "policy", format, Path(folder)) for format in FORMATS]
        began, done = time.monotonic(), 0
        while done < args.cases:
            path = paths[done // size % len(paths)]
            path.check([random_case(rng, path) for _ in range(size)])
            done += size
        print(f"{done:,} cases in {time.monotonic() - began:.0f} s, seed {args.seed}: all checks passed")
        for path in paths:
            print(f"{path.format.name}{' prefilled' if path.format.prefill else ''}: {dict(path.statuses)}")


if __name__ == "__main__":
    main()
