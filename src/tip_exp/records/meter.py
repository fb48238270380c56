"""Time and peak memory of named spans: allocations of torch, resident memory of the process, use of the device."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from tip_exp.records import metrics
from tip_exp.utils.units import GIB, MIB

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Meter:
    """Measures blocks of a run, which may be nested: `with meter.span("loss"): …`.

    memory/<span>_peak_gib: on CUDA torch's max_memory_allocated; on a CPU the kernel's peak of resident memory (VmHWM),
    which is reset through clear_refs when a span starts.
    memory/<span>_extra_mib: peak of torch's allocations in the span, minus those at its start. On a CPU, torch has no
    such counter (and resident memory hides the reuse of freed pages), so spans with `allocations=True` are profiled
    while `count_allocations` is set. The profile is exact, but too slow for every step.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._cuda = device, device.type == "cuda"
        self.count_allocations = False
        self._seconds: dict[str, float] = defaultdict(float)
        self._peak: dict[str, float] = defaultdict(float)  # bytes; maximum over all blocks of a name
        self._extra: dict[str, float] = defaultdict(float)
        self._process_peak = self._reserved_peak = self._device_used_peak = 0.0
        self._open: list[float] = []  # peak of each open span up to now, outermost first

    @contextmanager
    def span(self, name: str, *, allocations: bool = False) -> Iterator[None]:
        self._record_peak()
        bytes_at_start = torch.cuda.memory_allocated(self._device) if self._cuda else 0
        self._open.append(bytes_at_start)
        profiled = allocations and self.count_allocations and not self._cuda
        allocated = [0]
        started = time.perf_counter()
        try:
            with _count_allocations(allocated) if profiled else nullcontext():
                yield
        finally:
            if self._cuda:
                torch.cuda.synchronize(self._device)  # kernels run asynchronously
            self._seconds[name] += time.perf_counter() - started
            self._record_peak()
            peak = self._open.pop()
            if self._open:
                self._open[-1] = max(self._open[-1], peak)
            self._peak[name] = max(self._peak[name], peak)
            if self._cuda or allocated[0]:
                self._extra[name] = max(self._extra[name], peak - bytes_at_start if self._cuda else allocated[0])

    def drain_seconds(self) -> dict[str, float]:
        """{"time/rollout_s": …}: seconds in each span since the last call."""
        drained = {metrics.seconds(name): seconds for name, seconds in self._seconds.items()}
        self._seconds.clear()
        return drained

    def memory(self) -> dict[str, float]:
        """Peaks since the start: memory/<span>_peak_gib, memory/<span>_extra_mib, memory/process_peak_gib, …"""
        self._record_peak()
        peaks = {metrics.peak_gib(name): peak / GIB for name, peak in self._peak.items()}
        peaks |= {metrics.extra_mib(name): extra / MIB for name, extra in self._extra.items()}
        peaks[metrics.PROCESS_PEAK_GIB] = self._process_peak / GIB
        if self._cuda:
            peaks[metrics.RESERVED_PEAK_GIB] = self._reserved_peak / GIB
            peaks[metrics.DEVICE_USED_PEAK_GIB] = self._device_used_peak / GIB
        return peaks

    def _record_peak(self) -> None:
        """Add the current peak to the innermost open span and to the process, then reset it."""
        process = status_bytes("VmHWM")
        peak = torch.cuda.max_memory_allocated(self._device) if self._cuda else process
        if self._open:
            self._open[-1] = max(self._open[-1], peak)
        self._process_peak = max(self._process_peak, process)
        if self._cuda:
            free, total = torch.cuda.mem_get_info(self._device)
            self._device_used_peak = max(self._device_used_peak, total - free)
            self._reserved_peak = max(self._reserved_peak, torch.cuda.max_memory_reserved(self._device))
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            reset_high_water()


@contextmanager
def _count_allocations(peak_bytes: list[int]) -> Iterator[None]:
    """Profile a block on the CPU and set peak_bytes[0] to the peak of torch's allocations made within it."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        yield
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]  # pyright: ignore[reportOptionalMemberAccess]
    allocated = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
        peak_bytes[0] = max(peak_bytes[0], allocated)


def reset_high_water() -> None:
    """Set this process's VmHWM to its VmRSS (Linux; on other systems the peak is never reset)."""
    if _CLEAR_REFS.exists():
        _CLEAR_REFS.write_text("5")


def status_bytes(field: str) -> float:
    """A field of /proc/self/status in bytes; 0 without such a file."""
    if not _STATUS.exists():
        return 0.0
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return float(line.split()[1]) * 1024
