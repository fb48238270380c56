"""W&B as a listener of a run's metrics, online or offline."""

from __future__ import annotations

import os
import secrets
from typing import Any

from tip_exp.config.schema import RunConfig
from tip_exp.records.folder import RunFolder
from tip_exp.utils.errors import first_line

SAMPLE_COLUMNS = ("step", "problem", "answer", "response", "finish", "tokens", "kept", "mean_entropy", "most_divergent")


class WandbListener:
    """A W&B run, online or offline, which keeps its id when the run is resumed."""

    def __init__(self, config: RunConfig, folder: RunFolder) -> None:
        """Raises OSError if W&B does not start."""
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb
        from wandb.errors import Error

        run_id = folder.wandb_id.read_text().strip() if folder.wandb_id.exists() else secrets.token_hex(4)
        try:
            self._run = wandb.init(
                mode="online" if config.logger.wandb == "online" else "offline",
                project=config.logger.project,
                id=run_id,
                resume="allow" if folder.wandb_id.exists() and config.logger.wandb == "online" else None,
                name=config.name,
                group=config.sweep,
                tags=[config.pair.label, config.data.label, config.selector.label],
                config=config.model_dump(),
                dir=str(folder.root),
                settings=wandb.Settings(silent=True, console="off", disable_git=True),
            )
        except Error as error:
            raise OSError(f"logger.wandb={config.logger.wandb}: W&B did not start: {first_line(error)}") from error
        folder.wandb_id.write_text(run_id + "\n")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Log a table of rollouts; the statistics of each token are in samples.jsonl and the HTML report."""
        import wandb

        table = wandb.Table(columns=list(SAMPLE_COLUMNS), data=[sample_cells(row) for row in rows])
        self._run.log({"samples": table}, step=step)

    def finish(self, summary: dict[str, Any]) -> None:
        """Set W&B's summary to the result; memory peaks become top-level keys, which plots can use as axes."""
        fields = {key: value for key, value in summary.items() if key not in ("outcomes", "datasets", "memory")}
        self._run.summary.update(fields | summary.get("memory", {}))
        self._run.finish()

    def abort(self) -> None:
        self._run.finish(exit_code=1)


def sample_cells(row: dict[str, Any]) -> list[Any]:
    """Values of SAMPLE_COLUMNS for a row of samples.jsonl; None for a statistic that was not measured."""
    tokens, entropy, divergence = row["tokens"], row.get("entropy"), row.get("reverse_kl")
    most_divergent = tokens[max(range(len(divergence)), key=divergence.__getitem__)] if divergence else None
    mean_entropy = sum(entropy) / len(entropy) if entropy else None
    head = [row["step"], row["prompt"], row["answer"], "".join(tokens), row["finish"]]
    return [*head, len(tokens), sum(row["kept"]), mean_entropy, most_divergent]
