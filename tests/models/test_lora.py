"""LoRA students: only adapters train, the head gets no gradient, and vLLM and checkpoints get merged weights."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.helpers import gradients_of_step, save_random, train_step
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM

from tip_exp.config.schema import PairConfig, RunConfig
from tip_exp.learner.checkpoint import Checkpoints
from tip_exp.learner.distributed import Ranks
from tip_exp.learner.learner import Learner
from tip_exp.learner.model_folder import export
from tip_exp.learner.out_of_memory import load_pair_or_offload
from tip_exp.learner.selectors import make_selector
from tip_exp.models.load import load_pair
from tip_exp.models.lora import has_adapters, merged_tensors
from tip_exp.models.pair import Pair
from tip_exp.models.sources import load_tokenizer
from tip_exp.records.folder import RunFolder
from tip_exp.records.meter import Meter
from tip_exp.rollout.hf import HfSampler
from tip_exp.run import run
from tip_exp.types import Rollout, Sampling
from tip_exp.utils.errors import ConfigError
from tip_exp.utils.io import read_rows
from tip_exp.utils.paths import resolve_model

peft = pytest.importorskip("peft")
Compose = Callable[..., RunConfig]
LORA = "pair.student.lora={rank: 4, alpha: 8, target_modules: all-linear}"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(compose_run: Compose) -> RunConfig:
    return compose_run(LORA, "learner.warmup_steps=0")


@pytest.fixture
def pair(config: RunConfig) -> Pair:
    return load_pair(config.pair, CPU)


def learner_of(config: RunConfig, pair: Pair, **changes) -> Learner:
    return Learner(pair, make_selector(config), config.learner.model_copy(update=changes), seed=0, meter=Meter(CPU))


def sampled(pair: Pair) -> list[Rollout]:
    sampler = HfSampler(pair.student.module, stop_ids=pair.stop_ids, pad_id=pair.pad_id, batch_size=8)
    return sampler.generate(
        [pair.prompt_ids("Tom has 7 pens. He gives 3. How many pens?")], Sampling(4, 1.0, 1.0, 0, 40), 0
    )


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits


def test_new_adapters_change_no_logit_and_are_all_that_is_trainable(pair: Pair, tiny_pair: Pair) -> None:
    assert logits(pair.student.module).equal(logits(tiny_pair.student.module))
    trainable = {name for name, p in pair.student.module.named_parameters() if p.requires_grad}
    assert trainable and all(".lora_" in name for name in trainable)
    assert len(trainable) == 2 * 7 * 2  # A and B of seven matrices in two layers
    assert not has_adapters(tiny_pair.student.module) and has_adapters(pair.student.module)


def test_initial_adapters_depend_on_the_runs_seed_alone(config: RunConfig) -> None:
    adapters: list[list[Tensor]] = []
    for seed, draws in ((0, 1), (0, 2), (1, 2)):
        torch.manual_seed(draws)
        of_seed = config.model_copy(update={"seed": seed})
        pair = load_pair_or_offload(of_seed, Ranks(), torch.device("cpu"), load_tokenizer(config.pair))
        adapters.append([p.detach() for p in pair.student.module.parameters() if p.requires_grad])
    assert all(a.equal(b) for a, b in zip(*adapters[:2], strict=True))
    assert not all(a.equal(b) for a, b in zip(*adapters[1:], strict=True))


@pytest.mark.parametrize("backend", ["fused", "materialized"])
def test_a_step_changes_adapters_only_and_gives_the_head_no_gradient(config: RunConfig, backend: str) -> None:
    pair = load_pair(config.pair, CPU)
    before = {name: p.detach().clone() for name, p in pair.student.module.named_parameters()}
    learner, rollouts = learner_of(config, pair, loss_backend=backend), sampled(pair)
    losses = [train_step(learner, rollouts, step).metrics["train/loss"] for step in (1, 2, 3, 4)]
    assert losses[-1] < losses[0]
    for name, parameter in pair.student.module.named_parameters():
        assert parameter.equal(before[name]) == (".lora_" not in name), name
    gradients, _ = gradients_of_step(learner, rollouts)
    assert gradients and all(".lora_" in name for name in gradients)


def test_both_backends_give_the_adapters_the_same_gradient(config: RunConfig) -> None:
    gradients = []
    for backend in ("fused", "materialized"):
        torch.manual_seed(0)
        pair = load_pair(config.pair, CPU)
        learner = learner_of(config, pair, loss_backend=backend, lr=1e-30, grad_clip=1e9)
        gradients.append(gradients_of_step(learner, sampled(pair))[0])
    fused, materialized = gradients
    assert fused.keys() == materialized.keys() and any(float(g.norm()) > 1e-4 for g in fused.values())
    for name, gradient in fused.items():
        assert float((materialized[name] - gradient).norm()) <= 1e-4 * float(gradient.norm()) + 1e-6, name


def test_merged_tensors_have_the_plain_models_names_and_the_adapted_models_logits(
    config: RunConfig, pair: Pair, tiny_pair: Pair
) -> None:
    plain = tiny_pair.student.module
    train_step(learner_of(config, pair), sampled(pair))
    merged = dict(merged_tensors(pair.student.module))
    assert list(merged) == [name for name, _ in plain.named_parameters()]
    plain.load_state_dict(merged, strict=False)
    torch.testing.assert_close(logits(plain), logits(pair.student.module), rtol=1e-4, atol=1e-4)
    # one matrix: W + 8/4 B A
    name = "model.layers.0.self_attn.q_proj"
    parts = dict(pair.student.module.named_parameters())
    product = parts[f"{name}.lora_B.default.weight"] @ parts[f"{name}.lora_A.default.weight"]
    torch.testing.assert_close(merged[f"{name}.weight"], parts[f"{name}.base_layer.weight"] + 2 * product)
    untouched = dict(merged_tensors(tiny_pair.teacher.module))
    assert all(untouched[n].equal(p) for n, p in tiny_pair.teacher.module.named_parameters())


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys")  # of peft, about its own patterns
def test_adapters_of_experts_are_merged(config: RunConfig, tmp_path: Path) -> None:
    """peft puts an adapter on each of the two tensors that hold the experts, one inside the other."""
    model, plain = (
        load_pair(c, CPU).student.module for c in with_experts(config, save_random("Qwen3Moe", tmp_path / "experts"))
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    merged = dict(merged_tensors(model))
    assert merged.keys() == dict(plain.named_parameters()).keys()
    before = logits(plain)
    plain.load_state_dict(merged, strict=False)
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, logits(model), atol=1e-2)
    for name in ("gate_up_proj", "down_proj"):
        stored = model.get_parameter(f"model.layers.0.mlp.experts.base_layer.base_layer.{name}")
        assert not merged[f"model.layers.0.mlp.experts.{name}"].equal(stored)


def with_experts(config: RunConfig, folder: Path) -> list[PairConfig]:
    """The pair with this student, with adapters and without."""
    student = config.pair.student.model_copy(update={"path": str(folder)})
    students = student, student.model_copy(update={"lora": None})
    return [config.pair.model_copy(update={"student": student}) for student in students]


def test_an_export_is_a_plain_model_with_an_adapter_that_peft_loads(
    config: RunConfig, pair: Pair, tmp_path: Path
) -> None:
    train_step(learner_of(config, pair), sampled(pair))
    export(tmp_path / "model", pair.student.module, pair.tokenizer, Ranks())
    expected = logits(pair.student.module)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert not has_adapters(plain)
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-4)
    base = AutoModelForCausalLM.from_pretrained(resolve_model("package:tiny/student"))
    with_adapter = peft.PeftModel.from_pretrained(base, tmp_path / "model" / "adapter")
    torch.testing.assert_close(logits(with_adapter), expected, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_holds_the_adapters_alone_and_restores_the_student_bit_for_bit(
    compose_run: Compose, config: RunConfig, pair: Pair, tmp_path: Path
) -> None:
    learner = learner_of(config, pair)
    train_step(learner, sampled(pair))
    checkpoints = Checkpoints(tmp_path, Ranks())
    checkpoints.save(1, pair.student.module, learner.optimizer, "hf")
    checkpoints.wait()
    saved = checkpoints.newest()
    assert saved is not None
    keys = FileSystemReader(saved.path).read_metadata().state_dict_metadata
    assert len(keys) == 4 * len(learner.parameters) and all(".lora_" in key for key in keys)  # weight and AdamW's three
    again = load_pair(config.pair, CPU)
    saved.load(again.student.module, learner_of(config, again).optimizer)
    assert logits(again.student.module).equal(logits(pair.student.module))
    wider = load_pair(compose_run(LORA.replace("rank: 4", "rank: 8")).pair, CPU)
    with pytest.raises(ConfigError, match="other names or shapes"):
        saved.load(wider.student.module, learner_of(config, wider).optimizer)


def test_a_resumed_run_equals_an_uninterrupted_one(compose_run: Compose, tmp_path: Path) -> None:
    def train(folder: Path, steps: int) -> list[dict]:
        folder.mkdir(exist_ok=True)
        few = [f"learner.num_steps={steps}", "learner.warmup_steps=0", "learner.schedule=constant"]
        few += ["learner.prompts_per_step=4", "eval.every=0", "eval.samples=0", "eval.teacher=false", "logger=files"]
        few += ["eval.benchmarks.word_sums.num_problems=4", "learner.checkpoint_every=2"]
        run(compose_run(LORA, *few), RunFolder(folder))
        return read_rows(RunFolder(folder).metrics)

    whole = train(tmp_path / "whole", 4)
    train(tmp_path / "pieces", 2)
    (tmp_path / "pieces" / "result.json").unlink()
    pieces = train(tmp_path / "pieces", 4)
    for name in ("train/loss", "train/grad_norm", "score/reverse_kl_mean", "rollout/response_len"):
        assert [row[name] for row in pieces[3:]] == [row[name] for row in whole[3:]], name
    assert whole[1]["rollout/logprob_mismatch_max"] < 1e-4  # sampled from the unmerged adapters


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{rank: 4, alpha: 8, dropout: 0.1, target_modules: all-linear}", "dropout is not a key"),
        ("{rank: 0, alpha: 8, target_modules: all-linear}", "rank: input should be greater than or equal"),
        ("{rank: 4, alpha: 8, target_modules: []}", "names no layer; a list such as"),
        ("{rank: 4, alpha: 8, target_modules: q_proj}", "a list of layer names, or all-linear"),
    ],
)
def test_bad_settings_are_one_clear_message(compose_run: Compose, settings: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_run(f"pair.student.lora={settings}")
    assert message in str(caught.value) and "pair.student.lora" in str(caught.value)


@pytest.mark.parametrize(
    ("modules", "message"),
    [("[embed_tokens]", "cannot have an adapter"), ("[no_such]", r"pair\.student\.lora\.target_modules: .*no_such")],
)
def test_layers_that_cannot_be_adapted_are_refused(compose_run: Compose, modules: str, message: str) -> None:
    changed = compose_run(f"pair.student.lora={{rank: 4, alpha: 8, target_modules: {modules}}}")
    with pytest.raises(ConfigError, match=message):
        load_pair(changed.pair, CPU)


def test_without_peft_the_error_says_how_to_install_it(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)  # `import peft` then raises ImportError
    with pytest.raises(ConfigError, match=r"pair\.student\.lora needs peft, .* pip install 'tip_exp\[lora\]'"):
        load_pair(config.pair, CPU)
