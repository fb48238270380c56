"""Runs of a sweep side by side: how many, what is printed, failures and interrupts. The runs are stubs."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import pty
import re
import signal
import termios
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests import synthetic_runs
from tests.synthetic_runs import append_rows

from hydra_plugins.tip_exp_sweeper import check_jobs
from tip_exp.config.schema import RunConfig
from tip_exp.estimate.memory import RankMemory
from tip_exp.launch import parallel
from tip_exp.launch.launch import Background
from tip_exp.launch.lock import lock_or_holder
from tip_exp.launch.parallel import choose_jobs, run_all
from tip_exp.launch.sweep import SweepRun
from tip_exp.records.folder import RunFolder
from tip_exp.utils.errors import BAD_CONFIG, FAILED, ConfigError, RunFailedError, exit_code

Launch = Callable[[RunConfig, RunFolder, Background | None], str]
SELECTORS = {"full": 0.8, "q3": 0.7, "soft_or": 0.6}  # and the accuracy that the stub reaches


@pytest.fixture
def runs(tmp_path: Path, compose_run: Callable[..., RunConfig]) -> list[SweepRun]:
    overrides = [[f"selector={selector}"] for selector in SELECTORS]
    return [SweepRun(chosen, compose_run(*chosen), RunFolder(tmp_path / chosen[0])) for chosen in overrides]


def finish(config: RunConfig, folder: RunFolder, background: Background | None) -> str:
    synthetic_runs.write_config(config, folder.root)
    synthetic_runs.finish(config, folder.root, SELECTORS[config.selector.label])
    return ""


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Launch], None]:
    return lambda launch: monkeypatch.setattr(parallel, "launch", launch)


def machine(monkeypatch: pytest.MonkeyPatch, *, cores: int, free_gib: float | None, gpus: list[str]) -> None:
    monkeypatch.setattr(parallel.os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(parallel, "free_host_gib", lambda: free_gib)
    monkeypatch.setattr(parallel, "visible_gpus", lambda environment: gpus)


def test_runs_at_a_time_share_the_gpus(
    tmp_path: Path, compose_run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    machine(monkeypatch, cores=64, free_gib=1000.0, gpus=list("01234567"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")

    def jobs(*overrides: str, requested: int | None = None) -> int:
        return choose_jobs(20 * [compose_run(*overrides)], requested)

    assert jobs() == 1  # ranks=auto: each run takes all 8
    assert (jobs("ranks=1"), jobs("ranks=2"), jobs("ranks=3")) == (8, 4, 2)  # 8 // 3 = 2
    assert (jobs("ranks=2", requested=3), jobs("ranks=2", requested=9)) == (3, 4)
    assert jobs("ranks=4", "nodes=2", requested=2) == 1  # all nodes do the same run
    assert jobs("device=cpu") > 8  # no GPU is used
    large = "experiment=tip_qwen3", "ranks=2"  # 2 x 33 GiB of the host at the end of a step
    machine(monkeypatch, cores=64, free_gib=200.0, gpus=list("01234567"))
    assert (jobs(*large), jobs(*large, requested=4), jobs("ranks=2")) == (3, 4, 4)
    machine(monkeypatch, cores=6, free_gib=1000.0, gpus=[])
    assert jobs("device=cpu", "ranks=2") == 3


def test_jobs_are_limited_by_cores_memory_and_gpus(
    tmp_path: Path, compose_run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    configs = [compose_run(f"seed={seed}") for seed in range(8)]
    each = RankMemory(configs[0], None).peak()[1]
    machine(monkeypatch, cores=4, free_gib=100 * each, gpus=[])
    assert choose_jobs(configs, None) == 4
    assert choose_jobs(configs[:3], None) == 3
    assert choose_jobs(configs, 1) == 1 and choose_jobs(configs, 6) == 6  # what the user asks for is not limited
    machine(monkeypatch, cores=4, free_gib=2.5 * each, gpus=[])
    assert choose_jobs(configs, None) == 2
    machine(monkeypatch, cores=4, free_gib=0.5 * each, gpus=[])
    assert choose_jobs(configs, None) == 1
    machine(monkeypatch, cores=4, free_gib=None, gpus=[])
    assert choose_jobs(configs, None) == 4
    machine(monkeypatch, cores=4, free_gib=100 * each, gpus=["0"])
    assert choose_jobs(configs, None) == 1


@pytest.mark.parametrize("jobs", [1, 2, 3])
def test_as_many_runs_as_jobs_work_at_once(runs: list[SweepRun], stub: Callable[[Launch], None], jobs: int) -> None:
    working, most, changed = 0, 0, threading.Condition()

    def launch(config: RunConfig, folder: RunFolder, background: Background | None) -> str:
        nonlocal working, most
        assert (background is None) == (jobs == 1)
        with changed:
            working, most = working + 1, max(most, working + 1)
            changed.notify_all()
            changed.wait_for(lambda: most >= jobs, timeout=20)
        result = finish(config, folder, background)
        with changed:
            working -= 1
        return result

    stub(launch)
    run_all(runs, jobs)
    assert most == jobs
    assert all(run.folder.result.exists() for run in runs)


def test_a_line_per_started_and_per_finished_run(
    runs: list[SweepRun], stub: Callable[[Launch], None], capsys: pytest.CaptureFixture[str]
) -> None:
    stub(finish)
    run_all(runs, 2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"3 runs, 2 at a time; logs in {runs[0].folder.root.parent}/*/worker.log"
    assert "word_sums/mean@4" in lines[1]
    started = [line for line in lines if " started, " in line]
    assert sorted(line.split() for line in started) == [
        f"{run.config.name} started, run {n} of 3".split() for n, run in enumerate(runs, 1)
    ]
    finished = [line for line in lines if re.match(r" +\d of 3 ", line)]
    assert [line.split()[:3] for line in finished] == [[str(n), "of", "3"] for n in (1, 2, 3)]
    (full,) = [line for line in finished if f" {runs[0].config.name} " in line]
    assert "35.0 % -> 80.0 %" in full and full.endswith("42 s")  # synthetic_runs: starts at 0.35, takes 41.6 s


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize(
    ("error", "code"), [(RunFailedError("no weights"), FAILED), (ConfigError("another config"), BAD_CONFIG)]
)
def test_a_failed_run_does_not_stop_the_others(
    runs: list[SweepRun],
    stub: Callable[[Launch], None],
    capsys: pytest.CaptureFixture[str],
    jobs: int,
    error: Exception,
    code: int,
) -> None:
    def launch(config: RunConfig, folder: RunFolder, background: Background | None) -> str:
        if config.selector.label == "full":
            raise error
        return finish(config, folder, background)

    stub(launch)
    with pytest.raises(type(error), match="1 of 3 runs failed; the same command runs them again") as caught:
        run_all(runs, jobs)
    assert exit_code(caught.value) == code
    assert [run.folder.result.exists() for run in runs] == [False, True, True]
    printed = capsys.readouterr()
    assert printed.err == f"error: {error}\n"
    assert re.search(r"of 3 +tiny\.word_sums\.full\.r100\.s0 +failed\n", printed.out)


def screen(written: str) -> list[str]:
    """The lines of a terminal that knows \\n, "n lines up" and "erase what is below"."""
    lines = [""]
    for count, erase, text, end in re.findall(r"\x1b\[(\d+)F|(\x1b\[J)|([^\x1b\n]+)|(\n)", written):
        if count:
            row = len(lines) - 1 - int(count)
            assert row >= 0 and lines[-1] == ""
            below = lines[row:]
        elif erase:
            lines = [*lines[: len(lines) - len(below)], ""]
        elif text:
            lines[-1] += text
        elif end:
            lines.append("")
    return lines


def test_a_terminal_shows_the_table_of_the_runs_at_work(
    runs: list[SweepRun], stub: Callable[[Launch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a pseudo-terminal: the first frame, a later one with a step, and no remains of them at the end."""
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (40, 200))
    written, changed = "", threading.Condition()

    def read() -> None:
        nonlocal written
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            while chunk := os.read(leader, 1000):
                with changed:
                    written += chunk.decode().replace("\r\n", "\n")
                    changed.notify_all()

    def launch(config: RunConfig, folder: RunFolder, background: Background | None) -> str:
        if config.selector.label == "full":
            synthetic_runs.write_config(config, folder.root)
            with changed, lock_or_holder(folder.lock):
                append_rows(folder.metrics, [{"step": 7, "train/loss": 0.25, "rollout/tokens_per_s": 1234.4}])
                assert changed.wait_for(lambda: re.search(r"running +7 of 40 +0.25 +1,234", written), timeout=20)
            raise RunFailedError("no weights")
        return finish(config, folder, background)

    stub(launch)
    monkeypatch.setattr(parallel, "EVERY_S", 0.05)
    monkeypatch.setattr("sys.stderr", terminal := os.fdopen(follower, "w"))
    monkeypatch.setattr("sys.stdout", terminal)
    reader = threading.Thread(target=read)
    reader.start()
    with pytest.raises(RunFailedError):
        run_all(runs, 2)
    terminal.close()
    reader.join(timeout=20)
    os.close(leader)
    assert "run           " in written and "\n2 of 3 finished\n" in written
    shown = [line for line in screen(written) if line]
    assert [line.split()[:3] for line in shown if re.match(r" +\d of 3 ", line)] == [[n, "of", "3"] for n in "123"]
    assert shown[0].startswith("3 runs, 2 at a time") and shown[-1].startswith("next: tip-report")
    assert sum(" started, run " in line for line in shown) == 3 and "error: no weights" in shown
    assert len(shown) == 1 + 1 + 3 + 3 + 1 + 1, "title, headings, started, finished, the error, next: nothing else"


def test_an_interrupt_stops_running_runs_and_starts_no_other(
    runs: list[SweepRun],
    stub: Callable[[Launch], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    all_submitted, stopped = threading.Event(), []

    def interrupt() -> None:
        assert all_submitted.wait(timeout=20)
        os.kill(os.getpid(), signal.SIGINT)

    both_started = threading.Barrier(2, action=interrupt)

    def launch(config: RunConfig, folder: RunFolder, background: Background | None) -> str:
        assert background is not None
        both_started.wait(timeout=20)
        assert background.stop.wait(timeout=20)
        stopped.append(config.selector.label)
        raise RunFailedError("exit code 130")

    def wait(*arguments: Any) -> Any:
        all_submitted.set()
        return concurrent.futures.wait(*arguments)

    stub(launch)
    monkeypatch.setattr(parallel, "wait", wait)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests may run with SIGINT ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            run_all(runs, 2)
    finally:
        signal.signal(signal.SIGINT, before)
    assert sorted(stopped) == ["full", "q3"]
    printed = capsys.readouterr()
    assert "interrupted; the same command resumes the sweep" in printed.err and "soft_or" not in printed.out


def test_overrides_are_kept_for_the_report(runs: list[SweepRun], stub: Callable[[Launch], None]) -> None:
    stub(finish)
    run_all(runs, 2)
    kept = [(run.folder.root / ".hydra" / "overrides.yaml").read_text() for run in runs]
    assert kept == [f"- selector={selector}\n" for selector in SELECTORS]


def test_a_run_that_is_refused_changes_nothing(
    tmp_path: Path, compose_run: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    synthetic_runs.write_config(compose_run("learner.lr=1e-3"), tmp_path)
    synthetic_runs.finish(compose_run("learner.lr=1e-3"), tmp_path, 0.5)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError):
        run_all([SweepRun(["seed=0"], compose_run(), RunFolder(tmp_path))], 1)
    assert "learner.lr: 0.001 -> 0.002" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("jobs", "is_basic"), [("two", True), (0, True), (2, False)])
def test_a_wrong_number_of_jobs_is_refused(jobs: Any, *, is_basic: bool) -> None:
    check_jobs(None, is_basic=is_basic)
    check_jobs(2, is_basic=True)
    with pytest.raises(ConfigError, match=f"^hydra.sweeper.jobs={jobs}: must be null or a whole number from 1"):
        check_jobs(jobs, is_basic=is_basic)
