"""Compiles the kernels for GPUs that are not here, by the ptxas of Triton's wheel: no spills, wide loads.

Run by test_kernels.py in a process of its own.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tip_exp.losses import gradient_kernel, kernels
from tip_exp.losses.tiling import GROUP

ROWS = {"num_columns": "i32", "stride": "i32"}
ADD_TILE = {"Z": "*fp32", "T": "*fp32", "SUMS": "*fp64", "MAXIMA": "*fp32", **ROWS}
ADD_TILE |= dict.fromkeys(("num_groups", "model_stride", "row_stride"), "i32")
MIXTURE = {name: "*fp32" for name in ("Z", "T", "Z_MAX", "T_MAX", "RATIO", "SUM")} | ROWS
KL_GRAD = {"Z": "*fp32", "T": "*fp32", "GRAD": "*bf16", **dict.fromkeys(("STUDENT", "TEACHER", "REVERSE_KL"), "*fp64")}
KL_GRAD |= {"WEIGHTS": "*fp32", **ROWS, "grad_stride": "i32", "softcap": "fp32"}
ROW_CONSTANTS: dict[str, Any] = {"GROUP": GROUP, "BLOCK": kernels.ROW_BLOCK}
KERNELS: dict[str, tuple[Any, dict[str, str], dict[str, Any]]] = {
    "add_tile": (
        kernels.add_tile_kernel,
        ADD_TILE,
        {"HAS_TEACHER": True, "IS_FIRST": False, "HAS_MAXIMA": False, **ROW_CONSTANTS},
    ),
    "add_tile_maxima": (
        kernels.add_tile_kernel,
        ADD_TILE,
        {"HAS_TEACHER": True, "IS_FIRST": True, "HAS_MAXIMA": True, **ROW_CONSTANTS},
    ),
    "mixture_sum": (
        kernels.mixture_sum_kernel,
        MIXTURE,
        {"TINY": torch.finfo(torch.float32).tiny, "BLOCK": kernels.ROW_BLOCK},
    ),
    "logit_gradient": (
        gradient_kernel.logit_gradient_kernel,
        {"Z": "*fp32", "T": "*fp32", "SUMS": "*fp64", **ROWS},
        {"BLOCK": gradient_kernel.GAP_BLOCK},
    ),
    "reverse_kl": (
        kernels.kl_grad_kernel,
        KL_GRAD,
        {"IS_REVERSE": True, "HAS_WEIGHTS": True, "HAS_SOFTCAP": True, "BLOCK": kernels.GRAD_BLOCK},
    ),
    "forward_kl": (
        kernels.kl_grad_kernel,
        KL_GRAD,
        {"IS_REVERSE": False, "HAS_WEIGHTS": False, "HAS_SOFTCAP": False, "BLOCK": kernels.GRAD_BLOCK},
    ),
}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_compiles_to_wide_loads_without_spills(name: str, capability: int, tmp_path: Path) -> None:
    kernel, types, constants = KERNELS[name]
    signature = {parameter: types.get(parameter, "constexpr") for parameter in kernel.arg_names}
    # As at run time: addresses and sizes that 16 divides. torch aligns allocations, vocabularies are padded.
    divisible = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in types}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=divisible)
    is_row = kernel is not kernels.kl_grad_kernel
    warps = kernels.ROW_WARPS if is_row else kernels.GRAD_WARPS
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.findall(rf"{field}:(\d+)", usage)[-1]) for field in ("REG", "STACK", "LOCAL"))
    assert stack == local == 0, usage
    assert registers <= 128, "two programs of 256 threads or four of 128 fit into 65,536 registers"
    # Every logit of a block is loaded once, 16 bytes a thread at a time.
    loads = re.findall(r"ld\.global\S*v4\.b32", compiled.asm["ptx"])
    assert len(loads) * 16 * 32 * warps == 2 * 4 * constants["BLOCK"]
