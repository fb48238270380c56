"""vLLM on the embedded pair: it samples what transformers samples and takes new weights; stale weights stop the run."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from tests.helpers import train_step
from torch import Tensor

from tip_exp.config.schema import RunConfig
from tip_exp.data.load import load
from tip_exp.learner.learner import Learner
from tip_exp.learner.on_policy import MismatchCheck, SyncError, limits_for
from tip_exp.learner.selectors import make_selector
from tip_exp.models.load import load_pair
from tip_exp.models.lora import merged_tensors
from tip_exp.models.pair import Pair
from tip_exp.records.meter import Meter
from tip_exp.records.metrics import MISMATCH_MAX
from tip_exp.rollout import vllm_worker
from tip_exp.rollout.hf import HfSampler
from tip_exp.rollout.vllm import VllmSampler, request_seed
from tip_exp.types import Rollout, Sampling

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.filterwarnings("ignore"),  # vLLM's warnings
]
GREEDY = Sampling(samples=1, temperature=0.0, top_p=1.0, top_k=0, max_tokens=72)
SAMPLED = Sampling(samples=2, temperature=1.0, top_p=1.0, top_k=0, max_tokens=72)


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
    """The student's weights, which a test may change; they are restored afterwards, in the engine too."""
    original = copy.deepcopy(pair.student.module.state_dict())
    yield original
    pair.student.module.load_state_dict(original)
    engine.sync()


def hf(pair: Pair) -> HfSampler:
    return HfSampler(pair.student.module, stop_ids=pair.stop_ids, pad_id=pair.pad_id, batch_size=64)


def perturb(pair: Pair, seed: int, size: float = 0.02) -> None:
    """Add noise to every weight of the student, the tied embedding included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in pair.student.module.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)


def mismatch_of(pair: Pair, config: RunConfig, rollouts: list[Rollout], score: str = "soft_or") -> float:
    """The largest log-prob mismatch of a training step, after the run's own check; the step changes no weight."""
    tiny = config.learner.model_copy(update={"lr": 1e-30, "weight_decay": 0.0})
    selector = make_selector(config)
    learner = Learner(pair, selector, tiny, seed=0, meter=Meter(torch.device("cpu")))
    metrics = train_step(learner, rollouts).metrics
    MismatchCheck(limits_for("float32"))(metrics, step=1)
    return metrics[MISMATCH_MAX]


def test_greedy_is_that_of_transformers(engine: VllmSampler, pair: Pair, prompts: list[list[int]]) -> None:
    vllm_rollouts, hf_rollouts = engine.generate(prompts, GREEDY, seed=0), hf(pair).generate(prompts, GREEDY, seed=0)
    for vllm_rollout, hf_rollout in zip(vllm_rollouts, hf_rollouts, strict=True):
        assert vllm_rollout.token_ids == hf_rollout.token_ids
        assert vllm_rollout.response_mask == hf_rollout.response_mask
        assert vllm_rollout.finish == hf_rollout.finish
        assert vllm_rollout.sampler_logprobs == pytest.approx(hf_rollout.sampler_logprobs, abs=2e-4)


def test_log_probs_are_those_of_temperature_one_before_truncation(
    engine: VllmSampler, pair: Pair, prompts: list[list[int]]
) -> None:
    for rollout in engine.generate(prompts[:4], Sampling(2, 0.7, 0.9, 20, 72), seed=3):
        with torch.no_grad():
            logprobs = pair.student.module(torch.tensor([rollout.token_ids])).logits[0].log_softmax(-1)
        start = len(rollout.token_ids) - rollout.num_response_tokens
        expected = [float(logprobs[t - 1, rollout.token_ids[t]]) for t in range(start, len(rollout.token_ids))]
        assert rollout.sampler_logprobs == pytest.approx(expected, abs=2e-4)


def test_truncated_responses_are_marked(engine: VllmSampler, prompts: list[list[int]]) -> None:
    (rollout,) = engine.generate(prompts[:1], Sampling(1, 1.0, 1.0, 0, 5), seed=0)
    assert rollout.truncated and rollout.finish == "length" and rollout.num_response_tokens == 5
    each = engine.generate(prompts[:2], Sampling(1, 1.0, 1.0, 0, 5, limits=(3, 5)), seed=0)
    assert [r.num_response_tokens for r in each] == [3, 5] and each[0].truncated
    assert engine.generate([], SAMPLED, seed=0) == []  # a rank with nothing to do


def test_a_response_depends_on_seed_and_index_and_not_on_the_batch(
    engine: VllmSampler, prompts: list[list[int]]
) -> None:
    whole, again = (engine.generate(prompts, SAMPLED, seed=5) for _ in range(2))
    assert [r.token_ids for r in whole] == [r.token_ids for r in again]
    part = engine.generate(prompts[3:5], SAMPLED, seed=5, indices=[3, 4])
    assert [r.token_ids for r in part] == [r.token_ids for r in whole[6:10]]
    elsewhere = engine.generate(prompts[3:5], SAMPLED, seed=5)
    assert [r.token_ids for r in elsewhere] != [r.token_ids for r in part]
    other_seed = engine.generate(prompts, SAMPLED, seed=6)
    assert [r.token_ids for r in other_seed] != [r.token_ids for r in whole]
    same = engine.generate([prompts[0]] * 8, SAMPLED, seed=5)  # 16 draws for one prompt are not 16 copies
    assert len({tuple(r.token_ids) for r in same}) > 4


def test_request_seeds_do_not_collide() -> None:
    """Neighbouring steps, prompts and samples: 20 x 20 x 20 seeds, all different, all within 63 bits."""
    seeds = {request_seed(1_000_003 + s, p, i) for s in range(20) for p in range(20) for i in range(20)}
    assert len(seeds) == 8000 and all(0 <= seed < 2**63 for seed in seeds)


def test_new_weights_arrive_and_old_ones_come_back(
    engine: VllmSampler, pair: Pair, prompts: list[list[int]], tiny_config: RunConfig, weights: dict[str, Tensor]
) -> None:
    """A -> B -> A -> B with a tied head: greedy responses equal transformers', and log-probs agree up to rounding."""
    seen = []
    for version in ("A", "B", "A", "B"):
        pair.student.module.load_state_dict(weights)
        if version == "B":
            perturb(pair, seed=1)
        engine.sync()
        vllm_ids = [r.token_ids for r in engine.generate(prompts, GREEDY, seed=0)]
        assert vllm_ids == [r.token_ids for r in hf(pair).generate(prompts, GREEDY, seed=0)], version
        assert mismatch_of(pair, tiny_config, engine.generate(prompts, SAMPLED, seed=0)) < 1e-3
        seen.append(vllm_ids)
    assert seen[0] == seen[2] != seen[1] == seen[3]


# selector=full measures no statistics, so the check computes the log-probs itself.
@pytest.mark.parametrize("selector", ["soft_or", "full"])
def test_stale_weights_stop_the_run(
    engine: VllmSampler,
    pair: Pair,
    prompts: list[list[int]],
    compose_run,
    weights: dict[str, Tensor],
    selector: str,
) -> None:
    config = compose_run(f"selector={selector}", "learner.diagnostics_every=0")
    mismatch_of(pair, config, engine.generate(prompts, SAMPLED, seed=0))
    perturb(pair, seed=2, size=2e-3)  # the size of one AdamW step at the embedded pair's learning rate
    with pytest.raises(SyncError, match=r"step 1: sampler and learner disagree .* rollout\.max_logprob_mismatch\.mean"):
        mismatch_of(pair, config, engine.generate(prompts, SAMPLED, seed=0))


def test_a_stale_tied_head_stops_the_run(
    engine: VllmSampler,
    pair: Pair,
    prompts: list[list[int]],
    tiny_config: RunConfig,
    weights: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vllm_worker, "repack", lambda model: None)
    perturb(pair, seed=2, size=2e-3)
    engine.sync()
    with pytest.raises(SyncError):
        mismatch_of(pair, tiny_config, engine.generate(prompts, SAMPLED, seed=0))


def test_sharded_weights_are_gathered(
    engine: VllmSampler, pair: Pair, prompts: list[list[int]], tiny_config: RunConfig
) -> None:
    """FSDP2 over one process (the engine has started torch.distributed): DTensors in, whole tensors out."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    sharded = load_pair(tiny_config.pair, torch.device("cpu"))
    perturb(sharded, seed=3)
    expected = {name: value.clone() for name, value in merged_tensors(sharded.student.module)}
    expected_rollouts = hf(sharded).generate(prompts, GREEDY, seed=0)
    fully_shard(sharded.student.module, mesh=init_device_mesh("cpu", (1,)))
    assert all(isinstance(parameter, DTensor) for parameter in sharded.student.module.parameters())
    for name, value in merged_tensors(sharded.student.module):
        assert not isinstance(value, DTensor) and value.equal(expected[name]), name
    engine.model = sharded.student.module
    try:
        engine.sync()
        rollouts = engine.generate(prompts, GREEDY, seed=0)
        assert [r.token_ids for r in rollouts] == [r.token_ids for r in expected_rollouts]
    finally:
        engine.model = pair.student.module
        engine.sync()


@pytest.mark.slow
def test_samples_follow_the_models_distribution(engine: VllmSampler, pair: Pair, prompts: list[list[int]]) -> None:
    """Chi-square of 20,000 tokens of one position against the probabilities a forward pass gives, for both samplers."""
    rollouts = hf(pair).generate(prompts, Sampling(4, 1.0, 1.0, 0, 72), seed=1)
    longest = max(rollouts, key=lambda rollout: rollout.num_response_tokens)
    with torch.no_grad():
        logprobs = pair.student.module(torch.tensor([longest.token_ids])).logits[0].double().log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    start = len(longest.token_ids) - longest.num_response_tokens
    position = start + int(entropy[start - 1 : -1].argmax())  # of the highest entropy
    prompt, probabilities, count = longest.token_ids[:position], logprobs[position - 1].exp(), 20_000
    assert float(entropy[position - 1]) > 1.0
    for sampler in (engine, hf(pair)):
        drawn = sampler.generate([prompt], Sampling(count, 1.0, 1.0, 0, 1), seed=7)
        counts = torch.bincount(torch.tensor([r.response_ids[0] for r in drawn]), minlength=len(probabilities))
        assert goodness_of_fit(counts, probabilities) > 1e-3, type(sampler).__name__


def goodness_of_fit(counts: Tensor, probabilities: Tensor) -> float:
    """p-value of Pearson's chi-square; cells with fewer than 5 expected counts are merged."""
    expected = probabilities * counts.sum()
    rare = expected < 5
    expected_cells = torch.cat([expected[~rare], expected[rare].sum()[None]])
    observed_cells = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    statistic = ((observed_cells - expected_cells) ** 2 / expected_cells.clamp(min=1e-9)).sum()
    degrees = torch.tensor(float(len(expected_cells) - 1), dtype=torch.float64)
    return float(torch.special.gammaincc(degrees / 2, statistic / 2))


def test_goodness_of_fit_detects_a_wrong_temperature() -> None:
    logits = torch.linspace(0, 4, 12, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial((logits / 0.9).softmax(-1), 20_000, replacement=True, generator=generator)
    assert goodness_of_fit(torch.bincount(drawn, minlength=12), logits.softmax(-1)) < 1e-6
