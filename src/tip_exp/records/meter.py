"""Time and peak memory of named spans: allocations of torch, resident memory of the process, use of the device."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import accumulate
from pathlib import Path

import torch

from tip_exp.records import metrics
from tip_exp.utils.units import GIB, MIB

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Meter:
    """Measures blocks of a run, which may be nested: `with meter.span("loss"): …`.

    Seconds are those of the device on CUDA, between two events of its stream, so that a span does not wait for it.

    memory/<span>_peak_gib: on CUDA torch's max_memory_allocated, which still counts the pool of a sleeping vLLM engine;
    on a CPU the kernel's peak of resident memory (VmHWM), which is reset through clear_refs when a span starts.
    memory/<span>_extra_mib: peak of torch's allocations in the span, minus those at its start. On a CPU, torch has no
    such counter (and resident memory hides the reuse of freed pages), so spans with `allocations=True` are profiled
    while `count_allocations` is set. The profile is exact, but too slow for every step.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._cuda = device, device.type == "cuda"
        self.count_allocations = False
        self._seconds: dict[str, float] = defaultdict(float)  # by metric, as the peaks
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []  # metric, start and end of a span
        self._peaks: dict[str, float] = defaultdict(float)
        self._open: list[float] = []  # bytes at the peak of each open span up to now, outermost first

    @contextmanager
    def span(self, name: str, *, allocations: bool = False) -> Iterator[None]:
        self._record_peak()
        bytes_at_start = torch.cuda.memory_allocated(self._device) if self._cuda else 0
        self._open.append(bytes_at_start)
        profile = None
        if allocations and self.count_allocations and not self._cuda:
            # Not torch.profiler.profile: with acc_events it makes a tree of Python objects, megabytes of garbage in
            # cycles that Python collects after many evaluations, and without it warns.
            profile = torch.autograd.profiler.profile(use_kineto=True, profile_memory=True)
        started, event = time.perf_counter(), self._event()
        try:
            with profile or nullcontext():
                yield
        finally:
            if event is not None and (end := self._event()) is not None:
                self._events.append((metrics.seconds(name), event, end))
            else:
                self._seconds[metrics.seconds(name)] += time.perf_counter() - started
            self._record_peak()
            peak = self._open.pop()
            self._raise_peak(metrics.peak_gib(name), peak / GIB)
            if self._cuda:
                self._raise_peak(metrics.extra_mib(name), (peak - bytes_at_start) / MIB)
            elif profile is not None:
                self._raise_peak(metrics.extra_mib(name), _peak_allocation(profile) / MIB)

    def add(self, name: str, seconds: float) -> None:
        """Add seconds that another thread has measured to those of a span."""
        self._seconds[metrics.seconds(name)] += seconds

    def drain_seconds(self) -> dict[str, float]:
        """{"time/rollout_s": …}: seconds in each span since the last call; waits for the device."""
        if self._events:
            torch.cuda.synchronize(self._device)
        for metric, start, end in self._events:
            self._seconds[metric] += start.elapsed_time(end) / 1000
        self._events.clear()
        drained = dict(self._seconds)
        self._seconds.clear()
        return drained

    def memory(self) -> dict[str, float]:
        """Peaks since the start: memory/<span>_peak_gib, memory/<span>_extra_mib, memory/process_peak_gib, …"""
        self._record_peak()
        return dict(self._peaks)

    def _record_peak(self) -> None:
        """Add the current peak to all open spans and to the process, then reset it."""
        peak = status_bytes("VmHWM")
        self._raise_peak(metrics.PROCESS_PEAK_GIB, peak / GIB)
        if self._cuda:
            peak = torch.cuda.max_memory_allocated(self._device)
            free, total = torch.cuda.mem_get_info(self._device)
            self._raise_peak(metrics.DEVICE_USED_PEAK_GIB, (total - free) / GIB)
            self._raise_peak(metrics.RESERVED_PEAK_GIB, torch.cuda.max_memory_reserved(self._device) / GIB)
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            reset_high_water()
        self._open = [max(earlier, peak) for earlier in self._open]

    def _event(self) -> torch.cuda.Event | None:
        """Recorded on the current stream; None on a CPU."""
        if not self._cuda:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _raise_peak(self, metric: str, value: float) -> None:
        self._peaks[metric] = max(self._peaks[metric], value)


def _peak_allocation(profile: torch.autograd.profiler.profile) -> int:
    """The highest sum of torch's allocations in a profiled block, in bytes."""
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]  # pyright: ignore[reportOptionalMemberAccess]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))  # pyright: ignore[reportAttributeAccessIssue]


def reset_high_water() -> None:
    """Set this process's VmHWM to its VmRSS (Linux; on other systems the peak is never reset)."""
    if _CLEAR_REFS.exists():
        _CLEAR_REFS.write_text("5")


def status_bytes(field: str) -> float:
    """A field of /proc/self/status in bytes; 0 without such a file or field, as in some sandboxes."""
    lines = _STATUS.read_text().splitlines() if _STATUS.exists() else []
    line = next((line for line in lines if line.startswith(f"{field}:")), f"{field}: 0 kB")
    return float(line.split()[1]) * 1024
