"""Reports: the HTML page with its plots, the terminal tables, the JSON beside them. Draws what diagnosis found.

The submodules are loaded when a name is first used: the terminal's tables should not wait for matplotlib.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bifusion_diag.reports.files import write_comparison, write_groups, write_run
    from bifusion_diag.reports.html import render_comparison, render_groups, render_run
    from bifusion_diag.reports.terminal import print_comparison, print_run

__all__ = [
    "print_comparison",
    "print_run",
    "render_comparison",
    "render_groups",
    "render_run",
    "write_comparison",
    "write_groups",
    "write_run",
]

_HOME = {
    "print_comparison": "terminal",
    "print_run": "terminal",
    "render_comparison": "html",
    "render_groups": "html",
    "render_run": "html",
    "write_comparison": "files",
    "write_groups": "files",
    "write_run": "files",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
