"""vLLM's worker in the learner's process: it loads the learner's weights, and must leave the learner's modules alone.

vLLM mixes `WeightSync` into the worker's class.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


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


def keep_call(backbone: type[nn.Module]) -> None:
    """Let modules that vLLM has not made be called as torch calls them, with their hooks.

    Where vLLM has no code for a model it uses that of transformers, and gives its class, which teacher and student
    share, a `__call__` for compiled code.
    """
    for cls in backbone.__mro__:
        compiled = vars(cls).get("__call__")
        if compiled is not None and issubclass(cls, PreTrainedModel):

            def call(self: Any, *args: Any, compiled: Any = compiled, **kwargs: Any) -> Any:
                is_engines = hasattr(self, "vllm_config")
                return (compiled if is_engines else nn.Module.__call__)(self, *args, **kwargs)

            cls.__call__ = call
