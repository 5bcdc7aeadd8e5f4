"""Which of our series a column of a foreign log is, by its name.

The tables of these names are in docs/import.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from bifusion_diag.errors import UserError, near_matches

TOTAL = "loss/total"
NORM = "train/grad_norm"
RATE = "train/lr"
STEP, EPOCH, INNER = "step", "epoch", "iter"  # columns that say where a row belongs

TRAINING = {"train", "training", "trn"}
VALIDATION = {"val", "valid", "validation", "eval", "evaluation"}
TESTING = {"test", "testing"}
ROOTS = {"metrics", "scalars", "scalar", "log", "logs", "stats"}  # first words that say nothing
TOTALS = {
    "loss", "total_loss", "loss_total", "losses_total", "totalloss", "loss_all", "all_loss", "loss_sum", "sum_loss",
    "overall_loss", "loss_loss", "loss_overall",
}  # fmt: skip
NOT_LOSSES = {
    "weight", "weights", "scale", "scaler", "ratio", "coef", "coeff", "coefficient", "lambda", "lr", "grad",
    "gradient", "count", "time", "num", "norm", "factor",
}  # fmt: skip
METRICS = {
    "eval/miou": {"miou", "mean_iou", "m_iou", "iou_mean", "meaniou"},
    "eval/ap": {"ap", "map", "m_ap", "all_ap", "mean_ap", "bbox_map", "segm_map", "coco_bbox_map", "coco_segm_map"},
    "eval/ap50": {
        "ap50", "ap_50", "ap_0_5", "ap_0_50", "all_ap_50", "map50", "map_50", "bbox_map_50", "segm_map_50", "ap50_all",
        "coco_bbox_map_50", "coco_segm_map_50",
    },
    "eval/ap25": {"ap25", "ap_25", "ap_0_25", "all_ap_25", "map25", "map_25", "ap25_all"},
}  # fmt: skip
STEPS = {
    "step", "steps", "global_step", "trainer_global_step", "iteration", "iterations", "global_iter", "n_iter",
    "num_steps", "global_iteration",
}  # fmt: skip
INNER_STEPS = {"iter", "it", "batch", "batch_idx", "iter_in_epoch", "batch_index", "i"}
EPOCHS = {"epoch", "epochs", "ep", "current_epoch"}
WALL = {"wall_time", "timestamp", "_timestamp", "runtime", "_runtime", "relative_time", "datetime", "date"}
STEP_SECONDS = {
    "step_time", "iter_time", "batch_time", "time_per_step", "time_per_iter", "sec_per_iter", "step_seconds",
    "seconds_per_step", "iteration_time",
}  # fmt: skip
DATA_SECONDS = {"data_time", "dataload_time", "data_loading_time", "data_seconds"}
_NORM = re.compile(
    r"(total_|global_|model_)?(grads?|gradients?)_?(l2_)?norm(_total|_l2|_before_clip(ping)?|_pre_?clip(ping)?|_unclipped|_all)?"
    r"|(pre_?clip|unclipped)_grad_norm|gnorm|grad_\d+(_\d+)?_norm_total"
)
_AFTER_CLIP = re.compile(r"(grads?|gradients?)_?norm_(after_clip(ping)?|post_?clip(ping)?|clipped)|clipped_grad_norm")
_RATE = re.compile(r"(base_|current_|optimi[sz]er_)?(lr|learning_rate)(_(?P<group>.+))?")
_SCALE = {"loss_scale", "grad_scale", "amp_scale", "scaler_scale", "grad_scaler_scale"}
ALIASES = {
    "loss": TOTAL, "grad_norm": NORM, "lr": RATE, "time": "train/step_seconds", "data_time": "train/data_seconds",
    "miou": "eval/miou", "ap": "eval/ap", "ap50": "eval/ap50", "ap25": "eval/ap25",
    STEP: STEP, EPOCH: EPOCH, INNER: INNER,
}  # fmt: skip
_OURS = re.compile(r"(loss|train|eval|grads|activations|weights|updates|matching|gate|clip|projection|throughput)/.+")
_OUR_TERM = re.compile(r"loss/.+/(raw|weighted)")
MAX_NAME = 200


class Named(NamedTuple):
    """What a column is."""

    series: str | None  # None: nothing that diagnosis reads
    rank: int = 0  # of several columns that are the same series, the lowest is taken
    norm: str = ""  # of a gradient norm whose name says it: before or after clipping


def clean(name: str) -> str:
    """A name as one line of text: control characters are written out, so that no terminal obeys them."""
    text = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in name)
    return text if len(text) <= MAX_NAME else text[: MAX_NAME - 1] + "…"


def words(name: str) -> list[str]:
    """A name's words in lower case: those between anything that is no letter, digit or underscore, and at underscores.

    ``train/Loss_cls`` → train, loss, cls; ``mIoU`` → miou.
    """
    return [word for word in re.split(r"[^0-9a-z]+", name.lower()) if word]


def is_ours(names: Iterable[str]) -> bool:
    """Whether these are the names of our own TensorBoard events."""
    known = set(names)
    return TOTAL in known and any(_OUR_TERM.fullmatch(name) for name in known)


def place_of(name: str) -> str | None:
    """STEP, EPOCH or INNER where a column says where its row belongs; "" for a time of day, None for a value."""
    key = "_".join(word for word in words(name) if word not in TRAINING)
    if key in STEPS:
        return STEP
    if key in EPOCHS:
        return EPOCH
    if key in INNER_STEPS:
        return INNER
    return "" if key in WALL else None


def recognise(name: str, *, timed: bool = False, memory: bool = False, ours: bool = False) -> Named:
    """What a column is.

    Args:
        name: the log's own name of it.
        timed: ``time`` is the seconds that a step takes.
        memory: ``memory`` is MiB of the device's memory.
        ours: the log is one of ours.
    """
    if ours and _OURS.fullmatch(name):
        return Named(name)
    found = words(name)
    mode = next((word for word in found if word in TRAINING | VALIDATION | TESTING), "")
    kept = [word for word in found if word not in TRAINING | VALIDATION | TESTING]
    while len(kept) > 1 and kept[0] in ROOTS:
        kept = kept[1:]
    rank = 0 if mode in TRAINING else 1
    if (
        mode not in VALIDATION and len(kept) > 1 and kept[-1] in ("step", "epoch")
    ):  # of Lightning: of a step, or the mean
        rank += 4 if kept[-1] == "epoch" else 0
        kept = kept[:-1]
    key = "_".join(kept)
    if mode in TESTING or not key:
        return Named(None)
    if mode in VALIDATION:
        return _validation(name, key)
    if (series := _metric(key)) is not None and mode not in TRAINING:
        return Named(series, rank)
    if key in TOTALS or (kept[0] in ("loss", "losses") and "_".join(kept[1:]) in TOTALS):
        return Named(TOTAL, rank + (0 if key == "loss" else 2))
    if _AFTER_CLIP.fullmatch(key):
        return Named(NORM, rank + 8, "after clipping")
    if matched := _NORM.fullmatch(key):
        said = "clip" in matched[0]
        return Named(NORM, rank + (0 if said else 2), "before clipping" if said else "")
    if matched := _RATE.fullmatch(key):
        if matched["group"] is None:
            return Named(RATE, 2 if key.startswith("base_") else rank)
        return Named(f"{RATE}/{matched['group']}", rank)
    if key in _SCALE:
        return Named("train/loss_scale", rank)
    if key in STEP_SECONDS or (timed and key == "time"):
        return Named("train/step_seconds", rank)
    if key in DATA_SECONDS:
        return Named("train/data_seconds", rank)
    if memory and key in ("memory", "max_mem"):
        return Named("throughput/device_peak_mib", rank)
    if "loss" in key and not NOT_LOSSES & {*kept}:
        return Named(f"loss/{_term(name)}/raw", rank)
    return Named(None)


def _validation(name: str, key: str) -> Named:
    if (series := _metric(key)) is not None:
        return Named(series)
    if key in TOTALS:
        return Named("eval/loss")
    if key == "runtime":
        return Named("eval/seconds")
    if key in ("time", "data_time", "lr") or key.endswith("_per_second") or key in STEP_SECONDS | EPOCHS | STEPS:
        return Named(None)
    return Named(f"eval/{_without_mode(name)}", 1)


def _metric(key: str) -> str | None:
    return next((series for series, keys in METRICS.items() if key in keys), None)


def _without_mode(name: str) -> str:
    """A name without the words before and behind it that say of what it is, as one word."""
    parts = [part for part in re.split(r"[/\s]+", clean(name)) if part]
    parts = [part for part in parts if not {*words(part)} <= TRAINING | VALIDATION | TESTING] or parts
    text = ".".join(parts)
    for mode in sorted(TRAINING | VALIDATION | TESTING, key=len, reverse=True):
        text = re.sub(rf"^{mode}[_.\-]+", "", text, flags=re.IGNORECASE)
    return text


def _term(name: str) -> str:
    text = _without_mode(name)
    text = re.sub(r"^(loss|losses)\.", "", text, flags=re.IGNORECASE)
    return re.sub(r"_step$|_epoch$", "", text)


def given_columns(given: Mapping[str, str], columns: Iterable[str]) -> dict[str, str]:
    """Our series by column, of what a user has said (ours → theirs).

    Raises:
        UserError: a name is unknown.
    """
    known = list(columns)
    found = {}
    for ours, theirs in given.items():
        series = ALIASES.get(ours) or (ours if _OURS.fullmatch(ours) else None)
        if series is None:
            raise UserError(
                f"--columns {ours}={theirs}: {ours!r} is no series of ours." + near_matches(ours, ALIASES)
                + " A full name such as loss/inst/raw or eval/miou is right, too."
            )  # fmt: skip
        if theirs not in known:
            raise UserError(f"--columns {ours}={theirs}: there is no column {theirs!r}." + near_matches(theirs, known))
        found[theirs] = series
    return found
