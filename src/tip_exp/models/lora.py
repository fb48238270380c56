"""LoRA students: adapters inside the model are all that is trained; outside of this module weights are merged.

W x + s B A x, with s = alpha / rank (Hu et al. 2021). The learner and transformers' sampling run the adapters as they
are, so that what is sampled is what is scored, to the last bit; vLLM and checkpoints get W + s B A under plain names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tip_exp.utils.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tip_exp.config.schema import LoraConfig

FOLDER, WEIGHTS = "adapter", "adapter_model.safetensors"  # the second as peft names it
_ADAPTER = "default"
_PREFIX = "base_model.model."  # of a parameter's name, as peft writes it


@dataclass(frozen=True, slots=True)
class _Adapted:
    """One linear layer with its adapter."""

    weight: Tensor  # (out, in), frozen
    down: Tensor  # A: (rank, in)
    up: Tensor  # B: (out, rank)
    scale: float

    def merged(self) -> Tensor:
        """Summed in float32 or wider, rounded once."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        product = self.up.detach().to(wide) @ self.down.detach().to(wide)
        return (self.weight.detach().to(wide) + self.scale * product).to(self.weight.dtype)


def attach(model: PreTrainedModel, settings: LoraConfig, base: str) -> None:
    """Put adapters into `model`, in place: they alone are trainable, in float32, and change nothing yet (B is zero).

    `base`: where the model is from, for whoever loads the adapter later.
    """
    peft = _peft()
    outer = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if id(module) in outer}
    if wrong := sorted(names & set(settings.target_modules if isinstance(settings.target_modules, list) else [])):
        raise ConfigError(
            f"pair.student.lora.target_modules: {', '.join(wrong)} cannot have an adapter, for the loss is formed by "
            "rows of the plain output head; name linear layers of the decoder"
        )
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,  # rollouts, scores and gradients must see the same network
        target_modules=settings.target_modules,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )
    try:
        peft.inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
    except ValueError as error:
        raise ConfigError(f"pair.student.lora.target_modules: {str(error).splitlines()[0]}") from error
    for name, parameter in model.named_parameters():
        trained = ".lora_" in name
        parameter.requires_grad_(trained)
        if trained:  # an update is below the resolution of 16 bits
            parameter.data = parameter.data.float()


def has_adapters(model: nn.Module) -> bool:
    return any(_is_adapted(module) for module in model.modules())


def merged_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and values as the model without adapters would have them, one at a time; FSDP2's shards are gathered."""
    adapted = {name: module for name, module in model.named_modules() if _is_adapted(module)}
    for name, parameter in model.named_parameters():
        owner, _, rest = name.partition(".base_layer.")
        if owner in adapted and rest:
            value = _of(adapted[owner]).merged() if rest == "weight" else _whole(parameter)
            yield f"{owner}.{rest}", value
        elif ".lora_" not in name:
            yield name, _whole(parameter)


def save_adapter(model: PreTrainedModel, folder: Path) -> None:
    """The adapters as peft stores them: PeftModel.from_pretrained(base, folder) takes them."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: _whole(p).contiguous() for name, p in _stored(model)}, folder / WEIGHTS)
    config: Any = model.peft_config[_ADAPTER]  # pyright: ignore[reportIndexIssue, reportArgumentType, reportCallIssue]
    config.save_pretrained(folder)


@torch.no_grad()
def load_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Take adapters that `save_adapter` wrote, bit for bit; an error unless they are this model's."""
    saved, own = load_file(folder / WEIGHTS), dict(_stored(model))
    if saved.keys() != own.keys() or any(saved[name].shape != own[name].shape for name in own):
        raise ConfigError(f"{folder} holds adapters of other layers or another rank than pair.student.lora asks for")
    for name, parameter in own.items():
        parameter.copy_(saved[name])


def _stored(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Adapter parameters under peft's stored names: without the adapter's own."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            yield _PREFIX + name.replace(f".{_ADAPTER}.", "."), parameter


def _is_adapted(module: nn.Module) -> bool:
    return hasattr(module, "base_layer") and hasattr(module, "lora_A")


def _of(module: Any) -> _Adapted:
    return _Adapted(
        weight=_whole(module.base_layer.weight),
        down=_whole(module.lora_A[_ADAPTER].weight),
        up=_whole(module.lora_B[_ADAPTER].weight),
        scale=float(module.scaling[_ADAPTER]),
    )


def _whole(parameter: Tensor) -> Tensor:
    value = parameter.detach()
    gather = getattr(value, "full_tensor", None)
    return gather() if gather is not None else value


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            "pair.student.lora needs peft, which is not installed; pip install 'tip_exp[lora]'"
        ) from error
    return peft
