"""The registry of data set kinds, and the shipped data configs on small and on real files."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import repeat
from pathlib import Path
from typing import get_args

import pytest
from tests.datasets import REAL, SMALL, needs_real

from tip_exp.config.datasets import DatasetConfig
from tip_exp.config.schema import RunConfig
from tip_exp.data.contamination import overlaps, texts_of
from tip_exp.data.dataset import Dataset
from tip_exp.data.load import DATASETS, load
from tip_exp.envs.deepplanning.errands import TaskFiles
from tip_exp.types import Problem
from tip_exp.utils.errors import ConfigError, DataError

Compose = Callable[..., RunConfig]
SUFFIX = "\n\nLet's think step by step and output the final answer within \\boxed{}."


def test_every_kind_of_the_config_has_a_loader() -> None:
    schemas = get_args(get_args(DatasetConfig)[0])
    kinds = {kind for schema in schemas for kind in get_args(schema.model_fields["kind"].annotation)}
    assert set(DATASETS) == kinds


def test_a_registered_loader_is_called_for_its_kind(tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = Dataset([Problem("a", "1+1?", "2")], "test", "")
    monkeypatch.setitem(DATASETS, "sums", lambda config: dataset)
    assert load(tiny_config.data.train.model_copy(update={"kind": "sums"})) is dataset


@pytest.mark.parametrize(
    ("overrides", "train", "test"),
    [
        ("data=word_sums eval=word_sums", "b0e0a4b7d0e7", "5459d910d706"),
        ("data=ledger eval=ledger", "df55076891cd", "00733082f18c"),
    ],
)
def test_generated_problems_are_those_of_the_published_numbers(
    compose_run: Compose, overrides: str, train: str, test: str
) -> None:
    config = compose_run(*overrides.split())
    (benchmark,) = config.eval.benchmarks.values()
    assert load(config.data.train).sha256[:12] == train
    assert load(benchmark).sha256[:12] == test


def test_word_sums_takes_the_configured_number_of_problems(compose_run: Compose) -> None:
    dataset = load(compose_run("data.train.num_problems=3").data.train)
    assert [problem.id for problem in dataset.problems] == [f"word_sums/train/{i}" for i in range(3)]
    assert dataset.source == "word_sums, seed 0" and dataset.tools is None


def test_calculator_problems_come_with_their_tasks(compose_run: Compose) -> None:
    dataset = load(compose_run("data=calculator", "agent=default", "data.train.num_problems=3").data.train)
    assert dataset.tools is not None and dataset.tools.no_tool_baseline == 0.0
    for problem in dataset.problems:
        assert dataset.tools.tasks[problem.id] == problem


def load_all(compose_run: Compose, root: Path) -> dict[str, Dataset]:
    """The training sets and benchmarks of the paper's configs, by file name."""
    math = compose_run("data=dapo_math", "learner=paper", "eval=math", f"data.root={root}")
    gsm8k = compose_run("data=gsm8k", "eval=gsm8k", f"data.root={root}", "learner.micro_batch_tokens=16384")
    configs = {"dapo": math.data.train, **math.eval.benchmarks}
    configs |= {"gsm8k_train": gsm8k.data.train, "gsm8k": gsm8k.eval.benchmarks["gsm8k"]}
    return {name: load(config) for name, config in configs.items()}


def test_shipped_configs_map_the_fields_of_their_files(compose_run: Compose) -> None:
    datasets = load_all(compose_run, SMALL)
    sizes = {name: len(dataset.problems) for name, dataset in datasets.items()}
    assert sizes == {"dapo": 8, "math500": 27, "aime24": 3, "aime25": 2, "gsm8k_train": 3, "gsm8k": 2}  # 80 % of 10
    dapo = {problem.id: problem for problem in datasets["dapo"].problems}
    assert dapo["dapo_math/own-3"].prompt == "Find $x$ if $3x - 5 = 16$." + SUFFIX  # without its wrapper
    assert dapo["dapo_math/own-3"].answer == "7"
    assert datasets["dapo"].source == str(SMALL / "dapo_math_17k_dedup.jsonl")
    assert datasets["math500"].problems[4] == Problem(
        "math500/own/4.json", "Compute $12 \\cdot 12$." + SUFFIX, "144", "The result is $\\boxed{144}$."
    )
    assert datasets["aime24"].problems[0].answer == "016" and datasets["aime25"].problems[1].id == "aime25/1"
    assert datasets["gsm8k_train"].problems[1].answer == "1,200"
    assert datasets["gsm8k_train"].problems[1].solution.endswith("people.\n")


def test_a_file_that_data_root_lacks_is_a_config_error(tmp_path: Path, compose_run: Compose) -> None:
    with pytest.raises(ConfigError, match=r"data\.train\.file: there is no file .*/dapo_math_17k_dedup\.jsonl"):
        compose_run("data=dapo_math", "learner=paper", f"data.root={tmp_path}")


@pytest.mark.data
@needs_real
def test_the_real_sets(compose_run: Compose) -> None:
    datasets = load_all(compose_run, REAL)
    sizes = {name: len(dataset.problems) for name, dataset in datasets.items()}
    assert sizes == {
        "dapo": 13833, "math500": 500, "aime24": 30, "aime25": 30, "gsm8k_train": 7473, "gsm8k": 1319
    }  # fmt: skip
    config = compose_run("data=dapo_math", "learner=paper", "eval=math", f"data.root={REAL}").data.train
    assert len({problem.prompt for problem in datasets["dapo"].problems}) == 13833  # 85 of 13,918 repeat another
    for problem in datasets["dapo"].problems:
        assert not re.search("Answer:|final_answer|step by step[^.]*Answer", problem.prompt)
        assert problem.answer.lstrip("-").isdigit()
        assert not any(wrapper in problem.prompt for wrapper in config.strip)
    assert datasets["math500"].sha256.startswith("35dc41080a3680858b27fa7e0533d2d5")
    assert datasets["gsm8k_train"].problems[0].answer == "72"
    whole = load(config.model_copy(update={"part": None})).problems
    assert len(whole) == len({problem.id for problem in whole}) == 17255  # 143 of 17,398 repeat another
    # Five problems of MATH-500 are in the training set up to spaces, capitals and `$`. AIME shares stock phrases alone,
    # such as "where m and n are relatively prime positive integers find m n": at most 27 % of a problem's 13-grams.
    names = ("aime24", "aime25", "math500")
    tests = {name: list(texts_of(datasets[name].problems, config.suffix)) for name in names}
    found = overlaps(texts_of(datasets["dapo"].problems, config.suffix), tests)
    shared = {name: (len(leaked.exact), len(leaked.ngram)) for name, leaked in found.items()}
    assert shared == {"aime24": (0, 0), "aime25": (0, 0), "math500": (5, 6)}


def test_no_formula_is_in_two_splits(compose_run: Compose) -> None:
    def prompts(key: str) -> set[str]:
        config = compose_run("data=calculator", "eval=calculator", "agent=default")
        dataset = config.data.train if key == "train" else config.eval.benchmarks["calculator"]
        return {problem.prompt for problem in load(dataset).problems}

    train, test = prompts("train"), prompts("test")
    assert len(train) > 100 and len(test) > 30 and not train & test


@pytest.mark.parametrize("name", ["calculator", "mini_travel"])
def test_prompts_of_generated_tool_tasks_are_distinct(compose_run: Compose, name: str) -> None:
    """An episode is found by its prompt."""
    config = compose_run(f"data={name}", f"eval={name}", "agent=default")
    for dataset, size in ((config.data.train, 1024), (config.eval.benchmarks[name], 64)):
        prompts = [problem.prompt for problem in load(dataset).problems]
        assert len(prompts) == len(set(prompts)) == size


@pytest.mark.parametrize("name", ["calculator", "mini_travel"])
def test_more_problems_than_there_are_is_an_error(
    compose_run: Compose, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    formula, trip = Problem("a", "(2 + 3) * 4", "20"), TaskFiles({"query": "City: Alderby."}, {})
    monkeypatch.setattr("tip_exp.envs.calculator.stream", lambda split, seed: repeat(formula))
    monkeypatch.setattr("tip_exp.data.tool_tasks.split_of", lambda prompt: "train")
    monkeypatch.setattr("tip_exp.envs.deepplanning.errands.make", lambda task_id, seed: trip)
    config = compose_run(f"data={name}", "agent=default", "data.train.num_problems=2")
    with pytest.raises(DataError, match=r"only 1 .*; got num_problems=2$"):
        load(config.data.train)
