"""Small data sets of our own making, in the schemas of the real ones, under the same file names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

SMALL = Path(__file__).parent
REAL = SMALL.parents[2] / "shared" / "data"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"the real data sets are not in {REAL}")


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
