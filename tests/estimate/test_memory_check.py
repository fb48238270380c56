"""A run that does not fit is refused before any weight loads; the message names need, supply and remedies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tip_exp import build
from tip_exp.config.parse import digest
from tip_exp.config.schema import RunConfig
from tip_exp.estimate import memory_check
from tip_exp.estimate.cards import CARDS
from tip_exp.estimate.memory import EVALUATION_SHARE, PROCESS, PROCESS_GIB, RankMemory
from tip_exp.estimate.memory_check import LOWERED_BY, check_memory, free_gib, with_engine_share
from tip_exp.launch.teacher import teacher_config
from tip_exp.records.folder import RunFolder
from tip_exp.run import run, run_eval
from tip_exp.utils.errors import ConfigError
from tip_exp.utils.units import GIB

Compose = Callable[..., RunConfig]
CPU = torch.device("cpu")


def needed_gib(config: RunConfig) -> float:
    return RankMemory(config, None, backend="hf").peak()[1] - PROCESS_GIB


def with_free(monkeypatch: pytest.MonkeyPatch, gib: float | None) -> None:
    monkeypatch.setattr(memory_check, "free_gib", lambda device: gib)


def test_the_message_names_need_supply_and_remedies(compose_run: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(monkeypatch, 139.0)
    changes = ["learner.activation_checkpointing=false", "rollout.batch_size=1"]
    large = compose_run("experiment=tip_qwen3", *changes)
    with pytest.raises(ConfigError) as caught:
        check_memory(large, CPU, "hf")
    needed = needed_gib(large)
    message = str(caught.value)
    assert (
        message.startswith(f"this run needs about {needed:.1f} GiB (backward: activations ")
        and "cpu has 139.0 GiB free" in message
    )
    for key in (
        "learner.micro_batch_tokens",
        "ranks",
        "pair.student.dtype",
        "pair.teacher.dtype",
        "ignore_memory=true",
    ):
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


def with_gpu(monkeypatch: pytest.MonkeyPatch, *, free: float, host: float) -> None:
    """A device that reports an H100's memory."""
    properties = SimpleNamespace(total_memory=CARDS[80].gib * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * GIB, CARDS[80].gib * GIB))
    monkeypatch.setattr(memory_check, "free_host_gib", lambda: host)


def test_on_a_gpu_device_and_host_are_checked_apart(compose_run: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    config, cuda = compose_run("experiment=tip_qwen3"), torch.device("cuda:0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with_gpu(monkeypatch, free=78.5, host=100)  # a rank of two needs 62 GiB, its host 30
    check_memory(config, cuda, "vllm")
    with_gpu(monkeypatch, free=78.5, host=55)
    with pytest.raises(
        ConfigError, match=r"needs about 65\.\d GiB \(update: checkpoint 45\.0, .* but the host has 55\.0"
    ):
        check_memory(config, cuda, "vllm")
    with_gpu(monkeypatch, free=60, host=100)
    with pytest.raises(
        ConfigError, match=r"62\.2 GiB \(rollout: sampling engine 31\.6, .* but cuda:0 has 60\.5 GiB free"
    ):
        check_memory(config, cuda, "vllm")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with_gpu(monkeypatch, free=78.5, host=100)
    with pytest.raises(ConfigError, match=r"Lower it with rollout\.vllm\.gpu_memory_utilization, .*, ranks, "):
        check_memory(config, cuda, "vllm")


def test_an_engine_too_small_for_its_model_is_named(compose_run: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpu(monkeypatch, free=78.5, host=200)
    small = compose_run("experiment=tip_qwen3", "rollout.vllm.gpu_memory_utilization=0.1")
    with pytest.raises(ConfigError, match=r"gpu_memory_utilization=0\.1 is 7\.9 GiB of cuda:0, but .* take 8\.9 GiB"):
        check_memory(small, torch.device("cuda:0"), "vllm")


def test_the_engine_of_a_teachers_evaluation_holds_the_teacher(
    compose_run: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    """28 GiB of Qwen3-14B and 5 GiB of one response, in three quarters of the card; 69 of Qwen3-32B do not fit."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with_gpu(monkeypatch, free=78.5, host=200)
    cuda, data = torch.device("cuda:0"), "data.root=."
    teacher = teacher_config(compose_run("experiment=tip_deepplanning", data))
    check_memory(teacher, cuda, "vllm")
    share = with_engine_share(teacher, cuda, 2).vllm.gpu_memory_utilization
    assert share == RankMemory(teacher, CARDS[80].gib, 2).engine_share == EVALUATION_SHARE
    large = teacher_config(compose_run("experiment=tip_deepplanning_32b", data))
    with pytest.raises(
        ConfigError, match=r"=0\.55 is 43\.5 GiB of cuda:0, but the teacher's weights .* take 69\.\d GiB"
    ):
        check_memory(large, cuda, "vllm")


def test_a_resident_teacher_leaves_its_engine_the_rest(compose_run: Compose) -> None:
    """27.5 GiB of Qwen2.5-14B on one card of 79.1: 0.95 - 28 / 79.1 of it, rounded down; offloaded it is there too."""
    for placement in ("resident", "offload"):
        teacher = teacher_config(compose_run("experiment=tip_qwen25", f"pair.teacher.placement={placement}"))
        memory = RankMemory(teacher, CARDS[80].gib, 1)
        assert memory.engine_share == 0.59 and memory.fits
    own = teacher_config(compose_run("experiment=consumer", "rollout.vllm.gpu_memory_utilization=0.8"))
    assert RankMemory(own, CARDS[24].gib, 1).engine_share == 0.8


def test_ignore_memory_is_not_part_of_the_digest(compose_run: Compose) -> None:
    assert digest(compose_run("ignore_memory=true")) == digest(compose_run())


def test_the_limit_of_a_cgroup_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n")  # 8 GiB
    monkeypatch.setattr(memory_check, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory_check, "_CGROUP", tmp_path)
    monkeypatch.setattr(memory_check, "_OWN_CGROUP", tmp_path / "absent")
    assert free_gib(CPU) == 8.0
    (tmp_path / "memory.current").write_text(f"{2**30}\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert free_gib(CPU) == 8.0
    (tmp_path / "memory.max").write_text(f"{4 * 2**30}\n")
    assert free_gib(CPU) == 3.0  # 4 - 1
    (tmp_path / "memory.stat").write_text(f"anon 7\nfile 9\ninactive_file {2**28}\nactive_file {2**28}\n")
    assert free_gib(CPU) == 3.5, "files that were read are no memory in use"
    (tmp_path / "slurm" / "job_1").mkdir(parents=True)
    (tmp_path / "slurm" / "memory.current").write_text(f"{2**30}\n")
    (tmp_path / "slurm" / "memory.max").write_text(f"{3 * 2**30}\n")
    (tmp_path / "cgroup").write_text("1:cpu:/other\n0::/slurm/job_1\n")
    monkeypatch.setattr(memory_check, "_OWN_CGROUP", tmp_path / "cgroup")
    assert free_gib(CPU) == 2.0, "a group around this process's own has a lower limit"
    monkeypatch.setattr(memory_check, "_MEMINFO", tmp_path / "absent")
    assert free_gib(CPU) is None


def test_memory_is_checked_before_weights_load(
    compose_run: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_args, **_kwargs) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(build, "load_pair_or_offload", never)
    with_free(monkeypatch, 1e-4)
    for mode, function in (("train", run), ("eval", run_eval)):
        with pytest.raises(ConfigError, match="this run needs about"):
            function(compose_run(f"mode={mode}"), RunFolder(tmp_path))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "overrides",
    [
        ["experiment=tip_qwen3"],
        ["experiment=tip_qwen3", "rollout.vllm.sleep_level=2", "pair.teacher.placement=offload"],
        ["experiment=tip_qwen3", "learner.loss_backend=materialized"],
        ["experiment=demo", "rollout.staleness=1"],
    ],
    ids=lambda overrides: overrides[-1],
)
def test_every_part_has_a_key_that_lowers_it(compose_run: Compose, overrides: list[str], ranks: int) -> None:
    without = {"CUDA context", "weights being read", "exported model", PROCESS}  # only a smaller pair lowers them
    for card in (None, 80):
        phases = RankMemory(compose_run(*overrides, f"ranks={ranks}"), card, ranks).phases().values()
        assert {part for phase in phases for part in phase.device | phase.host} <= LOWERED_BY.keys() | without
