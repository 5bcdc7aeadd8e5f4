"""The journal survives being killed, and is not taken for another's."""

from __future__ import annotations

from pathlib import Path

import pytest

from bifusion_diag.errors import UserError
from bifusion_diag.experiments.bisect.journal import FILE, Journal

HEAD = {"steps": 5, "oracle": "unstable"}


def test_what_was_appended_is_there_again(tmp_path: Path) -> None:
    with Journal(tmp_path / "out", HEAD) as journal:
        assert not journal.resumed
        journal.append({"run": "a"})
    with Journal(tmp_path / "out", HEAD, must_exist=True) as journal:
        assert journal.resumed
        assert journal.entries == [{"run": "a"}]


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_line_that_was_cut_short_is_dropped_and_the_next_is_whole(tmp_path: Path, cut: int) -> None:
    with Journal(tmp_path, HEAD) as journal:
        journal.append({"run": "a"})
        journal.append({"run": "b"})
    file = tmp_path / FILE
    file.write_bytes(file.read_bytes()[:-cut])
    with Journal(tmp_path, HEAD) as journal:
        assert journal.entries == [{"run": "a"}]
        journal.append({"run": "c"})
    with Journal(tmp_path, HEAD) as journal:
        assert journal.entries == [{"run": "a"}, {"run": "c"}]


def test_of_another_bisection_damaged_in_use_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no bisection to go on with"):
        Journal(tmp_path, HEAD, must_exist=True)
    with Journal(tmp_path, HEAD) as journal:
        journal.append({"run": "a"})
        with pytest.raises(UserError, match="another process bisects there"):
            Journal(tmp_path, HEAD)
    with pytest.raises(UserError, match=r"other settings \(steps differ\)"):
        Journal(tmp_path, {**HEAD, "steps": 6})
    file = tmp_path / FILE
    file.write_bytes(file.read_bytes().replace(b'{"run"', b'{"run', 1))
    with pytest.raises(UserError, match="line 2 is damaged"):
        Journal(tmp_path, HEAD)
    file.write_text("[]\n")
    with pytest.raises(UserError, match="line 1 is no entry"):
        Journal(tmp_path, HEAD)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Journal(tmp_path / "file", HEAD)
