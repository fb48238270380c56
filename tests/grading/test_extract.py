"""Extraction of answers from responses."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tip_exp.grading.extract import BOX_CHARS, LAST_BOXES, TAIL_CHARS, extract

EXTRACTIONS = [
    # text, answer, rule
    (r"So $x = \boxed{5}$.", "5", "boxed"),
    (r"First \boxed{1}, no: \boxed{2}", "2", "boxed"),
    (r"\fbox{7}", "7", "boxed"),
    (r"\boxed{3} and \fbox{4}", "4", "boxed"),
    (r"\boxed{ \frac{\sqrt{2}}{3} }", r"\frac{\sqrt{2}}{3}", "boxed"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}", "boxed"),
    (r"\boxed{\left\{ 1 \right.}", r"\left\{ 1 \right.", "boxed"),  # the escaped brace opens nothing
    (r"\boxed{\boxed{5}}", "5", "boxed"),
    ("\\boxed{\n 5\n}", "5", "boxed"),
    (r"\boxed 5", "5", "boxed"),
    (r"$\boxed 42$ it is", "42", "boxed"),
    (r"\boxed 5 apples.", "5", "boxed"),
    (r"$\boxed\frac12$", r"\frac12", "boxed"),
    (r"\boxed{3}. I put it in \boxed{}", "3", "boxed"),
    (r"\boxed{3}. See \boxedfoo{9}", "3", "boxed"),
    (r"$\boxed{\frac{1}{2}$ is it", r"\frac{1}{2}", "boxed_unclosed"),
    ("\\boxed{17\nand more", "17", "boxed_unclosed"),
    (r"\boxed{12", None, "unparsed"),  # 12 may have become 123
    (r"The answer is 12. \boxed{1", None, "unparsed"),
    (r"\boxed{5} no, \boxed{\frac{1}", None, "unparsed"),
    (r"\boxed{" + "1" * BOX_CHARS + "}", None, "unparsed"),
    (r"\boxed{8}" + r"\boxed{}" * (LAST_BOXES - 1), "8", "boxed"),
    ("It makes <<3*6=18>>18.\n#### 18", "18", "hash_mark"),
    ("#### 1,234", "1,234", "hash_mark"),
    ("#### Step 2\nSo 7.", "7", "last_number"),  # a heading
    ("The answer is 42.", "42", "answer_phrase"),
    ("**Answer:** 42", "42", "answer_phrase"),
    ("Answer: $\\frac12$.", "\\frac12", "answer_phrase"),
    ("The final answer to this is:\n\n\\[ \\frac{3}{4} \\]", "\\frac{3}{4}", "answer_phrase"),
    ("The answer is 3 + 4i.", "3 + 4i", "answer_phrase"),
    ("The answer is 12 eggs, as 20 - 8 = 12.", "12", "answer_phrase"),
    ("So the answer is that there are 9 of them.", "9", "answer_phrase"),
    ("The answer is Evelyn.", "Evelyn", "answer_phrase"),
    ("答案是 15。", "15", "answer_phrase"),
    ("答案是18个。", "18", "answer_phrase"),
    ("一共有18个鸡蛋", "18", "last_number"),
    ("The answer is 4. Or rather, the answer is $5$", "5", "answer_phrase"),
    ("Therefore $x = \\frac{1}{2}$.", "x = \\frac{1}{2}", "last_formula"),  # and not the number 2
    ("With $x$ people there are 12.", "12", "last_number"),
    ("It costs $5 and then $6.", "$6", "last_number"),
    ("so x=-3", "-3", "last_number"),
    ("so 8-3", "3", "last_number"),
    ("so 12.5.", "12.5", "last_number"),
    ("Hello.", None, "unparsed"),
    ("the 3rd of x2", None, "unparsed"),
    ("", None, "unparsed"),
]


@pytest.mark.parametrize(("text", "answer", "rule"), EXTRACTIONS)
def test_the_first_rule_that_matches_extracts_the_answer(text: str, answer: str | None, rule: str) -> None:
    extraction = extract(text)
    assert (extraction.answer, extraction.rule) == (answer, rule)


@given(st.text(alphabet="\\boxedf{}$ anwrs:#12.\n()[]", max_size=300))
@settings(max_examples=300, deadline=None)
def test_any_text_is_accepted_and_unparsed_means_no_answer(text: str) -> None:
    extraction = extract(text)
    assert (extraction.answer is None) == (extraction.rule == "unparsed")


nested = st.recursive(
    st.text(alphabet="ab12+ ", min_size=1), lambda inner: st.builds("x{{{}}}y".format, inner), max_leaves=8
)


@given(st.text(max_size=100), nested)
@settings(deadline=None)
def test_the_content_of_a_box_is_extracted_exactly(before: str, content: str) -> None:
    if content.strip():
        assert extract(f"{before} \\boxed{{{content}}} done").answer == content.strip()


TEN_MB = {
    "open boxes": "\\boxed{" * 1_400_000,
    "empty boxes": "\\boxed{}" * 1_200_000,
    "digits": "9" * 10_000_000,
    "phrases": "the answer is " * 700_000,
    "marks": "#### 1\n" * 1_400_000,
}


@pytest.mark.parametrize("name", TEN_MB)
def test_a_long_text_is_extracted_from_its_end_alone(name: str) -> None:
    end = TEN_MB[name][-(TAIL_CHARS + LAST_BOXES * BOX_CHARS) :]
    assert extract(TEN_MB[name]) == extract(end)
