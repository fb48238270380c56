"""docs/: every page is in the site, every link leads somewhere, and the site loads nothing from elsewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
LINK = re.compile(r"\]\(([^)\s]+)\)")
LARGEST = 150_000  # bytes of a picture


def test_every_page_is_in_the_navigation() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert sorted(page for entry in nav for page in entry.values()) == [page.name for page in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_heading(page: Path) -> None:
    for link in LINK.findall(re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (DOCS / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page.name}: {link}"


def test_pictures_are_shown_and_small() -> None:
    shown = {link for page in PAGES for link in LINK.findall(page.read_text(encoding="utf-8"))}
    pictures = sorted(path for ending in ("png", "webp") for path in DOCS.rglob(f"*.{ending}"))
    assert pictures
    for path in pictures:
        assert path.relative_to(DOCS).as_posix() in shown and path.stat().st_size <= LARGEST, path


def test_the_site_builds_and_loads_nothing_from_other_servers(tmp_path: Path) -> None:
    pytest.importorskip("material")
    line = [sys.executable, "-W", "ignore", "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    process = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    text = "\n".join(path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html"))
    assert "First run" in text
    assert (
        re.findall(r"<(?:script|img|iframe)[^>]*src=\"?(?:https?:)?//[^>]*>|<link[^>]*stylesheet[^>]*//[^>]*>", text)
        == []
    )
    assert "results/LOG.md" in text and "../results" not in text
