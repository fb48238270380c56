"""Code that runs inside vLLM's worker, into whose class vLLM mixes `WeightSync`: it loads the learner's weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor


class WeightSync:
    """Called by name through `collective_rpc`; the worker is in the learner's process, so tensors pass by reference."""

    def tip_load(self: Any, named: Iterator[tuple[str, Tensor]]) -> None:
        """Load whole parameters under their checkpoint names."""
        self.reload_weights(weights_iterator=named)
        repack(self.model_runner.get_model())


def repack(model: Any) -> None:
    """Pack again what vLLM's CPU build computes with, after a reload: a tied head's copy and the weights of experts.

    A reload leaves the copy as it was, and experts in the layout of the checkpoint. On a GPU a tied head shares the
    embedding's storage, and experts keep their layout.
    """
    for module in model.modules():
        if type(module).__name__ == "ParallelLMHead" and hasattr(module, "cpu_linear"):
            module.quant_method.process_weights_after_loading(module)
        kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
        if kernel is not None and module.w13_weight.device.type == "cpu":
            kernel.fused_experts.process_weights_after_loading(module)
