"""Paths of conf/ (in the checkout or the installed package), of shipped files and of outputs."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
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
