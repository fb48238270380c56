"""`tip-exp score`: the statistics of the tokens of a file, as Parquet and as a summary of the quadrants."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tip_exp.api.columns import COLUMNS, ON_REQUEST
from tip_exp.config.machine_rules import not_a_model
from tip_exp.utils.errors import DataError, exit_on_error
from tip_exp.utils.io import json_objects, to_json
from tip_exp.utils.paths import HUB_ID, is_file, not_writable, resolve_model

JSON_LINES = (".jsonl", ".json")
TABLES = (".parquet", ".csv")  # what --out may be
LARGEST = 10  # tokens that the summary lists


def main(arguments: list[str]) -> None:
    """An error that a user can cause is one message without a traceback, as in `tip-exp`."""
    options = _parser().parse_args(arguments)
    with exit_on_error(ValueError, TypeError, OSError, FloatingPointError):
        _score(options)


def read_texts(path: Path) -> tuple[list[str], list[Any] | None]:
    """Texts, and their prompts if the file has them: JSON lines {"prompt", "response"} or {"text"}, else plain lines.

    Raises DataError that names the line.
    """
    if path.suffix not in JSON_LINES:
        try:
            lines = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is no text in UTF-8 ({error})") from None
        if not lines:
            raise DataError(f"{path} has no line with a text")
        return lines, None
    rows: list[dict[str, Any]] = []
    try:
        objects = list(json_objects(path))
    except DataError as error:
        raise DataError(f"{error}; plain lines need a name like texts.txt") from None
    for where, row in objects:
        if not isinstance(row.get("response", row.get("text")), str):
            raise DataError(f'{where}: needs "response" with "prompt", or "text"; got {to_json(row)[:80]}')
        if ("prompt" in row) != ("prompt" in (rows or [row])[0]):
            raise DataError(f'{where}: either every line has a "prompt" or none')
        rows.append(row)
    if not rows:
        raise DataError(f"{path} has no line with a text")
    texts = [str(row.get("response", row.get("text"))) for row in rows]
    return texts, [row["prompt"] for row in rows] if "prompt" in rows[0] else None


def summary(stats: Any) -> str:
    """The size of a table of `score` and, with the columns for it, each quadrant's share and the largest tokens."""
    from tabulate import tabulate

    head = f"{len(stats)} response tokens of {stats['sequence'].nunique()} sequences"
    if not {"quadrant", "entropy", "reverse_kl"} <= set(stats) or stats.empty:
        return head
    total = float(stats["reverse_kl"].sum())
    rows: list[list[Any]] = []
    for name, part in sorted(stats.groupby("quadrant")):
        share = part["reverse_kl"].sum() / total if total > 0 else 0.0
        means = part["entropy"].mean(), part["reverse_kl"].mean()
        kept = [f"{part['kept'].mean():.1%}"] if "kept" in part else []
        rows.append(
            [name, len(part), f"{len(part) / len(stats):.1%}", f"{share:.1%}", *map("{:.3f}".format, means), *kept]
        )
    headings = ["quadrant", "tokens", "share", "of reverse KL", "mean entropy", "mean reverse KL"]
    headings += ["kept"] if "kept" in stats else []
    return f"{head}\n{tabulate(rows, headings, disable_numparse=True)}\n\n{_largest(stats)}"


def _largest(stats: Any) -> str:
    """The LARGEST tokens by reverse KL, and where each stands."""
    from tabulate import tabulate

    names = ["sequence", "position", *(["token"] if "token" in stats else ["token_id"])]
    names += ["reverse_kl", "entropy", "quadrant", *(["kept"] if "kept" in stats else [])]
    top = stats.nlargest(LARGEST, "reverse_kl")[names]
    cells: dict[str, Callable[[Any], str]] = {
        "token": lambda text: json.dumps(text, ensure_ascii=not text.isprintable()),
        "reverse_kl": "{:.3f}".format,
        "entropy": "{:.3f}".format,
    }
    rows = [[cells.get(name, str)(value) for name, value in zip(names, row, strict=True)] for row in top.to_numpy()]
    return f"largest reverse KL\n{tabulate(rows, names, disable_numparse=True)}"


def _score(options: argparse.Namespace) -> None:
    changes = _checked_changes(options)
    texts, prompts = read_texts(options.texts)
    from transformers.utils import logging

    from tip_exp.api.score import score
    from tip_exp.api.select import make_selector, select

    selector = None
    if options.selector is not None:
        selector = make_selector(options.selector, **changes)
        if options.statistics and (lacking := sorted(selector.required_stats - set(options.statistics))):
            raise DataError(f"--statistics lacks {', '.join(lacking)}, which --selector {options.selector} reads")
    logging.disable_progress_bar()
    stats = score(
        options.student,
        options.teacher,
        texts,
        prompts=prompts,
        statistics=options.statistics,
        chat=options.chat,
        device=options.device,
        dtype=options.dtype,
        micro_batch_tokens=options.micro_batch_tokens,
    )
    if selector is not None:
        stats["kept"] = select(stats, selector).kept
    print(summary(stats))
    if options.out is not None:
        if options.out.suffix == ".csv":
            stats.to_csv(options.out, index=False)
        else:
            stats.to_parquet(options.out)
        print(f"{options.out}: {len(stats)} rows, columns {', '.join(stats)}")


def _checked_changes(options: argparse.Namespace) -> dict[str, Any]:
    """Check every option without torch; return the selector keys that they change. Raises ConfigError, DataError."""
    if not options.texts.exists() or options.texts.is_dir():
        raise DataError(f"--texts: there is no file {options.texts}")
    if (out := options.out) is not None:
        if out.suffix not in TABLES:
            raise DataError(f"--out: a name that ends in {' or '.join(TABLES)}; got {out}")
        if not out.parent.is_dir():
            raise DataError(f"--out: there is no folder {out.parent}")
        if problem := not_writable(out):
            raise DataError(f"--out: {problem}")
    columns = (*COLUMNS, *ON_REQUEST)
    for name in options.statistics or ():
        if name not in columns:
            close = difflib.get_close_matches(name, columns, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise DataError(f"--statistics: there is no {name}{hint}; there are {', '.join(columns)}")
    for role in ("student", "teacher"):
        path = getattr(options, role)
        if not HUB_ID.fullmatch(path) and not is_file(f"{resolve_model(path)}/config.json"):
            raise DataError(not_a_model(f"--{role}", path))
    if options.retention is not None and options.selector is None:
        raise DataError("--retention needs --selector")
    changes = {} if options.retention is None else {"retention": options.retention}
    if options.selector is not None:
        from tip_exp.config.parse import typed_selector
        from tip_exp.config.presets import check_selector_name, selector_preset

        check_selector_name(options.selector)
        typed_selector(selector_preset(None) | {"label": "-", "score": "entropy"} | changes)  # types alone
    return changes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tip-exp score",
        allow_abbrev=False,
        description="Statistics of every token of a file under a student and a teacher: a summary, with --out a table.",
        epilog="example: tip-exp score --student package:tiny/student --teacher package:tiny/teacher --texts my.jsonl",
    )
    parser.add_argument("--student", required=True, help="a folder, a hub id, or package:… for what the package ships")
    parser.add_argument("--teacher", required=True, help="the same; it needs the student's tokenizer")
    texts = 'JSON lines {"prompt", "response"} or {"text"} in a .jsonl file; in any other a text per line'
    parser.add_argument("--texts", required=True, type=Path, metavar="FILE", help=texts)
    parser.add_argument("--out", type=Path, metavar="FILE.parquet", help="write the table there; .csv writes CSV")
    parser.add_argument("--selector", metavar="NAME", help="add a column kept: soft_or, q3, … or my_module:my_rule")
    parser.add_argument("--retention", type=float, help="share of the tokens that --selector keeps")
    parser.add_argument(
        "--statistics",
        type=lambda text: text.split(","),
        metavar="A,B",
        help="columns to measure (default: all but influence, which needs gradients); the summary of quadrants needs "
        "entropy, reverse_kl and quadrant",
    )
    parser.add_argument(
        "--no-chat", dest="chat", action="store_false", help="read prompts as they are, without a chat template"
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--dtype", default="auto", help="of the weights: float32, bfloat16 (default: as saved)")
    parser.add_argument(
        "--micro-batch-tokens", type=int, default=16_384, help="positions of one forward pass (default: 16384)"
    )
    return parser
