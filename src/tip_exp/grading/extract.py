r"""Extraction of the answer from a response. Rules, in order; the first that matches wins:

    boxed            the last \boxed{...} or \fbox{...} that is not empty, also `\boxed 5`
    boxed_unclosed   the last box, if a brace is missing before the end of its formula or line: $\boxed{\frac{1}{2}$
    hash_mark        a line `#### 18`
    answer_phrase    "the answer is ...", "Answer: ..."
    last_formula     the last $...$, \(...\) or \[...\] that is not denied ("not $5$"), unless a plain number follows it
    last_number      the last number that is not denied
    unparsed         nothing

If the text ends inside a box, the result is "unparsed": the answer was not finished, and 12 may have become 123.

Extraction takes linear time for any text: it looks at the last LAST_BOXES boxes, anywhere in the text, with at most
BOX_CHARS of content each; all other rules see the last TAIL_CHARS characters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from tip_exp.grading.types import Extraction

LAST_BOXES = 8
BOX_CHARS = 2_000
TAIL_CHARS = 4_000

UNPARSED = Extraction(answer=None, rule="unparsed")

_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is a symbol
_FORMULA_END = re.compile(r"\$|\\\)|\\\]|\n")
_BARE_START = re.compile(r"[-+.]?\d|[-+]?\\[a-zA-Z]|[(\[]|[-+]?[a-zA-Z](?![a-zA-Z])")

# Excludes the 3 of "x3" and "\frac3"; a sign is part of the number unless it is a subtraction.
_NUMBER = r"(?<![\w.\\])(?:(?<![)}\]])[-+−])?\\?\$?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:/\d+)?(?!\w)"
_LAST_NUMBER = re.compile(_NUMBER, re.ASCII)  # 18个 holds a number
_LEADING_NUMBER = re.compile(rf"\W{{0,3}}?({_NUMBER})", re.ASCII)
_HASH_MARK = re.compile(r"^####[ \t]*([-+]?\$?\d[\d,./]*%?)[ \t]*$", re.MULTILINE)
_FORMULA = re.compile(
    r"\$\$([^$]{1,400})\$\$|\$([^$\n]{1,400})\$(?!\d)|\\\(([^\n]{1,400}?)\\\)|\\\[(.{1,400}?)\\\]", re.DOTALL
)
_ANSWER_PHRASE = re.compile(
    r"\banswers?\b[^.:=\n]{0,60}?(?:\bis\b|\bare\b|[:=])[\s:*_]*|答案\s{0,4}[是为]?\s{0,4}[:：]?\s{0,4}", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"\n|。|[.!?](?=\s|\**\s|\**$)")
_DENIAL = re.compile(r"\b(?:not|cannot|never)\b|n't\b", re.IGNORECASE)
# What precedes a number or formula that is denied: "not ", "isn't equal to $".
_DENIED = re.compile(r"(?:\b(?:not|cannot|never)|n['’]t)\s+(?:[a-z]+\s+){0,3}[$\\(\[]{0,2}$", re.IGNORECASE)
_WORD = re.compile(r"(?<![\\a-zA-Z])(?!(?:sqrt|sin|cos|tan|cot|sec|csc|log|exp|inf)\b)[a-zA-Z]{3,}|[\u4e00-\u9fff]")


@dataclass(frozen=True, slots=True)
class Box:
    r"""Box(content="5", closed=True) of `\boxed{5}`; closed=False: no closing brace within BOX_CHARS characters."""

    content: str
    closed: bool


def extract(text: str) -> Extraction:
    """The answer in a response, by the first rule that matches."""
    for box in boxes_from_the_end(text):
        if not box.closed:
            return _unclosed(box)
        if box.content:
            return Extraction(box.content, "boxed")
    tail = text[-TAIL_CHARS:]
    if marks := _HASH_MARK.findall(tail):
        return Extraction(marks[-1], "hash_mark")
    for phrase in reversed(list(_ANSWER_PHRASE.finditer(tail))):
        if answer := _read_sentence(tail[phrase.end() :]):
            return Extraction(answer, "answer_phrase")
    return _last_formula_or_number(tail, whole=len(tail) == len(text))


def boxes_from_the_end(text: str) -> Iterator[Box]:
    r"""The last LAST_BOXES uses of \boxed or \fbox, last first."""
    end = len(text)
    for _ in range(LAST_BOXES):
        start, command = max((text.rfind(command, 0, end), command) for command in (r"\boxed", r"\fbox"))
        if start < 0:
            return
        begin = start + len(command)
        yield _read_box(text[begin : begin + BOX_CHARS])
        end = start


def _read_box(after: str) -> Box:
    """The content of a box, given the text after its command."""
    inside = after.lstrip()
    if not inside.startswith("{"):
        other_command = after[:1].isalpha()
        return Box("" if other_command else _bare_content(inside), closed=True)
    depth = 0
    for brace in _BRACE.finditer(inside):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return Box(inside[1 : brace.start()].strip(), closed=True)
    return Box(inside[1:].lstrip(), closed=False)


def _bare_content(inside: str) -> str:
    r"""Content of a box without braces: its formula to the end (`\boxed\frac12$`), or one word; of prose, nothing."""
    if not _BARE_START.match(inside):
        return ""
    end = _FORMULA_END.search(inside)
    if end and end.group() != "\n":
        return inside[: end.start()].strip()
    return inside.split(maxsplit=1)[0].rstrip(".,;:")


def _unclosed(box: Box) -> Extraction:
    end = _FORMULA_END.search(box.content)
    content = box.content[: end.start()].strip() if end else ""
    return Extraction(content, "boxed_unclosed") if content else UNPARSED


def _read_sentence(text: str) -> str | None:
    """What follows "the answer is": a formula, a bare expression, one number or a few words; None if none of these."""
    text = text[: BOX_CHARS // 2]
    if formula := _FORMULA.match(text):
        return _inside(formula)
    end = _SENTENCE_END.search(text)
    sentence = text[: end.start() if end else len(text)].strip(" \t*_`\"'")
    if not sentence or _DENIAL.search(sentence):
        return None
    formulas = list(_FORMULA.finditer(sentence))
    if len(formulas) == 1:
        return _inside(formulas[0])
    if not _WORD.search(sentence):
        return sentence.rstrip(",;:")
    if leading := _LEADING_NUMBER.match(sentence):
        return leading.group(1)
    numbers = _LAST_NUMBER.findall(sentence)
    if len(numbers) == 1:
        return numbers[0]
    return sentence if not numbers and len(sentence.split()) <= 5 else None


def _last_formula_or_number(tail: str, *, whole: bool) -> Extraction:
    formula, number = _last(_FORMULA, tail), _last(_LAST_NUMBER, tail)
    if number and not whole and number.start() == 0:
        number = None  # its first digits may be before the tail
    if formula and not (number and number.start() >= formula.end()):
        return Extraction(_inside(formula), "last_formula")
    return Extraction(number.group(), "last_number") if number else UNPARSED


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    """The last match that is not denied: the answer is not 5 in "The answer is not 5"."""
    for match in reversed(list(pattern.finditer(text))):
        if not _DENIED.search(text[max(0, match.start() - 60) : match.start()]):
            return match
    return None


def _inside(formula: re.Match[str]) -> str:
    return next(group for group in formula.groups() if group is not None).strip()
