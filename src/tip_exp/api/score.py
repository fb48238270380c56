"""Statistics of tokens under two models: of texts or token ids as a table, of hidden states as tensors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tip_exp.api.columns import COLUMNS, ON_REQUEST
from tip_exp.api.inputs import from_ids, from_texts
from tip_exp.api.models import (
    align_tokenizers,
    check_device,
    check_dtype,
    lazy_logits,
    make_model,
    module_of,
    scoring,
    width_of,
)
from tip_exp.api.select import thresholds
from tip_exp.learner.backward import Backward
from tip_exp.learner.influence import gradient, influence
from tip_exp.losses.divergence import Divergence
from tip_exp.losses.head import LazyLogits, check_same_tokens
from tip_exp.losses.token_stats import check_ids, token_stats
from tip_exp.models.load import max_positions
from tip_exp.models.micro_batch import MicroBatch, micro_batches
from tip_exp.models.pair import Model
from tip_exp.selector.scores import STATISTICS, STUDENT_STATISTICS
from tip_exp.selector.selector import Selection
from tip_exp.types import Rollout
from tip_exp.utils.units import MIB

if TYPE_CHECKING:
    import pandas as pd

AnyModel = PreTrainedModel | str | os.PathLike[str]
QUADRANT_STATISTICS = frozenset({"entropy", "reverse_kl"})


def score(
    student: AnyModel,
    teacher: AnyModel,
    texts: str | Sequence[str] | None = None,
    *,
    input_ids: Tensor | Sequence[Sequence[int]] | None = None,
    prompts: str | Sequence[str | Sequence[Mapping[str, str]]] | None = None,
    response_mask: Tensor | Sequence[Sequence[bool]] | None = None,
    attention_mask: Tensor | Sequence[Sequence[int]] | None = None,
    tokenizer: PreTrainedTokenizerBase | str | os.PathLike[str] | None = None,
    statistics: Iterable[str] | None = None,
    chat: bool | Mapping[str, Any] = True,
    quadrants: tuple[float, float] | None = None,
    jsd_beta: float = 0.5,
    top_k: int = 10,
    micro_batch_tokens: int = 16_384,
    tile_mib: int = 64,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
) -> pd.DataFrame:
    """What two models think of every response token: a table with a row per token, exact over the whole vocabulary.

    student, teacher  Hugging Face causal language models, or their folders, hub ids or `package:…` names. They need
        the same tokenizer; their logits may differ in width (ids that both have count). The same tokens under other ids
        are put in the student's order if the teacher is a path.
    texts  one or several. Without `prompts` every token but the first is scored; with them the texts are responses.
    prompts  for each text the user's message, or a list of messages, which are put into the chat template if the
        tokenizer has one. `chat=False`: texts as they are; `chat={"enable_thinking": False}`: options of the template.
    input_ids  token ids instead of texts, rows of any length or a padded tensor (B, T) with its `attention_mask`.
        `response_mask` is True on the tokens to score; without it all but the first of a row.
    statistics  columns to measure, of COLUMNS; None: all. Statistics of the student alone do not run the teacher.
        "influence", on request only: <g_n, g>, g_n the gradient of token n's reverse KL and g the mean of all g_n, over
        the parameters with requires_grad; costs a backward pass and about two forward passes more.
    quadrants  thresholds of entropy and reverse KL in nats, at or above which a token is high; None: conf/config.yaml.
    micro_batch_tokens, tile_mib  memory: positions per forward pass, and the largest temporary of vocabulary size.
    device, dtype  of models that are loaded from a path; by default CUDA where there is one, and the saved dtype.

    Columns: sequence (index of the text or row), position (in the response, from 0), token_id, token (its text, where
    there is a tokenizer), then the statistics in nats (topk_overlap: a fraction) and quadrant, "Q1" to "Q4"
    (high/high, high/low, low/high, low/low). Models are run without dropout and autocast, and left in their mode.

    Raises ValueError or TypeError that names the argument.
    """
    wanted = _wanted(COLUMNS if statistics is None else statistics, (*COLUMNS, *ON_REQUEST))
    measured = wanted & set(STATISTICS) | (QUADRANT_STATISTICS if "quadrant" in wanted else frozenset())
    given: dict[str, Any] = {"student": student, "teacher": teacher}
    if (texts is None) == (input_ids is None):
        raise ValueError(f"give either texts or input_ids=; got {'neither' if texts is None else 'both'}")
    if texts is not None and (response_mask is not None or attention_mask is not None):
        raise ValueError("response_mask and attention_mask belong to input_ids=; with texts, give prompts=")
    if input_ids is not None and prompts is not None:
        raise ValueError("prompts belong to texts; with input_ids=, give a response_mask= that is False on the prompt")
    check_device(device)
    check_dtype(dtype)
    modules = {role: module_of(model, role, device, dtype) for role, model in given.items()}
    if modules["student"].device != modules["teacher"].device:
        where = ", ".join(f"the {role} on {module.device}" for role, module in modules.items())
        raise ValueError(f"student and teacher must be on one device; {where}")
    widths = {role: width_of(module) for role, module in modules.items()}
    found_tokenizer = align_tokenizers(given, tokenizer, modules)
    if texts is None:
        rollouts = from_ids(input_ids, response_mask, attention_mask)
    else:
        rollouts = from_texts(texts, prompts, found_tokenizer, chat)
    _check_rollouts(rollouts, modules, min(widths.values()))
    with scoring(*modules.values()):
        models = {role: make_model(module, min(widths.values())) for role, module in modules.items()}
        check_same_tokens(models["student"].head, models["teacher"].head)
        parts: list[dict[str, Tensor]] = []
        held: list[tuple[MicroBatch, Tensor]] = []  # with the teacher's hidden states
        for batch in micro_batches(rollouts, micro_batch_tokens, pad_id=0) if rollouts else []:
            batch = batch.to(modules["student"].device)
            logits = LazyLogits(models["student"].hidden(batch), models["student"].head)
            teacher_logits = logits
            if (measured | wanted & set(ON_REQUEST)) - STUDENT_STATISTICS:
                teacher_logits = LazyLogits(models["teacher"].hidden(batch), models["teacher"].head)
            if "influence" in wanted:
                held.append((batch, teacher_logits.hidden))
            stats = token_stats(
                logits,
                teacher_logits,
                batch.token_ids,
                wanted=measured,
                tile_bytes=tile_mib * MIB,
                jsd_beta=jsd_beta,
                top_k=top_k,
            )
            index = {"sequence": batch.rollout, "position": batch.position, "token_id": batch.token_ids}
            parts.append(index | stats.values)
        influences = _influence(models["student"], models["teacher"], held, tile_mib * MIB)
    names = ["sequence", "position", "token_id", *sorted(measured)]
    values = {name: torch.cat([part[name].cpu() for part in parts] or [torch.zeros(0)]) for name in names}
    if "influence" in wanted:
        values["influence"] = influences
    columns = [name for name in (*COLUMNS, *ON_REQUEST) if name in wanted]
    return _table(values, columns, found_tokenizer, quadrants)


def statistics(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    student: Any,
    teacher: Any,
    token_ids: Tensor,
    *,
    statistics: Iterable[str] | None = None,
    jsd_beta: float = 0.5,
    top_k: int = 10,
    tile_mib: int = 64,
) -> dict[str, Tensor]:
    """`score` for a trainer that has hidden states: a tensor per statistic, of the shape of `token_ids`.

    student_hidden, teacher_hidden  last hidden states after the final norm, (N, D) or (B, T, D): the state at
        position t - 1, which predicts the token at t. Of whole sequences: `hidden[:, :-1]` with `input_ids[:, 1:]`.
    student, teacher  what turns them into logits: the Hugging Face model, its output embedding, or that one's weight
        (V, D). Only the model itself tells of scaled or soft-capped logits (Gemma 2, Cohere, Granite).
    statistics  names of scores.STATISTICS; None: all.

    Without gradient; memory of vocabulary size is `tile_mib`. Raises ValueError or TypeError that names the argument.
    """
    wanted = _wanted(statistics, STATISTICS)
    shape = token_ids.shape
    if student_hidden.shape[:-1] != shape or teacher_hidden.shape[:-1] != shape:
        raise ValueError(
            f"token_ids has the shape {tuple(shape)}, so student_hidden and teacher_hidden need one state for each: "
            f"{(*shape, 'D')}; got {tuple(student_hidden.shape)} and {tuple(teacher_hidden.shape)}"
        )
    logits = lazy_logits(
        student_hidden.detach().reshape(-1, student_hidden.shape[-1]),
        teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1]),
        student,
        teacher,
    )
    with torch.autocast(student_hidden.device.type, enabled=False):
        stats = token_stats(
            *logits, token_ids.reshape(-1), wanted=wanted, tile_bytes=tile_mib * MIB, jsd_beta=jsd_beta, top_k=top_k
        )
    return {name: stats.values[name].reshape(shape) for name in STATISTICS if name in wanted}


def _influence(student: Model, teacher: Model, held: list[tuple[MicroBatch, Tensor]], tile_bytes: int) -> Tensor:
    """<g_n, mean of all g_n> of the tokens of some micro-batches, (N,), float64, in host memory."""
    if not held:
        return torch.zeros(0, dtype=torch.float64)
    batches, teacher_hidden = zip(*held, strict=True)
    arguments = student, teacher.head, batches, teacher_hidden
    everything = Selection.everything(sum(batch.num_tokens for batch in batches))
    objective = Divergence("reverse_kl")
    direction = gradient(Backward(tile_bytes), *arguments, everything, lambda _: objective)
    return influence(*arguments, direction, lambda _: objective, tile_bytes).cpu()


def _wanted(names: Iterable[str] | None, allowed: tuple[str, ...]) -> frozenset[str]:
    wanted = frozenset(allowed if names is None else [names] if isinstance(names, str) else names)
    if unknown := sorted(wanted - set(allowed)):
        raise ValueError(f"statistics: there is no {', '.join(unknown)}; there are {', '.join(allowed)}")
    return wanted


def _check_rollouts(rollouts: list[Rollout], modules: dict[str, PreTrainedModel], vocab_size: int) -> None:
    """Raise ValueError if a sequence has more tokens than a model has positions, or a token that a model lacks."""
    for i, rollout in enumerate(rollouts):
        check_ids(torch.tensor(rollout.token_ids), vocab_size)
        for role, module in modules.items():
            limit, length = max_positions(module.config.get_text_config()), len(rollout.token_ids)
            if limit is not None and length > limit:
                raise ValueError(
                    f"sequence {i} has {length} tokens with its prompt, but the {role} has {limit} positions"
                )


def _table(
    values: dict[str, Tensor],
    columns: list[str],
    tokenizer: PreTrainedTokenizerBase | None,
    quadrants: tuple[float, float] | None,
) -> pd.DataFrame:
    """The columns of `score`, sorted by sequence and position."""
    import pandas as pd

    frame: Any = pd.DataFrame({name: tensor.numpy() for name, tensor in values.items()})
    index = ["sequence", "position", "token_id"]
    frame[index] = frame[index].astype(int)  # of an empty table too
    if "quadrant" in columns:
        frame["quadrant"] = ""
        for name, mask in thresholds(quadrants).masks(values).items():
            frame.loc[mask.numpy(), "quadrant"] = name.upper()
    if tokenizer is not None:
        texts = {token: tokenizer.decode([token]) for token in frame["token_id"].unique().tolist()}
        frame["token"] = [texts[token] for token in frame["token_id"].tolist()]
        index.append("token")
    return frame[index + columns].sort_values(["sequence", "position"], ignore_index=True)
