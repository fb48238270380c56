"""Paths of conf/ (in the checkout or in the installed package), of shipped files and of outputs."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
SHIPPED = "package:"
OUTPUTS = Path("outputs")  # relative to the working directory; conf/hydra/default.yaml writes there


def conf_dir() -> Path:
    """conf/ of the checkout if the package runs from one, else the copy inside the wheel."""
    checkout = PACKAGE.parents[1] / "conf"
    return checkout if (checkout / "config.yaml").is_file() else PACKAGE / "conf"


def paper_numbers_file() -> Path:
    """results/paper_numbers.csv of the checkout, else the copy inside the wheel."""
    checkout = PACKAGE.parents[1] / "results" / "paper_numbers.csv"
    return checkout if checkout.is_file() else PACKAGE / "assets" / "paper_numbers.csv"


def resolve_model(path: str) -> str:
    """`package:tiny/teacher` -> the folder of that model inside the package; any other path is returned unchanged."""
    return str(PACKAGE / "assets" / path.removeprefix(SHIPPED)) if path.startswith(SHIPPED) else path
