"""The text of `tip-exp --help`, and the nearest names to a mistyped key or option; read from the comments in conf/."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from tip_exp.utils.paths import conf_dir, sweeps_dir

TEXT = """\
usage: tip-exp [group=option …] [key=value …]        one run
       tip-exp -m key=1,2 …                          every combination of the values
       tip-exp -cd sweeps -cn NAME [key=value …]     every run of sweeps/NAME.yaml
       tip-exp COMMAND …
The same command again resumes what is unfinished and does not repeat what is finished.

examples
  tip-exp experiment=smoke                                              ten small steps on the embedded pair
  tip-exp selector=q3 selector.retention=0.1 seed=3                     one whole run on it
  tip-exp -m selector=soft_or,random selector.retention=0.1,0.5 sweep=mine
  tip-exp pair=hf pair.teacher.path=DIR pair.student.path=DIR data=jsonl data.train.file=my.jsonl \\
          eval=jsonl eval.file=test.jsonl learner=paper                 your models on your data
  tip-exp mode=eval eval=gsm8k name=after pair=hf pair.teacher.path=DIR pair.student.path=DIR
                                                                        evaluate without training
  tip-report outputs/runs/NAME                                          tables of finished runs

commands (`tip-exp COMMAND --help`)
{commands}

flags
  --dry          compute the shapes and memory of one step, without weights; start nothing
  --cfg job      print the composed config only
  --help         this text, with the config that the other arguments give
  --version      the version of this package
  -cd, -cn, -m   a folder with configs of your own, the config to start from, a sweep

runs side by side, and on clusters (docs/clusters.md)
  ranks=N                                     processes of one run, one per GPU (default: all GPUs, or 1 on a CPU)
  hydra.sweeper.jobs=N                        runs of a sweep at a time (default: GPUs / ranks, or one per core)
  hydra/launcher=basic                        on this machine, as above
  hydra/launcher=slurm | submitit_processes   jobs of SLURM; processes of this machine ([launchers] extra)
  hydra/launcher=ray_cluster                  tasks of a Ray cluster ([ray] extra)

groups (group=option)
{groups}

keys (key=value), the values that this command gives them, and their meaning
{keys}"""
_LINE = re.compile(r"^( *)([\w]+):(?:.*?)?(?: # (.*))?$")


def help_text(raw: DictConfig, commands: dict[str, str]) -> str:
    """All of it, for the composed config `raw` and the meaning of each command."""
    groups: list[str] = []
    for group, options in group_options(_folders()).items():
        width = max(map(len, options))
        groups += [f"  {group}", *(f"    {name:<{width}}  {meaning_of(path)}" for name, path in options.items())]
    return TEXT.format(
        commands="\n".join(f"  {name:<13}  {meaning}" for name, meaning in commands.items()),
        groups="\n".join(groups),
        keys="\n".join(f"  {line}" for line in _explained(OmegaConf.to_yaml(raw))),
    )


def meaning_of(option: Path) -> str:
    """The first comment of an option's file, without the command that follows it; "" without a comment."""
    lines = option.read_text(encoding="utf-8").splitlines()
    comments = [line[2:] for line in lines if line.startswith("# ") and not line.startswith("# @package")]
    return comments[0].split("   ")[0] if comments else ""


def unknown_name(error: Exception) -> str:
    """What is wrong in Hydra's error of an unknown key, option or config, or of several values; "" for others.

    With the nearest name.
    """
    text = str(error)
    key = re.search(r"Could not override '([\w.@]+)'.*?[Tt]o append to your [\w ]+ use (\S+)", text, re.DOTALL)
    if key and ("is not in struct" in f"{error.__cause__}" or "No match in the defaults list" in text):
        name, adds = key.groups()
        names = sorted(known_keys())
        inner = re.search(r"full_key: ([\w.]+)", f"{error.__cause__}")
        if name in names and inner and inner[1] != name:  # typed KEY={NAME: …}
            names = [other for other in names if other.startswith(f"{name}.")]
            name, adds = inner[1], f"+{inner[1]}=VALUE"
        if name in names:  # of another option
            section = name.partition(".")[0]
            return (
                f"this configuration has no {name}: it comes with other options of {section}; choose one of them, or "
                f"add it by {adds} where a section takes new keys"
            )
        hint = _did_you_mean(name, names, "")
        return (
            f"{name} is not a key{hint}; `tip-exp --help` lists all of them, and {adds} adds one where a section "
            "takes new keys"
        )
    if option := re.search(r"Could not find '([\w/]+)/([\w.-]+)'", text):
        hint = _did_you_mean(option[2], list(group_options([conf_dir()]).get(option[1], {})), f"{option[1]}=")
        names = ", ".join(re.findall(r"^\t(\S+)$", text, re.MULTILINE))
        return f"{option[2]} is not an option of {option[1]}{hint}{f'; there are {names}' if names else ''}"
    if several := re.search(r"Ambiguous value for argument '([^=]+)=(.*)'\n", text):
        key, values = several.groups()
        a_list = "" if (conf_dir() / key).is_dir() else f"; one list is '{key}=[{values}]'"
        return f"several values are a sweep: tip-exp -m {key}={values}{a_list}"
    if missing := re.match(r"Cannot find primary config '(.+?)(?:\.yaml)?'", text):
        return _no_config(missing[1], sys.argv[1:])
    return ""


def sweep_command(sweep: Path) -> str:
    """What starts the sweep of this file."""
    return f"`tip-exp -cd {sweep.parent} -cn {sweep.stem}`"


def _no_config(name: str, arguments: list[str]) -> str:
    """The message for a config of -cn that Hydra does not find, with the nearest name in the folder of -cd."""
    parsed = get_args_parser().parse_known_args(arguments)[0]
    given = parsed.config_dir or parsed.config_path
    names = [path.stem for path in (Path(given) if given else sweeps_dir()).glob("*.yaml")]
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        hint = f"did you mean {sweep_command(Path(given or 'sweeps', close[0]))}?"
    else:
        there_are = f"there are {', '.join(sorted(names)) or 'none'}"
        hint = there_are if given else "-cd FOLDER names the folder that holds it"
    return f"there is no config {name}{f' in {given}' if given else ''}; {hint}"


def _did_you_mean(typed: str, names: list[str], prefix: str) -> str:
    """A key that is right but for its section comes first: retention -> selector.retention; then one that holds the
    word: learner.steps -> learner.num_steps.
    """
    section, dot, word = typed.rpartition(".")
    close = [name for name in names if name.rpartition(".")[2] == word]
    close = close or [name for name in names if dot and name.startswith(section + dot) and f"_{word}" in name]
    close = close or difflib.get_close_matches(typed, names, n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def _folders() -> list[Path]:
    """Folders of options on Hydra's search path: conf/, and that of -cd."""
    sources = GlobalHydra.instance().config_loader().get_sources()
    return [Path(source.path) for source in sources if source.scheme() == "file" and source.available()]


def group_options(folders: list[Path]) -> dict[str, dict[str, Path]]:
    """Group -> option -> file, without Hydra's own groups."""
    files = [(folder, path) for folder in folders for path in sorted(folder.glob("*/*.yaml"))]
    options: dict[str, dict[str, Path]] = {}
    for folder, path in files:
        group = path.parent.relative_to(folder).as_posix()
        if group != "hydra":
            options.setdefault(group, {}).setdefault(path.stem, path)
    return dict(sorted(options.items()))


def known_keys() -> set[str]:
    """Every dotted key of conf/config.yaml and of the options, and the names of the groups."""
    trees: list[Any] = [yaml.safe_load((conf_dir() / "config.yaml").read_text(encoding="utf-8"))]
    for section, path in _sections():
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        trees.append({path.parent.name: None} | {f"{section}.{key}": value for key, value in tree.items()})
    keys = {key for tree in trees for key in _dotted(tree) if not key.endswith("defaults")}
    return keys | set(group_options([conf_dir()]))


def _sections() -> Iterator[tuple[str, Path]]:
    """The options of conf/, those that start from no other first, and the section whose keys each holds."""
    paths = [path for options in group_options([conf_dir()]).values() for path in options.values()]
    for path in sorted(paths, key=lambda path: ("\ndefaults:" in path.read_text(encoding="utf-8"), path)):
        if path.parent.name != "experiment":
            yield "data.train" if path.parent.name == "dataset" else path.parent.name, path


def _dotted(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")


def key_comments() -> dict[str, str]:
    """Dotted key -> its meaning: the comment in conf/config.yaml or, of a key that is not there, in an option.

    Comments of other options say why they have their value. Data sets are explained as data.train.
    """
    comments = dict(_with_keys((conf_dir() / "config.yaml").read_text(encoding="utf-8").splitlines()))
    for section, path in _sections():
        for key, comment in _with_keys(path.read_text(encoding="utf-8").splitlines()):
            if key and comment:
                comments.setdefault(f"{section}.{key}", comment)
    return {key: comment for key, comment in comments.items() if comment}


def _explained(text: str) -> list[str]:
    """The lines of a config with the comments that its keys have in conf/."""
    comments, lines = key_comments(), text.splitlines()
    keys = [re.sub(r"^eval\.benchmarks\.[^.]+", "data.train", key) for key, _ in _with_keys(lines)]
    return [f"{line}  # {comments[key]}" if key in comments else line for line, key in zip(lines, keys, strict=True)]


def _with_keys(lines: list[str]) -> Iterator[tuple[str, str]]:
    """The dotted key and the comment of each line of a YAML file; "" for a line that starts no key."""
    parents: list[tuple[int, str]] = []
    for line in lines:
        match = _LINE.match(line)
        if match is None:
            yield "", ""
            continue
        indent = len(match[1])
        parents = [(width, name) for width, name in parents if width < indent] + [(indent, match[2])]
        yield ".".join(name for _, name in parents), match[3] or ""
