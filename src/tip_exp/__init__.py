"""Token importance in on-policy distillation: score tokens, select them, train on them (docs/library.md).

`tip_exp.score`, `select`, `loss` and `statistics` load on first use; `import tip_exp` itself imports nothing heavy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tip_exp.api.loss import loss
    from tip_exp.api.score import score, statistics
    from tip_exp.api.select import select

    __version__: str

__all__ = ["__version__", "loss", "score", "select", "statistics"]
_MODULES = {"loss": "loss", "score": "score", "statistics": "score", "select": "select"}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("tip_exp")
    elif name in _MODULES:
        from importlib import import_module

        value = getattr(import_module(f"tip_exp.api.{_MODULES[name]}"), name)
    else:
        raise AttributeError(f"module 'tip_exp' has no attribute {name!r}; it has {', '.join(__all__)}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
