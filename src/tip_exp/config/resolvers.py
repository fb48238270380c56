"""Functions that conf/ calls; separate from `parse`, so that composing a config needs no schema."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf


def register_resolvers() -> None:
    """Make the resolvers that conf/ uses known to OmegaConf."""

    def percent(ratio: Any) -> str:
        """0.5 -> "50", so that names spell 1, 1.0 and 1.00 alike. parse() reports what is not a number."""
        return f"{100 * ratio:g}" if isinstance(ratio, int | float) else str(ratio)

    def in_root(name: str, *, _root_: DictConfig) -> str | None:
        """The file of this name in data.root; None without a root, so that the data come from the hub."""
        root = OmegaConf.select(_root_, "data.root")
        return None if root is None else str(Path(root) / name)

    def ranks_or(count: int, *, _root_: DictConfig) -> int:
        """`ranks`, or `count` where it is auto: the GPUs that a launcher requests for a run on each node."""
        ranks = OmegaConf.select(_root_, "ranks")
        return ranks if isinstance(ranks, int) else count

    def rule_name(score: str) -> str:
        """ "my_module:rule" -> "rule"; other scores are names already."""
        return score.partition("@")[0].rpartition(":")[2]

    def file_label(path: str | None) -> str:
        """ "data/my.jsonl" -> "my", "org/Model-1.7B" -> "Model-1.7B"; "file" without a path."""
        return re.sub(r"\.(jsonl|parquet|csv)$", "", Path(path).name) if path else "file"

    OmegaConf.register_new_resolver("file_label", file_label, replace=True)
    OmegaConf.register_new_resolver("ranks_or", ranks_or, replace=True)
    OmegaConf.register_new_resolver("percent", percent, replace=True)
    OmegaConf.register_new_resolver("in_root", in_root, replace=True)
    OmegaConf.register_new_resolver("rule_name", rule_name, replace=True)
