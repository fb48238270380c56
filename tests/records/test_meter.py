"""Spans measure what they should: time adds up, peaks belong to the span that had them, allocations are exact."""

from __future__ import annotations

import sys
import time

import pytest
import torch

from tip_exp.records.meter import Meter

MIB = 2**20
CPU = torch.device("cpu")


def test_seconds_of_a_name_add_up_and_are_drained() -> None:
    meter = Meter(CPU)
    for _ in range(2):
        with meter.span("nap"):
            time.sleep(0.02)
    drained = meter.drain_seconds()
    assert drained["time/nap_s"] >= 0.04
    assert meter.drain_seconds() == {}


def test_allocations_are_counted_exactly() -> None:
    meter = Meter(CPU)
    meter.count_allocations = True
    kept = torch.zeros(MIB)  # before the span: not its business
    with meter.span("work", allocations=True):
        one = torch.ones(2 * MIB)  # 8 MiB
        two = one * 2  # 16 MiB alive
        del one
        three = two + 1  # 16 MiB again
        del two, three
        torch.ones(MIB)
    assert meter.memory()["memory/work_extra_mib"] == pytest.approx(16, abs=0.1)
    assert len(kept) == MIB


def test_without_counting_there_is_no_figure_rather_than_a_wrong_one() -> None:
    meter = Meter(CPU)
    with meter.span("work", allocations=True):
        torch.ones(MIB)
    assert "memory/work_extra_mib" not in meter.memory()


@pytest.mark.skipif(sys.platform != "linux", reason="high-water marks of resident memory are Linux's")
def test_resident_peaks_belong_to_their_span() -> None:
    meter = Meter(CPU)
    with meter.span("outer"):
        with meter.span("big"):
            block = torch.ones(64 * MIB)  # 256 MiB
            del block
        with meter.span("small"):
            pass
    found = meter.memory()
    assert found["memory/big_peak_gib"] - found["memory/small_peak_gib"] > 0.2
    assert found["memory/outer_peak_gib"] >= found["memory/big_peak_gib"]
    assert found["memory/process_peak_gib"] >= found["memory/outer_peak_gib"]
    with meter.span("small"):
        pass
    assert meter.memory()["memory/small_peak_gib"] < found["memory/big_peak_gib"] - 0.2
