"""Markdown of a GPU check: one file per device, and a README with the devices on which each check has passed."""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from tip_exp.utils.units import GIB

NOT_RUN = "not yet run"
LIBRARIES = ("torch", "transformers", "vllm", "triton", "trl")


@dataclass(slots=True)
class Result:
    state: str  # passed | failed: why | not yet run: why
    lines: list[str] = field(default_factory=list)  # Markdown with the numbers
    log: str = ""  # of a failure
    seconds: float = 0.0


def write(out: Path, machine: dict[str, str], claims: Mapping[str, str], results: Mapping[str, Result]) -> Path:
    """Write <device>.md, then README.md over all devices in `out`; returns the former."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{re.sub(r'[^A-Za-z0-9]+', '_', machine['device']).strip('_')}.md"
    text = [f"# {machine['device']}", "", *(f"- {key}: {value}" for key, value in machine.items()), ""]
    text += ["| check | what it shows | state | seconds |", "|---|---|---|---|"]
    for name, claim in claims.items():
        result = results.get(name, Result(NOT_RUN))
        seconds = f"{result.seconds:.0f}" if name in results else ""
        text.append(f"| {name} | {claim} | {first_words(result.state)} | {seconds} |")
    for name, result in results.items():
        text += ["", f"## {name}", "", *result.lines]
        if result.log:
            text += [result.state, "", "```", *result.log.strip().splitlines(), "```"]
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    (out / "README.md").write_text(overview(out, claims), encoding="utf-8")
    return path


def overview(out: Path, claims: Mapping[str, str]) -> str:
    """README.md: the state of each check on every device that has a file in `out`."""
    devices = {path: path.read_text(encoding="utf-8") for path in sorted(out.glob("*.md")) if path.name != "README.md"}
    lines = [
        "# What has run on a GPU",
        "",
        "`make gpu-check` on a machine with NVIDIA GPUs is made to run these checks in 15 minutes (random weights, no",
        "hub) and writes a file per device here. A claim of the documentation about CUDA names its check.",
        "",
        "| check | what it shows | state |",
        "|---|---|---|",
    ]
    for name, claim in claims.items():
        states = []
        for path, text in devices.items():
            row = re.search(rf"^\| {name} \| .* \| (.*) \| \S* \|$", text, re.MULTILINE)
            if row and not row[1].startswith(NOT_RUN):
                states.append(f"[{path.stem}]({path.name}): {row[1]}")
        lines.append(f"| {name} | {claim} | {'; '.join(states) or NOT_RUN} |")
    return "\n".join(lines) + "\n"


def first_words(state: str) -> str:
    """The first line of a state, short enough for a cell."""
    line = state.strip().splitlines()[0].replace("|", "/")
    return line if len(line) <= 120 else f"{line[:117]}…"


def tail(log: Path, lines: int = 30) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def table(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """A Markdown table with the keys of the first row as its head."""
    head = list(rows[0])
    body = [f"| {' | '.join(str(row.get(key, '')) for key in head)} |" for row in rows]
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *body]


def machine(device: str) -> dict[str, str]:
    """Device, driver, versions and revision, for the head of a report."""
    described = {"device": platform.processor() or platform.machine()}
    if device == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit(
                f"error: torch {torch.__version__} finds no CUDA device; rehearse with --device cpu --tiny"
            )
        properties = torch.cuda.get_device_properties(0)
        described = {
            "device": properties.name,
            "GPUs": str(torch.cuda.device_count()),
            "memory": f"{properties.total_memory / GIB:.1f} GiB",
            "compute capability": f"{properties.major}.{properties.minor}",
            "CUDA": str(torch.version.cuda),
            "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0],
        }
    versions = {name: _version(name) for name in LIBRARIES}
    described |= {name: number for name, number in versions.items() if number}
    return described | {"revision": output_of("git", "rev-parse", "--short", "HEAD"), "date": str(date.today())}


def output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
