"""Lines of the user's code."""

from __future__ import annotations

import functools
import sys

import pytest
import torch
from torch import nn

from bifusion_diag.replay.examine.frames import is_users, line_of, line_of_error, told, user_line, user_lines


def test_the_line_that_runs() -> None:
    line = user_line()  # here
    assert line is not None
    assert line[1] == test_the_line_that_runs.__code__.co_firstlineno + 1
    assert told(line) == f"test_frames.py:{line[1]}: line = user_line()  # here"
    assert next(user_lines())[1] == line[1] + 4
    assert user_line(until=sys._getframe()) is None
    assert told(None) is None
    assert told(("/gone/file.py", 3)) == "file.py:3"


def test_lines_of_functions() -> None:
    class Called:
        def __call__(self) -> None: ...

    def function() -> None: ...

    assert (told(line_of(function)) or "").endswith("def function() -> None: ...")
    assert line_of(functools.partial(function)) == line_of(function)
    assert (told(line_of(Called())) or "").endswith("def __call__(self) -> None: ...")
    assert line_of(torch.relu) is None
    assert line_of(nn.Linear(1, 1).forward) is None


def test_the_line_of_an_error() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.ones(2) @ torch.ones(3)  # wrong
    assert (told(line_of_error(raised.value)) or "").endswith("# wrong")


def test_whose_code_it_is() -> None:
    assert not is_users(nn.__file__)
    assert not is_users(sys.modules["bifusion_diag.replay.examine.frames"].__file__ or "")
    import bifusion_diag.model.build as ours

    assert is_users(ours.__file__)
    assert is_users(nn.__file__.replace("/torch/", "/torchvision/"))
    assert is_users(__file__)
