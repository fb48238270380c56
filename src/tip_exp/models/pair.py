"""A loaded teacher/student pair: backbones, output heads, tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tip_exp.config.schema import ChatConfig, PrivilegedConfig
from tip_exp.losses.embedding_grad import embed, is_plain_embedding
from tip_exp.losses.head import Head
from tip_exp.models.micro_batch import MicroBatch
from tip_exp.models.packed_attention import packed_inputs
from tip_exp.models.privileged import render
from tip_exp.models.teacher_offload import Placement
from tip_exp.types import Problem


@dataclass(frozen=True, slots=True)
class Model:
    """A causal language model taken apart where this project needs it: backbone to hidden states, head to logits."""

    module: PreTrainedModel
    head: Head

    def final_hidden(self, batch: MicroBatch) -> Float[Tensor, "n d"]:
        """The hidden states that predict the batch's response tokens, after the final norm."""
        if batch.lengths is None:
            positions = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
            rows: dict[str, Any] = {"attention_mask": batch.attention_mask, "position_ids": positions}
        else:
            rows = packed_inputs(self.module, batch.lengths, batch.input_ids.device)
        backbone: nn.Module = self.module.base_model
        embedding = self.module.get_input_embeddings()
        if isinstance(embedding, nn.Embedding) and is_plain_embedding(embedding):
            tokens = {"inputs_embeds": embed(embedding, batch.input_ids)}
        else:
            tokens = {"input_ids": batch.input_ids}
        output = backbone(**tokens, **rows, use_cache=False)
        return output.last_hidden_state[batch.rows, batch.columns]


@dataclass(frozen=True, slots=True)
class Pair:
    tokenizer: PreTrainedTokenizerBase
    teacher: Model
    student: Model
    stop_ids: list[int]
    pad_id: int
    chat: ChatConfig
    privileged: PrivilegedConfig | None = None
    placement: Placement = "resident"  # of the teacher
    reload_teacher: Callable[[], PreTrainedModel] | None = None  # its module anew from its files; None: not known

    def decode(self, ids: list[int], *, with_special: bool = False) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=not with_special)
        assert isinstance(text, str), "one sequence decodes to one text"
        return text

    def privileged_ids(self, problem: Problem) -> list[int]:
        """What the teacher alone reads before a response: the problem with its solution, in the same chat template."""
        assert self.privileged is not None, "of a self pair"
        return self.prompt_ids(render(self.privileged.template, problem))

    def prompt_ids(self, prompt: str, *, evaluating: bool = False) -> list[int]:
        """The chat template's rendering of one user message, ready for the answer: both models' prompt."""
        thinking = self.chat.eval_thinking if evaluating else self.chat.thinking
        messages = [] if self.chat.system is None else [{"role": "system", "content": self.chat.system}]
        messages.append({"role": "user", "content": prompt})
        switch: dict[str, Any] = {} if thinking is None else {"enable_thinking": thinking}
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **switch)
        return self.tokenizer.encode(text, add_special_tokens=False)  # pyright: ignore[reportArgumentType]
