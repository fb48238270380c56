"""The fields of a table whose config leaves them to be guessed: the first usual name that its rows have."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tip_exp.utils.errors import DataError

if TYPE_CHECKING:
    from tip_exp.config.datasets import TableConfig

AUTO = "auto"
USUAL_NAMES = {
    "prompt": ("problem", "question", "prompt", "input", "query", "instruction"),
    "answer": ("answer", "final_answer", "expected_answer", "ground_truth", "target", "label", "output", "solution"),
    "solution": ("solution", "rationale", "reasoning", "explanation"),
    "id": ("id", "unique_id", "problem_id", "uuid"),
}
NEEDED = ("prompt", "answer")
GSM8K_MARK = "#### "  # the answer of GSM8K's `answer` field follows it


def with_fields(config: TableConfig, rows: list[dict[str, Any]], path: Path) -> TableConfig:
    """`config` with a name, or null, for each field that is auto, and a line for the terminal that says which.

    A field counts if every row has it. Raises DataError, which names the rows' fields, without a prompt or an answer.
    """
    guessed = [name for name in USUAL_NAMES if getattr(config.fields, name) == AUTO]
    if not rows or not (guessed or config.answer_after == AUTO):
        return config
    section = "data.train" if config.split == "train" else "eval.benchmarks.jsonl"
    common = [key for key in rows[0] if all(row.get(key) is not None for row in rows)]
    fields = config.fields.model_dump()
    for name in guessed:
        taken = [other for part, other in fields.items() if part != name and other != AUTO]
        names = [usual for usual in USUAL_NAMES[name] if usual in common and usual not in taken]
        if not names and name in NEEDED:
            for usual in USUAL_NAMES[name]:
                if 0 < (number := sum(row.get(usual) is not None for row in rows)) < len(rows):
                    row = next(i for i, row in enumerate(rows, 1) if row.get(usual) is None)
                    raise DataError(f"{path}, row {row}: no {usual!r}, which {number} of {len(rows)} rows have; add it")
            raise DataError(
                f"{path}: no field of every row is called {', '.join(USUAL_NAMES[name])}; set {section}.fields.{name} "
                f"to one of {', '.join(common) or '(none)'}"
            )
        if name == "id" and config.split != "train":  # repeated training problems are dropped
            names = [usual for usual in names if len({str(row[usual]) for row in rows}) == len(rows)]
        fields[name] = names[0] if names else None
        if names and name == "prompt":
            key = f"{section}.fields.prompt"
            forms = {
                _within_messages(row[names[0]], names[0], key, f"{path}, row {number}")
                for number, row in enumerate(rows, 1)
            }
            if len(forms) > 1:
                raise DataError(f"{path}: field {names[0]!r} is a text in some rows and a message in others")
            fields[name] += forms.pop()
    after = config.answer_after
    if after == AUTO:
        answers = (value_of(row, fields["answer"], f"{path}, row {number}") for number, row in enumerate(rows, 1))
        after = GSM8K_MARK if all(GSM8K_MARK in str(answer) for answer in answers) else None
    read = [f"{name} from {fields[name]!r}" for name in guessed if fields[name] is not None]
    read += [f"the answer after {after!r}"] if after else []
    if read:
        hint = f" ({section}.fields.{guessed[0]}=FIELD changes it)" if guessed else ""
        print(f"{path}: {', '.join(read)}{hint}")
    return config.model_copy(update={"fields": config.fields.model_copy(update=fields), "answer_after": after})


def value_of(row: dict[str, Any], field: str, location: str) -> Any:
    """A field by its dotted path: "reward_model.ground_truth", "prompt.0.content". Bytes are decoded."""
    value: Any = row
    for key in field.split("."):
        try:
            value = value[int(key)] if isinstance(value, list) else value[key]
        except (KeyError, IndexError, TypeError, ValueError):
            keys = ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__
            raise DataError(f"{location}: no field {field!r} (at {key!r} there is: {keys})") from None
    if value is None:
        raise DataError(f"{location}: field {field!r} is empty")
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        raise DataError(f"{location}: field {field!r} holds bytes that are no text in UTF-8") from None


def _within_messages(value: Any, name: str, key: str, location: str) -> str:
    """ ".0.content" of a prompt that is a list of one chat message, "" of a text."""
    if not isinstance(value, list):
        return ""
    if not value:
        raise DataError(f"{location}: field {name!r} holds an empty list")
    are_messages = all(isinstance(item, dict) and "content" in item for item in value)
    if are_messages and len(value) == 1:
        return ".0.content"
    part = f"{name}.1.content" if are_messages else f"{name}.0"  # the first of several messages may be the system's
    raise DataError(
        f"{location}: field {name!r} holds a list of {len(value)}; set {key} to a part of it, such as {part}"
    )
