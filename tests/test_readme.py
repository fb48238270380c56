"""The code in README.md runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_a_snippet_runs_and_gives_finite_gradients(snippet: str) -> None:
    names: dict = {}
    exec(compile(snippet, "README.md", "exec"), names)
    assert 0 < names["selection"].kept_mask.float().mean() <= 0.2
    for tensor in (names["student_hidden"], names["student_weight"]):
        assert tensor.grad.isfinite().all() and tensor.grad.abs().max() > 0


def test_there_is_a_snippet() -> None:
    assert len(SNIPPETS) == 1
