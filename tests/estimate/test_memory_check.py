"""A run that does not fit is refused before any weight loads; the message names need, supply and remedies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tip_exp import build
from tip_exp.config.parse import digest
from tip_exp.config.schema import RunConfig
from tip_exp.estimate import memory
from tip_exp.estimate.memory import PROCESS, check_memory, free_gib, memory_gib
from tip_exp.records.folder import RunFolder
from tip_exp.run import run, run_eval
from tip_exp.utils.errors import ConfigError

Compose = Callable[..., RunConfig]
CPU = torch.device("cpu")


def needed_gib(config: RunConfig) -> float:
    return sum(gib for name, gib in memory_gib(config).items() if name != PROCESS)


def with_free(monkeypatch: pytest.MonkeyPatch, gib: float | None) -> None:
    monkeypatch.setattr(memory, "free_gib", lambda device: gib)


def test_the_message_names_need_supply_and_remedies(compose_run: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(monkeypatch, 139.0)
    large = compose_run("experiment=tip_qwen3", "learner.activation_checkpointing=false")
    with pytest.raises(ConfigError) as caught:
        check_memory(large, CPU, "hf")
    needed = needed_gib(large)
    message = str(caught.value)
    assert (
        message.startswith(f"this run needs about {needed:.1f} GiB (activations ")
        and "cpu has 139.0 GiB free" in message
    )
    for key in ("learner.micro_batch_tokens", "pair.student.dtype", "pair.teacher.dtype", "ignore_memory=true"):
        assert key in message
    assert "tile_mib" not in message  # tiles take 0.25 GiB only
    assert len(message.splitlines()) == 1


def test_no_error_if_it_fits_or_is_ignored_or_free_memory_is_unknown(
    compose_run: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = compose_run()
    needed = needed_gib(tiny)
    with_free(monkeypatch, needed)
    check_memory(tiny, CPU, "hf")
    with_free(monkeypatch, 0.99 * needed)
    with pytest.raises(ConfigError):
        check_memory(tiny, CPU, "hf")
    check_memory(compose_run("ignore_memory=true"), CPU, "hf")
    with_free(monkeypatch, None)
    check_memory(tiny, CPU, "hf")


def test_ignore_memory_is_not_part_of_the_digest(compose_run: Compose) -> None:
    assert digest(compose_run("ignore_memory=true")) == digest(compose_run())


def test_the_limit_of_a_cgroup_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n")  # 8 GiB
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert free_gib(CPU) == 8.0
    (tmp_path / "memory.current").write_text(f"{2**30}\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert free_gib(CPU) == 8.0
    (tmp_path / "memory.max").write_text(f"{4 * 2**30}\n")
    assert free_gib(CPU) == 3.0  # 4 - 1
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "absent")
    assert free_gib(CPU) is None


def test_memory_is_checked_before_weights_load(
    compose_run: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_args, **_kwargs) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(build, "load_pair", never)
    with_free(monkeypatch, 1e-4)
    for mode, function in (("train", run), ("eval", run_eval)):
        with pytest.raises(ConfigError, match="this run needs about"):
            function(compose_run(f"mode={mode}"), RunFolder(tmp_path))
