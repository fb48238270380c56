"""The learning rate of every step."""

from __future__ import annotations

import math

from tip_exp.config.schema import LearnerConfig


def learning_rate(step: int, settings: LearnerConfig) -> float:
    """Linear warm-up, then constant, linear or half a cosine to `final_lr_frac` at the last step (steps from 1)."""
    if step <= settings.warmup_steps:
        return settings.lr * step / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.lr
    progress = (step - settings.warmup_steps) / max(1, settings.num_steps - settings.warmup_steps)
    left = 1 - progress if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return settings.lr * (settings.final_lr_frac + (1 - settings.final_lr_frac) * left)
