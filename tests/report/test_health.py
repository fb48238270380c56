"""A table says which runs are not healthy, and nothing where all are."""

from __future__ import annotations

import json
from pathlib import Path

from tests.synthetic_runs import finish, write_config

from tip_exp.config.schema import RunConfig
from tip_exp.report.arms import summarize
from tip_exp.report.overview import overview
from tip_exp.report.run_files import read_records


def test_a_note_names_the_runs_that_are_not_healthy(tmp_path: Path, tiny_config: RunConfig) -> None:
    for seed, health in enumerate(["healthy", "loss rose 3.1-fold", "loss rose 3.1-fold"]):
        config, folder = tiny_config.model_copy(update={"seed": seed}), tmp_path / str(seed)
        write_config(config, folder)
        finish(config, folder, 0.5)
        result = json.loads((folder / "result.json").read_text())
        result["final"]["word_sums/seq_kl"] = None  # it was not finite
        (folder / "result.json").write_text(json.dumps(result | {"health": health}))
    table = overview(summarize(read_records([tmp_path])[0]))
    assert table.notes[-1:] == ["soft_or at 50 %: 2 of 3 runs not healthy (loss rose 3.1-fold)."]
    (tmp_path / "1" / "result.json").unlink()
    (tmp_path / "2" / "result.json").unlink()
    assert not any("healthy" in note for note in overview(summarize(read_records([tmp_path])[0])).notes)
