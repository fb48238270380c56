"""A tracker that refuses, hangs or breaks costs a run a bounded wait and one line, and no number."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tqdm import tqdm

from tip_exp.config.schema import RunConfig
from tip_exp.records import tracker
from tip_exp.records.folder import RunFolder
from tip_exp.records.tracker import Tracker, WandbListener, start_trackers, start_wandb
from tip_exp.records.writer import RunLogger
from tip_exp.utils.errors import say
from tip_exp.utils.io import read_rows

RESULT = {"final": 2.0, "outcomes": {}, "memory": {"memory/process_peak_gib": 0.5}}


class FakeRun:
    """A W&B run; `on_log` is called with each step."""

    def __init__(self, mode: str, folder: Path, on_log: Callable[[int], None] = lambda step: None) -> None:
        self.mode, self.dir, self.calls, self.summary = mode, str(folder / "wandb" / "run-1" / "files"), [], {}
        self._on_log = on_log

    def log(self, values: dict[str, Any], step: int) -> None:
        self._on_log(step)
        self.calls.append(step)

    def finish(self, exit_code: int = 0) -> None:
        self.calls.append(f"finish {exit_code}")


@pytest.fixture
def online(tiny_config: RunConfig) -> RunConfig:
    return tiny_config.model_copy(update={"logger": tiny_config.logger.model_copy(update={"wandb": "online"})})


@pytest.fixture
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """How W&B fails; only a start that hangs is waited for in vain, and then not for long."""
    if request.param is hang:
        monkeypatch.setattr(tracker, "START_S", -4.5)  # 5 s are added
    return request.param


def fake(monkeypatch: pytest.MonkeyPatch, init: Callable[..., Any]) -> None:
    module = SimpleNamespace(init=init, Settings=lambda **settings: settings)
    monkeypatch.setitem(sys.modules, "wandb", module)


def refuse(**_: Any) -> Any:
    raise RuntimeError("permission denied\nfor this key")


def hang(**_: Any) -> Any:
    time.sleep(60)


@pytest.mark.parametrize(
    ("how", "why"), [(refuse, "permission denied"), (hang, "it did not answer within")], indirect=["how"]
)
def test_a_start_that_fails_is_followed_by_an_offline_run(
    how: Callable[..., Any], why: str, online: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    runs: list[FakeRun] = []

    def init(mode: str, **options: Any) -> Any:
        if mode == "online":
            return how(**options)
        runs.append(FakeRun(mode, tmp_path))
        return runs[-1]

    fake(monkeypatch, init)
    folder = RunFolder(tmp_path)
    with RunLogger(folder, start_trackers(online, folder), rows=None) as logger:
        logger.log(0, {"x": 1.0})
        logger.finish(RESULT)
    assert runs[0].mode == "offline" and runs[0].calls == [0, "finish 0"]
    assert runs[0].summary == {"final": 2.0, "memory/process_peak_gib": 0.5}
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert why in line and f"tip-report sync {tmp_path}" in line


@pytest.mark.parametrize("how", [refuse, hang], indirect=True)
def test_a_run_goes_on_without_any_tracker(
    how: Callable[..., Any], online: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    fake(monkeypatch, how)
    assert start_wandb(online, RunFolder(tmp_path)) is None
    assert len(capfd.readouterr().err.strip().splitlines()) == 2


def test_an_outage_in_a_run_is_said_once_and_stops_the_tracking_alone(tmp_path: Path, capfd: Any) -> None:
    def on_log(step: int) -> None:
        if step >= 2:
            raise ConnectionError("no route to host")

    run: Any = FakeRun("online", tmp_path, on_log)
    folder = RunFolder(tmp_path)
    remedy = f"Upload it later: wandb sync {tmp_path / 'wandb' / 'run-1'}"
    with RunLogger(folder, [Tracker(WandbListener(run), remedy=remedy)], rows=None) as logger:
        for step in range(5):
            logger.log(step, {"x": float(step)})
        logger.finish(RESULT)
    assert run.calls == [0, 1]
    assert [row["step"] for row in read_rows(folder.metrics)] == [0, 1, 2, 3, 4]
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert "no route to host" in line and f"wandb sync {tmp_path / 'wandb' / 'run-1'}" in line


def test_a_tracker_that_hangs_in_a_step_holds_up_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr(tracker, "WAITING_CALLS", 3)
    monkeypatch.setattr(tracker, "FINISH_S", 0.5)
    answer = threading.Event()
    run: Any = FakeRun("online", tmp_path, lambda step: assert_none(answer.wait(60)))
    folder = RunFolder(tmp_path)
    logger = RunLogger(folder, [Tracker(WandbListener(run))], rows=None)
    for step in range(20):  # returns although no step was taken
        logger.log(step, {"x": 1.0})
    logger.finish(RESULT)
    assert run.calls == [] and len(read_rows(folder.metrics)) == 20
    answer.set()
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert "the run goes on without it" in line


def assert_none(_: Any) -> None:
    """Drops a value, so that a lambda returns None."""


def test_a_notice_beside_a_progress_bar_has_a_line_of_its_own(capfd: Any) -> None:
    with tqdm(range(4), desc="run", mininterval=0) as progress:
        progress.update()
        say("W&B: no route to host")
    lines = capfd.readouterr().err.splitlines()  # also at a carriage return
    assert "W&B: no route to host" in lines and any(line.startswith("run:") for line in lines)
