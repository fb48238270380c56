"""The pair: head times hidden states gives the model's own logits; pairs that do not fit together are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.helpers import permute_ids
from transformers import (
    AutoTokenizer,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GraniteConfig,
    GraniteForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    MptConfig,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    StableLmConfig,
    StableLmForCausalLM,
)

from tip_exp import build
from tip_exp.config.machine_rules import too_few_positions
from tip_exp.config.schema import ChatConfig, PairConfig, RunConfig
from tip_exp.models.load import check_context, head_of, load_pair, make_head
from tip_exp.models.micro_batch import micro_batches
from tip_exp.models.packed_attention import check_packing
from tip_exp.models.pair import Model, Pair
from tip_exp.models.sources import ROLES, load_tokenizer, shared_vocab, teacher_order
from tip_exp.records.folder import RunFolder
from tip_exp.run import run, run_eval
from tip_exp.types import Rollout
from tip_exp.utils.errors import ConfigError
from tip_exp.utils.paths import resolve_model

CPU = torch.device("cpu")
SMALL = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}


def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(resolve_model("package:tiny/student"))


def test_hidden_states_are_those_that_predict_the_response(tiny_pair: Pair) -> None:
    """In a padded batch they give the logits that each sequence has alone; tool tokens in the middle are skipped."""
    rollouts = [
        Rollout([1, 50, 60, 70, 80, 2], [False, False, True, False, True, True], "stop", []),
        Rollout([1, 90, 91], [False, True, True], "stop", []),
    ]
    (batch,) = micro_batches(rollouts, 1000, tiny_pair.pad_id)
    with torch.no_grad():
        for model in (tiny_pair.student, tiny_pair.teacher):
            logits_in_batch = model.head.logits(model.hidden(batch))
            logits_alone = []
            for rollout in rollouts:
                logits = model.module(torch.tensor([rollout.token_ids])).logits[0]
                logits_alone += [logits[t - 1] for t, written in enumerate(rollout.response_mask) if written]
            torch.testing.assert_close(logits_in_batch, torch.stack(logits_alone), rtol=1e-4, atol=1e-4)
    assert batch.token_ids.tolist() == [60, 80, 2, 90, 91]


def test_prompts_follow_the_chat_template(tiny_pair: Pair) -> None:
    ids = tiny_pair.prompt_ids("Tom has 7 pens.")
    assert tiny_pair.tokenizer.decode(ids) == "<|im_start|>user\nTom has 7 pens.<|im_end|>\n<|im_start|>assistant\n"
    assert tiny_pair.stop_ids == [2]


def test_system_message_and_thinking_switch_reach_the_template(tiny_pair: Pair) -> None:
    tiny_pair.tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
        "{% if enable_thinking is defined %}[think {{ enable_thinking }}]{% endif %}"
    )
    chat = ChatConfig(template=None, system="Be brief.", thinking=False, eval_thinking=True)
    pair = replace(tiny_pair, chat=chat)
    assert pair.decode(pair.prompt_ids("Hi")) == "[system]Be brief.[user]Hi[think False]"
    assert pair.decode(pair.prompt_ids("Hi", evaluating=True)) == "[system]Be brief.[user]Hi[think True]"
    assert tiny_pair.decode(tiny_pair.prompt_ids("Hi")) == "[user]Hi"


def test_attention_does_not_use_cudnn(tiny_config: RunConfig) -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    load_pair(tiny_config.pair, torch.device("cpu"))
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_teacher_is_frozen_and_student_is_not(tiny_pair: Pair) -> None:
    assert not any(p.requires_grad for p in tiny_pair.teacher.module.parameters())
    assert all(p.requires_grad for p in tiny_pair.student.module.parameters())


@pytest.mark.parametrize(
    ("config", "model"),
    [
        (Gemma2Config(**SMALL, final_logit_softcapping=5.0), Gemma2ForCausalLM),
        (CohereConfig(**{k: v for k, v in SMALL.items() if k != "head_dim"}, logit_scale=0.25), CohereForCausalLM),
        (GraniteConfig(**{k: v for k, v in SMALL.items() if k != "head_dim"}, logits_scaling=8.0), GraniteForCausalLM),
    ],
    ids=["gemma2 soft-caps", "cohere scales", "granite divides"],
)
def test_scaled_and_capped_heads_give_the_models_own_logits(config, model) -> None:
    torch.manual_seed(0)
    module = model(config).eval()
    head = make_head(module, 40)
    assert head.softcap is not None or head.scale != 1.0
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        logits = head.logits(module.base_model(ids).last_hidden_state[0])
        torch.testing.assert_close(logits, module(ids).logits[0].float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits.pow(3),
        lambda logits: 30 * torch.tanh(logits / 30),
        lambda logits: 500 * torch.tanh(logits / 500),
        lambda logits: 1.05 * logits,
        lambda logits: logits + 1,
        lambda logits: logits.clone().index_fill_(-1, torch.tensor([7]), float("-inf")),
        lambda logits: logits * float("nan"),
    ],
    ids=["cubes", "soft-caps at 30", "soft-caps at 500", "multiplies", "adds", "masks a token", "returns NaN"],
)
def test_a_model_that_changes_its_logits_otherwise_is_refused(
    tiny_pair: Pair, change: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype
) -> None:
    """Also where the change is small at the logits of the model's own hidden states; its config names none."""
    module = tiny_pair.student.module.to(dtype)
    make_head(module, 406)
    original_forward = type(module).forward

    class ChangedLogits(type(module)):
        def forward(self, *args, **kwargs):
            out = original_forward(self, *args, **kwargs)
            out.logits = change(out.logits)
            return out

    module.__class__ = ChangedLogits
    with pytest.raises(ConfigError, match="does more to its logits than scaling or soft-capping as its config names"):
        make_head(module, 406)


def test_a_model_whose_backbone_has_no_name_is_refused() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "intermediate_size_mlp": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2}
    module = Llama4ForCausalLM(Llama4TextConfig(**sizes, **heads, vocab_size=50))
    with pytest.raises(ConfigError, match="Llama4ForCausalLM does not name its backbone"):
        make_head(module, 50)


def test_a_model_that_does_not_call_its_base_model_is_refused() -> None:
    module = OPTForCausalLM(
        OPTConfig(hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    )
    with pytest.raises(ConfigError, match="OPTForCausalLM does not call its base model"):
        make_head(module, 50)


def test_tokens_that_a_bias_excludes_do_not_hide_other_changes(tiny_pair: Pair) -> None:
    module = tiny_pair.student.module
    module.lm_head.bias = torch.nn.Parameter(torch.zeros(module.config.vocab_size))
    module.lm_head.bias.data[7] = float("-inf")
    assert make_head(module, 406).excluded.nonzero().tolist() == [[7]]
    module.config.logit_scale = 1.05
    with pytest.raises(ConfigError, match="does more to its logits"):
        make_head(module, 406)


def test_padded_vocabularies_are_reduced_to_the_shared_width() -> None:
    assert shared_vocab(tokenizer(), tokenizer(), teacher_width=512, student_width=448) == 448
    with pytest.raises(ConfigError, match="share only 300 logits"):
        shared_vocab(tokenizer(), tokenizer(), teacher_width=300, student_width=448)


def test_different_tokenizers_are_refused_with_an_example() -> None:
    with_tool = tokenizer()
    with_tool.add_tokens(["<tool>"])
    with pytest.raises(ConfigError, match=r"1 tokens differ.*'<tool>' is id 406 in the teacher and None"):
        shared_vocab(with_tool, tokenizer(), 512, 512)


def test_a_teacher_with_the_same_tokens_under_other_ids(
    tiny_config: RunConfig, tiny_pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stored with permuted ids, it gives the same logits bit for bit; its stop token is that of the student."""
    folder = tmp_path / "teacher"
    permute_ids(Path(resolve_model("package:tiny/teacher")), folder)
    changed = tiny_config.pair.teacher.model_copy(update={"path": str(folder)})
    pair = load_pair(tiny_config.pair.model_copy(update={"teacher": changed}), CPU)
    assert "the same tokens under other ids" in capsys.readouterr().out
    assert pair.teacher_order is not None and pair.teacher_order != sorted(pair.teacher_order)
    assert (pair.vocab_size, pair.stop_ids) == (tiny_pair.vocab_size, [2])
    ids = torch.tensor([[1, 50, 60, 70, 2]])
    with torch.no_grad():
        logits = [model.module(ids).logits for model in (pair.teacher, tiny_pair.teacher)]
    assert torch.equal(*logits)


def test_ids_without_a_token_fill_the_rows_that_are_left() -> None:
    def tokenizer_of(vocab: dict[str, int]) -> Any:
        return SimpleNamespace(get_vocab=lambda: vocab)

    teacher, student = tokenizer_of({"a": 3, "b": 0, "c": 1}), tokenizer_of({"a": 0, "b": 1, "c": 2})
    assert teacher_order(teacher, student, 5, 4) == [3, 0, 1, 2, 4]
    assert teacher_order(student, student, 5, 4) is None
    assert teacher_order(tokenizer_of({"a": 0, "b": 1, "d": 2}), student, 5, 4) is None
    assert teacher_order(teacher, student, 3, 4) is None  # refused: id 3 has no logit


@pytest.mark.parametrize(
    ("overrides", "longest_eval", "message"),
    [
        (["data.max_prompt_tokens=441"], 0, "data.max_prompt_tokens + data.max_response_tokens = 513, but the teacher"),
        (
            ["pair=self", "pair.privileged.max_tokens=500"],
            0,
            "pair.privileged.max_tokens + data.max_response_tokens = 572, but the teacher",
        ),
        (
            ["eval.teacher=false", "eval.sequence_kl=false"],
            513,
            "evaluation prompt + eval.max_tokens = 513, but the student package:tiny/student has 512 positions; lower",
        ),
        (["eval.teacher=true"], 513, "the longest evaluation prompt + eval.max_tokens = 513, but the teacher"),
        (
            ["eval.teacher=false", "eval.sequence_kl=true"],
            513,
            "the longest evaluation prompt + eval.max_tokens = 513, but the teacher",
        ),
        (
            ["mode=eval", "data.max_prompt_tokens=441", "eval.teacher=false", "eval.sequence_kl=false"],
            600,
            "the longest evaluation prompt + eval.max_tokens = 600, but the student",
        ),
    ],
)
def test_more_tokens_than_positions_are_refused(
    compose_run: Callable[..., RunConfig], overrides: list[str], longest_eval: int, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_context(compose_run(*overrides), longest_eval)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "text_config",
    [GPT2Config(n_positions=512), MptConfig(max_seq_len=512), LlamaConfig(max_position_embeddings=512)],
    ids=lambda config: config.model_type,
)
def test_positions_are_counted_whatever_the_key(compose_run: Callable[..., RunConfig], text_config) -> None:
    text_configs = dict.fromkeys(ROLES, text_config)
    check_context(compose_run(), 512, text_configs)
    with pytest.raises(ConfigError, match=r"eval\.max_tokens = 513, but the teacher \S+ has 512 positions"):
        check_context(compose_run(), 513, text_configs)


@pytest.mark.parametrize(("key", "refused"), [(None, False), ("teacher", True), ("sequence_kl", True)])
def test_each_model_is_held_to_its_own_positions(tiny_config: RunConfig, tmp_path: Path, key, refused: bool) -> None:
    """The teacher has fewer, and reads evaluations only if it is evaluated or scores them."""
    paths = {}
    for role, positions in (("teacher", 1024), ("student", 2048)):
        (tmp_path / role).mkdir()
        (tmp_path / role / "config.json").write_text(json.dumps({"max_position_embeddings": positions}))
        paths[role] = getattr(tiny_config.pair, role).model_copy(update={"path": str(tmp_path / role)})
    evaluation = {"max_tokens": 1500, "teacher": False, "sequence_kl": False} | ({key: True} if key else {})
    config = tiny_config.model_copy(
        update={
            "pair": tiny_config.pair.model_copy(update=paths),
            "eval": tiny_config.eval.model_copy(update=evaluation),
        }
    )
    messages = list(too_few_positions(config))
    assert [message.startswith("eval.max_tokens (1500) leaves no place") for message in messages] == [True] * refused
    longer = config.model_copy(update={"eval": config.eval.model_copy(update={"max_tokens": 2048})})
    (message,) = too_few_positions(longer)
    assert f"pair.{'teacher' if refused else 'student'}.path" in message


def test_context_is_checked_before_weights_load(
    compose_run: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_args, **_kwargs) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(build, "load_pair_or_offload", never)
    for mode, function in (("train", run), ("eval", run_eval)):
        with pytest.raises(ConfigError, match=r"the longest evaluation prompt \+ eval\.max_tokens = 5\d\d, but the"):
            function(compose_run(f"mode={mode}", "eval.max_tokens=480"), RunFolder(tmp_path))


def test_all_positions_may_be_used(compose_run: Callable[..., RunConfig]) -> None:
    check_context(compose_run("data.max_prompt_tokens=440"), 512)
    check_context(compose_run("mode=eval", "data.max_prompt_tokens=5000", "learner.micro_batch_tokens=9000"), 512)
    check_context(compose_run("mode=eval", "eval.samples=0", "learner.micro_batch_tokens=300"), 512)


def test_the_tokenizer_loads_without_weights(tiny_config: RunConfig, tiny_pair: Pair, tmp_path: Path) -> None:
    changes = {}
    for role in ("teacher", "student"):
        folder = tmp_path / role
        shutil.copytree(resolve_model(f"package:tiny/{role}"), folder)
        (folder / "model.safetensors").unlink()
        changes[role] = getattr(tiny_config.pair, role).model_copy(update={"path": str(folder)})
    loaded = load_tokenizer(tiny_config.pair.model_copy(update=changes))
    assert loaded.prompt_ids("Hi") == tiny_pair.prompt_ids("Hi")
    assert (loaded.stop_ids, loaded.pad_id, loaded.vocab_size) == ([2], tiny_pair.pad_id, 406)


def pair_with_another_stop(tiny_config: RunConfig, tmp_path: Path) -> PairConfig:
    """The student stops at 0 too, as a base model does that its teacher was tuned from."""
    student = tmp_path / "student"
    shutil.copytree(resolve_model("package:tiny/student"), student)
    generation = student / "generation_config.json"
    generation.write_text(generation.read_text().replace('"eos_token_id": 2', '"eos_token_id": [0, 2]'))
    changed = tiny_config.pair.student.model_copy(update={"path": str(student)})
    return tiny_config.pair.model_copy(update={"student": changed})


def test_other_stop_tokens_can_be_refused(tiny_config: RunConfig, tmp_path: Path) -> None:
    pair = pair_with_another_stop(tiny_config, tmp_path).model_copy(update={"stop": "refuse"})
    with pytest.raises(
        ConfigError, match=r"pair.stop=refuse: the teacher stops at token ids \[2\], the student at \[0, 2\]"
    ):
        load_pair(pair, CPU)


def test_a_torn_generation_config_is_not_taken_for_a_missing_one(tiny_config: RunConfig, tmp_path: Path) -> None:
    pair = pair_with_another_stop(tiny_config, tmp_path)
    generation = Path(pair.student.path) / "generation_config.json"
    generation.write_text(generation.read_text()[:-5])
    with pytest.raises(ConfigError, match=r"pair\.student\.path: .*generation_config\.json.* is not a valid JSON file"):
        load_tokenizer(pair)
    generation.unlink()
    assert load_tokenizer(pair).stop_ids == [2]


def test_a_student_with_contradictory_sampling_settings_can_be_saved(tiny_config: RunConfig, tmp_path: Path) -> None:
    """transformers loads them and refuses to save them, which a run would notice after its last step."""
    config = pair_with_another_stop(tiny_config, tmp_path)
    generation = Path(config.student.path) / "generation_config.json"
    generation.write_text(json.dumps(json.loads(generation.read_text()) | {"do_sample": False, "temperature": 0.6}))
    pair = load_pair(config, CPU)
    pair.student.module.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "generation_config.json").read_text())["eos_token_id"] == [0, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_mixes_packed_sequences_is_refused(tiny_config: RunConfig, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    assert load_pair(tiny_config.pair, CPU, packing=True)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    module = StableLmForCausalLM(StableLmConfig(**sizes, num_key_value_heads=2, vocab_size=50)).to(dtype).eval()
    with pytest.raises(ConfigError, match="key: StableLmForCausalLM mixes the sequences of a packed row"):
        check_packing(Model(module, head_of(module, 50)), "key")


def test_a_tokenizer_without_a_default_template_is_refused(tiny_config: RunConfig, tmp_path: Path) -> None:
    config = pair_with_another_stop(tiny_config, tmp_path)
    (Path(config.student.path) / "chat_template.jinja").unlink(missing_ok=True)
    path = Path(config.student.path) / "tokenizer_config.json"
    templates = [{"name": "tool_use", "template": "{{ messages }}"}]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": templates}))
    with pytest.raises(ConfigError, match=r"pair\.chat\.template"):
        load_tokenizer(config)


def test_a_response_ends_at_the_stop_tokens_of_both_models(
    tiny_config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = pair_with_another_stop(tiny_config, tmp_path)
    pair = load_pair(config, CPU)
    assert pair.stop_ids == [0, 2]
    assert "pair.stop=union: the teacher stops at token ids [2], the student at [0, 2]" in capsys.readouterr().out
    assert pair.student.module.generation_config is not None
    assert pair.student.module.generation_config.eos_token_id == [0, 2]  # what an export of it says


def test_stop_tokens_as_one_class(tiny_config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = pair_with_another_stop(tiny_config, tmp_path).model_copy(update={"stop": "class"})
    pair = load_pair(config, CPU)
    assert pair.stop_ids == [0, 2] and pair.stop_class == (0, 2)
    assert pair.student.head.stop_class == pair.teacher.head.stop_class == (0, 2)
    assert "pair.stop=class: the teacher stops at token ids [2]" in capsys.readouterr().out


def test_a_student_learns_the_stop_token_of_its_teacher(tiny_config: RunConfig, tmp_path: Path) -> None:
    """Teacher [0, 2], student [2]: its rollouts end at 0 as well, and so does the exported model."""
    other = pair_with_another_stop(tiny_config, tmp_path).student.path
    teacher = tiny_config.pair.teacher.model_copy(update={"path": other})
    pair = load_pair(tiny_config.pair.model_copy(update={"teacher": teacher}), CPU)
    assert pair.student.module.generation_config is not None
    assert pair.student.module.generation_config.eos_token_id == pair.stop_ids == [0, 2]


def test_equal_stop_tokens_leave_the_generation_config_alone(
    tiny_pair: Pair, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tiny_pair.student.module.generation_config is not None
    assert tiny_pair.student.module.generation_config.eos_token_id == 2 and not capsys.readouterr().out


def test_a_chat_template_of_a_file(tiny_config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "plain.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}=")
    chat = tiny_config.pair.chat.model_copy(update={"template": str(tmp_path / "plain.jinja")})
    loaded = load_tokenizer(tiny_config.pair.model_copy(update={"chat": chat}))
    assert loaded.decode(loaded.prompt_ids("1 + 2")) == "1 + 2="


def test_the_template_of_the_documentation_for_base_models(tiny_pair: Pair) -> None:
    page = (Path(__file__).parents[2] / "docs" / "own_models.md").read_text(encoding="utf-8")
    tiny_pair.tokenizer.chat_template = page.split("```jinja\n")[1].split("```")[0]
    assert tiny_pair.decode(tiny_pair.prompt_ids("1 + 2")) == "User: 1 + 2\nAssistant:"
    tiny_pair.tokenizer.bos_token = "<|endoftext|>"
    assert tiny_pair.decode(tiny_pair.prompt_ids("1"), with_special=True) == "<|endoftext|>User: 1\nAssistant:"


@pytest.mark.parametrize("missing", ["tokenizer.json", "config.json", "model.safetensors"])
def test_a_folder_that_lacks_a_file_is_one_clear_error(tiny_config: RunConfig, tmp_path: Path, missing: str) -> None:
    student = tmp_path / "student"
    shutil.copytree(resolve_model("package:tiny/student"), student)
    (student / missing).unlink()
    changed = tiny_config.pair.student.model_copy(update={"path": str(student)})
    with pytest.raises(ConfigError, match=r"pair\.student\.path: .*student"):
        load_pair(tiny_config.pair.model_copy(update={"student": changed}), CPU)
