"""Error messages for arguments that are neither Hydra's flags nor key=value, made before Hydra reads them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

from hydra._internal.utils import get_args_parser

from tip_exp.launch.help import group_options, known_keys, sweep_command
from tip_exp.utils.paths import conf_dir, is_file, is_folder, sweeps_dir

PROGRAMS = ("plan", "report")  # tip-plan, tip-report


def misread(arguments: list[str], commands: Iterable[str]) -> str:
    """The first word that Hydra could not read, with what was meant; "" if there is none."""
    parser = get_args_parser()
    flags = parser._option_string_actions
    for flag, word in enumerate(arguments):
        name, separator, value = word.lstrip("-").partition("=")
        # argparse would take --experiment for --experimental-rerun
        if word.startswith("-") and word.partition("=")[0] not in flags and name in known_keys():
            following = [value for value in arguments[flag + 1 : flag + 2] if not value.startswith("-")]
            return f"options are given as {name}={value if separator else (following or ['VALUE'])[0]}; got {word}"
    given, unread = parser.parse_known_args(arguments)
    for word in unread:
        if word.startswith("-"):
            return f"{word} is not a flag; `tip-exp --help` lists all of them"
        if "=" in word and not word.startswith("="):
            return (
                f"{word} stands apart from the other key=value; write all of them together, after flags such as -m: "
                "tip-exp -m key=value …"
            )
    words = [*given.overrides, *unread]
    for place, word in enumerate(words):
        if "=" not in word and not word.startswith("~"):  # ~key removes a key
            return _meant(word, words[:place], words[place + 1 :], list(commands))
    return ""


def _meant(word: str, before: list[str], after: list[str], commands: list[str]) -> str:
    if after and after[0].startswith("="):  # selector = soft_or
        value = after[0][1:] or (after[1:2] or ["VALUE"])[0]
        return f"key=value has no spaces: {word}={value}"
    if before and before[-1].endswith("="):
        return f"key=value has no spaces: {before[-1]}{word}"
    if word in commands:
        return f"the command {word} comes first: tip-exp {word} …"
    path = Path(word)
    if path.suffix == ".yaml" and (is_file(word) or (f"{path.parent}" == "sweeps" and is_file(_shipped(path.stem)))):
        return f"{word} is a file; a sweep is started by {sweep_command(path)}"
    meanings = _meanings(commands)
    if word not in meanings and is_folder(word):
        return f"{word} is a folder; its runs are shown by `tip-exp show {word}`"
    close = [word] if word in meanings else difflib.get_close_matches(word, meanings, n=1)
    hint = f"did you mean {' or '.join(meanings[close[0]])}?" if close else "`tip-exp --help` lists both"
    return f"{word!r} is neither a command nor key=value; {hint}"


def _meanings(commands: list[str]) -> dict[str, list[str]]:
    """Name -> what it may mean: an option of a group, a sweep, a command, a program, a key."""
    meanings: dict[str, list[str]] = {}
    for group, names in group_options([conf_dir()]).items():
        for name in names:
            meanings.setdefault(name, []).append(f"{group}={name}")
    for path in sorted(sweeps_dir().glob("*.yaml")):
        meanings.setdefault(path.stem, []).append(sweep_command(Path("sweeps", path.name)))
    for name in commands:
        meanings.setdefault(name, []).append(f"the command {name}")
    for name in PROGRAMS:
        meanings.setdefault(name, []).append(f"the program tip-{name}")
    for key in sorted(known_keys()):
        meanings.setdefault(key, []).append(f"{key}=VALUE")
    return meanings


def _shipped(sweep: str) -> str:
    return f"{sweeps_dir()}/{sweep}.yaml"
