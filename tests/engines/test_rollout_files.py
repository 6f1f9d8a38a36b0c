"""Rollout files: exact round trips, order, and errors."""

import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rlmt.engines.rollout_files import SCHEMA, read_rollouts, rollout_table, write_rollouts
from rlmt.errors import UserError
from rlmt.types import Experience, FinishReason, Prompt, RolloutBatch, Sampling, Scores, Split, Status


@pytest.fixture
def experience() -> Experience:
    """Two prompts of two samples, with texts and numbers that a lossy format would change."""
    texts = ["<think>a\0b</think>\r\n\u2028 é 👍 c", "<think>lone \ud83d here"]
    texts += ["<think>x</think>y", "<think>z</think>w"]
    splits = [Split("a\0b", "é 👍 c", Status.OK), Split("", "", Status.UNCLOSED)]
    splits += [Split("x", "y", Status.OK), Split("z", "w", Status.OK)]
    rollouts = RolloutBatch(
        prompts=[
            Prompt(12345678901, [{"role": "system", "content": ""}, {"role": "user", "content": "q\0"}]),
            Prompt(3, [{"role": "user", "content": "p"}], {"reference": "é\u2028", "weights": [0.5, None]}),
        ],
        group_size=2,
        prompt_ids=[[1, 2, 3], [4]],
        completion_ids=[[5, 6], [7], [8, 9, 200_000], [10]],
        engine_logprobs=torch.tensor([-0.1, -1e-30, -3.3333333, -0.0, -1e30, -0.3, -7.0]),
        finish=[FinishReason.STOP, FinishReason.LENGTH, FinishReason.STOP, FinishReason.STOP],
        sampling=Sampling(0.7, max_new_tokens=64, stop=("</response>",), stop_token_ids=(9, 10), top_p=0.95),
        weight_version=17,
        epoch=2,
    )
    scores = Scores(
        torch.tensor([0.1, -5.0, 1 / 3, 2.0]),
        {"rm": torch.tensor([0.1, math.nan, 1 / 3, 2.0]), "brief": torch.tensor([1.0, math.nan, 0.0, 1.0])},
        ["é 👍 c", None, "y", ""],
    )
    return Experience(
        rollouts=rollouts,
        texts=texts,
        splits=splits,
        thought_tokens=torch.tensor([1, 1, 2, 0]),
        scores=scores,
        group=torch.tensor([0, 0, 1, 1]),
        lengths=torch.tensor([2, 1, 3, 1]),
        engine_logprobs=rollouts.engine_logprobs,
    )


def test_round_trip_through_a_file_is_exact(experience, tmp_path):
    path = tmp_path / "new" / "r.parquet"
    write_rollouts(rollout_table(experience, step=41, format={"name": "think", "prefill": False}, rank=3), path)
    assert [p.name for p in path.parent.iterdir()] == ["r.parquet"]
    table = read_rollouts(path)
    rows = {name: table[name].to_pylist() for name in table.column_names}
    assert json.loads(table.schema.metadata[b"rlmt"]) == {"format": {"name": "think", "prefill": False}}
    assert rows["step"] == [41] * 4 and rows["rank"] == [3] * 4 and rows["epoch"] == [2] * 4
    assert rows["group"] == [0, 0, 1, 1] and rows["sample"] == [0, 1, 0, 1]
    assert rows["prompt_index"] == [12345678901, 12345678901, 3, 3]
    assert rows["messages"] == [p.messages for p in experience.rollouts.prompts for _ in range(2)]
    assert [extra and json.loads(extra) for extra in rows["extra"]] == [
        p.extra or None for p in experience.rollouts.prompts for _ in range(2)
    ]
    assert rows["prompt_ids"] == [[1, 2, 3], [1, 2, 3], [4], [4]]
    assert rows["completion_ids"] == experience.rollouts.completion_ids
    assert [len(values) for values in rows["engine_logprobs"]] == [2, 1, 3, 1]
    flat = torch.tensor([value for values in rows["engine_logprobs"] for value in values])
    assert torch.equal(flat.view(torch.int32), experience.engine_logprobs.view(torch.int32)), "the bits differ"
    assert rows["text"] == [text.replace("\ud83d", "\ufffd") for text in experience.texts]
    assert rows["thought"] == ["a\0b", "", "x", "z"] and rows["response"] == ["é 👍 c", "", "y", "w"]
    assert rows["status"] == ["ok", "unclosed", "ok", "ok"]
    assert rows["finish"] == ["stop", "length", "stop", "stop"] and rows["truncated"] == [False, True, False, False]
    assert rows["thought_tokens"] == [1, 1, 2, 0] and rows["response_tokens"] == [1, 0, 1, 1]
    assert torch.equal(torch.tensor(rows["reward"]), experience.scores.total)
    rm = [dict(parts)["rm"] for parts in rows["reward_parts"]]
    assert torch.equal(torch.tensor(rm).nan_to_num(9), experience.scores.parts["rm"].nan_to_num(9))
    assert [dict(parts)["brief"] for parts in rows["reward_parts"]][2:] == [0.0, 1.0]
    assert rows["scored_text"] == ["é 👍 c", None, "y", ""], "null and the empty text are distinct"
    assert rows["weight_version"] == [17] * 4
    sampling = [rows[name] for name in ("temperature", "top_p", "max_new_tokens", "stop", "stop_token_ids")]
    assert list(zip(*sampling, strict=True)) == [(0.7, 0.95, 64, ["</response>"], [9, 10])] * 4
    assert len(rows) == len(SCHEMA)


def test_files_without_extra_columns_are_read(experience, tmp_path):
    table = rollout_table(experience, step=0)
    pq.write_table(table.drop_columns(["extra"]), tmp_path / "old.parquet")
    write_rollouts(table, tmp_path / "rows.parquet")
    assert read_rollouts(tmp_path)["extra"].to_pylist()[:4] == [None] * 4
    assert read_rollouts(tmp_path, ["text", "extra"]).schema.names == ["text", "extra"]


def test_folder_is_read_in_the_order_of_names(experience, tmp_path):
    for step, rank in ((10, 1), (2, 0), (10, 0), (2, 1)):
        write_rollouts(rollout_table(experience, step, rank=rank), tmp_path / f"x{step:02d}.rank{rank}.parquet")
    table = read_rollouts(tmp_path)
    order = list(zip(table["step"].to_pylist(), table["rank"].to_pylist(), strict=True))
    assert order[::4] == [(2, 0), (2, 1), (10, 0), (10, 1)]
    assert table["sample"].to_pylist() == [0, 1, 0, 1] * 4


def test_invalid_files_raise_one_line_errors(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.parquet").write_text("not parquet at all, but long enough")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    for name, message in (
        ("missing.parquet", "no rollouts at"),
        ("empty", "no rollouts at"),
        ("text.parquet", "is not a parquet file"),
        ("other.parquet", "not a rollout file .columns: a, "),
    ):
        with pytest.raises(UserError, match=message) as caught:
            read_rollouts(tmp_path / name)
        assert "\n" not in str(caught.value)
