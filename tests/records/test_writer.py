"""Rows survive kills, a resume drops later rows, and W&B gets the same numbers as metrics.jsonl."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.synthetic_runs import append_rows

from tip_exp.config.schema import RunConfig
from tip_exp.records.folder import RunFolder
from tip_exp.records.tracker import start_trackers, start_wandb
from tip_exp.records.writer import SAMPLE_COLUMNS, RowsRecord, RunLogger, missing_rows
from tip_exp.utils.errors import RunFailedError
from tip_exp.utils.io import read_rows


def test_a_torn_last_line_is_not_a_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_rows(path, [{"step": 0, "x": 1.5}, {"step": 1, "x": 2.5}])
    with path.open("a") as file:
        file.write('{"step": 2, "x"')
    assert [row["step"] for row in read_rows(path)] == [0, 1]


def test_rows_are_valid_json_whatever_is_measured(tmp_path: Path) -> None:
    row = {"step": 1, "loss": math.nan, "top": [["a", math.inf], ("b", 0.5)]}
    append_rows(tmp_path / "x.jsonl", [row])
    (line,) = (tmp_path / "x.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "loss": None, "top": [["a", None], ["b", 0.5]]}


def test_text_with_other_line_separators_stays_one_row(tmp_path: Path) -> None:
    path = tmp_path / "eval.jsonl"
    text = "a\u2028b\x85c\r\nd \\boxed{5} 中文"
    append_rows(path, [{"step": 0, "text": text}])
    assert read_rows(path) == [{"step": 0, "text": text}]


def written(folder: RunFolder, steps: int) -> list[RowsRecord]:
    """The record after each step, as its checkpoint keeps it."""
    records: list[RowsRecord] = []
    with RunLogger(folder, None, rows=None) as logger:
        for step in range(steps):
            logger.log(step, {"x": float(step)})
            logger.eval_rows(step, "student", "b", [{"text": "t"}])
            records.append(logger.record())
    return records


def test_resuming_drops_rows_after_the_checkpoint_and_a_new_start_drops_all(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    records = written(folder, 4)
    assert not missing_rows(folder, records[2])
    with RunLogger(folder, None, rows=records[2]) as logger:
        assert [row["step"] for row in read_rows(folder.metrics)] == [0, 1, 2]
        assert [row["step"] for row in read_rows(folder.eval_rows)] == [0, 1, 2]
        logger.log(3, {"x": 3.0})
        logger.eval_rows(3, "student", "b", [{"text": "t"}])
        assert logger.record() == records[3]
    with RunLogger(folder, None, rows=None):
        assert read_rows(folder.metrics) == []


@pytest.mark.parametrize("damage", ["empty", "cut", "flip", "zeros", "remove"])
def test_rows_that_are_not_those_of_the_checkpoint_are_noticed(tmp_path: Path, damage: str) -> None:
    folder = RunFolder(tmp_path)
    first, _, third = written(folder, 3)
    data, size = folder.metrics.read_bytes(), first["metrics.jsonl"][0]
    damaged = {
        "empty": b"",
        "cut": data[:-1],
        "flip": data[:-5] + bytes([data[-5] ^ 1]) + data[-4:],
        "zeros": data[:size] + bytes(len(data) - size),
    }
    folder.metrics.unlink() if damage == "remove" else folder.metrics.write_bytes(damaged[damage])
    assert missing_rows(folder, third).split()[0] in ("metrics.jsonl", "the")
    assert bool(missing_rows(folder, first)) == (damage in ("empty", "remove"))


def test_a_second_writer_is_noticed_at_the_next_row(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with RunLogger(folder, None, rows=None) as logger:
        logger.log(0, {"x": 0.0})
        with RunLogger(RunFolder(tmp_path), None, rows=None) as second:
            second.log(0, {"y": 123.0})
        with pytest.raises(RunFailedError, match=r"metrics.jsonl has 24 bytes, but this process wrote 22: another"):
            logger.log(1, {"x": 1.0})


def test_nothing_is_written_once_the_lock_is_lost(tmp_path: Path) -> None:
    def lost() -> None:
        if held == "no":
            raise RunFailedError("lost")

    held, folder = "yes", RunFolder(tmp_path, check_held=lost)
    with RunLogger(folder, None, rows=None) as logger:
        held = "no"
        with pytest.raises(RunFailedError, match="lost"):
            logger.log(0, {})
    assert folder.metrics.read_bytes() == b""


def test_a_new_start_leaves_the_rows_of_a_run_that_links_them(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    records = written(folder, 2)
    linked, before = tmp_path / "linked.jsonl", folder.metrics.read_bytes()
    for rows in (records[0], None):
        linked.unlink(missing_ok=True)
        os.link(folder.metrics, linked)
        before = linked.read_bytes()
        with RunLogger(folder, None, rows=rows):
            assert len(read_rows(folder.metrics)) == (1 if rows else 0)
        assert linked.read_bytes() == before


class FakeTracker:
    """Keeps what a tracker is sent."""

    def __init__(self) -> None:
        self.calls: list = []
        self.summary: dict = {}

    def log(self, metrics: dict, step: int) -> None:
        self.calls.append((step, metrics))

    def summarize(self, values: dict) -> None:
        self.summary |= values

    def finish(self, exit_code: int = 0) -> None:
        self.calls.append(("finish", exit_code))


def test_each_tracker_gets_each_row_once(tmp_path: Path) -> None:
    run: Any = FakeTracker()
    second: Any = FakeTracker()
    with RunLogger(RunFolder(tmp_path), [run, second], rows=None) as logger:
        logger.log(0, {"x": 1.0})
        logger.finish({"final": 2.0, "outcomes": {}, "memory": {"memory/process_peak_gib": 0.5}})
    assert run.calls == second.calls == [(0, {"x": 1.0}), ("finish", 0)]
    assert run.summary == {"final": 2.0, "memory/process_peak_gib": 0.5}


def test_a_crash_is_reported_to_trackers(tmp_path: Path) -> None:
    run: Any = FakeTracker()
    with pytest.raises(RuntimeError), RunLogger(RunFolder(tmp_path), [run], rows=None):
        raise RuntimeError("a crash")
    assert run.calls == [("finish", 1)]


def test_wandb_offline_has_the_same_numbers_as_metrics_jsonl(
    tmp_path: Path, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read back by W&B's own tool: all metrics, config, group, tags, samples and memory peaks, and the run's id."""
    secrets = {"WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567", "HF_TOKEN": "hf_ThisIsASecret0123456789"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    folder = RunFolder(tmp_path)
    config = tiny_config.model_copy(update={"sweep": "demo"})
    sample = {"prompt": "1+1?", "answer": "2", "finish": "stop", "tokens": ["2", "!"], "kept": [True, False]}
    sample |= {"entropy": [0.25, 0.75002], "reverse_kl": [0.5, 4.0]}  # a mean of 0.50001
    with RunLogger(folder, start_trackers(config, folder), rows=None) as logger:
        for step in range(3):
            if step == 2:
                graded = [{"right": True, "extracted": "2"}, {}, {"right": 0.5}, {"right": False, "extracted": "3"}]
                logger.samples(step, [sample | verdict for verdict in graded])
            logger.log(step, {"train/loss": 0.5 / (step + 1), "eval/word_sums/mean@4": 0.25 * step})
        logger.finish({"name": "x", "memory": {"memory/process_peak_gib": 0.5}, "outcomes": {"word_sums": {}}})
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    wandb = str(Path(sys.executable).parent / "wandb")
    listing = subprocess.run([wandb, "leet", "inspect", "--json", str(run)], capture_output=True, text=True, timeout=60)
    records = [json.loads(line) for line in listing.stdout.splitlines()]
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    rows = read_rows(folder.metrics)
    assert len(rows) == 3
    assert [{key: row[key] for key in row if not key.startswith(("_", "samples"))} for row in history] == [
        {key: value for key, value in row.items() if key != "step"} for row in rows
    ]
    assert [row["_step"] for row in history] == [row["step"] for row in rows]
    (path,) = run.glob("files/media/table/*.json")
    table = json.loads(path.read_text())
    assert table["columns"] == list(SAMPLE_COLUMNS)
    row = [2, "1+1?", "2", "2!", "right", "2", "stop", 2, 1, 0.5, "!"]
    unsure = [2, "1+1?", "2", "2!", "not graded", None, "stop", 2, 1, 0.5, "!"]
    half = [2, "1+1?", "2", "2!", "score 0.500", None, "stop", 2, 1, 0.5, "!"]
    assert table["data"] == [row, unsure, half, [*row[:4], "wrong", "3", *row[6:]]]
    assert folder.wandb_id.read_text().strip() in run.name
    for text in ("demo", "soft_or", "word_sums", "tiny", "memory/process_peak_gib", "retention"):
        assert text in listing.stdout, text
    assert '"outcomes"' not in listing.stdout
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not [value for value in secrets.values() if any(value.encode() in content for content in written)]


def test_logger_wandb_off_starts_nothing(tmp_path: Path, tiny_config: RunConfig) -> None:
    config = tiny_config.model_copy(update={"logger": tiny_config.logger.model_copy(update={"wandb": "off"})})
    assert start_wandb(config, RunFolder(tmp_path)) is None
