"""Runs that share a machine get separate GPUs."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from tip_exp.launch import gpu_lock, lock
from tip_exp.launch.gpu_lock import locked_gpus
from tip_exp.utils import gpus
from tip_exp.utils.errors import ConfigError
from tip_exp.utils.gpus import gpu_numbers, visible_gpus

GPUS = {"CUDA_VISIBLE_DEVICES": "4,5"}


class Slept(Exception):
    """Raised in place of the wait for a free GPU."""


@pytest.fixture(autouse=True)
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def sleep(seconds: float) -> None:
        raise Slept

    monkeypatch.setattr(lock, "LOCAL", tmp_path / "local")
    monkeypatch.setattr(gpu_lock, "time", SimpleNamespace(sleep=sleep))
    return tmp_path / "local"


def test_without_a_request_or_a_gpu_nothing_is_locked(locks: Path) -> None:
    with locked_gpus(0, GPUS) as no_request, locked_gpus(2, {"CUDA_VISIBLE_DEVICES": ""}) as no_gpu:
        assert no_request == no_gpu == {}
    assert not locks.exists()


def test_each_run_sees_only_its_gpus(locks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked_gpus(1, GPUS) as first, locked_gpus(1, GPUS) as second:
        assert [list(first), list(second)] == [["4"], ["5"]]
        assert first["4"].exists()
    assert not first["4"].exists()
    with locked_gpus(2, GPUS) as both:
        assert list(both) == ["4", "5"]
    with locked_gpus(1, GPUS | {"SLURM_JOB_ID": "7"}) as this_job, locked_gpus(1, GPUS) as other:
        assert list(this_job) == list(other) == ["4"]  # a job may number its own GPUs
    assert capsys.readouterr().out == ""


def test_machines_may_share_a_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    with locked_gpus(2, GPUS) as here:
        monkeypatch.setattr(gpu_lock.platform, "node", lambda: "another")
        with locked_gpus(2, GPUS) as there:
            assert list(here) == list(there) == ["4", "5"]


def test_a_run_that_waits_holds_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with locked_gpus(1, GPUS | {"CUDA_VISIBLE_DEVICES": "5"}) as taken, pytest.raises(Slept), locked_gpus(2, GPUS):
        raise AssertionError("one GPU is in use")
    assert capsys.readouterr().out.startswith("waiting for 2 free GPUs (in use: 5 by process ")
    assert not taken["5"].with_name("4.lock").exists()


def test_a_gpu_has_one_lock_whatever_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number, its UUID or the start of that."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf '0, GPU-1a2b\\n1, GPU-7c8d\\n'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("GPU-7c8d", "GPU-7"):
        with locked_gpus(1, {"CUDA_VISIBLE_DEVICES": name}) as by_uuid, locked_gpus(1, {"CUDA_VISIBLE_DEVICES": "0,1"}):
            assert by_uuid[name].name == "1.lock"
            with pytest.raises(Slept), locked_gpus(1, {"CUDA_VISIBLE_DEVICES": "1"}):
                raise AssertionError("it is in use")
    assert gpu_numbers(["GPU-9", "MIG-1", "3"]) == {"GPU-9": "GPU-9", "MIG-1": "MIG-1", "3": "3"}
    smi.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_numbers(["GPU-7c8d"]) == {"GPU-7c8d": "GPU-7c8d"}


def test_more_gpus_than_the_machine_has_are_refused() -> None:
    with (
        pytest.raises(ConfigError, match=r"ranks=3, but 2 GPUs are visible \(4, 5\); lower ranks"),
        locked_gpus(3, GPUS),
    ):
        pass


def test_visible_gpus_follow_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the variable they are counted as CUDA does it, also in a container that has some of a node's."""
    monkeypatch.setattr(gpus, "DEVICES", tmp_path)
    for name in ("nvidia3", "nvidia7", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert visible_gpus({}) == ["0", "1"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "2, 3"}) == ["2", "3"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "0,0,,-1,1"}) == ["0"], "CUDA stops at -1"
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == visible_gpus({"CUDA_VISIBLE_DEVICES": "-1"}) == []
