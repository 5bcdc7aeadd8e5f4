"""Colours of a report. Matplotlib draws with a placeholder, the page replaces it by a CSS variable of the theme.

Categories are the Okabe–Ito palette. Red is for non-finite values only.
"""

from __future__ import annotations

# placeholder (the light theme's colour) -> CSS variable; no colour may stand for two variables
PAPER = "#fffffe"
INK = "#1b1b1f"
QUIET = "#6a6a70"
RULE = "#d4d4d8"
BASELINE = "#8c8c92"
ACCENT = "#0072b2"
NON_FINITE = "#c1121f"
SPIKE = "#d98200"
BAND = "#efeff1"
CATEGORY = ("#0072b3", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#b8a800", "#d55e00", "#7f7f86")

VARIABLES: dict[str, str] = {
    PAPER: "paper",
    INK: "ink",
    QUIET: "quiet",
    RULE: "rule",
    BASELINE: "baseline",
    ACCENT: "accent",
    NON_FINITE: "nonfinite",
    SPIKE: "spike",
    BAND: "band",
    **{colour: f"c{place}" for place, colour in enumerate(CATEGORY)},
}

_DARK = {
    "paper": "#15161a",
    "ink": "#e9e9ec",
    "quiet": "#a2a2aa",
    "rule": "#3a3b42",
    "baseline": "#8f9097",
    "accent": "#56b4e9",
    "nonfinite": "#ff5c5c",
    "spike": "#ffb02e",
    "band": "#212227",
    "c0": "#4fa8e0",
    "c1": "#2fbf95",
    "c2": "#dd94bb",
    "c3": "#f0b429",
    "c4": "#8bcbf0",
    "c5": "#d9ca3a",
    "c6": "#ef7f35",
    "c7": "#9a9aa2",
}


def css_variables(theme: str) -> str:
    """The declarations of all variables for the theme "light" or "dark"."""
    colours = {name: colour for colour, name in VARIABLES.items()} if theme == "light" else _DARK
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())
