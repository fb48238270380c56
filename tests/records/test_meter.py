"""Spans: seconds add up, peaks belong to the span that had them, allocations are exact."""

from __future__ import annotations

import gc
import sys
from types import SimpleNamespace

import pytest
import torch

from tip_exp.records import meter as meter_module
from tip_exp.records.meter import Meter

MIB = 2**20
CPU = torch.device("cpu")


def test_seconds_of_a_name_add_up_until_they_are_drained(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([10.0, 10.5, 20.0, 20.25])
    monkeypatch.setattr(meter_module, "time", SimpleNamespace(perf_counter=lambda: next(readings)))
    meter = Meter(CPU)
    for _ in range(2):
        with meter.span("sync"):
            pass
    assert meter.drain_seconds() == {"time/sync_s": 0.75}  # 0.5 + 0.25
    assert meter.drain_seconds() == {}


def test_the_peak_of_allocations_is_exact() -> None:
    meter = Meter(CPU)
    meter.count_allocations = True
    before = torch.zeros(MIB)  # allocated before the span, so it does not count
    with meter.span("work", allocations=True):
        first = torch.ones(2 * MIB)  # 8 MiB
        second = first * 2  # 16 MiB allocated
        del first
        third = second + 1  # 16 MiB again
        del second, third
        torch.ones(MIB)
    assert meter.memory()["memory/work_extra_mib"] == pytest.approx(16, abs=0.1)
    assert len(before) == MIB


def test_without_counting_there_is_no_value_for_allocations() -> None:
    meter = Meter(CPU)
    with meter.span("work", allocations=True):
        torch.ones(MIB)
    assert "memory/work_extra_mib" not in meter.memory()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports and resets the peak of resident memory")
def test_resident_peaks_belong_to_their_span() -> None:
    meter = Meter(CPU)
    with meter.span("outer"):
        with meter.span("big"):
            block = torch.ones(64 * MIB)  # 256 MiB
            del block
        with meter.span("small"):
            pass
    peaks = meter.memory()
    assert peaks["memory/big_peak_gib"] - peaks["memory/small_peak_gib"] > 0.2
    assert peaks["memory/outer_peak_gib"] >= peaks["memory/big_peak_gib"]
    assert peaks["memory/process_peak_gib"] >= peaks["memory/outer_peak_gib"]
    with meter.span("small"):
        pass
    assert meter.memory()["memory/small_peak_gib"] < peaks["memory/big_peak_gib"] - 0.2


def test_a_count_of_allocations_leaves_nothing_behind() -> None:
    """Neither objects nor cycles of them, which would grow by megabytes an evaluation."""
    meter = Meter(CPU)
    meter.count_allocations = True
    gc.collect()
    gc.disable()
    try:
        with meter.span("warm", allocations=True):
            torch.ones(10).sum()
        before = len(gc.get_objects())
        with meter.span("many", allocations=True):
            for _ in range(200):
                torch.ones(10).sum()
        assert len(gc.get_objects()) - before < 100
    finally:
        gc.enable()
