"""The start-up check: refuse a run that the free memory of its device or host cannot hold, before any weight loads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from tip_exp.config.schema import RolloutConfig, RunConfig
from tip_exp.estimate.memory import CONTEXT_GIB, PROCESS, RankMemory
from tip_exp.estimate.shapes import guess_note
from tip_exp.utils.errors import ConfigError
from tip_exp.utils.units import GIB

if TYPE_CHECKING:
    import torch

# Keys that lower each part of a phase; only a smaller pair lowers the others.
LOWERED_BY = {
    "teacher layers": "ranks, pair.teacher.dtype, pair.teacher.placement",
    "teacher vocabulary": "ranks, pair.teacher.dtype",
    "student weights": "ranks, pair.student.dtype",
    "gradients": "ranks, pair.student.dtype",
    "AdamW": "ranks, pair.student.dtype",
    "whole vocabulary gradients": "pair.student.lora",
    "whole vocabulary matrices": "learner.compute_dtype",
    "gathered layers": "learner.compute_dtype",
    "gathered student": "learner.compute_dtype, rollout.backend",
    "activations": "learner.micro_batch_tokens",
    "micro-batch hidden states": "learner.micro_batch_tokens",
    "temporaries": "learner.micro_batch_tokens",
    "hidden states": "ranks, learner.prompts_per_step, learner.samples_per_prompt, data.max_response_tokens",
    "logits and temporaries": "learner.micro_batch_tokens, learner.tile_mib (learner.loss_backend=fused)",
    "sampling engine": "rollout.vllm.gpu_memory_utilization, rollout.vllm.sleep_level",
    "sampling engine asleep": "rollout.vllm.sleep_level",
    "KV cache": "rollout.batch_size",
    "sampling": "rollout.batch_size",
    "sampler's weights": "rollout.staleness",
    "checkpoint": "ranks",
}
_MEMINFO, _CGROUP, _OWN_CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_MIN_SHARE = 0.05  # the message leaves out smaller parts


def check_memory(config: RunConfig, device: torch.device, backend: str) -> None:
    """Raise ConfigError if a phase of `config` needs more than is free on the device or on the host.

    The message names the phase, its need, the supply and the keys that lower it. `backend`: of rollouts, hf or vllm.
    No check with ignore_memory=true, or where the system does not report free memory.
    """
    free = free_gib(device)
    if config.ignore_memory or free is None:
        return
    ranks, local_ranks = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if device.type != "cuda":
        phases = RankMemory(config, None, ranks, backend="hf").phases()
        needs = {name: _times(local_ranks, phase.device | phase.host) for name, phase in phases.items()}
        _check(device.type, needs, free, guess_note(config))
        return
    import torch

    memory = RankMemory(config, torch.cuda.get_device_properties(device).total_memory / GIB, ranks, backend=backend)
    if backend == "vllm":
        given, needed = memory.engine_gib()
        is_teacher = config.mode == "teacher"
        role, remedy = ("teacher", "set eval.teacher=false") if is_teacher else ("student", "raise it")
        if needed > given:
            raise ConfigError(
                f"rollout.vllm.gpu_memory_utilization={memory.engine_share} is {given:.1f} GiB of {device}, but the "
                f"{role}'s weights and the KV cache of its longest response take {needed:.1f} GiB; {remedy}, or lower "
                "data.max_response_tokens or eval.max_tokens"
            )
    phases = memory.phases()
    note = guess_note(config)
    _check(str(device), {name: phase.device for name, phase in phases.items()}, free + CONTEXT_GIB, note)
    if (free_host := free_host_gib()) is not None:
        needs = {name: _times(local_ranks, phase.host) for name, phase in phases.items()}
        _check("the host", needs, free_host, note)


def with_engine_share(config: RunConfig, device: torch.device, ranks: int) -> RolloutConfig:
    """The config's `rollout` with the engine's share of this card (RankMemory.engine_share)."""
    if device.type != "cuda":
        return config.rollout
    import torch

    card_gib = torch.cuda.get_device_properties(device).total_memory / GIB
    share = RankMemory(config, card_gib, ranks, backend="vllm").engine_share
    vllm = config.rollout.vllm.model_copy(update={"gpu_memory_utilization": share})
    return config.rollout.model_copy(update={"vllm": vllm})


def _times(count: int, parts: dict[str, float]) -> dict[str, float]:
    return {part: count * gib for part, gib in parts.items()}


def _check(device: str, phases: dict[str, dict[str, float]], free: float, note: str) -> None:
    """Raise ConfigError for the phase with the largest need if that is above `free` GiB; the process is in use."""
    needs = {name: {part: gib for part, gib in parts.items() if part != PROCESS} for name, parts in phases.items()}
    phase, parts = max(needs.items(), key=lambda need: sum(need[1].values()))
    needed = sum(parts.values())
    if needed <= free:
        return
    large = {name: gib for name, gib in sorted(parts.items(), key=lambda part: -part[1]) if gib >= _MIN_SHARE * needed}
    keys = dict.fromkeys(key for name in large for key in LOWERED_BY.get(name, "").split(", ") if key)
    lowered = f"{', '.join(keys)}, or a smaller pair" if keys else "a smaller pair"
    sizes = ", ".join(f"{name} {gib:.1f}" for name, gib in large.items())
    raise ConfigError(
        f"this run needs about {needed:.1f} GiB ({phase}: {sizes}), but {device} has {free:.1f} GiB free. "
        f"Lower it with {lowered}; ignore_memory=true skips this check" + (f" ({note})" if note else "")
    )


def free_gib(device: torch.device) -> float | None:
    """Free memory of a CUDA device, else of the host; None if unknown."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0] / GIB
    return free_host_gib()


def _file_cache(group: Path) -> int:
    """Bytes of files that the cgroup's memory.current counts and that the system gives back as memory is needed."""
    stat = group / "memory.stat"
    fields = dict(line.split() for line in stat.read_text().splitlines()) if stat.exists() else {}
    return sum(int(fields.get(name, 0)) for name in ("active_file", "inactive_file"))


def free_host_gib() -> float | None:
    """Free memory of the machine or the cgroup, whichever is less; None if unknown."""
    if not _MEMINFO.exists():
        return None
    fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    for group in _cgroups():
        limit, used = group / "memory.max", group / "memory.current"
        if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
            free = min(free, int(text) - int(used.read_text()) + _file_cache(group))
    return free / GIB


def _cgroups() -> list[Path]:
    """The folder of this process's cgroup (v2), such as that of a SLURM job, and those of the groups around it."""
    lines = _OWN_CGROUP.read_text().splitlines() if _OWN_CGROUP.exists() else []
    path = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    folder = _CGROUP / path
    return [group for group in (folder, *folder.parents) if group.is_relative_to(_CGROUP)]
