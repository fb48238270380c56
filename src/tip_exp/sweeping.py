"""Which runs a sweep has: its `runs` (a line = one run's overrides) times the grid of its `params`.

    hydra.sweeper.runs: ["selector=full", "selector=random selector.retention=0.2"]   (pairs that form no grid)
    hydra.sweeper.params: {seed: "range(3)"}                                          (what Hydra itself sweeps)

A value on the command line for a swept key takes its place in both: `seed=7` runs seed 7 alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser


def expand(runs: Sequence[str], params: Mapping[str, str], arguments: Sequence[str]) -> list[list[str]]:
    """The overrides of every run, in order; two lines that become equal under `arguments` are one run.

    expand(["a=1 b=2", "a=3"], {"seed": "0,1"}, ["b=9"]) ->
        [["a=1", "b=9", "seed=0"], …]   is written  [["a=1", "seed=0", "b=9"], ["a=1", "seed=1", "b=9"], ["a=3", …], …]
    """
    parser = OverridesParser.create()
    given = {override.get_key_element() for override in parser.parse_overrides(list(arguments))}
    grid_overrides = [f"{key}={value}" for key, value in params.items()] + list(arguments)
    grid = BasicSweeper.split_arguments(parser.parse_overrides(grid_overrides), None)[0]
    lines: list[list[str]] = []
    for line in runs or [""]:
        own = [text for text in line.split() if parser.parse_override(text).get_key_element() not in given]
        if own not in lines:
            lines.append(own)
    return [[*line, *point] for line in lines for point in grid]
