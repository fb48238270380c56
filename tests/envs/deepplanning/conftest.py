"""A small data set of our own in the official layout and both languages, and the official data if it is present."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

WORLD = Path(__file__).parent / "world"
OFFICIAL = Path(__file__).resolve().parents[4] / "shared" / "data" / "deepplanning"


@pytest.fixture(scope="session")
def world() -> Path:
    """Two tasks: id 0 with every table and a plan that passes all checks, id 1 with only a trains table with a BOM."""
    return WORLD


@pytest.fixture(scope="session")
def plan_text() -> str:
    return (WORLD / "plan_en.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def official() -> Path:
    """Official queries, schemas and verdicts; not part of this repository."""
    if not OFFICIAL.is_dir():
        pytest.skip(f"needs the official DeepPlanning data in {OFFICIAL}")
    return OFFICIAL


@pytest.fixture(scope="session")
def official_records(official: Path) -> Any:
    """Reads official verdicts or answers by file name."""

    def read(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (official / "fixtures" / name).read_text("utf-8").splitlines()]

    return read
