"""The page's figures as PNG files, drawn by a headless Chromium."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from tip_exp.records.reader import RunRecord
from tip_exp.report.arms import ArmResult
from tip_exp.report.page import settings
from tip_exp.utils.errors import DataError

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTH, HEIGHT = 1000, 620  # of a picture, pixels
BROWSER_OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=10000"]
TIMEOUT_S = 120  # for one picture
MAX_NAME = 60  # characters of a setting's name in a file name


def write_pictures(records: list[RunRecord], arms: list[ArmResult], out: Path) -> list[Path]:
    """The figures as PNG files for a README or a slide, named by the setting's number and name and by the figure.

    A headless Chromium draws them; plotly's own export (kaleido) needs one as well, and one more package. Raises
    DataError without a Chromium on the PATH, or if it draws nothing.
    """
    browser = next(filter(None, map(shutil.which, CHROMIUMS)), None)
    if browser is None:
        raise DataError(f"--png: pictures need one of {', '.join(CHROMIUMS)} on the PATH")
    out.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "figure.html"
        for number, setting in enumerate(settings(records, arms)):
            slug = f"{number}_{re.sub('[^a-z0-9]+', '_', setting.name.lower())[:MAX_NAME]}"
            for kind, figure in setting.figures.items():
                path = out.resolve() / f"{slug}.{kind}.png"
                height = figure.layout.height or HEIGHT
                figure.update_layout(paper_bgcolor="white", plot_bgcolor="white", width=WIDTH, height=height)
                source.write_text(figure.to_html(config={"displayModeBar": False}), encoding="utf-8")
                command = [browser, *BROWSER_OPTIONS, f"--user-data-dir={scratch}/browser"]
                command += [f"--window-size={WIDTH + 16},{height + 16}"]  # a page has a margin of 8 pixels
                command += [f"--screenshot={path}", f"file://{source}"]
                path.unlink(missing_ok=True)  # an older picture
                try:
                    process = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
                except subprocess.TimeoutExpired as error:
                    raise DataError(f"--png: {browser} took more than {TIMEOUT_S} s to draw {path.name}") from error
                if not path.is_file():
                    last_line = process.stderr.strip().splitlines()[-1:]
                    raise DataError(f"--png: {browser} did not draw {path.name}: {last_line}")
                written.append(path)
    return written
