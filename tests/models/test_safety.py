"""Weights come from safetensors files, no code comes with a model, and no module reads a pickle."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tip_exp.api.models import module_of
from tip_exp.config.schema import RunConfig
from tip_exp.models.load import load_pair
from tip_exp.utils.errors import ConfigError
from tip_exp.utils.paths import PACKAGE, resolve_model

PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def with_student(config: RunConfig, folder: Path) -> RunConfig:
    pair = config.pair
    return config.model_copy(
        update={"pair": pair.model_copy(update={"student": pair.student.model_copy(update={"path": str(folder)})})}
    )


@pytest.fixture
def student(tmp_path: Path) -> Path:
    return Path(shutil.copytree(resolve_model("package:tiny/student"), tmp_path / "student"))


def test_a_bin_file_is_refused_with_the_remedy(tiny_config: RunConfig, student: Path) -> None:
    (weights,) = student.glob("*.safetensors")
    torch.save(load_file(weights), student / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ConfigError, match=r"pair\.student\.path: cannot load the model .* convert it once"):
        load_pair(with_student(tiny_config, student).pair, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"student: cannot load a model .* convert it once"):
        module_of(str(student), "student", "cpu", torch.float32)


def test_a_models_own_code_is_never_run(tiny_config: RunConfig, student: Path) -> None:
    config = json.loads((student / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (student / "config.json").write_text(json.dumps(config))
    (student / "mine.py").write_text(f"open({str(student / 'ran')!r}, 'w')\nclass Config: ...\nclass Model: ...\n")
    with pytest.raises(ConfigError, match="code of its own, which is never run"):
        load_pair(with_student(tiny_config, student).pair, torch.device("cpu"))
    assert not (student / "ran").exists()


def test_no_module_reads_pickles_or_runs_text() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", "") or ""}
                assert not {name.split(".")[0] for name in names} & PICKLES, path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"eval", "exec", "torch.load", "os.system", "yaml.load_all"}, (path, called)
                assert called != "yaml.load" or "Loader=_Loader" in ast.unparse(node), path
                assert not any(word.arg == "shell" for word in node.keywords), (path, called)
                assert called != "AutoModelForCausalLM.from_pretrained" or "SAFE_WEIGHTS" in ast.unparse(node), path
