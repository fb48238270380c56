"""A tokenizer that is lossless on any text, and limits that stop nothing unless a test says so."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tip_exp.envs.chat import Chat
from tip_exp.envs.episodes import Limits
from tip_exp.utils.paths import resolve_model


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(resolve_model("package:tiny/student"))


@pytest.fixture
def chat(tokenizer: PreTrainedTokenizerBase) -> Chat:
    return Chat(tokenizer)


@pytest.fixture
def limits() -> Callable[..., Limits]:
    def made(**changes) -> Limits:
        wide = {"max_turns": 50, "max_calls_per_turn": None, "surplus_calls": "tell"}
        wide |= {"max_observation": None, "observation_unit": "tokens", "observation_cut": "rows"}
        return Limits(**(wide | changes))

    return made
