"""A measurement in a fresh process, and the memory it takes."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def fresh(module: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run ``python -m module arguments`` and return the JSON object that it prints on its last line."""
    command = [sys.executable, "-m", module, *arguments]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"failed with exit code {result.returncode}: {' '.join(command)}")
    answer: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return answer


def peak_growth(work: Callable[[], Any]) -> int:
    """Bytes by which this process' resident memory peaks above where it stands now, while it works (Linux)."""
    # What has been freed and is still held would be used again, unseen: back to the system with it (glibc).
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def peak() -> int:
    """Bytes of this process' peak resident memory (Linux)."""
    return _status("VmHWM")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))
