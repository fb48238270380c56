"""Pictures of the report's page for docs/report.md: wide and narrow, light and dark. Needs a Chromium and Pillow.

python -m scripts.docs_pictures results/demo/report.html
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from tip_exp.report.pictures import BROWSER_OPTIONS, CHROMIUMS

OUT = Path(__file__).parents[1] / "docs" / "pictures"
SIZES = {1400: 1100, 390: 1100}  # width -> height of a window, pixels
# part of the page -> what hides the others
PARTS = {"page": "", "viewer": "<style>header, main > section, body > section {display: none}</style>"}
QUALITY = 80  # of WebP


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path, help="a page that `tip-report --html` wrote")
    text = parser.parse_args().page.read_text(encoding="utf-8")
    browser = next(filter(None, map(shutil.which, CHROMIUMS)), None)
    assert browser, f"pictures need one of {', '.join(CHROMIUMS)} on the PATH"
    OUT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        source, picture = Path(scratch) / "page.html", Path(scratch) / "page.png"
        for part, style in PARTS.items():
            source.write_text(text.replace("</head>", style + "</head>", 1), encoding="utf-8")
            for width, height in SIZES.items():
                for theme in ("light", "dark"):
                    command = [browser, *BROWSER_OPTIONS, f"--user-data-dir={scratch}/browser"]
                    command += [f"--window-size={width},{height}", f"--screenshot={picture}"]
                    subprocess.run([*command, f"file://{source}?theme={theme}"], capture_output=True, timeout=600)
                    path = OUT / f"{part}_{width}_{theme}.webp"
                    _as_webp(picture, path)
                    print(f"{path}: {path.stat().st_size / 1000:.0f} kB", flush=True)


def _as_webp(picture: Path, path: Path) -> None:
    from PIL import Image

    with Image.open(picture) as image:
        image.convert("RGB").save(path, quality=QUALITY, method=6)
    picture.unlink()


if __name__ == "__main__":
    main()
