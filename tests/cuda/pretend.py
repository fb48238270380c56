"""Tensors that claim to be on cuda:0 and compute on the CPU: they show misplaced tensors and waits without a GPU.

A `PretendedTensor` wraps the CPU tensor that computes. An operator that mixes it with a CPU tensor raises, as on CUDA,
and every operation for which CUDA makes the host wait for the device is counted in `waits`, by source line. A process
must load the library that `build_guard` makes before it imports torch, and cannot undo it.
"""

from __future__ import annotations

import subprocess
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
aten = torch.ops.aten
# The size of their result, or a Python number, depends on values.
VALUE_DEPENDENT = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.masked_select,
    aten.equal,
    aten.is_nonzero,
    aten.bincount,
    aten.repeat_interleave,
}
COPIES = {aten._to_copy, aten.copy_}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
waits: Counter[str] = Counter()
_pinned: list[Tensor] = []  # kept alive, so that their addresses stay theirs


def build_guard(folder: Path) -> Path:
    """Build guard.cpp with g++; a process that loads the library before it imports torch has a CUDA device."""
    torch_folder = Path(torch.__file__).parent
    library, libraries = folder / "guard.so", torch_folder / "lib"
    flags = [
        "-O0",
        "-std=c++20",
        "-shared",
        "-fPIC",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
    ]
    paths = [f"-I{torch_folder / 'include'}", f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-lc10", "-ltorch_cpu"]
    source = Path(__file__).with_name("guard.cpp")
    subprocess.run(["g++", *flags, str(source), "-o", str(library), *paths], check=True)
    return library


def count_wait(operation: str) -> None:
    """Count one wait of the host at the innermost line of tip_exp."""
    frames = [f for f in reversed(traceback.extract_stack()) if "/src/tip_exp/" in f.filename]
    line = f"{frames[0].filename.split('/tip_exp/')[-1]}:{frames[0].lineno}" if frames else "outside"
    waits[f"{line} {operation}"] += 1


class PretendedTensor(Tensor):
    """`on_cpu`: the tensor that computes."""

    on_cpu: Tensor

    @staticmethod
    def __new__(cls, real: Tensor, requires_grad: bool = False) -> PretendedTensor:
        assert not isinstance(real, PretendedTensor), "one wrapper is enough"
        wrapper = torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls,
            real.shape,
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            device=CUDA,
            requires_grad=requires_grad,
        )
        wrapper.on_cpu = real
        return wrapper

    def tolist(self) -> Any:
        count_wait("tolist")
        return self.on_cpu.tolist()

    def __repr__(self, **_: Any) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"PretendedTensor({self.on_cpu!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


class Pretending(TorchDispatchMode):
    """Inside the block, tensors made on cuda:0 are pretended ones."""

    def __enter__(self) -> Pretending:
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(values, device="cuda") copies from the host
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(False)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


def to_cuda(module: nn.Module) -> nn.Module:
    """The module with pretended copies of its parameters and buffers; shared ones stay shared."""
    moved: dict[int, Tensor] = {}

    def move(tensor: Tensor) -> Tensor:
        if id(tensor) not in moved:
            copy = PretendedTensor(tensor.detach().clone())
            is_parameter = isinstance(tensor, nn.Parameter)
            moved[id(tensor)] = nn.Parameter(copy, requires_grad=tensor.requires_grad) if is_parameter else copy
        return moved[id(tensor)]

    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = move(tensor)  # pyright: ignore[reportArgumentType]
    return module


def to_cpu(tensor: Tensor) -> Tensor:
    """The values, without a wait."""
    return tensor.on_cpu if isinstance(tensor, PretendedTensor) else tensor


def _dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    leaves, spec = tree_flatten((args, kwargs))
    packet = func.overloadpacket
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    on_cuda = any(isinstance(tensor, PretendedTensor) for tensor in tensors)
    devices = [torch.device(leaf) for leaf in leaves if isinstance(leaf, torch.device)]
    target = devices[-1] if devices else CUDA if on_cuda else CPU
    if on_cuda:
        _check_devices(func, packet, args, tensors)
    _count(packet, args, kwargs, on_cuda, target)
    real_args, real_kwargs = tree_unflatten(
        [
            to_cpu(leaf) if isinstance(leaf, Tensor) else CPU if isinstance(leaf, torch.device) else leaf
            for leaf in leaves
        ],
        spec,
    )
    pins = bool(real_kwargs.pop("pin_memory", False)) or packet is aten._pin_memory
    result = _compute(func, real_args, real_kwargs)
    if pins:
        _pinned.append(result)
    wraps = isinstance(args[0], PretendedTensor) if packet is aten.copy_ else target.type == "cuda"
    if not wraps:
        return result
    wrapped = tree_map_only(Tensor, lambda t: t if isinstance(t, PretendedTensor) else PretendedTensor(t), result)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if on_cuda else wrapped


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operator on the CPU tensors; GEMMs of 16-bit inputs with a float32 result exist on CUDA alone."""
    if func is aten.mm.dtype:
        return args[0].to(args[2]) @ args[1].to(args[2])
    if func is aten.mm.dtype_out:
        return torch.mm(args[0].to(args[2]), args[1].to(args[2]), out=kwargs["out"])
    if func is aten._pin_memory.default:
        return args[0].clone()
    return func(*args, **kwargs)


def _check_devices(func: Any, packet: Any, args: Any, tensors: list[Tensor]) -> None:
    """Raise unless all tensors are pretended, CPU numbers (0-d) excepted, as on CUDA."""
    if packet in COPIES:
        return
    if packet in INDEXING:  # the indices may be on the CPU
        tensors = [tensor for tensor in (args[0], *args[2:3]) if isinstance(tensor, Tensor)]
    if any(not isinstance(tensor, PretendedTensor) and tensor.dim() > 0 for tensor in tensors):
        raise RuntimeError(f"{func}: expected all tensors on the same device, but found cuda:0 and cpu")


def _count(packet: Any, args: Any, kwargs: dict[str, Any], on_cuda: bool, target: torch.device) -> None:
    """Count a wait if CUDA makes the host wait here."""
    if packet in COPIES:
        source = args[1] if packet is aten.copy_ else args[0]
        if packet is aten.copy_:
            target = CUDA if isinstance(args[0], PretendedTensor) else CPU
        if isinstance(source, PretendedTensor) == (target.type == "cuda"):
            return
        non_blocking = kwargs.get("non_blocking", False) or (packet is aten.copy_ and len(args) > 2 and args[2])
        host = args[0] if packet is aten.copy_ and target.type == "cpu" else source
        returns_pageable = packet is aten._to_copy and target.type == "cpu"
        if not non_blocking or returns_pageable or not _is_pinned(host):
            count_wait("copy to the " + ("device" if target.type == "cuda" else "host"))
        return
    if not on_cuda:
        return
    if packet in VALUE_DEPENDENT and kwargs.get("output_size") is None:
        count_wait(str(packet).removeprefix("aten."))
    if packet in INDEXING:
        indices = [index for index in args[1] if index is not None]
        fills = packet is not aten.index and args[2].numel() == 1  # a masked fill
        if any(index.dtype == torch.bool for index in indices) and not fills:
            count_wait("boolean index")
        elif any(not isinstance(index, PretendedTensor) for index in indices):
            count_wait("indices copied to the device")


def _is_pinned(tensor: Tensor) -> bool:
    address = tensor.untyped_storage().data_ptr()
    return any(pinned.untyped_storage().data_ptr() == address for pinned in _pinned)


def on_pretended(function: Any) -> Any:
    """A kernel launcher for CPU tensors, called with pretended ones."""

    def launch(*args: Any, **kwargs: Any) -> Any:
        assert all(
            isinstance(leaf, PretendedTensor) for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)
        )
        args, kwargs = tree_map_only(Tensor, to_cpu, (args, kwargs))
        return tree_map_only(Tensor, PretendedTensor, function(*args, **kwargs))

    return launch
