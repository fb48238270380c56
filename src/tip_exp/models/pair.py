"""The loaded pair: the shared tokenizer with its chat settings, and each model as backbone and output head."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

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


class Shards(Protocol):
    """Weights that are spread over ranks; entering a context is collective."""

    def whole(self, *, trains: bool = False) -> AbstractContextManager[None]:
        """Inside, embedding and head are whole tensors; with `trains` their gradients are summed over the ranks."""
        ...

    def gathered(self) -> AbstractContextManager[None]:
        """Inside, all weights are whole, so that ranks may make different numbers of forward passes."""
        ...

    def summed_gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """Inside `whole`: `.grad` of a parameter of the module, summed over the ranks, as a DTensor."""
        ...

    def reset(self) -> bool:
        """After an error inside a pass of a single rank: drop gradients, be as before; False if that is impossible."""
        ...


@dataclass(frozen=True, slots=True)
class Model:
    """A causal language model in two parts: backbone (ids to hidden states) and head (hidden states to logits)."""

    module: PreTrainedModel
    loaded_head: Head
    shards: Shards | None = None  # None: the module holds whole weights

    @property
    def head(self) -> Head:
        """The output head; that of sharded weights is usable only inside `whole` or `gathered`."""
        if self.shards is None:
            return self.loaded_head
        linear: Any = self.module.get_output_embeddings()
        return replace(self.loaded_head, weight=linear.weight, bias=linear.bias)

    def whole(self, *, trains: bool = False) -> AbstractContextManager[None]:
        return nullcontext() if self.shards is None else self.shards.whole(trains=trains)

    def gathered(self) -> AbstractContextManager[None]:
        return nullcontext() if self.shards is None else self.shards.gathered()

    def hidden(self, batch: MicroBatch) -> Float[Tensor, "n d"]:
        """Hidden states after the final norm at the positions that predict the batch's N response tokens."""
        if batch.lengths is None:
            position_ids = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
            inputs: dict[str, Any] = {"attention_mask": batch.attention_mask, "position_ids": position_ids}
        else:
            inputs = packed_inputs(self.module, batch.lengths, batch.input_ids.device)
        backbone: nn.Module = self.module.base_model
        embedding = self.module.get_input_embeddings()
        if isinstance(embedding, nn.Embedding) and is_plain_embedding(embedding):
            inputs["inputs_embeds"] = embed(embedding, batch.input_ids)
        else:
            inputs["input_ids"] = batch.input_ids
        output = backbone(**inputs, use_cache=False)
        return output.last_hidden_state[batch.rows, batch.columns]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTokenizer:
    """The tokenizer that both models share, with the pair's chat settings; needs no weights."""

    tokenizer: PreTrainedTokenizerBase
    vocab_size: int  # token ids that both models have logits for
    stop_ids: list[int]
    pad_id: int
    teacher_order: list[int] | None = None  # row of the stored teacher for each id; None: each id is the same token
    stop_class: tuple[int, ...] = ()  # stop ids that statistics and loss count as one token, the first of them
    chat: ChatConfig
    privileged: PrivilegedConfig | None = None

    def decode(self, ids: list[int], *, with_special: bool = False) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=not with_special)
        assert isinstance(text, str), "one sequence decodes to one text"
        return text

    def prompt_ids(self, prompt: str, *, evaluating: bool = False) -> list[int]:
        """One user message in the chat template, up to where the response starts."""
        thinking = self.chat.eval_thinking if evaluating else self.chat.thinking
        messages = [] if self.chat.system is None else [{"role": "system", "content": self.chat.system}]
        messages.append({"role": "user", "content": prompt})
        options: dict[str, Any] = {} if thinking is None else {"enable_thinking": thinking}
        options |= {"add_generation_prompt": True, "return_dict": False}
        return self.tokenizer.apply_chat_template(messages, **options)  # pyright: ignore[reportReturnType]

    def privileged_ids(self, problem: Problem, *, evaluating: bool = False) -> list[int]:
        """The teacher's prompt in self-distillation: the problem with its solution, in the same chat template."""
        assert self.privileged is not None, "only pairs with pair.privileged have such prompts"
        return self.prompt_ids(render(self.privileged.template, problem), evaluating=evaluating)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair(ChatTokenizer):
    """Teacher (frozen) and student with their shared tokenizer."""

    teacher: Model
    student: Model
    placement: Placement = "resident"  # of the teacher
