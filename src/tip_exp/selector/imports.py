"""Functions that a configuration names by their module, and digests of their code."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Any


def import_function(path: str) -> Callable[..., Any]:
    """The function of "module:function"; the working directory is searched as by `python -m`."""
    module_name, _, function_name = path.partition(":")
    if (folder := os.getcwd()) not in sys.path:
        sys.path.insert(0, folder)
    importlib.invalidate_caches()
    function: Any
    try:
        function = getattr(importlib.import_module(module_name), function_name, None)
    except (Exception, SystemExit) as error:
        absent = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}.")
        reason = f"it is neither in {folder} nor installed" if absent else f"{type(error).__name__}: {error}"
        raise ValueError(f"cannot import the module {module_name} of {path}: {reason}") from error
    if function is None or not callable(function):
        raise ValueError(f"the module {module_name} has no function of the name {function_name!r}")
    return function


def line_of(error: BaseException, function: Callable[..., Any]) -> str:
    """Where an error left the file of `function`, ", line 20"; in another file, its name as well; "" if unknown."""
    frames, code = traceback.extract_tb(error.__traceback__)[1:], getattr(function, "__code__", None)
    rule_frames = [frame for frame in frames if code and frame.filename == code.co_filename]
    if rule_frames:
        return f", line {rule_frames[-1].lineno}"
    return f", {frames[-1].filename}, line {frames[-1].lineno}" if frames else ""


def source_digest(modules: Iterable[str], name: str) -> str:
    """12 hex digits of the SHA-256 of the modules' sources. A ValueError about `name` if one cannot be read."""
    digest = hashlib.sha256()
    for module in dict.fromkeys(modules):
        try:
            digest.update(inspect.getsource(sys.modules[module]).encode())
        except (OSError, TypeError, KeyError) as error:
            raise ValueError(
                f"the source of {module or name} cannot be read, so a change of {name} would go unseen"
            ) from error
    return digest.hexdigest()[:12]
