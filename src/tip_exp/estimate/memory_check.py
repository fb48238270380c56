"""Refuse a run that does not fit into the free memory of its device, before any weight loads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tip_exp.config.schema import RunConfig
from tip_exp.estimate.memory import PROCESS, memory_gib
from tip_exp.utils.errors import ConfigError
from tip_exp.utils.units import GIB

if TYPE_CHECKING:
    import torch

# Keys that lower each part of `memory_gib`.
LOWERED_BY = {
    "teacher weights": "pair.teacher.dtype, pair.teacher.placement",
    "student weights": "pair.student.dtype",
    "gradients": "pair.student.dtype",
    "AdamW": "pair.student.dtype",
    "activations": "learner.micro_batch_tokens",
    "hidden states": "learner.prompts_per_step, learner.samples_per_prompt, data.max_response_tokens",
    "logits": "learner.tile_mib (learner.loss_backend=fused)",
    "sampling engine": "rollout.vllm.gpu_memory_utilization, rollout.vllm.sleep_level",
}
_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
_MIN_SHARE = 0.05  # the message leaves out smaller parts


def check_memory(config: RunConfig, device: torch.device, backend: str) -> None:
    """Raise ConfigError if `memory_gib` is above the free memory; names need, supply and the keys that lower it.

    A vLLM engine on CUDA that does not sleep while the learner works counts too. No check with ignore_memory=true, or
    where the system does not report free memory.
    """
    free = free_gib(device)
    if config.ignore_memory or free is None:
        return
    parts = {name: gib for name, gib in memory_gib(config).items() if name != PROCESS}  # already in use by now
    vllm = config.rollout.vllm
    if backend == "vllm" and device.type == "cuda" and vllm.sleep_level == 0:
        import torch

        total = torch.cuda.get_device_properties(device).total_memory / GIB
        parts["sampling engine"] = vllm.gpu_memory_utilization * total
    needed = sum(parts.values())
    if needed <= free:
        return
    large = {name: gib for name, gib in sorted(parts.items(), key=lambda part: -part[1]) if gib >= _MIN_SHARE * needed}
    keys = dict.fromkeys(key for name in large for key in LOWERED_BY[name].split(", "))
    raise ConfigError(
        f"this run needs about {needed:.1f} GiB ({', '.join(f'{name} {gib:.1f}' for name, gib in large.items())}), but "
        f"{device} has {free:.1f} GiB free. Lower it with {', '.join(keys)}, or a smaller pair; "
        "ignore_memory=true skips this check"
    )


def free_gib(device: torch.device) -> float | None:
    """Free memory of a CUDA device, else of the host; None if unknown."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0] / GIB
    return free_host_gib()


def free_host_gib() -> float | None:
    """Free memory of the machine or the cgroup, whichever is less; None if unknown."""
    if not _MEMINFO.exists():
        return None
    fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return free / GIB
