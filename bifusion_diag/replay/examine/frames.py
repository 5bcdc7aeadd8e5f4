"""Lines of the user's code: of what is running, and of a function."""

from __future__ import annotations

import ast
import linecache
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.hooks import BackwardHook

import bifusion_diag

_OURS = Path(bifusion_diag.__file__).parent
#: Code that is nobody's fault: PyTorch's, and what watches. Our own model and losses are a user's to these.
SKIPPED = (
    str(Path(torch.__file__).parent / "_")[:-1],
    *(str(_OURS / room / "_")[:-1] for room in ("replay", "probes", "record")),
    "<frozen",
    "<eval_with_key>",  # torch.fx
    str(Path(ast.__file__).with_name("contextlib.py")),
)
_skipped: dict[str, bool] = {}  # by file name

Line = tuple[str, int]  # file, number


def user_line(until: types.FrameType | None = None) -> Line | None:
    """Where the user's innermost frame is, of those that were called after the frame `until`."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and frame is not until:
        if is_users(frame.f_code.co_filename):
            return frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back
    return None


def user_lines() -> Iterator[Line]:
    """Where all of the user's frames are, the innermost first."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if is_users(frame.f_code.co_filename):
            yield frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back


def call_into(file: str) -> Line | None:
    """The user's line that called what is running in a file, such as "torch/utils/checkpoint.py"; None: nothing is."""
    frame: types.FrameType | None = sys._getframe(1)
    inside = False
    while frame is not None:
        inside = inside or frame.f_code.co_filename.endswith(file)
        if inside and is_users(frame.f_code.co_filename):
            return frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back
    return None


def is_users(file: str) -> bool:
    """Whether a file holds user's code."""
    if file not in _skipped:
        _skipped[file] = file.startswith(SKIPPED)
    return not _skipped[file]


def hooked_module() -> torch.nn.Module | None:
    """The module whose full backward hook is running."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        holder = frame.f_locals.get("self") or frame.f_locals.get("hook_self")
        if isinstance(holder, BackwardHook):
            return holder.module
        frame = frame.f_back
    return None


def told(line: Line | None) -> str | None:
    """ "file.py:123: the line's text"."""
    if line is None:
        return None
    text = linecache.getline(*line).strip()
    return f"{Path(line[0]).name}:{line[1]}" + (f": {text}" if text else "")


def line_of(function: Callable[..., Any]) -> Line | None:
    """Where a function, method, partial or callable object of the user's is defined. None: elsewhere."""
    while hasattr(function, "func"):
        function = function.func
    function = getattr(function, "__wrapped__", function)
    if not hasattr(function, "__code__"):
        function = type(function).__call__
    code = getattr(function, "__code__", None)
    if code is None or not is_users(code.co_filename):
        return None
    return code.co_filename, code.co_firstlineno


def line_of_error(error: BaseException) -> Line | None:
    """The user's innermost line in the traceback of an error."""
    found, trace = None, error.__traceback__
    while trace is not None:
        if is_users(trace.tb_frame.f_code.co_filename):
            found = trace.tb_frame.f_code.co_filename, trace.tb_lineno
        trace = trace.tb_next
    return found
