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
            forms = {_within_messages(row[names[0]], names[0], path) for row in rows}
            if len(forms) > 1:
                raise DataError(f"{path}: field {names[0]!r} is a text in some rows and a message in others")
            fields[name] += forms.pop()
    after = config.answer_after
    if after == AUTO:
        in_all = all(GSM8K_MARK in str(row.get(fields["answer"])) for row in rows)
        after = GSM8K_MARK if in_all else None
    read = ", ".join(f"{name} from {fields[name]!r}" for name in guessed if fields[name] is not None)
    read += f", the answer after {after!r}" if after else ""
    print(f"{path}: {read} ({section}.fields.{guessed[0]}=FIELD changes it)")
    return config.model_copy(update={"fields": config.fields.model_copy(update=fields), "answer_after": after})


def _within_messages(value: Any, name: str, path: Path) -> str:
    """ ".0.content" of a prompt that is a list of one chat message, "" of a text."""
    if isinstance(value, list):
        if len(value) == 1 and isinstance(value[0], dict) and "content" in value[0]:
            return ".0.content"
        raise DataError(
            f"{path}: field {name!r} holds {len(value)} messages; set fields.prompt, such as {name}.1.content"
        )
    return ""
