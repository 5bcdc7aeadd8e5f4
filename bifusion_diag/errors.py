"""The one error that a user is meant to read: what was wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The CLI prints the message without a traceback and exits with code 2."""


def near_matches(word: str, options: Iterable[str]) -> str:
    """Suggest what a mistyped word may have meant.

    Args:
        word: what the user wrote.
        options: every word that would have been right.

    Returns:
        A sentence to append to an error message: the near matches, or else every option where these are few.
    """
    known = sorted(options)
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    if close:
        return " Did you mean " + " or ".join(repr(match) for match in close) + "?"
    if len(known) > 25:
        return ""
    return " Known: " + ", ".join(known) + "."
