"""What would have helped against a capsule's step: in our own runs settings are changed, in users' code the update.

Beside the capsule's files it leaves ``what_if.json``, every trial, the best first, and ``remedy.yaml``, the settings of
the best one, which ``bifusion-diag train --config`` takes.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from bifusion_diag.config import Settings, parse_value
from bifusion_diag.diagnosis.names import NORM
from bifusion_diag.diagnosis.spikes import WINDOW
from bifusion_diag.errors import UserError, near_matches
from bifusion_diag.experiments.courses import JUDGED, OwnRun, UserCourse, patched
from bifusion_diag.files import write_text
from bifusion_diag.record import load_run
from bifusion_diag.record.codec import encode
from bifusion_diag.replay.capsules.capsule import Capsule
from bifusion_diag.replay.capsules.machine import as_on
from bifusion_diag.replay.incident import Incident
from bifusion_diag.replay.step import Training
from bifusion_diag.replay.trials import remedies
from bifusion_diag.replay.trials.remedies import Action, Remedy
from bifusion_diag.replay.trials.what_if import AS_IT_WAS, STEPS, Change, Course, Trial, helpful, try_all

AUTO = "auto"
TOGETHER = " + "  # between the parts of one change
WHAT_IF_FILE, REMEDY_FILE = "what_if.json", "remedy.yaml"
FORMAT_VERSION = 1
_OUR_YARDSTICK = (
    f"the original criterion with its original weights, on the run's {JUDGED} batches after the last step, without the "
    "scenes that the incident comes from"
)
_USER_YARDSTICK = (
    "the loss of the step function on the capsule's batch, without the samples that the incident comes from"
)
_USER_BATCHES = f"the loss of the step function on the {JUDGED} batches after the last step"
_USER_NOTE = "the capsule's batch is used in every step; a function batches(step) beside the entry gives others"


@dataclass(frozen=True)
class UserCode:
    """What users' code gives beside the capsule.

    Attributes:
        build: the training, its weights do not matter.
        batches: of a step by its number; None: the capsule's batch is used in every step.
        remedies: changes of the training to try, by name; each may return another training.
    """

    build: Callable[[], Training]
    batches: Callable[[int], Any] | None = None
    remedies: Mapping[str, Callable[[Training], Training | None]] | None = None


@dataclass(frozen=True)
class WhatIf:
    """What the trials have shown.

    Attributes:
        capsule: of the step.
        steps: of a trial, after the bad one.
        trials: the best first, those that were not tried last.
        helps: those that are better than the step as it was, the best first.
        note: what the trials could not do as the run does; "" = nothing.
        yardstick: what the loss after the last step was measured by, in words.
    """

    capsule: Capsule
    steps: int
    trials: Sequence[Trial]
    helps: Sequence[Trial]
    note: str
    yardstick: str

    @property
    def remedy(self) -> Trial | None:
        """The best of those that help and that settings alone can bring about."""
        return next((trial for trial in self.helps if trial.change.patch and not trial.change.code), None)


def what_if_command(
    capsule: Capsule,
    wanted: Sequence[str],
    *,
    steps: int,
    entry: str | None,
    build: Callable[[], Training],
    console: Console,
) -> None:
    """Try what is asked for, write it beside the capsule's files, and show it.

    Args:
        capsule: of the step.
        wanted: see :func:`try_remedies`.
        steps: after the bad one.
        entry: "module:function" of users' code, whose module may have ``batches(step)``, which returns the batch of a
            step, and ``remedies()``, which returns functions by name that change the training; None: our own run.
        build: makes the training of users' code.
        console: to print to.

    Raises:
        UserError: see :func:`try_remedies`; the capsule's folder cannot be written.
    """
    console.print()
    code = None if entry is None else _user_code(entry, build)
    with console.status("trying") as status:
        result = try_remedies(
            capsule, wanted, steps=steps, code=code, progress=lambda name: status.update(f"trying: {escape(name)}")
        )
    files = save(result)
    print_result(console, result)
    console.print(Text(f"written: {', '.join(map(str, files))}", style="dim"), soft_wrap=True)


def try_remedies(
    capsule: Capsule,
    wanted: Sequence[str],
    *,
    steps: int = STEPS,
    code: UserCode | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> WhatIf:
    """Run the step of a capsule and so many after it, as it was and under each change.

    Args:
        capsule: of the step.
        wanted: each "auto", the id of a remedy, or "key=value" of a setting, whose key may be shortened as long as it
            is that of one setting alone; parts of one change are joined by " + ".
        steps: after the bad one.
        code: None: the capsule is of ``bifusion-diag train``.
        progress: told the name of each trial before it begins.

    Raises:
        UserError: an unknown remedy or setting; a value that it cannot have; a capsule of other code and no ``code``.
    """
    if steps < 1:
        raise UserError(f"--what-if-steps {steps}: give at least 1")
    settings = remedies.Settings(capsule.settings if code is None else {})
    if code is None and not settings.ours:
        raise UserError(
            f"{capsule.folder} is not of a run of bifusion-diag train: name with --entry module:function what builds "
            "its model"
        )
    changes = requested(wanted, settings, capsule.incident, () if code is None else tuple(code.remedies or ()))
    with as_on(capsule.content["environment"]):
        start: Callable[[Change], Course | str]
        if code is None:
            run = OwnRun(capsule, steps)
            for change in changes:
                patched(run.settings, change.patch)
            start, note, yardstick = run.start, run.note, _OUR_YARDSTICK
        else:
            start, note, yardstick = _user_start(capsule, code, steps), _USER_NOTE, _USER_YARDSTICK
            if code.batches is not None:
                note, yardstick = "", _USER_BATCHES
        norms = _norms_before(capsule)
        trials = try_all(start, changes, steps=steps, previous=norms, combine=AUTO in wanted, progress=progress)
    as_it_was = next(trial for trial in trials if trial.change.name == AS_IT_WAS)
    return WhatIf(capsule, steps, trials, helpful(trials, as_it_was), note, yardstick)


def requested(
    wanted: Sequence[str], settings: remedies.Settings, incident: Incident, own: Sequence[str] = ()
) -> list[Change]:
    """The changes that are asked for, each once.

    Args:
        wanted: see :func:`try_remedies`.
        settings: of the run; empty for users' code.
        incident: of the capsule.
        own: names of the remedies that the user's code gives.

    Raises:
        UserError: an unknown remedy or setting, or text that is neither.
    """
    changes: list[Change] = []
    for text in wanted:
        if text == AUTO:
            named = [name for name in incident.remedies if name in remedies.REMEDIES]
            documented = [one.id for one in remedies.REMEDIES.values() if one.documented]
            found = [_change(remedies.REMEDIES[name], settings, incident) for name in dict.fromkeys(named + documented)]
            changes += [*found, *(Change(name, (name,)) for name in own)]
            continue
        parts = [_part(part.strip(), settings, incident, own) for part in text.split(TOGETHER)]
        whole = parts[0]
        for part in parts[1:]:
            whole = whole | part
        changes.append(whole)
    once: list[Change] = []
    for change in changes:
        same = (change.patch, change.action, change.refused, change.remedies if not change.patch else ())
        if all(same != (o.patch, o.action, o.refused, o.remedies if not o.patch else ()) for o in once):
            once.append(change)
    return once


def resolve_key(short: str) -> str:
    """The whole dotted key of a setting, of which the last parts may be enough: "clip_align.weight".

    Raises:
        UserError: no setting has it, or several have.
    """
    known = list(_leaves(Settings().model_dump()))
    if short in known:
        return short
    found = [key for key in known if key.endswith(f".{short}")]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"--what-if: {short!r} is short for several settings: {', '.join(found)}. Give one in full.")
    shorter = {key.split(".", cut)[-1] for key in known for cut in range(key.count(".") + 1)}
    raise UserError(f"--what-if: no setting is called {short!r}.{near_matches(short, shorter)}")


def save(result: WhatIf) -> list[Path]:
    """Write ``what_if.json`` and, where settings help, ``remedy.yaml`` into the capsule's folder, each whole or not at
    all. An older ``remedy.yaml`` does not stay where nothing helps.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = result.capsule.folder
    remedy, written = folder / REMEDY_FILE, []
    if result.remedy is None:
        remedy.unlink(missing_ok=True)
    else:
        write_text(remedy, remedy_text(result, result.remedy))
        written.append(remedy)
    write_text(folder / WHAT_IF_FILE, json.dumps(encode(to_dict(result)), indent=1, allow_nan=False))
    return [folder / WHAT_IF_FILE, *written]


def to_dict(result: WhatIf) -> dict[str, Any]:
    """As ``what_if.json`` holds it."""
    return {
        "format_version": FORMAT_VERSION,
        "step": result.capsule.step,
        "steps": result.steps,
        "yardstick": result.yardstick,
        "note": result.note,
        "best": None if not result.helps else result.helps[0].change.name,
        "remedy": None if result.remedy is None else dict(result.remedy.change.patch),
        "trials": [
            {
                "name": trial.change.name,
                "remedies": trial.change.remedies,
                "patch": trial.change.patch,
                "action": {k: v for k, v in vars(trial.change.action).items() if v != getattr(Action(), k)},
                "code": trial.change.code,
                "gives_up": trial.change.gives_up,
                "helps": trial in result.helps,
                "result": result_text(trial),
                "grad_norm": trial.steps[0].grad_norm if trial.steps else None,
                "finite": trial.steps[0].finite if trial.steps else None,
                "loss": trial.loss,
                "terms": trial.terms,
                "nonfinite": trial.nonfinite,
                "spikes": trial.spikes,
                "cost": trial.cost,
                "bad_state": trial.bad_state,
                "steps": [vars(step) | {"finite": step.finite} for step in trial.steps],
            }
            for trial in result.trials
            if not trial.refused
        ],
        "not_tried": [{"name": t.change.name, "why": t.refused} for t in result.trials if t.refused],
    }


def remedy_text(result: WhatIf, trial: Trial) -> str:
    """The settings of a trial as a config file."""
    nested: dict[str, Any] = {}
    for key, value in trial.change.patch.items():
        *parents, leaf = key.split(".")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = list(value) if isinstance(value, tuple) else value
    settings = result.capsule.settings
    about = [
        f"Step {result.capsule.step}: {result.capsule.incident.message}",
        f"What helped best of what settings can do: {trial.change.name}.",
        f"In {result.steps + 1} steps: {result_text(trial)}.",
        *(f"It gives up {lost}." for lost in trial.change.gives_up),
        f"bifusion-diag train --model {settings['preset']} --scale {settings['scale']} --config {REMEDY_FILE} ...",
    ]
    comment = "".join(f"# {line}\n" for text in about for line in text.splitlines())
    return comment + yaml.safe_dump(nested, sort_keys=False, allow_unicode=True)


def result_text(trial: Trial) -> str:
    """How it went, in words."""
    if trial.error:
        return trial.error
    if trial.same:
        return "as it was, bit for bit"
    count = len(trial.steps)
    bad = sum(not step.finite for step in trial.steps)
    words = [f"{bad} of {count} steps not finite" if bad else "finite"]
    if trial.bad_state:
        more = f" and {len(trial.bad_state) - 1} more" if len(trial.bad_state) > 1 else ""
        words.append(f"{trial.bad_state[0]}{more} not finite at the end")
    words.append(f"{trial.spikes} spikes" if trial.spikes > 1 else "1 spike" if trial.spikes else "no spike")
    return ", ".join(words)


def print_result(console: Console, result: WhatIf) -> None:
    """The trials as a table, the best first, and what follows."""
    console.print(
        f"What if: step {result.capsule.step} and the {result.steps} after it, from the same state", style="bold"
    )
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", overflow="fold")  # a name cut short is no name
    for title in ("grad norm", "not finite", "spikes", f"loss after {result.steps}", "cost"):
        table.add_column(title, justify="right")
    table.add_column("")
    for trial in result.trials:
        if trial.refused:
            continue
        norm = trial.steps[0].grad_norm if trial.steps else math.nan
        lost = "; ".join(trial.change.gives_up)
        note = trial.error or (f"gives up {lost}" if lost else "")
        if trial.bad_state:
            note = f"{trial.bad_state[0]} is not finite at the end"
        if trial.same:
            note = "as it was, bit for bit"
        table.add_row(
            Text(trial.change.name, style="bold green" if trial in result.helps[:1] else ""),
            Text(f"{norm:.4g}", style="" if math.isfinite(norm) else "red"),
            Text(f"{trial.nonfinite}", style="red" if trial.nonfinite else ""),
            Text(f"{trial.spikes}", style="yellow" if trial.spikes else ""),
            "none" if trial.loss is None else f"{trial.loss:.4f}",
            "" if trial.cost is None else f"{trial.cost:.2f} ×",
            Text(note, style="dim"),
        )
    console.print(table)
    for trial in result.trials:
        if trial.refused:
            console.print(Text(f"not tried: {trial.change.name} ({trial.refused})", style="dim"))
    console.print(Text(f"Loss: {result.yardstick}.", style="dim"))
    if result.note:
        console.print(Text(f"Note: {result.note}.", style="yellow"))
    if not result.helps:
        console.print("Nothing that was tried is better than the step as it was.")
        return
    best = result.helps[0]
    console.print(f"[bold]Best:[/bold] {escape(best.change.name)}", highlight=False)
    for line in best.change.code:
        console.print(Text(line))
    if result.remedy is not None:
        pairs = [f"{key}={_yaml(value)}" for key, value in result.remedy.change.patch.items()]
        patch = " ".join(f"--set {shlex.quote(pair)}" for pair in pairs)
        console.print(Text(f"Settings: {patch}"))


def _part(text: str, settings: remedies.Settings, incident: Incident, own: Sequence[str]) -> Change:
    key, equals, value = text.partition("=")
    if not equals:
        if text in own:
            return Change(text, (text,))
        if text not in remedies.REMEDIES:
            raise UserError(
                f"--what-if takes key=value, a remedy's id, or auto; got {text!r}."
                + near_matches(text, [AUTO, *remedies.REMEDIES, *own])
            )
        return _change(remedies.REMEDIES[text], settings, incident)
    if not settings.ours:
        raise UserError(
            f"--what-if {text}: the settings of your own code are not known here. Give a remedy's id"
            + near_matches("", [*(name for name, one in remedies.REMEDIES.items() if one.action), *own])
        )
    patch = {resolve_key(key.strip()): parse_value(value)}
    return Change(text, patch=patch, action=_action_of(patch))


def _change(one: Remedy, settings: remedies.Settings, incident: Incident) -> Change:
    """A remedy as it applies to the settings or, where no setting does it or there are none, to the update."""
    lost = (one.gives_up,) if one.gives_up else ()
    empty = Change(one.id, (one.id,), gives_up=lost)
    if settings.ours and one.patch is not None:
        patch = one.patch(settings, incident)
        if isinstance(patch, str):
            return replace(empty, refused=patch)
        return replace(empty, patch=patch, action=_action_of(patch))
    if one.action is None:
        return replace(empty, refused="it is a setting of bifusion-diag's own models")
    action = one.action(incident)
    if isinstance(action, str):
        return replace(empty, refused=action)
    return replace(empty, action=action, code=(one.code,))


def _action_of(patch: Mapping[str, Any]) -> Action:
    """What settings change around the update that the course does not do by itself."""
    return Action(skip=patch.get("incidents.policy") == "skip")


def _yaml(value: Any) -> str:
    """A value as --set reads it, on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("...\n").strip()


def _user_code(entry: str, build: Callable[[], Training]) -> UserCode:
    """What the module of an entry gives."""
    build()  # imports it
    path = entry.rpartition(":")[0]
    module = sys.modules[Path(path).stem if path.endswith(".py") else path]
    batches, own = getattr(module, "batches", None), getattr(module, "remedies", None)
    return UserCode(build, batches if callable(batches) else None, dict(own()) if callable(own) else None)


def _user_start(capsule: Capsule, code: UserCode, steps: int) -> Callable[[Change], Course | str]:
    def start(change: Change) -> Course | str:
        own = [code.remedies[name] for name in change.remedies if code.remedies and name in code.remedies]
        try:
            return UserCourse(code.build(), capsule, steps, code.batches, change.action.drop, own)
        except UserError as error:
            if change.name == AS_IT_WAS:
                raise
            return str(error)

    return start


def _norms_before(capsule: Capsule) -> list[float]:
    """The pre-clip gradient norms of the steps before, of the record beside the capsule; none without one."""
    parent = capsule.folder.resolve().parent
    stem = parent.name.removesuffix(".incidents")
    for path in (parent.with_name(f"{stem}.json"), parent.with_name(f"{stem}.record")):
        if not path.exists():
            continue
        try:
            series = load_run(path).series(NORM)
        except UserError:
            continue
        if series is not None:
            before = (series.steps < capsule.step) & (series.missing == 0)
            return [float(norm) for norm in series.value[before][-WINDOW:] if math.isfinite(norm) and norm > 0]
    return []


def _leaves(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for name, value in values.items():
        keys += _leaves(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [f"{prefix}{name}"]
    return keys
