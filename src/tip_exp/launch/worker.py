"""The process of a run, or of one of its ranks: bound to the process that started it, with a log and exit codes.

python -m tip_exp.launch.worker FOLDER PARENT_PID LOCK…
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import json
import logging
import os
import signal
import sys
import time
from contextlib import ExitStack
from functools import partial
from io import TextIOWrapper
from pathlib import Path

from tip_exp.launch.lock import check_held, joined
from tip_exp.records.folder import RunFolder, numbered_checkpoints
from tip_exp.utils import termination
from tip_exp.utils.errors import (
    BAD_CONFIG,
    FAILED,
    INTERRUPTED,
    RESTARTS,
    TERMINATED,
    ConfigError,
    RestartsError,
    first_line,
    format_error,
)
from tip_exp.utils.io import write_atomic
from tip_exp.utils.termination import code_of

log = logging.getLogger("tip_exp")
LOG_FORMAT = "%(asctime)s %(name)s %(levelname)s %(message)s"
CODES = {ConfigError: BAD_CONFIG, RestartsError: RESTARTS}  # of other errors: FAILED
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Do the run. An error is one message on stderr, a traceback in the rank's log, and an exit code."""
    folder, parent, locks = RunFolder(Path(sys.argv[1])), int(sys.argv[2]), sys.argv[3:]
    termination.kill_while_loading()
    end_with(parent)  # before torch loads: that takes seconds, in which the parent may be killed
    try:
        _hold_and_run(folder, locks)
    except OSError as error:  # of the lock or the log: a full disk, or a folder that may only be read
        print(format_error(error), file=sys.stderr)
        sys.exit(FAILED)
    except KeyboardInterrupt as stop:  # while another error is reported
        sys.exit(code_of(stop))


def _hold_and_run(folder: RunFolder, locks: list[str]) -> None:
    rank, report = int(os.environ.get("RANK", "0")), os.environ.get("TORCHELASTIC_ERROR_FILE")
    log_path = folder.log_of(rank)
    with (
        ExitStack() as stack,
        log_path.open("ab", buffering=0) as raw,  # nothing is left to write, and to fail, as it closes
        TextIOWrapper(raw, encoding="utf-8", write_through=True) as log_file,
    ):
        for lock in map(Path, locks):
            stack.enter_context(joined(lock))
            if lock == folder.lock:
                folder.check_held = partial(check_held, lock)
        if rank > 0:  # rank 0 alone prints
            os.environ["TQDM_DISABLE"] = "1"
            os.dup2(log_file.fileno(), sys.stdout.fileno())
            os.dup2(log_file.fileno(), sys.stderr.fileno())
        logging.basicConfig(stream=log_file, level=logging.INFO, format=LOG_FORMAT)
        logging.captureWarnings(True)
        logging.raiseExceptions = False  # on a full disk the log ends, without a traceback for each line
        faulthandler.enable(log_file)
        log.info("the run starts")
        try:
            _run(folder)
        except KeyboardInterrupt as stop:
            code = code_of(stop)
            if report is None:
                print_stopped(folder, code)
            else:
                atexit.register(end_at_once, code)
            sys.exit(code)
        except SystemExit:
            raise
        except BaseException as error:  # PyTorch's CheckpointException and a panic of Rust code are no Exception
            code = next((code for kind, code in CODES.items() if isinstance(error, kind)), FAILED)
            message = f"{format_error(error)} (traceback in {log_path})"
            if code == RESTARTS:
                message = message.removeprefix("error: ")
            if report is not None:  # message and timestamp: as torch.distributed.run reads it
                values = {"message": message, "timestamp": int(time.time()), "time_ns": time.time_ns(), "code": code}
                write_atomic(Path(report), json.dumps(values))
                atexit.register(end_at_once, code)
            log.exception("the run failed: %s", first_line(error))
            if report is None:  # below the traceback: a sweep reads the end of the log, which holds both
                print(message, file=sys.stderr)
            sys.exit(code)
        finally:
            termination.request()  # to a checkpoint that waits for space in the background


def end_with(parent: int) -> None:
    """Receive SIGTERM when the parent dies, so that no run continues without its launcher (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before the call above
            sys.exit(INTERRUPTED)


def end_at_once(code: int) -> None:
    """End a rank without the exit handlers of libraries: registered last, it runs first, after background threads.

    vLLM's handler destroys the process group, and NCCL then waits for ranks that wait for this one in a collective.
    """
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:  # also on a full disk
        os._exit(code)


def end_at_first_interrupt() -> None:
    """Raise KeyboardInterrupt at the first SIGINT, and ignore signals that follow while the run ends.

    Python drops what is raised in a finalizer or in a callback of C code: the run then ends after its step.
    """

    def interrupt(*_: object) -> None:
        termination.request()
        for number in (signal.SIGINT, *termination.SIGNALS):
            signal.signal(number, ignore)
        raise KeyboardInterrupt

    def ignore(*_: object) -> None:
        """In place of SIG_IGN, which makes Python print an error about a signal that arrived just before."""

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a script's background job ignores Ctrl-C
        signal.signal(signal.SIGINT, interrupt)


def print_stopped(folder: RunFolder, code: int) -> None:
    how = "terminated" if code == TERMINATED else "interrupted"
    next_launch = "starts it again: it has no checkpoint yet"
    if numbered_checkpoints(folder.checkpoints):
        next_launch = f"resumes from the last checkpoint in {folder.checkpoints}"
    print(f"\n{how}; the same command {next_launch}", file=sys.stderr)


def _run(folder: RunFolder) -> None:
    """Load the program, then handle signals and do the run."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.enable_propagation()  # its warnings go to the log

    from tip_exp.config.parse import load
    from tip_exp.run import run, run_eval

    end_at_first_interrupt()
    termination.handle()
    config = load(folder.config)
    (run if config.mode == "train" else run_eval)(config, folder)


if __name__ == "__main__":
    main()
