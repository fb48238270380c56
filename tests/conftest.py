"""Shared by all tests: one thread a process, no network, the embedded pair loaded once."""

from __future__ import annotations

import gc
import os

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", WANDB_MODE="offline")

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from omegaconf import OmegaConf

from tests.composing import compose_raw
from tip_exp.config.parse import parse
from tip_exp.config.resolvers import register_resolvers
from tip_exp.config.schema import RunConfig
from tip_exp.models.load import load_pair
from tip_exp.models.pair import Pair

torch.set_num_threads(1)
register_resolvers()
settings.register_profile("tests", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("tests")

Compose = Callable[..., RunConfig]


def pytest_collection_finish() -> None:
    """Garbage collections, which hypothesis and statsmodels ask for at each example, leave the libraries out."""
    gc.freeze()


@pytest.fixture(scope="session")
def compose_run() -> Compose:
    """compose_run("selector=full", "seed=3") -> the typed config that these overrides give."""

    return lambda *overrides: parse(compose_raw(overrides))


@pytest.fixture(scope="session")
def tiny_config(compose_run: Compose) -> RunConfig:
    return compose_run()


@pytest.fixture
def tiny_pair(tiny_config: RunConfig) -> Pair:
    """The embedded pair, fresh, for a test may train it."""
    return load_pair(tiny_config.pair, torch.device("cpu"))


@pytest.fixture
def write_config() -> Callable[[RunConfig, Path], None]:
    def write(config: RunConfig, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config.model_dump())))

    return write
