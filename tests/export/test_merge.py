"""Exports of LoRA, DoRA and QLoRA checkpoints equal the training policy."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, PreTrainedModel, Qwen2Config

import rlmt.export.merge
from rlmt.errors import UserError
from rlmt.export.checkpoints import export
from rlmt.formats.thinking import ThinkingFormat
from rlmt.models.assets import save_policy_assets
from rlmt.models.loading import load_policy, load_tokenizer
from rlmt.models.quantization import quantized_weights, round_trip_nf4

FORMAT = ThinkingFormat(prefill=True)
IDS = torch.arange(7, 71).view(2, 32)


def make_base(tiny: Path, folder: Path, family: str = "llama", tied: bool = False, **options: Any) -> Path:
    """A random model whose weights are large enough for every layer to change the outputs."""
    config: Any = {"llama": LlamaConfig, "qwen2": Qwen2Config}[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=128,
            initializer_range=0.1,
            tie_word_embeddings=tied,
        )
    )
    model.save_pretrained(folder, **options)
    load_tokenizer(tiny / "policy").save_pretrained(folder)
    return folder


def load_training_policy(base: Path, double_quant: bool | None = None, **lora: Any) -> PreTrainedModel:
    """The policy as the trainer loads it, with a non-zero adapter."""
    options: dict[str, Any] = {}
    if double_quant is not None:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=torch.float32,
        )
    policy = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **options)
    options = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear"} | lora
    policy.add_adapter(LoraConfig(**options, base_model_name_or_path=str(base)), adapter_name="default")
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.05)
            elif ".lora_magnitude_vector." in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
    return policy.train()  # in eval mode bitsandbytes rewrites 4-bit weights on CPUs with bfloat16


def checkpoint(policy: PreTrainedModel, base: Path, double_quant: bool | None = None) -> dict[str, Any]:
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in policy.peft_config["default"].to_dict().items()}
    adapter = {f"policy.{name}": t for name, t in policy.state_dict().items() if ".lora_" in name}
    critics = {name.replace(".default.", ".critic."): torch.full_like(t, torch.nan) for name, t in adapter.items()}
    return {
        "state_dict": adapter | critics | {"critic.head.weight": torch.ones(1, 64)},
        "rlmt": {
            "policy": str(base),
            "format": FORMAT.to_dict(),
            "version": 3,
            "adapter": json.loads(json.dumps(config)),
            "quantization": None if double_quant is None else {"double_quant": double_quant},
        },
    }


def write(run: Path, policy: PreTrainedModel, base: Path, double_quant: bool | None = None) -> Path:
    config = type(policy.config).from_dict(policy.config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    save_policy_assets(run / "policy", config, load_tokenizer(base), FORMAT, [1])
    torch.save(checkpoint(policy, base, double_quant), run / "last.ckpt")
    return run / "last.ckpt"


@torch.no_grad()
def logprobs(policy: Any, ids: Tensor = IDS) -> Tensor:
    """[rows, length - 1] log-prob of each token after the first."""
    logits = policy(input_ids=ids).logits[:, :-1].log_softmax(-1)
    return logits.gather(-1, ids[:, 1:, None]).squeeze(-1)


CASES = {
    "lora": ({}, None, {}),
    "rslora": ({"use_rslora": True}, None, {"tied": True}),
    "dora": ({"use_dora": True}, None, {"family": "qwen2"}),
    "some layers, sharded base": ({"target_modules": ["q_proj", "down_proj"]}, None, {"max_shard_size": "40KB"}),
    "qlora": ({}, True, {}),
    "qlora, scales not quantized, tied": ({}, False, {"tied": True, "family": "qwen2"}),
    "qlora, dora": ({"use_dora": True}, True, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_merged_and_adapter_exports_equal_training_policy(case: str, tiny: Path, tmp_path: Path) -> None:
    lora, double_quant, base_options = CASES[case]
    base = make_base(tiny, tmp_path / "base", **base_options)
    policy = load_training_policy(base, double_quant, **lora)
    expected = logprobs(policy)
    plain = logprobs(load_policy(base))
    assert (expected - plain).abs().max() > 0.1  # the adapter changes the outputs
    ckpt = write(tmp_path / "run", policy, base, double_quant)

    export(ckpt, tmp_path / "merged")
    merged = load_policy(tmp_path / "merged")
    assert (logprobs(merged) - expected).abs().max() < 1e-5
    assert merged.dtype is torch.float32 and ThinkingFormat.load(tmp_path / "merged") == FORMAT
    assert merged.config.tie_word_embeddings == base_options.get("tied", False)
    assert load_tokenizer(tmp_path / "merged").chat_template == load_tokenizer(base).chat_template

    export(ckpt, tmp_path / "adapter", what="adapter")
    options = {} if double_quant is None else {"quantization_config": policy.config.quantization_config}
    loaded_base = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **options)
    base_name = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(base_name) == base.resolve()
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert not any("critic" in name for name in file.keys())  # noqa: SIM118
    adapted = PeftModel.from_pretrained(loaded_base, tmp_path / "adapter").train()
    assert (logprobs(adapted) - expected).abs().max() < 1e-5
    assert ThinkingFormat.load(tmp_path / "adapter") == FORMAT
    assert load_tokenizer(tmp_path / "adapter").chat_template == load_tokenizer(base).chat_template


def test_merge_into_unquantized_base_differs_from_4_bit_policy(tiny: Path, tmp_path: Path) -> None:
    base = make_base(tiny, tmp_path / "base")
    policy = load_training_policy(base, True)
    export(write(tmp_path / "run", policy, base, None), tmp_path / "merged")
    assert (logprobs(load_policy(tmp_path / "merged")) - logprobs(policy)).abs().max() > 0.02


@pytest.mark.parametrize("double_quant", [True, False])
def test_nf4_round_trip_equals_loaded_weights(tiny: Path, tmp_path: Path, double_quant: bool) -> None:
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Params4bit

    base = make_base(tiny, tmp_path / "base", "qwen2", tied=True)
    loaded = dict(load_training_policy(base, double_quant, target_modules=["q_proj"]).named_parameters())
    plain = load_policy(base)
    nf4 = {name.replace(".base_layer", ""): w for name, w in loaded.items() if isinstance(w, Params4bit)}
    assert quantized_weights(plain.config) == set(nf4)
    for name, weight in nf4.items():
        ours = round_trip_nf4(plain.get_parameter(name).detach(), double_quant)
        assert torch.equal(ours, dequantize_4bit(weight.data, weight.quant_state))


def test_dtype_option_with_bfloat16_base(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_base(tiny, tmp_path / "float32")
    load_policy(base, "bfloat16").save_pretrained(tmp_path / "base")
    load_tokenizer(base).save_pretrained(tmp_path / "base")
    base = tmp_path / "base"
    policy = load_training_policy(base)
    ckpt = write(tmp_path / "run", policy, base)
    capsys.readouterr()
    export(ckpt, tmp_path / "short")
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 1 and not printed.err  # no progress bar in a pipe
    short = load_policy(tmp_path / "short")
    assert short.dtype is torch.bfloat16  # the dtype of the base
    export(ckpt, tmp_path / "long", dtype="float32")
    long = load_policy(tmp_path / "long")
    assert long.dtype is torch.float32 and (logprobs(long) - logprobs(policy)).abs().max() < 1e-5
    name = "model.layers.1.mlp.up_proj"
    with torch.no_grad():
        layer: Any = policy.get_submodule(name)
        exact = layer.base_layer.weight + layer.get_delta_weight("default")
    assert torch.equal(short.get_parameter(f"{name}.weight"), exact.bfloat16())  # rounded only once, at the end
    untouched = "model.embed_tokens.weight"
    assert torch.equal(short.get_parameter(untouched), load_policy(base).get_parameter(untouched))


def test_sharded_checkpoint_merges_to_training_policy(tiny: Path, tmp_path: Path) -> None:
    base = make_base(tiny, tmp_path / "base")
    policy = load_training_policy(base)
    folder = write(tmp_path / "run", policy, base).with_name("sharded.ckpt")
    saved = checkpoint(policy, base)
    dcp.save({"state_dict": saved.pop("state_dict")}, checkpoint_id=folder, no_dist=True)
    torch.save(saved, folder / "meta.pt")
    export(folder, tmp_path / "merged")
    assert (logprobs(load_policy(tmp_path / "merged")) - logprobs(policy)).abs().max() < 1e-5


def test_invalid_bases_and_adapters_are_one_line_errors(tiny: Path, tmp_path: Path) -> None:
    def check_error(match: str, **options: Any) -> None:
        with pytest.raises(UserError, match=match) as caught:
            export(ckpt, tmp_path / "out", **options)
        assert "\n" not in str(caught.value)

    base = make_base(tiny, tmp_path / "base", tied=True)
    policy = load_training_policy(base)
    ckpt = write(tmp_path / "run", policy, base)
    moved = base.rename(tmp_path / "moved")
    check_error("cannot be found .* --base")
    check_error("cannot be found .* --base", base="some-org/not-in-the-cache")
    export(ckpt, tmp_path / "with_base", base=str(moved))
    assert (logprobs(load_policy(tmp_path / "with_base")) - logprobs(policy)).abs().max() < 1e-5
    export(ckpt, tmp_path / "adapter", what="adapter")  # an adapter export does not read the base

    other = make_base(tiny, tmp_path / "other")
    config = LlamaConfig.from_pretrained(other)
    config.intermediate_size = 64
    AutoModelForCausalLM.from_config(config).save_pretrained(other)
    check_error(r"mlp.* has shape \(64, 64\), but the adapter requires \(96, 64\)", base=str(other))
    (moved / "model.safetensors").write_bytes((moved / "model.safetensors").read_bytes()[:1000])
    check_error("is damaged", base=str(moved))
    (moved / "model.safetensors").unlink()
    check_error("model.safetensors is missing", base=str(moved))

    saved = checkpoint(policy, base)
    saved["state_dict"] = {k: v for k, v in saved["state_dict"].items() if ".default." not in k}
    torch.save(saved, ckpt)
    check_error("the adapter that it records is missing")
    full = load_policy(make_base(tiny, tmp_path / "again"))
    state = {f"policy.{name}": t for name, t in full.state_dict().items()}
    torch.save({"state_dict": state, "rlmt": {"policy": "x", "format": FORMAT.to_dict()}}, ckpt)
    check_error("omit --what adapter", what="adapter")
    check_error("omit --base", base=str(base))
    assert not (tmp_path / "out").exists()


def test_interrupted_merge_leaves_no_files(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tiny, tmp_path / "base")
    ckpt = write(tmp_path / "run", load_training_policy(base), base)
    saved: list[Path] = []
    save_file = rlmt.export.merge.save_file

    def full_disk(tensors: Any, path: Path, **options: Any) -> None:
        if len(saved) == 2:
            path.write_bytes(b"half")
            raise OSError("No space left on device")
        saved.append(path)
        save_file(tensors, path, **options)

    monkeypatch.setattr(rlmt.export.merge, "save_file", full_disk)
    monkeypatch.setattr(rlmt.export.merge, "SHARD_BYTES", 50_000)
    with pytest.raises(OSError, match="No space left"):
        export(ckpt, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "run"}
    monkeypatch.setattr(rlmt.export.merge, "save_file", save_file)
    export(ckpt, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    load_policy(tmp_path / "out")


PEAK = """
import resource, sys, torch
from pathlib import Path
import rlmt.export.merge as m
from rlmt.models.quantization import quantized_weights
from transformers import AutoConfig
torch.set_num_threads(1)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
folder, out = Path(sys.argv[1]), Path(sys.argv[2])
base = m.open_base(str(folder))
config = {"r": 4, "lora_alpha": 8, "use_rslora": False, "use_dora": False}
adapter = m.AdapterWeights(config, {
    m.PEFT_PREFIX + name.removesuffix("weight") + f"lora_{part}.weight": torch.ones(shape)
    for name, t in base.tensors.items() if "_proj" in name
    for part, shape in (("A", (4, t.shape[1])), ("B", (t.shape[0], 4)))})
names = quantized_weights(AutoConfig.from_pretrained(folder))
m.round_trip_nf4(torch.ones(64, 64), True)
before = peak()
out.mkdir()
m.SHARD_BYTES = 16 * 2**20
m.merge(base, adapter, out, torch.float32, torch.bfloat16, names, True)
print(peak() - before)
"""


@pytest.mark.slow
def test_merge_takes_the_memory_of_a_few_shards(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=10,
        num_attention_heads=8,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device="cpu")
    model.save_pretrained(tmp_path / "base")  # one file
    size = (tmp_path / "base" / "model.safetensors").stat().st_size
    assert size > 250e6
    command = [sys.executable, "-c", PEAK, str(tmp_path / "base"), str(tmp_path / "out")]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    assert grown < 100e6, f"{grown / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB"
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 10


@pytest.fixture(scope="module")
def exported(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """vLLM with a merged QLoRA policy, and with the adapter of a LoRA policy trained on that model."""
    root = tmp_path_factory.mktemp("vllm")
    base = make_base(tiny, root / "base")
    first = load_training_policy(base, True)
    export(write(root / "run", first, base, True), root / "merged")
    second = load_training_policy(root / "merged")
    export(write(root / "second", second, root / "merged"), root / "adapter", what="adapter")
    from rlmt.engines.vllm.isolation import preserve_process_state

    with pytest.MonkeyPatch.context() as patch, preserve_process_state():
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        import vllm

        llm = vllm.LLM(
            model=str(root / "merged"),
            dtype="float32",
            enable_lora=True,
            max_lora_rank=8,
            max_model_len=64,
            enforce_eager=True,
            enable_chunked_prefill=False,
            kv_cache_memory_bytes=2**26,
            block_size=32,
            max_num_seqs=4,
        )
    yield {"llm": llm, "first": first, "second": second, "adapter": root / "adapter"}
    llm.llm_engine.engine_core.shutdown()


@pytest.mark.parametrize("which", ["first", "second"])
def test_vllm_logprobs_of_exports_equal_training_policy(exported: dict[str, Any], which: str) -> None:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    outputs = exported["llm"].generate(
        [{"prompt_token_ids": row} for row in IDS.tolist()],
        SamplingParams(max_tokens=24, logprobs=0, ignore_eos=True, seed=0),
        lora_request=LoRARequest("policy", 1, str(exported["adapter"])) if which == "second" else None,
        use_tqdm=False,
    )
    completions = [out.outputs[0] for out in outputs]
    ids = torch.cat([IDS, torch.tensor([list(c.token_ids) for c in completions])], dim=1)
    got = torch.tensor(
        [[at[token].logprob for at, token in zip(c.logprobs, c.token_ids, strict=True)] for c in completions]
    )
    assert (got - logprobs(exported[which], ids)[:, 31:]).abs().max() < 1e-3
    other = exported["second" if which == "first" else "first"]
    assert (got - logprobs(other, ids)[:, 31:]).abs().max() > 0.1
