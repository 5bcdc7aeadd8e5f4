"""Settings that differ between two runs, ranked by how likely each is to be why one is less stable.

A setting's score is that of the strongest thing that speaks against it:

- 1.0: it is the remedy of a finding and was tried on a bad step, and helped; or it injects a fault on purpose;
- 0.9: it is the remedy of a finding of severity error, 0.8 of a warning, 0.7 of a note;
- 0.6: the candidate's value is a known risk and the baseline's is not (`RISKS`);
- 0.5: it belongs to the part or the loss term in which most bad steps start;
- 0.3: it changes the optimiser, the losses or the schedule; 0.2: the model or the data;
- 0.1: the seed: chance; 0.0: it changes no number of the training (names, threads, what is recorded), or one of the
  records does not know it, as it is of another version or program: whether it differs nobody can tell.

Each further thing that speaks against it adds 0.01: it ranks it before others of its kind. A score is no probability.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bifusion_diag.diagnosis.findings import Finding
from bifusion_diag.diagnosis.incidents import RecordedIncident
from bifusion_diag.diagnosis.origins import Origin
from bifusion_diag.diagnosis.phrase import Phrase, say
from bifusion_diag.diagnosis.settings_diff import ABSENT, SettingGroup, SettingRow

_MORE = 0.01
_BY_SEVERITY = {"error": 0.9, "warning": 0.8, "note": 0.7}
_RISK, _PLACE, _OPTIMISER, _MODEL, _SEED, _HARMLESS = 0.6, 0.5, 0.3, 0.2, 0.1, 0.0
SUSPECTED_GROUPS = ("Settings",)  # of the groups of differences, those that a user sets


@dataclass(frozen=True)
class Suspect:
    """One setting that differs.

    Attributes:
        key: dotted.
        baseline: its value there, as text.
        candidate: likewise.
        score: 0 to about 1: how much speaks against it; only the order means something.
        reason: in a sentence.
    """

    key: str
    baseline: str
    candidate: str
    score: float
    reason: Phrase


@dataclass(frozen=True)
class Risk:
    """A setting that is known to make training less stable.

    Attributes:
        key: dotted.
        holds: whether a change from the baseline's to the candidate's value takes the risk.
        reason: why it is one.
        source: where that is shown.
    """

    key: str
    holds: Callable[[str, str], bool]
    reason: str
    source: str


def _is(*values: str) -> Callable[[str, str], bool]:
    return lambda baseline, candidate: candidate in values and baseline not in values


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _larger(baseline: str, candidate: str) -> bool:
    left, right = _number(baseline), _number(candidate)
    return left is not None and right is not None and right > left


def _smaller(baseline: str, candidate: str) -> bool:
    return _larger(candidate, baseline)


def _off_or_larger(baseline: str, candidate: str) -> bool:
    return (candidate == "none" and baseline not in ("none", ABSENT)) or _larger(baseline, candidate)


_NAN_COORDINATES = (
    "non-finite camera coordinates are let through or become finite garbage, where the points should have no valid view"
)
_FEW_VOXELS = "BatchNorm then sees fewer voxels at the coarse levels, where a handful makes gradient norms explode"
RISKS: tuple[Risk, ...] = (
    Risk("model.projection.sanitize", _is("replace", "clamp", "none"), _NAN_COORDINATES, "spec 6, document 000"),
    Risk(
        "model.projection.normalize",
        _is("after_sampling"),
        "points out of view are zero vectors, and normalising one has a gain of up to 10¹²",
        "spec 6, measured",
    ),
    Risk(
        "losses.instance.empty_match",
        _is("nan"),
        "an object that no query matches makes the instance loss a mean over nothing, NaN",
        "spec 6, on ESAM's code",
    ),
    Risk(
        "losses.instance.no_object_weight",
        _smaller,
        "the background weighs less against the few matched queries",
        "documents 000 and 002",
    ),
    Risk(
        "losses.instance.parts",
        lambda left, right: left != right,
        "the instance loss has other weights than the baseline's",
        "document 000",
    ),
    Risk(
        "losses.clip_align.weight",
        _larger,
        "the alignment loss pulls harder on the shared trunk",
        "documents 000 and 002",
    ),
    Risk(
        "losses.clip_align.target",
        _is("global"),
        "all points are pulled towards one vector a scene, with no negatives: features collapse",
        "document 002, spec 6",
    ),
    Risk("losses.clip_align.temperature", _smaller, "the loss's slope is up to 1 ÷ temperature", "spec 6, measured"),
    Risk(
        "losses.clip_align.gradient_flow", _larger, "more of the gradient reaches the 2D side", "document 003, spec 6"
    ),
    Risk("optim.lr", _larger, "larger updates", "document 001, plan B"),
    Risk(
        "optim.clip_grad",
        _off_or_larger,
        "a spike of the gradient reaches the weights less damped",
        "documents 000 and 001",
    ),
    Risk("optim.schedule", _is("constant"), "the learning rate never falls", "document 003"),
    Risk("training.batch_size", _smaller, _FEW_VOXELS, "spec 6, on ESAM's code"),
    Risk(
        "training.stages",
        _is("none"),
        "everything learns from the first step on, with fresh fusion weights",
        "document 003",
    ),
    Risk("data.max_points", _smaller, _FEW_VOXELS, "spec 6, on ESAM's code"),
    Risk("data.crop_size", _smaller, _FEW_VOXELS, "spec 6, on ESAM's code"),
    Risk("model.backbone.voxel_size", _larger, _FEW_VOXELS, "spec 6, on ESAM's code"),
    Risk(
        "model.clip.tune",
        _is("lora", "blocks"),
        "parts of CLIP learn, and no longer stay where they were trained to",
        "document 003, stage S2",
    ),
    Risk("data.flaws.*", _larger, "more scenes have this flaw of real captures", "spec 6"),
)

#: Settings that change no number of the training, by the last or any part of their key.
_INERT = re.compile(
    r"(^|\.)(name|out|output|run_name|work_dir|run_id|description|preset|threads|device|checkpoint_every|keep_checkpoints|"
    r"fingerprint_every|cache_memory|cache_folder|capsules|capsule_limit|keep_every)$|^(evaluation|incidents)\.|"
    r"^model\.inference\."
)
_SEED_KEY = re.compile(r"(^|\.)(seed|random_seed|manual_seed)$")
_OPTIMISER_PARTS = {"optim", "optimizer", "losses", "loss", "lr", "schedule", "training", "train"}
#: Parts of modules' names that settings call otherwise.
_CALLED = {"unet": "backbone", "spatial_head": "clip", "global_head": "clip", "visual": "clip", "pool": "pooling"}
_TOO_GENERAL = {
    "model",
    "encoder",
    "data",
    "training",
    "settings",
    "losses",
    "layers",
    "weight",
    "heads",
    "hidden",
    "width",
}


def rank_suspects(
    settings: Sequence[SettingGroup],
    findings: Sequence[Finding],
    origins: Sequence[Origin] = (),
    incidents: Sequence[RecordedIncident] = (),
    *,
    foreign: bool = False,
) -> tuple[Suspect, ...]:
    """Rank the settings that differ, the most suspect first.

    Args:
        settings: of both runs side by side.
        findings: of the candidate.
        origins: where its bad steps start.
        incidents: its bad steps that were taken apart.
        foreign: one of the records was imported and the other was not: they name their settings differently.
    """
    rows = [row for group in settings if group.title in SUSPECTED_GROUPS for row in group.rows if row.differs]
    place = _starts_most(origins, incidents)
    unknown = _of_another_version(settings, foreign)
    judged = (_judge(row, findings, place, unknown=row.key in unknown) for row in rows)
    return tuple(sorted(judged, key=lambda suspect: -suspect.score))


def _of_another_version(settings: Sequence[SettingGroup], foreign: bool) -> set[str]:
    """Settings that one of two records does not know: of this program, which writes down all, or one of them imported.

    Where a group of settings is "none" there, its members are absent because of that: they do differ.
    """
    rows = [row for group in settings if group.title in SUSPECTED_GROUPS for row in group.rows]
    if not foreign and not any(row.key == "preset" and ABSENT not in (row.baseline, row.candidate) for row in rows):
        return set()  # what others write down is what they have set
    known = [{row.key for row in rows if row.baseline != ABSENT}, {row.key for row in rows if row.candidate != ABSENT}]

    def lacks(keys: set[str], key: str) -> bool:
        parts = key.split(".")
        return not any(".".join(parts[:end]) in keys for end in range(1, len(parts) + 1))

    return {row.key for row in rows if any(lacks(keys, row.key) and not _is_group(keys, row.key) for keys in known)}


def _is_group(keys: set[str], key: str) -> bool:
    return any(other.startswith(f"{key}.") for other in keys)


def _judge(
    row: SettingRow, findings: Sequence[Finding], place: tuple[str, int] | None, *, unknown: bool = False
) -> Suspect:
    against: list[tuple[float, Phrase]] = []
    if row.key.rsplit(".", 1)[-1] == "inject" and row.candidate not in ("[]", ABSENT, "none"):
        against.append((1.0, say("It injects a fault on purpose.")))
    for finding in findings:
        if finding.remedy and any(_same_setting(key, row.key) for key in finding.remedy):
            against.append(_remedy(finding))
    for risk in () if unknown else RISKS:
        if _matches(risk.key, row.key) and risk.holds(row.baseline, row.candidate):
            against.append((_RISK, say("A known risk: {reason} ({source}).", reason=risk.reason, source=risk.source)))
    if place is not None and not unknown and _belongs(row.key, place[0]):
        against.append(
            (
                _PLACE,
                say(
                    "Most bad steps whose start is known ({count}) start there: {place}.",
                    count=place[1],
                    place=place[0],
                ),
            )
        )
    if unknown:
        against.append(
            (_HARMLESS, say("Only one of the records knows it: they are of different versions or programs."))
        )
    elif _SEED_KEY.search(row.key):
        against.append((_SEED, say("Another seed: what it changes is chance.")))
    elif _INERT.search(row.key):
        against.append((_HARMLESS, say("It changes no number of the training.")))
    elif _OPTIMISER_PARTS & set(row.key.split(".")):
        against.append((_OPTIMISER, say("It changes the optimiser, the losses or their schedule.")))
    else:
        against.append((_MODEL, say("It changes the model or the data; nothing else speaks against it.")))
    against.sort(key=lambda one: -one[0])
    score, reason = against[0]
    return Suspect(row.key, row.baseline, row.candidate, round(score + _MORE * (len(against) - 1), 4), reason)


def _remedy(finding: Finding) -> tuple[float, Phrase]:
    if finding.tried:
        return 1.0, say("Changing it was tried on a bad step and helped: {finding}.", finding=finding.title)
    return (
        _BY_SEVERITY[finding.severity],
        say("It is the remedy of a finding ({severity}): {finding}.", severity=finding.severity, finding=finding.title),
    )


def _same_setting(remedy: str, key: str) -> bool:
    """A remedy may name a group of settings, or a setting whose parts are shown by themselves."""
    return remedy == key or key.startswith(f"{remedy}.") or remedy.startswith(f"{key}.")


def _matches(pattern: str, key: str) -> bool:
    return key.startswith(pattern[:-1]) if pattern.endswith("*") else key == pattern


def _starts_most(origins: Sequence[Origin], incidents: Sequence[RecordedIncident]) -> tuple[str, int] | None:
    """The module or loss term in which most bad steps start, and how many do."""
    places = {origin.step: origin.terms[0] if origin.terms else origin.module for origin in origins}
    places |= {one.step: one.module or (one.terms[0] if one.terms else None) for one in incidents if one.located}
    counts = Counter(place for _, place in sorted(places.items()) if place)
    return counts.most_common(1)[0] if counts else None


def _belongs(key: str, place: str) -> bool:
    """Whether a setting is one of the part or the loss term."""
    words = {word for word in re.split(r"[./]", place) if word}
    words |= {_CALLED[word] for word in words if word in _CALLED}
    mine = {part for part in key.split(".") if part not in _TOO_GENERAL}
    if mine & words:
        return True
    first, _, rest = key.partition(".")
    term = rest.split(".", 1)[0]
    return first in ("losses", "loss") and bool(term) and (place.startswith(term) or term.startswith(place))
