"""Texts or token ids, with prompts or masks, as rollouts: which tokens are read, and which of them are scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tip_exp.types import Rollout


def from_texts(
    texts: str | Sequence[str],
    prompts: str | Sequence[Any] | None,
    tokenizer: PreTrainedTokenizerBase | None,
    chat: bool | Mapping[str, Any],
) -> list[Rollout]:
    """Each text after its prompt; without prompts every token but the first is a response token."""
    if tokenizer is None:
        raise ValueError("tokenizer: texts need one, and neither model's path has one; give tokenizer= or input_ids=")
    texts = [texts] if isinstance(texts, str) else list(texts)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts[{i}]: a text; got {type(text).__name__}. Token ids are given as input_ids=")
    if prompts is None:
        return [_rollout(f"texts[{i}]", tokenizer(text)["input_ids"], None) for i, text in enumerate(texts)]
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if len(prompts) != len(texts):
        raise ValueError(f"prompts: {len(prompts)} for {len(texts)} texts; give one for each text")
    rollouts: list[Rollout] = []
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        prompt_ids = _prompt_ids(prompt, f"prompts[{i}]", tokenizer, chat)
        response_ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        mask = [False] * len(prompt_ids) + [True] * len(response_ids)
        rollouts.append(_rollout(f"prompts[{i}]", prompt_ids + response_ids, mask))
    return rollouts


def from_ids(input_ids: Any, response_mask: Any, attention_mask: Any) -> list[Rollout]:
    """Rows of token ids; without a mask every token of a row but the first is a response token."""
    rows = _rows(input_ids)
    masks = None if response_mask is None else _rows(response_mask)
    attended = None if attention_mask is None else _rows(attention_mask)
    for name, other in (("response_mask", masks), ("attention_mask", attended)):
        if other is not None and [len(row) for row in other] != [len(row) for row in rows]:
            raise ValueError(f"{name}: its rows must be as many and as long as those of input_ids")
    rollouts: list[Rollout] = []
    for i, row in enumerate(rows):
        mask = None if masks is None else [bool(value) for value in masks[i]]
        if attended is not None:
            mask = None if mask is None else [value for value, keep in zip(mask, attended[i], strict=True) if keep]
            row = [token for token, keep in zip(row, attended[i], strict=True) if keep]
        rollouts.append(_rollout(f"input_ids[{i}]", row, mask))
    return rollouts


def _rollout(name: str, ids: list[int], mask: list[bool] | None) -> Rollout:
    if not ids:
        raise ValueError(f"{name} has no token")
    mask = [False] + [True] * (len(ids) - 1) if mask is None else mask
    if mask[0]:
        raise ValueError(
            f"{name}: its first token is a response token, which nothing predicts; give a prompt, or a response_mask "
            "that is False there"
        )
    return Rollout(list(ids), mask, "stop", [])


def _prompt_ids(
    prompt: Any, name: str, tokenizer: PreTrainedTokenizerBase, chat: bool | Mapping[str, Any]
) -> list[int]:
    """A user's message (a text) or a list of messages in the chat template; without one the text as it is."""
    is_text = isinstance(prompt, str)
    if is_text and (chat is False or not tokenizer.chat_template):
        return list(tokenizer(prompt)["input_ids"])
    if is_text:
        added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        if special := next((token for token in added if token in prompt), None):
            raise ValueError(
                f"{name} holds the special token {special!r}, so it seems to be in a chat template already; with "
                "chat=False prompts are read as they are"
            )
        prompt = [{"role": "user", "content": prompt}]
    elif not (isinstance(prompt, Sequence) and all(isinstance(message, Mapping) for message in prompt)):
        raise TypeError(f"{name}: a text or a list of messages {{role, content}}; got {type(prompt).__name__}")
    options = dict(chat) if isinstance(chat, Mapping) else {}
    options |= {"add_generation_prompt": True, "return_dict": False}
    return tokenizer.apply_chat_template(list(prompt), **options)  # pyright: ignore[reportReturnType]


def _rows(values: Any) -> list[list[Any]]:
    if isinstance(values, Tensor):
        values = values[None] if values.dim() == 1 else values
        return values.tolist()
    return [row.tolist() if isinstance(row, torch.Tensor) else list(row) for row in values]
