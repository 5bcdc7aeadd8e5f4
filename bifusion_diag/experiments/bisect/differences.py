"""What differs between two settings, in pieces that can be changed one by one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

from bifusion_diag.config import ConfigError, Settings, settings_from_dict
from bifusion_diag.errors import UserError

#: Settings that cannot make a run unstable, and why they are not compared: the baseline's hold in every run.
HARMLESS = {
    "preset": "a name",
    "scale": "a name: the widths themselves are compared",
    "training.steps": "every run has the same length",
    "training.seed": "every set of settings is tried on the same seeds",
    "training.device": "where it runs",
    "training.threads": "where it runs",
    "training.checkpoint_every": "what is kept of a run",
    "training.keep_checkpoints": "what is kept of a run",
    "training.fingerprint_every": "what is kept of a run",
    "incidents.*": "what is done about bad steps",
    "model.clip.cache_memory": "a cache",
    "model.clip.cache_folder": "a cache",
    "model.inference.*": "not part of training",
    "model.diffusion_radius": "not part of training",
    "evaluation.every": "leaves no trace in training",
    "evaluation.source": "leaves no trace in training",
    "evaluation.masks": "leaves no trace in training",
    "evaluation.scenes": "leaves no trace in training",
    "evaluation.max_points": "leaves no trace in training",
    "evaluation.min_region": "leaves no trace in training",
}


@dataclass(frozen=True)
class Change:
    """One setting with its two values, as JSON has them."""

    key: str
    baseline: Any
    candidate: Any


@dataclass(frozen=True)
class Difference:
    """Settings that are changed together.

    Attributes:
        name: of the setting, or of several joined by " + ".
        changes: one a setting.
        needs: names of other differences without which this one is not valid.
    """

    name: str
    changes: tuple[Change, ...]
    needs: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Space:
    """All mixtures of two settings.

    Attributes:
        baseline: its settings.
        candidate: its settings, the harmless ones as the baseline has them.
        differences: each after those that it needs, else in the order of the settings.
        ignored: those that differ and are not compared.
    """

    baseline: Settings
    candidate: Settings
    differences: tuple[Difference, ...]
    ignored: tuple[Change, ...]
    _tree: Mapping[str, Any] = field(repr=False, default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the differences."""
        return tuple(difference.name for difference in self.differences)

    @property
    def needs(self) -> dict[str, frozenset[str]]:
        """Of a difference, the others without which it is not valid."""
        return {difference.name: difference.needs for difference in self.differences}

    def named(self, name: str) -> Difference:
        """The difference of that name."""
        return next(difference for difference in self.differences if difference.name == name)

    def mixture(self, changed: Iterable[str], **training: Any) -> Settings:
        """The baseline with some differences as the candidate has them.

        Args:
            changed: names of differences.
            training: further settings of ``training``, such as its seed.

        Raises:
            ConfigError: these settings are not valid together.
        """
        chosen = set(changed)
        changes = [change for one in self.differences if one.name in chosen for change in one.changes]
        values = {change.key: change.candidate for change in changes}
        preset = self.candidate.preset if chosen else self.baseline.preset
        values |= {
            "preset": preset,
            "evaluation.every": 0,
            **{f"training.{key}": value for key, value in training.items()},
        }
        return settings_from_dict(with_values(self._tree, values), "a mixture of both")


def space_of(baseline: Settings, candidate: Settings) -> Space:
    """The differences of two settings, those that are only valid together as one.

    Raises:
        UserError: nothing differs that could make a run unstable.
    """
    tree = baseline.model_dump(mode="json")
    before, after = flat(tree), flat(candidate.model_dump(mode="json"))
    changes = [Change(key, before[key], after[key]) for key in before if before[key] != after[key]]
    ignored = tuple(change for change in changes if why_harmless(change.key) is not None)
    changes = [change for change in changes if change not in ignored]
    if not changes:
        also = f", but for {', '.join(change.key for change in ignored)}" if ignored else ""
        raise UserError(f"the two settings are the same{also}: there is nothing to bisect. Give two that differ.")
    needs = _needs(tree, changes)
    reach = {key: _reachable(key, needs) for key in needs}
    groups: dict[frozenset[str], list[Change]] = {}
    for change in changes:
        groups.setdefault(reach[change.key], []).append(change)
    names = {change.key: " + ".join(c.key for c in group) for group in groups.values() for change in group}
    differences = []
    for around, group in sorted(groups.items(), key=lambda item: len(item[0])):  # what is needed has a smaller reach
        own = names[group[0].key]
        differences.append(Difference(own, tuple(group), frozenset(names[key] for key in around) - {own}))
    same = settings_from_dict(with_values(tree, {c.key: c.candidate for c in changes} | _label(candidate)), "candidate")
    return Space(baseline, same, tuple(differences), ignored, tree)


def _label(candidate: Settings) -> dict[str, Any]:
    return {"preset": candidate.preset}


def _needs(tree: Mapping[str, Any], changes: list[Change]) -> dict[str, set[str]]:
    """For each setting, the others that have to change with it for the settings to be valid."""
    found: dict[str, set[str]] = {}
    for change in changes:
        company = [other for other in changes if other is not change]
        if _is_valid(tree, [change]):
            company = []
        for other in tuple(company):  # the candidate itself is valid: leave out what need not change
            fewer = [one for one in company if one is not other]
            if _is_valid(tree, [change, *fewer]):
                company = fewer
        found[change.key] = {other.key for other in company}
    return found


def _is_valid(tree: Mapping[str, Any], changes: list[Change]) -> bool:
    try:
        settings_from_dict(with_values(tree, {change.key: change.candidate for change in changes}), "a mixture")
    except ConfigError:
        return False
    return True


def _reachable(key: str, needs: Mapping[str, set[str]]) -> frozenset[str]:
    reached, waiting = {key}, [key]
    while waiting:
        new = needs[waiting.pop()] - reached
        reached |= new
        waiting += new
    return frozenset(reached)


def why_harmless(key: str) -> str | None:
    """Why a setting is not compared; None of one that is."""
    return next((why for pattern, why in HARMLESS.items() if fnmatch(key, pattern)), None)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def with_values(tree: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of nested settings with other values, given by dotted key."""
    copy = json.loads(json.dumps(tree))
    for key, value in values.items():
        *above, leaf = key.split(".")
        node = copy
        for name in above:
            node = node[name]
        node[leaf] = value
    return dict(copy)


def digest(settings: Settings) -> str:
    """Of all that decides a run; what a preset is called does not."""
    values = settings.model_dump(mode="json", exclude={"preset"})
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
