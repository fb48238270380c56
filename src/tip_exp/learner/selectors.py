"""The selectors of a run's configuration: the one that trains, and those that are scored beside it."""

from __future__ import annotations

import torch

from tip_exp.config.presets import shadow_configs
from tip_exp.config.schema import RunConfig, SelectorConfig
from tip_exp.selector.selector import Quadrants, Selector
from tip_exp.utils.seeds import seed_for


def make_selector(config: RunConfig, settings: SelectorConfig | None = None) -> Selector:
    """The Selector of `config.selector`, or of other `settings`, with the quadrants' thresholds of this run."""
    quadrants = Quadrants(**config.quadrants.model_dump())
    return Selector(**(settings or config.selector).rule_settings(), quadrants=quadrants)


def make_shadows(config: RunConfig) -> dict[str, Selector]:
    """Name in `selector.shadows` -> rule."""
    return {name: make_selector(config, settings) for name, settings in shadow_configs(config.selector).items()}


def draws(seed: int, step: int, shadow: str = "") -> torch.Generator:
    """The generator of a random rule at one step of a run: of the selector, or of a shadow by its name."""
    return torch.Generator().manual_seed(seed_for("select", seed, step, shadow))
