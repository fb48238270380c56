"""A run in several processes, by `tip-exp` itself: what starts, what is printed, and how all of them end."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import parse_args

from tip_exp.config.parse import digest
from tip_exp.config.schema import RunConfig
from tip_exp.launch.lock import holder
from tip_exp.launch.ranks import (
    MAX_RANKS_PER_CORE,
    Node,
    check_machine,
    cores,
    ranks_per_node,
    this_node,
    torchrun_options,
)
from tip_exp.launch.torchrun import run_ranks
from tip_exp.records.folder import RunFolder, last_error
from tip_exp.utils import gpus
from tip_exp.utils.errors import ConfigError

# Imported by every process at its start: replaces a run by one that writes what it sees, and ends as its name says.
STUB = """
import atexit, json, logging, os, signal, subprocess, sys, time, types
from unittest.mock import MagicMock

class Popen(subprocess.Popen):
    def __init__(self, *args, **options):
        if options.get("start_new_session") and os.environ.pop("SIGTERM_BEFORE_RANKS", ""):  # the first of them
            os.kill(os.getpid(), signal.SIGTERM)
        super().__init__(*args, **options)

if "SIGTERM_BEFORE_RANKS" in os.environ:
    subprocess.Popen = Popen

def run(config, folder):
    rank = int(os.environ["RANK"])
    seen = {name: os.environ.get(name) for name in ("WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS", "MASTER_ADDR")}
    seen |= {"pid": os.getpid(), "lock": folder.lock.read_text()}
    (folder.root / f"started{rank}.tmp").write_text(json.dumps(seen))
    (folder.root / f"started{rank}.tmp").rename(folder.root / f"started{rank}")
    print(f"rank {rank} prints")
    logging.getLogger("stub").info("rank %d logs", rank)
    while not (folder.root / f"started{1 - rank}").exists():
        time.sleep(0.01)
    if config.name == "fails":
        atexit.register(time.sleep, 1000)  # as a library that waits for the other ranks when the process ends
        if rank == 0:
            while "the run failed" not in folder.log_of(1).read_text():
                time.sleep(0.01)
            raise RuntimeError("rank 0 lost its peer")
        try:
            raise ValueError("rank 1 is the cause")
        finally:
            time.sleep(0)
    if config.name == "restarts" and not (folder.root / "again").exists():
        from tip_exp.utils.errors import RestartsError

        if rank == 1:
            time.sleep(0.2)
            (folder.root / "again").touch()
            raise RestartsError("rank 1 is out of memory")
        time.sleep(100)
    if config.name == "killed" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if config.name not in ("ends", "restarts"):
        time.sleep(100)

sys.modules["tip_exp.run"] = types.SimpleNamespace(run=run, run_eval=None)
sys.modules["transformers"] = MagicMock()
"""


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start `tip-exp ranks=2 name=NAME …`, in a process group of its own as in a terminal."""
    (tmp_path / "sitecustomize.py").write_text(STUB)
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), environment.get("PYTHONPATH", "")])

    def started(name: str, *overrides: str, **variables: str) -> subprocess.Popen[str]:
        overrides_of_all = ("ranks=2", "device=cpu", "experiment=smoke", "logger=files", "eval.teacher=false")
        line = [sys.executable, "-m", "tip_exp", *overrides_of_all]
        return subprocess.Popen(
            [*line, f"hydra.run.dir={tmp_path}/${{name}}", f"name={name}", *overrides],
            cwd=tmp_path,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env=environment | variables,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    return started


def wait_for(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def started_ranks(folder: RunFolder) -> list[dict[str, Any]]:
    paths = [folder.root / f"started{rank}" for rank in (0, 1)]
    wait_for(lambda: all(path.exists() for path in paths), "the ranks did not start")
    return [json.loads(path.read_text()) for path in paths]


def test_two_ranks_share_a_lock_and_the_cores_and_rank_0_prints(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    process, folder = start("ends"), RunFolder(tmp_path / "ends")
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert [line for line in out.splitlines() if "rank" in line] == [out.splitlines()[1], "rank 0 prints"] and err == ""
    assert out.splitlines()[1].endswith("; CPU, 2 ranks; writes ends")
    ranks = started_ranks(folder)
    threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert [(r["WORLD_SIZE"], r["LOCAL_RANK"], r["OMP_NUM_THREADS"]) for r in ranks] == [
        ("2", "0", threads),
        ("2", "1", threads),
    ]
    locked = [int(pid) for r in ranks for pid, _ in json.loads(r["lock"])["processes"]]
    assert process.pid in locked and {r["pid"] for r in ranks} <= set(locked)
    assert not folder.lock.exists()
    starts = r".* tip_exp INFO the run starts\n"
    assert re.fullmatch(rf"{starts}.* stub INFO rank 0 logs\n", folder.log.read_text())
    assert re.fullmatch(rf"{starts}rank 1 prints\n.* stub INFO rank 1 logs\n", folder.log_of(1).read_text())


def test_one_error_is_printed_the_first_ranks(tmp_path: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    process, folder = start("fails"), RunFolder(tmp_path / "fails")
    _, err = process.communicate(timeout=100)
    assert process.returncode == 1
    assert err.splitlines() == [
        f"error: rank 1 is the cause (traceback in {folder.log_of(1)})",
        f"error: fails: failed with exit code 1; see {folder.log}",
    ]
    assert last_error(folder) == "rank 1 is the cause"
    assert "ValueError: rank 1 is the cause" in folder.log_of(1).read_text()
    assert not folder.lock.exists()


def test_a_run_starts_again_if_a_rank_asks_for_it(tmp_path: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    process, folder = start("restarts"), RunFolder(tmp_path / "restarts")
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert err == f"rank 1 is out of memory (traceback in {folder.log_of(1)})\n"
    assert out.count("rank 0 prints") == 2 and not folder.lock.exists()


def ended(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_killed_rank_ends_all_with_one_line(tmp_path: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    process, folder = start("killed"), RunFolder(tmp_path / "killed")
    _, err = process.communicate(timeout=100)
    assert process.returncode == 1
    assert err == "error: killed: killed by SIGKILL; the same command resumes it\n"
    assert ended([rank["pid"] for rank in started_ranks(folder)]) and not folder.lock.exists()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_all_ranks_end_with_their_launcher(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]], how: signal.Signals
) -> None:
    """SIGINT as from a terminal; SIGKILL takes the launcher and torch.distributed.run at once."""
    process, folder = start("waits"), RunFolder(tmp_path / "waits")
    pids = [rank["pid"] for rank in started_ranks(folder)]
    assert holder(folder.lock).startswith(f"process {process.pid} on ")
    os.killpg(process.pid, how)
    _, err = process.communicate(timeout=100)
    wait_for(lambda: ended(pids), "the ranks outlived their launcher")
    assert not holder(folder.lock)
    if how is signal.SIGINT:
        assert process.returncode == 130
        assert err == "\ninterrupted; the same command starts it again: it has no checkpoint yet\n"


def test_a_signal_just_before_the_ranks_start_ends_the_run(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    process = start("waits", SIGTERM_BEFORE_RANKS="1")
    _, err = process.communicate(timeout=100)
    said = "\nterminated; the same command starts it again: it has no checkpoint yet\n"
    assert (process.returncode, err) == (143, said)


def test_a_signal_after_the_ranks_have_ended_interrupts_nothing(tmp_path: Path) -> None:
    """Before there are ranks it ends the launch; in a process of its own, whose children would get the signal."""
    code = """
import pathlib, signal, sys
from tip_exp.launch.torchrun import pass_on
from tip_exp.utils.termination import Terminated
signal.signal(signal.SIGALRM, signal.SIG_IGN)
try:
    pass_on(pathlib.Path(sys.argv[1]), set())
except Terminated:
    print("ends", end="")
"""
    for left, printed in ((None, "ends"), ("none_id", "")):
        if left:
            (tmp_path / left).mkdir()
        ended = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
        assert ended.stdout == printed


@pytest.mark.parametrize(
    ("exitcode", "seconds", "expected"),
    [
        (-signal.SIGABRT, 0, -signal.SIGABRT),  # its peers report in the same second that they lost it
        (-signal.SIGABRT, 5, 75),  # NCCL aborts a peer of a rank that is out of memory
        (-signal.SIGKILL, 5, -signal.SIGKILL),
        (-signal.SIGKILL, 31, 75),  # by torch.distributed.run
        (-signal.SIGTERM, 0, 75),
    ],
)
def test_the_cause_of_an_end(
    exitcode: int, seconds: int, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 reports an error at 1,000 s; rank 1 is seen to have ended by a signal some seconds later."""
    report = {"message": "rank 0", "timestamp": 1000, "time_ns": 1000 * 10**9, "code": 75}
    (tmp_path / "error.json").write_text(json.dumps(report))
    failure = ProcessFailure(local_rank=1, pid=1, exitcode=exitcode, error_file="<N/A>")
    failure.timestamp = 1000 + seconds

    def fail(_: Any) -> None:
        raise ChildFailedError("worker", {1: failure})

    monkeypatch.setattr("torch.distributed.run.run", fail)
    assert run_ranks(["--standalone", "-m", "module"], tmp_path) == expected


def test_runs_of_two_ranks_side_by_side(tmp_path: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start("ends,fails", "hydra.sweeper.jobs=2", f"hydra.sweep.dir={tmp_path}", "-m")
    out, err = process.communicate(timeout=200)
    assert process.returncode == 1 and "2 runs, 2 at a time" in out
    assert "error: fails: rank 1 is the cause (traceback in " in err
    for name in ("ends", "fails"):
        folder = RunFolder(tmp_path / name)
        assert len(started_ranks(folder)) == 2 and not folder.lock.exists()
        assert "rank 0 prints" in folder.log.read_text()


def test_submitit_starts_the_ranks(tmp_path: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    process = start("ends", "hydra/launcher=submitit_processes", "hydra.sweep.dir=runs", "-m")
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    folder = RunFolder(tmp_path / "runs" / "ends")
    assert len(started_ranks(folder)) == 2 and not folder.lock.exists()


def test_two_nodes_meet_and_node_0_holds_the_folder(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    nodes = [start("ends", "nodes=2", "ranks=1", **meeting, NODE_RANK=str(rank)) for rank in (1, 0)]
    for process in nodes:
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
        assert ("rank 0 prints\n" in out) == (process is nodes[1])
    folder = RunFolder(tmp_path / "ends")
    ranks = started_ranks(folder)
    assert [(rank["WORLD_SIZE"], rank["LOCAL_RANK"]) for rank in ranks] == [("2", "0")] * 2
    locked = {int(pid) for pid, _ in json.loads(ranks[0]["lock"])["processes"]}
    assert locked == {nodes[1].pid, ranks[0]["pid"]} and not folder.lock.exists()
    assert "rank 1 prints" in folder.log_of(1).read_text()


def test_auto_takes_every_visible_gpu(compose_run: Callable[..., RunConfig]) -> None:
    four = {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    assert ranks_per_node(compose_run(), four) == 4
    assert ranks_per_node(compose_run("device=cpu"), four) == 1
    assert ranks_per_node(compose_run(), {"CUDA_VISIBLE_DEVICES": ""}) == 1
    assert ranks_per_node(compose_run(), {"CUDA_VISIBLE_DEVICES": "MIG-a1,MIG-b2"}) == 1
    assert ranks_per_node(compose_run("ranks=3", "device=cpu"), four) == 3


def test_ranks_and_nodes_do_not_change_which_run_it_is(compose_run: Callable[..., RunConfig]) -> None:
    """So that a run resumes on another number of GPUs, and sweeps share runs of any number."""
    assert digest(compose_run("ranks=2", "nodes=3")) == digest(compose_run())


@pytest.mark.parametrize("ranks", ["0", "many", "1.5"])
def test_wrong_ranks_are_refused(compose_run: Callable[..., RunConfig], ranks: str) -> None:
    with pytest.raises(ConfigError, match="ranks"):
        compose_run(f"ranks={ranks}")


def test_where_nodes_meet() -> None:
    assert this_node(1, {"SLURM_NODEID": "3"}) == Node()
    named = {"MASTER_ADDR": "n1", "MASTER_PORT": "5000", "NODE_RANK": "1"}
    assert this_node(2, named) == Node(1, "n1", 5000)
    slurm = {"SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "gpu[003-006,009],login1", "SLURM_JOB_ID": "31007"}
    assert this_node(2, slurm) == Node(1, "gpu003", 16007)  # 15,000 + 31,007 % 15,000
    assert this_node(2, slurm | {"SLURM_JOB_NODELIST": "a-1,b-2"}).address == "a-1"
    assert this_node(2, slurm | {"SLURM_JOB_NODELIST": "r[1-2]n[05,7]"}).address == "r1n05"
    with pytest.raises(ConfigError, match="nodes=2, but nothing says where they meet: set MASTER_ADDR"):
        this_node(2, {})
    with pytest.raises(ConfigError, match="must be below nodes=2, counted from 0; got '2'"):
        this_node(2, named | {"NODE_RANK": "2"})
    with pytest.raises(ConfigError, match="must be below nodes=2, counted from 0; got 'node1'"):
        this_node(2, named | {"NODE_RANK": "node1"})
    with pytest.raises(ConfigError, match="MASTER_PORT must be a number; got ''"):
        this_node(2, named | {"MASTER_PORT": ""})
    with pytest.raises(ConfigError, match="start it without torchrun"):
        this_node(1, {"TORCHELASTIC_RUN_ID": "x"})


def test_a_machine_without_what_a_run_needs_is_refused(
    compose_run: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpus, "DEVICES", tmp_path)
    no_gpu: dict[str, str] = {}
    on_cuda, many = compose_run("device=cuda"), f"ranks={MAX_RANKS_PER_CORE * cores() + 1}"
    for hidden in ("", "-1,0"):
        with pytest.raises(ConfigError, match=rf"no GPU is visible \(CUDA_VISIBLE_DEVICES='{hidden}' names none\)"):
            check_machine(on_cuda, {"CUDA_VISIBLE_DEVICES": hidden})
    with pytest.raises(
        ConfigError, match=r"device=cuda, .* \(there is no /dev/nvidia0\); set device=auto or device=cpu"
    ):
        check_machine(on_cuda, no_gpu)
    with pytest.raises(ConfigError, match=rf"{many}, but this machine has no GPU and there are \d+ CPU cores"):
        check_machine(compose_run(many), no_gpu)
    with pytest.raises(ConfigError, match=rf"{many}, but device=cpu and there are"):
        check_machine(compose_run(many, "device=cpu"), {"CUDA_VISIBLE_DEVICES": "0"})
    with pytest.raises(ConfigError, match="nothing says where they meet"):
        check_machine(compose_run("nodes=2"), no_gpu)
    check_machine(compose_run(), no_gpu)
    check_machine(compose_run(many, "device=cuda"), {"CUDA_VISIBLE_DEVICES": "0"})  # locked_gpus counts them
    (tmp_path / "dxg").touch()
    check_machine(on_cuda, no_gpu)


@pytest.mark.parametrize("sweeps", [False, True])
@pytest.mark.parametrize("overrides", [["device=cuda"], ["ranks=999"], ["nodes=2"]])
def test_a_run_that_the_machine_cannot_hold_leaves_nothing(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]], overrides: list[str], *, sweeps: bool
) -> None:
    before = sorted(tmp_path.rglob("*"))
    sweep = [f"hydra.sweep.dir={tmp_path}/runs", "-m"] if sweeps else []
    process = start("ends", *overrides, *sweep, CUDA_VISIBLE_DEVICES="", PYTHONDONTWRITEBYTECODE="1")
    _, err = process.communicate(timeout=100)
    assert process.returncode == 2 and overrides[0].partition("=")[0] in err.splitlines()[0], err
    assert sweeps or err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_torchrun_accepts_the_options() -> None:
    options = torchrun_options(4, 2, Node(1, "n1", 5000), "digest")
    parsed = parse_args([*options, "-m", "module", "argument"])
    assert (parsed.nproc_per_node, parsed.nnodes, parsed.node_rank) == ("4", "2", 1)
    assert (parsed.master_addr, parsed.master_port, parsed.rdzv_backend) == ("n1", 5000, "static")
    assert parsed.rdzv_id == "digest"
    assert parse_args([*torchrun_options(2, 1, Node(), "digest"), "-m", "module"]).standalone
