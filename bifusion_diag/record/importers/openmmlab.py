"""What the logs of MMEngine and of MMCV have in common: text lines, the environment at a log's head, the window."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bifusion_diag.record.importers.config_text import settings_of
from bifusion_diag.record.importers.source import Smoothing, lines, number

MEANS = r".*(loss|time|data_time|grad_norm).*"  # the names that MMEngine averages, unless told otherwise
DEFAULT_WINDOW = 10  # of MMEngine's LogProcessor
MAX_ROW = 50_000  # letters of a row
HEAD_LINES = 60_000  # of a log, in which its configuration is looked for
_HEADER = re.compile(
    r"(?P<kind>Epoch|Iter)(?:\((?P<mode>train|val|test)\))?\s*\[\s*(?P<one>\d+)(?:/\s*(?P<of>\d+))?\]"
    r"(?:\[\s*(?P<inner>\d+)(?:/\s*(?P<per>\d+))?\])?"
)
_STAMP = re.compile(r"(\d{4})[-/](\d{2})[-/](\d{2}) (\d{2}:\d{2}:\d{2})")
_PAIR = re.compile(r"(\S{1,200}): {1,8}(\S{1,200})")  # bounded: a damaged line may have a million letters
_SIMPLE = re.compile(r"\.\*\([\w|]{1,300}\)\.\*")
_NO_VALUES = {"eta", "exp"}


class LogRow(NamedTuple):
    """One logged line of training or validation."""

    mode: str  # "train", "val" or "test"
    epoch: int | None
    inner: int | None  # iteration in the epoch
    step: int | None  # iteration of the run, where the line says it
    per_epoch: int | None  # iterations in an epoch
    planned: int | None  # iterations of the run
    values: dict[str, float]
    broken: int  # values that are none


class Head(NamedTuple):
    """What a log says before its first step."""

    environment: Mapping[str, Any] = {}
    settings: Mapping[str, Any] = {}
    created: str = ""
    per_epoch: int | None = None

    def then(self, later: Head) -> Head:
        """What two processes of a run say: the later one's settings, the first one's beginning."""
        return Head(
            later.environment or self.environment,
            later.settings or self.settings,
            self.created or later.created,
            later.per_epoch or self.per_epoch,
        )


def log_rows(path: Path) -> Iterator[LogRow]:
    """Rows of a text log, several where a line holds several."""
    for line in lines(path):
        if "Epoch" not in line and "Iter" not in line:
            continue
        found = list(_HEADER.finditer(line))
        ends = [match.start() for match in found[1:]] + [len(line)]
        for match, end in zip(found, ends[: len(found)], strict=True):
            row = _row(match, line[match.end() : end])
            if row is not None:
                yield row


def is_header(line: str) -> re.Match[str] | None:
    """The place of a row in a line, None where it has none."""
    return _HEADER.search(line)


def _row(match: re.Match[str], rest: str) -> LogRow | None:
    values: dict[str, float] = {}
    broken = 0
    for name, text in _PAIR.findall(rest[:MAX_ROW]):
        if name in _NO_VALUES:
            continue
        value = number(text.rstrip(","))
        if value is None:
            broken += 1
        else:
            values[name] = value
    one, of, inner, per = (None if part is None else int(part) for part in match.group("one", "of", "inner", "per"))
    mode = match["mode"] or "train"
    if match["kind"] == "Iter":
        step, planned = (one, of) if mode == "train" else (None, None)
        return LogRow(mode, None, None, step, None, planned, values, broken)
    if mode == "train" and inner is None:
        return None
    step = (one - 1) * per + inner if mode == "train" and per and one and inner is not None else None
    return LogRow(mode, one, inner, step, per if mode == "train" else None, None, values, broken)


def read_head(path: Path) -> Head:
    """The environment, the configuration and the first epoch's length that a text log states."""
    environment: dict[str, Any] = {}
    settings: Mapping[str, Any] = {}
    created, per_epoch = "", None
    block: str | None = None
    config: list[str] | None = None
    for count, line in enumerate(lines(path)):
        stamped = _STAMP.match(line)
        if stamped and not created:
            created = f"{stamped[1]}-{stamped[2]}-{stamped[3]}T{stamped[4]}"
        match = is_header(line)
        if match and match["inner"] is not None and (match["mode"] or "train") == "train" and match["per"]:
            per_epoch = int(match["per"])
        if (match and " - " in line) or count > HEAD_LINES:
            break
        if stamped or line.startswith("-----"):
            if config is not None and not settings:
                settings = settings_of("\n".join(config))
            config = [] if "Config:" in line else None
            block = None if line.startswith("-----") and environment else block
            continue
        if config is not None:
            config.append(line)
        elif line.startswith(("System environment:", "Runtime environment:")):
            block = line
        elif ": " in line and (block is not None or re.match(r"(sys\.platform|Python): ", line)):
            block = block or "System environment:"
            key, _, value = line.strip().partition(": ")
            if not key.startswith("- ") and len(key) < 60:
                environment.setdefault(key, value.strip()[:300])
    return Head(environment, settings, created, per_epoch)


def environment_of(stated: Mapping[str, Any]) -> dict[str, Any]:
    """An environment block under the names of our own records, as far as they mean the same."""
    if not stated:
        return {}
    packages = {
        ours: str(stated[theirs])
        for theirs, ours in (
            ("PyTorch", "torch"), ("TorchVision", "torchvision"), ("OpenCV", "opencv"), ("MMEngine", "mmengine"),
            ("MMCV", "mmcv"), ("MMDetection", "mmdet"), ("MMDetection3D", "mmdet3d"), ("MMSegmentation", "mmseg"),
        )
        if theirs in stated
    }  # fmt: skip
    found: dict[str, Any] = {"packages": packages}
    if "Python" in stated:
        found["python"] = str(stated["Python"]).split(" ")[0]
    if "sys.platform" in stated:
        found["platform"] = stated["sys.platform"]
    device = next((stated[key] for key in stated if key.startswith("GPU 0")), None)
    if device is not None:
        found["device"] = device
    elif stated.get("CUDA available") == "False":
        found["device"] = "cpu"
    found |= {key: stated[key] for key in ("CUDA_HOME", "NVCC", "GCC", "GPU number") if key in stated}
    return found


def seed_of(stated: Mapping[str, Any]) -> int | None:
    """The seed that an environment block states."""
    try:
        return int(str(stated["seed"]))
    except (KeyError, ValueError):
        return None


def window_of(settings: Mapping[str, Any], per_epoch: int | None, last: int) -> Smoothing:
    """The window of MMEngine's LogProcessor, as configured or by default."""
    processor = settings.get("log_processor")
    processor = processor if isinstance(processor, Mapping) else {}
    stated = processor.get("window_size")
    window = stated if isinstance(stated, int) and stated > 0 else DEFAULT_WINDOW
    if isinstance(stated, int):
        source = "log_processor of the configuration"
    elif settings:
        source = "MMEngine's default; the configuration states none"
    else:
        source = "MMEngine's default; there is no configuration beside the log"
    others: dict[str, int] = {}
    custom = processor.get("custom_cfg")
    for entry in custom if isinstance(custom, list) else []:
        if isinstance(entry, Mapping) and isinstance(entry.get("data_src"), str):
            size = entry.get("window_size")
            steps = {"epoch": per_epoch or last, "global": last}.get(size) if isinstance(size, str) else size
            method = entry.get("method_name")
            if method == "current":
                steps = 1
            if isinstance(steps, int) and steps > 0:
                name = str(entry.get("log_name") or entry["data_src"])
                others[name.removeprefix("train/")] = steps
    pattern = str(processor.get("mean_pattern", MEANS))
    if not _SIMPLE.fullmatch(pattern):  # a log's own pattern could be one that takes forever
        source += "; its mean_pattern is not read"
        pattern = MEANS
    return Smoothing(window, source, others, pattern)


def planned_of(settings: Mapping[str, Any], per_epoch: int | None) -> int | None:
    """How many iterations a configuration of MMEngine or MMCV asks for; None where it does not say."""
    for key in ("train_cfg", "runner"):
        stated = settings.get(key)
        if isinstance(stated, Mapping):
            if isinstance(stated.get("max_iters"), int):
                return int(stated["max_iters"])
            if isinstance(stated.get("max_epochs"), int) and per_epoch:
                return int(stated["max_epochs"]) * per_epoch
    total = settings.get("total_epochs")
    return total * per_epoch if isinstance(total, int) and per_epoch else None


def clips(settings: Mapping[str, Any]) -> bool:
    """Whether a configuration clips gradients, whose norm is then logged as it was before."""
    found = (settings.get("optim_wrapper"), settings.get("optimizer_config"))
    return any(isinstance(part, Mapping) and ("clip_grad" in part or "grad_clip" in part) for part in found)
