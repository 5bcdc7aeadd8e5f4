"""What lies at a path: which format, and which files of it are one run."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bifusion_diag.record.importers import csv_files, huggingface, mmcv, mmengine, tensorboard
from bifusion_diag.record.importers.openmmlab import is_header
from bifusion_diag.record.importers.source import Raw
from bifusion_diag.record.schema import RecordError

FORMATS = ("mmengine", "mmcv", "transformers", "tensorboard", "csv")  # the first that a folder has is read
MAX_DEPTH = 5  # of folders below the one that is given
MAX_ENTRIES = 50_000
HEAD = 4 << 20  # bytes of a text log in which its first row is looked for; configurations come before
LOOKED_FOR = (
    "a run.json or a .record folder; MMEngine's vis_data/scalars.json or <timestamp>.log; MMCV's *.log.json or *.log; "
    "Transformers' trainer_state.json; TensorBoard's events.out.tfevents.*; *.csv"
)
_TIMESTAMP = re.compile(r"\d{8}_\d{6}.*")
_SKIPPED = {"__pycache__", "node_modules", ".git", "wandb"}


@dataclass
class Found:
    """One run of a format.

    Attributes:
        format: one of FORMATS.
        root: where it lies.
        files: what of it is there.
        also: other formats at the same place.
    """

    format: str
    root: Path
    files: list[Path]
    also: list[str] = field(default_factory=list)


def find_format(path: Path, format: str | None = None) -> Found:
    """What lies at a path.

    Args:
        path: a file or a folder.
        format: look for this one only.

    Raises:
        RecordError: there is nothing that can be read, or there are several runs.
    """
    if path.is_dir():
        return _in_folder(path, format)
    if not path.is_file():
        what = "it is no file" if path.exists() else "there is no such file or folder"
        raise RecordError(f"{path}: cannot be read: {what}.")
    kind = format or kind_of(path)
    if kind is None:
        raise RecordError(f"{path}: not a run record, nor a log that is known. Looked for: {LOOKED_FOR}.")
    return Found(kind, path, [path])


def kind_of(path: Path) -> str | None:
    """The format of one file, by its name and its first lines; None where it is none of ours to read."""
    name = path.name
    if "tfevents" in name:
        return "tensorboard"
    suffix = path.suffix.lower()
    if suffix == ".json":
        return _json_kind(path)
    if suffix in (".log", ".txt", ".out"):
        return _text_kind(path)
    if suffix in (".csv", ".tsv"):
        return "csv" if csv_files.look(path) is not None else None
    return None


def _json_kind(path: Path) -> str | None:
    head = _head(path, 1 << 16)
    if '"log_history"' in head or path.name == "trainer_state.json":
        return "transformers"
    for line in head.splitlines()[:20]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(row, dict) or "kind" in row:
            return None
        if "mode" in row:
            return "mmcv"
        if "step" in row or "iter" in row:
            return "mmengine"
    if path.name.endswith(".log.json"):  # its first line, with the environment, may be long
        return "mmcv"
    return None


def _text_kind(path: Path) -> str | None:
    for line in _head(path, HEAD).splitlines():
        if "[" in line and (match := is_header(line)) and ("lr" in line or "loss" in line):
            return "mmengine" if match["mode"] == "train" else "mmcv"
    return None


def _head(path: Path, size: int) -> str:
    try:
        with path.open("rb") as file:
            return file.read(size).decode("utf-8", "replace")
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror}).") from error


def _in_folder(folder: Path, format: str | None) -> Found:
    candidates = _candidates(folder)
    by_format: dict[str, dict[Path, list[Path]]] = {}
    for path in candidates:
        try:
            kind = kind_of(path)
        except RecordError:  # another user's file, a link to nowhere: the others may be what is meant
            continue
        if kind is not None:
            by_format.setdefault(kind, {}).setdefault(_root(kind, path, folder), []).append(path)
    kinds = [kind for kind in FORMATS if kind in by_format and format in (None, kind)]
    if not kinds:
        there = ", ".join(sorted({path.name for path in folder.iterdir()})[:10])
        wanted = f" as {format}" if format else ""
        raise RecordError(
            f"{folder}: not a run record, and no log in it can be read{wanted}. Looked for: {LOOKED_FOR}. Found: "
            f"{there or 'an empty folder'}."
        )
    kind = kinds[0]
    roots = by_format[kind]
    if len(roots) > 1:
        listed = "".join(f"\n  {root}" for root in sorted(roots)[:20])
        more = f"\n  … {len(roots) - 20} more" if len(roots) > 20 else ""
        raise RecordError(f"{folder}: {len(roots)} runs are in it. Give one of them:{listed}{more}")
    ((root, files),) = roots.items()
    return Found(kind, root, sorted(files), also=kinds[1:])


def _candidates(folder: Path) -> list[Path]:
    """Files whose names could be a log's, in the folder and some levels below."""
    found: list[Path] = []
    entries = 0
    depth = len(folder.parts)
    for here, folders, files in os.walk(folder):
        below = len(Path(here).parts) - depth
        folders[:] = sorted(name for name in folders if name not in _SKIPPED and not name.endswith(".record"))
        if below >= MAX_DEPTH:
            folders[:] = []
        entries += len(folders) + len(files)
        if entries > MAX_ENTRIES:
            raise RecordError(f"{folder}: more than {MAX_ENTRIES} files are in it. Give the folder of one run.")
        paths = (Path(here) / name for name in sorted(files) if _could_be(name))
        found += [path for path in paths if path.is_file()]  # and no pipe
    return found


def _could_be(name: str) -> bool:
    return "tfevents" in name or name.lower().endswith((".json", ".log", ".csv", ".tsv"))


def _root(kind: str, path: Path, top: Path) -> Path:
    """The folder of the run that a file is of, not above the one that was given."""
    if kind == "mmengine":
        root = path.parent.parent if path.parent.name == "vis_data" else path.parent
        if _TIMESTAMP.fullmatch(root.name):
            root = root.parent
    elif kind == "transformers":
        root = path.parent.parent if path.parent.name.startswith("checkpoint-") else path.parent
    elif kind == "csv":
        table = csv_files.look(path)
        exported = table is not None and csv_files.is_tensorboard(table)
        root = path.parent / f"run-{csv_files.tag_of(path)[0]}" if exported else path
    else:
        root = path.parent
    return root if root.is_relative_to(top) else top


def read_found(found: Found, path: Path, name: str, given: Mapping[str, str]) -> Raw:
    """Read a run that was found."""
    readers: dict[str, Callable[[], Raw]] = {
        "mmengine": lambda: mmengine.read(path, name, mmengine_parts(found)),
        "mmcv": lambda: mmcv.read(path, name, mmcv_parts(found)),
        "transformers": lambda: huggingface.read(path, name, latest_state(found.files)),
        "tensorboard": lambda: tensorboard.read(path, name, found.files),
        "csv": lambda: csv_files.read(path, name, found.files, given),
    }
    raw = readers[found.format]()
    raw.also = found.also
    return raw


def mmengine_parts(found: Found) -> list[mmengine.Part]:
    """What each process of a run left, by its folder."""
    groups: dict[Path, list[Path]] = {}
    for file in found.files:
        groups.setdefault(file.parent.parent if file.parent.name == "vis_data" else file.parent, []).append(file)
    parts = []
    for folder in sorted(groups):
        json_files = [file for file in groups[folder] if file.suffix == ".json"]
        scalars = next((file for file in json_files if file.name == "scalars.json"), min(json_files, default=None))
        logs = [file for file in groups[folder] if file.suffix != ".json"]
        alone = len(found.files) == 1 and found.root == found.files[0]
        text = min(logs, default=None)
        if text is None and alone:  # a file that was given by itself has its log beside it
            text = next(iter(sorted(folder.glob("*.log"))), None)
        configs = [folder / "vis_data" / "config.py", folder / "config.py", folder.with_suffix(".py")]
        config = next((file for file in configs if file.is_file()), next(iter(sorted(folder.glob("*.py"))), None))
        parts.append(mmengine.Part(folder.name, scalars, text, config))
    return parts


def mmcv_parts(found: Found) -> list[mmcv.Part]:
    """What each process of a run left, by the time in its files' names."""
    groups: dict[Path, dict[str, Path]] = {}
    for file in found.files:
        stem = file.name.removesuffix(".json").removesuffix(".log").removesuffix(".txt")
        groups.setdefault(file.parent / stem, {})["json" if file.suffix == ".json" else "text"] = file
    parts = []
    for place, files in sorted(groups.items()):
        text = files.get("text")
        beside = place.with_name(f"{place.name}.log")
        if text is None and beside.is_file():
            text = beside
        config = next(iter(sorted(place.parent.glob("*.py"))), None)
        parts.append(mmcv.Part(place.name, files.get("json"), text, config))
    return parts


def latest_state(files: Iterable[Path]) -> Path:
    """The last trainer_state.json of a run: its own, or that of its last checkpoint."""

    def order(file: Path) -> tuple[int, int]:
        number = re.fullmatch(r"checkpoint-(\d+)", file.parent.name)
        return (0, int(number[1])) if number else (1, 0)

    return max(files, key=order)


def name_of(found: Found, path: Path) -> str:
    """A run's name where the user gives none."""
    place = path.resolve()
    if path.is_file():
        stem = place.name.split(".")[0] if found.format != "csv" else place.stem
        if found.format == "mmengine" and place.parent.name == "vis_data":
            place = place.parent.parent
        elif found.format in ("tensorboard", "transformers") or stem in ("metrics", "scalars"):
            place = place.parent
        else:
            return stem
    else:
        place = found.root.resolve()
        if found.format == "csv":
            place = place.parent
    if re.fullmatch(r"version_\d+|\d{8}_\d{6}.*|vis_data|logs?|runs?", place.name):
        return f"{place.parent.name}/{place.name}"
    return place.name
