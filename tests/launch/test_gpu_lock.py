"""Runs that share a machine get separate GPUs."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from tip_exp.launch import gpu_lock
from tip_exp.launch.gpu_lock import GPUS_PER_RUN, locked_gpus, visible_gpus
from tip_exp.utils.errors import ConfigError

GPUS = {"CUDA_VISIBLE_DEVICES": "4,5"}


@pytest.fixture(autouse=True)
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(gpu_lock, "LOCKS", tmp_path / "locks")
    monkeypatch.setattr(gpu_lock, "POLL_S", 0.01)
    return tmp_path / "locks"


def test_without_a_request_or_a_gpu_nothing_is_locked(locks: Path) -> None:
    with locked_gpus(GPUS) as no_request, locked_gpus({GPUS_PER_RUN: "1", "CUDA_VISIBLE_DEVICES": ""}) as no_gpu:
        assert no_request == no_gpu == {}
    assert not locks.exists()


def test_each_run_sees_only_its_gpus(locks: Path) -> None:
    request = GPUS | {GPUS_PER_RUN: "1"}
    with locked_gpus(request) as first, locked_gpus(request) as second:
        assert [first, second] == [{"CUDA_VISIBLE_DEVICES": "4"}, {"CUDA_VISIBLE_DEVICES": "5"}]
    with locked_gpus(GPUS | {GPUS_PER_RUN: "2"}) as both:
        assert both == {"CUDA_VISIBLE_DEVICES": "4,5"}
    with (locks / "4.lock").open("a") as held:  # by another run
        fcntl.flock(held, fcntl.LOCK_EX)
        with locked_gpus(request) as free:
            assert free == {"CUDA_VISIBLE_DEVICES": "5"}


def test_more_gpus_than_the_machine_has_are_refused() -> None:
    with (
        pytest.raises(ConfigError, match="TIP_EXP_GPUS_PER_RUN=3, but there are 2 GPUs"),
        locked_gpus(GPUS | {GPUS_PER_RUN: "3"}),
    ):
        pass


def test_visible_gpus_follow_the_environment() -> None:
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "2, 3"}) == ["2", "3"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == []
