"""trackio, TensorBoard and MLflow have a run's numbers, config and samples, as their own readers read them back."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tip_exp.config.parse import flatten
from tip_exp.config.schema import RunConfig
from tip_exp.records.dashboards import name_of
from tip_exp.records.folder import RunFolder
from tip_exp.records.tracker import start_dashboard, start_trackers
from tip_exp.records.writer import SAMPLE_COLUMNS, RunLogger
from tip_exp.utils.io import read_rows

NAME = "soft_or.r50.s0, demo/tiny.word_sums"
ACCURACY = "eval/word_sums/mean@4"
SAMPLE = {"prompt": "1+1?", "answer": "a|b", "finish": "stop", "tokens": ["2", "\n!"], "kept": [True, False]}
RESULT = {"name": "x", "final": {ACCURACY: 0.5}, "memory": {"memory/process_peak_gib": 0.5}, "outcomes": {}}
Start = Callable[[RunFolder, int], list[Any]]


@pytest.fixture
def chosen(tiny_config: RunConfig) -> Callable[[str], RunConfig]:
    """The config of a sweep's run with one tracker."""

    def with_tracker(name: str) -> RunConfig:
        logger = tiny_config.logger.model_copy(update={"wandb": "off", "tracker": name})
        return tiny_config.model_copy(update={"logger": logger, "sweep": "demo"})

    return with_tracker


def train(config: RunConfig, folder: RunFolder) -> list[dict[str, Any]]:
    """A run of 4 steps that was killed after its step 2, with a checkpoint of step 1; its rows of metrics."""
    with RunLogger(folder, start_trackers(config, folder), rows=None) as logger:
        for step in range(2):
            logger.log(step, {"train/loss": 0.5 / (step + 1), ACCURACY: 0.25 * step})
        rows = logger.record()
        logger.log(2, {"train/loss": 99.0})
    with RunLogger(folder, start_trackers(config, folder, step=1), rows=rows) as logger:
        logger.samples(2, [SAMPLE])
        for step in range(2, 4):
            logger.log(step, {"train/loss": 0.5 / (step + 1), ACCURACY: 0.25 * step})
        logger.finish(RESULT)
    return read_rows(folder.metrics)


def test_tensorboard_reads_back_the_rows_of_the_run(chosen: Callable[[str], RunConfig], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config, folder = chosen("tensorboard"), RunFolder(tmp_path)
    for _ in range(2):  # the second run replaces the first
        rows = train(config, folder)
    events = EventAccumulator(str(folder.tensorboard))
    events.Reload()
    for name in ("train/loss", ACCURACY):  # what the killed part wrote of step 2 is gone
        scalars = [(event.step, event.value) for event in events.Scalars(name)]
        assert scalars == [(row["step"], pytest.approx(row[name])) for row in rows]
    (text,) = events.Tensors("samples/text_summary")
    assert text.step == 2 and text.tensor_proto.string_val[0].decode().splitlines()[2] == (
        r"| 2 | 1+1? | a\|b | 2 ! | stop | 2 | 1 | None | None |"
    )
    (settings,) = events.Tensors("config/text_summary")
    assert "| selector.label | soft_or |" in settings.tensor_proto.string_val[0].decode()
    (final,) = events.Scalars(f"result/final.{ACCURACY}")
    assert (final.step, final.value) == (3, 0.5)
    assert events.Scalars("result/memory/process_peak_gib")[0].value == 0.5
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    (content,) = [
        plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
        for tag, content in events.PluginTagToContent(metadata.PLUGIN_NAME).items()
        if tag == metadata.SESSION_START_INFO_TAG
    ]
    assert content["selector.label"].string_value == "soft_or" and content["selector.retention"].number_value == 0.5


def test_trackio_reads_back_the_rows_of_the_run(
    chosen: Callable[[str], RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    config, folder = chosen("trackio"), RunFolder(tmp_path / "run")
    folder.root.mkdir()
    rows = train(config, folder)
    (record,) = SQLiteStorage.get_run_records("tip")
    assert record["name"] == NAME
    logs = SQLiteStorage.get_logs("tip", str(record["name"]), run_id=record["id"])
    losses = {log["step"]: log["train/loss"] for log in logs if "train/loss" in log}  # the last value of a step
    assert losses == {row["step"]: row["train/loss"] for row in rows}
    (table,) = [log["samples"] for log in logs if "samples" in log]
    assert list(table["_value"][0]) == list(SAMPLE_COLUMNS)
    assert [log[f"result/final.{ACCURACY}"] for log in logs if f"result/final.{ACCURACY}" in log] == [0.5]
    sent = SQLiteStorage.get_run_config("tip", str(record["name"]), run_id=record["id"])
    assert sent is not None and {key: sent[key] for key in ("selector.label", "selector.retention", "sweep")} == {
        "selector.label": "soft_or",
        "selector.retention": 0.5,
        "sweep": "demo",
    }
    assert sent["_Group"] == "demo"


def test_mlflow_reads_back_the_rows_of_the_run(
    chosen: Callable[[str], RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    config, folder = chosen("mlflow"), RunFolder(tmp_path / "run")
    folder.root.mkdir()
    rows = train(config, folder)
    client = MlflowClient()
    experiment = client.get_experiment_by_name("tip")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == NAME and run.info.status == "FINISHED"
    history = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "train/loss")}
    assert history == {row["step"]: row["train/loss"] for row in rows}
    assert run.data.metrics["result/final.eval/word_sums/mean_at_4"] == 0.5
    assert run.data.params.keys() == flatten(config.model_dump()).keys()
    assert run.data.params["selector.retention"] == "0.5" and run.data.tags["sweep"] == "demo"
    assert [artifact.path for artifact in client.list_artifacts(run.info.run_id)] == ["samples_00002.json"]


def test_a_name_begins_with_what_tells_runs_apart(tiny_config: RunConfig) -> None:
    """trackio shows about 20 characters below a bar."""
    settings = {
        ("quick.tiny.word_sums.q3.r10.s0.lr0.001", "demo"): "q3.r10.s0.lr0.001, demo/quick.tiny.word_sums",
        ("tiny.word_sums.full.r100.s0", None): "full.r100.s0, tiny.word_sums",
        ("try", "demo"): "demo/try",
        ("try", None): "try",
    }
    for (name, sweep), expected in settings.items():
        assert name_of(tiny_config.model_copy(update={"name": name, "sweep": sweep})) == expected


class FakeTrackioRun:
    def __init__(self) -> None:
        self.rows: list[Any] = []

    def log(self, values: dict[str, Any], step: int) -> None:
        self.rows.append((step, values))

    def finish(self) -> None:
        self.rows.append("finish")


def test_what_trackio_is_sent(chosen: Callable[[str], RunConfig], tmp_path: Path, monkeypatch: Any) -> None:
    """On a stand-in of the package, so that the calls are checked where it is not installed."""
    run, started = FakeTrackioRun(), []

    def init(**options: Any) -> FakeTrackioRun:
        started.append(options)
        return run

    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=init, Table=lambda columns, data: (columns, data)))
    config = chosen("trackio")
    rows = train(config, RunFolder(tmp_path))
    assert [options["resume"] for options in started] == ["never", "allow"]
    assert {options["name"] for options in started} == {NAME}
    assert started[0]["group"] == "demo" and started[0]["config"]["selector.retention"] == 0.5
    again = run.rows.index("finish") + 1  # the first part ended with an error of the run
    assert run.rows[again][1]["samples"][0] == list(SAMPLE_COLUMNS)
    assert run.rows[again + 1 : again + 3] == [
        (row["step"], {name: row[name] for name in row if name != "step"}) for row in rows[2:]
    ]
    assert run.rows[again + 3 :] == [
        (3, {f"result/final.{ACCURACY}": 0.5, "result/memory/process_peak_gib": 0.5}),
        "finish",
    ]


def test_a_tracker_that_fails_at_the_start_ends_no_run(
    chosen: Callable[[str], RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any, caplog: Any
) -> None:
    def init(**_: Any) -> None:
        raise RuntimeError("database is locked")

    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=init))
    with caplog.at_level(logging.WARNING):
        assert start_dashboard(chosen("trackio"), RunFolder(tmp_path)) is None
    assert capfd.readouterr().err.strip() == (
        "trackio: database is locked; the run goes on without it. metrics.jsonl has every number"
    )
    assert "Traceback" in caplog.text
