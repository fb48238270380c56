"""Mutation test of what decides the numbers: change one expression of src/, see the tests of its package fail.

    python -m scripts.mutants --count 20 --seed 0 --out mutants.md

`--count` mutants of each package are drawn at random. Each meets the quick tests of its package, those of its module
first, up to the first failure: in a fork of a process that has collected the tests, where the changed function gets its
new code. Those that pass meet the slow test files in processes of their own, with a copy of src/ that has the changed
file; so do, with all tests, changes outside of functions. One that passes all of them survives. Linux only.
"""

from __future__ import annotations

import argparse
import ast
import copy
import gc
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGES = {  # package -> its tests
    "selector": ["tests/selector"],
    "eval": ["tests/eval"],
    "losses": ["tests/losses"],
    "learner": ["tests/learner", "tests/utils", "tests/test_run.py"],
}
SLOW = {"test_checkpoint.py", "test_custom_rules.py", "test_distributed.py", "test_run.py"}  # processes, trainings
FAST = "not slow and not gpu and not data and not vllm"
EXCLUDED = {
    "checkpoint.py", "samples.py",  # they decide no number of a run
    "kernels.py", "gradient_kernel.py",  # Triton: their tests, tests/cuda, are skipped where it is not installed
}  # fmt: skip
SWAPS: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Pow: ast.Mult,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.And: ast.Or, ast.Or: ast.And, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
PASSED, KILLED, UNPATCHED, FAULT = 0, 1, 2, 99
VERDICTS = {PASSED: "passes", KILLED: "killed", UNPATCHED: "outside", FAULT: "fault"}
LOG = os.dup(1)  # forks drop their output
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
    parser.add_argument("--related", action="store_true", help="only quick test files that import the changed module")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    rows: list[str] = []
    survivors: list[str] = []
    for package in arguments.packages:
        sites = list(mutants(package))
        rng = random.Random(f"{arguments.seed} {package}")  # the same mutants whichever packages are chosen
        chosen = rng.sample(sites, min(arguments.count, len(sites)))
        chosen = [m for m in chosen if not arguments.only or f"{m.path}:{m.line}" in arguments.only]
        quick, slow = ([file for file in test_files(package) if (file.name in SLOW) == s] for s in (False, True))
        verdicts = quick_verdicts(chosen, quick, related=arguments.related)
        remaining = [mutant for mutant, verdict in zip(chosen, verdicts, strict=True) if verdict != KILLED]
        unpatched = [mutant for mutant, verdict in zip(chosen, verdicts, strict=True) if verdict == UNPATCHED]
        if not arguments.related:
            remaining = [m for m in remaining if m not in unpatched or copied_passes(m, quick)]
            remaining = [m for m in remaining if not slow or copied_passes(m, slow)]
        survivors += [f"- {_description(mutant)}" for mutant in remaining]
        rows.append(f"| {package} | {len(sites)} | {len(chosen)} | {len(remaining)} |")
    command = f"python -m scripts.mutants --count {arguments.count} --seed {arguments.seed}"
    lines = ["# Mutation test", "", f"`{command}`: one expression changed at a time; killed if a fast test fails.", ""]
    lines += ["| package | possible mutants | tried | survived |", "|:--|--:|--:|--:|", *rows, ""]
    lines += ["Survivors:", "", *survivors] if survivors else ["No mutant survived."]
    arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_files(package: str) -> list[Path]:
    paths = [ROOT / path for path in PACKAGES[package]]
    return [file for path in paths for file in (sorted(path.glob("test_*.py")) if path.is_dir() else [path])]


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


def mutate(mutant: Mutant) -> tuple[str, str, ast.Module]:
    """The expression before and after, and the changed file."""
    tree = ast.parse((ROOT / "src" / "tip_exp" / mutant.path).read_text(encoding="utf-8"))
    node = list(ast.walk(tree))[mutant.index]
    before = ast.unparse(node)
    changed = _changed(node)
    assert changed is not None, "mutants() yields nodes that can be changed"
    return before, ast.unparse(changed), tree


def quick_verdicts(chosen: list[Mutant], files: list[Path], *, related: bool) -> list[int]:
    """PASSED, KILLED or UNPATCHED for each mutant, by forks of one process that has collected the tests of `files`."""
    with tempfile.NamedTemporaryFile("r") as results:

        def collect_and_run() -> int:
            import pytest

            class Loop:
                def pytest_runtestloop(self, session: pytest.Session) -> bool:
                    verdicts: list[int] = []
                    for mutant in chosen:
                        verdict = _forked(lambda mutant=mutant: _run(session, mutant, related=related))
                        verdicts.append(verdict if verdict in VERDICTS else KILLED)  # a signal: it takes too long
                        _report(VERDICTS[verdicts[-1]], mutant)
                    if PASSED not in verdicts:  # do the tests themselves fail?
                        verdicts += [FAULT] * (_forked(lambda: _run(session, None)) != PASSED)
                    Path(results.name).write_text(" ".join(map(str, verdicts)))
                    return True

            return int(pytest.main(["-q", "-s", "-p", "no:cacheprovider", "-m", FAST, *map(str, files)], [Loop()]))

        _forked(collect_and_run, limited=False)
        verdicts = [int(verdict) for verdict in results.read().split()]
    assert len(verdicts) == len(chosen) and FAULT not in verdicts, f"see the log; do {chosen[0].package}'s tests pass?"
    return verdicts


def _run(session: Any, mutant: Mutant | None, *, related: bool = False) -> int:
    """Run the collected tests with a mutant, or without; those of its module, or that import it, come first."""
    if mutant and not patch(mutant):
        return UNPATCHED
    items, package, stem = session.items, mutant and mutant.package, mutant and mutant.path.stem
    if mutant:
        imports = re.compile(rf"from tip_exp\.{package}(\.\w+)* import [^)]*\b{stem}\b|tip_exp\.{package}\.{stem}\b")
        paths = {item.path for item in items}
        importing = {path for path in paths if imports.search(path.read_text(encoding="utf-8"))}
        items = [item for item in items if item.path in importing or not related]
        items.sort(key=lambda item: (item.path.stem != f"test_{stem}", item.path not in importing))
    for item, following in zip(items, [*items[1:], None], strict=False):
        session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.testsfailed:
            return KILLED
    return PASSED


def patch(mutant: Mutant) -> bool:
    """Give the changed function its new code in this process; False if the change is not in a function's body."""
    file, tree = ROOT / "src" / "tip_exp" / mutant.path, mutate(mutant)[2]
    node, codes = list(ast.walk(tree))[mutant.index], {}
    functions = [part for part in ast.walk(tree) if isinstance(part, ast.FunctionDef)]
    if not any(node is part for function in functions for line in function.body for part in ast.walk(line)):
        return False
    pending = [compile(tree, str(file), "exec")]
    for code in pending:
        codes[code.co_qualname] = code
        pending += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    gc.unfreeze()
    for function in gc.get_objects():
        if type(function) is FunctionType and function.__code__.co_filename == str(file):
            code = codes.get(function.__code__.co_qualname)
            if code and code.co_freevars == function.__code__.co_freevars:
                function.__code__ = code
    return True


def copied_passes(mutant: Mutant, files: list[Path]) -> bool:
    """Whether the fast tests of `files` pass with a copy of src/ that has the changed file."""
    with tempfile.TemporaryDirectory() as scratch:
        for folder in ("src", "conf", "sweeps"):  # with compiled files: Python knows the changed one by its time
            shutil.copytree(ROOT / folder, Path(scratch) / folder)
        source = ast.unparse(mutate(mutant)[2])
        (Path(scratch) / "src" / "tip_exp" / mutant.path).write_text(source, encoding="utf-8")

        def run() -> int:
            path = {"PYTHONPATH": str(Path(scratch) / "src")}
            command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", FAST]
            ordered = sorted(files, key=lambda file: file.stem != f"test_{mutant.path.stem}")
            return subprocess.run([*command, *map(str, ordered)], env=os.environ | path).returncode

        verdict = _forked(run)
    _report("passes" if verdict == PASSED else "killed", mutant)
    return verdict == PASSED


def _forked(run: Callable[[], int], *, limited: bool = True) -> int:
    """The exit code of `run` in a fork without output; it and the processes that it leaves are ended."""
    child = os.fork()
    if child == 0:
        os.setpgrp()
        if limited:
            signal.alarm(WALL_S)
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        try:
            os._exit(run())
        except BaseException:
            os.write(LOG, traceback.format_exc().encode())
            os._exit(FAULT)
    _, status = os.waitpid(child, 0)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(status)


def _report(verdict: str, mutant: Mutant) -> None:
    os.write(LOG, f"{verdict:<9} {_description(mutant)}\n".encode())


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
