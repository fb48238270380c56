"""What runs inside vLLM's workers: taking the learner's weights, and dying with the run they belong to.

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

RUN_PID = "TIP_EXP_RUN_PID"  # set by the run for engines in processes of their own


class WeightSync:
    """Methods that the run calls by name, so that nothing but names, numbers and paths is ever pickled."""

    def tip_load(self: Any, named: Iterator[tuple[str, Tensor]]) -> None:
        """Take whole parameters under their checkpoint names; every worker keeps its share."""
        self.reload_weights(weights_iterator=named)
        repack_tied_head(self.model_runner.get_model())

    def tip_load_file(self: Any, path: str) -> None:
        """The same, from a safetensors file."""
        self.tip_load(iter(load_file(path).items()))

    def tip_pid(self: Any) -> int:
        return os.getpid()


def repack_tied_head(model: nn.Module) -> None:
    """Rebuild what a CPU's tied head computes with: a packed copy of the embedding, which a reload leaves stale.

    Only vLLM's CPU build packs (`cpu_linear`); on a GPU a tied head shares the embedding's storage.
    """
    for module in model.modules():
        if type(module).__name__ == "ParallelLMHead" and hasattr(module, "cpu_linear"):
            module.quant_method.process_weights_after_loading(module)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]


def die_with_run() -> None:
    """End this worker and its engine when the run ends in a way that leaves it no time to say so (Linux).

    vLLM's workers watch their engine, but nothing watches the process that started the engine.
    """
    run = int(os.environ.get(RUN_PID, "0"))
    if run in (0, os.getpid()) or not hasattr(os, "pidfd_open"):
        return
    engine = os.getppid()
    try:
        watched = os.pidfd_open(run)
    except ProcessLookupError:  # it was killed before this worker got here
        _end(engine, run)
        return

    def watch() -> None:
        poller = poll()
        poller.register(watched, POLLIN)
        poller.poll()
        _end(engine, run)

    threading.Thread(target=watch, name="die_with_run", daemon=True).start()


def _end(engine: int, run: int) -> None:
    if engine not in (1, run) and engine == os.getppid():
        with suppress(ProcessLookupError):
            os.kill(engine, signal.SIGKILL)
    os._exit(1)


die_with_run()
