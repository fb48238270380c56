"""LoRA students: only the adapters train; vLLM and checkpoints get merged weights under the plain model's names.

W x + s B A x with s = alpha / rank (Hu et al. 2021). The learner and the hf sampler run the adapters unmerged, so
sampling and scoring use the same numbers bit for bit. peft is optional: only functions import it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor, nn

from tip_exp.utils.errors import ConfigError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tip_exp.config.schema import LoraConfig

WEIGHTS = "adapter_model.safetensors"  # the file name that peft expects
_ADAPTER = "default"
_PREFIX = "base_model.model."  # PeftModel.from_pretrained expects it in stored names


def attach(model: PreTrainedModel, settings: LoraConfig, base: str) -> None:
    """Add adapters to `model` in place. They are float32, the only trainable parameters, and start at B = 0.

    `base`: path of the base model, stored in the adapter's config. Raises ConfigError for layers that cannot have one.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            "pair.student.lora needs peft, which is not installed; pip install 'tip_exp[lora]'"
        ) from error
    outer = (model.get_input_embeddings(), model.get_output_embeddings())
    outer_names = {name.rpartition(".")[2] for name, module in model.named_modules() if module in outer}
    targets = settings.target_modules
    if isinstance(targets, list) and (refused := sorted(outer_names & set(targets))):
        raise ConfigError(
            f"pair.student.lora.target_modules: {', '.join(refused)} cannot have an adapter, because the loss uses the "
            "plain embedding and output head; name linear layers of the decoder"
        )
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=0.0,  # rollouts, scores and gradients must see the same network
        target_modules=targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )
    try:
        peft.inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
    except ValueError as error:
        raise ConfigError(f"pair.student.lora.target_modules: {first_line(error)}") from error
    for name, parameter in model.named_parameters():
        is_adapter = ".lora_" in name
        parameter.requires_grad_(is_adapter)
        if is_adapter:  # an update is below the resolution of 16 bits
            parameter.data = parameter.data.float()


def has_adapters(model: nn.Module) -> bool:
    return hasattr(model, "peft_config")


def merged_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and values of the plain model's parameters, adapters merged, one at a time; FSDP2 shards are gathered."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        layer, *adapted = name.split(".base_layer")  # an adapter of experts may be in another one
        delta = _delta(model.get_submodule(layer), name.rpartition(".")[2]) if adapted else None
        # W + s B A in float32, rounded once; peft rounds that of experts before, as in the forward pass
        merged = parameter if delta is None else parameter + delta
        yield name.replace(".base_layer", ""), whole_tensor(merged).to(parameter.dtype)


def stored_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that files of the plain model hold, such as the bias of a router, by its names."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {n.replace(".base_layer", ""): tensor for n, tensor in model.state_dict().items() if n not in parameters}


def _delta(layer: Any, parameter: str) -> Tensor | None:
    """s B A of the adapter of `layer`, or of one inside it, that changes this parameter; None if there is none."""
    while hasattr(layer, "base_layer"):
        if getattr(layer, "parameter_name", "weight") == parameter:
            return layer.get_delta_weight(_ADAPTER)
        layer = layer.base_layer
    return None


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapters under the names that peft stores, in host memory; shards are gathered."""
    from peft import get_peft_model_state_dict

    # save_embedding_layers=False: "auto" would look the base model up on the hub
    state = get_peft_model_state_dict(model, adapter_name=_ADAPTER, save_embedding_layers=False)
    return {_PREFIX + name: whole_tensor(value).cpu().contiguous() for name, value in state.items()}


def save_adapter(model: PreTrainedModel, tensors: dict[str, Tensor], folder: Path) -> None:
    """Write `adapter_tensors` of the model for PeftModel.from_pretrained(base, folder)."""
    folder.mkdir(parents=True)
    save_file(tensors, folder / WEIGHTS)
    config: Any = model.peft_config[_ADAPTER]  # pyright: ignore[reportIndexIssue, reportArgumentType, reportCallIssue]
    config.save_pretrained(folder)


def whole_tensor(tensor: Tensor) -> Tensor:
    """The detached value; a DTensor is gathered, which every rank has to take part in."""
    value = tensor.detach()
    gather = getattr(value, "full_tensor", None)
    return gather() if gather is not None else value
