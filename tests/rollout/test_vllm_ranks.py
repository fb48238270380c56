"""Two ranks, each with an engine of its own that is fed from one sharded student; run as a script by torchrun."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hydra import compose, initialize_config_dir
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from tip_exp.config.parse import parse
from tip_exp.config.resolvers import register_resolvers
from tip_exp.models.load import load_pair
from tip_exp.rollout.vllm import VllmSampler
from tip_exp.types import Rollout, Sampling
from tip_exp.utils.paths import PACKAGE, conf_dir

pytestmark = [pytest.mark.vllm, pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")]
SAMPLED = Sampling(2, 1.0, 1.0, 0, 24)


def test_engines_of_two_ranks_sample_what_one_would_from_sharded_weights(tmp_path: Path) -> None:
    """Log-probs are those of a forward pass of the whole student, before and after an update of the shards."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", __file__, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": f"{PACKAGE.parent}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr  # vLLM's shutdown at exit
    for rank in (0, 1):
        report = json.loads((tmp_path / f"{rank}.json").read_text())
        assert max(report["gaps"]) < 1e-5 < 1e-2 < report["stale"]
        assert report["local_ranks"] == "2" and report["group"] == 2


@torch.no_grad()
def largest_gap(model: PreTrainedModel, rollouts: list[Rollout]) -> float:
    """Largest |log-prob by the sampler - log-prob by a forward pass of `model`| of any sampled token, nats."""
    gaps: list[float] = []
    for rollout in rollouts:
        logprobs = model(torch.tensor([rollout.token_ids])).logits[0].double().log_softmax(-1)
        start = len(rollout.token_ids) - rollout.num_response_tokens
        by_model = [float(logprobs[t - 1, rollout.token_ids[t]]) for t in range(start, len(rollout.token_ids))]
        gaps += [abs(a - b) for a, b in zip(rollout.sampler_logprobs, by_model, strict=True)]
    return max(gaps)


@torch.no_grad()
def perturb(model: PreTrainedModel, seed: int) -> None:
    """The same noise on whole and sharded parameters."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = 2e-3 * torch.randn(parameter.shape, generator=generator)
        if isinstance(parameter, DTensor):
            noise = distribute_tensor(noise, parameter.device_mesh, parameter.placements)
        parameter += noise


def main() -> None:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    register_resolvers()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = parse(compose("config"))
    pair = load_pair(config.pair, torch.device("cpu"))
    sharded = pair.student.module
    whole = copy.deepcopy(sharded)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (ranks,)))
    sampler = VllmSampler(
        sharded,
        stop_ids=pair.stop_ids,
        settings=config.rollout.vllm,
        dtype="float32",
        max_model_len=100,
        max_num_seqs=16,
    )
    prompts = [pair.prompt_ids(f"Tom has {n} pens. He finds 2. How many pens?") for n in range(10, 15)]
    dealt = list(range(rank, len(prompts), ranks))  # 3 and 2 of 5 prompts
    gaps: list[float] = []
    for step in (1, 2):
        sampler.rest()
        sampler.sync()
        rollouts = sampler.generate([prompts[i] for i in dealt], SAMPLED, step, indices=dealt)
        every = sampler.generate(prompts, SAMPLED, step) if rank == 0 else []  # the other engine is not asked
        gathered: list[list[list[int]]] = [[] for _ in range(ranks)]  # over the learner's group
        dist.all_gather_object(gathered, [rollout.token_ids for rollout in rollouts])
        if rank == 0:
            expected = [
                [every[2 * i + sample].token_ids for i in range(r, 5, ranks) for sample in (0, 1)] for r in range(ranks)
            ]
            assert gathered == expected
        gaps.append(largest_gap(whole, rollouts))
        for model in (whole, sharded):
            perturb(model, seed=step)
    stale = largest_gap(whole, rollouts)
    report = {
        "gaps": gaps,
        "stale": stale,
        "local_ranks": os.environ["LOCAL_WORLD_SIZE"],
        "group": dist.get_world_size(),
    }
    sampler.close()
    (Path(sys.argv[1]) / f"{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
