"""The fields of a table whose config leaves them to be guessed: the first usual name that its rows have."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tip_exp.utils.errors import DataError

if TYPE_CHECKING:
    from tip_exp.config.datasets import TableConfig

AUTO = "auto"
USUAL_NAMES = {
    "prompt": ("problem", "question", "prompt", "input", "query", "instruction"),
    "answer": (
        *("answer", "final_answer", "expected_answer", "ground_truth", "reward_model.ground_truth", "target", "label"),
        *("output", "solution"),
    ),
    "solution": ("solution", "rationale", "reasoning", "explanation"),
    "id": ("id", "unique_id", "problem_id", "uuid"),
}
WORKED = ("output", "solution")  # names of answers that may be worked solutions
GSM8K_MARK = "####"  # the answer of GSM8K's `answer` field follows it
BOX = r"\boxed"  # as `answer_after`: the answer is the content of the last box
MAX_NAMED = 20  # fields in a message


def with_fields(config: TableConfig, rows: list[dict[str, Any]], path: Path, section: str) -> TableConfig:
    """`config` with a name, or null, for each field that is auto, and a line for the terminal that says which.

    A field counts if every row has it. Raises DataError, which names the rows' fields, without a prompt, and for a
    benchmark without an answer; the answer of training problems without one is "".
    """
    guessed = [name for name in USUAL_NAMES if getattr(config.fields, name) == AUTO]
    if not rows or not (guessed or config.answer_after == AUTO):
        return config
    fields, after, trains = config.fields.model_dump(), config.answer_after, config.split == "train"
    for name in guessed:
        taken = [other for part, other in fields.items() if part != name and other != AUTO]
        names = [usual for usual in USUAL_NAMES[name] if usual not in taken and _is_common(usual, rows)]
        if not names and name in ("prompt", "answer"):
            for usual in USUAL_NAMES[name]:
                if 0 < (number := sum(_lookup(row, usual) is not None for row in rows)) < len(rows):
                    row = next(i for i, row in enumerate(rows, 1) if _lookup(row, usual) is None)
                    raise DataError(f"{path}, row {row}: no {usual!r}, which {number} of {len(rows)} rows have; add it")
            if name == "prompt" or not trains:
                common = [part for part in _paths(rows[0]) if _is_common(part, rows)]
                raise DataError(
                    f"{path}: no field of every row is called {', '.join(USUAL_NAMES[name])}; set "
                    f"{section}.fields.{name} to one of {', '.join(common[:MAX_NAMED]) or '(none)'}"
                )
        if name == "id" and not trains:  # repeated training problems are dropped
            names = [usual for usual in names if len({str(row[usual]) for row in rows}) == len(rows)]
        fields[name] = names[0] if names else "" if name == "answer" else None
        if names and name == "prompt":
            key = f"{section}.fields.prompt"
            forms = {
                _within_messages(row[names[0]], names[0], key, f"{path}, row {number}")
                for number, row in enumerate(rows, 1)
            }
            if len(forms) > 1:
                raise DataError(f"{path}: field {names[0]!r} is a text in some rows and a message in others")
            fields[name] += forms.pop()
        is_worked = name == "answer" and fields[name] in WORKED and after == AUTO
        if is_worked and not _mark(rows, fields[name], path, trains):
            if not trains:
                raise DataError(
                    f"{path}: field {fields[name]!r} of some rows has neither {BOX} nor {GSM8K_MARK}, so it may be a "
                    f"worked solution; set {section}.fields.answer to the name of the field with the final answer"
                )
            fields[name] = ""
    if after == AUTO:
        after = _mark(rows, fields["answer"], path, trains) if fields["answer"] else None
    read = [f"{name} from {fields[name]!r}" for name in guessed if fields[name]]
    read += [f"the answer after {after!r}"] if after else []
    if read:
        hint = f" ({section}.fields.{guessed[0]}=FIELD changes it)" if guessed else ""
        print(f"{path}: {', '.join(read)}{hint}")
    return config.model_copy(update={"fields": config.fields.model_copy(update=fields), "answer_after": after})


def _mark(rows: list[dict[str, Any]], field: str, path: Path, trains: bool) -> str | None:
    """GSM8K_MARK or BOX, if every answer has it. DataError if only some answers of a benchmark have GSM8K's."""
    answers = [str(value_of(row, field, f"{path}, row {number}")) for number, row in enumerate(rows, 1)]
    without = [number for number, answer in enumerate(answers, 1) if GSM8K_MARK not in answer]
    if not without:
        return GSM8K_MARK
    if all(BOX in answer for answer in answers):
        return BOX
    if len(without) < len(rows) and not trains:
        raise DataError(
            f"{path}, row {without[0]}: {field} has no {GSM8K_MARK!r}, which {len(rows) - len(without)} of {len(rows)} "
            "rows have; add it"
        )
    return None


def _lookup(row: dict[str, Any], field: str) -> Any:
    """A field by its name or dotted path; None if the row does not have it."""
    value: Any = row
    try:
        for key in _keys(row, field):
            value = value[int(key)] if isinstance(value, list) else value[key]
    except (KeyError, IndexError, TypeError, ValueError):
        return None
    return value


def _keys(row: dict[str, Any], field: str) -> list[str]:
    """The parts of a dotted path; a name with dots that the row has is one part."""
    return [field] if field in row else field.split(".")


def _is_common(field: str, rows: list[dict[str, Any]]) -> bool:
    return all(_lookup(row, field) is not None for row in rows)


def _paths(value: Any, path: str = "") -> Iterator[str]:
    """Dotted paths of a row's texts and numbers; of a list that of its first item."""
    if isinstance(value, list):
        value = {"0": value[0]} if value else {}
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _paths(item, f"{path}.{key}" if path else str(key))
    else:
        yield path


def value_of(row: dict[str, Any], field: str, location: str) -> Any:
    """A field by its dotted path: "reward_model.ground_truth", "prompt.0.content". Bytes are decoded."""
    value: Any = row
    for key in _keys(row, field):
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
