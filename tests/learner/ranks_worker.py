"""The ranks of tests/learner/test_distributed.py: python ranks_worker.py JOBS.

Ranks are forks of this process, which has imported everything, with the environment that torchrun would give them.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import socket
import sys
import traceback
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tests.helpers import gradients_of_step, in_float64, make_learner, train_step
from torch import Tensor, nn

from tip_exp.config.schema import RunConfig
from tip_exp.learner.checkpoint import Checkpoints
from tip_exp.learner.distributed import Ranks, start
from tip_exp.learner.learner import Learner
from tip_exp.learner.sharding import make_sharding
from tip_exp.models.load import Shard, load_pair
from tip_exp.models.lora import whole_tensor
from tip_exp.models.pair import Model, Pair
from tip_exp.models.weight_files import WeightFiles
from tip_exp.records.folder import RunFolder
from tip_exp.run import run

CPU = torch.device("cpu")


def main(jobs: list[dict[str, Any]]) -> None:
    """Do the jobs in turn, each on its number of ranks; if a rank fails, the others are killed, as torchrun does."""
    for job in jobs:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        os.environ.update(WORLD_SIZE=str(job["size"]), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        ranks = [fork(job, rank) for rank in range(job["size"])]
        try:
            for _ in ranks:
                _, status = os.wait()
                assert (status != 0) == job.get("fails", False), f"a rank of {job['size']} ended with {status}"
        finally:
            for rank in ranks:
                with suppress(ProcessLookupError):
                    os.kill(rank, signal.SIGKILL)


def fork(job: dict[str, Any], rank: int) -> int:
    if child := os.fork():
        return child
    os.environ["RANK"] = str(rank)
    faulthandler.dump_traceback_later(500, exit=True)
    try:
        do(job)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def do(job: dict[str, Any]) -> None:
    """A rank's part of a job: runs, steps in float64, and pairs read slice by slice."""
    folder: Path = job["folder"]
    if os.environ["RANK"] == "1" and job.get("fails"):
        run_out_of_memory()
    with start(CPU) as ranks:
        torch.save(exchanged(ranks), folder / f"exchanged{ranks.rank}")
        for name, config in job["runs"].items():
            (folder / name).mkdir(exist_ok=True)
            with patch.object(Checkpoints, "finish", Checkpoints.wait):  # the first one stays, and others resume it
                run(RunConfig.model_validate(config), RunFolder(folder / name))
        if (steps := job.get("steps")) is not None:
            torch.save(float64_steps(ranks, **steps), folder / f"steps{ranks.rank}")
        if (loads := job.get("loads")) is not None:
            pairs = {name: loaded(ranks, RunConfig.model_validate(config)) for name, config in loads.items()}
            torch.save(pairs, folder / f"loads{ranks.rank}")


def exchanged(ranks: Ranks) -> dict[str, Any]:
    """What this rank gets of the others' numbers, and the shapes of meshes over all ranks."""
    total = torch.tensor(float(ranks.rank))
    ranks.sum_([total])
    meshes = [ranks.mesh(CPU, replicas) for replicas in (1, 2) if ranks.size % replicas == 0]
    return {
        "broadcast": ranks.broadcast(ranks.rank),
        "objects": ranks.gather_objects(ranks.rank),
        "values": ranks.gather(torch.full((ranks.rank + 1,), ranks.rank)).tolist(),
        "sum": float(total),
        "largest": ranks.largest({"rank": float(ranks.rank), f"of {ranks.rank}": 1.0}),
        "meshes": [tuple(mesh.shape) for mesh in meshes],
        "timeouts": {group._get_backend(CPU).options._timeout for mesh in meshes for group in mesh.get_all_groups()},
    }


def run_out_of_memory() -> None:
    """In the backward pass of step 2, while other ranks wait in that of their own, unless micro-batches are small."""
    whole_step, hidden, fails = Learner.step, Model.hidden, [False]

    def step(self: Learner, number: int, *arguments: Any) -> Any:
        fails[:] = [number == 2 and self.config.micro_batch_tokens > 200]
        return whole_step(self, number, *arguments)

    def limited(self: Model, batch: Any) -> Tensor:
        output = hidden(self, batch)
        if fails[0] and output.requires_grad:
            output.register_hook(fail)
        return output

    def fail(_: Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    Learner.step, Model.hidden = step, limited  # pyright: ignore[reportAttributeAccessIssue]


def float64_steps(ranks: Ranks, config: dict[str, Any], rollouts: list[Any], jobs: dict[str, Any]) -> dict[str, Any]:
    """Of each job, gradients of the first and weights after the second step, whole; and local bytes.

    In float64, except where the student computes in bfloat16 from float32 weights.
    """
    results = {}
    for name, changes in jobs.items():
        run_config = RunConfig.model_validate(config | {"learner": config["learner"] | changes["learner"]})
        pair = load_pair(run_config.pair, CPU)
        if run_config.learner.compute_dtype == "float32":
            pair = in_float64(pair)
        pair = shard_pair(ranks, pair, run_config)
        learner = make_learner(pair, run_config.learner, changes["score"], 0.2)
        gradients, report = gradients_of_step(learner, rollouts)
        train_step(learner, rollouts, 2)
        state = list(learner.optimizer.state.values())
        results[name] = {
            "gradients": gradients,
            "weights": {name: whole_tensor(p) for name, p in pair.student.module.named_parameters()},
            "metrics": report.metrics,
            "kept": report.selection.kept_mask,
            "dtypes": {p.dtype for p in learner.parameters} | {s["exp_avg"].dtype for s in state},
            "student_bytes": local_bytes(pair.student.module),
            "teacher_bytes": local_bytes(pair.teacher.module),
            "optimizer_bytes": sum(s[key].to_local().nbytes for s in state for key in ("exp_avg", "exp_avg_sq")),
        }
    return results


def shard_pair(ranks: Ranks, pair: Pair, config: RunConfig) -> Pair:
    """Whole models of a pair, sharded as a run of this config shards them."""
    shard = make_sharding(config, ranks, CPU)
    assert shard is not None, "there are several ranks"
    models = {
        role: Model(model.module, model.loaded_head, shard[role](model.module, None))
        for role, model in (("teacher", pair.teacher), ("student", pair.student))
    }
    return replace(pair, **models)


def loaded(ranks: Ranks, config: RunConfig) -> dict[str, Any]:
    """State of a pair that is read slice by slice, whole, and the bytes that this rank has read."""
    files: list[WeightFiles | None] = []
    shard: dict[str, Shard] = {}
    for role, sharding in (make_sharding(config, ranks, CPU) or {}).items():

        def spy(module: Any, file: WeightFiles | None, sharding: Shard = sharding) -> Any:
            files.append(file)
            return sharding(module, file)

        shard[role] = spy
    pair = load_pair(config.pair, CPU, shard=shard)
    return {
        "states": [state_of(model.module) for model in (pair.teacher, pair.student)],
        "bytes": [None if file is None else file.bytes_read for file in files],
        "tied": [m.module.get_input_embeddings().weight is m.module.get_output_embeddings().weight  # pyright: ignore
                 for m in (pair.teacher, pair.student)],
        "generation": pair.student.module.generation_config.to_dict(),
    }  # fmt: skip


def state_of(module: nn.Module) -> dict[str, Tensor]:
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name: whole_tensor(tensor) for name, tensor in tensors}


def local_bytes(module: nn.Module) -> int:
    return sum(parameter.to_local().nbytes for parameter in module.parameters())  # pyright: ignore


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(pickle.loads(Path(sys.argv[1]).read_bytes()))
