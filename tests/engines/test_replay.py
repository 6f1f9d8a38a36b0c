"""ReplayEngine: exact samples, the order of groups over epochs, and the checks of a recording."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rlmt.engines import ReplayEngine
from rlmt.engines.rollout_files import read_rollouts, rollout_table, write_rollouts
from rlmt.errors import UserError
from rlmt.formats.thinking import ThinkingFormat
from rlmt.models.loading import load_tokenizer
from rlmt.types import Experience, FinishReason, Prompt, RolloutBatch, SampleRequest, Sampling, Scores

FORMAT = ThinkingFormat("think")
QUESTIONS = ["Why is the sky blue?", "Name three cities.", "Tell me a story about rain."]


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    return load_tokenizer(tiny / "policy")


@pytest.fixture
def sampling(tokenizer: Any) -> Sampling:
    return Sampling(0.7, max_new_tokens=16, stop_token_ids=FORMAT.stop_token_ids(tokenizer))


def prompt_ids(question: int, tokenizer: Any) -> list[int]:
    return FORMAT.render([{"role": "user", "content": QUESTIONS[question]}], tokenizer)


@pytest.fixture
def record(tokenizer: Any, sampling: Sampling) -> Callable[..., pa.Table]:
    """Builds the table of one step: G samples per question, with values that encode step, question and sample."""

    def table(questions: list[int], group_size: int = 3, step: int = 0, epoch: int = 0, rank: int = 0) -> pa.Table:
        prompts = [Prompt(q, [{"role": "user", "content": QUESTIONS[q]}]) for q in questions]
        ids = [[100 + step, 110 + q, *range(120, 121 + g)] for q in questions for g in range(group_size)]
        lengths = [len(row) for row in ids]
        count = len(ids)
        rollouts = RolloutBatch(
            prompts=prompts,
            group_size=group_size,
            prompt_ids=[FORMAT.render(p.messages, tokenizer) for p in prompts],
            completion_ids=ids,
            engine_logprobs=-torch.arange(sum(lengths)) / 8 - step,
            finish=[FinishReason.LENGTH if i % 2 else FinishReason.STOP for i in range(count)],
            sampling=sampling,
            weight_version=10 + step,
            epoch=epoch,
        )
        texts = [FORMAT.decode(row, tokenizer) for row in ids]
        experience = Experience(
            rollouts=rollouts,
            texts=texts,
            splits=[FORMAT.split(text) for text in texts],
            thought_tokens=torch.ones(count, dtype=torch.int64),
            scores=Scores(torch.zeros(count), {}, [None] * count),
            group=torch.arange(len(prompts)).repeat_interleave(group_size),
            lengths=torch.tensor(lengths),
            engine_logprobs=rollouts.engine_logprobs,
        )
        return rollout_table(experience, step, format=FORMAT.to_dict(), rank=rank)

    return table


def test_replayed_samples_equal_the_recorded(record: Any, tokenizer: Any, sampling: Sampling, tmp_path: Path) -> None:
    path = tmp_path / "predictions.parquet"
    table = record([0, 1])
    write_rollouts(table, path)
    engine = ReplayEngine(str(path))
    engine.check()
    engine.check_sampling(FORMAT, tokenizer, sampling, 3, 300)
    rows = table.to_pylist()
    for count in (3, 2):
        requests = [SampleRequest(prompt_ids(q, tokenizer), list(range(count))) for q in (1, 0)]
        samples = engine.generate(requests, sampling)
        expected = rows[3 : 3 + count] + rows[:count]
        assert samples.completion_ids == [row["completion_ids"] for row in expected]
        assert samples.logprobs == [row["engine_logprobs"] for row in expected]
        assert samples.finish == [row["finish"] for row in expected]
        assert samples.weight_version == 10 and samples.ref_logprobs is None
    assert engine.has_prompt(prompt_ids(0, tokenizer)) and not engine.has_prompt(prompt_ids(2, tokenizer))
    engine.rollouts.ref_logprobs = torch.arange(len(engine.rollouts.completion_ids)).float()
    samples = engine.generate([SampleRequest(prompt_ids(1, tokenizer), [0])], sampling)
    # Question 0 has samples of 3, 4 and 5 tokens, so question 1 starts at token 12.
    assert samples.ref_logprobs == [[12.0, 13.0, 14.0]]


def test_epochs_cycle_through_the_groups_of_a_prompt(
    record: Any, tokenizer: Any, sampling: Sampling, tmp_path: Path
) -> None:
    # Files are read in the order of their names; groups are ordered by epoch and step.
    write_rollouts(pa.concat_tables([record([0], step=1), record([0, 1], step=4, epoch=2)]), tmp_path / "a.parquet")
    write_rollouts(record([1, 0], step=2, epoch=1, rank=1), tmp_path / "b.parquet")
    engine = ReplayEngine(str(tmp_path))
    engine.check()
    engine.check_sampling(FORMAT, tokenizer, sampling, 2, 300)
    steps: dict[int, list[int]] = {0: [], 1: []}
    for epoch in range(5):
        for question, found in steps.items():
            samples = engine.generate([SampleRequest(prompt_ids(question, tokenizer), [0, 1], epoch)], sampling)
            first, second = samples.completion_ids
            assert first == [first[0], 110 + question, 120] and second == [first[0], 110 + question, 120, 121]
            assert samples.weight_version == 10 + first[0] - 100
            found.append(first[0] - 100)
    assert steps == {0: [1, 2, 4, 1, 2], 1: [2, 4, 2, 4, 2]}
    requests = [SampleRequest(prompt_ids(question, tokenizer), [0]) for question in (0, 1)]
    assert engine.generate(requests, sampling).weight_version == 11, "the lowest of the batch"


def test_groups_of_two_files_are_not_merged(record: Any, tmp_path: Path) -> None:
    for name in "ab":
        write_rollouts(record([0, 1]), tmp_path / f"{name}.parquet")
    engine = ReplayEngine(str(tmp_path))
    engine.check()
    assert engine.rollouts.groups == [range(0, 3), range(3, 6), range(6, 9), range(9, 12)]


def replace_column(table: pa.Table, column: str, values: list[Any]) -> pa.Table:
    """The table with new values in a column."""
    index = table.schema.get_field_index(column)
    return table.set_column(index, table.schema.field(index), pa.array(values, table.schema.field(index).type))


INVALID = [
    (lambda table: table.slice(0, 0), "has no samples"),
    (lambda table: table.drop_columns(["finish"]), "not a rollout file"),
    (lambda table: table.replace_schema_metadata(None), "does not name the thinking format"),
    (lambda table: replace_column(table, "completion_ids", [[1, 2]] * 6), "row 1 has 2 tokens and 3 log-probs"),
    (
        lambda table: replace_column(replace_column(table, "completion_ids", [[]] * 6), "engine_logprobs", [[]] * 6),
        "row 1 has 0 tokens",
    ),
    (
        lambda table: replace_column(table, "engine_logprobs", [[float("nan")] * (3 + i % 3) for i in range(6)]),
        "log-probs that are not finite",
    ),
]


@pytest.mark.parametrize(("change", "message"), INVALID)
def test_invalid_recordings_raise_one_line_errors(change: Any, message: str, record: Any, tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    pq.write_table(change(record([0, 1])), path)
    with pytest.raises(UserError, match=message) as caught:
        ReplayEngine(str(path)).check()
    assert str(caught.value).startswith(f"--data.engine.path: {path}") and "\n" not in str(caught.value)


def test_missing_and_truncated_files_raise(record: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--data.engine.path: no rollouts at .*none.parquet"):
        ReplayEngine(str(tmp_path / "none.parquet")).check()
    write_rollouts(record([0]), tmp_path / "r.parquet")
    (tmp_path / "truncated.parquet").write_bytes((tmp_path / "r.parquet").read_bytes()[:-50])
    with pytest.raises(UserError, match="truncated.parquet is not a parquet file"):
        ReplayEngine(str(tmp_path / "truncated.parquet")).check()


def test_folder_with_two_formats_raises(record: Any, tmp_path: Path) -> None:
    table = record([0])
    write_rollouts(table, tmp_path / "a.parquet")
    write_rollouts(table.replace_schema_metadata({b"rlmt": b'{"format": {}}'}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match="b.parquet has another format than a.parquet"):
        read_rollouts(tmp_path)


def test_check_run_rejects_other_settings(record: Any, tokenizer: Any, sampling: Sampling, tmp_path: Path) -> None:
    write_rollouts(record([0, 1]), tmp_path / "r.parquet")
    engine = ReplayEngine(str(tmp_path / "r.parquet"))
    engine.check()
    other = load_tokenizer(tokenizer.name_or_path)
    other.chat_template = other.chat_template.replace("user", "human") + " "
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((ThinkingFormat("no_think"), tokenizer, sampling, 3), "recorded with .*'think'.* --model.format"),
        ((FORMAT, other, sampling, 3), "another tokenizer or chat template"),
        ((FORMAT, tokenizer, replace(sampling, temperature=1.0), 3), "temperature 0.7: set --data.temperature 0.7"),
        ((FORMAT, tokenizer, replace(sampling, top_p=0.9), 3), "top_p 1: set --data.top_p 1"),
        ((FORMAT, tokenizer, replace(sampling, stop_token_ids=(7,)), 3), "other stop tokens"),
        ((FORMAT, tokenizer, replace(sampling, max_new_tokens=4), 3), "5 tokens, .* set it to at least 5"),
        ((FORMAT, tokenizer, sampling, 4), "has 3 samples per prompt, but --data.group_size is 4"),
    ]
    for arguments, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            engine.check_sampling(*arguments, 300)
        assert "\n" not in str(caught.value)
    engine.check_sampling(FORMAT, tokenizer, replace(sampling, max_new_tokens=5), 3, 300)
    with pytest.raises(UserError, match="has token 448, but the policy's vocabulary has only 448"):
        engine.rollouts.check_vocabulary(448)
    engine.rollouts.check_vocabulary(449)


def test_check_run_rejects_a_tokenizer_that_only_decodes_differently(
    record: Any, tokenizer: Any, sampling: Sampling, tmp_path: Path
) -> None:
    table = record([0])
    write_rollouts(
        replace_column(table, "text", [text + "?" for text in table["text"].to_pylist()]), tmp_path / "r.parquet"
    )
    engine = ReplayEngine(str(tmp_path / "r.parquet"))
    engine.check()
    with pytest.raises(UserError, match="another tokenizer"):
        engine.check_sampling(FORMAT, tokenizer, sampling, 3, 300)


def test_unrecorded_prompts_and_samples_raise(record: Any, tokenizer: Any, sampling: Sampling, tmp_path: Path) -> None:
    write_rollouts(record([0]), tmp_path / "r.parquet")
    engine = ReplayEngine(str(tmp_path / "r.parquet"))
    engine.check()
    with pytest.raises(UserError, match="has no samples of a prompt"):
        engine.generate([SampleRequest(prompt_ids(1, tokenizer), [0])], sampling)
    with pytest.raises(UserError, match="has 3 samples of a prompt, but 4 are requested; lower --data.group_size"):
        engine.generate([SampleRequest(prompt_ids(0, tokenizer), [0, 1, 2, 3])], sampling)
