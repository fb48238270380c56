"""Overlap of test and training problems."""

from __future__ import annotations

from tip_exp.data.contamination import NGRAM, overlap
from tip_exp.types import Problem


def problem(problem_id: str, prompt: str) -> Problem:
    return Problem(problem_id, prompt, "1")


def test_overlap_by_whole_text_and_by_13_words() -> None:
    words = [f"w{i}" for i in range(20)]
    train = [problem("a", "What is one plus one? Box it."), problem("b", " ".join(words))]
    test = [
        problem("same", "what is ONE plus one? Box it."),
        problem("shares 13", "x y " + " ".join(words[3 : 3 + NGRAM]) + " z"),
        problem("shares 12", "x y " + " ".join(words[3 : 2 + NGRAM]) + " z"),
        problem("new", "Something else altogether. Box it."),
    ]
    result = overlap(train, test, suffix=" Box it.")
    assert result.exact == ["same"] and result.ngram == ["shares 13"]
