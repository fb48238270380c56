"""Tokenization of a dialogue with tools: the prompt once, afterwards only the tool observations.

Between two turns of the model, in ChatML as in Qwen3's chat template:
    "\\n<|im_start|>user"
    "\\n<tool_response>\\n…\\n</tool_response>" for each call
    "<|im_end|>\\n<|im_start|>assistant\\n"
"""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from tip_exp.envs.base import Start
from tip_exp.utils.errors import ConfigError

TURN_END = "<|im_end|>"
_OPEN = "\n<|im_start|>user\n<tool_response>"
_BETWEEN = "</tool_response>\n<tool_response>"
_CLOSE = "</tool_response><|im_end|>\n<|im_start|>assistant\n"


class Chat:
    """A tokenizer with the turn boundaries of its chat format. `turn_end` is the id of "<|im_end|>".

    `thinking` is passed to the chat template as `enable_thinking`; None leaves the template's default.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, thinking: bool | None = None) -> None:
        self.tokenizer, self.thinking = tokenizer, thinking
        added: dict[str, int] = tokenizer.get_added_vocab()  # pyright: ignore
        if missing := [token for token in ("<|im_start|>", TURN_END) if token not in added]:
            raise ConfigError(
                f"pair.student.path: tool tasks need a tokenizer with ChatML tokens, as Qwen's; this one has no "
                f"{missing[0]}; choose another pair, or data without tools"
            )
        if short := [token for token in added if len(token) == 1]:  # plain_ids cannot cut it
            raise ConfigError(
                f"pair.student.path: tool tasks need a tokenizer with added tokens of two or more characters; this one "
                f"has {short[0]!r}; choose another pair, or data without tools"
            )
        self.turn_end = added[TURN_END]
        self._added_ids = frozenset(added.values())
        # A lookahead also matches tokens that overlap each other.
        self._added = re.compile("(?=(?:" + "|".join(map(re.escape, sorted(added, key=len, reverse=True))) + "))")
        self._open, self._between, self._close = (self._encode(text) for text in (_OPEN, _BETWEEN, _CLOSE))

    def prompt_ids(self, start: Start) -> list[int]:
        """The rendered initial messages and tool schemas, ending where the model's first turn starts."""
        options: dict[str, Any] = {"tools": start.tools or None}
        if self.thinking is not None:
            options["enable_thinking"] = self.thinking
        text = self.tokenizer.apply_chat_template(start.messages, tokenize=False, add_generation_prompt=True, **options)
        assert isinstance(text, str), "tokenize=False returns text"
        return self._encode(text)

    def boundary_ids(self, observations: list[str]) -> list[int]:
        """From the end of a model turn to the start of the next one; all observations share one user turn."""
        ids = list(self._open)
        for number, observation in enumerate(observations):
            ids += (self._between if number else []) + self.plain_ids(f"\n{observation}\n")
        return ids + self._close

    def plain_ids(self, text: str) -> list[int]:
        """Encode text without any added token, so that tool output with "<|im_end|>" cannot end or open a turn.

        The text is split after the first character of every added token, and the pieces are encoded separately.
        """
        cuts = [match.start() + 1 for match in self._added.finditer(text)]
        pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        ids = [token for piece in pieces for token in self._encode(piece)]
        assert self._added_ids.isdisjoint(ids), "no piece contains a whole added token"
        return ids

    def decode(self, ids: list[int], *, with_special: bool = False) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=not with_special)
        assert isinstance(text, str), "one sequence decodes to one text"
        return text

    def encode_turn(self, text: str) -> list[int]:
        """A turn that a script wrote instead of a model, with its end token."""
        return [*self._encode(text), self.turn_end]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)  # pyright: ignore[reportReturnType]
