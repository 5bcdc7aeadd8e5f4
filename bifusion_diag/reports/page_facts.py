"""What the page states of runs beside their numbers: data, weights, labels, limits, how to run them again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bifusion_diag.diagnosis.comparing.pair import RunComparison
from bifusion_diag.diagnosis.settings_diff import flatten
from bifusion_diag.record.schema import FINGERPRINT, Run
from bifusion_diag.reports.budget import Budget, cut
from bifusion_diag.reports.language import listed, tr
from bifusion_diag.reports.numbers import text

FACTS = {
    "data": "data",
    "labels": "labels",
    "validation": "validation",
    "clip_weights": "CLIP weights",
    "text_features": "text features",
    "initial_weights": "initial weights",
}
OF_SOME_MODELS = ("clip_weights", "text_features")  # the others have no such thing
SHORT = 300  # characters of a fact
ENVIRONMENT_LENGTH = 80  # of an entry of the environment; longer ones are among the settings


@dataclass(frozen=True)
class Reproduction:
    """How to run it again, and what with; `rows` are pairs of a label and a text."""

    name: str
    command: str
    rows: list[tuple[str, str]]


def facts(names: Sequence[str], runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Provenance that the first screen states, one text where all runs that can have it agree."""
    found: list[tuple[str, str]] = []
    for key, words in FACTS.items():
        values = [(name, _fact(run, key)) for name, run in zip(names, runs, strict=True)]
        told = dict.fromkeys(value for _, value in values if value)
        if len(told) == 1 and (key in OF_SOME_MODELS or all(value for _, value in values)):
            found.append((tr(words), next(iter(told))))
        else:
            found += [(listed((words, name), ", "), value) for name, value in values if value]
    for name, run in zip(names, runs, strict=True):
        steps = tr("{n} step" if len(run.steps) == 1 else "{n} steps", n=text(len(run.steps), whole=True))
        found.append((name, steps if run.status == "completed" else listed((steps, run.status), ", ")))
    return found


def _fact(run: Run, key: str) -> str:
    """A provenance entry in a few words; of a structured one its kind, its folder or file, how many scenes, and of
    validation data its labels too.
    """
    value: Any = run.provenance.get(key)
    if isinstance(value, Mapping):
        scenes = tr("{n} scenes", n=value["scenes"]) if "scenes" in value else ""
        labels = value.get("labels") if key == "validation" else None
        parts = (value.get("kind"), value.get("folder"), value.get("file"), scenes, labels)
        return cut(listed((str(part) for part in parts if part), ", "), SHORT)
    return "" if value is None else cut(tr(str(value)), SHORT)


def limits(comparisons: Sequence[RunComparison], names: Sequence[str]) -> list[str]:
    """The limits of every comparison, once each; with several candidates, named."""
    found: dict[str, None] = {}
    for name, comparison in zip(names[1:], comparisons, strict=True):
        for limit in comparison.limits:
            said = tr(limit)
            found[said if len(comparisons) == 1 else f"{name}: {said}"] = None
    if len({comparison.baseline.step_range for comparison in comparisons}) > 1:
        different = tr(
            "The candidates cover different steps: the baseline's numbers are those of its steps in {name}.",
            name=names[1],
        )
        found[different] = None
    return list(found)


def reproduction(run: Run, name: str, budget: Budget) -> Reproduction:
    """Commands, seed, determinism, versions and the fingerprint of the last weights."""
    training = run.settings.get("training")
    seed = training.get("seed") if isinstance(training, Mapping) else None
    prints = [event for event in run.events if event.kind == FINGERPRINT and event.data.get("weights")]
    last = prints[-1].data if prints else {}
    imported = run.provenance.get("imported")
    rows = [
        (tr("run"), run.header.run_id),
        (tr("begun"), run.header.created),
        (tr("status"), tr(run.status)),
        (tr("error"), run.error or ""),
        (tr("seed"), tr("not recorded") if seed is None else str(seed)),
        (
            tr("weights' fingerprint"),
            tr("{digest} after {n} steps", digest=str(last["weights"]), n=last.get("done", "?")) if last else "",
        ),
        (tr("imported from"), _fact_of(imported)),
        *((key, value) for key, value in flatten(run.environment).items() if len(value) < ENVIRONMENT_LENGTH),
    ]
    shown = [(cut(label, budget.length), cut(value, budget.length)) for label, value in rows if value]
    return Reproduction(name, cut(run.header.command, budget.length), shown[: budget.settings])


def _fact_of(imported: Any) -> str:
    if not isinstance(imported, Mapping):
        return ""
    return ", ".join(str(imported[key]) for key in ("from", "format") if imported.get(key))
