"""Arguments of the engine by device and settings; needs no vLLM."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from tip_exp.config.schema import RunConfig
from tip_exp.models.pair import Pair
from tip_exp.rollout.vllm_options import engine_options

Compose = Callable[..., RunConfig]


@pytest.fixture
def options_of(tiny_pair: Pair, compose_run: Compose) -> Callable[..., dict[str, Any]]:
    def options(
        *overrides: str, on_cpu: bool = False, max_model_len: int = 200, max_num_seqs: int = 256, ranks: int = 1
    ) -> dict[str, Any]:
        settings = compose_run(*overrides).rollout.vllm
        return engine_options(
            settings,
            tiny_pair.student.module.config,
            dtype="float32",
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            on_cpu=on_cpu,
            ranks=ranks,
        )

    return options


def test_a_gpu_engine_sleeps_and_captures_graphs(options_of: Callable[..., dict[str, Any]]) -> None:
    options = options_of()
    assert options["enable_sleep_mode"] and not options["enforce_eager"]
    assert options["max_num_seqs"] == 256
    assert "kv_cache_memory_bytes" not in options and "enable_chunked_prefill" not in options


def test_a_small_models_engine_has_the_blocks_that_it_needs(
    options_of: Callable[..., dict[str, Any]], tiny_pair: Pair, compose_run: Compose
) -> None:
    """256 sequences of 200 tokens, in blocks of 16 and one more each, instead of millions; a large cache is vLLM's."""
    assert options_of()["num_gpu_blocks_override"] == 256 * (13 + 1)
    assert "num_gpu_blocks_override" not in options_of(max_model_len=20_000)  # 256 x 20,000 x 512 bytes
    config = copy.deepcopy(tiny_pair.student.module.config)
    config.layer_types = ["full_attention", "sliding_attention"]  # vLLM gives each kind blocks of its own
    settings = compose_run().rollout.vllm
    options = engine_options(settings, config, dtype="float32", max_model_len=200, max_num_seqs=256, on_cpu=False)
    assert "num_gpu_blocks_override" not in options


def test_a_cpu_engine_has_its_cache_size_and_no_chunked_prefill(options_of: Callable[..., dict[str, Any]]) -> None:
    """Keys and values of 2 layers, 1 head of 32, 4 bytes, for 2 sequences of three blocks of 128 tokens."""
    options = options_of(on_cpu=True, max_num_seqs=2)
    assert options["enforce_eager"] and not options["enable_sleep_mode"] and not options["enable_chunked_prefill"]
    assert options["kv_cache_memory_bytes"] == 2 * 2 * 1 * 32 * 4 * 2 * (3 * 128)
    assert options["max_num_batched_tokens"] == 2048
    assert options_of(on_cpu=True, max_model_len=5000)["max_num_batched_tokens"] == 5000


def test_each_rank_has_an_engine_of_its_own(options_of: Callable[..., dict[str, Any]]) -> None:
    assert "distributed_executor_backend" not in options_of()
    options = options_of(ranks=2)
    assert options["distributed_executor_backend"] == "external_launcher" and "tensor_parallel_size" not in options


def test_engine_args_override_everything(options_of: Callable[..., dict[str, Any]]) -> None:
    options = options_of("+rollout.vllm.engine_args.block_size=32", "+rollout.vllm.engine_args.enforce_eager=true")
    assert options["block_size"] == 32 and options["enforce_eager"]
