"""English sentences that remember how they were made, so that a report can say them in another language.

A :class:`Phrase` is a `str` and can be used as one. Made by :func:`say` from a template with named values, and put
together by :func:`join`, it keeps the templates; an f-string or `+` would lose them. A constant text needs none of
this: it is its own template.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any


class Phrase(str):
    """A sentence and its template.

    Attributes:
        template: with named fields, as of `str.format`.
        values: of the fields; some may be phrases themselves.
    """

    template: str
    values: Mapping[str, Any]

    def __new__(cls, template: str, values: Mapping[str, Any]) -> Phrase:
        """The template, filled in English."""
        phrase = super().__new__(cls, template.format(**values))
        phrase.template = template
        phrase.values = dict(values)
        return phrase

    def __getnewargs__(self) -> tuple[str, Mapping[str, Any]]:  # type: ignore[override]
        """For copies."""
        return self.template, self.values


class Name(str):
    """What is called by the user: the same in every language, also where it is a word, as a module "criterion" is."""


#: Fields of templates that hold names.
NAMES = frozenset(
    ("module", "term", "terms", "series", "name", "names", "baseline", "candidate", "candidates", "scenes", "samples")
)


class _Sequence(Phrase):
    """Several sentences, each said by itself."""

    parts: tuple[str, ...]
    separator: str

    def __new__(cls, parts: Iterable[str], separator: str) -> _Sequence:
        found = tuple(parts)
        phrase = str.__new__(cls, separator.join(found))
        phrase.template, phrase.values = str(phrase), {}
        phrase.parts, phrase.separator = found, separator
        return phrase

    def __getnewargs__(self) -> tuple[Iterable[str], str]:  # type: ignore[override]
        return self.parts, self.separator


def say(template: str, /, **values: Any) -> Phrase:
    """A sentence: ``say("{count} of {total} steps", count=3, total=9)``."""
    return Phrase(template, values)


def join(parts: Iterable[str], separator: str = " ") -> Phrase:
    """Sentences one after another; empty ones are left out."""
    return _Sequence((part for part in parts if part), separator)


def translated(text: str, known: Callable[[str], str | None], joined: Callable[[str], str] = str) -> str:
    """A text in another language, as far as that is known.

    Args:
        text: a phrase or any other text; what is not known stays as it is.
        known: the translation of a template or of a constant, None where there is none.
        joined: what becomes of a separator between sentences.
    """
    if isinstance(text, _Sequence):
        return joined(text.separator).join(translated(part, known, joined) for part in text.parts)
    if isinstance(text, Name):
        return str(text)
    if not isinstance(text, Phrase):
        return known(text) or text
    template = known(text.template) or text.template

    def said(name: str, value: Any) -> Any:
        if not isinstance(value, str) or (name in NAMES and not isinstance(value, Phrase)):
            return value
        return translated(value, known, joined)

    return template.format(**{name: said(name, value) for name, value in text.values.items()})
