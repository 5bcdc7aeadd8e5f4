"""A recorded run, trained once more with other probes, and held to its record bit for bit."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from bifusion_diag.config import Settings, settings_from_dict
from bifusion_diag.errors import UserError
from bifusion_diag.probes.ranks import gather, own_rank, world_size
from bifusion_diag.record import Event, RecordError, RecordReader, Run, RunHeader, load_run, record_folder, resolve_run
from bifusion_diag.record.schema import FINGERPRINT
from bifusion_diag.training import Trainer
from bifusion_diag.training.checkpoint import Checkpoint, checkpoint_folder, nearest_checkpoint
from bifusion_diag.training.determinism import not_deterministic
from bifusion_diag.training.distributed import process_group
from bifusion_diag.training.trainer import Again

GRAD_NORM = "train/grad_norm"
_AFTER = 1 << 30  # sorts the weights after a step behind what is recorded of the step
_SHOWN = 60  # characters of a value
#: What may differ without a word: when a step is evaluated, and what is done about incidents, is not what it computes.
_NOT_COMPARED = ("validation", "replay", "flight_recorder")

Column = tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.bool_]]  # steps, values, missing: each (R,)


@dataclass(frozen=True)
class Difference:
    """The first thing that did not come out as recorded.

    Attributes:
        step: at which it shows; of weights, the step that they come of, or the first one if that begins with them.
        quantity: a series, or "weights".
        recorded: its value in the record: a number, "not recorded", or of weights a digest.
        here: its value in the replay.
        text: all of it in a sentence.
    """

    step: int
    quantity: str
    recorded: str
    here: str
    text: str


@dataclass(frozen=True)
class Rerun:
    """What came of a replay.

    Attributes:
        out: the new run.json.
        first: the first step that was re-executed: that of the checkpoint, or 0.
        last: the last one.
        checkpoint: folder of the checkpoint that it began with. None: the beginning of the run.
        compared: steps compared, by series; of "weights", how often.
        difference: the first one. None: everything that could be compared is the same to the bit.
        reasons: why it may differ; empty without a difference.
        lines: all of it in words; of several processes, rank 0 has them.
    """

    out: Path
    first: int
    last: int
    checkpoint: Path | None
    compared: Mapping[str, int]
    difference: Difference | None
    reasons: Sequence[str]
    lines: Sequence[str]

    @property
    def identical(self) -> bool:
        """Whether something was compared, and all of it is the same to the bit."""
        return self.difference is None and bool(self.compared)


def rerun(
    run_json: Path,
    *,
    steps: tuple[int, int] | None = None,
    probes: Sequence[str] = (),
    out: Path | None = None,
    console: Console,
) -> Rerun:
    """Re-execute steps of a recorded run from its nearest checkpoint, or else from its beginning.

    Losses, the pre-clip gradient norm and the digests of the weights must be those of the record, to the bit. The
    run's evaluations, which leave no trace in training, are left out. On a CPU, it uses as many threads as the run.

    Args:
        run_json: a run.json, its folder, or the .record folder of a run that was killed.
        steps: first step, and the step before which it ends. None: all that are recorded.
        probes: names of probes that measure these steps; the losses are always measured.
        out: the run.json to write. None: ``<stem>.replay.json`` beside the run's.
        console: where progress is shown.

    Raises:
        UserError: the run cannot be read or trained again here, steps it does not have, a damaged checkpoint, another
            number of processes than the run had.
    """
    recorded = _recorded(run_json)
    settings = _settings(recorded)
    ranks = recorded.header.environment.get("ranks", 1)
    begin, end = _span(steps, recorded, settings.training.steps)
    out = out or recorded.path.with_name(f"{recorded.path.stem}.replay.json")
    if record_folder(out).resolve() in (record_folder(recorded.path).resolve(), recorded.folder.resolve()):
        raise UserError(f"{out}: that is where the run itself is recorded; give the replay another path with --out")
    checkpoint = _checkpoint(recorded, settings, begin)
    first = 0 if checkpoint is None else checkpoint.step
    command = ["replay", str(run_json), *([] if steps is None else ["--steps", f"{begin}:{end}"])]
    command += [part for probe in probes for part in ("--probe", probe)]
    with process_group(settings.training.device), _threads_kept():
        if world_size() != ranks:
            many = f"by {ranks} processes" if ranks > 1 else "by one process"
            start = f"torchrun --nproc-per-node {ranks} -m bifusion_diag" if ranks > 1 else "bifusion-diag"
            raise UserError(f"{run_json} was trained {many}: replay it with {start} {shlex.join(command)}")
        if own_rank():
            recorded = _recorded(recorded.path, own_rank())
        digests = _digests(recorded.events)
        if checkpoint is not None and "weights" in checkpoint.info:
            digests.setdefault(first, checkpoint.info["weights"])
        origin = {"of": recorded.header.run_id, "run": str(run_json), "first": begin, "end": end}
        origin["checkpoint"] = None if checkpoint is None else checkpoint.folder.name
        again = Again(end, begin, frozenset(digests), origin)
        Trainer(_again(settings, recorded.header), out, probes, command, console, checkpoint, again).run()
        new = RecordReader(record_folder(out, own_rank()))
        compared, found = _compare(recorded, digests, new, first)
        found = min((one for one in gather(found) if one is not None), default=None, key=lambda one: one.order)
        speaks = own_rank() == 0
    last = int(new.steps[-1]) if len(new.steps) else first - 1
    difference = None if found is None else found.difference
    where = None if checkpoint is None else checkpoint.folder
    reasons = [] if difference is None else _reasons(recorded, new, difference, where)
    lines = _lines(recorded, compared, difference, reasons, first, last, begin, where)
    return Rerun(out, first, last, where, compared, difference, reasons, lines if speaks else [])


def rerun_command(path: Path, *, steps: str | None, probes: Sequence[str], out: Path | None, console: Console) -> int:
    """`bifusion-diag replay run.json`: re-execute, and print what came of it.

    Args:
        path: as `run_json` of :func:`rerun`.
        steps: "120:140", the first step and the one before which it ends.
        probes: as in :func:`rerun`.
        out: as in :func:`rerun`.
        console: where the result is printed; progress goes to stderr.

    Returns:
        The exit code: 0 identical, 1 not identical or nothing to compare with.
    """
    found = rerun(path, steps=_parsed(steps), probes=probes, out=out, console=Console(stderr=True))
    if found.lines:
        for line in [*found.lines, f"recorded in {found.out}"]:
            console.print(line, soft_wrap=True, highlight=False, markup=False, emoji=False)
    return 0 if found.identical else 1


def _parsed(steps: str | None) -> tuple[int, int] | None:
    if steps is None:
        return None
    first, _, end = steps.partition(":")
    try:
        return int(first), int(end)
    except ValueError as error:
        raise UserError(
            f"--steps {steps}: give the first step and the one before which to end, for example --steps 120:140"
        ) from error


class _Recorded(NamedTuple):
    """The record of a run, as exactly as it is still there."""

    path: Path  # of its run.json, whether that is there or not
    folder: Path
    header: RunHeader
    reader: RecordReader | None  # None: only the run.json is left
    run: Run | None  # None: there is no run.json
    steps: NDArray[np.int64]
    events: list[Event]

    def columns(self, names: Sequence[str]) -> dict[str, Column]:
        """What is recorded of each step, of those series of which that is still known."""
        if self.reader is not None:
            names = [name for name in names if name in set(self.reader.names)]
            values, missing = self.reader.columns(names)
            return {name: (self.reader.steps, values[:, i], missing[:, i]) for i, name in enumerate(names)}
        assert self.run is not None
        found = {name: one for name in names if (one := self.run.series(name)) is not None and one.exact}
        return {n: (one.steps, one.value.astype(np.float32), one.missing > 0) for n, one in found.items()}


def _recorded(path: Path, rank: int = 0) -> _Recorded:
    path = resolve_run(path)
    if path.is_dir():
        folder, path = path, path.with_name(f"{path.name.removesuffix('.record')}.json")
        run = None
    else:
        folder = record_folder(path, rank)
        run = None if not path.exists() and folder.is_dir() else load_run(path)
    try:
        reader = RecordReader(folder)
    except RecordError:
        if run is None or rank:
            raise
        reader = None
    if run is not None and reader is not None and reader.state.header.run_id != run.header.run_id and not rank:
        reader = None  # a later run's, of the same name
    if reader is not None:
        header = reader.state.header
        return _Recorded(path, folder, header, reader, run, reader.steps, reader.events())
    assert run is not None
    return _Recorded(path, folder, run.header, None, run, run.steps, run.events)


def _settings(recorded: _Recorded) -> Settings:
    header = recorded.header
    if header.environment.get("rank", 0):
        raise UserError(f"{recorded.folder} is the record of one of several processes: give the run.json of the run")
    if not header.preset or "model" not in header.settings:
        raise UserError(
            f"{recorded.path}: only runs of `bifusion-diag train` can be rebuilt from their record; of a loop of your "
            "own, replay the capsules of its incidents with --entry"
        )
    return settings_from_dict(header.settings, str(recorded.path))


def _span(steps: tuple[int, int] | None, recorded: _Recorded, planned: int) -> tuple[int, int]:
    if not len(recorded.steps):
        raise UserError(f"{recorded.path}: no step is recorded: there is nothing to re-execute")
    begin, end = steps or (0, int(recorded.steps[-1]) + 1)
    if not 0 <= begin < end <= planned:
        raise UserError(
            f"--steps {begin}:{end}: the run has steps 0 to {planned - 1}. Give the first step and the one before "
            "which to end, for example --steps 120:140"
        )
    return begin, end


def _checkpoint(recorded: _Recorded, settings: Settings, begin: int) -> Checkpoint | None:
    checkpoint = nearest_checkpoint(checkpoint_folder(recorded.path), begin)
    if checkpoint is None or checkpoint.step == 0:
        return None
    where = str(checkpoint.folder)
    if settings_from_dict(checkpoint.info["settings"], where) != settings:
        raise UserError(f"{where} is a checkpoint of a run with other settings; move it away to begin at step 0")
    return checkpoint


def _again(settings: Settings, header: RunHeader) -> Settings:
    """The settings of the replay: where and with how many threads the run ran, as far as they left that open."""
    then = header.environment
    training: dict[str, Any] = {"checkpoint_every": 0}
    if then.get("device") == "cpu":
        training |= {"device": "cpu", "threads": then.get("threads", settings.training.threads)}
    return settings.model_copy(
        update={
            "training": settings.training.model_copy(update=training),
            "evaluation": settings.evaluation.model_copy(update={"every": 0}),
        }
    )


@contextmanager
def _threads_kept() -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _digests(events: Sequence[Event]) -> dict[int, str]:
    """Digests of the weights by the number of steps done."""
    return {event.data["done"]: event.data["weights"] for event in events if event.kind == FINGERPRINT}


class _Found(NamedTuple):
    order: tuple[int, int]  # step, and place in the step: the order in which things are computed
    difference: Difference


def _compare(
    recorded: _Recorded, digests: Mapping[int, str], new: RecordReader, first: int
) -> tuple[dict[str, int], _Found | None]:
    """How many steps of each quantity were compared, and the first difference."""
    losses = [name for name in new.names if name.startswith("loss/") and name != "loss/total"]
    names = [*losses, *(name for name in ("loss/total", GRAD_NORM) if name in new.names)]
    values, missing = new.columns(names)
    old = recorded.columns(names)
    compared: dict[str, int] = {}
    found: list[_Found] = []
    for place, name in enumerate(names):
        if name not in old:
            continue
        steps, then, gone = old[name]
        common, i, j = np.intersect1d(steps, new.steps, return_indices=True)
        if not len(common):
            continue
        compared[name] = len(common)
        one = (then[i], gone[i])
        two = (values[j, place], missing[j, place])
        differ = _differ(*one, *two)
        if differ.any():
            at = int(np.argmax(differ))
            step, was, is_ = int(common[at]), _shown(one[0][at], one[1][at]), _shown(two[0][at], two[1][at])
            text = f"step {step}: {name} is {is_}, recorded is {was}"
            found.append(_Found((step, place), Difference(step, name, was, is_, text)))
    for done, here in sorted(_digests(new.events()).items()):
        saved = digests[done]  # the replay was told which to take
        compared["weights"] = compared.get("weights", 0) + 1
        if saved != here:
            what = "the weights after"
            if done == first:
                what = "the checkpoint's weights after" if first else "the weights that it begins with, after"
            text = f"{what} {done} steps have digest {here[:12]}, recorded is {saved[:12]}"
            step = done if done == first else done - 1
            found.append(_Found((done - 1, _AFTER), Difference(step, "weights", saved, here, text)))
    return compared, min(found, default=None, key=lambda one: one.order)


def _differ(
    one: NDArray[np.float32], no_one: NDArray[np.bool_], two: NDArray[np.float32], no_two: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Where two series (R,) are not the same to the bit. All NaNs are the same; what is missing is so in both."""
    bits = np.ascontiguousarray(one).view(np.uint32) != np.ascontiguousarray(two).view(np.uint32)
    bits &= ~(np.isnan(one) & np.isnan(two))
    differ: NDArray[np.bool_] = np.where(no_one | no_two, no_one != no_two, bits)
    return differ


def _shown(value: np.float32, missing: np.bool_) -> str:
    return "not recorded" if missing else repr(value.item())


def _reasons(recorded: _Recorded, new: RecordReader, difference: Difference, checkpoint: Path | None) -> list[str]:
    """What differs between the run's surroundings and these, and what else may make steps differ."""
    then, now = recorded.header, new.state.header
    reasons = _unequal(then.environment, now.environment, ("rank", "ranks"))
    reasons += _unequal(then.provenance, now.provenance, _NOT_COMPARED)
    if difference.quantity == "weights" and checkpoint is not None and difference.text.startswith("the checkpoint"):
        reasons.append(f"{checkpoint}: its file does not hold what was saved")
    if then.environment.get("git", {}) and then.environment["git"].get("modified"):
        reasons.append("the run's code had changes that its git commit does not hold")
    engine = str(then.provenance.get("sparse_engine", ""))
    for environment, whose in ((then.environment, "the run"), (now.environment, "the replay")):
        if sentence := not_deterministic(engine, environment):
            reasons.append(f"{whose}: {sentence}")
    resumed = [event.step for event in recorded.events if event.kind == "resume" and event.step is not None]
    if any(difference.step < step for step in resumed):
        where = ", ".join(map(str, resumed))
        reasons.append(f"the run was resumed at step {where}; only the surroundings of its last part are recorded")
    policy = then.settings.get("incidents", {}).get("policy")
    if checkpoint is not None and policy == "rollback":
        reasons.append("the run went back to earlier states at incidents, and a checkpoint does not hold these")
    if not reasons:
        reasons.append(
            "nothing that is recorded of the run's machine, versions, threads, engine and data differs from here: the "
            "record or a checkpoint was changed, or an operation is not deterministic"
        )
    return reasons


def _unequal(then: Mapping[str, Any], now: Mapping[str, Any], left_out: Sequence[str]) -> list[str]:
    one, two = _flat(then), _flat(now)
    keys = [key for key in dict.fromkeys([*one, *two]) if key.split(".")[0] not in left_out]
    return [f"{k}: {_word(one, k)} in the run, {_word(two, k)} here" for k in keys if one.get(k) != two.get(k)]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def _word(values: Mapping[str, Any], key: str) -> str:
    text = "nothing" if values.get(key) is None else str(values[key])
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def _lines(
    recorded: _Recorded,
    compared: Mapping[str, int],
    difference: Difference | None,
    reasons: Sequence[str],
    first: int,
    last: int,
    begin: int,
    checkpoint: Path | None,
) -> list[str]:
    start = "its first step" if checkpoint is None else f"the checkpoint {checkpoint.name}"
    lines = [f"re-executed steps {first} to {last} of {recorded.path}, from {start}"]
    if first < begin:
        lines[0] += f"; probes measure from step {begin} on"
    if recorded.reader is None:
        lines.append(f"{recorded.folder} is not there: compared with what run.json kept exactly")
    steps = max((count for name, count in compared.items() if name != "weights"), default=0)
    if not compared:
        lines.append("nothing to compare with: of these steps, the record holds neither exact losses nor digests")
    elif difference is None:
        terms = sum(name.startswith("loss/") for name in compared)
        what = [f"{terms} losses"] * bool(terms) + ["the pre-clip gradient norm"] * (GRAD_NORM in compared)
        parts = [f"{' and '.join(what)} of {steps} steps"] * bool(what)
        if weights := compared.get("weights"):
            parts.append(f"the weights at {weights} of them" if parts else f"the weights at {weights} steps")
        lines.append(f"bit-identical: {', '.join(parts)}")
    else:
        lines.append(f"not identical. The first difference: {difference.text}")
        lines += [f"  it may be because: {reason}" for reason in reasons]
    if steps and steps < last - first + 1:
        lines.append(f"{last - first + 1 - steps} of the re-executed steps are not recorded: not compared")
    return lines
