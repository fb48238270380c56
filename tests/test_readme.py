"""The code in README.md runs."""

from __future__ import annotations

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_snippet_runs_and_keeps_a_fifth_of_the_tokens() -> None:
    (snippet,) = SNIPPETS
    names: dict = {}
    exec(compile(snippet, "README.md", "exec"), names)
    assert names["stats"]["kept"].sum() == len(names["stats"]) // 5 > 0
