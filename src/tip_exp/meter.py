"""Time and peak memory of named spans: resident set on Linux, torch's allocator and the whole device on CUDA."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

MIB, GIB = 2**20, 2**30
_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Meter:
    """Measures blocks of a run, which may nest: `with meter.span("loss"): …`.

    On a CPU a span's peak is the kernel's high-water mark of resident memory (VmHWM), reset at its start through
    clear_refs; on CUDA it is torch's max_memory_allocated. `…_extra` is the peak above what was held when the span began.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._cuda = device, device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._peak: dict[str, float] = defaultdict(float)  # bytes, the highest of all blocks of a name
        self._extra: dict[str, float] = defaultdict(float)
        self._process_peak = self._reserved_peak = self._device_used_peak = 0.0
        self._open: list[float] = []  # peak so far of each open span, outermost first

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        self._note_peak()
        held = self._held()
        self._open.append(held)
        started = time.perf_counter()
        try:
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
            self._extra[name] = max(self._extra[name], peak - held)

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
        process = _status_bytes("VmHWM")
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

    def _held(self) -> float:
        return torch.cuda.memory_allocated(self._device) if self._cuda else _status_bytes("VmRSS")


def reset_high_water() -> None:
    """Set this process's VmHWM back to its VmRSS (Linux; elsewhere the mark only rises)."""
    if _CLEAR_REFS.exists():
        _CLEAR_REFS.write_text("5")


def _status_bytes(field: str) -> float:
    """A field of /proc/self/status in bytes; 0 where there is no such file."""
    if not _STATUS.exists():
        return 0.0
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return float(line.split()[1]) * 1024
