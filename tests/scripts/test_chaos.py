"""Readers of run folders beside writers: every read is whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.chaos.readers import readers_beside_writers
from tip_exp.config.schema import RunConfig
from tip_exp.records import reader


def test_readers_beside_writers_see_whole_runs(tmp_path: Path, tiny_config: RunConfig) -> None:
    assert readers_beside_writers(tmp_path / "runs", tiny_config, readers=6, reads=5) == []


def test_a_torn_read_is_noticed(tmp_path: Path, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the rename of whole files, readers see parts."""

    def in_place(path: Path, text: str) -> None:
        half = len(text) // 2
        path.write_text(text[:half])
        path.write_text(text)

    monkeypatch.setattr("tip_exp.records.result.write_atomic", in_place)
    monkeypatch.setattr("scripts.chaos.readers.write_atomic", in_place)
    assert reader.INDEX and readers_beside_writers(tmp_path / "runs", tiny_config, readers=4, reads=40)
