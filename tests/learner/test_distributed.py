"""Runs on 2, 3 and 4 ranks (gloo) give the numbers of one process, and each rank holds its share of the memory."""

from __future__ import annotations

import os
import pickle
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.helpers import gradients_of_step, in_float64, make_learner, sample_rollouts, train_step
from tests.learner.ranks_worker import state_of
from torch import Tensor
from transformers import AutoModelForCausalLM

import tip_exp
from tip_exp.config.schema import RunConfig
from tip_exp.learner import distributed
from tip_exp.learner.distributed import ALONE, TIMEOUT, Ranks, start
from tip_exp.learner.sharding import make_sharding
from tip_exp.models.load import load_pair
from tip_exp.records.folder import RunFolder, read_budgets
from tip_exp.run import run
from tip_exp.utils.io import checksum, read_rows
from tip_exp.utils.paths import resolve_model

Compose = Callable[..., RunConfig]
ROOT, CPU = Path(__file__).parents[2], torch.device("cpu")
SMALL = ["logger=files", "data.train.num_problems=40", "learner.num_steps=2", "learner.warmup_steps=1"]
SMALL += [
    "learner.prompts_per_step=7",
    "data.max_response_tokens=40",
    "data.max_prompt_tokens=96",
    "eval.max_tokens=40",
    "eval.every=0",
]
SMALL += ["eval.benchmarks.word_sums.num_problems=3", "eval.samples=0", "eval.sequence_kl=false", "eval.teacher=false"]
LORA = "pair.student.lora={rank: 4, alpha: 8, target_modules: all-linear}"
SHADOWS = "selector.shadows=[random,entropy_sample,ier,soft_or]"
EVALUATED = ["eval.samples=2", "eval.sequence_kl=true", "eval.teacher=true", "learner.checkpoint_every=1"]
# {ranks: {run: overrides}}; together they hold every variant of the learner.
RUNS = {
    2: {
        "evaluated": EVALUATED,
        "checkpointed": [
            "learner.activation_checkpointing=true",
            "learner.packing=false",
            "learner.micro_batch_tokens=200",
            "pair.teacher.placement=offload",
        ],
        "materialized": ["learner.loss_backend=materialized", "learner.average=token", "UNTIED"],
        "lora": [LORA, "eval.every=1"],
        "ahead": ["rollout.staleness=1", "eval.every=1", "learner.checkpoint_every=1"],
    },
    3: {"random": ["selector=random", "selector.retention=0.2", "rollout.batch_size=4", SHADOWS], "resumed": EVALUATED},
    4: {
        "hsdp": ["selector=entropy_sample", "selector.scope=batch", "learner.replicas=2", "learner.prompts_per_step=3"]
    },
}
GRADIENT_METRICS = {"select/gradient_cosine", "select/gradient_snr", "select/gradient_snr_full"}
# Rounding noise of the sampler check, and what is measured in seconds or bytes.
NOT_COMPARED = ("time/", "memory/", "rollout/logprob", "rollout/tokens_per_s")


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory, compose_run: Compose) -> str:
    """A folder with the embedded student, its head untied from the embedding and changed."""
    source, folder = Path(resolve_model(compose_run().pair.student.path)), tmp_path_factory.mktemp("untied")
    shutil.copytree(source, folder, dirs_exist_ok=True)
    tied = AutoModelForCausalLM.from_pretrained(source)
    tied.config.tie_word_embeddings = False
    module = AutoModelForCausalLM.from_config(tied.config)
    module.load_state_dict(tied.state_dict() | {"lm_head.weight": tied.lm_head.weight * 1.01})
    module.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def configs(compose_run: Compose, untied: str) -> dict[str, RunConfig]:
    def composed(overrides: list[str]) -> RunConfig:
        replaced = [f"pair.student.path={untied}" if key == "UNTIED" else key for key in overrides]
        return compose_run(*SMALL, *replaced)

    return {name: composed(overrides) for runs in RUNS.values() for name, overrides in runs.items()}


STEPS = {
    2: {
        "soft_or": {"score": "soft_or", "learner": {"gradient_every": 1, "samples_per_prompt": 2}},
        "random": {"score": "random", "learner": {"average": "token"}},
    },
    4: {
        "few": {
            "score": "soft_or",
            "learner": {"replicas": 2, "micro_batch_tokens": 130, "gradient_every": 1, "samples_per_prompt": 1},
        }
    },
}


BFLOAT16 = {"score": "soft_or", "learner": {"compute_dtype": "bfloat16"}}


@pytest.fixture(scope="module")
def rollouts(tiny_config: RunConfig) -> list[Any]:
    return sample_rollouts(load_pair(tiny_config.pair, CPU))


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory, configs: dict[str, RunConfig], tiny_config: RunConfig, rollouts: list[Any]
) -> dict[int, Path]:
    """The folder of each number of ranks; rollouts[:3] leave one of four ranks without any."""
    folders = {size: tmp_path_factory.mktemp(f"ranks{size}") for size in RUNS}
    shared = {"config": tiny_config.model_dump(), "rollouts": rollouts}
    jobs: dict[int, dict[str, Any]] = {
        size: {"size": size, "folder": folders[size], "runs": {name: configs[name].model_dump() for name in runs}}
        for size, runs in RUNS.items()
    }
    jobs[2] |= {"steps": shared | {"jobs": STEPS[2] | {"bfloat16": BFLOAT16}}}
    jobs[4] |= {"steps": shared | {"jobs": STEPS[4], "rollouts": rollouts[:3]}}
    jobs[3] |= {"loads": {name: configs[name].model_dump() for name in ("evaluated", "materialized")}}
    limited = {"size": 2, "folder": folders[2], "runs": {"limited": configs["evaluated"].model_dump()}}
    limited["runs"]["limited"]["learner"]["micro_batch_tokens"] = 400
    small = limited | {"runs": {"small": limited["runs"]["limited"]}}
    (folders[2] / "small").mkdir()
    RunFolder(folders[2] / "small").micro_batches.write_text('{"2": 200}')
    spawn(folders[2], [jobs[2], jobs[4], limited | {"fails": True}, limited, small])
    # Three ranks go on from the first step of two.
    shutil.copytree(folders[2] / "evaluated", folders[3] / "resumed")
    for later in (
        RunFolder(folders[3] / "resumed").checkpoints / "step_00002",
        RunFolder(folders[3] / "resumed").model,
    ):
        shutil.rmtree(later)
    spawn(folders[3], [jobs[3]])
    return folders


def spawn(folder: Path, jobs: list[dict[str, Any]]) -> None:
    (folder / "jobs").write_bytes(pickle.dumps(jobs))
    path = os.pathsep.join([str(ROOT), str(Path(tip_exp.__file__).parents[1])])
    command = [sys.executable, str(Path(__file__).with_name("ranks_worker.py")), str(folder / "jobs")]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=True)


def test_what_ranks_exchange(results: dict[int, Path]) -> None:
    """Rank r gives r, r + 1 values and, as numbers, its r and one of its own."""
    for size, folder in results.items():
        for rank in range(size):
            got = torch.load(folder / f"exchanged{rank}", weights_only=False)
            assert got["broadcast"] == 0 and got["objects"] == list(range(size))
            assert got["values"] == [r for r in range(size) for _ in range(r + 1)]
            assert got["sum"] == size * (size - 1) / 2
            assert got["largest"] == {"rank": size - 1, **{f"of {r}": 1.0 for r in range(size)}}
            assert got["meshes"] == [(size,), (2, size // 2)][: 1 if size == 3 else 2]
            assert got["timeouts"] == {TIMEOUT}


@pytest.mark.parametrize(("size", "name"), [(size, name) for size, runs in RUNS.items() for name in runs])
def test_ranks_walk_the_path_of_one_process(
    tmp_path: Path, results: dict[int, Path], configs: dict[str, RunConfig], size: int, name: str
) -> None:
    learner = configs[name].learner.model_copy(update={"replicas": 1})
    run(configs[name].model_copy(update={"learner": learner}), RunFolder(tmp_path))
    expected, folder = RunFolder(tmp_path), RunFolder(results[size] / name)
    rows, expected_rows = read_rows(folder.metrics), read_rows(expected.metrics)
    assert len(rows) == len(expected_rows) == 3 and folder.result.exists()
    for row, expected_row in zip(rows, expected_rows, strict=True):
        compared = {key: value for key, value in expected_row.items() if not key.startswith(NOT_COMPARED)}
        tolerance = 1e-6 if row["step"] < 2 else 1e-4  # the second step starts from weights that differ by rounding
        assert {key: row[key] for key in compared} == pytest.approx(compared, rel=tolerance, abs=1e-9)
    for path in ("eval_rows", "samples"):
        texts, expected_texts = (
            [[row.get("text"), row.get("tokens"), row.get("kept")] for row in read_rows(getattr(f, path))]
            for f in (folder, expected)
        )
        assert texts == expected_texts
    weights, expected_weights = (AutoModelForCausalLM.from_pretrained(f.model).state_dict() for f in (folder, expected))
    for key, value in expected_weights.items():
        torch.testing.assert_close(weights[key], value, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(("size", "name"), [(size, name) for size, jobs in STEPS.items() for name in jobs])
def test_gradients_and_weights_are_those_of_one_process_in_float64(
    results: dict[int, Path], tiny_config: RunConfig, rollouts: list[Any], size: int, name: str
) -> None:
    job = STEPS[size][name]
    dealt = rollouts[:3] if size == 4 else rollouts
    config = tiny_config.learner.model_copy(update=job["learner"])
    pair = in_float64(load_pair(tiny_config.pair, CPU))
    learner = make_learner(pair, config, job["score"], 0.2)
    gradients, report = gradients_of_step(learner, dealt)
    train_step(learner, dealt, 2)
    weights = {name: parameter.detach() for name, parameter in pair.student.module.named_parameters()}
    for rank in range(size):
        got = torch.load(results[size] / f"steps{rank}", weights_only=False)[name]
        assert got["kept"].equal(report.selection.kept_mask)
        for metric in ("train/loss", "train/grad_norm", "train/update_ratio"):
            assert got["metrics"][metric] == pytest.approx(report.metrics[metric], rel=1e-9)
        for metric in GRADIENT_METRICS & report.metrics.keys():
            assert got["metrics"][metric] == pytest.approx(report.metrics[metric], rel=1e-6)
        assert got["metrics"].keys() >= GRADIENT_METRICS or "gradient_every" not in job["learner"]
        assert_close(got["gradients"], gradients, 1e-9)
        assert_close(got["weights"], weights, 1e-9)


def test_bfloat16_passes(results: dict[int, Path], tiny_config: RunConfig, rollouts: list[Any]) -> None:
    """Two ranks have the gradients of one, which differ from float32's; weights and moments are float32."""
    config = tiny_config.model_copy(update={"learner": tiny_config.learner.model_copy(update=BFLOAT16["learner"])})
    in_float32, _ = gradients_of_step(
        make_learner(load_pair(config.pair, CPU), config.learner, BFLOAT16["score"], 0.2), rollouts
    )
    with start(CPU, alone=True) as ranks:
        pair = load_pair(config.pair, CPU, shard=make_sharding(config, ranks, CPU))
        learner = make_learner(pair, config.learner, BFLOAT16["score"], 0.2)
        expected, report = gradients_of_step(learner, rollouts)
    for rank in range(2):
        got = torch.load(results[2] / f"steps{rank}", weights_only=False)["bfloat16"]
        assert got["dtypes"] == {torch.float32}
        assert got["metrics"]["train/loss"] == pytest.approx(report.metrics["train/loss"], rel=1e-3)
        assert_close(got["gradients"], expected, 0.02)
        with pytest.raises(AssertionError):
            assert_close(got["gradients"], in_float32, 1e-3)


def test_out_of_memory_in_one_rank_gives_the_weights_of_smaller_micro_batches(results: dict[int, Path]) -> None:
    """The other rank waits in a backward pass; both end, and the next launch does the step again."""
    limited, small = (RunFolder(results[2] / name) for name in ("limited", "small"))
    assert read_budgets(limited.micro_batches) == {2: 200}
    losses, expected = ([row["train/loss"] for row in read_rows(f.metrics)[1:]] for f in (limited, small))
    assert losses == expected and len(losses) == 2
    files = [checksum(next(folder.model.glob("*.safetensors"))) for folder in (limited, small)]
    assert files[0] == files[1]


def assert_close(tensors: dict[str, Tensor], expected: dict[str, Any], tolerance: float) -> None:
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        assert float((tensors[name] - value).norm() / value.norm().clamp(min=1e-12)) < tolerance, name


@pytest.mark.parametrize(("size", "copies"), [(2, 1), (4, 2)])
def test_each_rank_holds_its_share(results: dict[int, Path], tiny_config: RunConfig, size: int, copies: int) -> None:
    """Weights and optimizer state: 1 / ranks, or copies / ranks; uneven rows add less than a hundredth."""
    pair = in_float64(load_pair(tiny_config.pair, CPU))
    (name,) = list(STEPS[size])[:1]
    for rank in range(size):
        got = torch.load(results[size] / f"steps{rank}", weights_only=False)[name]
        for role, model in (("student", pair.student), ("teacher", pair.teacher)):
            share = sum(p.nbytes for p in model.module.parameters()) * copies / size
            assert share <= got[f"{role}_bytes"] * 1.01 and got[f"{role}_bytes"] <= share * 1.01
        assert got["optimizer_bytes"] == 2 * got["student_bytes"]


def test_each_rank_reads_its_share_of_the_weights(results: dict[int, Path], configs: dict[str, RunConfig]) -> None:
    """Parameters, rotary tables, ties and generation config are those of from_pretrained; tied and untied."""
    for name in ("evaluated", "materialized"):
        pair = load_pair(configs[name].pair, CPU)
        of_ranks = [torch.load(results[3] / f"loads{rank}", weights_only=False)[name] for rank in range(3)]
        for i, model in enumerate((pair.teacher, pair.student)):
            state = state_of(model.module)
            for of_rank in of_ranks:
                assert of_rank["states"][i].keys() == state.keys()
                assert all(of_rank["states"][i][key].equal(value) for key, value in state.items())
                assert of_rank["generation"] == pair.student.module.generation_config.to_dict()
                assert of_rank["tied"][i] == model.module.config.tie_word_embeddings
            total = sum(p.nbytes for p in model.module.parameters())
            read = [of_rank["bytes"][i] for of_rank in of_ranks]
            assert sum(read) == total and max(read) < 1.02 * total / 3


def test_one_process_is_the_identity() -> None:
    ranks, rows = Ranks(), torch.arange(3)
    assert ranks.size == ALONE.size == 1 and ranks.is_main and ranks.gather(rows) is rows
    assert (
        ranks.gather_objects(rows) == [rows]
        and ranks.broadcast(rows) is rows
        and ranks.largest({"a": 1.0}) == {"a": 1.0}
    )


def test_one_process_has_no_group_unless_asked() -> None:
    with start(CPU):
        assert not dist.is_initialized()
    with start(CPU, alone=True) as ranks:
        assert dist.get_world_size() == ranks.size == 1
    assert not dist.is_initialized()


def test_alone_is_this_process_in_a_group_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if a program has started a group before it imports this package."""
    for name, value in {"is_initialized": True, "get_world_size": 2, "get_rank": 1}.items():
        monkeypatch.setattr(dist, name, lambda value=value: value)
    in_group, alone = Ranks(), runpy.run_path(str(distributed.__file__))["ALONE"]
    assert (in_group.size, in_group.rank) == (2, 1) and (alone.size, alone.rank) == (1, 0)


def test_replicas_must_divide_the_ranks(tmp_path: Path, compose_run: Compose) -> None:
    with pytest.raises(
        ValueError, match=r"learner\.replicas=2 does not divide the number of ranks, 1; choose a divisor"
    ):
        run(compose_run(*SMALL, "learner.replicas=2"), RunFolder(tmp_path))
