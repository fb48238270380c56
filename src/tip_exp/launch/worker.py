"""The child process of a run: bound to its launcher first, then its log, its last words and its exit codes.

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
from tip_exp.utils.errors import ConfigError

FAILED, BAD_CONFIG, INTERRUPTED = 1, 2, 130
_PR_SET_PDEATHSIG = 1


def as_worker(folder: RunFolder, body: Callable[[], None]) -> None:
    """Run `body`; whatever ends it is one line on the terminal, the traceback in worker.log, and an exit code."""
    with folder.log.open("a", encoding="utf-8") as log_file:
        logging.basicConfig(
            stream=log_file, level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s"
        )
        logging.captureWarnings(True)
        faulthandler.enable(log_file)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGINT is ignored in a script's background job
        _quiet_transformers()
        log = logging.getLogger("tip_exp")
        try:
            body()
        except KeyboardInterrupt:
            print(
                f"\ninterrupted; the same command goes on from the last checkpoint in {folder.checkpoints}",
                file=sys.stderr,
            )
            sys.exit(INTERRUPTED)
        except Exception as error:
            log.exception("the run failed")
            print(f"error: {error or type(error).__name__} (traceback in {folder.log})", file=sys.stderr)
            sys.exit(BAD_CONFIG if isinstance(error, ConfigError) else FAILED)


def die_with(launcher: int) -> None:
    """A killed launcher must not leave a run behind that nobody watches (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != launcher:  # it died before the line above
            sys.exit(INTERRUPTED)


def _quiet_transformers() -> None:
    """Its progress bars would tear ours; its warnings are in the log."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.enable_propagation()


def main() -> None:
    die_with(int(sys.argv[2]))  # before torch is imported: that takes seconds in which the launcher may be killed
    folder = RunFolder(Path(sys.argv[1]))

    def body() -> None:
        from tip_exp.run import run
        from tip_exp.run_eval import run_eval

        config = load(folder.config)
        (run_eval if config.mode == "eval" else run)(config, folder)

    as_worker(folder, body)


if __name__ == "__main__":
    main()
