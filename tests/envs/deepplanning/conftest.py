"""A small world of our own in the official layout, in both languages, and the official data where it lies beside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

WORLD = Path(__file__).parent / "world"
OFFICIAL = Path(__file__).resolve().parents[4] / "shared" / "data" / "deepplanning"


@pytest.fixture(scope="session")
def world() -> Path:
    """Two tasks: id 0 with every table and a plan that passes all checks, id 1 with trains alone, with a BOM."""
    return WORLD


@pytest.fixture(scope="session")
def plan_text() -> str:
    return (WORLD / "plan_en.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def official() -> Path:
    """Official queries, schemas and verdicts; not part of this repository."""
    if not OFFICIAL.is_dir():
        pytest.skip("the official data does not lie beside this checkout")
    return OFFICIAL


@pytest.fixture(scope="session")
def official_records(official: Path) -> Any:
    """A reader of the official verdicts and answers by file name."""

    def read(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (official / "fixtures" / name).read_text("utf-8").splitlines()]

    return read
