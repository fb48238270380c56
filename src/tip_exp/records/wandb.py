"""W&B as one listener of a run's metrics, online or offline."""

from __future__ import annotations

import os
import secrets
from typing import Any

from tip_exp.config.schema import RunConfig
from tip_exp.records.folder import RunFolder

SAMPLE_COLUMNS = ("step", "problem", "answer", "response", "finish", "tokens", "kept", "mean_entropy", "most_divergent")


class WandbListener:
    """A W&B run, online or offline, that goes on under its own id when the run is resumed."""

    def __init__(self, config: RunConfig, folder: RunFolder) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb
        from wandb.errors import Error

        id_file = folder.root / "wandb_id"
        run_id = id_file.read_text().strip() if id_file.exists() else secrets.token_hex(4)
        try:
            self._run = wandb.init(
                mode="online" if config.logger.wandb == "online" else "offline",
                project=config.logger.project,
                id=run_id,
                resume="allow" if id_file.exists() and config.logger.wandb == "online" else None,
                name=config.name,
                group=config.sweep,
                tags=[config.pair.label, config.data.label, config.selector.label],
                config=config.model_dump(),
                dir=str(folder.root),
                settings=wandb.Settings(silent=True, console="off", disable_git=True),
            )
        except Error as error:
            raise OSError(
                f"logger.wandb={config.logger.wandb}: W&B did not start: {str(error).splitlines()[0]}"
            ) from error
        id_file.write_text(run_id + "\n")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """A table of rollouts; every token's numbers are in samples.jsonl and the HTML report."""
        import wandb

        table = wandb.Table(columns=list(SAMPLE_COLUMNS), data=[sample_cells(row) for row in rows])
        self._run.log({"samples": table}, step=step)

    def finish(self, summary: dict[str, Any]) -> None:
        """The result, with the peaks of memory at the top, where a dashboard's axes find them."""
        told = {key: value for key, value in summary.items() if key not in ("outcomes", "datasets", "memory")}
        self._run.summary.update(told | summary.get("memory", {}))
        self._run.finish()

    def abort(self) -> None:
        self._run.finish(exit_code=1)


def sample_cells(row: dict[str, Any]) -> list[Any]:
    """A row of samples.jsonl as SAMPLE_COLUMNS; what was not measured is None."""
    entropy, divergence = row.get("entropy"), row.get("reverse_kl")
    worst = row["tokens"][max(range(len(divergence)), key=divergence.__getitem__)] if divergence else None
    mean = sum(entropy) / len(entropy) if entropy else None
    text, length = "".join(row["tokens"]), len(row["tokens"])
    return [row["step"], row["prompt"], row["answer"], text, row["finish"], length, sum(row["kept"]), mean, worst]
