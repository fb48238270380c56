"""The dependency rules of the package: which packages may import which, and which module imports a heavy library."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "tip_exp"
# A package (or top-level module) may import those named after it, and nothing else of tip_exp.
MAY_IMPORT = {
    "launch": "probe api run data estimate report records config utils",
    "probe": "api run report learner losses models records config selector types utils",
    "api": "learner models losses config selector types utils",
    "integrations": "api",
    "run": "eval learner estimate rollout data models envs records config selector types utils",
    "report": "records config selector utils",
    "eval": "data models envs grading records config types utils",
    "learner": "models records losses config selector types utils",
    "estimate": "models losses records config selector types utils",
    "rollout": "models config types utils",
    "data": "models envs grading config types utils",
    "models": "losses config types utils",
    "envs": "grading config types utils",
    "records": "config utils",
    "losses": "selector",
    "config": "selector utils",
    "grading": "",
    "selector": "",
    "types": "",
    "utils": "",
}
ENTRY_POINTS = {"__init__", "__main__", "deepplanning"}  # may import anything; nothing imports them
# Two packages take only names from selector, so that neither a config nor a loss loads the selection itself.
ONLY = {("config", "selector"): {"selector.scores", "selector.lookup"}, ("losses", "selector"): {"selector.scores"}}
# Modules that may import a library.
IMPORTERS = {
    "vllm": {"rollout.vllm"},
    "wandb": {"records.tracker", "report.wandb"},
    "trackio": {"records.dashboards"},
    "mlflow": {"records.dashboards"},
    "peft": {"models.lora"},
    "hydra": {"launch.cli", "launch.help", "launch.sweep", "launch.plan", "launch.words"},
    "torch.distributed": {
        "learner.distributed",
        "learner.sharding",
        "learner.checkpoint",
        "learner.checkpoint_files",
        "launch.torchrun",
    },
    "triton": {"losses.kernels", "losses.gradient_kernel"},
}


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {dotted(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(path: Path) -> set[str]:
    """Dotted names of all imports of a module, those inside functions and TYPE_CHECKING blocks included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def package_of(name: str) -> str:
    """The first part of a dotted name; run.py, build.py and inputs.py are one package."""
    first = name.split(".")[0]
    return "run" if first in {"build", "inputs"} else first


@pytest.mark.parametrize("module", [name for name in MODULES if name not in ENTRY_POINTS])
def test_a_module_imports_only_what_its_package_may(module: str) -> None:
    package = package_of(module)
    for name in imported(MODULES[module]):
        if not name.startswith("tip_exp."):
            continue
        target = name.removeprefix("tip_exp.")
        other = package_of(target)
        assert other == package or other in MAY_IMPORT[package].split(), f"{module} imports {name}"
        if (package, other) in ONLY:
            assert any(target.startswith(allowed) for allowed in ONLY[package, other]), f"{module} imports {name}"


def test_every_package_has_a_row_and_a_docstring_of_at_most_five_lines() -> None:
    assert {package_of(name) for name in MODULES} - ENTRY_POINTS == set(MAY_IMPORT)
    for name, path in MODULES.items():
        if path.name == "__init__.py" and path.parent != PACKAGE:
            docstring = ast.get_docstring(ast.parse(path.read_text()))
            assert docstring and len(docstring.splitlines()) <= 5, name


@pytest.mark.parametrize("package", [name for name in MAY_IMPORT if (PACKAGE / name).is_dir()])
def test_a_docstring_names_what_its_package_imports_and_what_imports_it(package: str) -> None:
    docstring = ast.get_docstring(ast.parse((PACKAGE / package / "__init__.py").read_text())) or ""
    importers = {name for name, row in MAY_IMPORT.items() if package in row.split()}
    for start, expected in (("Imports ", {*MAY_IMPORT[package].split()}), ("mported by ", importers)):
        sentence = re.split(r"[.;](?=\s|$)", docstring.partition(start)[2])[0]
        if sentence and "any package" not in sentence:
            assert set(re.findall(r"\w+", sentence)) & MAY_IMPORT.keys() == expected, (package, sentence)


@pytest.mark.parametrize("library", IMPORTERS)
def test_heavy_libraries_are_imported_in_one_place(library: str) -> None:
    importers = {
        name.removesuffix(".__init__")
        for name, path in MODULES.items()
        if any(item == library or item.startswith(f"{library}.") for item in imported(path))
    }
    assert importers == IMPORTERS[library]


def loaded_by(module: str) -> set[str]:
    code = f"import sys, {module}; print('\\n'.join(sys.modules))"
    listing = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(listing.stdout.split())


@pytest.mark.parametrize(
    "module",
    ["config.parse", "launch.cli", "launch.launch", "launch.plan", "report.cli", "data.load", "grading"],
)
def test_nothing_heavy_loads_before_a_config_is_accepted(module: str) -> None:
    assert not loaded_by(f"tip_exp.{module}") & {"torch", "transformers", "wandb", "vllm"}


def test_losses_load_no_other_part_of_the_framework() -> None:
    loaded = loaded_by("tip_exp.losses")
    assert {name for name in loaded if name.startswith("tip_exp.")} - {
        "tip_exp.selector",
        "tip_exp.selector.scores",
        "tip_exp.selector.lookup",
    } <= {name for name in loaded if name.startswith("tip_exp.losses")}
    assert "hydra" not in loaded
