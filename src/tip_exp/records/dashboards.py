"""Dashboards besides W&B: trackio, TensorBoard and MLflow. Each is an extra, imported only by a run that chooses it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tip_exp.config.parse import flatten
from tip_exp.config.schema import RunConfig
from tip_exp.records.folder import RunFolder
from tip_exp.utils.io import write_atomic

if TYPE_CHECKING:
    from tip_exp.records.tracker import Listener

RESULT = "result/"  # before the names of a result's numbers, where a dashboard has no summary of a run
COMPARED = ("pair.label", "data.label", "selector.label", "selector.retention", "learner.lr", "seed", "sweep")
MLFLOW_PARAMETERS = 100  # that it takes at once


class TrackioListener:
    """A run of the local trackio project, or of the Space or server that trackio's environment variables name."""

    def __init__(self, config: RunConfig, folder: RunFolder, step: int) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        self._trackio, self._step = trackio, step
        self._run = trackio.init(
            project=config.logger.project,
            name=name_of(config),
            group=config.sweep,
            config=flatten(config.model_dump()),
            resume="allow" if step else "never",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )

    def log(self, values: dict[str, float], step: int) -> None:
        self._step = step
        self._run.log(values, step=step)

    def table(self, name: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
        self._run.log({name: self._trackio.Table(columns=columns, data=rows)}, step=step)

    def summarize(self, values: dict[str, Any]) -> None:
        self._run.log(numbers_of(values), step=self._step)

    def finish(self, exit_code: int = 0) -> None:
        self._run.finish()


class TensorBoardListener:
    """Events in the run's folder: `tensorboard --logdir outputs` shows all runs; HPARAMS has those that finished."""

    def __init__(self, config: RunConfig, folder: RunFolder, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if not step:
            shutil.rmtree(folder.tensorboard, ignore_errors=True)
        self._config, self._step = config, step
        self._writer = SummaryWriter(str(folder.tensorboard), purge_step=step + 1 if step else None)
        if not step:
            settings = [[key, str(value)] for key, value in flatten(config.model_dump()).items()]
            self.table("config", ["key", "value"], settings, 0)

    def log(self, values: dict[str, float], step: int) -> None:
        self._step = step
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def table(self, name: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
        lines = ["| " + " | ".join(map(_cell, row)) + " |" for row in [columns, ["---"] * len(columns), *rows]]
        self._writer.add_text(name, "\n".join(lines), step)

    def summarize(self, values: dict[str, Any]) -> None:
        flat = flatten(self._config.model_dump())
        settings = {key: "" if flat[key] is None else flat[key] for key in COMPARED}
        self._writer.add_hparams(settings, numbers_of(values), run_name=".", global_step=self._step)

    def finish(self, exit_code: int = 0) -> None:
        self._writer.close()


class MlflowListener:
    """A run of MLflow's experiment `logger.project`, where MLFLOW_TRACKING_URI or MLflow's default says."""

    def __init__(self, config: RunConfig, folder: RunFolder, step: int) -> None:
        from mlflow.entities import Metric, Param  # pyright: ignore[reportMissingImports]
        from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]

        self._metric, self._step, self._client = Metric, step, MlflowClient()
        if step and folder.mlflow_id.exists():
            self._id = folder.mlflow_id.read_text(encoding="utf-8").strip()
            self._client.set_terminated(self._id, "RUNNING")
            return
        project = config.logger.project
        experiment = self._client.get_experiment_by_name(project)
        experiment_id = self._client.create_experiment(project) if experiment is None else experiment.experiment_id
        marks = {"sweep": config.sweep or "", "labels": ", ".join(labels(config))}
        self._id = self._client.create_run(experiment_id, tags=marks, run_name=name_of(config)).info.run_id
        parameters = [Param(key, str(value)) for key, value in flatten(config.model_dump()).items()]
        for start in range(0, len(parameters), MLFLOW_PARAMETERS):
            self._client.log_batch(self._id, params=parameters[start : start + MLFLOW_PARAMETERS])
        write_atomic(folder.mlflow_id, self._id + "\n")

    def log(self, values: dict[str, float], step: int) -> None:
        self._step = step
        metrics = [self._metric(name.replace("@", "_at_"), value, 0, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def table(self, name: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
        self._client.log_dict(self._id, {"columns": columns, "data": rows}, f"{name}_{step:05d}.json")

    def summarize(self, values: dict[str, Any]) -> None:
        self.log(numbers_of(values), self._step)

    def finish(self, exit_code: int = 0) -> None:
        self._client.set_terminated(self._id, "FAILED" if exit_code else "FINISHED")


# `logger.tracker` -> the listener that starts it, for a run whose checkpoint is of a step (0: a new run)
DASHBOARDS: dict[str, Callable[[RunConfig, RunFolder, int], Listener]] = {
    "trackio": TrackioListener,
    "tensorboard": TensorBoardListener,
    "mlflow": MlflowListener,
}


def labels(config: RunConfig) -> list[str]:
    """By which runs are found: pair, data and selector."""
    return [config.pair.label, config.data.label, config.selector.label]


def name_of(config: RunConfig) -> str:
    """The run's name in a project that holds several sweeps: "soft_or.r50.s0, mine/tiny.word_sums".

    What tells the runs of a sweep apart is in front, because dashboards cut names after some 20 characters.
    """
    setting = f"{config.pair.label}.{config.data.label}"
    before, _, arm = config.name.partition(f"{setting}.")
    where = [config.sweep, f"{before}{setting}" if arm else config.name]
    return ", ".join(filter(None, [arm, "/".join(filter(None, where))]))


def numbers_of(values: dict[str, Any]) -> dict[str, float]:
    """The numbers of a result by their dotted names, after RESULT."""
    numbers = {key: value for key, value in flatten(values).items() if isinstance(value, int | float)}
    return {RESULT + key: float(value) for key, value in numbers.items()}


def _cell(value: Any) -> str:
    """A value as a cell of a Markdown table."""
    return str(value).replace("|", "\\|").replace("\n", " ")
