"""What is too long loses whole rows and says so."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tip_exp.envs.truncate import shorten


def test_short_text_stays() -> None:
    assert shorten("a\nb", 3, len, "rows") == "a\nb"


def test_lines_are_kept_from_both_ends() -> None:
    # 10 rows of 6 characters and 9 line ends are 69; the note is 34 long. 4 rows: 4*6 + 34 + 4 = 62, 5 would be 69.
    text = "\n".join(f"row {i:02d}" for i in range(10))
    kept = shorten(text, 65, len, "rows")
    assert kept.split("\n") == ["row 00", "row 01", "[... 6 of 10 rows left out ...]", "row 08", "row 09"]
    assert len(kept) <= 65


def test_elements_of_a_json_list_are_rows() -> None:
    text = json.dumps([{"name": f"Hotel {i}", "tags": ["a", "b"]} for i in range(20)], indent=2)
    kept = shorten(text, 300, len, "rows")
    assert len(kept) <= 300 and "rows left out" in kept
    before, after = kept.split("[... ")[0], kept.split("left out ...]\n")[1]
    assert json.loads(before.strip().rstrip(",") + "]")[0]["name"] == "Hotel 0"  # whole elements, none cut inside
    assert json.loads("[" + after)[-1]["name"] == "Hotel 19"


def test_one_long_row_is_cut_inside() -> None:
    kept = shorten("x" * 1000, 100, len, "rows")
    assert len(kept) <= 100 and kept.startswith("xxx") and "of 1000 characters left out" in kept


def test_the_middle_goes_as_in_the_base_code() -> None:
    assert shorten("abcdefghij", 4, len, "middle") == "ab...(truncated)...ij"


@given(st.text(alphabet="ab\n", min_size=1, max_size=400), st.integers(60, 200))
def test_never_above_the_limit(text: str, limit: int) -> None:
    kept = shorten(text, limit, len, "rows")
    assert len(kept) <= limit
    assert kept == text or "left out" in kept


@pytest.mark.parametrize("limit", [60, 100])
def test_length_may_be_of_tokens(limit: int) -> None:
    def tokens(text: str) -> int:
        return len(text.split())

    text = "\n".join(" ".join(f"w{i}" for i in range(7)) for _ in range(40))
    assert tokens(shorten(text, limit, tokens, "rows")) <= limit
