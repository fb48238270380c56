"""The page's figures as PNG files, drawn by a Chromium without a window: for a README or a slide."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pandas as pd

from tip_exp.records.reader import RunRecord
from tip_exp.report.page import settings

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SIZE = (1000, 620)  # pixels
SECONDS = 120  # for one picture
LONGEST = 60  # letters of a setting's name in a file's


def write_pictures(records: list[RunRecord], summary: pd.DataFrame, out: Path) -> list[Path]:
    """A PNG a figure of the page, named by the setting (its number and name) and the figure.

    Raises FileNotFoundError without a Chromium on the PATH, RuntimeError if it draws nothing.
    """
    browser = next(filter(None, map(shutil.which, CHROMIUMS)), None)
    if browser is None:
        raise FileNotFoundError(f"pictures need one of {', '.join(CHROMIUMS)} on the PATH")
    out.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) / "figure.html"
        for number, (name, _, _, made) in enumerate(settings(records, summary)):
            slug = f"{number}_{re.sub('[^a-z0-9]+', '_', name.lower())[:LONGEST]}"
            for kind, figure in made.items():
                path = out / f"{slug}.{kind}.png"
                figure.update_layout(paper_bgcolor="white", plot_bgcolor="white", width=SIZE[0], height=SIZE[1])
                place.write_text(figure.to_html(config={"displayModeBar": False}), encoding="utf-8")
                _photograph(browser, place, path.resolve(), scratch)
                written.append(path)
    return written


def _photograph(browser: str, page: Path, path: Path, scratch: str) -> None:
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=10000"]
    options += [f"--window-size={SIZE[0] + 16},{SIZE[1] + 16}", f"--user-data-dir={scratch}/browser"]
    done = subprocess.run(
        [browser, *options, f"--screenshot={path}", f"file://{page}"], capture_output=True, text=True, timeout=SECONDS
    )
    if not path.is_file():
        raise RuntimeError(f"{browser} drew no {path.name}: {done.stderr.strip().splitlines()[-1:]}")
