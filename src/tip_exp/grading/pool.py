"""Grading in worker processes, with hard limits on time and memory.

    with GradingPool(workers=4) as pool:
        verdicts = pool.grade_all((response, answer) for ...)      # in the order of the pairs

`9^{9^{9^9}}` keeps C code busy for hours, and no alarm in the same process ends that. Here the worker is killed and
replaced, and the verdict's rule is "timeout". Extraction is linear in the text (extract.py) and runs in the caller.
Workers end with their caller: an idle one when its connection closes, a busy one by its limit on CPU time.

pebble.ProcessPool loses two guarantees: its processes import the caller's main module, and with it torch; and a worker
that dies while all are idle breaks the pool. Workers are therefore plain `python -c` processes.
"""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import signal
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from queue import SimpleQueue
from threading import Lock

from tip_exp.grading.extract import extract
from tip_exp.grading.groups import group
from tip_exp.grading.types import Outcome, Verdict

TIME_LIMIT_S = 5.0
"""Wall-clock seconds for one comparison; ordinary answers take milliseconds, the slowest tenths of a second."""

MEMORY_LIMIT_MIB = 1024
"""Address space of one worker; it starts with about 60."""

STARTUP_LIMIT_S = 120.0
"""A worker imports sympy in half a second; on a busy machine with a cold disk it takes many."""

GROUP_TIME_LIMITS = 4
"""Time limits that the comparisons of one list of answers may take together; the rest of them get no result."""

_QUEUED_PER_WORKER = 64


class GradingPool:
    """Worker processes that compare answers, each driven by one thread. Read one stream at a time."""

    def __init__(self, workers: int, *, time_limit: float = TIME_LIMIT_S) -> None:
        self._time_limit = time_limit
        self._threads = ThreadPoolExecutor(workers)
        self._workers = [_Worker(time_limit) for _ in range(workers)]
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._finalizer = weakref.finalize(self, _close, self._threads, self._workers)  # if nobody calls close()

    def __enter__(self) -> GradingPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, busy or not."""
        self._finalizer()

    def grade_all(self, pairs: Iterable[tuple[str, str]]) -> list[Verdict]:
        """Verdicts on (response, reference answer) pairs, in their order."""
        return list(self.stream(pairs))

    def stream(self, pairs: Iterable[tuple[str, str]]) -> Generator[Verdict, None, None]:
        """Yield verdicts in the order of the pairs as they become ready; a bounded number of pairs is read ahead.

        Raises RuntimeError if a worker cannot start. Closing the generator ends the comparisons in progress.
        """
        if not self._finalizer.alive:
            raise ValueError("this grading pool is closed")
        pending: deque[Future[Verdict]] = deque()
        limit = _QUEUED_PER_WORKER * len(self._workers)
        try:
            for text, answer in pairs:
                pending.append(self._threads.submit(self._grade, text, answer))
                while pending and (pending[0].done() or len(pending) >= limit):
                    yield pending[0].result()
                    pending.popleft()
            while pending:
                yield pending[0].result()
                pending.popleft()
        finally:
            running = [future for future in pending if not future.cancel()]
            while wait(running, timeout=0.05).not_done:
                for worker in self._workers:
                    worker.kill()

    def group_all(self, answer_lists: Iterable[list[str]]) -> list[list[int]]:
        """For each list of extracted answers their groups by value (groups.py), in bounded time."""
        return list(self._threads.map(self._group, answer_lists))

    def _group(self, answers: list[str]) -> list[int]:
        seconds_left = GROUP_TIME_LIMITS * self._time_limit
        worker = self._idle.get()

        def compare(given: str, reference: str) -> Outcome:
            nonlocal seconds_left
            if seconds_left <= 0:
                return "timeout"
            outcome, seconds = worker.compare(given, reference)
            seconds_left -= seconds
            return outcome

        try:
            return group(answers, compare)
        finally:
            self._idle.put(worker)

    def _grade(self, text: str, answer: str) -> Verdict:
        start = time.perf_counter()
        extraction = extract(text)
        extraction_s = time.perf_counter() - start
        if extraction.answer is None:
            return extraction.verdict("different", extraction_s)
        worker = self._idle.get()
        try:
            outcome, comparison_s = worker.compare(extraction.answer, answer)
        finally:
            self._idle.put(worker)
        return extraction.verdict(outcome, extraction_s + comparison_s)


class _Worker:
    """One process, started again by the next comparison if it has ended."""

    def __init__(self, time_limit: float) -> None:
        self._time_limit = time_limit
        self._lock = Lock()  # held during a comparison
        self._closed = False
        self._start()

    def compare(self, given: str, reference: str) -> tuple[Outcome, float]:
        """The outcome and the seconds it took, start of the process excluded."""
        with self._lock:
            if self._process.poll() is not None:
                self._start()
            if not self._ready:
                self._await_start()
            start = time.perf_counter()
            with suppress(BrokenPipeError):  # the process has ended, which _reply() reports
                self._connection.send_bytes(json.dumps([given, reference]).encode())
            outcome = self._reply(self._time_limit)
            seconds = time.perf_counter() - start
            if outcome in ("timeout", "crashed"):
                self._end()
            return outcome, seconds

    def kill(self) -> None:
        """End a running comparison; its outcome is "crashed"."""
        self._process.kill()

    def close(self) -> None:
        self._closed = True
        self.kill()
        with self._lock:
            self._end()

    def _start(self) -> None:
        if self._closed:
            raise RuntimeError("this grading pool is closed")
        self._ready = False
        self._connection, remote = Pipe()
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; "  # imports the same modules as this process
            f"from tip_exp.grading.pool import serve; serve({remote.fileno()}, {self._time_limit}, {MEMORY_LIMIT_MIB})"
        )
        with remote:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[remote.fileno()],
                process_group=0,  # Ctrl-C reaches the caller only
            )

    def _await_start(self) -> None:
        if (reply := self._reply(STARTUP_LIMIT_S)) != "ready":
            self._end()
            raise RuntimeError(
                f"a grading worker did not start within {STARTUP_LIMIT_S:.0f} s"
                if reply == "timeout"
                else f"a grading worker ended as it started, with exit code {self._process.returncode}; see stderr"
            )
        self._ready = True

    def _reply(self, seconds: float) -> Outcome:
        """What the process sends; "timeout" if it sends nothing in time, "crashed" if it has ended."""
        try:
            # JSON and not a pickle, since the worker has parsed a model's output.
            return json.loads(self._connection.recv_bytes()) if self._connection.poll(seconds) else "timeout"
        except (EOFError, ConnectionResetError):
            return "crashed"

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._connection.close()


def _close(threads: ThreadPoolExecutor, workers: list[_Worker]) -> None:
    threads.shutdown(wait=False, cancel_futures=True)
    for worker in workers:
        worker.close()


def serve(connection_fd: int, time_limit: float, memory_limit_mib: int) -> None:
    """The worker process: receives (given, reference) pairs and sends the outcome of each comparison."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # sent to all processes of a job; the caller may have more to grade
    from tip_exp.grading.math import compare  # imports sympy for half a second

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # other kernels refuse this limit
        resource.setrlimit(resource.RLIMIT_AS, (memory_limit_mib * 2**20, memory_limit_mib * 2**20))
    logging.disable()
    compare(r"\frac{1}{2}", "2^{-1}")  # else the first comparison builds the parser's tables within its time limit
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # errors up to here are shown to the user
    connection = Connection(connection_fd)
    connection.send_bytes(b'"ready"')
    _, hard_limit = resource.getrlimit(resource.RLIMIT_CPU)
    while True:  # until recv_bytes() raises EOFError: the caller has ended
        given, reference = json.loads(connection.recv_bytes())
        # The kernel ends this process 1 to 2 s after the time limit, in case the caller no longer exists.
        cpu_limit = math.ceil(time.process_time() + time_limit) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_limit, hard_limit))
        connection.send_bytes(json.dumps(compare(given, reference)).encode())
