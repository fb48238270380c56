"""Where a pair's models come from, and its tokenizer. Tokenizers, vocabularies and stop tokens are checked here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from tip_exp.config.machine_rules import NO_TEMPLATE
from tip_exp.config.schema import ModelConfig, PairConfig
from tip_exp.models.pair import ChatTokenizer
from tip_exp.utils.errors import ConfigError, first_line
from tip_exp.utils.paths import resolve_model

ROLES = ("teacher", "student")
SAFE = {"trust_remote_code": False}  # a model's own code is never run
SAFE_WEIGHTS = SAFE | {"use_safetensors": True}  # a .bin file is a pickle, which can run code


def load_tokenizer(config: PairConfig) -> ChatTokenizer:
    """The pair's tokenizer, once tokenizers, vocabulary sizes and stop tokens of both models are checked."""
    tokenizers = {role: load_part(AutoTokenizer, "tokenizer", config, role) for role in ROLES}
    widths = {role: text_config(config, role).vocab_size for role in ROLES}
    by_role = tokenizers["teacher"], tokenizers["student"], widths["teacher"], widths["student"]
    order, stops = teacher_order(*by_role), {role: _stop_ids(config, role, tokenizers[role]) for role in ROLES}
    if order is None:
        vocab_size = shared_vocab(*by_role)
    else:
        vocab_size = min(widths.values())
        stops["teacher"] = sorted(order.index(token) for token in stops["teacher"])
        print("pair: both tokenizers have the same tokens under other ids; the teacher's rows take the student's order")
    if stops["teacher"] != stops["student"]:
        differ = f"the teacher stops at token ids {stops['teacher']}, the student at {stops['student']}"
        if config.stop == "refuse":
            raise ConfigError(
                f"pair.stop=refuse: {differ}; the teacher would teach the student not to end its responses. Use models "
                "that share their stop tokens, or pair.stop=union: a response ends at any of them, or pair.stop=class: "
                "statistics and loss count them as one token as well"
            )
        counted = ", and statistics and loss count them as one token" if config.stop == "class" else ""
        print(f"pair.stop={config.stop}: {differ}; a response ends at any of them{counted}")
    stop_ids = list(dict.fromkeys(stops["student"] + stops["teacher"]))
    tokenizer = tokenizers["student"]
    if config.chat.template is not None:
        tokenizer.chat_template = Path(config.chat.template).expanduser().read_text(encoding="utf-8")
    template = tokenizer.chat_template
    if not template or (isinstance(template, dict) and "default" not in template):
        raise ConfigError(NO_TEMPLATE.format(config.student.path))
    return ChatTokenizer(
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        stop_ids=sorted(stop_ids),
        pad_id=stops["student"][0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        teacher_order=order,
        stop_class=tuple(stop_ids) if config.stop == "class" and stops["teacher"] != stops["student"] else (),
        chat=config.chat,
        privileged=config.privileged,
    )


def shared_vocab(
    teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase, teacher_width: int, student_width: int
) -> int:
    """Number of token ids that both models have; raises ConfigError unless each id is the same token for both.

    Logits may be wider than the tokenizer (Qwen pads 151,665 tokens to 151,936 or 152,064): the smaller width counts.
    """
    student_vocab, teacher_vocab = student.get_vocab(), teacher.get_vocab()
    if different := sorted({token for token, _ in student_vocab.items() ^ teacher_vocab.items()}):
        example = different[0]
        raise ConfigError(
            "pair: teacher and student must share one tokenizer (pair.teacher.path, pair.student.path), but "
            f"{len(different)} tokens differ; for example {example[:80]!r} is id {teacher_vocab.get(example)} in the "
            f"teacher and {student_vocab.get(example)} in the student. A divergence needs equal ids: choose two models "
            "of one family, or make one of them with the other's tokenizer"
        )
    shared, largest_id = min(teacher_width, student_width), max(student_vocab.values())
    if largest_id >= shared:
        raise ConfigError(
            f"pair: the tokenizer has ids up to {largest_id}, but the two models share only {shared} logits"
        )
    return shared


def teacher_order(
    teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase, teacher_width: int, student_width: int
) -> list[int] | None:
    """For each id the teacher's id of the student's token, where the same tokens have other ids; else None.

    A permutation of the teacher's `teacher_width` ids; those without a token fill the rest in ascending order.
    """
    student_vocab, teacher_vocab = student.get_vocab(), teacher.get_vocab()
    fits = (
        max(student_vocab.values()) < min(teacher_width, student_width) and max(teacher_vocab.values()) < teacher_width
    )
    if student_vocab == teacher_vocab or student_vocab.keys() != teacher_vocab.keys() or not fits:
        return None
    order = {student_id: teacher_vocab[token] for token, student_id in student_vocab.items()}
    unused = iter(sorted(set(range(teacher_width)) - set(order.values())))
    return [order[i] if i in order else next(unused) for i in range(teacher_width)]


def source(config: PairConfig, role: str) -> tuple[str, str]:
    """Folder or hub id, and revision, of one role's model."""
    model: ModelConfig = getattr(config, role)
    path = resolve_model(model.path)
    return str(Path(path).expanduser()) if path.startswith("~") else path, model.revision or "main"


def load_part(loader: Any, what: str, config: PairConfig, role: str, **options: Any) -> Any:
    """`loader.from_pretrained` for one role's model; raises ConfigError if `what` cannot be loaded."""
    path, revision = source(config, role)
    try:
        return loader.from_pretrained(path, revision=revision, **(SAFE | options))
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ConfigError(f"pair.{role}.path: cannot load the {what} of {path}: {reason_of(error)}") from error


def reason_of(error: Exception) -> str:
    """Why a model cannot be loaded; what SAFE_WEIGHTS refuses comes with its remedy."""
    text = str(error)
    if "trust_remote_code" in text:
        return "it comes with code of its own, which is never run; choose an architecture that transformers has"
    if "safetensors" in text and "no file named" in text:
        return (
            "it has no .safetensors file, and a .bin file can run code; if you trust it, convert it once: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    return first_line(error)


def text_config(config: PairConfig, role: str) -> PretrainedConfig:
    return load_part(AutoConfig, "config", config, role).get_text_config()


def _stop_ids(config: PairConfig, role: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Stop ids of the tokenizer and of the model's generation config, sorted."""
    path, revision = source(config, role)
    try:
        eos = GenerationConfig.from_pretrained(path, revision=revision).eos_token_id
    except OSError as error:  # generation_config.json is optional, but one that is torn is no missing one
        if "valid JSON" in str(error):
            raise ConfigError(f"pair.{role}.path: {first_line(error)}") from error
        eos = None
    stops = {eos} if isinstance(eos, int) else set(eos or [])
    if isinstance(tokenizer.eos_token_id, int):
        stops.add(tokenizer.eos_token_id)
    if not stops:
        raise ConfigError(
            f"pair.{role}.path: neither the tokenizer nor the generation config of {path} names a stop token"
        )
    return sorted(stops)
