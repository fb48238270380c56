"""Overlap of test and training problems."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tip_exp.config.schema import RunConfig
from tip_exp.data.contamination import BOILERPLATE, NGRAM, Overlap, TrainingTexts, describe_data
from tip_exp.data.dataset import Dataset
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
    result = TrainingTexts(train, suffix=" Box it.").overlap(test, suffix=" Box it.")
    assert result.exact == ["same"] and result.ngram == ["shares 13"]


def test_formula_marks_are_not_words() -> None:
    train = [problem("a", r"Let $x$, $y$, $\frac{1}{2}$ be given. Find $x + y$.")]
    # 8 words in a row are shared: let x y frac 1 2 be given; with marks, 19 tokens
    assert (
        TrainingTexts(train)
        .overlap([problem("b", r"Let $x$, $y$, $\frac{1}{2}$ be given. Compute their product.")])
        .ngram
        == []
    )


def test_a_chinese_character_is_a_word() -> None:
    train = [problem("a", "小明有25个鸡蛋,他吃了5个,又买了9个,现在他有几个?")]
    test = [
        problem("shares 13", "小红有25个鸡蛋,他吃了5个,又买了8个,还剩几个?"),  # 有 25 个 鸡 蛋 他 吃 了 5 个 又 买 了
        problem("shares 12", "小红有25个鸡蛋,他吃了5个,又买来8个,还剩几个?"),
    ]
    assert TrainingTexts(train).overlap(test) == Overlap([], ["shares 13"])
    assert TrainingTexts(train).overlap([problem("same", train[0].prompt.replace("25", " 25 "))]).exact == ["same"]


def test_kana_and_hangul_make_words_of_many_characters() -> None:
    spaced = " ".join(f"자연수 나머지{n}" for n in range(6))  # 12 words
    kana = "りんごがいくつあるかをもとめなさい"  # 17 characters, one word
    train = [problem("a", spaced), problem("b", f"{kana}。")]
    test = [problem("shares 12", f"이제 {spaced}"), problem("c", f"はじめに、{kana}")]
    assert TrainingTexts(train).overlap(test) == Overlap([], [])


def test_training_and_test_prompts_may_end_with_other_instructions() -> None:
    train, test = [problem("a", "What is 3 + 4? Think first.")], [problem("same", "What is 3 + 4? Box it.")]
    assert TrainingTexts(train, " Think first.").overlap(test, " Box it.").exact == ["same"]
    assert TrainingTexts(train, " Think first.").overlap(test).exact == []


def test_whole_texts_are_compared_with_their_marks() -> None:
    index = TrainingTexts([problem("a", "What is 3 + 4?")])
    result = index.overlap([problem("same", "what is 3 + 4 ?"), problem("b", "What is 3 - 4?")])
    assert result == Overlap(["same"], [])


@pytest.mark.parametrize(("num_problems", "flagged"), [(BOILERPLATE, ["t"]), (BOILERPLATE + 1, [])])
def test_a_phrase_of_many_training_problems_does_not_count(num_problems: int, flagged: list[str]) -> None:
    phrase = " ".join(f"w{i}" for i in range(NGRAM))
    train = [problem(str(n), f"{phrase} and {n}, {phrase}") for n in range(num_problems)]  # twice in each: counts once
    assert TrainingTexts(train).overlap([problem("t", f"Now {phrase}")]).ngram == flagged


def test_overlap_is_a_line_for_the_terminal() -> None:
    assert Overlap([], []).warning("aime24", 30) == ""
    assert Overlap(["a"], ["b", "c"]).warning("math500", 500) == (
        "warning: the training set holds problems of math500: 1 word for word and 2 by a shared 13-gram, of 500 "
        "(ids: datasets.math500.in_train_… in result.json)"
    )
    assert "math500: 2 by a shared 13-gram, of 500 (" in Overlap([], ["b", "c"]).warning("math500", 500)


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
