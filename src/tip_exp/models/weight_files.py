"""A model without weights, and its safetensors files: their names, and the rows of them that a rank keeps."""

from __future__ import annotations

import copy
import logging
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

log = logging.getLogger(__name__)
_OF_LAYER = re.compile(r"^(.*?\.\d+)\..*")  # a parameter's name, and its layer with the number


class WeightFiles:
    """The stored tensors of a model, by the names that the module has for them."""

    def __init__(self, folder: Path) -> None:
        self.bytes_read = 0
        files = [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
        # safe_open has keys() but cannot be iterated.
        self._files: dict[str, Any] = {name: file for file in files for name in file.keys()}  # noqa: SIM118
        self._stored: dict[str, str] = {}  # the module's name -> the stored name
        # The module's name -> its shape, and the stored tensors that hold its rows, all but the last dimension as one.
        self._pieces: dict[str, tuple[torch.Size, dict[str, Tensor]]] = {}

    def match(self, module: PreTrainedModel) -> bool:
        """Find each parameter of the module among the stored tensors; whether all are there, whole or in pieces."""
        aliases: dict[int, list[str]] = {}  # of tied parameters any name may be stored
        for name, parameter in module.named_parameters(remove_duplicate=False):
            aliases.setdefault(id(parameter), []).append(name)
        prefix = f"{module.base_model_prefix}."  # absent where a backbone was stored alone
        for name, parameter in module.named_parameters():
            shape = parameter.shape
            # The numbers of the parameter's rows, in two columns, go where a file has the rows.
            rows = torch.arange(math.prod(shape[:-1])).view(*shape[:-1], 1).expand(*shape[:-1], 2)
            try:
                pieces = revert_weight_conversion(module, {name: rows})
            except (RuntimeError, ValueError):  # a conversion of columns
                pieces = {}
            if len(pieces) == 1 and next(iter(pieces.values())).equal(rows):  # whole, under this name or another
                names = [n for alias in aliases[id(parameter)] for n in (alias, alias.removeprefix(prefix))]
                stored = next((n for n in (*pieces, *names) if n in self._files), name)
                self._stored[name], pieces = stored, {stored: rows}
            else:
                self._pieces[name] = shape, {stored: kept[..., 0].flatten() for stored, kept in pieces.items()}
            if not pieces or not all(self._has(n, [*kept.shape[:-1], shape[-1]]) for n, kept in pieces.items()):
                log.warning("%s is not stored as the model has it", name)
                return False
        self._stored |= {name: name for name, _ in module.named_buffers() if name in self._files}
        return True

    def _has(self, stored: str, shape: list[int]) -> bool:
        return stored in self._files and self._files[stored].get_slice(stored).get_shape() == shape

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Some rows of a tensor, or all of it; nothing else of it is read."""
        if name in self._pieces:
            return self._read_pieces(*self._pieces[name], rows)
        stored = self._stored[name]
        file = self._files[stored]
        if rows is None:
            values: Tensor = file.get_tensor(stored)
        elif rows.start == rows.stop:
            values = torch.empty(0, *file.get_slice(stored).get_shape()[1:])
        else:
            values = file.get_slice(stored)[rows]
        self.bytes_read += values.nbytes
        return values

    def _read_pieces(self, shape: torch.Size, pieces: dict[str, Tensor], rows: slice | None) -> Tensor:
        start, stop = (0, shape[0]) if rows is None else (rows.start, rows.stop)
        height = math.prod(shape[1:-1])
        values = torch.empty(0, shape[-1])
        for stored, kept in pieces.items():
            inside = (kept >= start * height) & (kept < stop * height)
            if bool(inside.any()):
                piece = self._files[stored].get_tensor(stored).view(-1, shape[-1])
                self.bytes_read += piece.nbytes
                if len(values) == 0:
                    values = piece.new_empty((stop - start) * height, shape[-1])
                values[kept[inside] - start * height] = piece[inside]
        return values.view(stop - start, *shape[1:])


def empty_model(
    config: PretrainedConfig, path: str, revision: str, dtype: torch.dtype, attention: str
) -> tuple[PreTrainedModel, WeightFiles] | None:
    """The model that from_pretrained would load, its parameters on the meta device, and its files.

    None if they do not hold each parameter, whole or in pieces of rows, or if some parameters keep another dtype: then
    from_pretrained has to convert them.
    """
    folder = Path(path)
    if not folder.is_dir():
        folder = Path(snapshot_download(path, revision=revision, allow_patterns=["*.safetensors", "*.json"]))
    with _parameters_on_meta():
        module = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    keeps_float32 = getattr(module, "_keep_in_fp32_modules", None) or getattr(
        module, "_keep_in_fp32_modules_strict", None
    )
    files = WeightFiles(folder)
    if (keeps_float32 and dtype != torch.float32) or not files.match(module):
        log.warning("%s: each rank loads the whole model before it keeps its share", path)
        return None
    if (folder / "generation_config.json").is_file():
        module.generation_config = GenerationConfig.from_pretrained(folder)
    return module, files


def checkpoint_tensors(model: PreTrainedModel, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Parameters of `model` under the names and in the shapes that its files have, such as one tensor for each expert.

    `tensors`: names and values in the module's order; those of one layer are in memory at a time.
    """
    for _, layer in groupby(tensors, key=lambda named: _OF_LAYER.sub(r"\1", named[0])):
        yield from revert_weight_conversion(model, dict(layer)).items()


def plain_copy(module: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A model of the same config whose parameters are allocated and not set: whole, without adapters, in eval mode."""
    with _parameters_on_meta():
        config = copy.deepcopy(module.config)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=config._attn_implementation)
    model = model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    model.tie_weights()
    for name, buffer in module.named_buffers():
        model.get_buffer(name).copy_(buffer)
    return model.eval()  # parameters without gradient would give other rounding than the learner's module


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made inside have their parameters on the meta device; buffers, such as rotary tables, are computed."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # a tied parameter is on meta already and stays tied
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        nn.Module.register_parameter = register
