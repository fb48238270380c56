"""Which expressions a mutation test changes, and how: one operator, comparison, constant or boolean at a time."""

from __future__ import annotations

import ast
import copy
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType

ROOT = Path(__file__).parents[1]
EXCLUDED = {
    "checkpoint.py", "samples.py",  # they decide no number of a run
    "kernels.py", "gradient_kernel.py",  # Triton: their tests, tests/cuda, are skipped where it is not installed
}  # fmt: skip
SWAPS: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Pow: ast.Mult,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.And: ast.Or, ast.Or: ast.And, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Mutant:
    """One changed node: `index` is its place among the nodes of the file's syntax tree."""

    package: str
    path: Path  # relative to src/tip_exp
    index: int
    line: int


def description(mutant: Mutant) -> str:
    before, after, _ = mutate(mutant)
    return f"{mutant.path}:{mutant.line}  `{before}` → `{after}`"


def mutants(package: str) -> Iterator[Mutant]:
    """All mutants of a package's files."""
    for path in sorted((ROOT / "src" / "tip_exp" / package).glob("*.py")):
        if path.name not in EXCLUDED:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            ignored = {id(child) for node in ast.walk(tree) for part in _ignored(node) for child in ast.walk(part)}
            for index, node in enumerate(ast.walk(tree)):
                if id(node) not in ignored and _changed(copy.deepcopy(node)) is not None:
                    yield Mutant(package, path.relative_to(ROOT / "src" / "tip_exp"), index, getattr(node, "lineno", 0))


def mutate(mutant: Mutant) -> tuple[str, str, ast.Module]:
    """The expression before and after, and the changed file."""
    tree = ast.parse((ROOT / "src" / "tip_exp" / mutant.path).read_text(encoding="utf-8"))
    node = list(ast.walk(tree))[mutant.index]
    before = ast.unparse(node)
    changed = _changed(node)
    assert changed is not None, "mutants() yields nodes that can be changed"
    return before, ast.unparse(changed), tree


def patch(mutant: Mutant) -> bool:
    """Give the changed function its new code in this process; False if the change is not in a function's body."""
    file, tree = ROOT / "src" / "tip_exp" / mutant.path, mutate(mutant)[2]
    node, codes = list(ast.walk(tree))[mutant.index], {}
    functions = [part for part in ast.walk(tree) if isinstance(part, ast.FunctionDef)]
    if not any(node is part for function in functions for line in function.body for part in ast.walk(line)):
        return False
    pending = [compile(tree, str(file), "exec")]
    for code in pending:
        codes[code.co_qualname] = code
        pending += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    gc.unfreeze()
    for function in gc.get_objects():
        if type(function) is FunctionType and function.__code__.co_filename == str(file):
            code = codes.get(function.__code__.co_qualname)
            if code and code.co_freevars == function.__code__.co_freevars:
                function.__code__ = code
    return True


def _ignored(node: ast.AST) -> list[ast.AST]:
    """Parts that decide no number: annotations, decorators, messages, assertions, imports and zip's `strict`."""
    if isinstance(node, ast.FunctionDef):
        return [*node.decorator_list, *([node.returns] if node.returns else [])]
    if isinstance(node, ast.ClassDef):
        return [*node.decorator_list]
    if isinstance(node, ast.AnnAssign):
        return [node.annotation]
    is_strict = isinstance(node, ast.keyword) and node.arg == "strict"
    others = ast.Assert | ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom | ast.arg
    return [node] if is_strict or isinstance(node, others) else []


def _changed(node: ast.AST) -> ast.AST | None:
    """The node with another operator, constant or boolean, changed in place; None if it has none."""
    if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp) and type(node.op) in SWAPS:
        node.op = SWAPS[type(node.op)]()
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        node.ops[0] = SWAPS[type(node.ops[0])]()
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Invert | ast.Not):
        node.op = ast.UAdd()
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        node.value = not node.value
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        node.value = node.value + 1 if node.value in (0, 1) else node.value * 2
    else:
        return None
    return node
