"""The checks of the masked loss: time, memory and error beside the matrix products alone and TRL's kernel."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from benchmarks import measuring
from benchmarks.gpu_check.checks import Settings
from benchmarks.gpu_check.report import table
from benchmarks.implementations import (
    IMPLEMENTATIONS,
    REQUIRES,
    Case,
    exact_gradients,
    make_case,
    random_mask,
    relative_error,
)
from tip_exp.utils.units import MIB

# floor: cuBLAS alone; fused_soft_or: the loss after the pass that scores every token.
AT_RETENTION = {1.0: ("floor", "fused", "materialized", "trl"), 0.2: ("floor", "fused_soft_or", "trl_kept_alone")}
RETENTIONS = (1.0, 0.5, 0.2, 0.1)
GRADIENT_ERROR = {torch.bfloat16: 2e-2, torch.float32: 1e-4}  # relative, against float64
ROUNDS = 5


def loss(settings: Settings) -> list[str]:
    """Milliseconds are the best of five."""
    case = make(settings)
    rows: list[dict[str, object]] = []
    absent: set[str] = set()
    for retention, names in AT_RETENTION.items():
        masked, floor_s = masked_at(case, retention), 0.0
        for name in names:
            if missing := measuring.missing([REQUIRES[name]] if name in REQUIRES else []):
                absent.update(missing)
                continue
            seconds, peak_mib = measure(name, masked, 1 if settings.tiny else ROUNDS)
            floor_s = floor_s or seconds  # the first is the floor
            row: dict[str, object] = {"implementation": name, "retention": retention}
            row |= {"ms": f"{1000 * seconds:.2f}", "times cuBLAS alone": f"{seconds / floor_s:.2f}"}
            row["peak MiB"] = f"{peak_mib:,.0f}"
            row["gradient error"] = "" if name == "floor" else f"{error(name, masked):.1e}"
            rows.append(row)
    worst = max(rows, key=lambda row: float(str(row["gradient error"] or 0)))
    limit = GRADIENT_ERROR[case.student_hidden.dtype]
    assert float(str(worst["gradient error"])) <= limit, f"gradient error above {limit}: {worst}"
    note = [f"Not installed: {', '.join(sorted(absent))} ({measuring.INSTALL}).", ""] if absent else []
    return [describe(case), "", *note, *table(rows)]


def memory(settings: Settings) -> list[str]:
    """Peak above what is there before the loss, without one gradient of the head."""
    case, rows = make(settings), []
    peaks: dict[str, list[float]] = {"fused": [], "materialized": []}
    for retention in RETENTIONS:
        for name, sizes in peaks.items():
            sizes.append(measure(name, masked_at(case, retention), 1)[1])
        rows.append({"retention": retention} | {f"{name} MiB": f"{sizes[-1]:,.0f}" for name, sizes in peaks.items()})
    if settings.device == "cuda":
        assert max(peaks["fused"]) < peaks["materialized"][0], f"fused must need less than whole logits: {rows}"
        assert peaks["materialized"] == sorted(peaks["materialized"], reverse=True), f"must fall with retention: {rows}"
    return [describe(case), "", *table(rows)]


def make(settings: Settings) -> Case:
    """Hidden states and heads in the widths of Qwen3 1.7B → 0.6B, in bfloat16; small and in float32 if tiny."""
    if settings.tiny:
        return make_case(64, 512, 32, 64, MIB)
    case, to = make_case(2048, 151_936, 1024, 2048, 256 * MIB), {"device": settings.device, "dtype": torch.bfloat16}
    return replace(
        case,
        student_hidden=case.student_hidden.to(**to),
        teacher_hidden=case.teacher_hidden.to(**to),
        student_weight=case.student_weight.detach().to(**to).requires_grad_(),
        teacher_weight=case.teacher_weight.to(**to),
        token_ids=case.token_ids.to(settings.device),
    )


def masked_at(case: Case, retention: float) -> Case:
    return replace(case, kept_mask=random_mask(len(case.token_ids), retention).to(case.token_ids.device))


def measure(name: str, case: Case, rounds: int) -> tuple[float, float]:
    """Seconds (best of `rounds`) and peak MiB above the start, after a call that compiles kernels."""
    function, on_gpu = IMPLEMENTATIONS[name], case.student_hidden.is_cuda
    best, peak = float("inf"), 0.0
    for turn in range(rounds + 1):
        case.student_weight.grad = None
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before, started = torch.cuda.memory_allocated(), time.perf_counter()
            function(case)
            torch.cuda.synchronize()
            seconds, mib = time.perf_counter() - started, (torch.cuda.max_memory_allocated() - before) / MIB
        else:
            cost, _ = measuring.cost_of(lambda: function(case))
            seconds, mib = cost.wall_s, cost.peak_extra_mib
        if turn > 0:
            best, peak = min(best, seconds), max(peak, mib - case.student_weight.nbytes / MIB)
    return best, max(0.0, peak)


def error(name: str, case: Case, tokens: int = 64) -> float:
    """Relative error of the gradients against float64, on the first tokens."""
    few = replace(
        case,
        student_hidden=case.student_hidden[:tokens],
        teacher_hidden=case.teacher_hidden[:tokens],
        token_ids=case.token_ids[:tokens],
        kept_mask=case.kept_mask[:tokens],
    )
    exact = exact_gradients(few)
    case.student_weight.grad = None
    return relative_error(IMPLEMENTATIONS[name](few), exact)


def describe(case: Case) -> str:
    vocab, width = case.student_weight.shape
    return (
        f"{len(case.token_ids):,} tokens, vocabulary {vocab:,}, widths {width:,} and {case.teacher_weight.shape[1]:,}, "
        f"{str(case.student_weight.dtype).removeprefix('torch.')}"
    )
