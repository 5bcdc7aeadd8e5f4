"""A file that only grows, by whole pieces."""

from __future__ import annotations

import errno
import os
from pathlib import Path


class AppendFile:
    """Appends to a file. A piece is there whole, for other processes too, when :meth:`write` returns, or not at all.

    A process that is killed in the middle of a piece leaves its beginning; a disk that is full does not.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)  # a buffer would write later what has failed once
        self.size = self._file.seek(0, os.SEEK_END)

    def write(self, piece: bytes | memoryview) -> None:
        """Append a piece.

        Raises:
            OSError: it cannot be written; the file is as it was before.
        """
        rest = memoryview(piece)
        total = len(rest)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except BaseException:
            self._file.truncate(self.size)
            raise
        self.size += total

    def check(self, path: Path) -> None:
        """See that the file at `path` is still this one, and that nobody else has written to it.

        Raises:
            OSError: it is not.
        """
        try:
            here, there = os.fstat(self._file.fileno()), path.stat()
        except FileNotFoundError:
            raise OSError(errno.ESTALE, "the record was removed") from None
        if not os.path.samestat(here, there) or here.st_size > self.size:
            raise OSError(errno.ESTALE, "another run records there now")

    def close(self) -> None:
        """Close the file. Closing twice is fine."""
        self._file.close()
