"""Mutation test of what decides the numbers: change one expression of src/, see the tests of its package fail.

    python -m scripts.mutants --count 20 --seed 0 --out mutants.md

`--count` mutants of each package are drawn at random. All of them meet the test files that import their module; those
that pass meet the other quick files of their package, then the slow ones. One that passes all three survives. Linux
only: mutants run in forks of a process that has loaded torch.
"""

from __future__ import annotations

import argparse
import ast
import copy
import gc
import importlib
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = {  # package -> its tests
    "selector": ["tests/selector"],
    "eval": ["tests/eval"],
    "losses": ["tests/losses"],
    "learner": ["tests/learner", "tests/utils", "tests/test_run.py"],
}
SLOW = {"test_checkpoint.py", "test_distributed.py", "test_run.py"}  # several processes, or whole trainings
EXCLUDED = {
    "checkpoint.py", "samples.py",  # they decide no number of a run
    "kernels.py", "gradient_kernel.py",  # Triton: their tests, tests/cuda, are skipped where it is not installed
}  # fmt: skip
SWAPS: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Pow: ast.Mult,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.And: ast.Or, ast.Or: ast.And, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
CPU_S, WALL_S = 900, 3600  # of one mutant's tests; one that takes longer counts as killed


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
    parser.add_argument("--only", nargs="+", help="of the drawn mutants those of these lines, as learner/adamw.py:31")
    parser.add_argument("--no-baseline", action="store_true", help="do not run the tests without a mutant first")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    _import_libraries(["pytest", "transformers.models.qwen3.modeling_qwen3"])
    rows: list[str] = []
    survivors: list[str] = []
    for package in arguments.packages:
        sites = list(mutants(package))
        rng = random.Random(f"{arguments.seed} {package}")  # the same mutants whichever packages are chosen
        chosen = rng.sample(sites, min(arguments.count, len(sites)))
        chosen = [m for m in chosen if not arguments.only or f"{m.path}:{m.line}" in arguments.only]
        files = test_files(package)
        if not (arguments.no_baseline or tests_pass(files, chosen[0], _source(chosen[0]))):
            raise SystemExit(f"the tests of {package} fail without a mutant: {', '.join(PACKAGES[package])}")
        remaining = chosen
        for tier in ("import it", "others", "slow"):
            remaining = [mutant for mutant in remaining if _passes(mutant, tier, files)]
        survivors += [f"- {_description(mutant)}" for mutant in remaining]
        rows.append(f"| {package} | {len(sites)} | {len(chosen)} | {len(remaining)} |")
    command = f"python -m scripts.mutants --count {arguments.count} --seed {arguments.seed}"
    lines = ["# Mutation test", "", f"`{command}`: one expression changed at a time; killed if a fast test fails.", ""]
    lines += ["| package | possible mutants | tried | survived |", "|:--|--:|--:|--:|", *rows, ""]
    lines += ["Survivors:", "", *survivors] if survivors else ["No mutant survived."]
    arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _passes(mutant: Mutant, tier: str, files: list[Path]) -> bool:
    in_tier = [file for file in files if _tier(file, mutant) == tier]
    in_tier.sort(key=lambda file: file.stem != f"test_{mutant.path.stem}")
    if not in_tier:
        return True
    passes = tests_pass(in_tier, mutant, mutate(mutant)[2])
    print(f"{'passes' if passes else 'killed by':<9} {tier:<9} {_description(mutant)}", flush=True)
    return passes


def test_files(package: str) -> list[Path]:
    paths = [ROOT / path for path in PACKAGES[package]]
    return [file for path in paths for file in (sorted(path.glob("test_*.py")) if path.is_dir() else [path])]


def _tier(file: Path, mutant: Mutant) -> str:
    """Which of the three rounds a test file belongs to: the name is searched for in the file's imports."""
    if file.name in SLOW:
        return "slow"
    imports = rf"^\s*from tip_exp\.{mutant.package}\b.*\b{mutant.path.stem}\b"
    return "import it" if re.search(imports, file.read_text(encoding="utf-8"), re.M) else "others"


def _description(mutant: Mutant) -> str:
    before, after, _ = mutate(mutant)
    return f"{mutant.path}:{mutant.line}  `{before}` → `{after}`"


def mutants(package: str) -> Iterator[Mutant]:
    """All mutants of a package's files."""
    for path in sorted((ROOT / "src" / "tip_exp" / package).glob("*.py")):
        if path.name not in EXCLUDED:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            ignored = {id(child) for node in ast.walk(tree) for part in _ignored(node) for child in ast.walk(part)}
            for index, node in enumerate(ast.walk(tree)):
                if id(node) not in ignored and _changed(copy.deepcopy(node)) is not None:
                    yield Mutant(package, path.relative_to(ROOT / "src" / "tip_exp"), index, getattr(node, "lineno", 0))


def mutate(mutant: Mutant) -> tuple[str, str, str]:
    """The expression before and after, and the source of the changed file."""
    tree = ast.parse(_source(mutant))
    node = list(ast.walk(tree))[mutant.index]
    before = ast.unparse(node)
    changed = _changed(node)
    assert changed is not None, "mutants() yields nodes that can be changed"
    return before, ast.unparse(changed), ast.unparse(tree)


def _source(mutant: Mutant) -> str:
    return (ROOT / "src" / "tip_exp" / mutant.path).read_text(encoding="utf-8")


def tests_pass(files: list[Path], mutant: Mutant, source: str) -> bool:
    """Run the fast tests of `files` in a fork, up to the first failure, on a copy of src/ with the changed file."""
    with tempfile.TemporaryDirectory() as scratch:
        for folder in ("src", "conf", "sweeps"):  # with compiled files: Python knows the changed one by its time
            shutil.copytree(ROOT / folder, Path(scratch) / folder)
        (Path(scratch) / "src" / "tip_exp" / mutant.path).write_text(source, encoding="utf-8")
        child = os.fork()
        if child == 0:
            os.setpgrp()
            signal.alarm(WALL_S)
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, 1)
            os.dup2(sink, 2)
            sys.path.insert(0, str(Path(scratch) / "src"))
            os.environ["PYTHONPATH"] = str(Path(scratch) / "src")
            import pytest

            fast = "not slow and not gpu and not data and not vllm"
            options = ["-x", "-q", "-p", "no:cacheprovider", "-m", fast]
            options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of libraries that are loaded already
            failed = int(pytest.main([*options, *map(str, files)]))
            (Path(scratch) / "modules").write_text("\n".join(sys.modules))
            os._exit(failed)
        _, status = os.waitpid(child, 0)
        if (modules := Path(scratch) / "modules").exists():
            _import_libraries(modules.read_text().split())
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # ranks that it has left
        return status == 0


def _import_libraries(names: Iterable[str]) -> None:
    """What forks need, loaded once; tip_exp itself and the tests are loaded by each fork, from its own copy."""
    for name in names:
        if name.partition(".")[0] not in {"tip_exp", "hydra_plugins", "tests", "conftest", "benchmarks", "scripts"}:
            with suppress(Exception):
                importlib.import_module(name)
    gc.freeze()  # collections in the forks leave it out


def _ignored(node: ast.AST) -> list[ast.AST]:
    """Parts that decide no number: annotations, decorators, messages, assertions, imports and zip's `strict`."""
    if isinstance(node, ast.FunctionDef):
        return [*node.decorator_list, *([node.returns] if node.returns else [])]
    if isinstance(node, ast.ClassDef):
        return [*node.decorator_list]
    if isinstance(node, ast.AnnAssign):
        return [node.annotation]
    is_strict = isinstance(node, ast.keyword) and node.arg == "strict"
    others = ast.Assert | ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom | ast.arg
    return [node] if is_strict or isinstance(node, others) else []


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
