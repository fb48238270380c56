"""The built wheel alone, in an empty folder: its commands find configs, sweeps and models inside of the package."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's files."""
    folder = tmp_path_factory.mktemp("wheel")
    line = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    process = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    (wheel,) = folder.glob("tip_exp-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "files")
    return folder / "files"


def test_commands_work_in_an_empty_folder(package: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(package)}
    for module, arguments, text in (
        ("tip_exp.launch.plan", ["demo"], "8 runs: 8 to do"),
        ("tip_exp", ["-cd", "sweeps", "-cn", "demo_table3", "--cfg", "job"], "sweep: demo_table3"),
        ("tip_exp", ["--dry"], "MiB"),
        ("tip_exp.report.cli", ["--help"], "tip-report"),
    ):
        line = [sys.executable, "-m", module, *arguments]
        process = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert process.returncode == 0 and text in process.stdout, (line, process.stdout[-2000:], process.stderr)
    assert not list(tmp_path.iterdir())
    where = "import tip_exp.utils.paths as paths; print(paths.PACKAGE, paths.conf_dir(), paths.sweeps_dir())"
    process = subprocess.run(
        [sys.executable, "-c", where], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert process.stdout.split() == [str(package / "tip_exp" / name) for name in (".", "conf", "sweeps")]


def test_an_unknown_sweep_is_one_line(package: Path, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "tip_exp.launch.plan", "demoo"]
    environment = os.environ | {"PYTHONPATH": str(package)}
    process = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 2 and process.stderr.startswith("error: demoo is no sweep; give a file, or a name of ")
