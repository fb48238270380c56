"""Paths of conf/ and sweeps/ (in the checkout or in the installed package), of shipped files and of outputs."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

from tip_exp.utils.errors import ConfigError

PACKAGE = Path(__file__).resolve().parents[1]
SHIPPED = "package:"
LOCAL = (SHIPPED, "/", "./", "../", "~")  # how a path starts that is no hub id
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)  # org/name
OUTPUTS = Path("outputs")  # relative to the working directory; conf/hydra/default.yaml writes there
# Pairs in paper_numbers.csv -> their labels in conf/pair/.
PAPER_PAIRS = {
    "qwen3-8b-4b": "qwen3_8b_to_4b",
    "llama-70b-8b": "llama3_70b_to_8b",
    "qwen2.5-14b-1.5b": "qwen25_14b_to_1p5b",
    "qwen3-14b-1.7b": "qwen3_14b_to_1p7b",
    "qwen3-32b-1.7b": "qwen3_32b_to_1p7b",
}


def not_writable(path: Path) -> str:
    """Why a file or folder of this path, which need not exist, cannot be written; "" if it can."""
    if path.exists():
        return "" if os.access(path, os.W_OK) else f"{path} cannot be written"
    above = next(parent for parent in path.absolute().parents if parent.exists())
    return "" if above.is_dir() and os.access(above, os.W_OK | os.X_OK) else f"{above} is no folder to write into"


def conf_dir() -> Path:
    """conf/ of the checkout if the package runs from one, else the copy inside the wheel."""
    checkout = PACKAGE.parents[1] / "conf"
    return checkout if (checkout / "config.yaml").is_file() else PACKAGE / "conf"


def sweeps_dir() -> Path:
    """sweeps/ beside the conf/ that is used."""
    return conf_dir().parent / "sweeps"


def paper_numbers_file() -> Path:
    """results/paper_numbers.csv of the checkout, else the copy inside the wheel."""
    checkout = PACKAGE.parents[1] / "results" / "paper_numbers.csv"
    return checkout if checkout.is_file() else PACKAGE / "assets" / "paper_numbers.csv"


def resolve_model(path: str) -> str:
    """`package:tiny/teacher` -> the folder of that model inside the package; any other path is returned unchanged."""
    return str(PACKAGE / "assets" / path.removeprefix(SHIPPED)) if path.startswith(SHIPPED) else path


def shipped_models() -> list[str]:
    """ "package:tiny/student" and the others."""
    folders = [path.parent for path in (PACKAGE / "assets").glob("*/*/config.json")]
    return sorted(f"{SHIPPED}{folder.relative_to(PACKAGE / 'assets').as_posix()}" for folder in folders)


def private_folder(folder: Path) -> Path:
    """Make a folder below a folder where any user can write. Raises ConfigError if it is not this user's alone."""
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise ConfigError(f"{folder} is a link or belongs to another user; set TMPDIR to a folder of your own")
    if stat.S_IMODE(status.st_mode) != 0o700:
        folder.chmod(0o700)
    return folder


def is_file(path: str) -> bool:
    """Whether a file can be found at a path of any text: False for one that cannot be read."""
    return _exists(path, Path.is_file)


def is_folder(path: str) -> bool:
    """The same of a folder."""
    return _exists(path, Path.is_dir)


def _exists(path: str, check: Callable[[Path], bool]) -> bool:
    try:
        return check(Path(path).expanduser())
    except (OSError, RuntimeError, ValueError):  # RuntimeError: ~ of an unknown user
        return False
