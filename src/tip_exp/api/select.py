"""Which tokens a selector keeps, from the table of `score` or from tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tip_exp.config.parse import config_error, typed_selector
from tip_exp.config.presets import check_selector_name, default_quadrants, selector_options, selector_preset
from tip_exp.config.selector_rules import selector_rules
from tip_exp.learner.selectors import draws
from tip_exp.selector.scores import Rule
from tip_exp.selector.selector import Quadrants, Selection, Selector, Tokens

if TYPE_CHECKING:
    import pandas as pd

LABEL = "-"  # selections that are not runs have no name


class Selected(NamedTuple):
    """Series with the table's index, or tensors of the shape of the statistics."""

    kept: Any  # bool
    weights: Any  # of the kept tokens in the loss, 0 elsewhere; None: all alike


def select(
    stats: pd.DataFrame | Mapping[str, Any],
    selector: str | Rule | Selector = "soft_or",
    *,
    retention: float | None = None,
    response_mask: Tensor | None = None,
    quadrants: tuple[float, float] | None = None,
    seed: int = 0,
    step: int = 1,
    **overrides: Any,
) -> Selected:
    """Which tokens to train on, as a training run would choose them, and their weights: (kept, weights).

    stats  the table of `score`, or tensors by name: the statistics that the selector reads and `sequence`, the index
        of each token's sequence (and `position` in it, if tokens are not in order). The batch is the whole table.
    response_mask  for tensors (B, T): True on the response tokens; rows are then the sequences, and the result is
        (B, T), False elsewhere.
    selector  an option of conf/selector ("soft_or", "q3", "random", …), "my_module:my_rule", a function of statistics,
        or a Selector.
    retention, overrides  kept / response tokens, and any other key of `selector` in conf/config.yaml (order, clip, …).
    quadrants  thresholds of the rules q1 to q4, as in `score`.
    seed, step  of random rules: the draws of that step of a run with this seed.

    `weights` is None unless the selector has a `weight`, as the options fire, prefix_weight and propose_verify do.
    Raises ValueError for a wrong setting or a missing statistic, FloatingPointError for NaN.
    """
    changes = overrides | ({} if retention is None else {"retention": retention})
    chosen = make_selector(selector, quadrants, **changes)
    lacking = sorted(chosen.required_stats - set(stats))
    if lacking:
        raise ValueError(f"stats lacks {', '.join(lacking)}, which the selector {chosen.rule_name} reads")
    values = {name: _tensor(stats[name]) for name in chosen.required_stats}
    if response_mask is not None:
        response_mask = response_mask.bool()
        for name, value in values.items():
            if value.shape != response_mask.shape:
                raise ValueError(
                    f"stats[{name!r}] has the shape {tuple(value.shape)}, response_mask {tuple(response_mask.shape)}"
                )
        values = {name: value[response_mask] for name, value in values.items()}
        sequence = _numbered(response_mask.nonzero()[:, 0])  # a row without response tokens is no rollout
    elif "sequence" in stats:
        sequence = _numbered(stats["sequence"])
    else:
        raise ValueError("stats lacks sequence, the index of each token's sequence; tensors (B, T) need response_mask=")
    for name, value in values.items():
        if value.dim() != 1 or value.shape != sequence.shape:
            raise ValueError(
                f"stats[{name!r}] has the shape {tuple(value.shape)}, sequence {tuple(sequence.shape)}; both need "
                "(N,), or (B, T) with response_mask= and without sequence"
            )
    if chosen.normalize_over == "micro_batch" and "micro_batch" not in stats:
        raise ValueError("normalize_over=micro_batch: stats lacks micro_batch, the index of each token's micro-batch")
    micro_batch = torch.zeros_like(sequence)
    if "micro_batch" in stats:
        micro_batch = _tensor(stats["micro_batch"])
        micro_batch = micro_batch if response_mask is None else micro_batch[response_mask]
    position = _tensor(stats["position"]) if "position" in stats and response_mask is None else order_in(sequence)
    tokens = Tokens(sequence, micro_batch.to(sequence), position.to(sequence))
    selection = chosen(values, tokens, draws(seed, step))
    kept, weights = _scattered(selection, response_mask)
    if not isinstance(stats, Mapping):
        import pandas as pd

        kept = pd.Series(kept.numpy(), index=stats.index, name="kept")
        weights = None if weights is None else pd.Series(weights.numpy(), index=stats.index, name="weight")
    return Selected(kept, weights)


def make_selector(
    selector: str | Rule | Selector, quadrants: tuple[float, float] | None = None, **overrides: Any
) -> Selector:
    """The selector of an option of conf/selector, of a rule's name or function, or a Selector, with some keys changed.

    Raises ConfigError as a run would: for an unknown key, a wrong value, or keys that exclude each other.
    """
    values, rule, cuts = selector_preset(None), selector, thresholds(quadrants)
    if isinstance(selector, Selector):
        if not overrides and quadrants is None:
            return selector
        values |= {field.name: getattr(selector, field.name) for field in fields(selector)}
        own_cuts = values.pop("quadrants")
        cuts = own_cuts if quadrants is None else cuts
        rule = selector.score
    elif isinstance(selector, str):
        check_selector_name(selector)
        is_option = selector in selector_options()
        values = selector_preset(selector) if is_option else values | {"score": selector}
        rule = values["score"]
    rule = overrides.pop("score", rule)
    # A function is no value of a config; the name of another rule stands for it while the types are checked.
    config = typed_selector(
        values | overrides | {"label": LABEL, "score": rule if isinstance(rule, str) else "entropy"}
    )
    settings = config.rule_settings()
    if not isinstance(rule, str):
        settings["score"] = rule
    made = Selector(**settings, quadrants=cuts)
    if problems := list(selector_rules(made)):
        raise config_error(problems)
    return made


def thresholds(quadrants: tuple[float, float] | None) -> Quadrants:
    """The Quadrants of (entropy, divergence) in nats; None: those of conf/config.yaml."""
    return Quadrants(**default_quadrants()) if quadrants is None else Quadrants(*map(float, quadrants))


def order_in(sequence: Tensor) -> Tensor:
    """How many tokens of its sequence stand before each token: [0, 0, 1, 0] -> [0, 1, 0, 2]"""
    order = sequence.argsort(stable=True)
    sizes = torch.bincount(sequence)
    starts = (sizes.cumsum(0) - sizes)[sequence[order]]
    return torch.empty_like(sequence).index_copy_(0, order, torch.arange(len(order), device=order.device) - starts)


def _numbered(sequence: Any) -> Tensor:
    """The index of each value among the distinct ones, on the device of a tensor: ["b", "a", "b"] -> [1, 0, 1]"""
    if isinstance(sequence, Tensor):
        return torch.unique(sequence, return_inverse=True)[1]
    return torch.tensor(np.unique(np.asarray(sequence), return_inverse=True)[1])


def _tensor(values: Any) -> Tensor:
    return values.detach() if isinstance(values, Tensor) else torch.tensor(np.asarray(values))


def _scattered(selection: Selection, response_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Mask and weights of kept tokens, put where `response_mask` is True."""
    weights = None if selection.weights is None else torch.where(selection.kept_mask, selection.weights, 0)
    if response_mask is None:
        return selection.kept_mask, weights
    kept = torch.zeros_like(response_mask).masked_scatter_(response_mask, selection.kept_mask)
    if weights is None:
        return kept, None
    zeros = torch.zeros(response_mask.shape, dtype=weights.dtype, device=response_mask.device)
    return kept, zeros.masked_scatter_(response_mask, weights)
