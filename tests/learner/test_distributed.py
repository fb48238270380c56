"""Two processes that share a step choose the same tokens and form the same gradient as one that has it whole."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.learner.test_learner import doubled, gradients, make, sampled

from tip_exp.config.schema import RunConfig
from tip_exp.learner.distributed import Ranks
from tip_exp.models.pair import Pair

ROOT = Path(__file__).parents[2]


def test_one_process_is_the_identity() -> None:
    ranks, rows = Ranks(), torch.arange(3)
    assert ranks.size == 1 and ranks.gather(rows) is rows and ranks.counts(5, rows.device) == [5]


@pytest.mark.parametrize("score", ["soft_or", "random"])
def test_two_ranks_make_the_step_of_one(tmp_path: Path, tiny_pair: Pair, tiny_config: RunConfig, score: str) -> None:
    """Population and selection span both ranks; five rollouts against three, so that nothing is even."""
    rollouts = sampled(tiny_pair)
    settings = {"grad_clip": 1e9, "lr": 1e-30}
    whole, metrics = gradients(make(doubled(tiny_pair), tiny_config.learner, score, 0.2, **settings), rollouts)
    job = {
        "rollouts": [rollouts[:5], rollouts[5:]],
        "config": tiny_config.model_dump(),
        "score": score,
        "set": settings,
    }
    (tmp_path / "job").write_bytes(pickle.dumps(job))
    children = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path)],
            env={
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")]),
            },
        )
        for rank in (0, 1)
    ]
    assert [child.wait(timeout=200) for child in children] == [0, 0]
    for rank in (0, 1):
        found, told = torch.load(tmp_path / f"out{rank}")
        assert told["select/kept_tokens"] == metrics["select/kept_tokens"]
        assert told["train/loss"] == pytest.approx(metrics["train/loss"], rel=1e-9)
        for name, gradient in whole.items():
            assert float((found[name] - gradient).norm() / gradient.norm()) < 1e-5, name


def one_rank(folder: Path) -> None:
    import torch.distributed as dist

    from tip_exp.models.load import load_pair

    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    job = pickle.loads((folder / "job").read_bytes())
    config = RunConfig.model_validate(job["config"])
    pair = doubled(load_pair(config.pair, torch.device("cpu")))
    learner = make(pair, config.learner, job["score"], 0.2, **job["set"])
    torch.save(gradients(learner, job["rollouts"][rank]), folder / f"out{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    one_rank(Path(sys.argv[1]))
