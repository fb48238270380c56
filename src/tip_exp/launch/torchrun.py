"""The process between a launcher and the ranks of its run: torch.distributed.run, with one error for all of them.

python -m tip_exp.launch.torchrun FOLDER LAUNCHER_PID OPTION… -- LOCK…

A rank prints no error itself, because when one fails its peers fail too. Each leaves a report, and the first is
printed here. What torch.distributed.run logs is in torchrun.log. SIGTERM is passed on to the ranks, which end after a
checkpoint; torch.distributed.run would kill them 30 s later.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from tip_exp.launch.worker import LOG_FORMAT, end_with, print_stopped
from tip_exp.records.folder import RunFolder
from tip_exp.utils.errors import FAILED, INTERRUPTED, TERMINATED, first_line
from tip_exp.utils.termination import SIGNALS, Terminated, code_of, kill_while_loading

KILL_AFTER_S = 30  # torch.distributed.run's default
RESEND_S = 0.5  # between searches for ranks that started after the signal came


def main() -> None:
    """Do the run; the exit code is that of the rank that failed first, or the signal that killed one."""
    folder, launcher = RunFolder(Path(sys.argv[1])), int(sys.argv[2])
    kill_while_loading()
    end_with(launcher)
    split = sys.argv.index("--")
    options, locks = sys.argv[3:split], sys.argv[split + 1 :]
    worker = ["-m", "tip_exp.launch.worker", str(folder.root), str(os.getpid()), *locks]
    logging.basicConfig(filename=folder.root / "torchrun.log", format=LOG_FORMAT)
    import torch.distributed.run  # noqa: F401  # takes seconds, in which a signal still kills this process

    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # until torch.distributed.run sets its own
    try:
        with tempfile.TemporaryDirectory(prefix="tip_exp_ranks_") as reports:
            signalled: set[int] = set()
            for number in (*SIGNALS, signal.SIGALRM):
                signal.signal(number, lambda *_: pass_on(Path(reports), signalled))
            options += ["--signals-to-handle=SIGINT,SIGHUP,SIGQUIT", f"--log-dir={reports}"]
            code = run_ranks([*options, *worker], Path(reports))
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number in (*SIGNALS, signal.SIGALRM):  # the ranks have ended
                signal.signal(number, signal.SIG_IGN)
    except KeyboardInterrupt as stop:  # before there are ranks
        code = code_of(stop)
    if code in (INTERRUPTED, TERMINATED):
        print_stopped(folder, code)
    if code < 0:  # end like the rank, so that the launcher sees the signal
        if -code != signal.SIGKILL:  # it has no handler
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


def pass_on(reports: Path, signalled: set[int]) -> None:
    """Send SIGTERM to each rank once, and every RESEND_S to ranks that have started since.

    Raises Terminated if there are no ranks and no folders in `reports`: torch.distributed.run makes the folders just
    before it starts the ranks. `signalled` has the process ids that SIGTERM was sent to; it is updated.
    """
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            pid, rest = int(stat.parent.name), stat.read_text().rpartition(")")[2].split()
            if rest[1] == str(os.getpid()) and pid not in signalled:  # its parent: field 4 of proc_pid_stat(5)
                os.kill(pid, signal.SIGTERM)
                signalled.add(pid)
    if not signalled and not any(reports.glob("*")):
        raise Terminated
    signal.setitimer(signal.ITIMER_REAL, RESEND_S)  # SIGALRM, which calls this function


def run_ranks(arguments: list[str], reports: Path) -> int:
    """Run torch.distributed.run to its end; prints one error and returns an exit code, negative for a signal."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    for name in [name for name in logging.root.manager.loggerDict if name.partition(".")[0] == "torch"]:
        logging.getLogger(name).handlers.clear()  # they print to stderr
        logging.getLogger(name).propagate = True
    try:
        run(parse_args(arguments))
    except SignalException:
        return INTERRUPTED
    except ChildFailedError as error:
        written = [json.loads(path.read_text()) for path in reports.rglob("error.json")]
        first = min(written, key=lambda report: report["time_ns"], default=None)
        for failure in error.failures.values():
            # Peers of a failed rank get SIGTERM, then SIGKILL after 30 s, and NCCL may abort them: not the cause. But a
            # SIGABRT within 1 s of the first report is the cause: that report is of a peer that lost this rank.
            patience = 1 if failure.exitcode == -signal.SIGABRT else KILL_AFTER_S
            is_cause = first is None or failure.timestamp < first["timestamp"] + patience
            if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM and is_cause:
                return failure.exitcode
        if first is not None:
            print(first["message"], file=sys.stderr)
            return first["code"]
        if any(failure.exitcode in (TERMINATED, -signal.SIGTERM) for failure in error.failures.values()):
            return TERMINATED
        rank, failure = next(iter(error.failures.items()))
        print(f"error: rank {rank} ended with exit code {failure.exitcode}", file=sys.stderr)
        return FAILED
    except Exception as error:  # of torch.distributed.run itself, for example if the nodes do not meet
        logging.getLogger("tip_exp").exception("torch.distributed.run failed")
        where = "traceback in torchrun.log of the run's folder"
        print(f"error: torch.distributed.run failed: {first_line(error)} ({where})", file=sys.stderr)
        return FAILED
    return 0


if __name__ == "__main__":
    main()
