"""The child process of a run: its log, its last words and its exit codes."""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import signal
import sys
from collections.abc import Callable

from tip_exp.config import ConfigError
from tip_exp.paths import RunFolder

FAILED, BAD_CONFIG, INTERRUPTED = 1, 2, 130
_PR_SET_PDEATHSIG = 1


def as_worker(folder: RunFolder, body: Callable[[], None]) -> None:
    """Run `body`; whatever ends it is one line on the terminal, the traceback in worker.log, and an exit code."""
    _die_with_parent()
    with folder.log.open("a", encoding="utf-8") as log_file:
        logging.basicConfig(
            stream=log_file, level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s"
        )
        logging.captureWarnings(True)
        faulthandler.enable(log_file)
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
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


def _die_with_parent() -> None:
    """A killed launcher must not leave a run behind that nobody watches (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _quiet_transformers() -> None:
    """Its progress bars would tear ours; its warnings are in the log."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.enable_propagation()
