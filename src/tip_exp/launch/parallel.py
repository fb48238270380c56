"""The runs of a sweep on this machine, several at a time: a line per start and end, a live table of those at work."""

from __future__ import annotations

import os
import sys
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from threading import Lock

from tip_exp.config.schema import RunConfig
from tip_exp.estimate.cards import CARDS, DEFAULT_CARD
from tip_exp.estimate.forecast import Forecaster
from tip_exp.estimate.memory import RankMemory
from tip_exp.estimate.memory_check import free_host_gib
from tip_exp.launch.announce import accuracies, change
from tip_exp.launch.launch import Background, State, launch, state_of
from tip_exp.launch.ranks import check_machine, cores, ranks_per_node
from tip_exp.launch.reuse import read_result
from tip_exp.launch.sweep import SweepRun, write_overrides
from tip_exp.launch.watch import EVERY_S, align, cells_of, fit_terminal
from tip_exp.records.folder import RunFolder
from tip_exp.utils.errors import ConfigError, RunFailedError, format_error
from tip_exp.utils.gpus import visible_gpus
from tip_exp.utils.paths import OUTPUTS
from tip_exp.utils.termination import Terminated

RUN_ERRORS = (ConfigError, RunFailedError, OSError)  # each ends one run; the others go on


def choose_jobs(configs: list[RunConfig], requested: int | None) -> int:
    """Runs at a time: `requested`, else one per `ranks` cores while their forecast memory fits.

    On a machine with GPUs at most GPUs / ranks, so that no run waits for another's, while the host's memory suffices.
    Runs on several nodes go one by one, as all nodes must be at the same run.
    """
    if any(config.nodes > 1 for config in configs):
        return 1
    ranks = max(ranks_per_node(config, os.environ) for config in configs)
    gpus = len(visible_gpus(os.environ)) if any(config.device != "cpu" for config in configs) else 0
    limit = min(len(configs), max(1, gpus // ranks) if gpus else len(configs))
    if requested is not None:
        return min(requested, limit)
    free = free_host_gib()
    if gpus:
        if limit > 1 and free is not None:
            card_gib = CARDS[DEFAULT_CARD].gib
            needed = max(ranks * RankMemory(config, card_gib, ranks).host_peak_gib for config in configs)
            limit = max(1, min(limit, int(free / needed)))
        return limit
    jobs = min(cores() // ranks, limit)
    if jobs > 1 and free is not None:
        forecast = Forecaster(OUTPUTS, CARDS[DEFAULT_CARD])
        jobs = min(jobs, int(free / max(forecast(config).gib for config in configs)))
    return max(1, jobs)


def run_all(runs: list[SweepRun], jobs: int) -> None:
    """Finish every run, `jobs` at a time.

    jobs > 1: a run's output goes to its worker.log, and a terminal shows the table of `tip-exp watch` of the runs at
    work; jobs = 1: it goes to the terminal, with a progress bar. A failed run does not stop the others. Raises an error
    of the first failure's type after the last run, or KeyboardInterrupt after all child processes have ended.
    """
    table = _Table(runs, jobs)
    errors: list[Exception] = []

    def attempt(run: SweepRun, background: Background | None) -> str | Exception:
        if background is not None and background.stop.is_set():
            return ""
        table.start(run)
        try:
            if state_of(run.config, run.folder) in (State.TO_DO, State.UNFINISHED):  # a refused run changes nothing
                check_machine(run.config, os.environ)
                write_overrides(run.folder, run.overrides)
            return launch(run.config, run.folder, background)
        except RUN_ERRORS as error:
            return error

    def finish(run: SweepRun, outcome: str | Exception) -> None:
        table.finish(run, outcome)
        if isinstance(outcome, Exception):
            errors.append(outcome)

    if jobs == 1:
        for run in runs:
            finish(run, attempt(run, None))
    else:
        background = Background({"OMP_NUM_THREADS": str(max(1, cores() // jobs)), "TQDM_DISABLE": "1"})
        with ThreadPoolExecutor(jobs) as executor:
            try:
                futures = {executor.submit(attempt, run, background): run for run in runs}
                pending = set(futures)
                while pending:
                    done, pending = wait(pending, EVERY_S, FIRST_COMPLETED)
                    for future in done:
                        finish(futures[future], future.result())
                    table.show()
            except KeyboardInterrupt as stop:
                background.stop.set()
                executor.shutdown(cancel_futures=True)
                how = "terminated" if isinstance(stop, Terminated) else "interrupted"
                print(f"\n{how}; the same command resumes the sweep", file=sys.stderr)
                raise
    print(f"next: tip-report {runs[0].folder.root.parent}")
    if errors:
        kind = ConfigError if isinstance(errors[0], ConfigError) else RunFailedError
        raise kind(f"{len(errors)} of {len(runs)} runs failed; the same command runs them again")


class _Table:
    """Prints one line when a run starts and one when it ends, each with the run's name and number.

    On a terminal the runs at work follow, in the table of `tip-exp watch`, which the next lines replace.
    """

    def __init__(self, runs: list[SweepRun], jobs: int) -> None:
        self._numbers = {run.config.name: number for number, run in enumerate(runs, 1)}
        self._finished = 0
        self._working: dict[str, RunFolder] = {}
        self._is_live = jobs > 1 and sys.stdout.isatty()
        self._num_drawn = 0  # lines of the table that stand on the terminal
        self._lock = Lock()
        folder = runs[0].folder
        print(f"{len(runs)} runs, {jobs} at a time; logs in {folder.root.parent}/*/{folder.log.name}")
        self.show(self._line("finished", "run", f"{accuracies(runs[0].config)[0]}, start -> final"))

    def start(self, run: SweepRun) -> None:
        number = self._numbers[run.config.name]
        with self._lock:
            self._working[run.config.name] = run.folder
        self.show(self._line("", run.config.name, f"started, run {number} of {len(self._numbers)}"))

    def finish(self, run: SweepRun, outcome: str | Exception) -> None:
        """`outcome`: a note beside the numbers, or the error of a failed run."""
        text, error = "failed", format_error(outcome) if isinstance(outcome, Exception) else ""
        if not error and (result := read_result(run.folder)):
            accuracy = change(result, accuracies(run.config)[0])
            text = f"{accuracy:>18}  {result['totals']['wall_s']:6.0f} s   {outcome}".rstrip()
        with self._lock:
            self._finished += 1
            self._working.pop(run.config.name, None)
        self.show(self._line(f"{self._finished} of {len(self._numbers)}", run.config.name, text), error)

    def show(self, line: str = "", error: str = "") -> None:
        """Print the line and, on stderr, the error in place of the table, then the table of now."""
        with self._lock:
            if self._num_drawn:
                line = f"\x1b[{self._num_drawn}F\x1b[J{line}"  # cursor up to the table, then erase it
                self._num_drawn = 0
            print(line, end="", flush=True)  # one write, so that lines of several threads do not mix
            if error:
                print(error, file=sys.stderr, flush=True)
            if self._is_live and self._working:
                cells = [cells_of(folder, folder.root.parent) for folder in self._working.values()]
                lines = fit_terminal([f"{self._finished} of {len(self._numbers)} finished", *align(cells)])
                self._num_drawn = len(lines)
                print("\n".join(lines), flush=True)

    def _line(self, finished: str, name: str, text: str) -> str:
        return f"{finished:>10}  {name:<{max(map(len, self._numbers))}}  {text}\n"
