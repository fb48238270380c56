"""Where text becomes ids in a dialogue with tools: the prompt once, then only what the tools said.

Between two turns of the model, in ChatML as Qwen3 has it (checked against its template):
    "\\n<|im_start|>user" + "\\n<tool_response>\\n…\\n</tool_response>" a call + "<|im_end|>\\n<|im_start|>assistant\\n"
"""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from tip_exp.envs.base import Start

TURN_END = "<|im_end|>"
_OPEN = "\n<|im_start|>user\n<tool_response>"
_BETWEEN = "</tool_response>\n<tool_response>"
_CLOSE = "</tool_response><|im_end|>\n<|im_start|>assistant\n"


class ChatError(ValueError):
    """A tokenizer that cannot hold a dialogue with tools."""


class Chat:
    """A tokenizer with the boundaries of turns; `turn_end` is the id a turn has to end with to be followed by one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, thinking: bool = True) -> None:
        self.tokenizer, self.thinking = tokenizer, thinking
        added: dict[str, int] = tokenizer.get_added_vocab()  # pyright: ignore
        if absent := [mark for mark in ("<|im_start|>", TURN_END) if mark not in added]:
            raise ChatError(f"tools need a tokenizer with ChatML turns, as Qwen's; this one has no {absent[0]}")
        self.turn_end = added[TURN_END]
        self._added_ids = frozenset(added.values())
        # Lookahead, so that marks that overlap are found, too.
        self._marks = re.compile("(?=(?:" + "|".join(map(re.escape, sorted(added, key=len, reverse=True))) + "))")
        self._open, self._between, self._close = (self._encode(text) for text in (_OPEN, _BETWEEN, _CLOSE))

    def prompt_ids(self, start: Start) -> list[int]:
        """The chat template's rendering of the first messages and the tools, ready for the first turn."""
        options: dict[str, Any] = {"tools": start.tools or None, "enable_thinking": self.thinking}
        text = self.tokenizer.apply_chat_template(start.messages, tokenize=False, add_generation_prompt=True, **options)
        assert isinstance(text, str), "not tokenized, so it is text"
        return self._encode(text)

    def boundary_ids(self, observations: list[str]) -> list[int]:
        """From the end of the model's turn to the beginning of its next one; tools share one user turn."""
        ids = list(self._open)
        for place, observation in enumerate(observations):
            ids += (self._between if place else []) + self.plain_ids(f"\n{observation}\n")
        return ids + self._close

    def plain_ids(self, text: str) -> list[int]:
        """Text as text: "<|im_end|>" in it becomes the ids of its letters, so no tool can end a turn or open one.

        Every mark the tokenizer knows is cut after its first letter and its pieces are encoded apart.
        """
        cuts = [match.start() + 1 for match in self._marks.finditer(text)]
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        ids = [token for piece in pieces for token in self._encode(piece)]
        assert self._added_ids.isdisjoint(ids), "no mark is left in a piece"
        return ids

    def decode(self, ids: list[int], *, with_special: bool = False) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=not with_special)
        assert isinstance(text, str), "one sequence decodes to one text"
        return text

    def encode_turn(self, text: str) -> list[int]:
        """A turn as a script writes it; its end is added."""
        return [*self._encode(text), self.turn_end]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)  # pyright: ignore[reportReturnType]
