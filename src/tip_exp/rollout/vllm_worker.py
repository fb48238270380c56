"""Code that runs inside vLLM's worker, into whose class vLLM mixes `WeightSync`: it loads the learner's weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


class WeightSync:
    """Called by name through `collective_rpc`; the worker is in the learner's process, so tensors pass by reference."""

    def tip_load(self: Any, named: Iterator[tuple[str, Tensor]]) -> None:
        """Load whole parameters under their checkpoint names."""
        self.reload_weights(weights_iterator=named)
        repack_tied_head(self.model_runner.get_model())


def repack_tied_head(model: nn.Module) -> None:
    """Rebuild the packed copy of a tied embedding that vLLM's CPU head computes with; a reload does not update it.

    Only vLLM's CPU build packs (`cpu_linear`); on a GPU a tied head shares the embedding's storage.
    """
    for module in model.modules():
        if type(module).__name__ == "ParallelLMHead" and hasattr(module, "cpu_linear"):
            module.quant_method.process_weights_after_loading(module)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
