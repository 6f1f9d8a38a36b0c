"""A rank of test_ranks.py: each objective's update on the rank's groups; rank 0 first computes it on all groups."""

import ctypes
import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from test_update import experience as three_groups  # run_ranks adds this folder to sys.path
from test_update import model
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from rlmt import errors
from rlmt.algorithms import DPO, GRPO, PPO, Algorithm, REINFORCEPlusPlus
from rlmt.distributed import collectives
from rlmt.distributed.fsdp2 import compute_device, full_tensor, is_sharded, shard_model
from rlmt.distributed.rank_0_loading import is_on_rank_0, load_on_rank_0, rank_0_loads
from rlmt.errors import AllRanksUserError, UserError
from rlmt.models.adapters import LoRA, trainable_parameters
from rlmt.models.critic import build_critic
from rlmt.models.loading import frozen_copy
from rlmt.models.logprobs import compute_logprobs, compute_values
from rlmt.models.reward_model import load_classifier
from rlmt.models.varlen import VARLEN, register_varlen
from rlmt.modules import RLMTModule
from rlmt.modules.dynamic_sampling import select
from rlmt.modules.offline_rollouts import fingerprint
from rlmt.modules.update import PolicyUpdate
from rlmt.rewards import ClassifierReward
from rlmt.rewards.classifier import shardable_models
from rlmt.types import Experience, Prompt, Split, Status

CPU = torch.device("cpu")
errors._LIBRARIES.append(Path(__file__).parent)  # errors here stand for rlmt's own
BUDGET = 60
LARGE: dict[str, Any] = {
    **{"vocab_size": 2000, "hidden_size": 768, "intermediate_size": 2048},
    **{"num_hidden_layers": 8, "num_attention_heads": 12},
}
"""A policy of 239 MB."""
CASES: dict[str, tuple[Any, list[list[int]]]] = {  # objective, and groups of each rank
    "token_mean": (lambda: GRPO(kl_coef=0.1, entropy_coef=0.1), [[0, 1], [2]]),
    "sequence_mean": (lambda: GRPO(loss_aggregation="sequence_mean", kl_coef=0.1), [[0], [1, 2]]),
    "constant": (lambda: GRPO(loss_aggregation="constant", kl_coef=0.1), [[0, 1], [2]]),
    "one rank has no group": (lambda: GRPO(kl_coef=0.1), [[0, 1, 2], []]),
    "whitening over ranks": (lambda: REINFORCEPlusPlus(reward_kl_coef=0.1), [[0, 1], [2]]),
    "critic": (lambda: PPO(kl_placement="reward", kl_coef=0.1, target_kl=1.0), [[0, 1], [2]]),
    "pairs": (lambda: DPO(min_valid=2), [[0, 1], [2]]),
    "adapter": (lambda: GRPO(kl_coef=0.1), [[0], [1, 2]]),
    "critic with an adapter": (lambda: PPO(), [[0, 1], [2]]),
    "tied": (lambda: GRPO(kl_coef=0.1), [[0], [1, 2]]),
    "checkpointed": (lambda: GRPO(kl_coef=0.1), [[0], [1, 2]]),
    "packed": (lambda: GRPO(kl_coef=0.1), [[0], [1, 2]]),
    "minibatches": (lambda: GRPO(kl_coef=0.1, minibatches=2), [[0, 1], [2]]),
}


def experience() -> Experience:
    data = three_groups()
    data.texts, data.splits, data.scores.texts = [""] * 12, [Split("", "a", Status.OK)] * 12, [None] * 12
    return data


def gradients(policy: PreTrainedModel) -> dict[str, Tensor]:
    return {name: full_tensor(p.grad).clone() for name, p in policy.named_parameters() if p.grad is not None}


def update(
    case: str, algorithm: Algorithm, data: Experience, mesh: DeviceMesh | None = None, offload: bool = False
) -> dict[str, Any]:
    """Gradients of each optimizer step and metrics; with a mesh the models are sharded by FSDP2."""
    policy, reference, rollouts = model(0), model(1), data.rollouts
    if case == "tied":
        policy.config.tie_word_embeddings = True
        policy.tie_weights()
    lora = LoRA(rank=4, alpha=8, target_modules=["q_proj", "down_proj"]) if "adapter" in case else None
    critic = None
    if algorithm.critic is not None:
        critic = build_critic(policy)
        if lora is not None:
            lora.add_to(critic.backbone)
    if lora is not None:
        lora.add_to(policy)
        torch.manual_seed(0)
        for parameter in trainable_parameters(policy):
            torch.nn.init.normal_(parameter, std=0.1)
    if critic is not None:
        torch.manual_seed(0)
        torch.nn.init.normal_(critic.head.weight, std=0.3)
    if case == "packed":
        register_varlen()
        for each in (policy, reference):
            each.set_attn_implementation(VARLEN)
    if case == "checkpointed":
        policy.gradient_checkpointing_enable({"use_reentrant": False})
        policy.train()
    for each in (policy, reference, critic):
        if mesh is not None and each is not None:
            shard_model(each, mesh, mixed=False, offload=offload)
            assert is_sharded(each) and compute_device(each) == CPU
    algorithm.select(data)
    samples = None if data.pairs is None else data.pairs.flatten().tolist()
    data.ref_logprobs = compute_logprobs(reference, rollouts, BUDGET, CPU, algorithm.logprob_temperature, samples)
    data.old_logprobs = compute_logprobs(policy, rollouts, BUDGET, CPU)
    if critic is not None:
        data.values = compute_values(critic, rollouts, BUDGET, CPU)
    algorithm.prepare(data)
    updates = PolicyUpdate(algorithm, BUDGET, max_grad_norm=0.5)
    steps: list[dict[str, Tensor]] = []
    for step in updates.steps(policy, data, 0, lambda loss: loss.backward(), critic):
        assert step.problem is None
        steps.append(
            gradients(policy) | ({} if critic is None else {"head": full_tensor(critic.head.weight.grad).clone()})
        )
        for trained in (policy, critic):
            if trained is not None:
                trained.zero_grad()
    return {"steps": steps, "metrics": updates.metrics() | (data.metrics if critic is not None else {})}


def scores(folder: str, number: int, mesh: DeviceMesh | None = None) -> Tensor:
    """Scores of five conversations: four on rank 0, one on rank 1, all of them for number -1."""
    reward = ClassifierReward(folder, dtype="float32", tokens_per_batch=64)
    reward.load()
    if mesh is not None:
        assert shardable_models(nn.ModuleList([reward])) == [reward.model]
        shard_model(reward.model, mesh, mixed=False)  # type: ignore[arg-type]
    words = [f"{'tea and ' * n}cake" for n in (1, 9, 2, 20, 5)]
    mine = {0: slice(0, 4), 1: slice(4, 5), -1: slice(None)}[number]
    prompts = [Prompt(i, [{"role": "user", "content": f"Which {word}?"}]) for i, word in enumerate(words)]
    scored = reward.score(prompts[mine], words[mine], [Status.OK] * len(words[mine]))
    assert len(reward.score([], [], [])) == 0
    return scored


def failures(number: int) -> list[tuple[str, bool | None]]:
    """Messages where rank 1 alone fails, and whether another rank reports them."""

    @collectives.rank_hook
    def setup(stage: str, error: Exception | None, exchanges: bool) -> None:
        if number == 1 and error is not None:
            raise error
        if exchanges:  # rank 1 does not reach this collective
            collectives.run_on_all_ranks(lambda: collectives.all_gather_object(3))

    raised: list[tuple[str, bool | None]] = []
    for exchanges in (False, True):
        for failure in (UserError("wrong"), KeyError("x")):
            try:
                setup("fit", failure, exchanges)
            except (AllRanksUserError, collectives.RankFailed) as error:
                raised.append((str(error), getattr(error, "reported_elsewhere", None)))
    assert collectives.all_gather_object(number) == [0, 1]  # both ranks have run as many collectives
    setup("fit", None, True)
    return raised


def memory(name: str) -> int:
    """Resident bytes of this process: VmRSS for the present, VmHWM for the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def tensor_bytes() -> int:
    """Bytes of all storages that a tensor of this process refers to."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor) and not thing.is_meta]
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    storages = [tensor.untyped_storage() for tensor in local]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def streamed(mesh: DeviceMesh) -> dict[str, int]:
    """Bytes that an engine sync of a larger sharded policy takes: peak above the start, model, largest tensor."""
    policy: Any = LlamaForCausalLM(LlamaConfig(**LARGE))
    expected = {name: float(weight.double().sum()) for name, weight in policy.state_dict().items()}
    weights = [weight.nbytes for weight in policy.state_dict().values()]
    shard_model(policy, mesh, mixed=False)
    module: Any = SimpleNamespace(trained_model=policy)
    next(iter(RLMTModule.policy_weights(module)))  # allocates gloo's own buffers
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = memory("VmRSS")
    for name, tensor in RLMTModule.policy_weights(module):
        assert float(tensor.double().sum()) == expected.pop(name), name
        del tensor
    assert not expected
    return {"model": sum(weights), "largest": max(weights), "peak": memory("VmHWM") - before}


def models(reward: str) -> tuple[PreTrainedModel | nn.Module, ...]:
    """A tied policy with an adapter, its frozen copy in bfloat16, a critic with an adapter, and a reward model."""
    policy, lora = model(0), LoRA(rank=4, alpha=8)
    policy.config.tie_word_embeddings = True
    policy.tie_weights()
    reference = frozen_copy(policy, torch.bfloat16)
    lora.add_to(policy)
    return policy, reference, build_critic(policy, lora=lora), load_classifier(reward)


def local_state(module: nn.Module) -> list[tuple[str, bool, Tensor]]:
    """Names, `requires_grad` and this rank's elements of all parameters and buffers; tied ones under each name."""
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return [(n, t.requires_grad, (t.to_local() if isinstance(t, DTensor) else t).detach().clone()) for n, t in named]


def loaded_by_rank_0(number: int, reward: str, mesh: DeviceMesh) -> dict[str, Any]:
    """Models that rank 0 loads against the ones that every rank loads, the memory it takes, and errors."""
    states, logprobs, digests = [], [], []
    for only_rank_0 in (False, True):
        torch.manual_seed(number if only_rank_0 else 0)  # of rank 1 only without effect if rank 0's weights are used
        with rank_0_loads(only_rank_0):
            loaded: Any = load_on_rank_0(lambda: models(reward))
        assert any(p.is_meta for p in loaded[0].parameters()) == (only_rank_0 and number == 1)
        if not only_rank_0:
            digests.append(fingerprint(loaded[0]))
        for each in loaded:
            assert is_on_rank_0(each) == only_rank_0
            shard_model(each, mesh, mixed=False, from_rank_0=only_rank_0)
        assert loaded[0].lm_head.weight is loaded[0].get_input_embeddings().weight
        states.append([("random", False, torch.rand(1)), *(row for each in loaded for row in local_state(each))])
        logprobs.append(compute_logprobs(loaded[0], experience().rollouts, BUDGET, CPU))
        digests.append(fingerprint(loaded[0]))

    @collectives.rank_hook
    def load_large(fails: bool) -> PreTrainedModel:
        def load() -> PreTrainedModel:
            if fails:
                raise UserError("wrong")
            return LlamaForCausalLM(LlamaConfig(**LARGE))

        with rank_0_loads():
            large = load_on_rank_0(load)
        shard_model(large, mesh, mixed=False, from_rank_0=True)
        return large

    kept = tensor_bytes()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # memory freed before would be used again, and not be seen
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = memory("VmRSS")
    large = load_large(False)
    sizes = {"model": 4 * large.num_parameters(), "peak": memory("VmHWM") - before, "kept": tensor_bytes() - kept}
    raised = ""
    try:
        load_large(True)
    except AllRanksUserError as error:
        raised = str(error)
    return {"states": states, "logprobs": logprobs, "digests": digests, "raised": raised, **sizes}


def main(number: int, folder: Path, reward: str) -> None:
    """Writes the results of all cases to rank<number>.pt."""
    alone = {} if number else {case: update(case, make(), experience()) for case, (make, _) in CASES.items()}
    distributed.init_process_group("gloo", f"file://{folder / 'store'}", world_size=2, rank=number)
    shared = {
        case: update(case, make(), select(experience(), shares[number])) for case, (make, shares) in CASES.items()
    }
    mesh = init_device_mesh("cpu", (2,))
    sharded = {
        case: update(case, make(), select(experience(), shares[number]), mesh) for case, (make, shares) in CASES.items()
    }
    offloaded = {
        case: update(case, CASES[case][0](), select(experience(), CASES[case][1][number]), mesh, offload=True)
        for case in ("token_mean", "critic with an adapter")
    }
    results = {"alone": alone, "shared": shared, "sharded": sharded, "offloaded": offloaded, "streamed": streamed(mesh)}
    results["failures"] = failures(number)
    results["loaded"] = loaded_by_rank_0(number, reward, mesh)
    results["scores"] = {"alone": scores(reward, -1), "sharded": scores(reward, number, mesh)}
    torch.save(results, folder / f"rank{number}.pt")
    distributed.destroy_process_group()
