"""Pictures of the report's page for docs/report.md: wide and narrow, light and dark. Needs a Chromium and Pillow.

python -m scripts.docs_pictures results/demo/report.html
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from itertools import product
from pathlib import Path

from tip_exp.report.pictures import BROWSER_OPTIONS, CHROMIUMS
from tip_exp.utils.errors import exit_on_error

OUT = Path(__file__).parents[1] / "docs" / "pictures"
WIDTHS, HEIGHT = (1400, 390), 1100  # of a picture, pixels
# part of the page -> what hides the others
PARTS = {
    "page": "",
    "viewer": "<style>header, body > section {display: none}</style>",
}
QUALITY = 80  # of WebP


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path, help="a page that `tip-report --html` wrote")
    with exit_on_error(OSError, UnicodeError):
        text = parser.parse_args().page.read_text(encoding="utf-8")
    OUT.mkdir(exist_ok=True)
    for part, width, theme in product(PARTS, WIDTHS, ("light", "dark")):
        path = OUT / f"{part}_{width}_{theme}.webp"
        draw(text.replace("</head>", PARTS[part] + "</head>", 1), width, theme, path)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB", flush=True)


def draw(text: str, width: int, theme: str, path: Path) -> None:
    """The top of the page. Plots are drawn in a frame, as they take the 500 pixels that a window has at least."""
    from PIL import Image  # pyright: ignore[reportMissingImports]

    browser = next(filter(None, map(shutil.which, CHROMIUMS)), None)
    assert browser, f"pictures need one of {', '.join(CHROMIUMS)} on the PATH"
    with tempfile.TemporaryDirectory() as scratch:
        page, frame, picture = (Path(scratch) / name for name in ("page.html", "frame.html", "picture.png"))
        page.write_text(text, encoding="utf-8")
        style = f"border: 0; width: {width}px; height: {HEIGHT}px"
        frame.write_text(f'<body style="margin: 0"><iframe src="page.html?theme={theme}" style="{style}"></iframe>')
        has_plots = PARTS["viewer"] not in text
        shown, window = (f"{frame}", max(width, 800)) if has_plots else (f"{page}?theme={theme}", width)
        command = [browser, *BROWSER_OPTIONS, f"--user-data-dir={scratch}/browser", f"--screenshot={picture}"]
        subprocess.run(
            [*command, f"--window-size={window},{HEIGHT}", f"file://{shown}"], capture_output=True, timeout=600
        )
        with Image.open(picture) as image:
            image.convert("RGB").crop((0, 0, width, HEIGHT)).save(path, quality=QUALITY, method=6)


if __name__ == "__main__":
    main()
