"""Many cases: each is disturbed up to three times, then launched until it ends, and judged."""

from __future__ import annotations

import json
import os
import pkgutil
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from scripts.chaos.damage import remedy
from scripts.chaos.disturb import CYCLE, HAS_VLLM, KINDS, Kind
from scripts.chaos.mounts import unmount
from scripts.chaos.settings import LIMIT_S, SETTINGS, Trial, Undisturbed, composed, numbers
from tip_exp.learner.device import pick_device
from tip_exp.models.load import load_pair
from tip_exp.records.result import git_revision

EQUAL, REFUSED, SKIPPED = "equal", "refused", "skipped"


def warm_up(*, with_vllm: bool = False) -> None:
    """What every worker would compute alone: imports and the tables that transformers makes at its first model."""
    import tip_exp.run  # noqa: F401

    if with_vllm:
        from tip_exp.rollout.vllm import engine_version

        engine_version()
        pkgutil.resolve_name("vllm:LLM")
    load_pair(composed().pair, pick_device("cpu"))


def judge(kind: Kind, trial: Trial) -> str:
    """EQUAL, REFUSED (one clear line, and its remedy leads to the same numbers), or what is wrong."""
    try:
        for _ in range(trial.draw.randint(1, kind.repeats)):
            kind.disturb(trial)
        code, outcome = trial.launch().wait(LIMIT_S), EQUAL
        if code and kind.may_refuse:
            text, outcome = trial.launches[-1].text(), REFUSED
            remedy(trial, text)
            code = trial.launch().wait(LIMIT_S)
        for launched in trial.launches:
            if complaint := unclear(launched.text()):
                return complaint
        if code != 0:
            return f"exit code {code}: {trial.launches[-1].text()[-600:]}"
        measured, expected = numbers(trial.setting, trial.root), trial.whole.numbers
        return outcome if measured == expected else f"other numbers: {differences(measured, expected)}"
    except AssertionError as error:
        return str(error)


def unclear(text: str) -> str:
    """What a user should not see; "" if there is nothing of it."""
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    if "Traceback" in text or "Exception ignored" in text:
        return f"traceback: {text[-1500:]}"
    if len(errors) > 4 or any(len(line) > 600 for line in errors):
        return f"{len(errors)} errors: {text[-1500:]}"
    return ""


def differences(measured: dict[str, Any], expected: dict[str, Any]) -> str:
    names = ("result", "metrics", "model", "eval.jsonl", "samples.jsonl")
    if measured.keys() != expected.keys():
        return f"folders {sorted(measured)}"
    return ", ".join(
        f"{name}: {part}"
        for name in expected
        for part, a, b in zip(names, measured[name], expected[name], strict=True)
        if a != b
    )


def run_case(number: int, seed: int, scratch: Path, undisturbed: Undisturbed) -> dict[str, Any]:
    kind = CYCLE[number % len(CYCLE)]
    record: dict[str, Any] = {"case": number, "kind": kind.name}
    if not kind.needs():
        return record | {"outcome": SKIPPED, "done": []}
    setting = SETTINGS[kind.setting]
    whole = undisturbed(setting)
    root = scratch / str(number)
    root.mkdir()
    trial = Trial(setting, root, random.Random(f"{seed}.{number}"), whole)
    before = sum(os.times()[:4])
    try:
        outcome = judge(kind, trial)
    finally:
        if (root / "run").is_mount():
            unmount(root / "run")
    if outcome in (EQUAL, REFUSED):
        shutil.rmtree(root)
    return record | {"outcome": outcome, "done": trial.done, "cpu_s": round(sum(os.times()[:4]) - before, 2)}


def campaign(cases: list[int], seed: int, seconds: float, records: Path | None) -> list[dict[str, Any]]:
    """The records of the cases; `records` keeps them, and cases that it holds are not run again.

    No case starts after `seconds`, once there is one of each kind.
    """
    known: dict[int, dict[str, Any]] = {}
    if records is not None and records.exists():
        known = {record["case"]: record for record in map(json.loads, records.read_text().splitlines())}
    end = time.monotonic() + seconds
    if known.keys() >= set(cases):
        return [known[number] for number in sorted(known)]
    warm_up(with_vllm=HAS_VLLM and any(CYCLE[number % len(CYCLE)].setting == "vLLM" for number in cases))
    scratch = Path(tempfile.mkdtemp(prefix="tip_exp_chaos_"))
    undisturbed, revision = Undisturbed(scratch), git_revision()
    for number in cases:
        if number in known:
            continue
        if time.monotonic() > end and len(known) >= len(KINDS):
            break
        record: dict[str, Any] = run_case(number, seed, scratch, undisturbed) | {"revision": revision}
        known[number] = record
        if records is not None:
            records.parent.mkdir(parents=True, exist_ok=True)
            with records.open("a") as file:
                file.write(json.dumps(record) + "\n")
        if is_wrong(record):
            print(f"case {number} ({record['kind']}, {'; '.join(record['done'])}): {record['outcome']}", flush=True)
    left = [path for path in scratch.iterdir() if not path.name.startswith("undisturbed")]
    if left:
        print(f"folders of wrong cases: {scratch}", file=sys.stderr)
    else:
        shutil.rmtree(scratch)
    return [known[number] for number in sorted(known)]


def is_wrong(record: dict[str, Any]) -> bool:
    return record["outcome"] not in (EQUAL, REFUSED, SKIPPED)


def summary(records: list[dict[str, Any]], command: str) -> str:
    """Markdown: one row for each kind of disturbance, then one for each signal that was sent."""
    run = [record for record in records if record["outcome"] != SKIPPED]
    cpu = sum(record.get("cpu_s", 0) for record in run)
    revisions = ", ".join(sorted({str(record["revision"])[:10] for record in run}))
    lines = [
        "## Runs that are disturbed at random\n",
        f"`{command}`: {len(run)} cases, revision {revisions}; {cpu / 60:.0f} CPU minutes,",
        "without those of processes that were killed.",
        "A run has four steps of the embedded pair, three evaluations and four checkpoints.",
    ]
    return "\n".join([*lines, "", *_table(records), "", *_signals(run), ""])


def _table(records: list[dict[str, Any]]) -> list[str]:
    head = "| disturbance | cases | equal to the undisturbed run | one clear line, and its remedy leads there | wrong |"
    lines = [head, "|---|---|---|---|---|"]
    for kind in KINDS:
        of_kind = [record for record in records if record["kind"] == kind.name]
        counts = Counter("wrong" if is_wrong(record) else record["outcome"] for record in of_kind)
        cells = [str(len(of_kind) - counts[SKIPPED]), *(str(counts[outcome]) for outcome in (EQUAL, REFUSED, "wrong"))]
        name = f"{kind.name} (skipped: {kind.lacks})" if counts[SKIPPED] else kind.name
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _signals(records: list[dict[str, Any]]) -> list[str]:
    """A signal counts once, to however many processes it went."""
    sent = Counter(re.sub(r" \d+$", "", done) for record in records for done in record["done"])
    counts = {done: count for done, count in sorted(sent.items()) if done.startswith("SIG")}
    in_writes = counts.get("SIGKILL before write", 0)
    kills = sum(count for done, count in counts.items() if done.startswith("SIGKILL")) - in_writes
    return [
        f"{kills} SIGKILLs at random moments and {in_writes} before a write, of all kinds of disturbance:\n",
        "| signal, once for each moment | sent |",
        "|---|---|",
        *(f"| {done} | {count} |" for done, count in counts.items()),
    ]
