"""Defaults of conf/config.yaml and options of conf/selector, outside of a composed configuration."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from tip_exp.config.schema import SelectorConfig
from tip_exp.config.selector_rules import selector_rules
from tip_exp.selector.lookup import rule_names
from tip_exp.utils.errors import ConfigError
from tip_exp.utils.paths import conf_dir


@cache
def selector_options() -> dict[str, Path]:
    """Name -> file of the options that name a rule."""
    return {path.stem: path for path in sorted((conf_dir() / "selector").glob("*.yaml")) if path.stem != "rule"}


@cache
def _defaults() -> Any:
    return OmegaConf.to_container(OmegaConf.load(conf_dir() / "config.yaml"))


def default_values() -> dict[str, Any]:
    """The sections of conf/config.yaml, without the values that an option sets or another key has."""

    def set_here(values: dict[str, Any]) -> dict[str, Any]:
        nested = {key: set_here(value) if isinstance(value, dict) else value for key, value in values.items()}
        return {key: value for key, value in nested.items() if not str(value).startswith(("???", "${"))}

    return set_here({key: value for key, value in _defaults().items() if key != "defaults"})


def check_selector_name(name: str) -> None:
    """Raise ConfigError if nothing has this name; of the import path of a function `selector_rules` tells more."""
    if ":" in name or name in selector_options() or name in rule_names():
        return
    options = list(selector_options())
    close = difflib.get_close_matches(name, options, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ConfigError(
        f"selector: {name[:80]!r} is neither an option nor a rule{hint}; choose {', '.join(options)}, or "
        "my_module:my_rule"
    )


def default_quadrants() -> dict[str, float]:
    """`quadrants` of conf/config.yaml."""
    return _defaults()["quadrants"]


def selector_preset(option: str | None) -> dict[str, Any]:
    """The `selector` section with this option of conf/selector; None: the common values, without a rule."""
    return _defaults()["selector"] | ({} if option is None else _own_values(option))


def shadow_configs(selector: SelectorConfig) -> dict[str, SelectorConfig]:
    """The settings of each rule in `selector.shadows`, which `shadow_errors` accepts.

    "q3" has the retention of its option, else that of `selector`; "q3@0.2" has 0.2.
    """
    configs: dict[str, SelectorConfig] = {}
    for name in selector.shadows:
        option, _, retention = name.partition("@")
        values = (
            {"retention": selector.retention}
            | _own_values(option)
            | ({"retention": float(retention)} if retention else {})
        )
        configs[name] = SelectorConfig.model_validate(selector_preset(None) | values)
    return configs


def shadow_errors(selector: SelectorConfig) -> Iterator[str]:
    """One message for each rule in `selector.shadows` that cannot be scored."""
    options = selector_options()
    for position, name in enumerate(selector.shadows):
        option, at, retention = name.partition("@")
        if option not in options:
            close = difflib.get_close_matches(option, options, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(options)}"
            yield f"selector.shadows: {option} is not an option of selector; {hint}"
        elif at and not _is_share(retention):
            yield f"selector.shadows: {name}; after @ stands a retention above 0 and at most 1, as in {option}@0.2"
        elif name in selector.shadows[:position]:
            yield f"selector.shadows names {name} twice"
        else:
            (shadow,) = shadow_configs(selector.model_copy(update={"shadows": [name]})).values()
            yield from (f"selector.shadows: {name}: {problem}" for problem in selector_rules(shadow))


def _own_values(option: str) -> Any:
    return OmegaConf.to_container(OmegaConf.load(selector_options()[option]))


def _is_share(text: str) -> bool:
    try:
        return 0 < float(text) <= 1
    except ValueError:
        return False
