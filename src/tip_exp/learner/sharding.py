"""Spread a model over the ranks with FSDP2: decoder layers by hooks, embedding and output head by hand.

Losses and `embed` read embedding and head as whole tensors and add into whole gradients, so these are not under FSDP's
hooks: they are gathered once a step, and their gradient is summed over the ranks and scattered once a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from tip_exp.config.schema import RunConfig
from tip_exp.learner.distributed import Ranks
from tip_exp.models import load
from tip_exp.models.weight_files import WeightFiles
from tip_exp.utils.errors import ConfigError

Slot = tuple[nn.Module, str]  # a module and the name of its parameter


@dataclass(frozen=True, slots=True)
class Sharding:
    """How a model is spread: over the last dimension of `mesh`, with a copy for each index of an earlier one (HSDP).

    `compute_dtype`: of forward and backward passes; None: the weights' own. `offload`: decoder layers wait in host
    memory. Gradients are sums over the ranks, in float32 or wider.
    """

    mesh: DeviceMesh
    device: torch.device
    compute_dtype: torch.dtype | None = None
    offload: bool = False

    def __call__(self, module: PreTrainedModel, files: WeightFiles | None = None) -> ShardedWeights:
        """Shard `module` in place. With `files` its parameters are on the meta device, and each rank reads its rows."""
        vocabulary = self._take_vocabulary(module, files)
        self._shard_layers(module)
        if files is not None:
            self._load(module, files)
        for parameter, slots in vocabulary:
            _put(slots, parameter)
        return ShardedWeights(module, vocabulary, self.compute_dtype)

    @property
    def _placements(self) -> list[Placement]:
        return [*[Replicate()] * (self.mesh.ndim - 1), Shard(0)]

    def _rows(self, length: int) -> slice:
        """This rank's rows of a tensor with `length` rows, as torch.chunk and FSDP cut it."""
        size, index = self.mesh.size(self.mesh.ndim - 1), self.mesh.get_local_rank(self.mesh.ndim - 1)
        height = -(-length // size)
        return slice(min(index * height, length), min((index + 1) * height, length))

    def _take_vocabulary(
        self, module: PreTrainedModel, files: WeightFiles | None
    ) -> list[tuple[nn.Parameter, list[Slot]]]:
        """Embedding and head, tied or not, as sharded parameters, with the slots that they are removed from."""
        slots: dict[int, list[Slot]] = {}
        for layer in filter(None, (module.get_input_embeddings(), module.get_output_embeddings())):
            for name, parameter in layer.named_parameters(recurse=False):
                slots.setdefault(id(parameter), []).append((layer, name))
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        vocabulary: list[tuple[nn.Parameter, list[Slot]]] = []
        for key, holders in slots.items():
            layer, attribute = holders[0]
            parameter: nn.Parameter = getattr(layer, attribute)
            rows = self._rows(len(parameter))
            values = parameter.detach()[rows] if files is None else files.read(names[key], rows).to(parameter.dtype)
            local = torch.empty(values.shape, dtype=parameter.dtype, device=self.device).copy_(values)
            sharded = DTensor.from_local(
                local, self.mesh, self._placements, shape=parameter.shape, stride=parameter.stride()
            )
            vocabulary.append((nn.Parameter(sharded, requires_grad=parameter.requires_grad), holders))
        for _, holders in vocabulary:
            _put(holders, None)
        return vocabulary

    def _shard_layers(self, module: PreTrainedModel) -> None:
        """FSDP for each decoder layer, and for the rest of the backbone; gradients are summed."""
        backbone: nn.Module = module.base_model
        layers = [layer for layer in backbone.modules() if isinstance(layer, GradientCheckpointingLayer)]
        if (
            not layers
            or backbone is module
            or {id(p) for p in module.parameters()} != {id(p) for p in backbone.parameters()}
        ):
            raise ConfigError(
                f"{type(module).__name__} cannot be sharded: it needs decoder layers in a backbone that holds every "
                "weight except the output head; choose another model or run it with ranks=1"
            )
        pin = self.device.type == "cuda"
        offload = CPUOffloadPolicy(pin_memory=pin) if self.offload else OffloadPolicy()
        # Inputs arrive in the compute dtype, because the gathered embedding has it; positions stay as they are.
        wide = torch.promote_types(self.compute_dtype or next(backbone.parameters()).dtype, torch.float32)
        policy = MixedPrecisionPolicy(self.compute_dtype, reduce_dtype=wide, cast_forward_inputs=False)
        for layer in layers:
            fully_shard(layer, mesh=self.mesh, mp_policy=policy, offload_policy=offload)
        fully_shard(backbone, mesh=self.mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=True)
        sharded = [part for part in backbone.modules() if isinstance(part, FSDPModule)]
        for part in sharded:
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
        # FSDP's default is the reverse order of the forward passes since the last backward pass, in which ranks differ
        # when they have sampled different numbers of tokens. The first layer has nothing left to fetch.
        order = [*sharded[1:], sharded[0]]  # of the forward passes; modules() names the backbone first
        for earlier, later in pairwise([order[0], *order]):
            later.set_modules_to_backward_prefetch([earlier])

    @torch.no_grad()
    def _load(self, module: PreTrainedModel, files: WeightFiles) -> None:
        """Allocate the parameters on the meta device and fill this rank's rows of each."""
        target = torch.device("cpu") if self.offload else self.device
        module._apply(lambda t: torch.empty_like(t, device=target) if t.is_meta else t)
        for name, parameter in module.named_parameters():
            assert isinstance(parameter, DTensor), "every weight of the backbone is sharded"
            local = parameter.to_local()
            local.copy_(files.read(name, self._rows(len(parameter))))
        for name, buffer in module.named_buffers():
            if name in files:
                buffer.copy_(files.read(name, None))


class ShardedWeights:
    """The contexts in which a sharded model's weights are whole; entering one is collective."""

    def __init__(
        self,
        module: PreTrainedModel,
        vocabulary: list[tuple[nn.Parameter, list[Slot]]],
        compute_dtype: torch.dtype | None,
    ) -> None:
        self._vocabulary, self._compute_dtype, self._depth = vocabulary, compute_dtype, 0
        self._sharded_of: dict[nn.Parameter, nn.Parameter] = {}  # inside `whole`: of embedding and head
        self._layers = [part for part in module.modules() if isinstance(part, FSDPModule)]
        self._backbone: nn.Module = module.base_model

    @contextmanager
    def whole(self, *, trains: bool = False) -> Iterator[None]:
        """Inside, embedding and head are plain tensors in the compute dtype.

        With `trains` their `.grad`, float32 or wider, is summed over the ranks at the end, each rank keeping its rows.
        """
        if self._depth:
            assert not trains, "gradients are summed by the outermost context"
            yield
            return
        self._sharded_of = whole = {self._gather(sharded): sharded for sharded, _ in self._vocabulary}
        for parameter, (_, slots) in zip(whole, self._vocabulary, strict=True):
            _put(slots, parameter)
        self._depth += 1
        try:
            yield
        finally:
            self._depth, self._sharded_of = self._depth - 1, {}
            for parameter, slots in self._vocabulary:
                _put(slots, parameter)
        if trains:
            for parameter, sharded in whole.items():
                if sharded.requires_grad:
                    sharded.grad = _summed_gradient(parameter, sharded).to(sharded.dtype)

    def summed_gradient(self, parameter: nn.Parameter) -> Tensor | None:
        sharded = self._sharded_of.get(parameter)
        return parameter.grad if sharded is None else _summed_gradient(parameter, sharded)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, every weight is a plain tensor in the compute dtype, and forward passes are not collective."""
        backbone = self._backbone
        assert isinstance(backbone, FSDPModule), "the backbone is sharded"
        with self.whole():
            backbone.set_reshard_after_forward(False)
            for layer in self._layers:
                layer.unshard()
            try:
                yield
            finally:
                for layer in self._layers:
                    layer.reshard()
                backbone.set_reshard_after_forward(True)

    def reset(self) -> bool:
        reset = getattr(self._backbone, "reset_iter_state", None)  # older versions of torch have none
        for parameter in self._backbone.parameters():  # whole ones, of the layers that were in use
            parameter.grad = None
        if reset is not None:
            reset()
        return reset is not None

    def _gather(self, sharded: nn.Parameter) -> nn.Parameter:
        value = sharded.detach()
        if self._compute_dtype is not None:
            value = value.to(self._compute_dtype)
        assert isinstance(value, DTensor), "embedding and head are sharded"
        whole = nn.Parameter(value.full_tensor(), requires_grad=sharded.requires_grad)
        if sharded.requires_grad:
            whole.grad_dtype = torch.promote_types(value.dtype, torch.float32)
        return whole


def _summed_gradient(whole: nn.Parameter, sharded: nn.Parameter) -> Tensor:
    """The sum of `whole.grad` over the ranks, of which each holds its rows; frees `whole.grad`."""
    assert isinstance(sharded, DTensor), "embedding and head are sharded"
    gradient, whole.grad = whole.grad, None
    if gradient is None:
        gradient = torch.zeros_like(whole, dtype=whole.grad_dtype)
    mesh, placements = sharded.device_mesh, sharded.placements
    partial = DTensor.from_local(gradient, mesh, [Partial()] * mesh.ndim)
    # Scattered first: with replicas, only this rank's rows then cross the slower dimension of the mesh.
    scattered = partial.redistribute(placements=[*partial.placements[:-1], placements[-1]])
    return scattered.redistribute(placements=placements)


def _put(slots: list[Slot], parameter: nn.Parameter | None) -> None:
    """Register a parameter in its slots; None leaves them empty."""
    for module, name in slots:
        module._parameters[name] = parameter


def make_sharding(config: RunConfig, ranks: Ranks, device: torch.device) -> dict[str, load.Shard] | None:
    """How each model is spread over the ranks; None if one rank holds and computes in whole, unconverted weights."""
    if ranks.size % (replicas := config.learner.replicas):
        raise ConfigError(
            f"learner.replicas={replicas} does not divide the number of ranks, {ranks.size}; choose a divisor, 1 to "
            "shard over all ranks"
        )
    compute_dtype = lowered_dtype(config)
    if ranks.size == 1 and compute_dtype is None:
        return None
    mesh = ranks.mesh(device, replicas)
    shard: dict[str, load.Shard] = {"student": Sharding(mesh, device, compute_dtype)}
    if ranks.size > 1:
        shard["teacher"] = Sharding(mesh, device, offload=config.pair.teacher.placement == "offload")
    return shard


def lowered_dtype(config: RunConfig) -> torch.dtype | None:
    """The dtype of the student's passes, if its weights have a wider one."""
    lowers = (config.pair.student.dtype, config.learner.compute_dtype) == ("float32", "bfloat16")
    return torch.bfloat16 if lowers else None
