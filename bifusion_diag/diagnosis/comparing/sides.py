"""Which runs are put together as one side of a comparison: several seeds of the same settings."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bifusion_diag.diagnosis.names import display_name
from bifusion_diag.diagnosis.phrase import Phrase, say
from bifusion_diag.diagnosis.settings_diff import flatten
from bifusion_diag.errors import UserError
from bifusion_diag.record.schema import Run

NO_SEED = "—"
_SEED = re.compile(r"(^|\.)(seed|random_seed|manual_seed)$")
_NAME = re.compile(r"(^|\.)(name|out|output|run_name|work_dir|run_id)$")
#: Of where data and weights come from, what follows from the seed or changes no number.
_FOLLOWS = re.compile(r"(^|\.)(seed|flawed_scenes|flight_recorder|imported)(\.|$)")


@dataclass(frozen=True)
class RunGroup:
    """Runs of one side.

    Attributes:
        name: of the side.
        runs: at least one.
        why: why they were put together, or that it is one run.
    """

    name: str
    runs: tuple[Run, ...]
    why: Phrase


@dataclass
class _Growing:
    runs: list[Run]
    notes: list[str] = field(default_factory=list)


def seed_of(run: Run) -> str:
    """The seed as text, `NO_SEED` where the settings state none."""
    return next((value for key, value in flatten(run.settings).items() if _SEED.search(key)), NO_SEED)


def group_runs(
    baseline: Sequence[Run],
    candidates: Sequence[Run],
    named: Mapping[str, Sequence[Run]] | None = None,
    *,
    separate: bool = False,
) -> tuple[RunGroup, list[RunGroup]]:
    """Put runs together into the baseline side and the candidates' sides.

    Runs whose settings, code and data are equal but for the seed (and names) are one side. A run with a seed that its
    side has already may be a copy, and stays by itself. Where nothing would be left to compare with the baseline, its
    other seeds stay by themselves.

    Args:
        baseline: the first is the reference; the others were added to its side by the user.
        candidates: to be put together.
        named: sides that the user put together.
        separate: keep every candidate by itself.

    Raises:
        UserError: there is no candidate, or a side holds a run twice.
    """
    for name, runs in {"the baseline's side": baseline, **(named or {})}.items():
        _check_distinct(name, runs)
    own = _Growing(list(baseline))
    sides: list[_Growing] = []
    for run in candidates:
        home = None if separate else next((side for side in (own, *sides) if _fits(run, side.runs)), None)
        if home is None:
            sides.append(_Growing([run]))
        else:
            home.runs.append(run)
    chosen = dict(named or {})
    if not sides and not chosen:
        joined = own.runs[len(baseline) :]
        if not joined:
            raise UserError(
                "there is nothing to compare with the baseline: give a second run, or --group NAME=PATH,..."
            )
        own, sides = _Growing(list(baseline)), [_Growing([run]) for run in joined]
    added = len(baseline) > 1
    reference = RunGroup(display_name(baseline[0]), tuple(own.runs), _why(own.runs, chosen_by_user=added))
    found = [RunGroup(display_name(side.runs[0]), tuple(side.runs), _why(side.runs)) for side in sides]
    found += [RunGroup(name, tuple(runs), _why(runs, chosen_by_user=True)) for name, runs in chosen.items()]
    return reference, found


def _check_distinct(name: str, runs: Sequence[Run]) -> None:
    """A run that counts twice would make a test over runs see repetitions that never were."""
    ids = [run.header.run_id for run in runs]
    twice = next((run for run in runs if ids.count(run.header.run_id) > 1), None)
    if twice is not None:
        raise UserError(
            f"{name}: the run {display_name(twice)!r} is there more than once. A copy is no other seed: give each run "
            "once."
        )


def _fits(run: Run, side: Sequence[Run]) -> bool:
    """Whether a run is another seed of the same."""
    seeds = {seed_of(other) for other in side}
    return bool(run.settings) and seed_of(run) not in {*seeds, NO_SEED} and _identity(run) == _identity(side[0])


def _identity(run: Run) -> tuple[str, dict[str, str]]:
    """What has to be equal: all settings but seed and names, the code, and where data and weights come from."""
    settings = {
        key: value for key, value in flatten(run.settings).items() if not (_SEED.search(key) or _NAME.search(key))
    }
    code = {key: value for key, value in flatten(run.environment).items() if key.startswith(("packages.", "git"))}
    data = {key: value for key, value in flatten(run.provenance).items() if not _FOLLOWS.search(key)}
    return run.header.preset, {
        **{f"settings {key}": value for key, value in settings.items()},
        **{f"environment {key}": value for key, value in code.items()},
        **{f"provenance {key}": value for key, value in data.items()},
    }


def _why(runs: Sequence[Run], *, chosen_by_user: bool = False) -> Phrase:
    if len(runs) == 1:
        return say("one run")
    seeds = ", ".join(seed_of(run) for run in runs)
    if chosen_by_user:
        return say("{count} runs that were put together by hand (seeds {seeds})", count=len(runs), seeds=seeds)
    return say("{count} runs whose settings are equal but for the seed ({seeds})", count=len(runs), seeds=seeds)
