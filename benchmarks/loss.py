"""Time and memory of the masked loss and its gradient: this package, TRL, Liger, plain PyTorch and the GEMMs alone.

Each point (vocabulary, tokens) runs in a fresh process, where the implementations take turns for some rounds, so that
other load on the machine affects all alike: compare CPU seconds within one point. Memory is the peak of resident memory
above the weights, minus one gradient of the head. On a CPU, TRL and Liger compute the logits of every token whatever
the mask; `trl_kept_alone` shows TRL's function behind a selector that passes on the kept rows alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import measuring, plotting
from benchmarks.implementations import (
    IMPLEMENTATIONS,
    NO_GRADIENT,
    REQUIRES,
    exact_gradients,
    make_case,
    random_mask,
    relative_error,
)
from tip_exp.utils.units import MIB


@dataclass(frozen=True, slots=True)
class Point:
    """One process: the implementations measured at each retention, how often, and whether errors are computed."""

    vocab: int
    tokens: int
    rounds: int
    implementations: Mapping[float, tuple[str, ...]]  # by retention
    errors: bool = True


FULL = tuple(name for name in IMPLEMENTATIONS if name not in ("trl_kept_alone", "fused_grad_norm"))
SELECTED = ("floor", "fused", "fused_soft_or", "materialized", "trl", "trl_kept_alone")
FEW = ("floor", "fused", "trl")
FEW_SELECTED = ("floor", "fused", "fused_soft_or", "trl_kept_alone")
LARGE_VOCAB = ("floor", "fused", "fused_large", "fused_soft_or")
SLOW = ("materialized", "liger", "naive")
# The committed figure, about 10 minutes of CPU. TRL does the same work at every retention, so it runs at 1.0 only.
# Vocabulary 151,936 has no errors (float64 copies of the heads) and few rounds; points for memory growth run once.
FIGURE = (
    Point(
        32_768,
        512,
        5,
        {
            1.0: ("floor", "fused", "fused_small", "fused_scored", "trl", "trl_best"),
            0.5: FEW_SELECTED,
            0.2: FEW_SELECTED,
            0.1: FEW_SELECTED,
        },
    ),
    Point(151_936, 512, 5, {1.0: (*FEW, "fused_large"), 0.2: LARGE_VOCAB}, errors=False),
    Point(32_768, 512, 5, {1.0: SLOW, 0.5: ("materialized",), 0.1: ("materialized",)}),
    Point(151_936, 512, 1, {1.0: ("fused_small", "trl_best", *SLOW)}, errors=False),
    Point(
        151_936,
        1024,
        2,
        {1.0: (*FEW, "fused_large"), 0.5: LARGE_VOCAB, 0.2: LARGE_VOCAB, 0.1: LARGE_VOCAB},
        errors=False,
    ),
    Point(151_936, 1024, 1, {1.0: ("materialized",)}, errors=False),
    Point(32_768, 1024, 5, {1.0: (*FEW, "trl_best"), 0.5: FEW_SELECTED, 0.2: FEW_SELECTED, 0.1: FEW_SELECTED}),
    Point(32_768, 2048, 1, {1.0: ("fused", "trl"), 0.2: ("fused",)}, errors=False),
    # The paper's memory curve, at a size where the kept tensors outweigh the freed pages that a process retains.
    Point(32_768, 4096, 1, {r: ("materialized",) for r in (1.0, 0.5, 0.1)}),
    Point(32_768, 8192, 1, {1.0: ("fused",), 0.2: ("fused",)}, errors=False),
)
QUICK = (Point(4096, 256, 5, {1.0: FULL, 0.2: SELECTED}),)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="one small point, under a minute")
    parser.add_argument(
        "--points", type=int, nargs="+", choices=range(len(FIGURE)), metavar="I", help="these points of the figure only"
    )
    parser.add_argument("--vocab", type=int, nargs="+", help="with --tokens: these sizes only; other rows stay")
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--retention", type=float, nargs="+", default=[1.0, 0.5, 0.2, 0.1], help="with --vocab")
    parser.add_argument("--rounds", type=int, help="repetitions; default: the figure's, or 5")
    parser.add_argument("--implementations", nargs="+", choices=sorted(IMPLEMENTATIONS), metavar="NAME")
    parser.add_argument("--hidden", type=int, default=512, help="width of the student's hidden states")
    parser.add_argument("--teacher-hidden", type=int, default=512)
    parser.add_argument("--tile-mib", type=int, default=64, help="learner.tile_mib")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/bench/loss.csv"))


def main(arguments: argparse.Namespace) -> None:
    points = [drop_missing(point, arguments.implementations) for point in select_points(arguments)]
    measured = {
        (str(point.vocab), str(point.tokens), name, str(retention))
        for point in points
        for retention, names in point.implementations.items()
        for name in names
    }
    old_rows = [] if arguments.vocab is None and arguments.points is None else measuring.read_csv(arguments.out)
    rows = [
        row
        for row in old_rows
        if (row["vocab"], row["tokens"], row["implementation"], row["retention"]) not in measured
    ]
    sizes = arguments.hidden, arguments.teacher_hidden, arguments.tile_mib
    for point in points:
        rows += measuring.in_child(measure_point, point, *sizes, threads=arguments.threads)
        measuring.write_csv(rows, arguments.out)  # after each point, since the next may run out of memory
    print(f"{len(rows)} rows in {arguments.out}")
    if svg_file := plotting.plot_loss(arguments.out):
        print(f"plot in {svg_file}")


def select_points(arguments: argparse.Namespace) -> list[Point]:
    if (arguments.vocab is None) != (arguments.tokens is None):
        raise SystemExit("--vocab and --tokens must be given together, or neither for the committed figure")
    if arguments.quick:
        return list(QUICK)
    if arguments.vocab is None:
        points = FIGURE if arguments.points is None else [FIGURE[i] for i in arguments.points]
        return [replace(point, rounds=arguments.rounds or point.rounds) for point in points]
    if invalid := [r for r in arguments.retention if not 0 < r <= 1]:
        raise SystemExit(f"--retention {invalid[0]}: must be above 0 and at most 1")
    names = {retention: FULL if retention == 1 else SELECTED for retention in arguments.retention}
    return [Point(vocab, n, arguments.rounds or 5, names) for vocab in arguments.vocab for n in arguments.tokens]


def drop_missing(point: Point, requested: list[str] | None) -> Point:
    """The point without implementations whose library is not installed; an error if one was requested by name."""
    names_at = dict(point.implementations) if requested is None else dict.fromkeys(point.implementations, requested)
    required = sorted({REQUIRES[name] for names in names_at.values() for name in names if name in REQUIRES})
    if absent := measuring.missing(required):
        if requested is not None:
            raise SystemExit(f"--implementations: {', '.join(absent)} is not installed; {measuring.INSTALL}")
        measuring.warn_missing(absent, "its rows are left out")
    available = {r: tuple(n for n in names if REQUIRES.get(n) not in absent) for r, names in names_at.items()}
    return replace(point, implementations=available)


def measure_point(point: Point, hidden: int, teacher_hidden: int, tile_mib: int) -> list[measuring.Row]:
    """Rows of one point."""
    full_case = make_case(point.tokens, point.vocab, hidden, teacher_hidden, tile_mib * MIB)
    cases = {r: replace(full_case, kept_mask=random_mask(point.tokens, r)) for r in point.implementations}
    head_grad_mib = full_case.student_weight.nbytes / MIB
    errors: dict[tuple[str, float], float] = {}
    if point.errors or point.rounds > 1:  # untimed: loads the libraries and computes the errors
        for retention, case in cases.items():
            has_errors = point.errors and not NO_GRADIENT.issuperset(point.implementations[retention])
            exact = exact_gradients(case) if has_errors else None
            for name in point.implementations[retention]:
                case.student_weight.grad = None
                computed = IMPLEMENTATIONS[name](case)
                if exact is not None and name not in NO_GRADIENT:
                    errors[name, retention] = relative_error(computed, exact)
                del computed
    rows: list[measuring.Row] = []
    for _ in range(point.rounds):
        for retention, case in cases.items():
            for name in point.implementations[retention]:
                case.student_weight.grad = None
                cost, _ = measuring.cost_of(lambda name=name, case=case: IMPLEMENTATIONS[name](case))
                error = errors.get((name, retention))
                row: measuring.Row = {
                    "implementation": name,
                    "tokens": point.tokens,
                    "vocab": point.vocab,
                    "retention": retention,
                    "peak_extra_mib": round(max(0.0, cost.peak_extra_mib - head_grad_mib), 1),
                    "cpu_s": round(cost.cpu_s, 4),
                    "wall_s": round(cost.wall_s, 4),
                    "grad_rel_err": None if error is None else f"{error:.2e}",
                }
                measuring.print_row(row)
                rows.append(row)
    return rows
