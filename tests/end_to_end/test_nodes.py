"""Two nodes under torchrun on loopback, an engine in each process: one run, stopped by a signal to one node."""

import importlib.util
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


VLLM = ("VLLMEngine", "--data.engine.cpu_kv_cache_gib", "0.25")
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("engine", [("TransformersEngine",), pytest.param(VLLM, marks=needs_vllm)], ids=lambda e: e[0])
def test_two_nodes_train_one_policy_and_stop_on_a_signal_to_one(
    engine: tuple[str, ...], tiny: Path, prompts_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    configs = [word for name in ("base", "grpo", "tiny", "ddp") for word in ("--config", name)]
    options = {
        "--model.policy": tiny / "policy",
        "--model.reward.model": tiny / "reward",
        "--model.format": "no_think",
        "--data.prompts": prompts_file,
        "--data.batch_size": 4,
        "--data.group_size": 4,
        "--data.max_prompt_tokens": 256,
        "--data.max_new_tokens": 16,
        "--data.val_size": 0,
        "--trainer.accelerator": "cpu",
        "--trainer.devices": 1,
        "--trainer.num_nodes": 2,
        "--trainer.max_steps": 10_000,
        "--trainer.enable_progress_bar": "false",
        "--trainer.default_root_dir": run,
    }
    fit = ["-m", "rlmt", "fit", *configs, *(str(word) for pair in options.items() for word in pair)]
    fit += ["--data.engine", *engine]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    torchrun += ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    nodes = [
        subprocess.Popen([*torchrun, f"--node-rank={node}", *fit], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for node in range(2)
    ]
    try:
        first = nodes[0].stdout
        assert first is not None
        printed = b""
        for line in first:
            printed += line
            if line.startswith(b"step 0"):
                break
        nodes[1].terminate()  # torchrun forwards it to its process, and the ranks agree to stop
        printed += nodes[0].communicate(timeout=300)[0]
        nodes[1].communicate(timeout=300)
    finally:
        for node in nodes:
            node.kill()
    assert b"SIGTERM" in printed and b" has the first " in printed, printed.decode()

    rollouts = {
        rank: [row for file in run.rglob(f"rollouts/*rank{rank}.parquet") for row in pq.read_table(file).to_pylist()]
        for rank in range(2)
    }
    checkpoint = torch.load(run / "latest/checkpoints/last.ckpt", weights_only=True)
    steps = checkpoint["run"]["step"] + 1
    assert steps == checkpoint["rlmt"]["version"] == checkpoint["global_step"] >= 1
    for step in range(steps):
        mine, others = ([r for r in rollouts[rank] if r["step"] == step] for rank in range(2))
        assert len(mine) == len(others) == 8 and {row["rank"] for row in others} == {1}
        assert not {row["prompt_index"] for row in mine} & {row["prompt_index"] for row in others}
