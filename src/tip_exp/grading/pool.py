"""Grading that survives what it grades: comparisons run in worker processes with a hard limit on time and memory.

    with GradingPool(workers=4) as pool:
        verdicts = pool.grade_all((response, answer) for ...)      # in the order of the pairs

`9^{9^{9^9}}` keeps C code busy for ever; no alarm in the same process ends that. Here the worker is killed and
replaced, and the verdict's rule is "timeout". Reading the answer out of the response is linear (extract.py) and stays
in the caller.

Workers are plain `python -c` processes, not children of `multiprocessing`: those import the caller's main module again,
and with it torch, which costs seconds and gigabytes a worker. They end with their caller: an idle one as its stdin
closes, a busy one, if its caller was killed, by the kernel's limit on CPU time.
"""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import selectors
import subprocess
import sys
import time
import weakref
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import IO, Literal, cast

from tip_exp.grading.extract import extract
from tip_exp.grading.types import Extraction, Outcome, Verdict

TIME_LIMIT_S = 5.0
"""Wall-clock seconds for one comparison; the slowest honest ones take tenths."""

MEMORY_LIMIT_MIB = 1024
"""Address space of one worker; it starts with about 60."""

STARTUP_LIMIT_S = 120.0
"""A worker imports sympy in half a second; on a machine that is busy or has a cold disk, in many."""

_LEAST_MIB = 256  # sympy itself needs a quarter of it
_REPLY_BYTES = 4096  # what a pipe delivers in one piece; a reply is much shorter


class GradingPool:
    """Worker processes that compare answers. Not for use by several threads at once."""

    def __init__(
        self, workers: int, *, time_limit: float = TIME_LIMIT_S, memory_limit_mib: int = MEMORY_LIMIT_MIB
    ) -> None:
        if workers < 1 or time_limit <= 0 or memory_limit_mib < _LEAST_MIB:
            raise ValueError(
                f"a grading pool needs workers >= 1, time_limit > 0 s and memory_limit_mib >= {_LEAST_MIB}; "
                f"got {workers}, {time_limit} and {memory_limit_mib}"
            )
        self._time_limit, self._memory_limit_mib = time_limit, memory_limit_mib
        self._workers = [self._start() for _ in range(workers)]
        self._at_exit = weakref.finalize(self, _stop_all, self._workers)  # for those who forget to close

    def __enter__(self) -> GradingPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, busy or not."""
        self._at_exit()

    def grade(self, text: str, answer: str) -> Verdict:
        """One verdict, as the graders that are functions give it."""
        return self.grade_all([(text, answer)])[0]

    def grade_all(self, pairs: Iterable[tuple[str, str]]) -> list[Verdict]:
        """Verdicts on pairs of response and known answer, in their order."""
        return list(self.stream(pairs))

    def stream(self, pairs: Iterable[tuple[str, str]]) -> Generator[Verdict, None, None]:
        """Verdicts in the order of the pairs, each as soon as all before it are there; pairs are taken as needed."""
        if not self._at_exit.alive:
            raise ValueError("this grading pool is closed")
        todo = enumerate(pairs)
        done: dict[int, Verdict] = {}
        turn, more = 0, True
        try:
            while True:
                while more and len(done) < 64 * len(self._workers) and (idle := self._idle()):
                    number, (text, answer) = next(todo, (-1, ("", "")))
                    more = number >= 0
                    if more and (verdict := self._begin(idle, number, text, answer)):
                        done[number] = verdict
                while turn in done:
                    yield done.pop(turn)
                    turn += 1
                if not more and not any(worker.job for worker in self._workers):
                    return
                for number, verdict in self._wait():
                    done[number] = verdict
        finally:  # an abandoned stream must not answer into the next one
            for place, worker in enumerate(self._workers):
                if worker.job:
                    self._replace(place)

    def _start(self) -> _Worker:
        return _Worker.start(self._time_limit, self._memory_limit_mib)

    def _replace(self, place: int) -> None:
        self._workers[place].stop()
        if self._at_exit.alive:
            self._workers[place] = self._start()

    def _idle(self) -> _Worker | None:
        for place, worker in enumerate(self._workers):
            if worker.ready and not worker.job:
                if worker.process.poll() is None:
                    return worker
                self._replace(place)  # somebody killed it while it had nothing to do
        return None

    def _begin(self, worker: _Worker, number: int, text: str, answer: str) -> Verdict | None:
        """Hand a comparison to an idle worker; where the response has no answer to compare, the verdict at once."""
        begun = time.perf_counter()
        found = extract(text)
        if found.answer is None:
            return found.verdict("different", time.perf_counter() - begun)
        worker.send(_Job(number, found, begun), answer)
        return None

    def _wait(self) -> list[tuple[int, Verdict]]:
        """Sleep until a worker has something to say or is out of time; what was found."""
        found: list[tuple[int, Verdict]] = []
        deadline = min(worker.deadline for worker in self._workers)
        with selectors.DefaultSelector() as selector:
            for place, worker in enumerate(self._workers):
                if worker.job or not worker.ready:
                    selector.register(worker.replies, selectors.EVENT_READ, place)
            spoke = {key.data for key, _ in selector.select(max(0.0, deadline - time.perf_counter()))}
        for place, worker in enumerate(self._workers):
            late = worker.deadline <= time.perf_counter()
            if place in spoke:
                reply = worker.receive()
            elif late and worker.job:
                reply = "timeout"
            elif late:
                self.close()
                raise RuntimeError(f"a grading worker did not start within {STARTUP_LIMIT_S:.0f} s")
            else:
                continue
            if reply == "ready":
                worker.ready = True
            elif job := worker.job:
                found.append((job.number, job.found.verdict(reply, time.perf_counter() - job.begun)))
                worker.job = None
                if reply in ("timeout", "crashed"):
                    self._replace(place)
            else:
                self.close()
                code = worker.process.returncode
                raise RuntimeError(f"a grading worker ended as it started, with exit code {code}; stderr tells why")
        return found


@dataclass(frozen=True, slots=True)
class _Job:
    number: int
    found: Extraction
    begun: float


@dataclass(slots=True)
class _Worker:
    """One process and what is known of it: starting (not ready), idle (no job) or busy."""

    process: subprocess.Popen[bytes]
    requests: IO[bytes]
    replies: int  # a pipe of its own, so that what a library prints is not taken for one
    time_limit: float
    started: float
    ready: bool = False
    job: _Job | None = None

    @classmethod
    def start(cls, time_limit: float, memory_limit_mib: int) -> _Worker:
        replies, replies_end = os.pipe()
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; "  # the same modules from the same places as here
            f"from tip_exp.grading.pool import serve; serve({replies_end}, {time_limit!r}, {memory_limit_mib!r})"
        )
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                bufsize=0,
                pass_fds=(replies_end,),
                process_group=0,  # Ctrl-C is the caller's to handle
            )
        finally:
            os.close(replies_end)  # the worker has its own: when it ends, so do the replies
        assert process.stdin, "it is a pipe"
        return cls(process, process.stdin, replies, time_limit, started=time.perf_counter())

    @property
    def deadline(self) -> float:
        if self.job:
            return self.job.begun + self.time_limit
        return math.inf if self.ready else self.started + STARTUP_LIMIT_S

    def send(self, job: _Job, answer: str) -> None:
        self.job = job
        request = memoryview(json.dumps([job.found.answer, answer]).encode() + b"\n")
        try:
            while request:
                request = request[self.requests.write(request) :]
        except BrokenPipeError:  # it died while it was idle; the end of its replies will say so
            return

    def receive(self) -> Outcome | Literal["ready"]:
        """Its reply, once there is one; "crashed" when it has ended."""
        reply = os.read(self.replies, _REPLY_BYTES).decode().strip()
        return cast("Outcome | Literal['ready']", reply or "crashed")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        if not self.requests.closed:
            self.requests.close()
            os.close(self.replies)


def _stop_all(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.stop()


def serve(replies: int, time_limit: float, memory_limit_mib: int) -> None:
    """A worker's life: a JSON line [given, known] comes in, a line with the outcome goes out, until stdin closes."""
    from tip_exp.grading.math import compare

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # elsewhere the kernel refuses it
        resource.setrlimit(resource.RLIMIT_AS, (memory_limit_mib * 2**20, memory_limit_mib * 2**20))
    logging.disable()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # from here on, replies alone
    os.write(replies, b"ready\n")
    for request in sys.stdin.buffer:
        _limit_cpu(time_limit)
        given, known = json.loads(request)
        os.write(replies, f"{compare(given, known, alarm_s=None)}\n".encode())


def _limit_cpu(time_limit: float) -> None:
    """The caller kills a late worker; should the caller be gone, the kernel does, a second or two later."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(usage.ru_utime + usage.ru_stime + time_limit) + 1, hard))
