"""Rollouts of the next step, written by a background thread while the learner does the present one (staleness 1)."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext

import torch

from tip_exp.types import Rollout


class RolloutsAhead:
    """Rollouts of step t + 1, always sampled from the student after step t - 1; those of step 1 from the initial one.

    The sampler has weights of its own and belongs to the thread from `take` until `wait` returns; load the updated
    weights into it after `wait`.
    """

    def __init__(self, generate: Callable[[int], list[Rollout]], last_step: int, device: torch.device) -> None:
        """`generate`: samples the rollouts of a step."""
        self.generate, self.last_step = generate, last_step
        self._device, self._stream = device, torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rollouts")
        self._next: Future[tuple[list[Rollout], float]] | None = None

    def take(self, step: int) -> tuple[list[Rollout], float]:
        """Rollouts of `step` and the seconds that sampling took; starts on those of the step after it."""
        result = (self._next or self._start(step)).result()
        self._next = None if step == self.last_step else self._start(step + 1)
        return result

    def wait(self) -> list[Rollout] | None:
        """The next step's rollouts, once the thread has written them; None after the last step."""
        return None if self._next is None else self._next.result()[0]

    def restore(self, rollouts: list[Rollout] | None) -> None:
        """Take `rollouts`, those of a checkpoint, as the next step's."""
        self._next = None
        if rollouts is not None:
            self._next = Future()
            self._next.set_result((rollouts, 0.0))

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _start(self, step: int) -> Future[tuple[list[Rollout], float]]:
        if self._stream is not None:  # the weights are being copied on the learner's stream
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return self._pool.submit(self._sample, step)

    def _sample(self, step: int) -> tuple[list[Rollout], float]:
        started = time.perf_counter()
        # A stream of its own, so that sampling does not queue behind the learner's kernels. Reading the tokens waits
        # for it, so nothing is left on it afterwards.
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            return self.generate(step), time.perf_counter() - started
