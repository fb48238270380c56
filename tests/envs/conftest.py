"""A tokenizer that round-trips any text, and episode limits that stop nothing by default."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tip_exp.config.schema import AgentConfig
from tip_exp.envs.chat import Chat
from tip_exp.utils.paths import resolve_model

NO_LIMITS = AgentConfig(
    max_turns=50,
    max_calls_per_turn=None,
    surplus_calls="tell",
    max_observation=None,
    observation_unit="tokens",
    observation_cut="rows",
    max_train_tokens=None,
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(resolve_model("package:tiny/student"))


@pytest.fixture
def chat(tokenizer: PreTrainedTokenizerBase) -> Chat:
    return Chat(tokenizer)


@pytest.fixture
def limits() -> Callable[..., AgentConfig]:
    """limits(max_turns=2) -> no limit but this one."""
    return lambda **changes: NO_LIMITS.model_copy(update=changes)
