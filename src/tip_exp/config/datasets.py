"""The typed form of `data.train` and of `eval.benchmarks`: one class for each kind of data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tip_exp.config.names import FileName, Grader, HubFile, Split, UpstreamBug
from tip_exp.config.numbers import Count, Fraction
from tip_exp.utils.io import file_digest
from tip_exp.utils.paths import is_file


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class GeneratedConfig(Strict):
    kind: Literal["word_sums", "ledger"]
    label: FileName
    split: Split
    num_problems: Count
    grader: ClassVar[Grader] = "boxed_integer"


class FieldsConfig(Strict):
    """Dotted paths into a row: "reward_model.ground_truth", "prompt.0.content"; "auto": the first usual name."""

    id: str | None
    prompt: str
    answer: str
    solution: str | None


class TableConfig(Strict):
    kind: Literal["table"]
    label: FileName
    split: Split
    hub: HubFile | None
    file: str | None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")] | None = None
    fields: FieldsConfig
    answer_after: str | None
    strip: list[str]
    suffix: str
    part: Annotated[list[Fraction], Field(min_length=2, max_length=2)] | None
    num_problems: Count | None
    grader: Grader

    @model_validator(mode="before")
    @classmethod
    def _with_digest(cls, values: Any) -> Any:
        """With the digest of `file`: a run whose file has changed since is another run."""
        if isinstance(values, dict) and values.get("sha256") is None and isinstance(file := values.get("file"), str):
            return values | {"sha256": file_digest(Path(file).expanduser()) if is_file(file) else None}
        return values


class TravelConfig(Strict):
    kind: Literal["travel"]
    label: FileName
    split: Split
    world: Literal["official", "errands"]
    root: str | None
    langs: Annotated[list[Literal["en", "zh"]], Field(min_length=1)]
    num_problems: Count | None
    prompt: Literal["none", "compact", "official"]
    show_schemas: bool
    corrected: list[UpstreamBug]
    official_join: bool


class CalculatorConfig(Strict):
    kind: Literal["calculator"]
    label: FileName
    split: Split
    num_problems: Count


TOOL_TASKS = (TravelConfig, CalculatorConfig)
DATASETS = (GeneratedConfig, TableConfig, *TOOL_TASKS)
DatasetConfig = Annotated[GeneratedConfig | TableConfig | TravelConfig | CalculatorConfig, Field(discriminator="kind")]
