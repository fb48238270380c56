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
from pathlib import Path

from tip_exp.config.parse import load
from tip_exp.records.folder import RunFolder
from tip_exp.utils.errors import BAD_CONFIG, FAILED, INTERRUPTED, ConfigError, format_error

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Do the run. An error is one message on stderr, a traceback in worker.log, and an exit code."""
    folder, launcher = RunFolder(Path(sys.argv[1])), int(sys.argv[2])
    end_with(launcher)  # before torch loads: that takes seconds, in which the launcher may be killed
    with folder.log.open("a", encoding="utf-8") as log_file:
        logging.basicConfig(
            stream=log_file, level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s"
        )
        logging.captureWarnings(True)
        faulthandler.enable(log_file)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a script's background job ignores SIGINT
        try:
            _run(folder)
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


def _run(folder: RunFolder) -> None:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.enable_propagation()  # its warnings go to worker.log

    from tip_exp.run import run, run_eval

    config = load(folder.config)
    (run if config.mode == "train" else run_eval)(config, folder)


if __name__ == "__main__":
    main()
