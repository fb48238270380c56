"""`tip-exp push RUN [REPO]`: a finished run's student on the Hugging Face hub, with a card of how it was trained."""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml

from tip_exp.launch.reuse import parse_result
from tip_exp.records.folder import RunFolder
from tip_exp.records.integrity import damage, remedy
from tip_exp.records.reader import read_runs
from tip_exp.utils.errors import DataError, exit_on_error, first_line
from tip_exp.utils.paths import HUB_ID


def push(arguments: list[str]) -> None:
    """Upload model/ of a run, with its card, as one commit to a new repository."""
    parser = argparse.ArgumentParser(prog="tip-exp push", allow_abbrev=False, description=push.__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("repo", nargs="?", help="ORG/NAME, or NAME in your own account (default: the run's name)")
    parser.add_argument("--dry", action="store_true", help="print the card; upload nothing")
    parser.add_argument("--private", action="store_true", help="make a private repository")
    parser.add_argument("--update", action="store_true", help="commit to the repository if it exists")
    given = parser.parse_args(arguments)
    with exit_on_error(ValueError, OSError):
        run = RunFolder(given.run)
        text = card(run)
        if given.dry:
            print(text)
        else:
            repo = given.repo or run.root.resolve().name
            print(f"{run.model} is at {_upload(run, text, repo, given.private, given.update)}")


def card(run: RunFolder) -> str:
    """The card that the run wrote, then its row among the runs beside it, and versions. Raises DataError."""
    result = parse_result(run)
    if result is None:
        raise DataError(f"{run.root} holds no finished run (result.json); the command that started it finishes it")
    if damaged := damage(run, result, "all"):
        raise DataError(f"{run.root}: {damaged}. {remedy(run, damaged)}")
    if not run.card.is_file():
        of = f"; push the run that trained it: {result['reused_from']}" if "reused_from" in result else ""
        raise DataError(f"{run.root} has no trained model (model/){of}")
    _, head, body = run.card.read_text(encoding="utf-8").split("---\n", 2)
    fields = yaml.safe_load(head)
    if not HUB_ID.fullmatch(fields.get("base_model", "")) or Path(fields["base_model"]).exists():
        fields.pop("base_model", None)  # the hub accepts only one of its own
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"---\n{yaml.safe_dump(fields)}---\n{body}\n## Result\n\n{_row(run)}\n\n{versions}.\n"


def _row(run: RunFolder) -> str:
    """The rows of the run's arm in the report's table, one a benchmark, all its seeds together."""
    from tip_exp.report.arms import summarize
    from tip_exp.report.overview import COMPACT, legend, overview
    from tip_exp.report.tables import markdown

    root = run.root.resolve()
    records = sorted(read_runs([root.parent]), key=lambda record: record.folder != str(root))
    arms = summarize(records)  # of two runs with one seed the first counts
    table = overview([arm for arm in arms if str(root) in arm.folders], COMPACT)
    return f"{markdown(table)}\n\n{legend([table])}"


def _upload(run: RunFolder, text: str, repo: str, private: bool, update: bool) -> str:
    """Address of the repository. Raises DataError."""
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    if get_token() is None:
        raise DataError("the hub needs a token that may write; set HF_TOKEN, or run `hf auth login`")
    files = [path for path in sorted(run.model.rglob("*")) if path.is_file() and path != run.card]
    operations = [CommitOperationAdd(path.relative_to(run.model).as_posix(), path) for path in files]
    operations.append(CommitOperationAdd(run.card.name, text.encode()))
    api = HfApi()
    try:
        address = api.create_repo(repo, private=private or None, exist_ok=update)
        api.create_commit(address.repo_id, operations, commit_message=f"Upload {run.root.name}")
        return str(address)
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 409 and not update:
            raise DataError(f"{repo} exists on the hub; name another repository, or add --update") from error
        refused = "the token may not write there: " if status in (401, 403) else ""
        raise DataError(f"{repo}: {refused}{first_line(error)}") from error
    except Exception as error:  # of the network, of the name
        raise DataError(f"{repo}: {first_line(error)}") from error
