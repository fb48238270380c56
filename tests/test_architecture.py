"""The arrows of the house, held against the imports: light modules stay light, big libraries have one importer each."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "tip_exp"
MODULES = {
    str(path.relative_to(PACKAGE).with_suffix("")).replace("/", ".").removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
# What may be imported, directly or through others, before a config is accepted and where tables are made.
WITHOUT_TORCH = (
    "cli",
    "config",
    "rules",
    "parsing",
    "launch",
    "paths",
    "plan",
    "report",
    "scores",
    "sweeping",
    "data",
    "grading",
)
# The one module that imports a library.
ONE_IMPORTER = {
    "vllm": {"rollout.vllm"},
    "wandb": {"dashboards", "logger"},
    "peft": {"lora"},
    "hydra": {"cli", "composing", "plan", "sweeping"},
}
# Modules that know nothing of the rest of the package but what is named.
MAY_IMPORT = {
    "scores": set(),
    "divergence": {"moments", "tiles"},
    "estimators": {"config", "divergence"},
    "gradients": set(),
    "lora": {"config"},
    "rules": {"config", "paths", "scores"},
    "parsing": {"config", "rules"},
    "heads": {"gradients"},
    "meter": set(),
    "paths": set(),
    "selection": {"scores"},
    "tiles": set(),
    "moments": {"tiles"},
    "scoring": {"heads", "moments", "scores", "tiles"},
    "loss": {"divergence", "estimators", "heads", "moments", "tiles"},
    "backbone": set(),
    "hidden_cache": {"meter"},
    "placement": {"heads"},
    "batching": {"rollout.types"},
    "rollout.hf": {"rollout.types"},
    "rollout.proof": {"rollout.types"},
    "rollout.vllm": {"config", "lora", "rollout.types", "rollout.vllm_worker"},
    "rollout.vllm_worker": set(),
    "rollout.types": set(),
    "report": {"overview", "runs", "summary", "tables"},
    "overview": {"statistics", "summary", "tables"},
}


def imports(path: Path) -> set[str]:
    """Dotted names a module imports when it runs; what stands under TYPE_CHECKING or in a function does not count."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(path: Path) -> set[str]:
    names = {name.removeprefix("tip_exp.") for name in imports(path) if name.startswith("tip_exp")}
    return {name for name in names if name in MODULES}


def reachable(module: str) -> set[str]:
    seen, todo = set(), [module]
    while todo:
        one = todo.pop()
        if one not in seen:
            seen.add(one)
            todo += ours(MODULES[one])
    return seen


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_no_torch_before_a_config_is_accepted(module: str) -> None:
    for name in reachable(module):
        heavy = {i for i in imports(MODULES[name]) if i.split(".")[0] in {"torch", "transformers", "wandb", "vllm"}}
        assert not heavy, f"{module} reaches {name}, which imports {heavy}"


@pytest.mark.parametrize("library", ONE_IMPORTER)
def test_big_libraries_have_their_importer(library: str) -> None:
    importers = {
        name
        for name, path in MODULES.items()
        if f"import {library}" in path.read_text() or f"from {library}" in path.read_text()
    }
    assert importers == ONE_IMPORTER[library]


@pytest.mark.parametrize("module", MAY_IMPORT)
def test_arrows(module: str) -> None:
    assert ours(MODULES[module]) - {"rollout", "data", "grading"} <= MAY_IMPORT[module]


def test_nothing_imports_the_loop() -> None:
    for name, path in MODULES.items():
        assert "run" not in ours(path), name
