"""Every option and sweep composes and passes the rules; a bad input gives one message with key, value and remedy."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.errors import HydraException
from omegaconf import OmegaConf
from tests.composing import compose_raw

from tip_exp.config import machine_rules
from tip_exp.config.parse import deciding_values, differences, digest, flatten, load, parse
from tip_exp.config.schema import RunConfig
from tip_exp.launch.plan import plan
from tip_exp.launch.sweep import RefusedRun, SweepRun
from tip_exp.utils.errors import ConfigError
from tip_exp.utils.paths import conf_dir, resolve_model

GROUPS = ("pair", "data", "agent", "rollout", "selector", "learner", "eval", "logger", "experiment")
OPTIONS = [f"{group}={path.stem}" for group in GROUPS for path in sorted((conf_dir() / group).glob("*.yaml"))]
TABLE = Path(__file__).parents[1] / "datasets" / "gsm8k_test.jsonl"
FOLDER = Path(__file__).parents[1] / "envs" / "deepplanning" / "world"
OWN_MODEL = f"pair.teacher.path={resolve_model('package:tiny/teacher')} pair.student.path=package:tiny/student"
NEEDS = {  # overrides without which an option is refused: own files and models, and the folder of official tasks
    "data=jsonl": f"data.train.file={TABLE}",
    "eval=jsonl": f"eval.file={TABLE}",
    "pair=hf": OWN_MODEL,
    "data=deepplanning": f"data.root={FOLDER}",
    "eval=deepplanning": f"data.root={FOLDER}",
    "eval=deepplanning_base_code": f"data.root={FOLDER}",
    "agent=default": "data=mini_travel",
    "agent=official": "data=calculator",
    "agent=base_code": "data=mini_travel",
    "selector=rule": "selector.score=tip_exp.selector.scores:quadrant_1",
    "experiment=tip_deepplanning": f"data.root={FOLDER}",
    "experiment=tip_deepplanning_32b": f"data.root={FOLDER}",
}
MADE_FIRST = {
    "pair=smollm2",
    "pair=tiny_students",
    "pair=tiny_ledger",
    "experiment=demo_ledger",
    "experiment=smollm2_gsm8k",
}  # their models are not shipped
SWEEP_FOLDER = conf_dir().parent / "sweeps"
SWEEPS = sorted(SWEEP_FOLDER.glob("*.yaml"))

# case -> (overrides, part of the message)
BAD = {
    "unknown key": ("selector.retenton=0.5", "Could not override 'selector.retenton'"),
    "unknown key, added": (
        "+selector.retenton=0.5",
        "selector.retenton is not a key; did you mean selector.retention?",
    ),
    "unknown group key": ("+lerner=3", "lerner is not a key; did you mean learner?"),
    "unknown option": ("selector=entropi", "Could not find 'selector/entropi'"),
    "unknown score rule": ("selector.score=entropi", "did you mean entropy?"),
    "another rule under the preset's name": (
        "selector.score=q3 selector.clip={}",
        "selector.label=soft_or would name the runs of selector.score=q3 after the rule soft_or; choose selector=q3",
    ),
    "a rule of a module with a dot": ("selector=rule selector.score=a.b.rule", "did you mean a.b:rule?"),
    "no score rule": ("selector.score=zzzz", "selector.score: no rule 'zzzz'; choose soft_or, "),
    "clip of an unknown statistic": ("+selector.clip.entropi=0.9", "input should be 'entropy', 'teacher_entropy', "),
    "clip of a statistic the rule does not read": ("selector=q3 +selector.clip.jsd=0.9", "q3 does not read jsd"),
    "clip quantile of 2": ("selector.clip.entropy=2", "selector.clip.entropy: input should be less than or equal to 1"),
    "retention 0": ("selector.retention=0", "selector.retention: input should be greater than 0; got 0"),
    "retention 1.5": ("selector.retention=1.5", "selector.retention: input should be less than or equal to 1; got 1.5"),
    "retention nan": ("selector.retention=nan", "selector.retention: input should be a finite number; got nan"),
    "retention negative": ("selector.retention=-0.2", "greater than 0; got -0.2"),
    "retention a word": ("selector.retention=half", "selector.retention: input should be a valid number; got 'half'"),
    "retention missing": ("selector.retention=null", "selector.retention: input should be a valid number; got None"),
    "full with a ratio": ("selector=full selector.retention=0.3", "same budget choose selector=random"),
    "quadrant with a ratio": ("selector=q1 selector.retention=0.3", "keeps every token of its quadrant"),
    "full in an order": ("selector=full selector.order=top", "selector.order must be positive, not top"),
    "order positive of a ranked score": ("selector.order=positive", "needs a score that is 0 or 1"),
    "unknown order": ("selector.order=upside", "'top', 'bottom', 'sample' or 'positive'; got 'upside'"),
    "unknown normaliser": ("selector.normalizer=z", "'minmax', 'quantile', 'rank' or 'none'; got 'z'"),
    "Soft-OR of nats": ("selector.normalizer=none", "soft_or needs statistics in [0, 1]"),
    "scores that cannot be compared": (
        "selector.scope=batch selector.normalize_over=rollout",
        "scales each rollout",
    ),
    "sampling by rank": ("selector.order=sample selector.normalizer=rank", "in proportion to the score"),
    "weights of a yes-or-no rule": (
        "selector=q1 selector.weight=score",
        "got selector.score=q1, selector.order=positive",
    ),
    "weights of noise": (
        "selector=random selector.weight=score",
        "got selector.score=random, selector.order=top",
    ),
    "an offset of nothing": ("selector.weight_offset=0.1", "selector.weight_offset=0.1 has no effect"),
    "an offset of 0": (
        "selector.weight=sqrt selector.weight_offset=0",
        "cannot run: selector.weight_offset: input should be greater than 0; got 0",
    ),
    "an offset that is no quantile": ("selector.weight_offset=0.9q", "a quantile such as q0.9"),
    "an unknown shadow": ("selector.shadows=[softor]", "softor is not an option of selector; did you mean soft_or?"),
    "a shadow like nothing": ("selector.shadows=[xyz]", "xyz is not an option of selector; there are ca_softor, "),
    "a rule of a module as shadow": ("selector.shadows=[rule]", "selector.shadows: rule is not an option of selector"),
    "a shadow that keeps too much": ("selector.shadows=[q3@1.5]", "q3@1.5; after @ stands a retention above 0"),
    "a shadow without a number": ("selector.shadows=[q3@]", "after @ stands a retention above 0 and at most 1"),
    "a shadow that is no number": ("selector.shadows=[q3@nan]", "after @ stands a retention above 0 and at most 1"),
    "a shadow of another budget": ("selector.shadows=[q1@0.2]", "selector.shadows: q1@0.2: selector.score=q1 keeps"),
    "a shadow twice": ("selector.shadows=[q3,q3]", "selector.shadows names q3 twice"),
    "shadows without diagnostics": (
        "selector.shadows=[q3] learner.diagnostics_every=0",
        "learner.diagnostics_every=0 has none",
    ),
    "one shadow without a list": ("selector.shadows=q3", "selector.shadows: input should be a valid list; got 'q3'"),
    "noise of one prompt": (
        "learner.gradient_every=5 learner.prompts_per_step=1",
        "it needs learner.prompts_per_step of at least 2; got 1",
    ),
    "a clip of nothing": ("learner.kl_clip=0", "run: learner.kl_clip: input should be greater than 0; got 0"),
    "weights of the bottom": ("selector=soft_or_bottom selector.weight=score", "selector.order=bottom"),
    "steps 0": ("learner.num_steps=0", "learner.num_steps: input should be greater than or equal to 1; got 0"),
    "steps a fraction": ("learner.num_steps=2.5", "learner.num_steps: input should be a valid integer; got 2.5"),
    "lr negative": ("learner.lr=-1e-3", "learner.lr: input should be greater than 0; got -0.001"),
    "lr infinite": ("learner.lr=inf", "learner.lr: input should be a finite number; got inf"),
    "lr true": ("learner.lr=true", "learner.lr: input should be a valid number; got True"),
    "unknown divergence": ("learner.divergence=kl", "learner.divergence: input should be 'reverse_kl', "),
    "the closest divergence": ("learner.divergence=revers_kl", "did you mean reverse_kl?"),
    "skew at its end": ("learner.skew=1", "learner.skew: input should be less than 1; got 1"),
    "unknown estimator": ("learner.estimator=k3", "'full', 'topk' or 'sampled_k1'; got 'k3'"),
    "top-k of nothing": ("learner.topk.k=0", "learner.topk.k: input should be greater than or equal to 1; got 0"),
    "top-k reverse KL without the rest": (
        "learner.estimator=topk learner.topk.rest=drop",
        "learner.topk.rest=drop with learner.divergence=reverse_kl: the sum over the top-k tokens is unbounded",
    ),
    "sampled forward KL": (
        "learner.estimator=sampled_k1 learner.divergence=forward_kl",
        "learner.estimator=sampled_k1 with learner.divergence=forward_kl",
    ),
    "sampled from a cut distribution": (
        "learner.estimator=sampled_k1 rollout.top_p=0.9",
        "learner.estimator=sampled_k1 with rollout.top_p=0.9",
    ),
    "sampled from the top tokens": ("learner.estimator=sampled_k1 rollout.top_k=20", "it needs rollout.top_k=0"),
    "sampled at another temperature": (
        "learner.estimator=sampled_k1 rollout.temperature=0.7",
        "it needs rollout.temperature=1",
    ),
    "two steps stale": ("rollout.staleness=2", "rollout.staleness: input should be 0 or 1; got 2"),
    "stale vLLM": ("rollout.staleness=1 rollout=vllm", "rollout.staleness=1 with rollout.backend=vllm: the engine"),
    "stale episodes": ("rollout.staleness=1 data=calculator agent=default", "rollout.staleness=1 with tool tasks"),
    "stale policy gradient": (
        "rollout.staleness=1 learner.estimator=sampled_k1",
        "rollout.staleness=1 with learner.estimator=sampled_k1",
    ),
    "JSD at its end": ("learner.jsd_beta=1", "learner.jsd_beta: input should be less than 1; got 1"),
    "three betas": ("learner.betas=[0.9,0.99,0.999]", "learner.betas: list should have at most 2 items"),
    "unknown schedule": ("learner.schedule=step", "'constant', 'linear' or 'cosine'; got 'step'"),
    "warm-up as long as the run": ("learner.warmup_steps=40", "learner.warmup_steps (40) must be below"),
    "micro-batch below one rollout": ("learner.micro_batch_tokens=100", "cannot hold one rollout of"),
    "packed for eager attention": (
        "learner.packing=true pair.attention=eager",
        "attend across packed sequences",
    ),
    "unknown placement": (
        "pair.teacher.placement=disk",
        "pair.teacher.placement: input should be 'resident' or 'offload'; got 'disk'",
    ),
    "unknown backend": ("learner.loss_backend=magic", "'fused' or 'materialized'; got 'magic'"),
    "temperature 0 in training": (
        "rollout.temperature=0",
        "rollout.temperature: input should be greater than or equal to 0.01",
    ),
    "top-p of 0": ("rollout.top_p=0", "rollout.top_p: input should be greater than 0"),
    "unknown device": ("device=tpu", "device: input should be 'auto', 'cpu' or 'cuda'; got 'tpu'"),
    "missing model folder": ("pair.student.path=./nowhere", "pair.student.path: no model in nowhere"),
    "students not made yet": ("pair=tiny_students", "`make students` makes those of the seeds 0, 1 and 2"),
    "ledger not made yet": ("pair=tiny_ledger", "`make ledger` makes it"),
    "no number of ranks": ("ranks=0", "ranks: a whole number from 1, or auto; got 0"),
    "missing shipped model": ("pair.teacher.path=package:tiny/nobody", "pair.teacher.path: no model in"),
    "unknown dtype": ("pair.teacher.dtype=int4", "pair.teacher.dtype: input should be 'float32' or 'bfloat16'"),
    "training on the test split": ("data.train.split=test", "no evaluation problem is trained on; got test"),
    "evaluating on the train split": (
        "eval.benchmarks.word_sums.split=train",
        "evaluated on training problems",
    ),
    "one test problem": ("eval.benchmarks.word_sums.num_problems=1", "at least 2 problems"),
    "a benchmark that there is not": (
        "eval=math eval.only=[aime]",
        "eval.only: this eval has math500, aime24, aime25; got ['aime']",
    ),
    "no benchmark": ("eval=math eval.only=[]", "eval.only: this eval has math500, aime24, aime25; got []"),
    "one problem of each": (
        "eval.max_problems=1",
        "eval.max_problems: at least 2, for a standard error, or null; got 1",
    ),
    "file of no benchmark": ("eval=gsm8k +eval.file=x", "eval.file is not a key"),
    "template that does not exist": ("pair.chat.template=x", "pair.chat.template: there is no file x"),
    "unknown treatment of stop tokens": (
        "pair.stop=any",
        "pair.stop: input should be 'union', 'class' or 'refuse'; got 'any'",
    ),
    "nothing evaluated": ("eval.greedy=false eval.samples=0", "evaluate nothing; set eval.greedy=true"),
    "key of LoRA": (
        "pair.student.lora={rank:4,alpha:8,target_modules:all-linear,ranks:4}",
        "pair.student.lora.ranks is not a key; did you mean pair.student.lora.rank?",
    ),
    "hub file without a revision": (
        "data=gsm8k data.train.hub=openai/gsm8k:x.parquet",
        "must be REPOSITORY@REVISION:",
    ),
    "table without a source": ("data=gsm8k data.train.hub=null", "data.train names no data: set data.train.file to"),
    "file that does not exist": ("data=gsm8k data.train.file=x.jsonl", "data.train.file: there is no file x.jsonl"),
    "part upside down": (
        "data=gsm8k data.train.part=[0.8,0.2]",
        "[0.8, 0.2] must be [start, stop] with start below stop",
    ),
    "name with a slash": ("name=a/b", "one path component"),
    "empty name": ("name=''", "one path component"),
    "seed negative": ("seed=-1", "seed: input should be greater than or equal to 0; got -1"),
    "bad interpolation": (
        "name=${nobody}",
        "name cannot be resolved: Interpolation key 'nobody' not found; name an existing",
    ),
    "missing value": ("seed=???", "seed has no value (???); set seed=VALUE"),
    "unknown tracker": ("logger.tracker=tensorbord", "got 'tensorbord'; did you mean tensorboard?"),
    "unknown W&B mode": ("logger.wandb=sometimes", "'off', 'offline' or 'online'; got 'sometimes'"),
    "tools without limits": (
        "data=mini_travel agent=none",
        "data.train is a tool task, so it needs limits: choose agent=default",
    ),
    "limits without tools": (
        "agent=default",
        "agent has no effect: no data set of this run has tools",
    ),
    "official tasks without a folder": (
        "data=deepplanning agent=base_code",
        "data.root must be the folder of the official queries and databases; got None",
    ),
    "generated tasks without a number": (
        "data=mini_travel agent=default data.train.num_problems=null",
        "data.train.num_problems must be a number",
    ),
    "generated tasks in Chinese": (
        "data=mini_travel agent=default data.train.langs=[zh]",
        "data.train.langs must be [en]: world=errands is in English; got zh",
    ),
    "no response token left to train on": (
        "data=mini_travel agent=default agent.max_train_tokens=72",
        "agent.max_train_tokens (72) leaves no response token after a prompt of data.max_prompt_tokens (72)",
    ),
    "unknown upstream bug": (
        "data=mini_travel agent=default data.train.corrected=[hotel_town]",
        "data.train.corrected.0: input should be 'flight_not_found', 'hotel_city'",
    ),
    "unknown key of an agent": (
        "data=mini_travel agent=default +agent.turns=3",
        "agent.turns is not a key; did you mean agent.max_turns?",
    ),
    "bad override grammar": ("selector.retention", "Error parsing override"),
}


def composed(overrides: str) -> RunConfig:
    return parse(compose_raw(overrides.split()))


@pytest.mark.parametrize("overrides,message", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_clear_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ConfigError, HydraException)) as caught:
        composed(overrides)
    text = str(caught.value) + str(caught.value.__cause__ or "")
    assert message in text
    assert "Traceback" not in text and "pydantic" not in text


@pytest.mark.parametrize(
    "overrides",
    [
        "learner.estimator=topk",
        "learner.estimator=topk learner.topk.rest=drop learner.divergence=forward_kl learner.topk.support=teacher",
        "learner.topk.rest=drop",  # has no effect while the estimator is not topk
        "learner.estimator=sampled_k1",
        "learner.divergence=skew_forward_kl learner.skew=0.2",
        "learner.divergence=reverse_kl learner.jsd_beta=0.3",
        "selector.weight=score selector.retention=1",
        "selector=full selector.weight=sqrt",
        "selector=soft_or_bottom selector.weight=inverse_gradient selector.weight_offset=q0.9",
    ],
)
def test_meaningful_combinations_are_accepted(overrides: str) -> None:
    assert composed(overrides)


def test_all_errors_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        composed("learner.divergence=kl selector.retention=0 +learner.speed=9 rollout.top_p=7")
    lines = str(caught.value).splitlines()
    assert lines[0] == "this configuration cannot run:" and len(lines) == 5
    for key in ("learner.divergence", "selector.retention", "learner.speed", "rollout.top_p"):
        assert any(line.startswith(f"  - {key}") for line in lines)


@pytest.mark.parametrize("option", [option for option in OPTIONS if option not in MADE_FIRST])
def test_every_option_composes_and_passes_the_rules(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_rules, "find_spec", lambda name: name)
    assert composed(f"{option} {NEEDS.get(option, '')}").name


@pytest.mark.parametrize("name", ["trackio", "tensorboard", "mlflow"])
def test_a_tracker_that_is_not_installed_is_refused_with_its_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_rules, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=rf"{name} is not installed; pip install 'tip_exp\[{name}\]', or choose logger"
    ):
        composed(f"logger={name}")
    assert parse(compose_raw([f"logger={name}"]), with_weights=False)  # a dry run sends nothing


def test_a_tokenizer_without_a_chat_template_is_refused_before_anything_runs(
    tmp_path: Path, compose_run: Callable[..., RunConfig]
) -> None:
    student = tmp_path / "student"
    shutil.copytree(resolve_model("package:tiny/student"), student)
    template = (student / "chat_template.jinja").rename(tmp_path / "base.jinja")
    with pytest.raises(
        ConfigError, match=r"tokenizer of \S+student has no chat template; set pair\.chat\.template to a"
    ):
        compose_run(f"pair.student.path={student}")
    compose_run(f"pair.student.path={student}", f"pair.chat.template={template}")
    (student / "tokenizer_config.json").write_text('{"chat_template": "{{ messages[0].content }}"}')
    compose_run(f"pair.student.path={student}")


def test_a_config_from_before_the_key_of_trackers_is_read(tmp_path: Path, tiny_config: RunConfig) -> None:
    values = tiny_config.model_dump()
    del values["logger"]["tracker"]
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(values)))
    assert load(tmp_path / "config.yaml") == tiny_config


def test_a_pair_that_has_to_be_made_first_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"pair\.teacher\.path: no model in models/smollm2/teacher"):
        composed("pair=smollm2")


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_run_of_every_sweep_passes_the_rules(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    models = [f"{pair}/{role}" for pair in ("models/smollm2", "outputs/tiny_ledger") for role in ("teacher", "student")]
    for model in [*models, *(f"outputs/students/{seed}" for seed in range(3))]:  # what is made or fetched first
        (tmp_path / model).mkdir(parents=True)
        (tmp_path / model / "config.json").write_text("{}")
    for name in ("gsm8k_train.jsonl", "gsm8k_test.jsonl"):
        (tmp_path / name).write_text('{"question": "1+1?", "answer": "#### 2"}\n')
    arguments = {name: [f"data.root={tmp_path}"] for name in ("table7", "registered_smollm2")}
    # Of 1,972 runs, those that differ in more than the seed or the pair.
    arguments |= {
        "leaderboard": ["seed=0", "experiment=demo"],
        "demo_leaderboard": ["seed=0", "experiment=demo_tools"],
    }
    planned = plan(path, arguments.get(path.stem, []))
    assert len(planned) > 1
    assert not [run for run in planned if isinstance(run, RefusedRun)]
    configs = [run.config for run in planned if isinstance(run, SweepRun)]
    assert len({config.name for config in configs}) == len(configs), "two runs of a sweep would write to one folder"
    assert {config.sweep for config in configs} == {path.stem}


@pytest.mark.parametrize("sweep", ["table8", "memory"])
def test_a_demo_sweep_is_the_papers_sweep_with_another_experiment(sweep: str) -> None:
    def digests(name: str, *arguments: str) -> set[str]:
        planned = plan(SWEEP_FOLDER / f"{name}.yaml", ["seed=3", *arguments])
        return {digest(run.config) for run in planned if isinstance(run, SweepRun)}

    experiment = "backends" if sweep == "memory" else "demo"
    assert digests(sweep, f"experiment={experiment}") == digests(f"demo_{sweep}")


def test_benchmarks_are_chosen_and_limited(compose_run: Callable[..., RunConfig]) -> None:
    def chosen(*overrides: str) -> dict[str, int | None]:
        benchmarks = compose_run(*overrides, f"data.root={TABLE.parent}").eval.benchmarks
        return {name: benchmark.num_problems for name, benchmark in benchmarks.items()}

    assert chosen("eval=math", "eval.only=[aime25,math500]") == {"math500": None, "aime25": None}
    assert chosen("eval=math", "eval.only=aime24", "eval.max_problems=10") == {"aime24": 10}
    assert chosen("eval=math_quick", "eval.max_problems=200") == {"math500": 100}
    assert chosen("eval=aime24") == {"aime24": None}
    assert chosen("eval.max_problems=8") == {"word_sums": 8}


def test_a_benchmark_alone_is_evaluated_as_among_the_others(compose_run: Callable[..., RunConfig]) -> None:
    among, alone = (compose_run(*eval_, f"data.root={TABLE.parent}") for eval_ in
                    (["eval=math", "eval.only=[aime24]", "eval.label=aime24"], ["eval=aime24"]))  # fmt: skip
    assert among == alone and digest(among) == digest(alone)


@pytest.mark.parametrize(
    ("overrides", "turns"),
    [
        (["data=calculator"], 50),
        (["eval=deepplanning", f"data.root={FOLDER}"], 50),
        (["data=calculator", "agent.max_turns=7"], 7),
        (["eval=calculator", "agent=official"], 400),
    ],
)
def test_tool_tasks_bring_their_limits(compose_run: Callable[..., RunConfig], overrides: list[str], turns: int) -> None:
    agent = compose_run(*overrides).agent
    assert agent is not None and agent.max_turns == turns


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_opens_with_its_own_command(option: str) -> None:
    group, name = option.split("=")
    lines = (conf_dir() / group / f"{name}.yaml").read_text().splitlines()
    comments = "".join(line for line in lines[:5] if line.startswith("# ") and "@package" not in line)
    shared = {"quick": "make demos-quick", "quick_tools": "make demos-quick", "demo": "experiment=demo"}
    shared |= {"backends": "SWEEP=demo_memory", "tip_backends": "SWEEP=memory"}
    assert (shared.get(name, option) if group == "experiment" else option) in comments


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_sweep_opens_with_its_own_command(path: Path) -> None:
    first_line = path.read_text().splitlines()[0]
    assert first_line.endswith((f"SWEEP={path.stem}", f"-cn {path.stem} data.root=FOLDER", f"make {path.stem}"))


def test_a_packed_run_needs_attention_that_separates_sequences() -> None:
    with pytest.raises(ConfigError) as caught:
        composed("learner.packing=true pair.attention=eager")
    assert str(caught.value).count("pair.attention") == 2  # one message: the key, and the remedy
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        # 72 prompt + 440 response tokens are sampled, although only 200 of them are trained on
        ("agent.max_train_tokens=200 rollout.vllm.max_model_len=511", r"max_model_len \(511\) is below .* = 512"),
        ("eval.max_tokens=600 rollout.vllm.max_model_len=600", r"leaves no prompt before eval.max_tokens \(600\)"),
    ],
)
def test_the_engines_length_must_hold_what_is_sampled(overrides: str, message: str) -> None:
    tools = "data=mini_travel eval=mini_travel agent=default "
    with pytest.raises(ConfigError, match=message):
        composed(tools + overrides)


def test_the_engines_length_may_be_exactly_what_is_sampled() -> None:
    assert composed("data=mini_travel eval=mini_travel agent=default rollout.vllm.max_model_len=512")


def test_evaluations_think_as_rollouts_do_unless_the_key_says_otherwise(compose_run: Callable[..., RunConfig]) -> None:
    chat = compose_run("pair.chat.thinking=true").pair.chat
    assert (chat.thinking, chat.eval_thinking) == (True, True)
    chat = compose_run("pair.chat.thinking=true", "pair.chat.eval_thinking=false").pair.chat
    assert (chat.thinking, chat.eval_thinking) == (True, False)


def test_self_distillation_has_one_model_in_both_roles(compose_run: Callable[..., RunConfig]) -> None:
    pair = compose_run("experiment=self_word_sums", "pair.teacher.path=package:tiny/teacher").pair
    assert pair.student.path == pair.teacher.path == "package:tiny/teacher" and pair.privileged is not None


def test_names_spell_a_ratio_in_one_way(compose_run: Callable[..., RunConfig]) -> None:
    names = {compose_run(f"selector.retention={ratio}").name for ratio in ("0.5", "0.50", "5e-1")}
    assert names == {"tiny.word_sums.soft_or.r50.s0"}
    assert compose_run("selector=full").name == "tiny.word_sums.full.r100.s0"


def test_an_experiment_wins_over_the_defaults_and_the_command_line_over_both(
    compose_run: Callable[..., RunConfig],
) -> None:
    assert compose_run("experiment=evaluate").mode == "eval"
    assert compose_run("experiment=evaluate").name == "eval.tiny.word_sums.s0"
    assert compose_run("experiment=smoke").name == "smoke.tiny.word_sums.soft_or.r50.s0"
    assert compose_run("experiment=smoke", "learner.num_steps=7").learner.num_steps == 7


@pytest.mark.parametrize(
    "overrides",
    [
        "data=jsonl",
        "learner.num_steps=2",
        "data.max_prompt_tokens=400 learner.micro_batch_tokens=450",
        "rollout.staleness=1 learner.estimator=sampled_k1",
        "selector.normalizer=none",
        "selector.shadows=[q3] learner.diagnostics_every=0",
    ],
)
def test_an_evaluation_is_not_refused_for_settings_of_training(
    compose_run: Callable[..., RunConfig], overrides: str
) -> None:
    with pytest.raises(ConfigError):
        compose_run(*overrides.split())
    assert compose_run("experiment=evaluate", *overrides.split()).mode == "eval"


def test_vllm_must_be_installed_where_it_samples(
    compose_run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed: list[str] = ["vllm"]
    monkeypatch.setattr(machine_rules, "find_spec", lambda name: name in installed or None)
    compose_run("rollout.backend=vllm")
    installed.clear()
    compose_run("rollout.backend=auto")
    with pytest.raises(ConfigError, match=r"rollout\.backend=vllm: vLLM is not installed; pip install"):
        compose_run("rollout.backend=vllm")


def test_the_log_ratio_of_a_rule_can_be_clipped_and_normalized(compose_run: Callable[..., RunConfig]) -> None:
    config = compose_run("selector=sparse_opd_maxtok", "+selector.clip.log_ratio=0.9", "eval.teacher=false")
    assert config.selector.clip == {"log_ratio": 0.9}
    with pytest.raises(ConfigError, match=r"selector\.clip\.student_logprob has no effect"):
        compose_run("selector=sparse_opd_maxtok", "+selector.clip.student_logprob=0.9")


def test_digest_is_of_what_decides_the_numbers(compose_run: Callable[..., RunConfig]) -> None:
    base = compose_run()
    assert digest(compose_run("name=other", "logger=files", "sweep=x")) == digest(base)
    assert digest(compose_run("seed=1")) != digest(base)
    keys = flatten(base.model_dump()).keys()
    left_out = {key for key in keys - deciding_values(base).keys() if not key.startswith("logger.")}
    assert left_out == {
        "name", "sweep", "ignore_memory", "ranks", "nodes", "num_threads", "learner.checkpoint_every",
        "rollout.vllm.gpu_memory_utilization", "rollout.vllm.sleep_level",
    }  # fmt: skip
    assert differences(base, compose_run("learner.lr=1e-6", "logger=files")) == ["learner.lr: 0.002 -> 1e-06"]


def test_a_written_config_reads_back_equal(tmp_path: Path, compose_run: Callable[..., RunConfig]) -> None:
    config = compose_run("selector=q3")
    path = tmp_path / "config.yaml"
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(config.model_dump())))
    assert load(path) == config
