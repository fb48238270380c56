"""The real engine on the embedded pair: it says what transformers says, takes new weights, is caught if not."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from tests.helpers import train_step
from torch import Tensor

from tip_exp.build import make_selector
from tip_exp.config.schema import RunConfig
from tip_exp.data.load import load
from tip_exp.learner.learner import Learner
from tip_exp.learner.on_policy import MAX, SyncError, check_logprob_mismatch, limits_for
from tip_exp.models.load import load_pair
from tip_exp.models.lora import merged_tensors
from tip_exp.models.pair import Pair
from tip_exp.records.meter import Meter
from tip_exp.rollout import vllm_worker
from tip_exp.rollout.hf import HfSampler
from tip_exp.rollout.vllm import EngineDiedError, VllmSampler, request_seed
from tip_exp.types import Rollout, Sampling

pytestmark = [
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.filterwarnings("ignore"),  # vLLM's own
]
GREEDY = Sampling(samples=1, temperature=0.0, top_p=1.0, top_k=0, max_tokens=72)
SAMPLED = Sampling(samples=2, temperature=1.0, top_p=1.0, top_k=0, max_tokens=72)
LIMITS = limits_for("float32")


@pytest.fixture(scope="module")
def pair(tiny_config: RunConfig) -> Pair:
    return load_pair(tiny_config.pair, torch.device("cpu"))


@pytest.fixture(scope="module")
def prompts(tiny_config: RunConfig, pair: Pair) -> list[list[int]]:
    return [pair.prompt_ids(problem.prompt) for problem in load(tiny_config.data.train).problems[:16]]


@pytest.fixture(scope="module")
def engine(pair: Pair, tiny_config: RunConfig) -> Iterator[VllmSampler]:
    sampler = VllmSampler(
        pair.student.module,
        stop_ids=pair.stop_ids,
        settings=tiny_config.rollout.vllm,
        dtype="float32",
        max_model_len=200,
        max_num_seqs=tiny_config.rollout.batch_size,
    )
    yield sampler
    sampler.close()


@pytest.fixture
def weights(pair: Pair, engine: VllmSampler) -> Iterator[dict[str, Tensor]]:
    """The student's weights, which a test may change: they come back after it, in the engine as well."""
    original = copy.deepcopy(pair.student.module.state_dict())
    yield original
    pair.student.module.load_state_dict(original)
    engine.sync()


def hf(pair: Pair) -> HfSampler:
    return HfSampler(pair.student.module, stop_ids=pair.stop_ids, pad_id=pair.pad_id, batch_size=64)


def shaken(pair: Pair, seed: int, size: float = 0.02) -> None:
    """Move every weight of the student, the tied embedding among them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in pair.student.module.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)


def prove(pair: Pair, config: RunConfig, rollouts: list[Rollout], score: str = "soft_or") -> float:
    """Score rollouts as a step of training does, and check the gap; returns its maximum. The weights stay."""
    tiny = config.learner.model_copy(update={"lr": 1e-30, "weight_decay": 0.0})
    selector = make_selector(config)
    learner = Learner(pair, selector, tiny, seed=0, meter=Meter(torch.device("cpu")))
    metrics = train_step(learner, rollouts).metrics
    check_logprob_mismatch(metrics, LIMITS, step=1)
    return metrics[MAX]


def test_greedy_is_that_of_transformers(engine: VllmSampler, pair: Pair, prompts: list[list[int]]) -> None:
    ours, theirs = engine.generate(prompts, GREEDY, seed=0), hf(pair).generate(prompts, GREEDY, seed=0)
    assert [r.token_ids for r in ours] == [r.token_ids for r in theirs]
    assert [r.response_mask for r in ours] == [r.response_mask for r in theirs]
    assert [r.finish for r in ours] == [r.finish for r in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.sampler_logprobs == pytest.approx(other.sampler_logprobs, abs=2e-4)


def test_log_probs_are_those_of_temperature_one_before_truncation(
    engine: VllmSampler, pair: Pair, prompts: list[list[int]]
) -> None:
    for rollout in engine.generate(prompts[:4], Sampling(2, 0.7, 0.9, 20, 72), seed=3):
        with torch.no_grad():
            logprobs = pair.student.module(torch.tensor([rollout.token_ids])).logits[0].log_softmax(-1)
        start = len(rollout.token_ids) - rollout.num_response_tokens
        expected = [float(logprobs[t - 1, rollout.token_ids[t]]) for t in range(start, len(rollout.token_ids))]
        assert rollout.sampler_logprobs == pytest.approx(expected, abs=2e-4)


def test_truncation_is_told(engine: VllmSampler, prompts: list[list[int]]) -> None:
    (rollout,) = engine.generate(prompts[:1], Sampling(1, 1.0, 1.0, 0, 5), seed=0)
    assert rollout.truncated and rollout.finish == "length" and rollout.num_response_tokens == 5


def test_a_response_depends_on_seed_and_place_and_not_on_the_batch(
    engine: VllmSampler, prompts: list[list[int]]
) -> None:
    whole, again = (engine.generate(prompts, SAMPLED, seed=5) for _ in range(2))
    assert [r.token_ids for r in whole] == [r.token_ids for r in again]
    part = engine.generate(prompts[:3], SAMPLED, seed=5)
    assert [r.token_ids for r in part] == [r.token_ids for r in whole[:6]]
    other = engine.generate(prompts, SAMPLED, seed=6)
    assert [r.token_ids for r in other] != [r.token_ids for r in whole]
    same = engine.generate([prompts[0]] * 8, SAMPLED, seed=5)  # 16 draws for one prompt are not 16 copies
    assert len({tuple(r.token_ids) for r in same}) > 4


def test_request_seeds_do_not_collide() -> None:
    """Neighbouring steps, prompts and samples: 20 x 20 x 20 seeds, all different, all within 63 bits."""
    seeds = {request_seed(1_000_003 + s, p, i) for s in range(20) for p in range(20) for i in range(20)}
    assert len(seeds) == 8000 and all(0 <= seed < 2**63 for seed in seeds)


def test_new_weights_arrive_and_old_ones_come_back(
    engine: VllmSampler, pair: Pair, prompts: list[list[int]], tiny_config: RunConfig, weights: dict[str, Tensor]
) -> None:
    """A -> B -> A -> B with a tied head: greedy equals transformers' each time, and the proof is at rounding."""
    seen = []
    for version in ("A", "B", "A", "B"):
        pair.student.module.load_state_dict(weights)
        if version == "B":
            shaken(pair, seed=1)
        engine.sync()
        ours, theirs = engine.generate(prompts, GREEDY, seed=0), hf(pair).generate(prompts, GREEDY, seed=0)
        assert [r.token_ids for r in ours] == [r.token_ids for r in theirs], version
        assert prove(pair, tiny_config, engine.generate(prompts, SAMPLED, seed=0)) < 1e-3
        seen.append([r.token_ids for r in ours])
    assert seen[0] == seen[2] != seen[1] == seen[3]


@pytest.mark.parametrize("selector", ["soft_or", "full"])  # with scoring, and with a scoring of the proof's own
def test_stale_weights_stop_the_run(
    engine: VllmSampler,
    pair: Pair,
    prompts: list[list[int]],
    compose_run,
    weights: dict[str, Tensor],
    selector: str,
) -> None:
    config = compose_run(f"selector={selector}", "learner.diagnostics_every=0")
    prove(pair, config, engine.generate(prompts, SAMPLED, seed=0))
    shaken(pair, seed=2, size=2e-3)  # as far as one step of AdamW at the embedded pair's learning rate
    with pytest.raises(SyncError, match=r"step 1: sampler and learner disagree .* rollout\.max_logprob_mismatch\.mean"):
        prove(pair, config, engine.generate(prompts, SAMPLED, seed=0))


def test_a_stale_tied_head_stops_the_run(
    engine: VllmSampler,
    pair: Pair,
    prompts: list[list[int]],
    tiny_config: RunConfig,
    weights: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vllm_worker, "repack_tied_head", lambda model: None)
    shaken(pair, seed=2, size=2e-3)
    engine.sync()
    with pytest.raises(SyncError):
        prove(pair, tiny_config, engine.generate(prompts, SAMPLED, seed=0))


def test_sharded_weights_are_gathered(
    engine: VllmSampler, pair: Pair, prompts: list[list[int]], tiny_config: RunConfig
) -> None:
    """FSDP2 over one process (the engine has started torch.distributed): DTensors in, whole tensors out."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    other = load_pair(tiny_config.pair, torch.device("cpu"))
    shaken(other, seed=3)
    expected = {name: value.clone() for name, value in merged_tensors(other.student.module)}
    theirs = hf(other).generate(prompts, GREEDY, seed=0)
    fully_shard(other.student.module, mesh=init_device_mesh("cpu", (1,)))
    assert all(isinstance(parameter, DTensor) for parameter in other.student.module.parameters())
    for name, value in merged_tensors(other.student.module):
        assert not isinstance(value, DTensor) and value.equal(expected[name]), name
    engine.model = other.student.module
    try:
        engine.sync()
        assert [r.token_ids for r in engine.generate(prompts, GREEDY, seed=0)] == [r.token_ids for r in theirs]
    finally:
        engine.model = pair.student.module
        engine.sync()


@pytest.mark.slow
def test_samples_follow_the_models_distribution(engine: VllmSampler, pair: Pair, prompts: list[list[int]]) -> None:
    """Chi-square of 20,000 tokens of one position against the probabilities a forward pass gives, and HF's likewise."""
    rollouts = hf(pair).generate(prompts, Sampling(4, 1.0, 1.0, 0, 72), seed=1)
    longest = max(rollouts, key=lambda rollout: rollout.num_response_tokens)
    with torch.no_grad():
        logprobs = pair.student.module(torch.tensor([longest.token_ids])).logits[0].double().log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    start = len(longest.token_ids) - longest.num_response_tokens
    place = start + int(entropy[start - 1 : -1].argmax())  # the position that is least certain
    prompt, probabilities, count = longest.token_ids[:place], logprobs[place - 1].exp(), 20_000
    assert float(entropy[place - 1]) > 1.0
    for sampler in (engine, hf(pair)):
        drawn = sampler.generate([prompt], Sampling(count, 1.0, 1.0, 0, 1), seed=7)
        counts = torch.bincount(torch.tensor([r.response_ids[0] for r in drawn]), minlength=len(probabilities))
        assert goodness_of_fit(counts, probabilities) > 1e-3, type(sampler).__name__


def goodness_of_fit(counts: Tensor, probabilities: Tensor) -> float:
    """p-value of Pearson's chi-square; cells that expect fewer than 5 are one cell."""
    expected = probabilities * counts.sum()
    rare = expected < 5
    cells = torch.cat([expected[~rare], expected[rare].sum()[None]])
    found = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    statistic = ((found - cells) ** 2 / cells.clamp(min=1e-9)).sum()
    degrees = torch.tensor(float(len(cells) - 1), dtype=torch.float64)
    return float(torch.special.gammaincc(degrees / 2, statistic / 2))


def test_the_goodness_of_fit_sees_a_wrong_temperature() -> None:
    logits = torch.linspace(0, 4, 12, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial((logits / 0.9).softmax(-1), 20_000, replacement=True, generator=generator)
    assert goodness_of_fit(torch.bincount(drawn, minlength=12), logits.softmax(-1)) < 1e-6


def test_an_engine_that_runs_out_of_memory_is_restarted_once(
    engine: VllmSampler, pair: Pair, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = engine.generate(prompts[:4], SAMPLED, seed=9)

    def exhausted(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    first = engine._llm
    monkeypatch.setattr(first, "generate", exhausted)
    after = engine.generate(prompts[:4], SAMPLED, seed=9)
    assert engine._llm is not first and engine.restarts == 1
    assert [r.token_ids for r in after] == [r.token_ids for r in before]
    monkeypatch.setattr(engine._llm, "generate", exhausted)
    with pytest.raises(EngineDiedError, match=r"died again after a restart .*out of memory.* goes on from the last"):
        engine.generate(prompts[:4], SAMPLED, seed=9)
