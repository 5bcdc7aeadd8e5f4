"""Settings out of a configuration that is Python, read and never run.

What MMEngine and MMCV dump is assignments of literals and of ``dict(a=1)``. Anything else is kept as its text.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

MAX_BYTES = 4_000_000
MAX_TEXT = 500  # characters of one value
MAX_ITEMS = 2000  # of a list, and of a dictionary


def read_settings(path: Path) -> dict[str, Any]:
    """Settings of a file; none where it cannot be read."""
    try:
        if path.stat().st_size > MAX_BYTES:
            return {}
        return settings_of(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return {}


def settings_of(text: str) -> dict[str, Any]:
    """The assignments of a Python text by name; none where it is no Python."""
    if len(text) > MAX_BYTES:
        return {}
    try:
        tree = ast.parse(text)
        return {
            target.id: _value(statement.value)
            for statement in tree.body
            if isinstance(statement, ast.Assign)
            for target in statement.targets
            if isinstance(target, ast.Name)
        }
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant):
        return _constant(node.value)
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        return [_value(item) for item in node.elts[:MAX_ITEMS]]
    if isinstance(node, ast.Dict) and all(isinstance(key, ast.Constant) for key in node.keys):
        pairs = zip(node.keys, node.values, strict=True)
        return {
            str(key.value): _value(value) for key, value in list(pairs)[:MAX_ITEMS] if isinstance(key, ast.Constant)
        }
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        return {word.arg: _value(word.value) for word in node.keywords[:MAX_ITEMS] if word.arg is not None}
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        number = node.operand.value
        if isinstance(number, int | float) and not isinstance(number, bool):
            return _constant(-number)
    return ast.unparse(node)[:MAX_TEXT]


def _constant(value: Any) -> Any:
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, int):
        return value if abs(value) < 2**63 else str(value)[:MAX_TEXT]
    return str(value)[:MAX_TEXT]
