"""Two processes that share a step choose the same tokens and form the same gradient as one that has it whole."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.helpers import gradients_of_step, in_float64, make_learner, sample_rollouts

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
    rollouts = sample_rollouts(tiny_pair)
    settings = {"grad_clip": 1e9, "lr": 1e-30}
    expected, expected_report = gradients_of_step(
        make_learner(in_float64(tiny_pair), tiny_config.learner, score, 0.2, **settings), rollouts
    )
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
        gradients, metrics = torch.load(tmp_path / f"out{rank}")
        for metric in ("select/kept_tokens", "train/loss"):
            assert metrics[metric] == pytest.approx(expected_report.metrics[metric], rel=1e-9)
        for name, gradient in expected.items():
            assert float((gradients[name] - gradient).norm() / gradient.norm()) < 1e-5, name


def one_rank(folder: Path) -> None:
    import torch.distributed as dist

    from tip_exp.models.load import load_pair

    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    job = pickle.loads((folder / "job").read_bytes())
    config = RunConfig.model_validate(job["config"])
    pair = in_float64(load_pair(config.pair, torch.device("cpu")))
    learner = make_learner(pair, config.learner, job["score"], 0.2, **job["set"])
    gradients, report = gradients_of_step(learner, job["rollouts"][rank])
    torch.save((gradients, report.metrics), folder / f"out{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    one_rank(Path(sys.argv[1]))
