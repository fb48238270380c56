"""How many processes do a run, and on which node of how many this one is."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from tip_exp.config.schema import RunConfig
from tip_exp.utils import gpus
from tip_exp.utils.errors import ConfigError
from tip_exp.utils.gpus import visible_gpus

DEFAULT_PORT = 29400
MAX_RANKS_PER_CORE = 4  # on a CPU, where more is a mistake
OTHER_GPUS = ("dxg", "nvhost-gpu", "kfd")  # in /dev: of WSL, of a Jetson, of AMD, which are not counted


@dataclass(frozen=True, slots=True)
class Node:
    """This node's number, and where node 0 waits for the others ("" if there are none)."""

    rank: int = 0
    address: str = ""
    port: int = 0


def ranks_per_node(config: RunConfig, environment: Mapping[str, str]) -> int:
    """`ranks`; auto is the number of visible GPUs, or 1 on a CPU and on slices of a GPU: CUDA shows a process one."""
    if config.ranks != "auto":
        return config.ranks
    gpus = [] if config.device == "cpu" else visible_gpus(environment)
    return 1 if any(name.startswith("MIG-") for name in gpus) else max(1, len(gpus))


def this_node(nodes: int, environment: Mapping[str, str]) -> Node:
    """From MASTER_ADDR, MASTER_PORT and NODE_RANK, or from SLURM's variables. Raises ConfigError without either."""
    if "TORCHELASTIC_RUN_ID" in environment:
        raise ConfigError("tip-exp starts its own processes: start it without torchrun, with ranks=N and nodes=N")
    if nodes == 1:
        return Node()
    rank = environment.get("NODE_RANK", environment.get("SLURM_NODEID"))
    address = environment.get("MASTER_ADDR", _first_host(environment.get("SLURM_JOB_NODELIST", "")))
    if rank is None or not address:
        raise ConfigError(
            f"nodes={nodes}, but nothing says where they meet: set MASTER_ADDR (the host of node 0), MASTER_PORT and "
            "NODE_RANK on each, or start one task per node in a SLURM job"
        )
    if not rank.isdecimal() or int(rank) >= nodes:
        raise ConfigError(f"NODE_RANK (or SLURM_NODEID) must be below nodes={nodes}, counted from 0; got {rank!r}")
    # Two jobs may share a node: each has its own port, below those that the system hands out.
    port = 15_000 + int(environment["SLURM_JOB_ID"]) % 15_000 if "SLURM_JOB_ID" in environment else DEFAULT_PORT
    given = environment.get("MASTER_PORT", str(port))
    if not given.isdecimal():
        raise ConfigError(f"MASTER_PORT must be a number; got {given!r}")
    return Node(int(rank), address, int(given))


def check_machine(config: RunConfig, environment: Mapping[str, str]) -> None:
    """Raise ConfigError, before anything is written, if this machine cannot hold the run's processes."""
    this_node(config.nodes, environment)
    ranks = ranks_per_node(config, environment)
    if config.device != "cpu" and visible_gpus(environment):
        return
    if config.device == "cuda":
        named = environment.get("CUDA_VISIBLE_DEVICES")
        if named is None and any((gpus.DEVICES / name).exists() for name in OTHER_GPUS):
            return
        why = "there is no /dev/nvidia0" if named is None else f"CUDA_VISIBLE_DEVICES={named!r} names none"
        raise ConfigError(f"device=cuda, but no GPU is visible ({why}); set device=auto or device=cpu")
    if ranks > MAX_RANKS_PER_CORE * cores():
        why = "device=cpu" if config.device == "cpu" else "this machine has no GPU"
        raise ConfigError(f"ranks={ranks}, but {why} and there are {cores()} CPU cores; choose fewer ranks")


def torchrun_options(ranks: int, nodes: int, node: Node, run_id: str) -> list[str]:
    """Arguments of torch.distributed.run; nodes with different `run_id` do not meet."""
    if nodes == 1:
        meeting = ["--standalone", "--local-addr=127.0.0.1"]
    else:
        meeting = [f"--node-rank={node.rank}", f"--master-addr={node.address}", f"--master-port={node.port}"]
        meeting.append(f"--rdzv-id={run_id}")
    return [f"--nproc-per-node={ranks}", f"--nnodes={nodes}", *meeting]


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _first_host(nodelist: str) -> str:
    """The first of SLURM's compressed host names: "gpu[003-006,009],login1" -> "gpu003"."""
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", nodelist).split(",")[0]
