"""Learning rate schedule."""

from __future__ import annotations

import math

from tip_exp.config.schema import LearnerConfig


def learning_rate(step: int, config: LearnerConfig) -> float:
    """Learning rate of step `step` (from 1): linear warm-up, then constant, linear or cosine decay.

    Decay reaches `final_lr_frac` x lr one step after the last, as in transformers and verl: no step is made at lr 0.
    """
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - 1 - config.warmup_steps) / (config.num_steps - config.warmup_steps)
    remaining = 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.final_lr_frac + (1 - config.final_lr_frac) * remaining)


def is_due(step: int, every: int) -> bool:
    """Whether `step` is a multiple of `every`; False if `every` is 0."""
    return every > 0 and step % every == 0
