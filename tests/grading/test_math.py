"""The grader for mathematics: equal values in any notation are right, different values are wrong."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.datasets import REAL, SMALL, needs_real, rows

from tip_exp.grading import expressions
from tip_exp.grading.extract import extract
from tip_exp.grading.math import clean, compare, plain_number
from tip_exp.grading.types import Verdict

SAME = [
    # reference answer, given answer
    ("25", "025"),
    ("025", "25"),
    ("-7", "−7"),
    ("1234", "1,234"),
    ("10,\\!080", "x = 10,080"),
    ("70", "70.0"),
    ("70", r"\frac{140}{2}"),
    ("073", r"\textbf{(073)}"),
    ("5", "x=5"),
    ("x=5", "5"),
    ("3", "1+2=3"),
    (r"\frac{1}{2}", "0.5"),
    (r"\frac{1}{2}", "1/2"),
    (r"\frac43", r"\dfrac{4}{3}"),
    (r"\frac13", "0.333333"),
    (r"137 \frac{1}{2}", "137.5"),
    (r"137 \frac{1}{2}", "137 1/2"),
    (".0000672", r"6.72 \times 10^{-5}"),
    (".0000672", "6.72e-5"),
    ("15", r"15\%"),
    ("0.15", r"15\%"),
    (r"10\%", "0.1"),
    (r"\frac{1}{2}", r"50\%"),
    (r"\frac{1}{2}", r"p = 50\%"),
    (r"p = \frac{1}{2}", r"p = 50\%"),
    (r"50\%", "1/2"),
    (r"90^\circ", "90"),
    ("30", r"30^{\circ}"),
    (r"\$18.90", "18.9"),
    (r"864 \mbox{ inches}^2", "864"),
    (r"\frac{270}7\text{ degrees}", r"\frac{270}{7}"),
    ("5", "5 cm"),
    ("5", "5cm^2"),
    ("5", "5 m^2"),
    ("5", "5 square m"),
    ("5", "5 sq. m"),
    ("5", r"5\,\mathrm{m}^2"),
    ("5", r"5\text{ m}^2"),
    (r"5\text{ m}^2", "5"),
    (r"5\text{ m}^2", "5 m^{2}"),
    (r"\frac{5}{2}", "x = 2.5 m"),
    ("5m^2", "5 m^{2}"),
    ("5 m^2", "5m^2"),
    ("2k + 5 m", "5m + 2k"),
    ("9.8", r"9.8\text{ m}/\text{s}^2"),
    (r"10\sqrt{3}", r"10\sqrt{3}\text{ square units}"),
    ("52_8", "52_{8}"),
    ("52_8", "52"),
    (r"\text{(C)}", "C"),
    (r"\text{(C)}", r"\textbf{(C)}"),
    (r"\text{Evelyn}", "evelyn"),
    (r"\text{even}", r"\text{ even}"),
    ("1,-2", "-2, 1"),
    ("3, 5, 7", r"3, 5, \text{ and } 7"),
    (r"1 \pm \sqrt{19}", r"1+\sqrt{19}, 1-\sqrt{19}"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)"),
    (r"x \in [-2,7]", "[-2,7]"),
    ("[-2,7]", r"-2 \le x \le 7"),
    (r"(-\infty, 2) \cup (3, \infty)", r"(3,\infty)\cup(-\infty,2)"),
    (r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}", r"\begin{pmatrix} 0.2 \\ -3.6 \end{pmatrix}"),
    ("y = 2x + 3", "2x+3"),
    ("5x - 7y + 11z + 4 = 0", "-5x+7y-11z-4=0"),
    ("2k+2", "2(k+1)"),
    ("6 - 5i", "-5i+6"),
    (r"\cot x", r"\frac{\cos x}{\sin x}"),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
    ("5", r"5\ \text{cm}"),
    ("10", r"10\ \text{mph}"),
    ("1234", r"1\ 234"),
    ("12345678", "12 345 678"),
    ("60", r"60\text{ km/h}"),
    ("60", r"60 \text{ m/s}"),
    ("9.8", r"9.8\text{ m/s}^2"),
    ("60", r"60\text{ h}"),
    ("60", r"60\text{ L}"),
    ("60", r"60\text{ N}"),
    ("18", "18 eggs"),
    ("18", "18 USD"),
    ("18", "€18"),
    ("18", "£18"),
    ("18", "USD 18"),
    ("18", r"\text{18 eggs}"),
    ("18", "18 dollars per day"),
    ("10", "10 km/h"),
    ("10", "x = 10 miles per hour"),
    ("10", r"10\text{ units squared}"),
    (r"5\%", "5 percent"),
    (r"\frac{1}{2}", r"50\text{ percent}"),
    ("x = 1.5", "x = 1 1/2"),
    ("1", r"1\text{ point}"),
    (r"\frac12", r"\frac 1 2"),
    ("3", r"\log_2 8"),
    ("1+i", r"\frac{2}{1-i}"),
    (r"1+i\sqrt{3}", r"2e^{i\pi/3}"),
    ("-i", r"\frac1i"),
    (r"\frac13", r"0.\overline{3}"),
    (r"\frac16", r".1\overline{6}"),
    (r"0.\overline{3}", r"\frac13"),
    (r"-\frac73", r"-2.\overline{3}"),
    (r"\infty", r"+\infty"),
    (r"2\sqrt{3}", "2√3"),
    (r"\sqrt{2}", "√(2)"),
    ("0.5", "½"),
    ("x^2", "x²"),
    (r"\frac{1}{x^{12}}", "x⁻¹²"),
    (r"(-\infty, 2)", "(-∞, 2)"),
    ("12", "3·4"),
    ("5000", "5×10³"),
    ("-5", "x = –5"),
    (r"\emptyset", r"\varnothing"),
    (r"x \le 7", "x≤7"),
    ("5", r"\textcolor{red}{5}"),
    ("3.14", r"\approx 3.14"),
    ("(1,2)", "y=2,x=1"),
    ("(1,2,3)", "x=1, y=2, z=3"),
    ("(3,4)", "3,4"),
    ("(4,3)", "4,3"),
    ("3,4", "4,3"),
    ("3,4", r"\{4,3\}"),
    ("5", r"\{5\}"),
    ("1,-1,2,-2", r"\pm 1,\pm 2"),
    (r"x\neq 5", r"x\not=5"),
    (r"x\neq 5", r"x\not =5"),
]

DIFFERENT = [
    (r"\frac{1}{2}", r"5\%"),
    (r"50\%", r"\frac{1}{2}\%"),
    ("25", "26"),
    ("25", "-25"),
    ("123", "12"),
    ("3", "x=5, y=3"),
    ("3", r"x \le 3"),
    ("3", "3 or 4"),
    ("3", "3,4"),
    ("0.15", "15"),
    ("12", r"12\text{ million}"),
    ("12", "12c"),  # math-verify alone parses c as a unit
    ("2k", "2m"),
    ("5", "5m^2"),  # an expression in m; a unit of one letter needs a space or \\text
    ("5m^2", "5"),
    ("25", "5 m^2"),
    ("5m^2", "5m"),
    ("5m^2", "5s^2"),
    ("5 m", "5 s"),
    ("2s", "2"),
    ("x + 5", "x+5m^2"),
    ("x + 5", "x + 5 m"),
    (r"5\pi", "5"),
    (r"\frac{2}{3}", r"\frac{3}{2}"),
    (r"1\frac{4}{5}", r"\frac45"),
    (".0000672", ".0000671"),  # equal to 6 decimals
    ("10^{-20}", "10^{-21}"),
    ("0.0000001", "0.0000002"),
    (r"\sqrt{2}", "1.414"),
    (r"90^\circ", r"\frac{\pi}{2}"),
    ("52_8", "52_9"),
    ("40_9", "40_10"),
    ("(1,-2)", "(-2,1)"),
    ("(3,4]", "(3,4)"),
    ("(2,4)", "[2,4]"),
    (r"1 \pm \sqrt{19}", r"1-\sqrt{19}"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}"),
    ("x=5", "y=5"),
    ("p - q", "q - p"),
    ("6-5i", "6+5i"),
    (r"\text{(C)}", "B"),
    (r"\text{even}", "odd"),
    (r"\text{Evelyn}", "Evan"),
    ("5", r"\frac{5"),
    ("5", "}5{"),
    (r"\frac{1}{2}", r"\frac{1}{2} \begin{nonsense} & \end{nonsense}"),  # a part that parses is not the answer
    ("34", r"3\quad 4"),
    ("3", "1 2"),
    ("46", "12 34"),
    ("3,9", "3, 4 5"),
    ("12", r"12\text{ thousands}"),
    ("12", "12 million"),
    ("5", "5 squared"),
    ("5", r"5\text{ squared}"),
    ("3", "3 halves"),
    ("5", "5 plus eleven"),
    ("5", "5 choose two"),
    ("3", "3 or more"),
    ("2", "2 theta"),
    ("5", "5 x/y"),
    ("5", "5 / total"),
    ("5", r"\text{5 or 6}"),
    ("18", "19 eggs"),
    ("-2", "3–5"),
    ("x", "x²"),
    ("2i", "2j"),
    (r"\infty", r"-\infty"),
    (r"0.\overline{3}", r"0.\overline{4}"),
    ("(1,2)", "y=1,x=2"),
    ("(1,2)", "x=1,x=2"),
    ("3,4", "(4,3)"),
    ("(3,4)", "4,3"),
    (r"\{1,2\}", "(2,1)"),
    ("(1,2)", r"\{1,2\}"),
    ("2,1", "(x,y)=(1,2)"),
    ("1", "1,1"),
    ("x=5", "5,5"),
    ("1,2", "1,1,2"),
    ("12", r"12\text{ and }12"),
    ("5", r"x\not=5"),
    ("5", r"x \ne 5"),
]


def grade(text: str, answer: str) -> Verdict:
    """As the pool grades, in this process."""
    extraction = extract(text)
    assert extraction.answer is not None, text
    return extraction.verdict(compare(extraction.answer, answer))


@pytest.mark.parametrize(("reference", "answer"), SAME)
def test_the_same_value_in_another_notation_is_right(reference: str, answer: str) -> None:
    assert grade(f"So $\\boxed{{{answer}}}$.", reference).right


@pytest.mark.parametrize(("reference", "answer"), DIFFERENT)
def test_a_different_value_is_wrong(reference: str, answer: str) -> None:
    assert compare(answer, reference) == "different"


def test_the_order_of_two_answers_does_not_matter() -> None:
    computed = re.compile(r".*=.*\d")  # x = 10,080 and 1+2=3 are computations of a number, but not its reference
    pairs = [pair for pair in SAME + DIFFERENT if not (computed.match(pair[1]) and plain_number(clean(pair[0])))]
    assert len(pairs) > 150
    assert [pair for pair in pairs if compare(*pair) != compare(*reversed(pair))] == []


@given(st.integers(-(10**30), 10**30), st.integers(0, 3), st.integers(-2, 2))
@settings(deadline=None)
def test_integers_are_compared_as_integers(n: int, zeros: int, off: int) -> None:
    sign, digits = ("-" if n < 0 else ""), str(abs(n))
    assert grade(f"\\boxed{{{sign}{'0' * zeros}{digits}}}", str(n + off)).right == (off == 0)


@given(*[st.integers(1, 40)] * 4)
@settings(max_examples=40, deadline=None)
def test_fractions_are_compared_by_value(a: int, b: int, c: int, d: int) -> None:
    # a/b = c/d  <=>  a d = c b
    assert grade(f"\\boxed{{\\frac{{{a}}}{{{b}}}}}", f"{c}/{d}").right == (a * d == c * b)


PLAIN = {"025": "25", "-1,234.50": "-1234.5", ".5": "0.5", "5.": "5", "6.72e-5": "0.0000672"}


@pytest.mark.parametrize("text", [*PLAIN, "", "12,34", "1/2", "1e99999", "nan", "inf", "5x"])
def test_plain_numbers_are_exact(text: str) -> None:
    assert plain_number(text) == (Decimal(PLAIN[text]) if text in PLAIN else None)


def test_a_failed_comparison_gives_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for error, rule in ((MemoryError(), "memory"), (TypeError(), "uncomparable")):

        def fail(*_: object, error: BaseException = error, **__: object) -> bool:
            raise error

        monkeypatch.setattr(expressions.math_verify, "verify", fail)
        verdict = grade(r"\boxed{\sqrt{2}}", r"\sqrt{3}")
        assert (verdict.right, verdict.extracted, verdict.rule) == (False, r"\sqrt{2}", rule)


NOTATIONS: dict[str, Callable[[str], str]] = {
    "1/2 for \\frac{1}{2}": lambda a: re.sub(r"^(-?)\\d?frac\{(\d+)\}\{(\d+)\}$", r"\1\2/\3", a),
    "x = ...": lambda a: a if re.search(r"=|\\in|text|^-?\d+$", a) else f"x = {a}",
    "wide": lambda a: a if re.search(r"\d,(\\!)?\s*\d{3}", a) else re.sub(r"([-+,])", r" \1 ", a),
    "units": lambda a: f"{a}\\text{{ units}}" if re.search(r"^-?\d+$|sqrt\{\d+\}$", a) else a,
    "degrees": lambda a: a.replace("^\\circ", " degrees"),
    "division": lambda a: re.sub(r"^\\frac\{([^{}]*(?:\{[^{}]*\})?[^{}]*)\}\{([^{}]+)\}$", r"(\1)/(\2)", a),
    "with a period": lambda a: f"{a}.",
}


def misgraded_notations(folder: Path, name: str) -> tuple[int, list[tuple[str, str]]]:
    """How many answers of MATH-500 a notation changes, and which of the changed ones are graded wrong."""
    answers = [row["answer"] for row in rows(folder, "math500")]
    changed = [(new, old) for old in answers if (new := NOTATIONS[name](old)) != old]
    return len(changed), [(new, old) for new, old in changed if not grade(f"\\boxed{{{new}}}", old).right]


@pytest.mark.parametrize("name", NOTATIONS)
def test_reference_answers_in_another_notation_are_right(name: str) -> None:
    num_changed, misgraded = misgraded_notations(SMALL, name)
    assert num_changed >= 3 and not misgraded


def off_by_one(answer: str, rng: random.Random) -> str | None:
    value = re.split(r"\\(?:text|mbox)", answer)[0]  # the 2 of cm^2 is not part of the value
    numbers = list(re.finditer(r"\d+", value))
    if not numbers:
        return None
    number = rng.choice(numbers)
    return answer[: number.start()] + str(int(number[0]) + rng.choice((-1, 1))) + answer[number.end() :]


def sign_flipped(answer: str, rng: random.Random) -> str | None:
    if answer == "0" or answer.startswith("\\text"):
        return None
    return answer[1:] if answer.startswith("-") else f"-{answer}"


def fraction_swapped(answer: str, rng: random.Random) -> str | None:
    swapped = re.sub(r"\\d?frac\{([^{}]+)\}\{([^{}]+)\}", r"\\frac{\2}{\1}", answer, count=1)
    return swapped if swapped != answer else None


def accepted_corruptions(folder: Path, count: int) -> list[tuple[str, str]]:
    """Of `count` corrupted answers of MATH-500 those graded right, as (corrupted, reference).

    Where a corruption does not apply, the answer of another problem replaces it.
    """
    answers, rng = [row["answer"] for row in rows(folder, "math500")], random.Random(0)
    kinds = (off_by_one, sign_flipped, fraction_swapped, lambda answer, rng: None)
    accepted = []
    for number in range(count):
        answer = answers[(number // len(kinds)) % len(answers)]
        corrupted = kinds[number % len(kinds)](answer, rng)
        corrupted = corrupted or rng.choice([candidate for candidate in answers if candidate != answer])
        if grade(f"The answer is $\\boxed{{{corrupted}}}$.", answer).right:
            accepted.append((corrupted, answer))
    return accepted


def test_corrupted_answers_are_wrong() -> None:
    assert accepted_corruptions(SMALL, 4 * len(rows(SMALL, "math500"))) == []


def misgraded_solutions(folder: Path, name: str) -> list[str]:
    """Reference answers whose worked solution is graded wrong."""
    return [row["answer"] for row in rows(folder, name) if not grade(row["solution"], row["answer"]).right]


def assert_aime_answers_are_integers(folder: Path, name: str) -> None:
    """Right with and without leading zeros; one more is wrong."""
    for row in rows(folder, name):
        answer = row["answer"]
        assert grade(f"\\boxed{{{answer}}}", answer).right and grade(f"\\boxed{{{int(answer)}}}", answer).right
        assert not grade(f"\\boxed{{{int(answer) + 1}}}", answer).right


def assert_gsm8k_solutions_are_right(folder: Path, name: str) -> None:
    for row in rows(folder, name):
        verdict = grade(row["answer"], row["answer"].rpartition("####")[2].strip())
        assert verdict.right and verdict.rule == "hash_mark", row


def test_solutions_of_the_small_sets_are_right() -> None:
    assert misgraded_solutions(SMALL, "math500") == misgraded_solutions(SMALL, "aime2024") == []
    assert_aime_answers_are_integers(SMALL, "aime2024")
    assert_gsm8k_solutions_are_right(SMALL, "gsm8k_train")


@pytest.mark.data
@needs_real
@pytest.mark.parametrize("name", NOTATIONS)
def test_answers_of_math500_in_another_notation_are_right(name: str) -> None:
    num_changed, misgraded = misgraded_notations(REAL, name)
    assert num_changed > 10 and not misgraded


@pytest.mark.data
@needs_real
@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_corrupted_answers_of_math500_are_wrong(count: int) -> None:
    accepted = accepted_corruptions(REAL, count)
    assert len(accepted) <= 0.003 * count, accepted  # measured: 1 of 2,000, 30 for 30 degrees, which is right


@pytest.mark.data
@needs_real
def test_solutions_of_the_real_sets_are_right() -> None:
    assert len(misgraded_solutions(REAL, "math500")) <= 3  # measured: 0 of 500
    assert misgraded_solutions(REAL, "aime2024") == []  # one box is \boxed{\textbf{(073)}}
    for name in ("aime2024", "aime2025"):
        assert_aime_answers_are_integers(REAL, name)
    assert_gsm8k_solutions_are_right(REAL, "gsm8k_test")


@pytest.mark.parametrize(
    ("answer", "reference", "outcome"),
    [
        ("i", r"\sqrt{-1}", "same"),
        (r"\sqrt{-1}", "i", "same"),
        ("2i", r"\sqrt{-4}", "same"),
        (r"e^{i\pi}", "-1", "same"),
        (r"\{i, -i\}", r"\{\sqrt{-1}, -\sqrt{-1}\}", "same"),
        ("-i", "i", "different"),
        ("i", "1", "different"),
        ("x+i", "x", "different"),
        (r"2\sqrt{-1}", "i", "different"),
        ("i^3", "-i", "same"),
        ("(i, -i)", r"(i, \frac1i)", "same"),
        ("(i, -i)", "(-i, i)", "different"),
        ("[0, 1]", "[0, i]", "different"),
        ("x=3-3i", "3-3i", "same"),
        ("x=3-3i", "z=3-3i", "different"),
        (r"x=\pm i", "i,-i", "same"),
        ("x=3-3i, x=3+3i", "x=3-2i, x=3+2i", "different"),
        ("(1+i)^2", "2i", "same"),
        (r"\sum_{i=1}^{3} i", "6", "same"),
    ],
)
def test_i_is_the_imaginary_unit(answer: str, reference: str, outcome: str) -> None:
    assert compare(answer, reference) == outcome
