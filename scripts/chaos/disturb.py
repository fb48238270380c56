"""The kinds of disturbance. Each starts a run, disturbs it, and returns when all its processes have ended."""

from __future__ import annotations

import importlib.util
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from scripts.chaos.damage import FLIPPED_WHEN_FINISHED, damage
from scripts.chaos.faults import TRACKERS, bad_tracker, clock_jump, kill_at_write, shift_times
from scripts.chaos.forked import descendants, send
from scripts.chaos.mounts import can_mount, mount, unmount
from scripts.chaos.settings import LIMIT_S, Trial

DISK_MIB = 24
HAS_VLLM = importlib.util.find_spec("vllm") is not None


def kill(trial: Trial) -> None:
    _signal(trial, signal.SIGKILL, trial.draw.choice(["group", "launcher", "worker"]))


def terminate(trial: Trial) -> None:
    _signal(trial, signal.SIGTERM, trial.draw.choice(["group", "launcher", "worker"]))


def interrupt(trial: Trial) -> None:
    _signal(trial, signal.SIGINT, "terminal")


def stop_several(trial: Trial) -> None:
    """Several processes: a sweep, one run or two at a time, or the ranks of a run."""
    if trial.setting.name == "sweep":
        trial.overrides = [f"hydra.sweeper.jobs={trial.draw.choice((1, 2))}"]
    number = trial.draw.choice((signal.SIGTERM, signal.SIGINT))
    _signal(trial, number, "terminal" if number == signal.SIGINT else trial.draw.choice(["group", "launcher"]))


def _signal(trial: Trial, number: signal.Signals, target: str) -> None:
    """`group` is all processes of the run; `terminal` is those that an interrupt there reaches, its process group."""
    launched = trial.launch()
    if launched.wait(cpu_s=trial.moment()) is None:
        below = [pid for level in descendants(launched.pid) for pid in level]
        pids_of = {"group": [launched.pid, *below], "launcher": [launched.pid], "terminal": [-launched.pid]}
        pids = pids_of.get(target, below[:1])
        if pids:
            trial.done.append(f"{number.name} to {target}")
        send(pids, number)
    launched.wait(LIMIT_S)
    trial.wait_until_free()


def kill_in_a_write(trial: Trial) -> None:
    at = int(trial.draw.triangular(1, trial.whole.writes + 1, 1))
    launched = trial.launch(kill_at_write(at))
    launched.wait(LIMIT_S)
    if "killed by SIGKILL" in launched.text():  # a resumed run may end before
        trial.done.append(f"SIGKILL before write {at}")
    trial.wait_until_free()


def kill_sweep(trial: Trial) -> None:
    """The launcher and all that it has started, or the launcher alone."""
    trial.overrides = [f"hydra.sweeper.jobs={trial.draw.choice((1, 2))}"]
    launched = trial.launch()
    if launched.wait(cpu_s=trial.moment()) is None:
        below = [pid for level in descendants(launched.pid) for pid in level]
        is_all = trial.draw.random() < 0.7
        trial.done.append(f"SIGKILL to the launcher{' and its workers' if is_all else ''}")
        send([launched.pid, *(below if is_all else [])], signal.SIGKILL)
    launched.wait(LIMIT_S)
    trial.wait_until_free()


def kill_rank(trial: Trial) -> None:
    launched = trial.launch()
    if launched.wait(cpu_s=trial.moment()) is None:
        levels = descendants(launched.pid)
        if len(levels) > 1:
            send([trial.draw.choice(levels[1])], signal.SIGKILL)
            trial.done.append("SIGKILL to a rank")
    launched.wait(LIMIT_S)
    trial.wait_until_free()


def kill_engine(trial: Trial) -> None:
    """The engine lives in the worker's process; vLLM may have started others."""
    launched = trial.launch()
    if launched.wait(cpu_s=trial.moment()) is None:
        below = [pid for level in descendants(launched.pid) for pid in level]
        if below:
            pid = trial.draw.choice(below)
            trial.done.append(f"SIGKILL to {'the engine' if pid == below[0] else 'a process of the engine'}")
            send([pid], signal.SIGKILL)
    launched.wait(LIMIT_S)
    trial.wait_until_free()


def launch_again(trial: Trial) -> None:
    """Two or three launches, at once or later: one does the run, the others say who holds it or that it is done."""
    launches = [trial.launch()]
    for _ in range(trial.draw.randint(1, 2)):
        if trial.draw.random() < 0.5:
            launches[0].wait(cpu_s=trial.moment())
        launches.append(trial.launch())
    codes = [launched.wait(LIMIT_S) for launched in launches]
    trial.done.append(f"{len(launches)} launches: exit codes {codes}")
    assert 0 in codes and set(codes) <= {0, 1}, f"exit codes {codes}"
    for launched in launches:
        text = launched.text()
        assert launched.code == 0 or "is held by" in text, text
    trial.wait_until_free()


def move(trial: Trial) -> None:
    """Move the folder away from its processes, launch again at its first place, and resume one of the two folders."""
    launched, folder = trial.launch(), trial.folder()
    if launched.wait(cpu_s=trial.moment()) is None and folder.root.exists():
        moved = folder.root.with_name("moved")
        folder.root.rename(moved)
        trial.done.append("moved")
        trial.launch().wait(LIMIT_S)
        launched.wait(LIMIT_S)
        trial.wait_until_free()
        if trial.draw.random() < 0.5:
            shutil.rmtree(moved)
        else:
            shutil.rmtree(folder.root)
            moved.rename(folder.root)
            trial.done.append("moved back")
    launched.wait(LIMIT_S)
    trial.wait_until_free()


def read_only(trial: Trial) -> None:
    """Kill the run, launch it on a file system that may only be read, then on the writable one."""
    kill(trial)
    root = trial.folder().root
    root.mkdir(exist_ok=True)
    mount("--bind", root, root)
    try:
        mount("-o", "remount,bind,ro", root)
        launched = trial.launch()
        code = launched.wait(LIMIT_S)
        trial.done.append(f"read-only: exit code {code}")
        finished = "already finished" in launched.text()
        assert finished or (code == 1 and "Read-only file system" in launched.text()), launched.text()
    finally:
        unmount(root)


def full_disk(trial: Trial) -> None:
    """The disk fills while the run writes, and has space again once the run has ended or has waited for it."""
    root = trial.folder().root
    if not root.is_mount():
        root.mkdir(exist_ok=True)
        mount("-t", "tmpfs", "-o", f"size={DISK_MIB}m", "none", root)
    launched = trial.launch()
    if launched.wait(cpu_s=trial.moment()) is None:
        ballast = root / "ballast"
        with suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(2**16))
        code = launched.wait(trial.draw.uniform(1, 1.5 * trial.whole.seconds + 2))
        trial.done.append(f"full disk: {'it waits' if code is None else f'exit code {code}'}")
        assert code in (None, 0, 1), launched.text()
        ballast.unlink(missing_ok=True)
    launched.wait(LIMIT_S)
    trial.wait_until_free()


def jump(trial: Trial) -> None:
    at, seconds = trial.draw.randint(1, 100), trial.draw.choice((-1e9, -3600.0, 3600.0, 1e9))
    launched = trial.launch(clock_jump(at, seconds))
    if launched.wait(cpu_s=trial.moment()) is None:
        trial.done.append("SIGTERM to launcher")
        send([launched.pid], signal.SIGTERM)
    launched.wait(LIMIT_S)
    trial.wait_until_free()
    shift_times(trial.folder().root, trial.draw)
    trial.done.append(f"clock jumps by {seconds:g} s")


def tracker(trial: Trial) -> None:
    """Its run is not killed: it ends although the tracker refuses or hangs."""
    how = trial.draw.choice(TRACKERS)
    trial.overrides = ["logger.wandb=online"]
    launched = trial.launch(bad_tracker(how))
    trial.done.append(f"W&B: {how}")
    assert launched.wait(LIMIT_S) == 0, launched.text()
    lines = [line for line in launched.text().splitlines() if line.startswith("W&B: ")]
    assert 1 <= len(lines) <= 2 and max(map(len, lines)) <= 600, launched.text()
    trial.overrides = []


@dataclass(frozen=True)
class Kind:
    name: str
    setting: str
    disturb: Callable[[Trial], None]
    share: int = 1  # of the cases
    repeats: int = 3  # at most, in one case
    may_refuse: bool = False
    needs: Callable[[], bool] = lambda: True
    lacks: str = ""  # what `needs` did not find


def _damage(how: str) -> Callable[[Trial], None]:
    return lambda trial: damage(trial, how)


ONE = "one process"
KINDS = [
    Kind("SIGKILL of launcher, worker or both", ONE, kill, share=12, repeats=20),
    Kind("SIGKILL before a write", ONE, kill_in_a_write, share=8, repeats=20),
    Kind("SIGTERM", ONE, terminate, share=2),
    Kind("SIGINT", ONE, interrupt),
    Kind("SIGTERM or SIGINT of a sweep", "sweep", stop_several, repeats=2),
    Kind("SIGTERM or SIGINT of two ranks", "two ranks", stop_several, repeats=1),
    Kind("SIGKILL of a sweep", "sweep", kill_sweep, repeats=2),
    Kind("SIGKILL of one rank of two", "two ranks", kill_rank, repeats=1),
    Kind("SIGKILL of the vLLM engine", "vLLM", kill_engine, needs=lambda: HAS_VLLM, lacks="no vLLM"),
    Kind("two or three launches", ONE, launch_again, share=2, repeats=1),
    Kind("folder moved", ONE, move, share=2, repeats=2),
    Kind("folder read-only", ONE, read_only, repeats=1, needs=can_mount, lacks="no mount"),
    Kind("full disk", ONE, full_disk, share=2, needs=can_mount, lacks="no mount"),
    Kind("clock jumps", ONE, jump, repeats=2),
    Kind("tracker refuses or hangs", ONE, tracker, repeats=1),
    *(
        Kind(f"file {how}", ONE, _damage(how), repeats=1, may_refuse=True)
        for how in ("removed", "emptied", "cut", "flipped", FLIPPED_WHEN_FINISHED)
    ),
]
CYCLE = [kind for turn in range(12) for kind in KINDS if kind.share > turn]  # first each of them once
