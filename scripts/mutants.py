"""Mutation test of what decides the numbers: change one expression of src/, see the tests of its package fail.

    python -m scripts.mutants --count 20 --seed 0 --out mutants.md

`--count` mutants of each package are drawn at random. The quick tests of the package run against each, those of its
module first, up to the first failure: in a fork of a process that has collected the tests, where the changed function
is patched. Against mutants that pass, the slow test files run in new processes, with a copy of src/ that has the
changed file; against changes outside of functions, all tests run so. A mutant that passes all survives. Linux only.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from scripts.mutation import ROOT, Mutant, description, mutants, mutate, patch

PACKAGES = {  # package -> its tests
    "selector": ["tests/selector"],
    "eval": ["tests/eval"],
    "losses": ["tests/losses"],
    "learner": ["tests/learner", "tests/utils", "tests/test_run.py"],
}
SLOW = {"test_checkpoint.py", "test_custom_rules.py", "test_distributed.py", "test_run.py"}  # processes, trainings
FAST = "not slow and not gpu and not data and not vllm"
PASSED, KILLED, UNPATCHED, FAULT = 0, 1, 2, 99
VERDICTS = {PASSED: "passes", KILLED: "killed", UNPATCHED: "outside", FAULT: "fault"}
LOG = os.dup(1)  # forks drop their output
CPU_S, WALL_S = 900, 3600  # of one mutant's tests; one that takes longer counts as killed


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
        survivors += [f"- {description(mutant)}" for mutant in remaining]
        rows.append(f"| {package} | {len(sites)} | {len(chosen)} | {len(remaining)} |")
    command = shlex.join(["python", "-m", "scripts.mutants", *sys.argv[1:]])
    lines = ["# Mutation test", "", f"`{command}`: one expression changed at a time; killed if a fast test fails.", ""]
    lines += ["| package | possible mutants | tried | survived |", "|:--|--:|--:|--:|", *rows, ""]
    lines += ["Survivors:", "", *survivors] if survivors else ["No mutant survived."]
    arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_files(package: str) -> list[Path]:
    paths = [ROOT / path for path in PACKAGES[package]]
    return [file for path in paths for file in (sorted(path.glob("test_*.py")) if path.is_dir() else [path])]


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
        num_cases: Counter[Any] = Counter()
        case_of: dict[Any, int] = {}
        for item in items:  # one case of each test comes before its others
            case_of[item] = num_cases[item.function]
            num_cases[item.function] += 1
        items.sort(key=lambda i: (i.path.stem != f"test_{stem}", i.path not in importing, i.path, case_of[i]))
    for item, following in zip(items, [*items[1:], None], strict=False):
        session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.testsfailed:
            return KILLED
    return PASSED


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
    os.write(LOG, f"{verdict:<9} {description(mutant)}\n".encode())


if __name__ == "__main__":
    main()
