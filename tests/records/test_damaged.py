"""A damaged run is a row that says why, in every table; the other runs are shown as without it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.synthetic_runs import append_rows, finish, write_config

from tip_exp.config.parse import load
from tip_exp.config.schema import RunConfig
from tip_exp.records.reader import read_all, read_runs
from tip_exp.utils.errors import ConfigError
from tip_exp.utils.io import read_rows, write_atomic


@pytest.fixture
def runs(tmp_path: Path, compose_run: Callable[..., RunConfig]) -> Path:
    for name, override in {"full": "selector=full", "hurt": "seed=1", "soft": "seed=0"}.items():
        config = compose_run(override)
        write_config(config, tmp_path / name)
        finish(config, tmp_path / name, 0.8)
        append_rows(tmp_path / name / "metrics.jsonl", [{"step": 0, "eval/word_sums/mean@4": 0.5}])
    return tmp_path


def with_nan(text: str) -> str:
    result = json.loads(text)
    result["outcomes"]["word_sums"]["right"]["p0"] = math.nan
    return json.dumps(result)


def without_key(key: str) -> Callable[[str], str]:
    def changed(text: str) -> str:
        values = json.loads(text)
        del values[key]
        return json.dumps(values)

    return changed


DAMAGES: dict[str, tuple[str, Callable[[str], str | None], str]] = {
    "empty result": ("result.json", lambda text: "", "result.json is empty"),
    "torn result": ("result.json", lambda text: text[:-40], "result.json is torn"),
    "a list": ("result.json", lambda text: "[]", "result.json has no start"),
    "nested": ("result.json", lambda text: "[" * 100_000, "result.json is torn"),
    "NaN": ("result.json", with_nan, "outcomes.word_sums.right holds what is no finite number"),
    "no totals": ("result.json", without_key("totals"), "result.json has no totals"),
    "empty config": ("config.yaml", lambda text: "", "config.yaml is empty"),
    "torn config": ("config.yaml", lambda text: text[: len(text) // 3], "config.yaml "),
    "config of text": ("config.yaml", lambda text: "{a: [", "config.yaml is torn"),
    "binary config": ("config.yaml", lambda text: "\x00\x01", "config.yaml is torn"),
    "no config": ("config.yaml", lambda text: None, "config.yaml is missing"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_run_is_a_row_and_the_others_are_read(runs: Path, name: str) -> None:
    whole = [record for record in read_all([runs]) if Path(record.folder).name != "hurt"]
    file, damage, why = DAMAGES[name]
    path = runs / "hurt" / file
    text = damage(path.read_text())
    path.unlink() if text is None else path.write_text(text)
    records = {Path(record.folder).name: record for record in read_all([runs])}
    assert why in records["hurt"].damage and "\n" not in records["hurt"].damage
    assert read_runs([runs]) == whole
    assert read_all([runs]) == list(records.values())  # from the index


def test_links_in_a_circle_end_the_search(runs: Path) -> None:
    names = [record.folder for record in read_all([runs])]
    (runs / "itself").symlink_to("itself")
    (runs / "sub").mkdir()
    (runs / "sub" / "above").symlink_to(runs)
    (runs / "gone").symlink_to(runs / "nowhere")
    assert [record.folder for record in read_all([runs])] == names


def test_the_report_shows_the_other_runs(runs: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "tip_exp.report.cli",
        str(runs),
        "--html",
        str(runs / "r.html"),
        "--csv",
        str(runs / "r.csv"),
    ]
    (runs / "hurt" / "result.json").write_text("")
    with (runs / "full" / "samples.jsonl").open("w") as samples:
        samples.write('{"step": 3, "tok\n{"step": 4}\n')
    shown = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert shown.returncode == 0, shown.stderr
    assert f"| {runs / 'hurt'} | damaged: result.json is empty |" in shown.stdout.replace("  ", "")
    assert "| full" in shown.stdout and "| soft_or" in shown.stdout
    page = (runs / "r.html").read_text()
    assert "damaged: result.json is empty" in page and "damaged: samples.jsonl is torn" in page
    assert len((runs / "r.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize("text", ["", "a: [", "seed: 3\n", "- 1\n", "\x00", "text", "seed: ${nobody}\n"])
def test_a_damaged_config_beside_checkpoints_is_one_message(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert "remove" not in str(caught.value) and len(str(caught.value)) < 4000


def test_half_characters_survive(tmp_path: Path) -> None:
    rows = [{"step": 0, "text": "a\ud83db\U0001f600中"}]
    append_rows(tmp_path / "rows.jsonl", rows)
    assert read_rows(tmp_path / "rows.jsonl") == rows
    assert "\U0001f600中" in (tmp_path / "rows.jsonl").read_text()
    write_atomic(tmp_path / "page.html", "<p>a\ud83db</p>")
    assert (tmp_path / "page.html").read_text() == "<p>a\\ud83db</p>"
