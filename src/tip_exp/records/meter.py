"""Time and peak memory of named spans: what torch allocates, what the process holds, what the device has in use."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from tip_exp.utils.units import GIB, MIB

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Meter:
    """Measures blocks of a run, which may nest: `with meter.span("loss"): …`.

    memory/<span>_peak_gib: on CUDA torch's max_memory_allocated; on a CPU the kernel's high-water mark of resident
    memory (VmHWM), reset at the start of the span through clear_refs.
    memory/<span>_extra_mib: what torch allocated at its peak above what it held when the span began. On a CPU torch
    keeps no count (and resident memory hides the reuse of freed pages), so spans marked `allocations` are profiled
    while `count_allocations` is set: exact, but too slow for every step.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._cuda = device, device.type == "cuda"
        self.count_allocations = False
        self._seconds: dict[str, float] = defaultdict(float)
        self._peak: dict[str, float] = defaultdict(float)  # bytes, the highest of all blocks of a name
        self._extra: dict[str, float] = defaultdict(float)
        self._process_peak = self._reserved_peak = self._device_used_peak = 0.0
        self._open: list[float] = []  # peak so far of each open span, outermost first

    @contextmanager
    def span(self, name: str, *, allocations: bool = False) -> Iterator[None]:
        self._note_peak()
        held = torch.cuda.memory_allocated(self._device) if self._cuda else 0
        self._open.append(held)
        counting = allocations and self.count_allocations and not self._cuda
        allocated = [0]
        started = time.perf_counter()
        try:
            with _count_allocations(allocated) if counting else nullcontext():
                yield
        finally:
            if self._cuda:
                torch.cuda.synchronize(self._device)  # else the span would time the launches
            self._seconds[name] += time.perf_counter() - started
            self._note_peak()
            peak = self._open.pop()
            if self._open:
                self._open[-1] = max(self._open[-1], peak)
            self._peak[name] = max(self._peak[name], peak)
            if self._cuda or allocated[0]:
                self._extra[name] = max(self._extra[name], peak - held if self._cuda else allocated[0])

    def drain_seconds(self) -> dict[str, float]:
        """{"time/rollout_s": …}: seconds of each span since the last call."""
        drained = {f"time/{name}_s": seconds for name, seconds in self._seconds.items()}
        self._seconds.clear()
        return drained

    def memory(self) -> dict[str, float]:
        """Peaks since the start: memory/<span>_peak_gib, memory/<span>_extra_mib, memory/process_peak_gib, …"""
        self._note_peak()
        found = {f"memory/{name}_peak_gib": peak / GIB for name, peak in self._peak.items()}
        found |= {f"memory/{name}_extra_mib": extra / MIB for name, extra in self._extra.items()}
        found["memory/process_peak_gib"] = self._process_peak / GIB
        if self._cuda:
            found["memory/reserved_peak_gib"] = self._reserved_peak / GIB
            found["memory/device_used_peak_gib"] = self._device_used_peak / GIB
        return found

    def _note_peak(self) -> None:
        """Credit the high-water mark to the innermost open span and to the process, then reset it."""
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
def _count_allocations(found: list[int]) -> Iterator[None]:
    """Profile a block on the CPU; found[0] is, after it, the most bytes torch had allocated within it at once."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        yield
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]  # pyright: ignore[reportOptionalMemberAccess]
    held = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
        found[0] = max(found[0], held)


def reset_high_water() -> None:
    """Set this process's VmHWM back to its VmRSS (Linux; elsewhere the mark only rises)."""
    if _CLEAR_REFS.exists():
        _CLEAR_REFS.write_text("5")


def status_bytes(field: str) -> float:
    """A field of /proc/self/status in bytes; 0 where there is no such file."""
    if not _STATUS.exists():
        return 0.0
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return float(line.split()[1]) * 1024
