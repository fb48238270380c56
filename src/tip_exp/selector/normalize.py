"""Clipping and scaling of one group's values before a rule reads them."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def clip_high(values: Float[Tensor, " n"], quantile: float | None) -> Float[Tensor, " n"]:
    """Clamp values to their own `quantile` (TIP, Sec. 6: the top 2 % of entropies)."""
    return values if quantile is None else values.clamp(max=quantile_of(values, quantile))


def normalize(values: Float[Tensor, " n"], normalizer: str) -> Float[Tensor, " n"]:
    """Map one group's values to [0, 1]; equal values all become 0.

    minmax: (v - min) / (max - min). quantile: the same with the 5th and 95th percentile, clamped to [0, 1].
    rank: rank / (n - 1), ties share their mean rank. none: unchanged.
    """
    if normalizer == "none" or len(values) == 0:
        return values
    if normalizer == "rank":
        ordered = values.sort().values
        first, past_last = torch.searchsorted(ordered, values), torch.searchsorted(ordered, values, right=True)
        mean_rank = (first + past_last - 1).to(values.dtype) / 2
        return torch.where(ordered[0] < ordered[-1], mean_rank / (len(values) - 1), 0)
    low, high = (quantile_of(values, 0.05), quantile_of(values, 0.95)) if normalizer == "quantile" else values.aminmax()
    return torch.where(low < high, ((values - low) / (high - low)).clamp(0, 1), 0)


def quantile_of(values: Tensor, q: float) -> Tensor:
    """numpy's linear quantile; torch.quantile fails above 2^24 values."""
    ordered = values.sort().values
    index = q * (len(values) - 1)
    low, high = ordered[math.floor(index)], ordered[math.ceil(index)]
    return low + (high - low) * (index - math.floor(index))
