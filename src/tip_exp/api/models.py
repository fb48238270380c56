"""What the functions take as a model: a Hugging Face model or its path, or for tensors its output head alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tip_exp.losses.head import Head, LazyLogits, check_same_tokens
from tip_exp.models.load import head_of, make_head, reorder_vocabulary
from tip_exp.models.pair import Model
from tip_exp.models.sources import SAFE, SAFE_WEIGHTS, reason_of, shared_vocab, teacher_order
from tip_exp.utils.paths import LOCAL, is_file, resolve_model, shipped_models

ROLES = ("student", "teacher")


def check_device(device: Any) -> None:
    """Raise ValueError if torch does not know the device of models that are loaded from a path, or has no such GPU."""
    try:
        chosen = torch.device(device or "cpu")
    except RuntimeError:
        raise ValueError(f"device={device}: torch knows no such device; choose cpu, cuda or cuda:N") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device}, but torch finds no CUDA device; use device=cpu")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={device}, but torch finds {torch.cuda.device_count()} CUDA devices")


def check_dtype(dtype: Any) -> None:
    """Raise ValueError unless `dtype` is "auto" or a floating-point dtype of torch, or its name."""
    chosen = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype != "auto" and not (isinstance(chosen, torch.dtype) and chosen.is_floating_point):
        raise ValueError(f"dtype={dtype}: choose auto, float32, bfloat16 or float16")


def module_of(model: Any, role: str, device: Any, dtype: Any) -> PreTrainedModel:
    """A model as it was given (a PEFT model: its base model, adapters included), or loaded from a path."""
    if isinstance(model, str | os.PathLike):
        path = resolve_model(os.fspath(model))
        if path.startswith(LOCAL) and not is_file(f"{path}/config.json"):
            raise ValueError(
                f"{role}: no model in {os.fspath(model)} (it has no config.json); choose a folder, a hub id, "
                f"or one of {', '.join(shipped_models())}"
            )
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(os.path.expanduser(path), dtype=dtype, **SAFE_WEIGHTS)
        except (OSError, ValueError, ImportError) as error:
            raise ValueError(f"{role}: cannot load a model from {path}: {reason_of(error)}") from error
        return loaded.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"{role}: a Hugging Face causal language model or a path; got {type(model).__name__}")
    return model


def align_tokenizers(
    models: dict[str, Any], tokenizer: Any, modules: dict[str, PreTrainedModel]
) -> PreTrainedTokenizerBase | None:
    """Put the teacher's vocabulary in the student's order if needed; return the student's tokenizer.

    If only one tokenizer loads, that one; None without any.

    `tokenizer`: the student's, or its path; None: loaded from the student's path. `models`: as the user gave them, by
    role (a loaded model has its path in `name_or_path`); `modules`: the loaded models. If both tokenizers have the same
    tokens under other ids, the rows of a teacher that was given as a path are put in the student's order. Raises
    ValueError if the tokenizers differ otherwise.
    """
    if isinstance(tokenizer, str | os.PathLike):
        tokenizer = AutoTokenizer.from_pretrained(os.path.expanduser(resolve_model(os.fspath(tokenizer))), **SAFE)
    loaded: dict[str, PreTrainedTokenizerBase] = {} if tokenizer is None else {"student": tokenizer}
    for role, model in models.items():
        if role in loaded:
            continue
        is_path = isinstance(model, str | os.PathLike)
        path = resolve_model(os.fspath(model)) if is_path else getattr(model, "name_or_path", "")
        try:
            if path:
                loaded[role] = AutoTokenizer.from_pretrained(os.path.expanduser(path), **SAFE)
        except (OSError, ValueError, ImportError):
            continue
    if len(loaded) == 2:
        by_role = (loaded["teacher"], loaded["student"], width_of(modules["teacher"]), width_of(modules["student"]))
        order = teacher_order(*by_role) if isinstance(models["teacher"], str | os.PathLike) else None
        if order is None:
            shared_vocab(*by_role)
        else:
            reorder_vocabulary(modules["teacher"], order)
    return next(iter(loaded.values()), None)


def width_of(module: PreTrainedModel) -> int:
    """Number of token ids that a model has logits for."""
    return module.config.get_text_config().vocab_size


def make_model(module: PreTrainedModel, vocab_size: int) -> Model:
    return Model(module, make_head(module, vocab_size))


@contextmanager
def scoring(*modules: PreTrainedModel) -> Iterator[None]:
    """Without gradient, dropout and autocast inside the block; each submodule's mode is restored after it."""
    training = [module for root in modules for module in root.modules() if module.training]
    try:
        for root in modules:
            root.eval()
        with torch.no_grad(), torch.autocast(modules[0].device.type, enabled=False):
            yield
    finally:
        for module in training:
            module.training = True


def lazy_logits(
    student_hidden: Tensor, teacher_hidden: Tensor, student: Any, teacher: Any
) -> tuple[LazyLogits, LazyLogits]:
    """Both models' logits at N positions over the ids that both have, from hidden states (N, D) and (N, E).

    Raises TypeError or ValueError that names the argument if these do not fit together.
    """
    heads = {"student": _head(student, "student"), "teacher": _head(teacher, "teacher")}
    vocab_size = min(head.vocab_size for head in heads.values())
    if len(student_hidden) != len(teacher_hidden):
        raise ValueError(
            f"student_hidden has {len(student_hidden)} positions and teacher_hidden {len(teacher_hidden)}; both need "
            "one hidden state for each of the same tokens"
        )
    lazy: list[LazyLogits] = []
    for role, hidden in zip(ROLES, (student_hidden, teacher_hidden), strict=True):
        head = replace(heads[role], vocab_size=vocab_size)
        if hidden.shape[-1] != head.weight.shape[1]:
            raise ValueError(
                f"{role}_hidden has {hidden.shape[-1]} features, but the output head of {role} takes "
                f"{head.weight.shape[1]}; give the last hidden state after the final norm"
            )
        if not (hidden.device == head.weight.device == student_hidden.device):
            raise ValueError(
                f"{role}_hidden is on {hidden.device}, its head on {head.weight.device}, student_hidden on "
                f"{student_hidden.device}; all must be on one device"
            )
        lazy.append(LazyLogits(hidden, head))
    check_same_tokens(lazy[0].head, lazy[1].head)
    return lazy[0], lazy[1]


def _head(model: Any, role: str) -> Head:
    if isinstance(model, Head):
        return model
    if isinstance(model, Tensor) and model.dim() == 2:
        return Head(model, len(model))
    if isinstance(model, nn.Linear):
        return Head(model.weight, len(model.weight), model.bias)
    base = getattr(model, "get_base_model", None)
    model = model if base is None else base()
    if isinstance(model, PreTrainedModel):
        return head_of(model, width_of(model))
    what = f"a tensor of shape {tuple(model.shape)}" if isinstance(model, Tensor) else type(model).__name__
    raise TypeError(
        f"{role}: a Hugging Face model, its output embedding (nn.Linear), or that one's weight (V, D); got {what}"
    )
