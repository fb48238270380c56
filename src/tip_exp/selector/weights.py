"""Weights of the tokens in the loss: rising with the score, or falling with the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from tip_exp.selector.normalize import quantile_of
from tip_exp.selector.scores import FALLING, Weight

MIN_OFFSET = 1e-8  # of a quantile; keeps the weight of a token without gradient finite


def token_weights(
    weight: Weight, offset: float | str | None, score: Tensor, statistics: dict[str, Tensor]
) -> Tensor | None:
    """Weights of all tokens, (N,), at least 0; None if all are 1.

    score: max(score, 0). Falling weights have g = grad_norm and an offset c in its unit: inverse_gradient is
    1 / (g + c), sqrt 1 / sqrt(g + c). By TIP, Prop. 1, w ~ phi / M: if the benefit phi grows like g and the second
    moment M like g^2, this is 1 / g. `offset` is c, a quantile of g over these tokens as "q0.9", or None for
    the weight's own in FALLING.
    """
    if weight == "none":
        return None
    if weight == "score":
        return score.clamp(min=0)
    grad_norm = statistics["grad_norm"]
    if isinstance(offset, str):
        c = quantile_of(grad_norm, float(offset.removeprefix("q"))).clamp(min=MIN_OFFSET) if len(grad_norm) else 1.0
    else:
        c = FALLING[weight] if offset is None else offset
    return torch.reciprocal(grad_norm + c) if weight == "inverse_gradient" else torch.rsqrt(grad_norm + c)
