"""The machine and the versions that a run was made with, as far as they are known without torch."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "bifusion-diag", "torch", "numpy", "scipy", "pyarrow", "open_clip_torch", "MinkowskiEngine",
)  # fmt: skip


def collect_environment(folder: Path | None = None) -> dict[str, Any]:
    """Collect Python, platform, package versions, processors and the git commit.

    Args:
        folder: whose git commit is meant. None: the current folder.

    Returns:
        python, platform, machine, cpu_count, packages {name: version of those installed}, git {commit, modified} or
        None outside a repository.
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "git": _git(folder or Path.cwd()),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(folder: Path) -> dict[str, Any] | None:
    """Commit of the repository that a folder lies in, and whether tracked files differ from it."""

    def run(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        commit = run("rev-parse", "HEAD")
        return {"commit": commit, "modified": bool(run("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):  # no git, no repository, no commit yet
        return None
