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
from bifusion_diag.diagnosis import DEFINITIONS
from bifusion_diag.replay.examine.mechanisms import MECHANISMS
from bifusion_diag.replay.incident import KINDS
from bifusion_diag.replay.trials.remedies import REMEDIES
from bifusion_diag.reports.language import catalogue

ROOT = Path(bifusion_diag.__file__).parent
TERMINAL = ("terminal.py", "live.py", "terminal_groups.py")  # they speak English
SILENT = ("__init__.py", "language.py", "palette.py", "svg.py")  # their tables hold names, colours and styles
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
#: Words of a record that are no user's: file that writes them → words.
RECORD_WORDS: dict[str, tuple[str, ...]] = {
    "training/scene.py": ("before training", "when the gate is released", "at the end"),
    "data/synthetic/rooms.py": ("synthetic rooms", "ground truth (synthetic)"),
    "data/rgbd.py": ("geometric pseudo-labels", "geometric pseudo-labels (no ground truth)", "ScanNet export"),
    "model/clip_weights.py": ("random",),
    "experiments/what_if.py": ("as it was, bit for bit", "finite", "no spike", "1 spike"),
}
#: Names of metrics, units, probes, settings and events, which no language changes.
NAMES = {
    "mIoU", "AP50", "MiB", "NaN", "strict", "incident", "losses", "grads", "weights", "activations", "attention",
    "matching", "projection", "updates", "gate", "clip", "flow", "normalize", "absmax",
}  # fmt: skip
_WORD = re.compile(r"[A-Za-z]{2}")
_CODE = re.compile(r"\(\.[+*]|^<|^[\w./*{}()<>-]*[_/*][\w./*{}()<>-]*$|^#|^--|^var\(|^\.|^(?!non-)[a-z]+(-[a-z0-9]+)+$")


def source_texts() -> dict[str, str]:
    """Every text, and the first file that says it."""
    found: dict[str, str] = {}
    for path in sorted((ROOT / "reports").rglob("*.py")):
        if path.name not in (*TERMINAL, *SILENT):
            _add(found, path, _of_reports(ast.parse(path.read_text(encoding="utf-8"))))
    for path in sorted((ROOT / "reports" / "templates").glob("*.html.j2")):
        _add(found, path, _of_template(path.read_text(encoding="utf-8")))
    for path in sorted((ROOT / "diagnosis").rglob("*.py")):
        _add(found, path, _of_diagnosis(ast.parse(path.read_text(encoding="utf-8"))))
    _add(found, ROOT / "replay" / "trials" / "remedies.py", (one.gives_up for one in REMEDIES.values()))
    titles = [*(one.title for one in MECHANISMS.values()), *(kind.replace("-", " ").capitalize() for kind in KINDS)]
    said = (*titles, *map(_within_sentence, titles), *(one.why for one in MECHANISMS.values()))
    _add(found, ROOT / "replay" / "examine" / "mechanisms.py", iter(said))
    definitions = (text for one in DEFINITIONS for text in (one.title, one.text, one.group))
    _add(found, ROOT / "diagnosis" / "definitions.py", definitions)
    _add(found, ROOT / "reports", (word for words in RECORD_WORDS.values() for word in words))
    words = (*SEVERITY_WORDS, *STATE_WORDS, *VERDICT_WORDS, *RESULT_WORDS, *STATUS_WORDS)
    _add(found, ROOT / "diagnosis", iter(words))
    return found


def _add(found: dict[str, str], path: Path, texts: Iterator[str]) -> None:
    for text in texts:
        if text and text not in NAMES and _WORD.search(text) and not _CODE.search(text):
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


def _within_sentence(title: str) -> str:
    """As the verdict says it."""
    return f"{title[0].lower()}{title[1:]}" if title.split()[0].istitle() else title


def _tables(tree: ast.Module) -> Iterator[str]:
    """The values of module-level tables, but not what other texts are told by the beginning of."""
    beginnings = {
        argument.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and _name(node) == "startswith"
        for argument in node.args
        if isinstance(argument, ast.Name)
    }
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            value = node.value
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id in {"__all__", *beginnings} for target in targets):
                continue
            if isinstance(value, ast.Constant) and " " not in str(value.value):
                continue  # a name, not a text
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
        for value in _without_name(node.elts) if isinstance(node, ast.Tuple) else node.elts:
            yield from _constants(value)
    elif isinstance(node, ast.Starred):
        yield from _constants(node.value)
    elif isinstance(node, ast.Call) and _name(node) != "get":  # what it gets is said in the table that it is from
        for value in (
            *(_without_name(node.args) if _name(node) == "Quantity" else node.args),
            *(keyword.value for keyword in node.keywords),
        ):
            yield from _constants(value)
    elif isinstance(node, ast.Subscript):
        yield from _constants(node.value)


def _without_name(entries: list[ast.expr]) -> list[ast.expr]:
    """A row of a table begins with its name where a text comes after that."""
    first, *rest = entries or [None]
    named = isinstance(first, ast.Constant) and isinstance(first.value, str) and " " not in first.value
    return (
        rest if named and any(isinstance(one, ast.Constant) and isinstance(one.value, str) for one in rest) else entries
    )


def _name(node: ast.Call) -> str:
    return node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")


def _of_template(text: str) -> Iterator[str]:
    tree = Environment().parse(text)
    for node in tree.find_all(nodes.Filter):
        if node.name == "tr" and node.node is not None:
            consts = [node.node] if isinstance(node.node, nodes.Const) else node.node.find_all(nodes.Const)
            yield from (const.value for const in consts if isinstance(const.value, str))


def constants() -> set[str]:
    """Every string in the source: what a translation may be of, where it is a value of another text."""
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in ROOT.rglob("*.py"))
    return {node.value for tree in trees for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)}  # fmt: skip


def main(arguments: list[str]) -> int:
    code = arguments[0] if arguments else "zh"
    known = catalogue(code)
    lacking = {text: "" for text in source_texts() if text not in known}
    print(yaml.safe_dump(lacking, allow_unicode=True, width=10_000, sort_keys=False))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
