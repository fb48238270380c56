"""Truncation of observations: whole rows, with a note."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tip_exp.envs.truncate import truncate


def test_short_text_is_unchanged() -> None:
    assert truncate("a\nb", 3, len, "rows") == "a\nb"


def test_lines_are_kept_from_both_ends() -> None:
    # The text has 10*6 + 9 = 69 characters, the note 31. With 4 rows: 4*6 + 31 + 4 = 59; with 5: 5*6 + 31 + 5 = 66.
    text = "\n".join(f"row {i:02d}" for i in range(10))
    kept = truncate(text, 65, len, "rows")
    assert kept.split("\n") == ["row 00", "row 01", "[... 6 of 10 rows left out ...]", "row 08", "row 09"]
    assert len(kept) <= 65


def test_elements_of_a_json_list_are_rows() -> None:
    text = json.dumps([{"name": f"Hotel {i}", "tags": ["a", "b"]} for i in range(20)], indent=2)
    kept = truncate(text, 300, len, "rows")
    assert len(kept) <= 300 and "rows left out" in kept
    before, after = kept.split("[... ")[0], kept.split("left out ...]\n")[1]
    assert json.loads(before.strip().rstrip(",") + "]")[0]["name"] == "Hotel 0"  # whole elements
    assert json.loads("[" + after)[-1]["name"] == "Hotel 19"


def test_a_single_long_row_is_cut_inside() -> None:
    kept = truncate("x" * 1000, 100, len, "rows")
    assert len(kept) <= 100 and kept.startswith("xxx") and "of 1000 characters left out" in kept


def test_middle_keeps_both_ends_and_adds_its_note() -> None:
    assert truncate("abcdefghij", 4, len, "middle") == "ab...(truncated)...ij"


@given(st.text(alphabet="ab\n", min_size=1, max_size=400), st.integers(1, 200))
def test_the_result_is_never_above_the_limit(text: str, limit: int) -> None:
    kept = truncate(text, limit, len, "rows")
    assert len(kept) <= limit
    assert kept == text or "left out" in kept or (limit < 60 and kept == text[:limit])


def test_without_room_for_the_note_the_start_is_kept() -> None:
    # "\n[... 100 of 100 characters left out ...]" has 41 characters, and so has an "a" with the note of 99.
    assert truncate("a" * 100, 40, len, "rows") == "a" * 40
    assert truncate("a" * 100, 41, len, "rows") == "a\n[... 99 of 100 characters left out ...]"
    assert truncate("one two three four", 2, lambda text: len(text.split()), "rows") == "one two "


@pytest.mark.parametrize("limit", [60, 100])
def test_the_length_function_may_count_words(limit: int) -> None:
    def num_words(text: str) -> int:
        return len(text.split())

    text = "\n".join(" ".join(f"w{i}" for i in range(7)) for _ in range(40))
    assert num_words(truncate(text, limit, num_words, "rows")) <= limit
