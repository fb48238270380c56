"""Where things lie: conf/ of the checkout or of the installed package, files the package ships, files of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
SHIPPED = "package:"
OUTPUTS = Path("outputs")  # below the folder where a command is typed; conf/hydra/default.yaml writes there


def conf_dir() -> Path:
    """conf/ of the checkout when the package runs from one, else the copy inside the wheel."""
    checkout = PACKAGE.parents[1] / "conf"
    return checkout if (checkout / "config.yaml").is_file() else PACKAGE / "conf"


def paper_numbers_file() -> Path:
    """results/paper_numbers.csv of the checkout, else the copy inside the wheel."""
    checkout = PACKAGE.parents[1] / "results" / "paper_numbers.csv"
    return checkout if checkout.is_file() else PACKAGE / "assets" / "paper_numbers.csv"


def resolve_model(path: str) -> str:
    """A model's folder: `package:tiny/teacher` is looked up among what the package ships, anything else stays."""
    return str(PACKAGE / "assets" / path.removeprefix(SHIPPED)) if path.startswith(SHIPPED) else path


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The files of one run. `result` is renamed into place last: while it is absent, the run is not done."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def eval_rows(self) -> Path:
        return self.root / "eval.jsonl"

    @property
    def samples(self) -> Path:
        return self.root / "samples.jsonl"

    @property
    def prompts(self) -> Path:
        return self.root / "first_prompts.json"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoint"

    @property
    def log(self) -> Path:
        return self.root / "worker.log"

    @property
    def lock(self) -> Path:
        return self.root / "lock"

    @property
    def result(self) -> Path:
        return self.root / "result.json"
