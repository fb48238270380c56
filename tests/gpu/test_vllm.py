"""vLLM on CUDA: sleep frees memory, and waking up never restores old weights."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
from tests.helpers import train_step

from tip_exp.build import make_selector
from tip_exp.config.schema import RunConfig
from tip_exp.learner.learner import Learner
from tip_exp.learner.on_policy import check_logprob_mismatch, limits_for
from tip_exp.models.load import load_pair
from tip_exp.models.pair import Pair
from tip_exp.records.meter import Meter
from tip_exp.records.metrics import MISMATCH_MAX
from tip_exp.rollout.backends import choose
from tip_exp.rollout.hf import HfSampler
from tip_exp.rollout.vllm import VllmSampler
from tip_exp.types import Sampling

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or find_spec("vllm") is None, reason="needs CUDA and vLLM"),
    pytest.mark.filterwarnings("ignore"),
]
CUDA = torch.device("cuda")
SAMPLED = Sampling(4, 1.0, 1.0, 0, 72)
GREEDY = Sampling(1, 0.0, 1.0, 0, 72)
QUESTIONS = [f"Tom has {n} pens. He finds 2. He gives {n % 5 + 1}. How many pens?" for n in range(10, 26)]


@pytest.fixture(scope="module")
def pair(tiny_config: RunConfig) -> Pair:
    return load_pair(tiny_config.pair, CUDA)


def make(pair: Pair, config: RunConfig, dtype: str) -> VllmSampler:
    settings = config.rollout.vllm.model_copy(update={"gpu_memory_utilization": 0.2})
    model, stop_ids = pair.student.module, pair.stop_ids
    return VllmSampler(model, stop_ids=stop_ids, settings=settings, dtype=dtype, max_model_len=200, max_num_seqs=256)


def test_auto_chooses_vllm(compose_run: Callable[..., RunConfig]) -> None:
    backend = choose(compose_run().rollout, CUDA, "float32")
    assert backend.name == "vllm" and backend.dtype == "bfloat16"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("eager", ["true", "false"])
def test_every_step_is_on_policy_through_sleep_and_wake(
    pair: Pair, compose_run: Callable[..., RunConfig], level: int, dtype: str, eager: str
) -> None:
    config = compose_run(f"rollout.vllm.sleep_level={level}", f"+rollout.vllm.engine_args.enforce_eager={eager}")
    prompts = [pair.prompt_ids(question) for question in QUESTIONS]
    settings = config.learner.model_copy(update={"warmup_steps": 0})
    learner = Learner(pair, make_selector(config), settings, seed=0, meter=Meter(CUDA))
    sampler = make(pair, config, dtype)
    try:
        for step in (1, 2, 3, 4):
            metrics = train_step(learner, sampler.generate(prompts, SAMPLED, seed=step), step).metrics
            check_logprob_mismatch(metrics, limits_for(dtype), step)
            sampler.sync()
            if dtype == "float32":  # twice after one sync: level 2 drops the weights in between
                reference = HfSampler(pair.student.module, stop_ids=pair.stop_ids, pad_id=pair.pad_id, batch_size=64)
                hf_ids = [r.token_ids for r in reference.generate(prompts, GREEDY, seed=0)]
                for _ in range(2):
                    vllm_ids = [r.token_ids for r in sampler.generate(prompts, GREEDY, seed=0)]
                    equal = sum(a == b for a, b in zip(vllm_ids, hf_ids, strict=True))
                    assert equal >= len(prompts) - 1  # a tie may be broken differently
        assert metrics[MISMATCH_MAX] > 0
    finally:
        sampler.close()


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_frees_device_memory(pair: Pair, compose_run: Callable[..., RunConfig], level: int) -> None:
    sampler = make(pair, compose_run(f"rollout.vllm.sleep_level={level}"), "bfloat16")
    try:
        awake = torch.cuda.mem_get_info()[0]
        sampler.generate([pair.prompt_ids(QUESTIONS[0])], SAMPLED, seed=0)  # ends asleep
        freed = torch.cuda.mem_get_info()[0] - awake
        assert freed > 0.1 * torch.cuda.mem_get_info()[1]  # at least half of the engine's 20 %
    finally:
        sampler.close()
