"""Recorded samples come back exactly, in turn, and only where they fit the run."""

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
    """Makes the table of one step: G samples a question, every number in them told by step, question and sample."""

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


def test_samples_come_back_exactly(record: Any, tokenizer: Any, sampling: Sampling, tmp_path: Path) -> None:
    path = tmp_path / "predictions.parquet"
    table = record([0, 1])
    write_rollouts(table, path)
    engine = ReplayEngine(str(path))
    engine.check()
    engine.check_run(FORMAT, tokenizer, sampling, 3, 300)
    rows = table.to_pylist()
    for wanted in (3, 2):
        requests = [SampleRequest(prompt_ids(q, tokenizer), list(range(wanted))) for q in (1, 0)]
        samples = engine.generate(requests, sampling)
        expected = rows[3 : 3 + wanted] + rows[:wanted]
        assert samples.completion_ids == [row["completion_ids"] for row in expected]
        assert samples.logprobs == [row["engine_logprobs"] for row in expected]
        assert samples.finish == [row["finish"] for row in expected]
        assert samples.weight_version == 10 and samples.ref_logprobs is None
    assert engine.knows(prompt_ids(0, tokenizer)) and not engine.knows(prompt_ids(2, tokenizer))
    engine.recording.ref_logprobs = torch.arange(len(engine.recording.completion_ids)).float()
    samples = engine.generate([SampleRequest(prompt_ids(1, tokenizer), [0])], sampling)
    # question 0 has samples of 3, 4 and 5 tokens, so question 1 begins with token 12
    assert samples.ref_logprobs == [[12.0, 13.0, 14.0]]


def test_passes_take_the_groups_of_a_prompt_in_turn(
    record: Any, tokenizer: Any, sampling: Sampling, tmp_path: Path
) -> None:
    # Names order the ranks' files one after the other; passes and steps order the groups.
    write_rollouts(pa.concat_tables([record([0], step=1), record([0, 1], step=4, epoch=2)]), tmp_path / "a.parquet")
    write_rollouts(record([1, 0], step=2, epoch=1, rank=1), tmp_path / "b.parquet")
    engine = ReplayEngine(str(tmp_path))
    engine.check()
    engine.check_run(FORMAT, tokenizer, sampling, 2, 300)
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


def test_groups_of_one_key_in_two_files_stay_apart(record: Any, tmp_path: Path) -> None:
    for name in "ab":
        write_rollouts(record([0, 1]), tmp_path / f"{name}.parquet")
    engine = ReplayEngine(str(tmp_path))
    engine.check()
    assert engine.recording.groups == [range(0, 3), range(3, 6), range(6, 9), range(9, 12)]


def put(table: pa.Table, column: str, values: list[Any]) -> pa.Table:
    """The table with other values in a column."""
    index = table.schema.get_field_index(column)
    return table.set_column(index, table.schema.field(index), pa.array(values, table.schema.field(index).type))


BROKEN = [
    (lambda table: table.slice(0, 0), "holds no samples"),
    (lambda table: table.drop_columns(["finish"]), "not a file of rollouts"),
    (lambda table: table.replace_schema_metadata(None), "does not say in which format"),
    (lambda table: put(table, "completion_ids", [[1, 2]] * 6), "row 1 has 2 tokens and 3 log-probs"),
    (lambda table: put(put(table, "completion_ids", [[]] * 6), "engine_logprobs", [[]] * 6), "row 1 has 0 tokens"),
    (
        lambda table: put(table, "engine_logprobs", [[float("nan")] * (3 + i % 3) for i in range(6)]),
        "no finite numbers",
    ),
]


@pytest.mark.parametrize(("change", "says"), BROKEN)
def test_what_is_no_recording_is_told_in_one_line(change: Any, says: str, record: Any, tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    pq.write_table(change(record([0, 1])), path)
    with pytest.raises(UserError, match=says) as caught:
        ReplayEngine(str(path)).check()
    assert str(caught.value).startswith(f"--data.engine.path: {path}") and "\n" not in str(caught.value)


def test_missing_and_torn_files_are_told(record: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--data.engine.path: no rollouts at .*none.parquet"):
        ReplayEngine(str(tmp_path / "none.parquet")).check()
    write_rollouts(record([0]), tmp_path / "r.parquet")
    (tmp_path / "torn.parquet").write_bytes((tmp_path / "r.parquet").read_bytes()[:-50])
    with pytest.raises(UserError, match="torn.parquet is not a parquet file"):
        ReplayEngine(str(tmp_path / "torn.parquet")).check()


def test_a_folder_holds_one_format(record: Any, tmp_path: Path) -> None:
    table = record([0])
    write_rollouts(table, tmp_path / "a.parquet")
    write_rollouts(table.replace_schema_metadata({b"rlmt": b'{"format": {}}'}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match="b.parquet is in another format than a.parquet"):
        read_rollouts(tmp_path)


def test_another_run_is_refused(record: Any, tokenizer: Any, sampling: Sampling, tmp_path: Path) -> None:
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
        ((FORMAT, tokenizer, replace(sampling, max_new_tokens=4), 3), "5 tokens, .* set it to 5 or more"),
        ((FORMAT, tokenizer, sampling, 4), "holds 3 samples a prompt, and --data.group_size asks for 4"),
    ]
    for arguments, says in cases:
        with pytest.raises(UserError, match=says) as caught:
            engine.check_run(*arguments, 300)
        assert "\n" not in str(caught.value)
    engine.check_run(FORMAT, tokenizer, replace(sampling, max_new_tokens=5), 3, 300)
    with pytest.raises(UserError, match="holds token 448, and the policy has only 448"):
        engine.recording.check_vocabulary(448)
    engine.recording.check_vocabulary(449)


def test_a_tokenizer_that_renders_alike_and_decodes_otherwise_is_refused(
    record: Any, tokenizer: Any, sampling: Sampling, tmp_path: Path
) -> None:
    table = record([0])
    write_rollouts(put(table, "text", [text + "?" for text in table["text"].to_pylist()]), tmp_path / "r.parquet")
    engine = ReplayEngine(str(tmp_path / "r.parquet"))
    engine.check()
    with pytest.raises(UserError, match="another tokenizer"):
        engine.check_run(FORMAT, tokenizer, sampling, 3, 300)


def test_what_was_not_recorded_is_not_made_up(record: Any, tokenizer: Any, sampling: Sampling, tmp_path: Path) -> None:
    write_rollouts(record([0]), tmp_path / "r.parquet")
    engine = ReplayEngine(str(tmp_path / "r.parquet"))
    engine.check()
    with pytest.raises(UserError, match="holds no samples of a prompt"):
        engine.generate([SampleRequest(prompt_ids(1, tokenizer), [0])], sampling)
    with pytest.raises(UserError, match="holds 3 samples of a prompt, and 4 are asked for: lower --data.group_size"):
        engine.generate([SampleRequest(prompt_ids(0, tokenizer), [0, 1, 2, 3])], sampling)
