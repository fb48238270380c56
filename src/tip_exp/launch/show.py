"""`tip-exp show` and `tip-exp compare`: what runs are, how far they are, what they reached and how they differ."""

from __future__ import annotations

import argparse
import json
import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tip_exp.config.parse import flatten, load
from tip_exp.launch.announce import change, opening
from tip_exp.launch.lock import holder
from tip_exp.records import metrics
from tip_exp.records.folder import RunFolder, last_error, numbered_checkpoints
from tip_exp.records.integrity import Depth, remedy
from tip_exp.records.reader import RunRecord, read_run, runs_below
from tip_exp.report.run_files import read_metrics
from tip_exp.utils.errors import DataError, exit_on_error, first_line

if TYPE_CHECKING:
    from tip_exp.report.arms import ArmResult

# metrics of a step with lines of their own
UNSHOWN = (metrics.EVAL, metrics.TEACHER, metrics.MEMORY, metrics.SHADOW, "time/", "step")
DAMAGED = "damaged"
UNCOMPARED = ("name", "sweep", "logger")  # sections of a config that say nothing of the numbers


def show(arguments: list[str]) -> None:
    """Print each run below the given folders: in full if it is one, else a line each."""
    parser = argparse.ArgumentParser(
        prog="tip-exp show", allow_abbrev=False, description="Configuration, state and results of runs."
    )
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("outputs")], help="runs, or folders of runs")
    parser.add_argument("--verify", action="store_true", help="compare the SHA-256 of all files of finished runs")
    given = parser.parse_args(arguments)
    with exit_on_error(ValueError, OSError):
        print(_described(runs_below(given.folders), "all" if given.verify else "rows"))


def compare(arguments: list[str]) -> None:
    """Print the keys in which two runs or sweeps differ, and their results side by side."""
    parser = argparse.ArgumentParser(
        prog="tip-exp compare",
        allow_abbrev=False,
        description="How two runs or sweeps differ: configuration and results.",
    )
    for name in "ab":
        parser.add_argument(name, type=Path, metavar=name.upper(), help="a run's folder, or a folder of runs")
    given = parser.parse_args(arguments)
    with exit_on_error(ValueError, OSError):
        print(_compared([_records([given.a]), _records([given.b])]))


def _records(folders: list[Path]) -> list[RunRecord]:
    """Raises DataError, which names the run, if one is damaged."""
    records: list[RunRecord] = []
    for run in runs_below(folders):
        try:
            records.append(read_run(run))
        except ValueError as error:
            raise DataError(f"{run.root} is damaged: {first_line(error)}") from error
    return records


def _described(runs: list[RunFolder], depth: Depth) -> str:
    if len(runs) == 1:
        return _in_full(runs[0], depth)
    lines = [(str(run.root), *_state(run, _read(run, depth), depth)) for run in runs]
    widths = [max(len(line[i]) for line in lines) for i in (0, 1)]
    return "\n".join(f"{root:<{widths[0]}}  {state:<{widths[1]}}  {reached}" for root, state, reached in lines)


def _in_full(run: RunFolder, depth: Depth) -> str:
    read = _read(run, depth)
    state, _ = _state(run, read, depth)
    try:
        lines = [opening(load(run.config), run), f"state: {state}"]
    except (ValueError, OSError) as error:  # torn, missing, or of another version
        lines = [f"{run.root}: {error}", f"state: {state}"]
    if isinstance(read, str):
        return "\n".join([*lines, remedy(run, state)])
    record, rows = read
    config = record.config
    if run.overrides.exists():
        typed = yaml.safe_load(run.overrides.read_text(encoding="utf-8")) or []
        start = f"sweep: {config['sweep']}, with" if config.get("sweep") else "command: tip-exp"
        lines.append(f"{start} {shlex.join(map(str, typed))}")
    lines += [metrics.format_accuracies(row["step"], row) for row in rows if _is_evaluation(row)]
    if steps := [row for row in rows if row["step"] > 0]:
        names = sorted(name for name in steps[-1] if not name.startswith(UNSHOWN))
        width = max(map(len, names))
        lines.append(f"metrics of step {steps[-1]['step']}:")
        lines += [f"  {name:<{width}}  {_number(steps[-1][name])}" for name in names]
        lines.append(_shadows(config["selector"], steps))
    if result := record.result:
        totals = ", ".join(f"{name} {_number(value)}" for name, value in result["totals"].items())
        lines += [f"totals: {totals}", f"model: {run.model}" if run.model.exists() else ""]
        lines.append(f"finished {result['finished_at']} on {result['hardware']}; next: tip-report {run.root}")
    return "\n".join(line for line in lines if line)


def _number(value: float | None) -> str:
    """ "-" for null, which stands for a number that is not finite."""
    return "-" if value is None else f"{value:.5g}"


def _shadows(selector: dict[str, Any], steps: list[dict[str, Any]]) -> str:
    """A table of what the selector and its shadows keep at the newest step that scored them; "" if none did."""
    from tip_exp.report.shadows import COLUMNS
    from tip_exp.report.tables import Table, markdown

    row = next((row for row in reversed(steps) if any(name.startswith(metrics.SHADOW) for name in row)), None)
    if row is None:
        return ""

    def percent(name: str) -> str:
        return "-" if row.get(name) is None else f"{100 * row[name]:.1f} %"

    rows = [[selector["label"], *(percent(name) for name in COLUMNS.values())]]
    for rule in selector.get("shadows", []):
        rows.append([rule, *(percent(metrics.of_shadow(rule, name)) for name in COLUMNS.values())])
    title = f"Shadow selectors at step {row['step']}"
    note = f"Overlap: Jaccard index with the tokens that {selector['label']} trains on."
    return markdown(Table(title, ["selector", *COLUMNS], rows, notes=[note]))


def _is_evaluation(row: dict[str, Any]) -> bool:
    return any(name.startswith((metrics.EVAL, metrics.TEACHER)) for name in row)


def _read(run: RunFolder, depth: Depth) -> tuple[RunRecord, list[dict[str, Any]]] | str:
    """A run's record and the rows of its metrics, or "damaged: …"."""
    try:
        record = read_run(run, depth)
        return record, read_metrics(record)
    except (ValueError, OSError) as error:
        return f"{DAMAGED}: {first_line(error)}"


def _state(run: RunFolder, read: tuple[RunRecord, list[dict[str, Any]]] | str, depth: Depth) -> tuple[str, str]:
    """The state, and what a finished run reached.

    "done", "damaged: …", "running at step 7 of 40, by process 12 …", "stopped at step 7 of 40, resumes from step 5",
    "failed at step 7 of 40, resumes from step 5: out of disk space"
    """
    if isinstance(read, str):
        return read, ""
    record, rows = read
    if record.result:
        verified = ", every file has the SHA-256 in result.json" if depth == "all" and "files" in record.result else ""
        evaluation = record.config["eval"]
        names = [metrics.main_accuracy(benchmark, evaluation["samples"]) for benchmark in evaluation["benchmarks"]]
        reached = [f"{name} {change(record.result, name)}" for name in names]
        return f"done{verified}", "; ".join(reached)
    at = f"at step {rows[-1]['step'] if rows else 0} of {record.config['learner']['num_steps']}"
    if process := holder(run.lock):
        return f"running {at}, by {process.partition(';')[0]}", ""
    saved, error = max(numbered_checkpoints(run.checkpoints), default=0), last_error(run)
    return f"{'failed' if error else 'stopped'} {at}, resumes from step {saved}{error and f': {error}'}", ""


def _compared(sides: list[list[RunRecord]]) -> str:
    """Two tables: the keys with other values, and the results of the runs that correspond to each other."""
    from tip_exp.report.tables import Table, markdown

    flat = [[_settings(record) for record in records] for records in sides]
    keys = sorted({key for configs in flat for config in configs for key in config})
    values = {key: [_values(configs, key) for configs in flat] for key in keys}
    rows = [[key, *texts] for key, texts in values.items() if texts[0] != texts[1]]
    names = [f"{letter}: {_name(records)}" for letter, records in zip("AB", sides, strict=True)]
    parts = [markdown(Table("Configuration", ["key", *names], rows))] if rows else ["The configurations are equal."]
    results, notes = _results(sides)
    if results:
        headings = ["arm", "benchmark", "A, %", "B, %", "B - A [95 %], points", "kept", "loss MiB", "seconds"]
        about = "Accuracies ± standard error; differences are on the same problems. A -> B: kept, loss MiB, seconds."
        parts.append(markdown(Table("Results", headings, results, notes=[about])))
    else:
        parts.append("No arm is finished in both.")
    return "\n\n".join([*parts, *notes])


def _results(sides: list[list[RunRecord]]) -> tuple[list[list[str]], list[str]]:
    """A row for each benchmark and two arms that correspond, and a line for each side with arms that have none."""
    from tip_exp.report.arms import summarize
    from tip_exp.report.columns import percent, points
    from tip_exp.report.significance import compare as difference

    arms = [[arm for arm in summarize(records) if arm.seeds] for records in sides]
    pairs = _pairs(arms)

    def both(form: str, name: str, scale: float = 1.0) -> str:
        numbers = [scale * getattr(arm, name) for arm in (a, b)]
        return " -> ".join("-" if math.isnan(number) else form.format(number) for number in numbers)

    rows: list[list[str]] = []
    for a, b in pairs:
        row = [" -> ".join(dict.fromkeys(map(_arm_name, (a, b)))), a.benchmark, percent(a.final), percent(b.final)]
        row += [points(difference(b.scores, a.scores)), both("{:.1f} %", "kept_frac", 100)]
        rows.append([*row, both("{:.1f}", "loss_mib"), both("{:.0f}", "wall_s")])
    notes: list[str] = []
    for side, of_side in enumerate(arms):
        paired = [id(pair[side]) for pair in pairs]
        alone = [f"{_arm_name(arm)} on {arm.benchmark}" for arm in of_side if id(arm) not in paired]
        notes += [f"Finished in {'AB'[side]} alone: {', '.join(alone)}."] if alone else []
    return rows, notes


def _pairs(arms: list[list[ArmResult]]) -> list[tuple[ArmResult, ArmResult]]:
    """The only arm of each side, else arms of equal benchmark, pair, data, selector and retention.

    Of several such arms those with equal values of each key that has a value in common on both sides.
    """
    from tip_exp.report.arms import SHOWN_FIELDS, differing_keys, group_by

    is_one_each = all(len({arm.identity for arm in of_side}) == 1 for of_side in arms)
    groups = [group_by(of_side, *(["benchmark"] if is_one_each else SHOWN_FIELDS)) for of_side in arms]
    pairs: list[tuple[ArmResult, ArmResult]] = []
    for shown, of_a in groups[0].items():
        of_b = groups[1].get(shown, [])
        values = {
            key: [{json.dumps(arm.config.get(key)) for arm in of_side} for of_side in (of_a, of_b)]
            for key in differing_keys([*of_a, *of_b])
        }
        common = [key for key, (in_a, in_b) in values.items() if in_a & in_b]
        pairs += [(a, b) for a in of_a for b in of_b if a.values_of(common) == b.values_of(common)]
    return pairs


def _arm_name(arm: ArmResult) -> str:
    """With what tells it from arms of its side that look alike."""
    return f"{arm.selector} {100 * arm.retention:g} %" + (f" ({arm.differs})" if arm.differs else "")


def _settings(record: RunRecord) -> dict[str, Any]:
    return flatten({key: value for key, value in record.config.items() if key not in UNCOMPARED})


def _values(configs: list[dict[str, Any]], key: str) -> str:
    """The distinct values in the order of the runs; "-" where no run has the key."""
    texts = dict.fromkeys(json.dumps(config[key], ensure_ascii=False) for config in configs if key in config)
    return ", ".join(text.strip('"') for text in texts) or "-"


def _name(records: list[RunRecord]) -> str:
    return records[0].config["name"] if len(records) == 1 else f"{Path(records[0].folder).parent} ({len(records)} runs)"
