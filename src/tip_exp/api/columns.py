"""The columns that `score` can measure; this module does not import torch."""

from __future__ import annotations

from tip_exp.selector.scores import STATISTICS

COLUMNS = (*STATISTICS, "quadrant")
ON_REQUEST = ("influence",)  # columns that cost more than a forward pass
