"""A hook of mkdocs: links from docs/ to other files of the repository become the files' paths, which must exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """ "[LOG](../results/LOG.md)" -> "`results/LOG.md`". Raises FileNotFoundError."""

    def path_of(match: re.Match[str]) -> str:
        path = match[2]
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"a link in docs/ names {path}, which is not in the repository")
        text = match[1].strip("`")
        return f"`{path}`" if path.endswith(text) else f"{text} (`{path}`)"

    return _OUTSIDE.sub(path_of, markdown)
