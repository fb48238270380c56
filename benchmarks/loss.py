"""`tip-bench loss`: the masked update alone, ours against every peer and against its matrix products.

Every point (vocabulary, tokens) has a process of its own, in which the implementations take turns, `rounds` times, so
that a busy machine is unfair to none; compare CPU seconds of one point. One row a run. Memory is what was resident at
the peak above the weights, less one gradient of the head. TRL and Liger project every token on a CPU whatever is kept,
so `trl_kept_alone` shows what TRL's function can do if a selector passes it the kept rows after a pass for the scores.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks import measuring, plotting
from benchmarks.implementations import IMPLEMENTATIONS, NEEDS, exact, keep, make_case, relative_error
from tip_exp.utils.units import MIB

COLUMNS = (
    "implementation",
    "tokens",
    "vocab",
    "retention",
    "peak_extra_mib",
    "cpu_s",
    "wall_s",
    "grad_rel_err",
)
OURS = ("floor", "fused", "fused_scored", "fused_soft_or", "materialized")


@dataclass(frozen=True, slots=True)
class Point:
    """One process: which implementations take turns at each retention, how often, and whether errors are measured."""

    vocab: int
    tokens: int
    rounds: int
    at: Mapping[float, tuple[str, ...]]
    errors: bool = True


EVERY = tuple(name for name in IMPLEMENTATIONS if name != "trl_kept_alone")
SELECTED = ("floor", "fused", "fused_soft_or", "materialized", "trl", "trl_kept_alone")
FEW = ("floor", "fused", "trl")
PARTS = ("floor", "fused", "fused_soft_or", "trl_kept_alone")
LARGE = ("floor", "fused", "fused_large", "fused_soft_or")
SLOW = ("materialized", "liger", "naive")
# The committed figure, some 10 minutes of CPU. TRL's work on a CPU is the same at every retention, so its rows at 1.0
# serve for all. At 152k the head's float64 copies rule out errors, and seconds many runs; what only shows how memory
# grows runs once.
FIGURE = (
    Point(
        32_768,
        512,
        5,
        {1.0: ("floor", "fused", "fused_small", "fused_scored", "trl", "trl_best"), 0.5: PARTS, 0.2: PARTS, 0.1: PARTS},
    ),
    Point(151_936, 512, 5, {1.0: (*FEW, "fused_large"), 0.2: LARGE}, errors=False),
    Point(32_768, 512, 5, {1.0: SLOW, 0.5: ("materialized",), 0.1: ("materialized",)}),
    Point(151_936, 512, 1, {1.0: ("fused_small", "trl_best", *SLOW)}, errors=False),
    Point(151_936, 1024, 2, {1.0: (*FEW, "fused_large"), 0.5: LARGE, 0.2: LARGE, 0.1: LARGE}, errors=False),
    Point(151_936, 1024, 1, {1.0: ("materialized",)}, errors=False),
    Point(32_768, 1024, 5, {1.0: (*FEW, "trl_best"), 0.5: PARTS, 0.2: PARTS, 0.1: PARTS}),
    Point(32_768, 2048, 1, {1.0: ("fused", "trl"), 0.2: ("fused",)}, errors=False),
    # The paper's curve, where a tenth of the tokens is still large beside what a process keeps of freed small tensors.
    Point(32_768, 4096, 1, {r: ("materialized",) for r in (1.0, 0.5, 0.1)}),
    Point(32_768, 8192, 1, {1.0: ("fused",), 0.2: ("fused",)}, errors=False),
)
QUICK = (Point(4096, 256, 5, {1.0: EVERY, 0.2: SELECTED}),)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="one small point, well under a minute")
    parser.add_argument(
        "--points", type=int, nargs="+", choices=range(len(FIGURE)), metavar="I", help="these points of the figure anew"
    )
    parser.add_argument(
        "--vocab", type=int, nargs="+", help="with --tokens: measure these sizes anew, keep the rest of the file"
    )
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--retention", type=float, nargs="+", default=[1.0, 0.5, 0.2, 0.1])
    parser.add_argument("--rounds", type=int, help="turns of each implementation; default 5, and what the figure says")
    parser.add_argument("--implementations", nargs="+", choices=sorted(IMPLEMENTATIONS), metavar="NAME")
    parser.add_argument("--hidden", type=int, default=512, help="width of the student's hidden states")
    parser.add_argument("--teacher-hidden", type=int, default=512)
    parser.add_argument("--tile-mib", type=int, default=64, help="ours: learner.tile_mib")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/bench/loss.csv"))


def main(arguments: argparse.Namespace) -> None:
    points = [available(point, arguments.implementations) for point in chosen(arguments)]
    anew = {(str(p.vocab), str(p.tokens), name, str(r)) for p in points for r, names in p.at.items() for name in names}
    kept = [] if arguments.vocab is None and arguments.points is None else measuring.read_csv(arguments.out)
    rows = [r for r in kept if (r["vocab"], r["tokens"], r["implementation"], r["retention"]) not in anew]
    for point in points:
        rows += measuring.in_child(
            measure,
            point,
            arguments.hidden,
            arguments.teacher_hidden,
            arguments.tile_mib,
            arguments.threads,
            threads=arguments.threads,
        )
        measuring.write_csv(rows, COLUMNS, arguments.out)  # after each point: the next may not fit
    print(f"{len(rows)} rows in {arguments.out}")
    if figure := plotting.loss(arguments.out):
        print(f"plot in {figure}")


def chosen(arguments: argparse.Namespace) -> list[Point]:
    if (arguments.vocab is None) != (arguments.tokens is None):
        raise SystemExit("--vocab and --tokens belong together; without both the committed figure is measured")
    if arguments.quick:
        return list(QUICK)
    if arguments.vocab is None:
        points = FIGURE if arguments.points is None else [FIGURE[i] for i in arguments.points]
        return [replace(point, rounds=arguments.rounds or point.rounds) for point in points]
    if wrong := [r for r in arguments.retention if not 0 < r <= 1]:
        raise SystemExit(f"--retention {wrong[0]}: a share of the tokens, above 0 and at most 1")
    at = {r: EVERY if r == 1 else SELECTED for r in arguments.retention}
    return [Point(vocab, tokens, arguments.rounds or 5, at) for vocab in arguments.vocab for tokens in arguments.tokens]


def available(point: Point, named: list[str] | None) -> Point:
    """Less the peers that are not installed; an error if one was asked for by name."""
    at = point.at if named is None else {retention: tuple(named) for retention in point.at}
    libraries = sorted({NEEDS[name] for names in at.values() for name in names if name in NEEDS})
    if absent := measuring.missing(libraries):
        if named is not None:
            raise SystemExit(f"--implementations: {', '.join(absent)} is not installed; {measuring.INSTALL}")
        measuring.tell_missing(absent, "its rows are left out")
    kept = {r: tuple(name for name in names if NEEDS.get(name) not in absent) for r, names in at.items()}
    return replace(point, at=kept)


def measure(point: Point, hidden: int, teacher_hidden: int, tile_mib: int, threads: int) -> list[dict[str, object]]:
    """Rows of one point."""
    torch.set_num_threads(threads)
    case = make_case(point.tokens, point.vocab, hidden, teacher_hidden, tile_mib * MIB)
    cases = {retention: replace(case, kept=keep(point.tokens, retention)) for retention in point.at}
    gradient_mib = case.weight.nbytes / MIB
    rows: list[dict[str, object]] = []
    errors: dict[tuple[str, float], float | None] = {}
    for retention, one in cases.items():  # not timed: libraries load and errors are found
        truth = exact(one) if point.errors else None
        for name in point.at[retention]:
            if truth is None and point.rounds == 1:
                continue
            case.weight.grad = None
            found = IMPLEMENTATIONS[name](one)
            if truth is not None and name != "floor":
                errors[name, retention] = relative_error(found, truth)
            del found
    for _ in range(point.rounds):
        for retention, one in cases.items():
            for name in point.at[retention]:
                case.weight.grad = None
                cost, _ = measuring.cost_of(lambda name=name, one=one: IMPLEMENTATIONS[name](one))
                error = errors.get((name, retention))
                values = (
                    name,
                    point.tokens,
                    point.vocab,
                    retention,
                    round(max(0.0, cost.peak_extra_mib - gradient_mib), 1),
                    round(cost.cpu_s, 4),
                    round(cost.wall_s, 4),
                    None if error is None else f"{error:.2e}",
                )
                rows.append(dict(zip(COLUMNS, values, strict=True)))
                print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    return rows
