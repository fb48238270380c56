"""The Hugging Face folder of a run's student: what a user loads after the run, or evaluates."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tip_exp.learner.checkpoint import CheckpointError
from tip_exp.learner.checkpoint_files import publish
from tip_exp.learner.distributed import Ranks
from tip_exp.models.lora import adapter_tensors, has_adapters, merged_tensors, save_adapter, stored_buffers
from tip_exp.utils.space import when_there_is_space

ADAPTER = "adapter"  # folder of a LoRA student's adapter in the folder


def export(folder: Path, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ranks: Ranks) -> None:
    """Replace `folder` by a Hugging Face folder of the student: weights, tokenizer, generation config.

    For a LoRA student the weights are merged and adapter/ holds the adapter. All ranks gather one weight at a time; the
    main rank holds the model once in host memory and writes. Raises CheckpointError.
    """
    tensors = stored_buffers(student)
    for name, tensor in merged_tensors(student):  # after stored_buffers(), which reshards FSDP2 modules
        if ranks.is_main:
            tensors[name] = tensor.cpu()
    adapter = adapter_tensors(student) if has_adapters(student) else {}
    if not ranks.is_main:
        return
    temporary = folder.with_name(f".writing_{folder.name}")

    def write() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        student.save_pretrained(temporary, state_dict=tensors)
        tokenizer.save_pretrained(temporary)
        if adapter:
            save_adapter(student, adapter, temporary / ADAPTER)
        publish(temporary, folder)

    try:
        when_there_is_space(write, temporary)
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"the model could not be written to {folder}: {error}") from error
