"""Derived seeds: every random draw of training is a function of the run's seed, its purpose and the step.

Evaluations draw by `eval.seed` alone, so that all steps and runs sample with the same noise.
"""

from __future__ import annotations

import zlib
from typing import Literal

# One stream per purpose. torch's CPU generator uses the low 32 bits of a seed, so streams without a name are apart
# modulo 2^32: the seeds of two purposes, runs or steps differ up to seed=2000 and 1,000,000 steps.
STREAMS = {"rollout": 0, "select": 1 << 31}


def seed_for(purpose: Literal["rollout", "select"], seed: int, step: int, name: str = "") -> int:
    """Seed of step `step` of the run with seed `seed`; a resumed run draws the same as an undisturbed one.

    `name`: of a further stream of the purpose, such as a rule that does not train.
    """
    return STREAMS[purpose] + seed * 1_000_003 + step + zlib.crc32(name.encode())
