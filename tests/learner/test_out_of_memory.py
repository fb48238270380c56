"""Out of memory in a step: it is done again with smaller micro-batches, and gives what these give from the start."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.helpers import make_learner, sample_rollouts
from torch import Tensor

from tip_exp.config.schema import PairConfig, RunConfig
from tip_exp.learner import learner as learner_module
from tip_exp.learner import out_of_memory
from tip_exp.learner.data_parallel import deal
from tip_exp.learner.distributed import Ranks
from tip_exp.learner.learner import Learner
from tip_exp.learner.out_of_memory import OomRetrySteps
from tip_exp.learner.teacher import Teacher
from tip_exp.models.load import load_pair
from tip_exp.models.micro_batch import MicroBatch, group
from tip_exp.models.pair import Model, Pair
from tip_exp.records.folder import RunFolder, read_budgets
from tip_exp.records.result import health
from tip_exp.run import run
from tip_exp.selector.selector import Selector
from tip_exp.utils.errors import RestartsError, RunFailedError, is_out_of_memory
from tip_exp.utils.io import read_rows

Compose = Callable[..., RunConfig]
# The kinds of an error that torch raises, and where.
ERRORS: dict[str, Exception] = {
    "CUDA": torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.25 GiB is "
        "free. Including non-PyTorch memory, this process has 77.85 GiB memory in use. Of the allocated memory 75 GiB "
        "is allocated by PyTorch, and 1.50 GiB is reserved by PyTorch but unallocated. If reserved but unallocated "
        "memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
    ),
    "CPU": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    "Python": MemoryError(),
}


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """`limit`: positions of a forward pass that fit; `where`: the passes that do not, forward or backward."""
    limits = SimpleNamespace(limit=10**9, where="forward", error=ERRORS["CUDA"], faults=0)
    hidden = Model.hidden

    def limited(self: Model, batch: MicroBatch) -> Tensor:
        if batch.num_positions <= limits.limit:
            return hidden(self, batch)

        def fail(*_: Any) -> None:
            limits.faults += 1
            assert limits.faults < 10, "the step is done again and again"
            raise limits.error

        if limits.where == "teacher" and not next(self.module.parameters()).requires_grad:
            fail()
        if limits.where == "forward" and torch.is_grad_enabled():  # inside of the layers: some have run
            with self.module.base_model.layers[1].mlp.register_forward_pre_hook(fail):
                return hidden(self, batch)
        if limits.where == "backward" and torch.is_grad_enabled():  # inside, too: some weights have a gradient
            layer = self.module.base_model.layers[0]
            with layer.register_forward_hook(lambda _m, _i, output: output.register_hook(fail) and None):
                return hidden(self, batch)
        return hidden(self, batch)

    monkeypatch.setattr(Model, "hidden", limited)
    return limits


def steps_of(pair: Pair, config: RunConfig, folder: Path, score: str = "soft_or", **changes: Any) -> OomRetrySteps:
    learner = make_learner(pair, config.learner, score, **changes)
    return OomRetrySteps(Teacher(pair, learner.config, learner.meter), learner, folder / "micro_batch_tokens.json")


def weights(learner: Learner) -> list[Tensor]:
    states = [state for p in learner.parameters for state in learner.optimizer.state[p].values()]
    return [p.detach().clone() for p in learner.parameters] + states


@pytest.mark.parametrize(  # a step of 8 rollouts of up to 106 tokens: one pass, or several
    ("error", "where", "budget"),
    [
        ("CUDA", "teacher", 400),
        ("CUDA", "backward", 400),
        ("CUDA", "backward", 100_000),
        ("CPU", "forward", 400),
        ("Python", "forward", 100_000),
    ],
)
def test_the_step_is_done_again_as_with_smaller_micro_batches(
    tmp_path: Path,
    tiny_config: RunConfig,
    memory: Any,
    capfd: Any,
    caplog: pytest.LogCaptureFixture,
    error: str,
    where: str,
    budget: int,
) -> None:
    learners: list[Learner] = []
    for limited in (True, False):
        pair = load_pair(tiny_config.pair, torch.device("cpu"))
        rollouts = sample_rollouts(pair)
        lengths = [len(rollout.token_ids) for rollout in rollouts]
        half = min(budget, sum(lengths)) // 2
        memory.limit, memory.where, memory.error = half if limited else 10**9, where, ERRORS[error]
        steps = steps_of(pair, tiny_config, tmp_path, micro_batch_tokens=budget if limited else half, warmup_steps=0)
        steps.budgets.clear()
        reports = [steps(step, rollouts, []) for step in (1, 2)]
        assert [report.metrics["train/skipped"] for report in reports] == [0, 0]
        learners.append(steps.learner)
        if limited:
            assert json.loads(steps.path.read_text()) == {"1": half}
    assert memory.faults == 1
    for tensor, expected in zip(*map(weights, learners), strict=True):
        assert tensor.equal(expected)
    assert capfd.readouterr().err.count("out of memory") == 1
    (record,) = caplog.records
    assert record.exc_info, "the log says where"


def test_metrics_that_run_out_of_memory_do_not_repeat_an_update(
    tmp_path: Path, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are computed before the update, so that the step can be done again."""
    pair = load_pair(tiny_config.pair, torch.device("cpu"))
    steps = steps_of(pair, tiny_config, tmp_path)
    updates: list[int] = []
    calls: list[Any] = []

    def described(*arguments: Any) -> dict[str, float]:
        calls.append(arguments)
        if len(calls) == 1:
            raise MemoryError
        return {}

    monkeypatch.setattr(learner_module, "token_metrics", described)
    steps.learner.optimizer.register_step_post_hook(lambda *_: updates.append(1))
    steps(1, sample_rollouts(pair), [])
    assert (len(calls), len(updates)) == (2, 1)


@pytest.mark.parametrize("error", ERRORS)
def test_a_rule_of_the_user_may_run_out_of_memory_too(tmp_path: Path, tiny_config: RunConfig, error: str) -> None:
    calls: list[int] = []

    def rule(entropy: Tensor) -> Tensor:
        calls.append(len(entropy))
        if len(calls) == 1:
            raise ERRORS[error]
        return entropy

    pair = load_pair(tiny_config.pair, torch.device("cpu"))
    steps = steps_of(pair, tiny_config, tmp_path)
    steps.learner.selector = replace(steps.learner.selector, score=rule)
    steps(1, sample_rollouts(pair), [])
    assert len(calls) == 2 and read_budgets(steps.path).keys() == {1}


def test_a_selection_by_micro_batch_stays_that_of_the_configured_ones(
    tmp_path: Path, tiny_config: RunConfig, memory: Any
) -> None:
    kept: list[Tensor] = []
    for limit in (10**9, 200):
        pair = load_pair(tiny_config.pair, torch.device("cpu"))
        rollouts, memory.limit = sample_rollouts(pair), limit
        steps = steps_of(pair, tiny_config, tmp_path / str(limit), "entropy", micro_batch_tokens=400)
        steps.path.parent.mkdir()
        rule = {f: getattr(steps.learner.selector, f) for f in Selector.__dataclass_fields__}
        steps.learner.selector = Selector(**rule | {"scope": "micro_batch", "normalize_over": "micro_batch"})
        report = steps(1, rollouts, [])
        kept.append(report.selection.kept_mask)
        assert report.tokens.micro_batch.max() == 1  # two micro-batches of 400
    assert memory.faults > 0 and kept[0].equal(kept[1])


def test_one_rollout_that_does_not_fit_ends_the_run(
    tmp_path: Path, tiny_pair: Pair, tiny_config: RunConfig, memory: Any
) -> None:
    rollouts, memory.limit = sample_rollouts(tiny_pair), 50
    longest = max(len(rollout.token_ids) for rollout in rollouts)
    steps = steps_of(tiny_pair, tiny_config, tmp_path)
    before = weights(steps.learner)
    with pytest.raises(RunFailedError, match=f"single rollout of {longest} tokens .*learner.micro_batch_tokens") as e:
        steps(1, rollouts, [])
    assert len(str(e.value)) <= 600
    assert json.loads(steps.path.read_text()) == {"1": longest}
    assert all(a.equal(b) for a, b in zip(weights(steps.learner), before, strict=True))


def test_the_optimizer_is_not_done_again(tmp_path: Path, tiny_pair: Pair, tiny_config: RunConfig) -> None:
    steps = steps_of(tiny_pair, tiny_config, tmp_path)

    def fail(*_: Any) -> None:
        raise ERRORS["CUDA"]

    steps.learner.optimizer.register_step_pre_hook(fail)
    with pytest.raises(RunFailedError, match="out of memory in the optimizer's update"):
        steps(1, sample_rollouts(tiny_pair), [])
    assert not steps.path.exists()


def test_ranks_that_wait_for_each_other_end_and_resume_with_less(
    tmp_path: Path, tiny_pair: Pair, tiny_config: RunConfig, memory: Any
) -> None:
    rollouts, steps = sample_rollouts(tiny_pair), steps_of(tiny_pair, tiny_config, tmp_path, micro_batch_tokens=400)
    memory.limit = 200
    steps.ranks = SimpleNamespace(size=2, rank=1)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(RestartsError, match=r"^step 3, rank 1: out of memory \(CUDA out of memory.*at most 200 tokens"):
        steps(3, rollouts, [])
    again = steps_of(tiny_pair, tiny_config, tmp_path, micro_batch_tokens=400)
    assert again(3, rollouts, []).metrics["train/skipped"] == 0 and again.learner.config.micro_batch_tokens == 200
    memory.limit = 400
    again = steps_of(tiny_pair, tiny_config, tmp_path, micro_batch_tokens=400)
    again(2, rollouts, [])
    assert again.learner.config.micro_batch_tokens == 400, "the steps before are done as they were"


SMALL = ["logger=files", "learner.num_steps=1", "learner.warmup_steps=0", "learner.prompts_per_step=6", "eval.every=0"]
SMALL += ["eval.teacher=false", "eval.samples=0", "eval.benchmarks.word_sums.num_problems=2"]


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_run_in_bfloat16_goes_on_with_the_weights_of_smaller_micro_batches(
    tmp_path: Path, compose_run: Compose, memory: Any, where: str
) -> None:
    """One rank, sharded: FSDP's state is cleared, also when its layers have summed some gradients."""
    losses: list[list[float]] = []
    config, memory.where = compose_run(*SMALL, "learner.compute_dtype=bfloat16"), where
    for name, memory.limit in (("limited", 300), ("small", 10**9)):
        folder = RunFolder(tmp_path / name)
        folder.root.mkdir()
        run(config, folder)
        (lowered,) = read_budgets(RunFolder(tmp_path / "limited").micro_batches).values()
        config = config.model_copy(
            update={"learner": config.learner.model_copy(update={"micro_batch_tokens": lowered})}
        )
        losses.append([row["train/loss"] for row in read_rows(folder.metrics)[1:]])
        verdict = json.loads(folder.result.read_text())["health"]
        assert ("out of memory at step 1, then micro-batches of" in verdict) == (name == "limited")
    assert memory.faults >= 1
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    limited, small = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("limited", "small"))
    assert all(limited[name].equal(weight) for name, weight in small.items())


@pytest.mark.parametrize("packing", [True, False])
def test_each_restart_has_smaller_micro_batches(
    tmp_path: Path, tiny_pair: Pair, tiny_config: RunConfig, *, packing: bool
) -> None:
    """Not half of a limit that no rank reaches, with which all ranks would do the same again."""
    rollouts = sample_rollouts(tiny_pair) * 4
    lengths = [len(rollout.token_ids) for rollout in rollouts]
    budget = 2 * sum(lengths)
    steps = steps_of(tiny_pair, tiny_config, tmp_path, micro_batch_tokens=budget, packing=packing)
    steps.ranks = SimpleNamespace(size=4, rank=0)  # pyright: ignore[reportAttributeAccessIssue]
    shares = deal(lengths, 4)
    positions: list[int] = []
    while budget > max(lengths):
        groups = [group(lengths, budget, packing=packing, indices=share) for share in shares]
        sizes = [[lengths[i] for i in members] for share in groups for members in share]
        positions.append(max(sum(size) if packing else len(size) * max(size) for size in sizes))
        with pytest.raises(RestartsError):
            steps._lower(1, rollouts, "fault")
        steps.prepare(1)
        budget = steps.learner.config.micro_batch_tokens
    assert positions == sorted(set(positions), reverse=True) and len(positions) > 1
    with pytest.raises(RunFailedError, match="single rollout"):
        steps._lower(1, rollouts, "fault")


def test_what_is_out_of_memory() -> None:
    assert all(map(is_out_of_memory, ERRORS.values()))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    for error in (RuntimeError("shape '[2]' is invalid"), RunFailedError("out of memory"), ValueError("out of memory")):
        assert not is_out_of_memory(error)
    assert health([{"step": 0}], {5: 8192, 9: 4096}) == "out of memory at step 5, then micro-batches of 4096 tokens"


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_teacher_that_does_not_fit_is_offloaded(
    compose_run: Compose,
    monkeypatch: pytest.MonkeyPatch,
    capfd: Any,
    caplog: pytest.LogCaptureFixture,
    ranks: int,
    role: str,
) -> None:
    """Of two ranks the other one, 1, runs out of memory in `role`, whose shards are made by every rank."""
    config, loads = compose_run("pair.teacher.dtype=bfloat16"), []

    def fake_load(pair: PairConfig, device: torch.device, tokenizer: Any, shard: Any, **_: Any) -> Any:
        loads.append(pair.teacher.placement)
        if shard is not None:
            return [shard[name](None, None) for name in ("teacher", "student")]
        if loads == ["resident"]:
            raise ERRORS["CUDA"]
        return "pair"

    replies = iter([["", ""]] * (role == "student") + [["", "CUDA out of memory"]])
    monkeypatch.setattr(out_of_memory, "load_pair", fake_load)
    shards = {"teacher": lambda *_: "shards", "student": lambda *_: "shards"}
    monkeypatch.setattr(out_of_memory, "make_sharding", lambda *_: shards if ranks == 2 else None)
    group: Any = SimpleNamespace(size=ranks, is_main=True, gather_objects=lambda fault: next(replies, [fault, ""]))
    assert out_of_memory.load_pair_or_offload(config, group, torch.device("cuda"), None)  # pyright: ignore
    assert loads == ["resident", "offload"]
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("out of memory")]
    assert line.endswith("it is loaded with pair.teacher.placement=offload") and len(line) <= 320
    (record,) = caplog.records
    assert record.exc_info, "the log says where"


@pytest.mark.parametrize(
    ("device", "mode", "placement", "tried"),
    [
        ("cuda", "train", "resident", ["resident", "offload"]),
        ("cuda", "train", "offload", ["offload"]),
        ("cuda", "eval", "resident", ["resident", "offload"]),
        ("cuda", "teacher", "resident", ["resident"]),  # the teacher alone
        ("cpu", "train", "resident", ["resident"]),
    ],
)
def test_what_does_not_fit_with_an_offloaded_teacher_ends_the_run(
    compose_run: Compose, monkeypatch: pytest.MonkeyPatch, device: str, mode: str, placement: str, tried: list[str]
) -> None:
    loads: list[str] = []

    def fake_load(pair: PairConfig, *_: Any, **options: Any) -> None:
        assert options["roles"] == config.loaded_models
        loads.append(pair.teacher.placement)
        assert len(loads) <= 2, "the pair is loaded again and again"
        raise ERRORS["CUDA"]

    monkeypatch.setattr(out_of_memory, "load_pair", fake_load)
    config = compose_run(f"pair.teacher.placement={placement}").model_copy(update={"mode": mode})
    with pytest.raises(torch.OutOfMemoryError):
        out_of_memory.load_pair_or_offload(config, Ranks(), torch.device(device), None)  # pyright: ignore
    assert loads == tried
