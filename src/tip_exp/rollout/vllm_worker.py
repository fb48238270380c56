"""Code that runs inside vLLM's workers: it loads the learner's weights, and ends the worker when the run ends.

vLLM imports this module in the process of each worker and mixes `WeightSync` into the worker's class.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress
from select import POLLIN, poll
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

RUN_PID = "TIP_EXP_RUN_PID"  # environment variable with the run's process id, for engines in processes of their own


class WeightSync:
    """Methods that the run calls by name, so that only names, numbers and paths are pickled."""

    def tip_load(self: Any, named: Iterator[tuple[str, Tensor]]) -> None:
        """Load whole parameters under their checkpoint names; every worker keeps its shard."""
        self.reload_weights(weights_iterator=named)
        repack_tied_head(self.model_runner.get_model())

    def tip_load_file(self: Any, path: str) -> None:
        """`tip_load` from a safetensors file."""
        self.tip_load(iter(load_file(path).items()))


def repack_tied_head(model: nn.Module) -> None:
    """Rebuild the packed copy of a tied embedding that vLLM's CPU head computes with; a reload does not update it.

    Only vLLM's CPU build packs (`cpu_linear`); on a GPU a tied head shares the embedding's storage.
    """
    for module in model.modules():
        if type(module).__name__ == "ParallelLMHead" and hasattr(module, "cpu_linear"):
            module.quant_method.process_weights_after_loading(module)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]


def die_with_run() -> None:
    """End this worker and its engine when the run's process ends, however it ends (Linux).

    vLLM's workers watch their engine, but nothing watches the process that started the engine.
    """
    run = int(os.environ.get(RUN_PID, "0"))
    if run in (0, os.getpid()) or not hasattr(os, "pidfd_open"):
        return
    engine = os.getppid()
    try:
        run_fd = os.pidfd_open(run)
    except ProcessLookupError:  # the run ended before this worker started
        _end(engine, run)
        return

    def watch() -> None:
        poller = poll()
        poller.register(run_fd, POLLIN)
        poller.poll()
        _end(engine, run)

    threading.Thread(target=watch, name="die_with_run", daemon=True).start()


def _end(engine: int, run: int) -> None:
    if engine not in (1, run) and engine == os.getppid():
        with suppress(ProcessLookupError):
            os.kill(engine, signal.SIGKILL)
    os._exit(1)


die_with_run()
