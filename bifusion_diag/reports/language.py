"""The language that a report is written in.

Every text that a reader sees goes through :func:`tr` (in templates: ``{{ text | tr }}``), at the place where it is
written into the page or the plot. English is the source: its texts are the keys of ``languages/<code>/*.yaml``, a file
a room that says them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import resources
from typing import Any

import yaml

from bifusion_diag.diagnosis.phrase import Phrase, join, say, translated
from bifusion_diag.errors import UserError

ENGLISH = "en"
LANGUAGES = {ENGLISH: "English", "zh": "中文"}
_current: ContextVar[str] = ContextVar("language", default=ENGLISH)


@contextmanager
def speaking(language: str) -> Iterator[None]:
    """Within it, :func:`tr` gives this language.

    Raises:
        UserError: it is not one of `LANGUAGES`.
    """
    if language not in LANGUAGES:
        raise UserError(f"--lang {language}: reports are written in {', '.join(LANGUAGES)}")
    token = _current.set(language)
    try:
        yield
    finally:
        _current.reset(token)


def language() -> str:
    """The code of the language that is spoken."""
    return _current.get()


def tr(text: str, /, **values: Any) -> str:
    """A text in the current language, with its named fields filled in; an unknown one stays English.

    Args:
        text: a template, a constant, or a phrase of the diagnosis.
        values: of the template's fields; phrases among them are said in the language too.
    """
    phrase = say(text, **values) if values else text
    if _current.get() == ENGLISH:
        return str(phrase)
    return translated(phrase, catalogue(_current.get()).get, _joined)


def listed(parts: Iterable[str], separator: str = " ") -> str:
    """Texts one after another in the current language, with its spaces and commas; empty ones are left out."""
    return tr(join(parts, separator))


@cache
def catalogue(code: str) -> Mapping[str, str]:
    """The translations of a language by their English text; empty for English."""
    if code == ENGLISH:
        return {}
    folder = resources.files("bifusion_diag.reports").joinpath("languages", code)
    known: dict[str, str] = {}
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        known |= yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    return known


def _joined(separator: str) -> str:
    """Chinese sentences follow each other without a space, and its commas have none after them."""
    return {" ": "", ", ": "，", "; ": "；"}.get(separator, separator)


__all__ = ["ENGLISH", "LANGUAGES", "Phrase", "catalogue", "language", "listed", "speaking", "tr"]
