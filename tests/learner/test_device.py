"""The device of a rank, and the threads of its process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tip_exp.learner.device import pick_device, pick_threads
from tip_exp.utils.errors import ConfigError


@pytest.mark.parametrize(("num_parameters", "num_threads"), [(9_999_999, 1), (10_000_000, 7)])
def test_small_models_run_on_one_thread_unless_told(
    monkeypatch: pytest.MonkeyPatch, num_parameters: int, num_threads: int
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    pair: Any = SimpleNamespace(teacher=SimpleNamespace(module=nn.Linear(num_parameters, 1, bias=False, device="meta")))
    assert pick_threads(None, pair) == num_threads
    assert pick_threads(3, pair) == 3


def test_a_gpu_that_torch_cannot_use_is_an_error_and_no_run_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
    with pytest.raises(ConfigError, match=r"device=auto: this machine has GPU 0, 3, but torch .* device=cpu$"):
        pick_device("auto")
    with pytest.raises(ConfigError, match="device=cuda, but torch finds no CUDA device"):
        pick_device("cuda")
    assert pick_device("cpu") == torch.device("cpu")
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert pick_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda", 0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ConfigError, match=r"rank 1 of this node has no GPU: torch sees 1; lower ranks, or .* MIG"):
        pick_device("auto")


@pytest.mark.parametrize(("size", "device"), [("1", "cuda:0"), ("2", "cuda:3")])
def test_a_rank_has_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch, size: str, device: str) -> None:
    """Several processes have each a GPU; one alone has the first one, whatever its environment says."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert pick_device("cuda") == pick_device("auto") == torch.device(device)
    # torch.cuda.set_device, which `start` calls, refuses a device without a number.
    assert torch.cuda._utils._get_device_index(pick_device("cuda")) == torch.device(device).index
    assert pick_device("cpu") == torch.device("cpu")
