"""Reference log-probs are the model's own, computed once, and never those of something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from rlmt.engines.offline_rollouts import OfflineRollouts
from rlmt.engines.rollout_files import SCHEMA, write_rollouts
from rlmt.errors import UserError
from rlmt.modules import offline_rollouts
from rlmt.modules.offline_rollouts import fingerprint, reference_logprobs

CPU = torch.device("cpu")


def model(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, initializer_range=0.2)).eval()


def record(path: Path, changed: bool = False) -> OfflineRollouts:
    """40 groups of 1 to 3 samples of 1 to 30 tokens."""
    make = torch.Generator().manual_seed(0)

    def tokens(longest: int) -> list[int]:
        length = int(torch.randint(1, longest + 1, (1,), generator=make))
        return torch.randint(0, 61, (length,), generator=make).tolist()  # type: ignore[no-any-return]

    rows: list[dict[str, Any]] = []
    for group in range(40):
        prompt = tokens(12)
        for sample in range(1 + group // 14):
            ids = tokens(30)
            rows.append(dict.fromkeys(SCHEMA.names))
            rows[-1] |= {"step": 0, "rank": 0, "epoch": 0, "group": group, "sample": sample, "prompt_ids": prompt}
            rows[-1] |= {"completion_ids": ids, "engine_logprobs": [-1.0] * len(ids), "finish": "stop"}
            rows[-1] |= {"weight_version": 0, "temperature": 0.7, "top_p": 1.0, "max_new_tokens": 30}
            rows[-1] |= {"stop": [], "stop_token_ids": []}
    if changed:
        rows[-1]["completion_ids"][-1] ^= 1
    form = b'{"format": {"name": "think", "prefill": false, "instruction": null}}'
    write_rollouts(pa.Table.from_pylist(rows, schema=SCHEMA.with_metadata({b"rlmt": form})), path)
    return OfflineRollouts(str(path))


def cached(
    recording: OfflineRollouts, reference: PreTrainedModel, temperature: float = 0.7, precision: str = "32-true"
) -> Any:
    return reference_logprobs(recording, reference, temperature, precision, 200, CPU, progress=False, write=True)


@torch.no_grad()
def slow(recording: OfflineRollouts, reference: PreTrainedModel, temperature: float) -> torch.Tensor:
    """One forward a sample, all logits at once."""
    parts = []
    for group, rows in enumerate(recording.groups):
        prompt = recording.prompt_ids[group].tolist()
        for row in rows:
            ids = recording.completion_ids[recording.starts[row] : recording.starts[row + 1]].tolist()
            logits = reference(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / temperature
            parts.append(torch.log_softmax(logits, -1).gather(1, torch.tensor(ids)[:, None]).squeeze(1))
    return torch.cat(parts)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The samples of each forward."""
    seen: list[int] = []
    inner = offline_rollouts.compute_logprobs

    def counting_logprobs(reference: Any, rollouts: Any, *more: Any) -> torch.Tensor:
        seen.append(len(rollouts))
        return inner(reference, rollouts, *more)

    monkeypatch.setattr(offline_rollouts, "compute_logprobs", counting_logprobs)
    return seen


def test_they_are_the_references_and_computed_once(tmp_path: Path, counted: list[int]) -> None:
    recording, reference = record(tmp_path / "r.parquet"), model()
    got = cached(recording, reference)
    assert sum(counted) == len(recording) and len(counted) > 2
    torch.testing.assert_close(got, slow(recording, reference, 0.7), rtol=1e-5, atol=1e-5)
    del counted[:]
    again = cached(OfflineRollouts(str(tmp_path / "r.parquet")), model())
    assert torch.equal(got, again) and counted == []
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 2 and names[0].startswith("r.") and names[1].startswith("r.reference-")


def test_another_reference_temperature_precision_or_recording_has_a_file_of_its_own(
    tmp_path: Path, counted: list[int]
) -> None:
    recording, reference = record(tmp_path / "r.parquet"), model()
    first = cached(recording, reference)
    others = [cached(recording, model(1)), cached(recording, reference, temperature=1.0)]
    cached(recording, reference, precision="bf16-mixed")
    others.append(cached(record(tmp_path / "r.parquet", changed=True), reference))
    assert sum(counted) == 5 * len(recording) and not any(torch.equal(first, other) for other in others)
    torch.testing.assert_close(others[1], slow(recording, reference, 1.0), rtol=1e-5, atol=1e-5)
    assert len(list(tmp_path.glob("*.safetensors"))) == 5


def test_a_folder_of_rollouts_holds_its_file(tmp_path: Path) -> None:
    record(tmp_path / "rollouts_000000-000009.parquet")
    recording = OfflineRollouts(str(tmp_path))
    got = cached(recording, model())
    (path,) = tmp_path.glob("*.safetensors")
    assert path.name.startswith("reference-")
    assert torch.equal(cached(OfflineRollouts(str(tmp_path)), model()), got)


def test_an_interruption_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recording, calls, inner = record(tmp_path / "r.parquet"), [], offline_rollouts.compute_logprobs

    def interrupted(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return inner(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(offline_rollouts, "compute_logprobs", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cached(recording, model())
    assert [path.name for path in tmp_path.iterdir()] == ["r.parquet"]
    torch.testing.assert_close(cached(recording, model()), slow(recording, model(), 0.7), rtol=1e-5, atol=1e-5)


def test_only_the_process_that_writes_writes(tmp_path: Path) -> None:
    recording = record(tmp_path / "r.parquet")
    reference_logprobs(recording, model(), 0.7, "32-true", 200, CPU, progress=False, write=False)
    assert [path.name for path in tmp_path.iterdir()] == ["r.parquet"]


def test_damage_and_folders_out_of_reach_are_told(tmp_path: Path, counted: list[int]) -> None:
    recording = record(tmp_path / "r.parquet")
    cached(recording, model())
    (path,) = tmp_path.glob("*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(UserError, match="is damaged .*delete it"):
        cached(recording, model())
    del counted[:]
    recording.path = str(tmp_path / "gone" / "r.parquet")
    with pytest.raises(UserError, match="gone cannot be written to"):
        cached(recording, model())
    assert counted == [], "raised before anything is computed"


def test_a_fingerprint_sees_every_element_and_its_place() -> None:
    reference = model()
    prints = [fingerprint(reference)]
    assert fingerprint(model()) == prints[0]
    weight = reference.model.embed_tokens.weight.detach()
    for change in (
        lambda: weight[17, 5].add_(1e-6),
        lambda: weight.copy_(weight.flip(0)),  # the same numbers elsewhere
        lambda: reference.bfloat16(),
    ):
        change()
        prints.append(fingerprint(reference))
    assert len(set(prints)) == 4
