"""All English texts that a report may say: what a translation has to hold.

    python -m tests.reports.texts zh     prints those that languages/zh lacks, as YAML

Found in the source: what is given to `tr` and `say`, what the templates pass to `tr`, what the tables and the findings
of diagnosis are made of. A text that is put together in another way is not found, and not translated.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml
from jinja2 import Environment, nodes

import bifusion_diag
from bifusion_diag.reports.language import catalogue

ROOT = Path(bifusion_diag.__file__).parent
TERMINAL = ("terminal.py", "live.py", "terminal_groups.py")  # they speak English
SPEAKERS = ("tr", "say")
MADE_OF_TEXTS = (  # calls whose texts a reader sees
    "Finding", "Evidence", "Rule", "NotMeasured", "Criterion", "Definition", "Summary", "Verdict", "Parting", "Tested",
    "Suspect", "Interval", "Side", "join", "Unmeasured", "replace", "Quantity",
)  # fmt: skip
SEVERITY_WORDS = ("error", "warning", "note")
STATE_WORDS = ("frozen", "no gradient", "zero", "finite", "non-finite", "not measured")
VERDICT_WORDS = ("stable", "less stable", "unstable", "not enough data")
RESULT_WORDS = ("pass", "fail", "not measured")
STATUS_WORDS = ("running", "completed", "interrupted", "failed")
_WORD = re.compile(r"[A-Za-z]{2}")
_CODE = re.compile(r"\(\.[+*]|^<|^[\w./*{}-]*[_/*][\w./*{}-]*$|^#|^--|^var\(|^\.|^(?!non-)[a-z]+(-[a-z0-9]+)+$")


def source_texts() -> dict[str, str]:
    """Every text, and the first file that says it."""
    found: dict[str, str] = {}
    for path in sorted((ROOT / "reports").rglob("*.py")):
        if path.name not in TERMINAL:
            _add(found, path, _of_reports(ast.parse(path.read_text(encoding="utf-8"))))
    for path in sorted((ROOT / "reports" / "templates").glob("*.html.j2")):
        _add(found, path, _of_template(path.read_text(encoding="utf-8")))
    for path in sorted((ROOT / "diagnosis").rglob("*.py")):
        _add(found, path, _of_diagnosis(ast.parse(path.read_text(encoding="utf-8"))))
    words = (*SEVERITY_WORDS, *STATE_WORDS, *VERDICT_WORDS, *RESULT_WORDS, *STATUS_WORDS)
    _add(found, ROOT / "diagnosis", iter(words))
    return found


def _add(found: dict[str, str], path: Path, texts: Iterator[str]) -> None:
    for text in texts:
        if text and _WORD.search(text) and not _CODE.search(text):
            found.setdefault(text, str(path.relative_to(ROOT.parent)))


def _of_reports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _name(node) in SPEAKERS and node.args:
            yield from _constants(node.args[0])
    yield from _tables(tree)
    yield from _sentences(tree)


def _of_diagnosis(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if _name(node) in SPEAKERS and node.args:
            yield from _constants(node.args[0])
        elif _name(node) in MADE_OF_TEXTS:
            for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
                yield from _constants(argument)
    yield from (text for text in _tables(tree) if " " in text)
    yield from _sentences(tree)


def _tables(tree: ast.Module) -> Iterator[str]:
    """The values of module-level tables."""
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            value = node.value
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
                continue
            if not isinstance(value, ast.Call) or _name(value) not in ("compile", "ContextVar", "TypeVar"):
                yield from _constants(value)


def _sentences(tree: ast.Module) -> Iterator[str]:
    """Constants that are sentences: with a capital, a space and a full stop; no docstrings, no error's texts."""
    hidden = {id(one) for node in ast.walk(tree) if isinstance(node, ast.Raise) for one in ast.walk(node)}
    hidden |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    hidden |= {id(one) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for one in ast.walk(node)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or id(node) in hidden:
            continue
        if re.match(r"[A-Z].* .*[.:)]$", node.value, re.DOTALL):
            yield node.value


def _constants(node: ast.expr) -> Iterator[str]:
    """The strings in an expression, but not the keys of mappings, what is compared, or parts of f-strings."""
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            yield node.value
    elif isinstance(node, ast.Dict):
        for value in node.values:
            yield from _constants(value)
    elif isinstance(node, ast.IfExp):
        yield from (*_constants(node.body), *_constants(node.orelse))
    elif isinstance(node, ast.BoolOp):
        for value in node.values:
            yield from _constants(value)
    elif isinstance(node, ast.Tuple | ast.List | ast.Set):
        for value in node.elts:
            yield from _constants(value)
    elif isinstance(node, ast.Starred):
        yield from _constants(node.value)
    elif isinstance(node, ast.Call):
        for value in (*node.args, *(keyword.value for keyword in node.keywords)):
            yield from _constants(value)
    elif isinstance(node, ast.Subscript):
        yield from _constants(node.value)


def _name(node: ast.Call) -> str:
    return node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")


def _of_template(text: str) -> Iterator[str]:
    tree = Environment().parse(text)
    for node in tree.find_all(nodes.Filter):
        if node.name == "tr" and node.node is not None:
            consts = [node.node] if isinstance(node.node, nodes.Const) else node.node.find_all(nodes.Const)
            yield from (const.value for const in consts if isinstance(const.value, str))


def main(arguments: list[str]) -> int:
    code = arguments[0] if arguments else "zh"
    known = catalogue(code)
    lacking = {text: "" for text in source_texts() if text not in known}
    print(yaml.safe_dump(lacking, allow_unicode=True, width=10_000, sort_keys=False))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
