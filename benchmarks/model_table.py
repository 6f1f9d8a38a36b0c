"""Measures what rlmt computes on tiny random models of many families against transformers' own forward.

    python benchmarks/model_table.py                # measures all columns but vLLM and writes the table
    python benchmarks/model_table.py --vllm         # measures the vLLM column in its place

The results are in docs/reference/models.json, and the page docs/reference/models.md is written from them. The figure
of a cell is the largest difference of a log-prob (or score) in nats, or, if larger, of a gradient relative to its
largest entry.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from families import FAMILIES, VOCABULARY, family_config, family_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from rlmt.engines import TransformersEngine, VLLMEngine
from rlmt.errors import UserError, first_line
from rlmt.memory.activations import BatchShape, micro_batch_of, update_footprint
from rlmt.models import LoRA
from rlmt.models.cache import shares_cache
from rlmt.models.loading import check_policy, meta_model
from rlmt.models.logprobs import compute_logprobs, token_logprobs
from rlmt.models.micro_batch import micro_batch_of_sequences, micro_batches, shares_prompts
from rlmt.models.reward_model import classifier_config, last_token_states, score_states
from rlmt.models.training_mode import set_training_mode
from rlmt.models.varlen import VARLEN, register_varlen, supports_varlen
from rlmt.types import FinishReason, RolloutBatch, SampleRequest, Samples, Sampling

DOCS = Path(__file__).parents[1] / "docs" / "reference"
TEMPERATURE = 0.7
CPU = torch.device("cpu")
Cell = dict[str, Any]
"""`right` or `differs`: the figure, or `refused` or `not run`: the reason."""
SAME_MODEL = 0.01
"""Largest difference in nats between two implementations of one model in float32."""
DIFFERS = (
    "vLLM's own model computes other log-probs at this size, from a checkpoint on disk, too; in a run "
    "`engine/mismatch_max` shows it, and `PolicyHealth` warns of it."
)


def rollouts() -> RolloutBatch:
    """Two prompts with three samples each, of different lengths."""
    make = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (count,), generator=make).tolist()

    lengths = [7, 1, 12, 3, 9, 2]
    return RolloutBatch(
        prompts=[],
        group_size=3,
        prompt_ids=[tokens(5), tokens(11)],
        completion_ids=[tokens(n) for n in lengths],
        engine_logprobs=torch.zeros(sum(lengths)),
        finish=[FinishReason.STOP] * 6,
        sampling=Sampling(TEMPERATURE, 16),
        weight_version=0,
    )


def plain_logprobs(model: PreTrainedModel, prompt: list[int], completion: list[int], temperature: float) -> Tensor:
    """[t] log-probs of one sample by transformers' own forward on it alone."""
    logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    logs = torch.log_softmax(logits.float() / temperature, dim=-1)
    return logs.gather(1, torch.tensor(completion)[:, None]).squeeze(1)


def weights(sample: int, length: int) -> Tensor:
    """[t] weights of a sample's log-probs in the sum whose gradient is compared."""
    return torch.sin(torch.arange(length) + 3.0 * sample)


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """The gradients of a model; they are cleared."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def difference(ours: dict[int, Tensor], theirs: dict[int, Tensor], own: Any, their: Any) -> float:
    """The largest difference of a log-prob, or of a gradient relative to the largest entry of all gradients."""
    scale = max(float(g.abs().max()) for g in their.values())
    grads = max(
        float((own[name] - g).abs().max()) if name in own else float(g.abs().max()) for name, g in their.items()
    )
    return max(*(float((ours[i] - theirs[i]).detach().abs().max()) for i in theirs), grads / scale)


def policy_cell(model: PreTrainedModel, share: bool, packed: bool = False) -> Cell:
    """RL: log-probs and gradients in training mode, and the first ratio, which is 1."""
    batch, theirs, ours = rollouts(), {}, {}
    model.eval()
    for i, completion in enumerate(batch.completion_ids):
        theirs[i] = plain_logprobs(model, batch.prompt_ids[i // 3], completion, TEMPERATURE)
        (theirs[i] * weights(i, len(completion))).sum().backward()
    expected = gradients(model)
    set_training_mode(model, gradient_checkpointing=False, dropout=False)
    if packed and not supports_varlen(model.config):
        return {"refused": "layers that are not plain causal attention, or are not told where packed rows begin"}
    if packed:
        register_varlen()
        model.set_attn_implementation(VARLEN)
    if share and not shares_prompts(model):
        return {"own prompts": "its state cannot be shared"}
    for part in micro_batches(batch, range(6), 60, share, CPU, packed=packed):
        logprobs = token_logprobs(model, part, TEMPERATURE).logprobs.split([batch.lengths[i] for i in part.samples])
        sum((lp * weights(i, len(lp))).sum() for i, lp in zip(part.samples, logprobs, strict=True)).backward()
        ours |= dict(zip(part.samples, logprobs, strict=True))
    figure = difference(ours, theirs, gradients(model), expected)
    old = compute_logprobs(model, batch, 60, CPU)
    ratio = (torch.cat([ours[i] for i in range(6)]) - old).exp()
    return {"right": max(figure, float((ratio - 1).abs().max()))}


def sft_cell(model: PreTrainedModel) -> Cell:
    """SFT: the loss and its gradients against transformers' own loss on rows with masked prompts."""
    batch = rollouts()
    rows = [batch.prompt_ids[i // 3] + ids for i, ids in enumerate(batch.completion_ids)]
    prompts = [len(batch.prompt_ids[i // 3]) for i in range(6)]
    model.eval()
    theirs = torch.zeros(())
    for row, prompt in zip(rows, prompts, strict=True):
        labels = torch.tensor([[-100] * prompt + row[prompt:]])
        loss = model(input_ids=torch.tensor([row]), labels=labels, use_cache=False).loss * (len(row) - prompt)
        loss.backward()
        theirs += loss.detach()
    expected = gradients(model)
    part = micro_batch_of_sequences(list(range(6)), [torch.tensor(row) for row in rows], prompts, False, CPU)
    ours = -token_logprobs(model, part, 1.0).logprobs.sum()
    ours.backward()
    total = sum(batch.lengths)
    return {"right": difference({0: ours / total}, {0: theirs / total}, gradients(model), expected)}


def reward_cell(name: str) -> Cell:
    """Reward models: scores of a padded batch against transformers' own of each row alone."""
    config = family_config(name)
    config.num_labels = 1
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        try:
            classifier_config(folder)
        except UserError as error:
            raise UserError(str(error).replace(folder, name)) from error
    model = family_model(name, AutoModelForSequenceClassification, num_labels=1)
    batch = rollouts()
    rows = [torch.tensor(batch.prompt_ids[i // 3] + ids) for i, ids in enumerate(batch.completion_ids)]
    with torch.no_grad():
        theirs = torch.cat([model(input_ids=row[None]).logits[0] for row in rows])
        backbone = getattr(model, model.base_model_prefix)
        ours = score_states(model, last_token_states(backbone, rows, CPU))
    return {"right": float((ours - theirs).abs().max())}


def engine_cell(engine: Any, model: PreTrainedModel, tokenizer: Any) -> Cell:
    """Engines: the log-probs of the samples against transformers' own forward."""
    engine.check_policy(model.config)
    requests = [SampleRequest(prompt, [0, 1, 2]) for prompt in rollouts().prompt_ids]
    engine.start(model, tokenizer, 64, torch.float32)
    try:
        engine.sync(iter(model.state_dict().items()), 1)
        samples: Samples = engine.generate(requests, Sampling(TEMPERATURE, 24, stop_token_ids=tuple(range(3, 12))))
    finally:
        engine.close()
    prompts = [request.prompt_ids for request in requests for _ in request.seeds]
    with torch.no_grad():
        gaps = [
            (plain_logprobs(model, prompt, ids, TEMPERATURE) - torch.tensor(logprobs)).abs().max()
            for prompt, ids, logprobs in zip(prompts, samples.completion_ids, samples.logprobs, strict=True)
        ]
    return {"right": float(max(gaps))}


def lora_cell(name: str) -> Cell:
    """LoRA: as `policy_cell`, with a trained adapter, against the adapted model's own forward."""
    model = family_model(name)
    LoRA(rank=4).add_to(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape)
    return policy_cell(model, share=shares_cache(model.config))


def plan_cell(name: str) -> Cell:
    """`rlmt plan`: saved activation bytes on fake tensors, relative to those that a real backward saves."""
    model = family_model(name)
    shape = BatchShape(3, 9, 8, shared_prefix=shares_cache(model.config))
    set_training_mode(model, gradient_checkpointing=False, dropout=False)
    saved: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept = []

    def save(tensor: Tensor) -> Tensor:
        kept.append(tensor)  # alive, so that no address is used twice
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        outputs = token_logprobs(model, micro_batch_of(shape), 1.0)
    assert outputs.logprobs.requires_grad
    planned = meta_model(family_config(name))
    set_training_mode(planned, gradient_checkpointing=False, dropout=False)
    return {"right": abs(update_footprint(planned, shape, None).saved / sum(saved.values()) - 1)}


COLUMNS: dict[str, Callable[[str], Cell]] = {
    "RL, own prompts": lambda name: policy_cell(family_model(name), share=False),
    "RL, shared prompts": lambda name: policy_cell(family_model(name), share=True),
    "RL, packed rows": lambda name: policy_cell(family_model(name), share=False, packed=True),
    "SFT": lambda name: sft_cell(family_model(name)),
    "Reward": reward_cell,
    "TransformersEngine": lambda name: engine_cell(TransformersEngine(), family_model(name), None),
    "LoRA": lora_cell,
    "Plan": plan_cell,
}
VLLM = "vLLM, CPU"


def measure(name: str, columns: Iterable[str] = tuple(COLUMNS)) -> dict[str, Cell]:
    """Some cells of a family; all columns but rewards require that it can be a policy."""
    cells: dict[str, Cell] = {}
    for column in columns:
        try:
            if column != "Reward":
                check_policy(family_config(name), name)
            cells[column] = COLUMNS[column](name)
        except UserError as error:
            cells[column] = {"refused": str(error)}
    return cells


def measure_vllm(name: str, tokenizer: Any) -> Cell:
    """VLLM's cell of a family."""
    try:
        check_policy(family_config(name), name)
        cell = engine_cell(VLLMEngine(cpu_kv_cache_gib=0.25, max_num_seqs=8), family_model(name), tokenizer)
        return {"differs": cell["right"]} if cell.get("right", 0.0) > SAME_MODEL else cell
    except UserError as error:
        return {"refused": str(error)}
    except Exception as error:  # a kernel that vLLM's CPU build lacks is found at the first rollout
        return {"not run": f"{type(error).__name__}: {first_line(error)}"}


def byte_tokenizer() -> Any:
    """A tokenizer of bytes, which vLLM reads for stop strings."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {piece: i for i, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    build: Any = PreTrainedTokenizerFast
    return build(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|pad|>")


def page(results: dict[str, dict[str, Cell]]) -> str:
    """The page docs/reference/models.md."""
    columns = [*COLUMNS, VLLM]
    notes: list[str] = []

    def cell(content: Cell) -> str:
        ((kind, value),) = content.items()
        if kind == "right":
            return f"{value:.0%}" if value >= 0.01 else f"{value:.0e}"
        if kind == "differs":
            kind, value = f"differs by {value:.1g}", DIFFERS
        if value not in notes:
            notes.append(value)
        return f"{kind} [{notes.index(value) + 1}](#reasons)"

    rows = [
        f"| {name} (`{FAMILIES[name][0]}`) | " + " | ".join(cell(results[name][column]) for column in columns) + " |"
        for name in FAMILIES
    ]
    table = ["| family | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 1), *rows]
    reasons = [f"{i}. {note}" for i, note in enumerate(notes, 1)]
    return "\n".join([INTRO.strip(), "", *table, "", "## Reasons", "", *reasons, ""])


INTRO = """
# Model families

What is computed on each family, against transformers' own forward of each sample alone: tiny random models in
float32, at temperature 0.7, with dropout 0.1 in the configs of Granite, GPT-2, OPT, Phi, Phi-3 and Seed-OSS. A number
is the largest difference, of a log-prob in nats or of a gradient relative to its largest entry; in the column of
`rlmt plan` it is the difference of the planned activation memory from the measured one. A family that is refused is
refused in one line before any weights are loaded, by vLLM at its start or at the first sync.

Where samples cannot share the state of a prompt, each sample carries its own prompt in every pass; that is slower and
gives the same numbers. The table is measured by `python benchmarks/model_table.py`, with the versions of transformers
and vLLM that this package pins.
"""


def main() -> None:
    """Measures, and writes the data and the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm", action="store_true")
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    file = DOCS / "models.json"
    results: dict[str, dict[str, Cell]] = json.loads(file.read_text()) if file.is_file() else {}
    tokenizer = byte_tokenizer()
    for name in options.families:
        old = results.get(name, {})
        cells = {VLLM: measure_vllm(name, tokenizer)} if options.vllm else measure(name)
        known = {VLLM: {"not run": "not measured yet"}} | old | cells
        results[name] = {column: known[column] for column in (*COLUMNS, VLLM) if column in known}
        print(name, cells, flush=True)
        results = {family: results[family] for family in FAMILIES if family in results}
        file.write_text(json.dumps(results, indent=1) + "\n")
    if results.keys() == FAMILIES.keys():
        (DOCS / "models.md").write_text(page(results))


if __name__ == "__main__":
    main()
