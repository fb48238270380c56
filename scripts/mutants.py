"""Mutation test of what decides the numbers: change one expression of src/, see the tests of its package fail.

    python -m scripts.mutants --count 20 --seed 0 --out results/mutants.md

`--count` mutants of each package are drawn at random. A mutant survives if the fast tests of its package pass; the
table lists each survivor. Linux only: each mutant runs in a fork of a process that has loaded torch.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = {  # package -> its tests, quickest first
    "selector": ["tests/selector"],
    "eval": ["tests/eval"],
    "losses": ["tests/losses"],
    "learner": ["tests/learner", "tests/utils", "tests/test_run.py"],
}
NOT_LEARNING = {"checkpoint.py", "samples.py"}  # files of learner/ that do not decide numbers of a run
SWAPS: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Pow: ast.Mult,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.And: ast.Or, ast.Or: ast.And, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
TIMEOUT_S = 900


@dataclass(frozen=True, slots=True)
class Mutant:
    """One changed node: `index` is its place among the nodes of the file's syntax tree."""

    package: str
    path: Path  # relative to src/tip_exp
    index: int
    line: int


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.mutants", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=20, help="mutants per package")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--packages", nargs="+", choices=list(PACKAGES), default=list(PACKAGES))
    parser.add_argument("--out", type=Path, default=Path("results/mutants.md"))
    arguments = parser.parse_args()
    _load_libraries()
    rows: list[str] = []
    survivors: list[str] = []
    for package in arguments.packages:
        sites = list(mutants(package))
        rng = random.Random(f"{arguments.seed} {package}")  # the same mutants whichever packages are chosen
        chosen = rng.sample(sites, min(arguments.count, len(sites)))
        unchanged = (ROOT / "src" / "tip_exp" / chosen[0].path).read_text(encoding="utf-8")
        if not tests_pass(chosen[0], unchanged):
            raise SystemExit(f"the tests of {package} fail without a mutant: {', '.join(PACKAGES[package])}")
        survived = 0
        for mutant in chosen:
            before, after, source = mutate(mutant)
            started = time.perf_counter()
            passes = tests_pass(mutant, source)
            survived += passes
            text = f"{mutant.path}:{mutant.line}  `{before}` → `{after}`"
            print(f"{'SURVIVED' if passes else 'killed':<9}{time.perf_counter() - started:5.0f} s  {text}", flush=True)
            if passes:
                survivors.append(f"- {text}")
        rows.append(f"| {package} | {len(sites)} | {len(chosen)} | {survived} |")
    command = f"python -m scripts.mutants --count {arguments.count} --seed {arguments.seed}"
    lines = ["# Mutation test", "", f"`{command}`: one expression changed at a time; killed if a fast test fails.", ""]
    lines += ["| package | possible mutants | tried | survived |", "|:--|--:|--:|--:|", *rows, ""]
    lines += ["Survivors:", "", *survivors] if survivors else ["No mutant survived."]
    arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def mutants(package: str) -> Iterator[Mutant]:
    """All mutants of a package's files."""
    for path in sorted((ROOT / "src" / "tip_exp" / package).glob("*.py")):
        if path.name not in NOT_LEARNING:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            ignored = {id(child) for node in ast.walk(tree) if _is_ignored(node) for child in ast.walk(node)}
            for index, node in enumerate(ast.walk(tree)):
                if id(node) not in ignored and _changed(copy.deepcopy(node)) is not None:
                    yield Mutant(package, path.relative_to(ROOT / "src" / "tip_exp"), index, getattr(node, "lineno", 0))


def mutate(mutant: Mutant) -> tuple[str, str, str]:
    """The expression before and after, and the source of the changed file."""
    tree = ast.parse((ROOT / "src" / "tip_exp" / mutant.path).read_text(encoding="utf-8"))
    node = list(ast.walk(tree))[mutant.index]
    before = ast.unparse(node)
    changed = _changed(node)
    assert changed is not None, "mutants() yields nodes that can be changed"
    return before, ast.unparse(changed), ast.unparse(tree)


def tests_pass(mutant: Mutant, source: str) -> bool:
    """Run the fast tests of the mutant's package in a fork, on a copy of src/ with the changed file."""
    with tempfile.TemporaryDirectory() as scratch:
        for folder in ("src", "conf", "sweeps"):
            shutil.copytree(ROOT / folder, Path(scratch) / folder, ignore=shutil.ignore_patterns("__pycache__"))
        (Path(scratch) / "src" / "tip_exp" / mutant.path).write_text(source, encoding="utf-8")
        child = os.fork()
        if child == 0:
            os.setpgrp()
            signal.alarm(TIMEOUT_S)
            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, 1)
            os.dup2(sink, 2)
            sys.path.insert(0, str(Path(scratch) / "src"))
            os.environ["PYTHONPATH"] = str(Path(scratch) / "src")
            import pytest

            fast = "not slow and not gpu and not data and not vllm"
            options = ["-x", "-q", "-p", "no:cacheprovider", "-m", fast]
            options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of libraries that are loaded already
            os._exit(int(pytest.main([*options, *PACKAGES[mutant.package]])))
        _, status = os.waitpid(child, 0)
        return status == 0


def _load_libraries() -> None:
    """What every fork needs, loaded once; tip_exp itself is loaded by each fork from its own copy."""
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    for name in ("hydra", "pydantic", "pytest", "transformers.models.qwen3.modeling_qwen3"):
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)


def _is_ignored(node: ast.AST) -> bool:
    """Annotations, messages, assertions, imports and zip's `strict` do not decide numbers."""
    if isinstance(node, ast.Assert | ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom | ast.arg):
        return True
    if isinstance(node, ast.keyword):
        return node.arg == "strict"
    return isinstance(node, ast.AnnAssign) and node.value is None


def _changed(node: ast.AST) -> ast.AST | None:
    """The node with another operator, constant or boolean, changed in place; None if it has none."""
    if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp) and type(node.op) in SWAPS:
        node.op = SWAPS[type(node.op)]()
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        node.ops[0] = SWAPS[type(node.ops[0])]()
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Invert | ast.Not):
        node.op = ast.UAdd()
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        node.value = not node.value
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        node.value = node.value + 1 if node.value in (0, 1) else node.value * 2
    else:
        return None
    return node


if __name__ == "__main__":
    main()
