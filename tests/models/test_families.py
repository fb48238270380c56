"""Model families of transformers, as random models of two layers: sampled, trained, exported, with adapters too."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tests.helpers import QUESTIONS, make_learner, train_step
from transformers import AutoModelForCausalLM

from tip_exp.config.schema import RunConfig
from tip_exp.learner.distributed import Ranks
from tip_exp.learner.model_folder import export
from tip_exp.models.load import load_pair
from tip_exp.models.lora import merged_tensors, stored_buffers
from tip_exp.models.weight_files import checkpoint_tensors
from tip_exp.records.metrics import MISMATCH_MAX
from tip_exp.rollout.hf import HfSampler
from tip_exp.types import Sampling
from tip_exp.utils.errors import ConfigError
from tip_exp.utils.paths import resolve_model

pytestmark = pytest.mark.filterwarnings("ignore:The following .*_pattern keys")  # of peft, about its own patterns
CPU = torch.device("cpu")
LORA = "pair.student.lora={rank: 4, alpha: 8, target_modules: all-linear}"
SIZES: dict[str, Any] = {
    "vocab_size": 406,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.12,
}
SLIDING = {"sliding_window": 8}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
EXPERTS |= {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16}
LINEAR |= {"linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": SLIDING,
    "Qwen2": {},
    "Qwen3": {},
    "Gemma2": SLIDING,
    "Phi3": {},
    "Olmo3": SLIDING,
    "SmolLM3": {},
    "Granite": {},
    "Cohere2": SLIDING,
    "Glm4": {},
    "Starcoder2": {},
    "Mixtral": EXPERTS,
    "Qwen3Moe": EXPERTS,
    "Glm4Moe": EXPERTS,
    "DeepseekV2": EXPERTS | LATENT | {"num_key_value_heads": 4},
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "Jamba": EXPERTS | {"attn_layer_period": 2, "attn_layer_offset": 1},
    "Qwen3Next": EXPERTS | LINEAR,
}
RECURRENT = ("Lfm2", "Jamba", "Qwen3Next")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "lora"])
def test_a_family_is_sampled_trained_and_exported(
    compose_run: Callable[..., RunConfig], family: str, adapters: bool, tmp_path: Path
) -> None:
    """Sampler and learner agree, an engine would get what files hold, and the exported model is the trained one."""
    torch.manual_seed(0)
    settings = getattr(transformers, f"{family}Config")(**SIZES | FAMILIES[family])
    source, folder = Path(resolve_model("package:tiny/student")), tmp_path / family
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    model = getattr(transformers, f"{family}ForCausalLM")(settings)
    for buffer in stored_buffers(model).values():
        torch.nn.init.normal_(buffer, std=0.1)
    model.save_pretrained(folder)
    paths = [f"pair.{role}.path={folder}" for role in ("teacher", "student")]
    packing = family not in RECURRENT
    options = ["learner.warmup_steps=0", f"learner.packing={packing}".lower(), *([LORA] if adapters else [])]
    config = compose_run(*paths, *options)
    if not packing:
        with pytest.raises(ConfigError, match=r"mixes the sequences of a packed row.*learner\.packing=false"):
            load_pair(config.pair, CPU, packing=True)
    pair = load_pair(config.pair, CPU, packing=packing)
    module = pair.student.module
    tensors = chain(stored_buffers(module).items(), merged_tensors(module))
    stored, sent = load_file(folder / "model.safetensors"), dict(checkpoint_tensors(module, tensors))
    assert stored.keys() == sent.keys() and all(sent[name].equal(value) for name, value in stored.items())
    for parameter in pair.teacher.module.parameters():
        parameter.data.mul_(1.05)
    learner = make_learner(pair, config.learner)
    sampler = HfSampler(pair.student.module, stop_ids=pair.stop_ids, pad_id=pair.pad_id, batch_size=16)
    prompts = [pair.prompt_ids(question) for question in QUESTIONS]
    for step in (1, 2):
        metrics = train_step(learner, sampler.generate(prompts, Sampling(2, 1.0, 1.0, 0, 24), step), step).metrics
        assert metrics[MISMATCH_MAX] < 1e-3 and metrics["train/loss"] > 0
    export(tmp_path / "model", pair.student.module, pair.tokenizer, Ranks())
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    with torch.no_grad():
        logits = [module(torch.arange(5, 45)[None]).logits for module in (exported, pair.student.module)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-3)
