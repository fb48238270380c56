"""The child process of a run: bound to its launcher, with a log and exit codes.

python -m tip_exp.launch.worker FOLDER LAUNCHER_PID
"""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from tip_exp.config.parse import load
from tip_exp.records.folder import RunFolder
from tip_exp.utils.errors import BAD_CONFIG, FAILED, INTERRUPTED, ConfigError, format_error

_PR_SET_PDEATHSIG = 1


def as_worker(folder: RunFolder, body: Callable[[], None]) -> None:
    """Run `body`. An error is one message on stderr, a traceback in worker.log, and an exit code."""
    with folder.log.open("a", encoding="utf-8") as log_file:
        logging.basicConfig(
            stream=log_file, level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s"
        )
        logging.captureWarnings(True)
        faulthandler.enable(log_file)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a script's background job ignores SIGINT
        try:
            _redirect_transformers_output()
            body()
        except KeyboardInterrupt:
            where = f"the last checkpoint in {folder.checkpoints}"
            print(f"\ninterrupted; the same command resumes from {where}", file=sys.stderr)
            sys.exit(INTERRUPTED)
        except Exception as error:
            logging.getLogger("tip_exp").exception("the run failed")
            print(f"{format_error(error)} (traceback in {folder.log})", file=sys.stderr)
            sys.exit(BAD_CONFIG if isinstance(error, ConfigError) else FAILED)


def end_with(launcher: int) -> None:
    """Receive SIGTERM when the launcher dies, so that no run continues without one (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != launcher:  # it died before the call above
            sys.exit(INTERRUPTED)


def _redirect_transformers_output() -> None:
    """No progress bars of transformers; its warnings go to worker.log."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.enable_propagation()


def main() -> None:
    end_with(int(sys.argv[2]))  # before torch loads: that takes seconds, in which the launcher may be killed
    folder = RunFolder(Path(sys.argv[1]))

    def body() -> None:
        from tip_exp.run import run
        from tip_exp.run_eval import run_eval

        config = load(folder.config)
        (run_eval if config.mode == "eval" else run)(config, folder)

    as_worker(folder, body)


if __name__ == "__main__":
    main()
