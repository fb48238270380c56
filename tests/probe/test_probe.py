"""`tip-exp influence` and `tip-exp advise` on the embedded pair: batches, tables, recommendation, files."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from tests import reference
from torch import Tensor

from tip_exp.config.schema import RunConfig
from tip_exp.launch import cli
from tip_exp.learner.gradient_signal import GradientSums
from tip_exp.learner.influence import Direction, dot, mean_of, parameters_of, preconditioned
from tip_exp.learner.selectors import make_selector
from tip_exp.losses import BACKENDS
from tip_exp.probe import advise, influence
from tip_exp.probe.batches import Batch, Probe, at_ratios, opened, selectors_of
from tip_exp.probe.command import command
from tip_exp.records.folder import RunFolder
from tip_exp.selector.selector import Quadrants, Selection
from tip_exp.utils.errors import ConfigError
from tip_exp.utils.paths import conf_dir

SMALL = ["learner.prompts_per_step=4", "data.max_response_tokens=24", "selector=q3", "learner.micro_batch_tokens=200"]


@pytest.fixture(scope="module")
def probe(compose_run: Callable[..., RunConfig]) -> Iterator[Probe]:
    """Of a run on two ranks that a tracker follows: one process reads batches, and nothing is tracked."""
    config = compose_run(*SMALL, "ranks=2", "learner.replicas=2")
    tracked = config.model_copy(update={"logger": config.logger.model_copy(update={"tracker": "mlflow"})})
    with opened(tracked) as opened_probe:
        yield opened_probe


@pytest.fixture(scope="module")
def batches(probe: Probe) -> list[Batch]:
    return [probe.read(number) for number in range(2)]


def naive_gradient(probe: Probe, batch: Batch, kept: Tensor) -> Direction:
    """Of the mean over rollouts of the mean reverse KL of their kept tokens: whole logits, one rollout at a time."""
    pair, parameters = probe.parts.pair, parameters_of(probe.parts.pair.student)
    means: list[Tensor] = []
    for number, rollout in enumerate(batch.rollouts):
        ids = torch.tensor([rollout.token_ids])
        p = pair.student.module(ids).logits[0].double().softmax(-1)
        q = pair.teacher.module(ids).logits[0].double().softmax(-1).detach()
        written = torch.tensor(rollout.response_mask).nonzero()[:, 0]
        of_rollout = (batch.tokens.rollout == number).nonzero()[:, 0]
        order = of_rollout[batch.tokens.position[of_rollout].argsort()]
        values = reference.divergence("reverse_kl", p, q)[written - 1][kept[order]]
        means += [values.mean()] if len(values) else []
    grads = torch.autograd.grad(torch.stack(means).mean(), list(parameters.values()))
    return dict(zip(parameters, grads, strict=True))


def test_rows_of_advice_against_gradients_by_autograd(probe: Probe, batches: list[Batch]) -> None:
    assert len(batches[0].micro_batches) > 1 and [batch.step for batch in batches] == [1, 2]
    selectors = selectors_of(probe.config, ["full", "q3", "q4"])
    rows = advise.measure(probe, batches, selectors, [0.2, 1.0])
    assert [(row["selector"], row["retention"]) for row in rows] == [("full", 1), ("q3", 0.2), ("q3", 1), ("q4", 1)]
    full = [naive_gradient(probe, batch, torch.ones(len(batch.tokens), dtype=torch.bool)) for batch in batches]
    masks = [probe.select(dict(at_ratios({"q3": selectors["q3"]}, [0.2]))["q3"], batch).kept_mask for batch in batches]
    kept = [naive_gradient(probe, batch, mask) for batch, mask in zip(batches, masks, strict=True)]
    for row, gradients in ((rows[0], full), (rows[1], kept)):
        a, b = (torch.cat([tensor.double().flatten() for tensor in gradient.values()]) for gradient in gradients)
        # Two batches: mean (a + b) / 2, variance |a - b|^2 / 2, and E |mean|^2 = |E g|^2 + variance / 2
        variance = float((a - b).square().sum()) / 2
        signal = float((a + b).square().sum()) / 4 - variance / 2
        assert row["snr"] == pytest.approx(signal / variance, rel=1e-3)
        full_flat = [torch.cat([tensor.double().flatten() for tensor in gradient.values()]) for gradient in full]
        cosines = [float(torch.cosine_similarity(g, f, dim=0)) for g, f in zip((a, b), full_flat, strict=True)]
        assert row["cosine"] == pytest.approx(sum(cosines) / 2, rel=1e-4)
    for name, value in rows[2].items():  # every token: as full
        assert name in ("selector", "retention") or value == rows[0][name]
    mask = torch.cat(masks)
    norm = torch.cat([batch.statistics["grad_norm"] for batch in batches])
    assert rows[1]["kept"] == pytest.approx(float(mask.double().mean()))
    assert rows[1]["gradient_mass"] == pytest.approx(float(norm[mask].sum() / norm.sum()), rel=1e-5)
    assert rows[3]["kl_mass"] < 0.5 < rows[3]["kept"]


def sums_of(gradients: torch.Tensor) -> GradientSums:
    """Of the rows of (B, size)."""
    sums = GradientSums()
    for row_of_gradients in gradients:
        sums.add({"w": row_of_gradients})
    return sums


def test_signal_to_noise_has_no_bias() -> None:
    """Gradients 1 and 3: mean 2, variance (1 + 1) / 1 = 2, |E g|^2 = 4 - 2 / 2 = 3."""
    assert sums_of(torch.tensor([[1.0], [3.0]])).signal_to_noise() == pytest.approx(3 / 2)
    assert math.isnan(sums_of(torch.zeros(2, 1)).signal_to_noise()) and math.isnan(GradientSums().signal_to_noise())
    generator, values = torch.Generator().manual_seed(0), []
    for _ in range(4000):  # E g = 0: numerator 0 on average, where |mean|^2 alone is variance / 4
        g = torch.randn(4, 8, generator=generator, dtype=torch.float64)
        mean_square, squares = float(g.mean(0).square().sum()), float(g.square().sum())
        variance = (squares - 4 * mean_square) / 3
        values.append(sums_of(g).signal_to_noise() * variance)
    assert abs(sum(values) / len(values)) < 0.05  # of a variance of 8


def row(selector: str, retention: float, kept: float, cosine: float, snr: float) -> dict[str, Any]:
    return {"selector": selector, "retention": retention, "kept": kept, "cosine": cosine, "snr": snr}


def test_the_recommendation_keeps_the_fewest_tokens_within_both_limits() -> None:
    full = row("full", 1.0, 1.0, 1.0, 2.0)
    rows = [full, row("q2", 1.0, 0.05, 0.1, 60.0), row("q3", 0.1, 0.1, 0.95, 1.7), row("q3", 0.2, 0.2, 0.95, 1.9)]
    assert "selector=q3 selector.retention=0.2 keeps 20.0 %" in advise.recommendation(rows, 4)
    assert advise.recommendation(rows, 3).startswith("No recommendation: 3 batches")
    assert advise.recommendation(rows, 4).endswith(f"\n\n{advise.CAVEAT}")
    assert advise.recommendation(rows[:3], 4).startswith("Recommendation: all tokens.")
    assert "more batches" in advise.recommendation([row("full", 1.0, 1.0, 1.0, -0.1)], 4)


def test_gradients_use_the_runs_backend(probe: Probe, batches: list[Batch], monkeypatch: pytest.MonkeyPatch) -> None:
    def called(*_: Any, **__: Any) -> None:
        raise LookupError

    monkeypatch.setitem(BACKENDS, "fused", called)
    with pytest.raises(LookupError):
        probe.gradient(batches[0], Selection.everything(len(batches[0].tokens)))
    learner = probe.config.learner.model_copy(update={"loss_backend": "materialized"})
    monkeypatch.setattr(probe, "config", probe.config.model_copy(update={"learner": learner}))
    assert probe.gradient(batches[0], Selection.everything(len(batches[0].tokens)))


@pytest.mark.parametrize(("fresh", "adam"), [(False, False), (True, True)])
def test_directions_of_influence(probe: Probe, fresh: bool, adam: bool) -> None:
    """The mean over tokens of <g_n, P g> is <mean of g_n, P g>."""
    measured = influence.measure(probe, 2, fresh=fresh, adam=adam)
    gradients = [probe.gradient(batch, Selection.everything(len(batch.tokens))) for batch in measured.batches]
    directing = [probe.read(number) for number in (2, 3)] if fresh else measured.batches
    of_directing = [probe.gradient(batch, Selection.everything(len(batch.tokens))) for batch in directing]
    moments = mean_of(of_directing, squared=True)
    for number, (values, gradient) in enumerate(zip(measured.values, gradients, strict=True)):
        direction = mean_of(of_directing) if fresh else of_directing[number]
        if adam:
            direction = preconditioned(direction, moments, probe.config.learner.eps)
        assert float(values.mean()) == pytest.approx(dot(direction, gradient), rel=1e-3)


def measured_by_hand(batches: list[Batch]) -> influence.Measured:
    """Influence 4, -1, 0, … of the first batch's tokens alone."""
    values = torch.zeros(len(batches[0].tokens), dtype=torch.float64)
    values[0], values[1], values[5] = 4.0, -1.0, 1.0
    return influence.Measured(batches[:1], [values], Quadrants(0.3, 0.3))


def test_tables_of_influence(probe: Probe, batches: list[Batch]) -> None:
    measured = measured_by_hand(batches)
    table = influence.quadrant_table(measured)
    sums = [sum(float(cells[column].removesuffix(" %")) for cells in table.rows) for column in range(1, 6)]
    # tokens, KL, gradient mass, positive, and negative as a share of positive: 1 of 4 + 1
    assert sums == pytest.approx([100, 100, 100, 100, 20], abs=0.3)
    num_tokens = len(batches[0].tokens)
    shares = {cells[0]: cells[1] for cells in influence.concentration_table(measured).rows}
    assert shares["1.0 %"] == "80.0 %" and shares["10.0 %"] == "100.0 %" and 20 <= num_tokens < 100
    selectors = selectors_of(probe.config, ["full", "q3"])
    points = influence.captured(measured, probe, selectors, [1 / num_tokens, 1.0])
    by_key = {(point["selector"], point["retention"]): point for point in points}
    first = by_key[influence.ORACLE, 1 / num_tokens]
    assert (first["positive"], first["signed"], first["kept"]) == pytest.approx((0.8, 4 / 4, 1 / num_tokens))
    assert by_key["full", 1.0]["positive"] == 1.0 and by_key["q3", 1.0]["signed"] == 1.0
    rows = {cells[0]: cells[1:] for cells in influence.captured_table(points, [1 / num_tokens, 1.0]).rows}
    assert rows["full"] == ["", "", "100.0 % of influence in 100.0 % of tokens"]
    for ratio in (0.5, 1.0):
        one = influence.captured_table(influence.captured(measured, probe, selectors, [ratio]), [ratio]).rows
        assert {cells[0]: cells[1:] for cells in one}["full"] == ["", "100.0 % of influence in 100.0 % of tokens"]
    frame = influence.token_frame(measured, probe)
    assert len(frame) == num_tokens and frame["influence"].abs().sum() == 6.0
    assert influence.top_table(frame).rows[0][2] == "4"


@pytest.mark.parametrize(
    ("overrides", "label"),
    [
        (["selector=soft_or", "selector.retention=0.2"], "soft_or"),
        (["selector=soft_or", "selector.normalizer=rank"], "soft_or (config)"),
        (["selector=full", "selector.weight=sqrt"], "full (config)"),
    ],
)
def test_the_configs_own_selector_stands_beside_the_options(
    compose_run: Callable[..., RunConfig], overrides: list[str], label: str
) -> None:
    config = compose_run(*overrides)
    selectors = selectors_of(config, None)
    assert selectors[label] == make_selector(config) and {"full", "soft_or", "q3"} <= selectors.keys()
    assert sum(name.endswith("(config)") for name in selectors) == label.endswith("(config)")
    rows = [
        {"selector": name, "retention": 0.2, "kept": kept, "snr": 1.0, "cosine": 1.0}
        for name, kept in (("full", 1.0), (label, 0.2))
    ]
    named = "the config's own selector with" if label.endswith("(config)") else f"selector={label}"
    assert f"Recommendation: {named} selector.retention=0.2 keeps 20.0 %" in advise.recommendation(rows, 4)


def test_spearman_is_the_correlation_of_ranks() -> None:
    a, b = torch.tensor([1.0, 5.0, 2.0, 100.0]), torch.tensor([-3.0, 0.0, -9.0, 7.0])
    # ranks 0 2 1 3 and 1 2 0 3: 1 - 6 (1 + 0 + 1 + 0) / (4 x 15) = 0.8
    assert influence.spearman(a, b) == pytest.approx(0.8)


@pytest.mark.parametrize("name", ["influence", "advise"])
def test_a_command_writes_its_tables_and_page(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--batches", "2", "--rules", "q3,full", "--ratios", "20,100", "--out", str(tmp_path / "new" / "out")]
    body, overrides = command(name, [SMALL[0], *options, *SMALL[1:]])
    assert overrides == SMALL
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        raw = compose("config", overrides=overrides)
    body(raw)
    text, out = capsys.readouterr().out, tmp_path / "new" / "out"
    page = (out / f"{'advice' if name == 'advise' else name}.html").read_text()
    assert "<td>q3 " in page and "<!--" not in page.split("<script")[0]
    if name == "advise":
        frame = pd.read_csv(out / "advice.csv")
        assert list(frame["selector"]) == ["full", "q3", "q3"] and "No recommendation: 2 batches" in text
        assert (out / "advice.md").read_text().startswith("# Selectors before training")
    else:
        frame = pd.read_parquet(out / "tokens.parquet")
        assert {"batch", "sequence", "position", "token", "grad_norm", "quadrant", "influence"} <= set(frame)
        assert frame["batch"].unique().tolist() == [1, 2] and "### Quadrants" in text
        assert set(pd.read_csv(out / "captured.csv")["selector"]) == {influence.ORACLE, "q3", "full"}


def test_earlier_results_stay(
    compose_run: Callable[..., RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before and after training, and twice: a folder each; of a run of another config the keys are named."""
    monkeypatch.chdir(tmp_path)
    run = RunFolder(tmp_path / "runs" / "try")
    (run.checkpoints / "step_00004").mkdir(parents=True)
    config = compose_run(*SMALL, "selector=soft_or", "learner.lr=0.5", "eval.max_tokens=33")
    run.config.write_text(json.dumps(config.model_dump()))  # JSON is YAML
    heads: list[str] = []

    def written(_: RunConfig, out: Path, *, weights: str, **__: Any) -> None:
        (out / "advice.md").write_text("")
        heads.append(weights)

    def call(*options: str) -> str:
        body, overrides = command("advise", [*SMALL, *options])
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            body(compose("config", overrides=overrides))
        return capsys.readouterr().out.split()[-1].removeprefix("outputs/advise/")

    monkeypatch.setattr(advise, "advise", written)
    name = compose_run(*SMALL).name
    assert [call(), call("--rules", "q3"), call("--run", "runs/try")] == [name, f"{name}.2", "try"]
    assert heads[:2] == ["", ""] and "learner.lr: 0.5 -> " in heads[2] and "selector.score: soft_or -> q3" in heads[2]
    assert heads[2].startswith("runs/try, a run of another config") and "eval." not in heads[2]
    call("--out", "mine")
    with pytest.raises(ConfigError, match="--out: mine is not an empty folder; choose a new one"):
        call("--out", "mine")
    monkeypatch.setattr(advise, "advise", lambda *_, **__: None)  # as one that fails
    call()
    assert not (tmp_path / "outputs" / "advise" / f"{name}.3").exists()
    Path("empty").mkdir()
    call("--out", "empty")
    call("--out", "new")
    assert Path("empty").exists() and not Path("new").exists()  # it removes what it has made


def test_a_checkpoint_gives_weights_and_moments(
    probe: Probe, compose_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    learner = probe.parts.learner
    with (
        pytest.raises(ConfigError, match=r"--run: .* holds no complete checkpoint"),
        opened(compose_run(*SMALL), tmp_path),
    ):
        pass
    before = {name: p.detach().clone() for name, p in parameters_of(probe.parts.pair.student).items()}
    batch = probe.read(0)
    learner.step(1, batch.rollouts, batch.teacher_hidden)
    probe.parts.checkpoints.folder = tmp_path / "checkpoint"
    probe.parts.save(1)
    probe.parts.checkpoints.wait()
    with opened(compose_run(*SMALL), tmp_path) as resumed:
        assert resumed.trained_steps == 1 and resumed.read(0).step == 2
        for name, parameter in parameters_of(resumed.parts.pair.student).items():
            assert not parameter.equal(before[name])
            assert parameter.equal(parameters_of(probe.parts.pair.student)[name])
        parameters = parameters_of(resumed.parts.pair.student)
        assert influence.second_moments(resumed.parts.learner.optimizer, parameters, [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["advise", "--batches", "1"], "2 or more; got 1"),
        (["influence", "--ratios", "0,5"], "percentages above 0 and at most 100; got 0,5"),
        (["advise", "--ratios", "0.1,0.5"], "these are percentages: for retentions of 0.1,0.5 write 10,50"),
        (["influence", "--ratios", "abc"], "argument --ratios: percentages above 0 and at most 100; got abc"),
        (["influence", "learner.lr=-1"], "learner.lr"),
        (["advise", "mode=eval"], "mode must be train, since only a training run has batches"),
        (["influence", "--rule", "q3"], "--rule"),
        (["advise", "--rules", "q3,sofor"], "'sofor' is neither an option nor a rule; did you mean soft_or?"),
        (["influence", "--run", "nope"], "--run: nope holds no complete checkpoint"),
        (["advise", "--out", "conf/config.yaml/out"], "--out: "),
        (["replay", "nope"], "nope holds no non_finite_….json"),
    ],
)
def test_an_error_is_one_message(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(advise, "advise", None)
    monkeypatch.setattr(influence, "influence", None)  # nothing is measured first
    monkeypatch.setattr(sys, "argv", ["tip-exp", *arguments])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "")  # so that what the command sets is undone
    monkeypatch.delenv("HYDRA_FULL_ERROR")
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code != 0
    text = capsys.readouterr().err
    assert message in text and "Traceback" not in text


def test_an_error_of_the_data_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "torn.jsonl"
    file.write_text('{"question": "1+')
    monkeypatch.setattr(sys, "argv", ["tip-exp", "advise", "data=jsonl", f"data.train.file={file}"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "")  # so that what the command sets is undone
    monkeypatch.delenv("HYDRA_FULL_ERROR")
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {file}, line 1: not JSON")
