"""Overlap of test and training problems."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import pytest

from tip_exp.config.schema import RunConfig
from tip_exp.data.contamination import BOILERPLATE, NGRAM, Overlap, describe_data, overlaps, texts_of
from tip_exp.data.dataset import Dataset
from tip_exp.types import Problem


def problem(problem_id: str, prompt: str) -> Problem:
    return Problem(problem_id, prompt, "1")


def overlap(train: list[Problem], test: list[Problem], train_suffix: str = "", test_suffix: str = "") -> Overlap:
    return overlaps(texts_of(train, train_suffix), {"it": list(texts_of(test, test_suffix))})["it"]


def test_overlap_by_whole_text_and_by_half_of_the_13_grams() -> None:
    words = [f"w{i}" for i in range(20)]
    train = [problem("a", "What is one plus one? Box it."), problem("b", " ".join(words))]
    test = [
        problem("same", "what is ONE plus one? Box it."),
        problem("4 of 8", " ".join(["x y", *words[3 : 3 + NGRAM + 3], "z z"])),
        problem("4 of 9", " ".join(["x y", *words[3 : 3 + NGRAM + 3], "z z z"])),
        problem("12 words", " ".join(words[: NGRAM - 1])),
        problem("new", "Something else altogether. Box it."),
    ]
    assert overlap(train, test, " Box it.", " Box it.") == Overlap(["same"], ["4 of 8"])


def test_formula_marks_are_not_words() -> None:
    train = [problem("a", r"Let $x$, $y$, $\frac{1}{2}$ be given. Find $x + y$.")]
    # 8 words in a row are shared: let x y frac 1 2 be given; with marks, 19 tokens
    assert overlap(train, [problem("b", r"Let $x$, $y$, $\frac{1}{2}$ be given. Compute their product.")]).ngram == []


@pytest.mark.parametrize("text", [r"Find \(x\) if \[x+1=2\].", "Find $$x$$ if $$x+1=2$$.", "Find x if x+1=2."])
def test_delimiters_of_formulas_do_not_count(text: str) -> None:
    assert overlap([problem("a", "Find $x$ if $x+1=2$.")], [problem("same", text)]).exact == ["same"]


def test_a_chinese_character_is_a_word() -> None:
    train = [problem("a", "小明有25个鸡蛋,他吃了5个,又买了9个,现在他有几个?")]
    test = [
        problem("3 of 6", "小红有25个鸡蛋,他吃了5个,又买了9个,几?"),  # 18 words, of which the third to the 17th
        problem("2 of 6", "小红有25个鸡蛋,他吃了5个,又买了9颗,几?"),
    ]
    assert overlap(train, test) == Overlap([], ["3 of 6"])
    assert overlap(train, [problem("same", train[0].prompt.replace("25", " 25 "))]).exact == ["same"]


def test_kana_and_hangul_make_words_of_many_characters() -> None:
    spaced = " ".join(f"자연수 나머지{n}" for n in range(6))  # 12 words
    kana = "りんごがいくつあるかをもとめなさい"  # 17 characters, one word
    train = [problem("a", spaced), problem("b", f"{kana}。")]
    test = [problem("shares 12", f"이제 {spaced}"), problem("c", f"はじめに、{kana}")]
    assert overlap(train, test) == Overlap([], [])


def test_training_and_test_prompts_may_end_with_other_instructions() -> None:
    train, test = [problem("a", "What is 3 + 4? Think first.")], [problem("same", "What is 3 + 4? Box it.")]
    assert overlap(train, test, " Think first.", " Box it.").exact == ["same"]
    assert overlap(train, test, " Think first.").exact == []


def test_whole_texts_are_compared_with_their_marks() -> None:
    test = [problem("same", "what is 3 + 4 ?"), problem("b", "What is 3 - 4?")]
    assert overlap([problem("a", "What is 3 + 4?")], test) == Overlap(["same"], [])


@pytest.mark.parametrize(("num_problems", "flagged"), [(BOILERPLATE, ["t"]), (BOILERPLATE + 1, [])])
def test_a_phrase_of_many_training_problems_does_not_count(num_problems: int, flagged: list[str]) -> None:
    phrase = " ".join(f"w{i}" for i in range(NGRAM))
    train = [problem(str(n), f"{phrase} and {n}, {phrase}") for n in range(num_problems)]  # twice in each: counts once
    assert overlap(train, [problem("t", f"Now {phrase}")]).ngram == flagged


def test_only_what_the_benchmarks_have_is_stored() -> None:
    train = (problem(str(n), " ".join(f"w{n}x{i}" for i in range(200))) for n in range(300))
    tracemalloc.start()
    overlaps(texts_of(train), {"it": list(texts_of([problem("a", "What is 3 + 4?")]))})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20  # of 56,400 n-grams: 5 MiB


def test_overlap_is_a_line_for_the_terminal() -> None:
    assert Overlap([], []).warning("aime24", 30) == ""
    assert Overlap(["a"], ["b", "c"]).warning("math500", 500) == (
        "warning: the training set holds problems of math500: 1 word for word and 2 by most of their 13-grams, of 500 "
        "(ids: datasets.math500.in_train_… in result.json)"
    )
    assert "math500: 2 by most of their 13-grams, of 500 (" in Overlap([], ["b", "c"]).warning("math500", 500)


def test_travel_tasks_are_not_compared(
    compose_run: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    """Each has tables of its own, so the same query has other answers."""
    data = Dataset([problem("a", "City: Alderby. Hotel: 4 stars.")], "a", "")
    config = compose_run("data=mini_travel", "eval=mini_travel")
    described = describe_data(config, data, {"mini_travel": data})
    assert described["mini_travel"].keys() == {"source", "sha256", "rows"} and not capsys.readouterr().out


def test_each_benchmark_has_an_instruction_of_its_own(compose_run: Callable[..., RunConfig]) -> None:
    config = compose_run(
        "data=dapo_math", "eval=math", "eval.benchmarks.aime24.suffix=' Go.'", "data.train.suffix=' Box it.'"
    )
    train = Dataset([problem("a", "1+1? Box it.")], "a", "")
    described = describe_data(config, train, {"aime24": Dataset([problem("b", "1+1? Go.")], "b", "")})
    assert described["aime24"]["in_train_exact"] == ["b"]


def test_a_run_says_at_its_start_what_its_training_set_holds(
    tiny_config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    train, test = (
        Dataset([problem("a", "1+1?")], "a", ""),
        Dataset([problem("b", "1+1?"), problem("c", "2+2?")], "b", ""),
    )
    described = describe_data(tiny_config, train, {"sums": test, "others": Dataset([problem("d", "3?")], "c", "")})
    assert described["sums"]["in_train_exact"] == ["b"] and described["others"]["in_train_13gram"] == []
    assert capsys.readouterr().out.startswith(
        "warning: the training set holds problems of sums: 1 word for word, of 2 ("
    )
