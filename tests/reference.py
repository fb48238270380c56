"""Naive reference implementations that tests compare the package with: whole logits, float64, autograd, plain loops."""

from __future__ import annotations
