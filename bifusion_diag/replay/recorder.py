"""The flight recorder: watches every step's signs of life, and takes a bad step apart before its update."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import statistics
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from bifusion_diag.errors import UserError, near_matches
from bifusion_diag.probes.ranks import agree, gather, own_rank, world_size
from bifusion_diag.replay.capsules.capsule import CapsuleWriter
from bifusion_diag.replay.examine.batches import Names, Split, cut, sample_names, sample_notes
from bifusion_diag.replay.examine.diagnose import diagnose
from bifusion_diag.replay.examine.gradient_end import where_gradient_ends
from bifusion_diag.replay.examine.samples import sample_shares
from bifusion_diag.replay.incident import Incident, Reproduction, Trigger
from bifusion_diag.replay.notes import StepNotes
from bifusion_diag.replay.sights import Sight, where_it_began
from bifusion_diag.replay.step import StepFunction, Training
from bifusion_diag.replay.watch.detect import DEFAULT_BOUNDS, Bounds, Detector
from bifusion_diag.replay.watch.rules import Rule, make_rules
from bifusion_diag.replay.watch.sentinel import Sentinel
from bifusion_diag.replay.watch.vitals import Vitals

Policy = Literal["record", "skip", "rollback", "stop"]
POLICIES: tuple[Policy, ...] = get_args(Policy)
Event = Callable[[int, str, str, dict[str, Any]], None]

IN_A_ROW = 2  # of bad steps that follow each other at once, so many are taken apart
EXAMS = 0.005  # a step: how often the samples of a merely odd step are run one by one
MOST_EXAMS = 3.0  # in a short time
SCENES = 16  # of a batch that an event names where no sample is guilty
DIVERGENCE_EVERY = 5  # steps between comparisons of the ranks' weights
ALIKE = 20  # of incidents with one kind and place, so many are taken apart in a run


class BadStepError(RuntimeError):
    """The policy "stop" has ended a run at a bad step.

    Attributes:
        incident: what was found.
        updated: its update is done: the alarm came of what it did to the weights. Else everything is as the step began.
    """

    keeps_row = True  # the step itself was measured, and is recorded

    def __init__(self, incident: Incident, *, updated: bool = False) -> None:
        when = "after" if updated else "before"
        super().__init__(f"step {incident.step}: {incident.triggers[0].message}; stopped {when} the update")
        self.incident = incident
        self.updated = updated


def _guarded(method: Callable[..., None]) -> Callable[..., None]:
    """A defect of ours, or of a rule of the user's, switches the recorder off: training goes on. Of several processes
    it is raised, as the others would wait."""

    @functools.wraps(method)
    def call(self: FlightRecorder, *arguments: Any) -> None:
        if self._off:
            return
        try:
            method(self, *arguments)
        except BadStepError:
            raise
        except Exception as error:
            if world_size() > 1:
                raise
            self._switch_off(f"{method.__name__}: {type(error).__name__}: {error}")

    return call


@dataclass
class _Snapshot:
    """A good state to go back to."""

    step: int
    model: dict[str, Any]
    optimizers: list[dict[str, Any]]


class FlightRecorder:
    """Notes how each step began, and when a step is bad runs it again, exactly, to find out why::

        recorder = FlightRecorder(lambda batch: losses(model(batch[0]), batch[1]))
        with Monitor(model, optimizer, out="runs/mine", recorder=recorder) as monitor:
            for batch in loader:
                with monitor.step(batch):
                    loss = ...                 # the same as the step function computes
                    loss.backward()
                    optimizer.step()           # judged here, before anything is updated

    A healthy step costs the notes (random generators, buffers, a copy of the batch) and its signs of life: sums of
    squares of the gradients, a few numbers of the batch and of the weights. A bad step is run again up to some thirty
    times, by which training itself is not changed: weights, gradients, buffers and random numbers are then as they
    would have been. What is done about the update is the policy's.

    Args:
        step: from a batch to its loss, forward and loss as the loop does them, autocast included, and no backward. With
            gradient accumulation it is given what monitor.step was given, and returns the sum. None: incidents are
            detected and captured, but not run again here.
        on_incident: "record" does the update all the same; "skip" leaves it out and takes the forward's buffers back;
            "rollback" goes back to a state of some steps before; "stop" raises :class:`BadStepError`.
        capsules: how many incidents are written as capsules in a run; 0 = none.
        capsule_limit: largest capsule, as "2 GB", "500 MB" or a number of bytes.
        rules: functions from :class:`Vitals` to a message or None, or texts such as "loss/mask > 10".
        bounds: of the detector.
        split: batch → one batch a sample. None: tensors are cut along their first dimension.
        names: batch → a name a sample. None: found in the batch.
        settings: of the run, JSON: stored in capsules.
        state: function that returns what else decides a step, such as a scheduler's state_dict: stored in capsules.
        rebuilt: names of parameters that need not be stored in capsules, as the settings give them again.
        keep_every: of "rollback": steps between the states that are kept.

    Raises:
        UserError: unknown policy, a rule or a size that cannot be read.
    """

    def __init__(
        self,
        step: StepFunction | None = None,
        *,
        on_incident: Policy = "record",
        capsules: int = 10,
        capsule_limit: str | int = "2 GB",
        rules: Sequence[str | Rule] = (),
        bounds: Bounds = DEFAULT_BOUNDS,
        split: Split | None = None,
        names: Names | None = None,
        settings: Mapping[str, Any] | None = None,
        state: Callable[[], Mapping[str, Any]] | None = None,
        rebuilt: Iterable[str] = (),
        keep_every: int = 10,
    ) -> None:
        if on_incident not in POLICIES:
            raise UserError(f"on_incident={on_incident!r} is no policy.{near_matches(str(on_incident), POLICIES)}")
        self.policy = on_incident
        self.sentinel = Sentinel(self._suspicious)
        self.detector = Detector(bounds, make_rules(rules))
        self.incidents: list[Incident] = []
        self._step_function = step
        self._capsules = CapsuleWriter(
            capsules, capsule_limit, settings=settings or {}, state=state, rebuilt=frozenset(rebuilt)
        )
        self._split, self._names = split, names
        self._keep_every = keep_every
        self._notes: StepNotes | None = None
        self._before: StepNotes | None = None  # of the last healthy step
        self._earlier: list[StepNotes] = []  # of two healthy steps, as a shift is only seen after some bad ones
        self._spare: StepNotes | None = None
        self._good: list[_Snapshot] = []
        self._judged = False
        self._in_a_row = 0
        self._took = 0.0  # s, of the step under way up to where it is judged; 0: it is not yet
        self._seconds: deque[float] = deque(maxlen=20)  # of healthy steps
        self._alike: dict[tuple[str, str | None, str | None], int] = {}
        self._diverged = False
        self._off = False
        self._credit = MOST_EXAMS

    # --- called by the Monitor -----------------------------------------------------------------------------------

    def open(
        self,
        model: nn.Module,
        optimizers: tuple[Optimizer, ...],
        scaler: GradScaler | None,
        paused: Callable[[], AbstractContextManager[None]],
        folder: Path | None,
        event: Event,
    ) -> None:
        """Training begins.

        Args:
            model: without DistributedDataParallel around it.
            optimizers: that train it.
            scaler: of mixed precision.
            paused: context in which the Monitor measures nothing.
            folder: where capsules are written, one folder each; None: nowhere.
            event: called with every incident: its step, kind, message and facts.
        """
        self._training = Training(model, self._step_function or _cannot_run, optimizers, scaler)
        self._paused = paused
        self._capsules.open(model, folder)
        self._event = event

    @_guarded
    def begin(self, number: int, batch: Any) -> None:
        """A step begins with this batch, which is loaded."""
        self._judged, self._took = False, 0.0
        self._triggers: list[Trigger] = []
        self._vitals: Vitals | None = None
        self._began = time.perf_counter()
        self._notes, self._spare = StepNotes(self._training.model, number, batch, self._spare), None
        if self.policy == "rollback" and number % self._keep_every == 0 and self._in_a_row == 0:
            self._keep(number)

    @_guarded
    def before_update(self, optimizer: Optimizer) -> None:
        """An optimiser is about to step: judge the step, once.

        Raises:
            BadStepError: it is bad and the policy is "stop".
        """
        if not self._judged and self._notes is not None:
            self._judged, self._took = True, time.perf_counter() - self._began
            self._vitals = self.sentinel.measure(self._notes.number)
            self._judge(self._vitals, optimizer)

    @_guarded
    def end(self) -> None:
        """The step block ends; also where no optimiser has stepped in it.

        Raises:
            BadStepError: as above.
        """
        if self._notes is None:
            return
        if not self._judged:
            self._judged, self._took = True, time.perf_counter() - self._began
            self._vitals = self.sentinel.measure(self._notes.number)
            self._judge(self._vitals, None)
        assert self._vitals is not None
        vitals = self.sentinel.updated(self._vitals)
        if not self._triggers:
            triggers = self.detector.judge_update(vitals)
            if self._agreed(bool(triggers)):
                self._handle(vitals, triggers, None, updated=True)
        self.detector.remember(vitals)
        self._in_a_row = self._in_a_row + 1 if self._triggers else 0
        if not self._triggers:
            self._seconds.append(self._took)
        if self._triggers:
            self._spare, self._notes = self._notes, None  # the last healthy step stays the one to compare with
        else:
            last, self._before, self._notes = self._before, self._notes, None
            self._spare = self._free(last)

    def _free(self, last: StepNotes | None) -> StepNotes | None:
        """Which of the notes is needed no more, when those before the last healthy step's are these."""
        if last is None or last.number % self.detector.bounds.shift_steps:
            return last
        self._earlier.append(last)
        return self._earlier.pop(0) if len(self._earlier) > 2 else None

    def _contrast(self, triggers: Sequence[Trigger]) -> StepNotes | None:
        """The last step from before all that is bad."""
        since = min((t.since for t in triggers if t.kind == "loss-shift" and t.since is not None), default=None)
        earlier = [notes for notes in self._earlier if since is not None and notes.number < since]
        return earlier[-1] if earlier else self._before

    def failed(self, error: BaseException) -> None:
        """The step has raised an error: say what led to it. Never raises."""
        if self._notes is None or isinstance(error, (BadStepError, KeyboardInterrupt, GeneratorExit, SystemExit)):
            return
        if world_size() > 1:
            return  # the others would wait
        try:
            vitals = self.sentinel.measure(self._notes.number)
            message = f"{type(error).__name__}: {error}".splitlines()[0]
            trigger = Trigger("exception", f"the step raised {message}")
            self._handle(vitals, [*self.detector.judge(vitals), trigger], None, updated=False, error=error)
        except Exception as second:
            warnings.warn(f"the error of step {self._notes.number} could not be diagnosed: {second}", stacklevel=2)

    def _switch_off(self, why: str) -> None:
        step = -1 if self._notes is None else self._notes.number
        self._off, self._notes = True, None
        message = f"the flight recorder is off: {why}"
        self._event(step, "recorder", message, {})
        warnings.warn(f"step {step}: {message}. Training goes on.", RuntimeWarning, stacklevel=4)

    def announce(self, what: str) -> None:
        """Say that the next step is meant to be different: a stage, a schedule, new losses, frozen parts. What the
        detector expected of modules, gates and levels is forgotten."""
        self.detector.forget(what)

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on later needs, JSON."""
        return {"detector": self.detector.state(), "capsules": self._capsules.written}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` returned."""
        self.detector.restore(state["detector"])
        self._capsules.written = int(state.get("capsules", 0))

    # --- a bad step ----------------------------------------------------------------------------------------------

    def _suspicious(self, vitals: Vitals) -> bool:
        """Asked by the sentinel when a backward has ended: whether to take the gradients' digests."""
        return bool(self.detector.judge(vitals) or self.detector.suspects(vitals))

    def _judge(self, vitals: Vitals, optimizer: Optimizer | None) -> None:
        triggers = [trigger for trigger in self.detector.judge(vitals) if not self._is_unused(trigger)]
        triggers += self._divergence(vitals.step)
        if not triggers and world_size() == 1:
            triggers = self._of_one_sample(vitals)
        if self._agreed(bool(triggers)):
            self._handle(vitals, triggers, optimizer, updated=False)

    def _is_unused(self, trigger: Trigger) -> bool:
        """Whether a module that has never got a gradient is one that no loss uses: a head of another task, a term whose
        weight is still 0. That is a waste and no incident."""
        if trigger.kind != "detached-module" or trigger.since != 0 or trigger.module is None:
            return False
        if not self._runs_again:
            return True  # it cannot be told
        assert self._notes is not None
        with self._paused():
            end = where_gradient_ends(self._training, self._notes, trigger.module)
        return end is not None and end.op in ("unused", "not run")

    def _of_one_sample(self, vitals: Vitals) -> list[Trigger]:
        """A loss that is merely odd is an incident if one sample alone makes it so. Looking costs several step times:
        there are credits for it."""
        self._credit = min(self._credit + EXAMS, MOST_EXAMS)
        if self._credit < 1 or not self._runs_again or self._before is None:
            return []
        suspects = self.detector.suspects(vitals)
        if not suspects:
            return []
        self._credit -= 1
        assert self._notes is not None
        terms = [suspect.term for suspect in suspects if suspect.term is not None]
        try:
            with self._paused():
                found = sample_shares(
                    self._training,
                    self._notes,
                    "loss-spike",
                    contrast=self._before,
                    split=self._split,
                    names=self._names,
                    terms=terms,
                )
        except Exception as error:
            warnings.warn(f"step {vitals.step}: its samples were not looked at: {error}", RuntimeWarning, stacklevel=2)
            return []
        if len(found.shares) != 1:
            return []
        return [dataclasses.replace(suspect, sample=found.shares[0].index) for suspect in suspects]

    @property
    def _runs_again(self) -> bool:
        return self._step_function is not None and self._notes is not None and self._notes.has_batch

    def _divergence(self, step: int) -> list[Trigger]:
        """Told once, by the ranks that hold other weights than most; of two, by the second."""
        if world_size() == 1 or self._diverged or step % DIVERGENCE_EVERY:
            return []
        digests = gather(self.sentinel.weights_digest())
        if len(set(digests)) == 1:
            return []
        self._diverged = True
        most = max(digests, key=digests.count)  # of equally many, that of the lowest rank
        modules = gather(self.sentinel.module_digests())
        usual = modules[digests.index(most)]
        mine = [name for name, digest in modules[own_rank()].items() if digest != usual.get(name)]
        if not mine:
            return []
        said = f"rank {own_rank()} holds other weights than rank {digests.index(most)} in {len(mine)} modules"
        return [Trigger("rank-divergence", f"{said}, first {mine[0]}", module=mine[0])]

    def _agreed(self, bad: bool) -> bool:
        """Whether the step is bad on some rank, as all of them know."""
        return bad if world_size() == 1 else bool(agree([bad]).flags[0])

    def _handle(
        self,
        vitals: Vitals,
        triggers: list[Trigger],
        optimizer: Optimizer | None,
        *,
        updated: bool,
        error: BaseException | None = None,
    ) -> None:
        """A step is bad, on some rank: take it apart where it began, act, tell."""
        assert self._notes is not None
        self._triggers = triggers or [Trigger("rank-divergence", "another process has a bad step")]
        loss = math.nan if vitals.total is None else vitals.total
        norm = math.nan if vitals.grad_norm is None else vitals.grad_norm
        apart = any(trigger.kind == "rank-divergence" for trigger in triggers)
        sights = gather(Sight(loss, norm if vitals.local_norm is None else vitals.local_norm, apart))
        ranks = where_it_began(sights) if len(sights) > 1 else [0]
        mine = self._explain(vitals, self._triggers, error) if own_rank() in ranks else None
        of_first = gather(None if mine is None else (mine.harmless, self._scenes(mine)))
        harmless = all(found[0] for found in of_first if found is not None)
        action = self._act(optimizer, updated=updated, harmless=harmless)
        if mine is not None:
            mine = dataclasses.replace(mine, action=action)
            with self._paused():
                folder, note = self._capsules.write(
                    mine, self._training, self._notes, self.sentinel.fingerprint, updated=updated
                )
            mine = dataclasses.replace(mine, capsule=folder, capsule_note=note)
        stored = next(one for one in gather(None if mine is None else mine.to_dict()) if one is not None)
        incident = Incident.from_dict(stored)
        self.incidents.append(incident)
        facts = {
            "loss": sights[ranks[0]].loss,
            "grad_norm": norm,
            "terms": list(incident.terms),
            "scenes": [name for found in of_first if found is not None for name in found[1][0]],
            "scene_notes": [notes for found in of_first if found is not None for notes in found[1][1]],
        }
        where = ""
        if len(sights) > 1:
            where = f" on rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
            facts |= {"rank": ranks[0], "ranks": ranks, "local_norms": [sight.local_norm for sight in sights]}
        self._event(incident.step, incident.family, f"{incident.message}{where}", facts | incident.facts())
        self._do(action, updated=updated)
        if action == "stop":
            if not updated and self._notes is not None:
                # What is saved now is gone on from with this step: with its random numbers and healthy buffers.
                self._notes.start.restore(self._training.model)
            raise BadStepError(incident, updated=updated)

    def _scenes(self, incident: Incident) -> tuple[list[str], list[list[str]]]:
        """The guilty samples and what is known of them; where none is named, those of the batch."""
        if incident.samples or self._notes is None or not self._notes.has_batch:
            named = [sample.name or f"sample {sample.index}" for sample in incident.samples]
            return named, [list(sample.notes) for sample in incident.samples]
        batch = self._notes.batch()
        try:
            size = cut(batch, self._split).size
            names = sample_names(batch, size, self._names)
        except UserError:  # its samples cannot be told apart
            return [], []
        notes = [list(told) for told in sample_notes(batch, size)[:SCENES]]
        return [name for name in names[:SCENES] if name is not None], notes

    def _explain(self, vitals: Vitals, triggers: list[Trigger], error: BaseException | None) -> Incident:
        """The incident, taken apart as far as it is worth it. Never raises."""
        assert self._notes is not None
        took = self._took or time.perf_counter() - self._began
        first, took = triggers[0], max(took, statistics.median(self._seconds or [0.0]))
        plain = Incident(vitals.step, first.kind, tuple(triggers), rank=own_rank(), step_seconds=took)
        place = (first.kind, first.module, first.term)
        self._alike[place] = self._alike.get(place, 0) + 1
        why_not = ""
        if self._step_function is None:
            why_not = "no step function was given to the recorder"
        elif not self._notes.has_batch:
            why_not = "monitor.step() was not given the batch"
        elif self._in_a_row >= IN_A_ROW:
            why_not = f"the {IN_A_ROW} steps before were bad too: see their incidents"
        elif self._alike[place] > ALIKE:
            why_not = f"{ALIKE} incidents of this kind and place were taken apart before it"
        if why_not:
            return dataclasses.replace(plain, reproduction=Reproduction(None, difference=why_not))
        try:
            with self._paused():
                return diagnose(
                    plain,
                    self._training,
                    self._notes,
                    vitals,
                    self.sentinel.fingerprint,
                    contrast=self._contrast(triggers),
                    history=self.detector.typical(),
                    split=self._split,
                    names=self._names,
                    error=error,
                )
        except Exception as problem:
            message = f"{type(problem).__name__}: {problem}"
            warnings.warn(
                f"step {vitals.step}: the incident was not explained: {message}", RuntimeWarning, stacklevel=2
            )
            return dataclasses.replace(plain, reproduction=Reproduction(None, difference=message))

    def _act(self, optimizer: Optimizer | None, *, updated: bool, harmless: bool) -> Policy:
        """What the policy means here. All ranks come to the same."""
        if self.policy == "rollback" and not self._good:
            return "skip" if optimizer is not None and not updated else "record"
        if self.policy == "skip" and (updated or optimizer is None or harmless):
            return "record"  # done already, or its gradients are good
        return self.policy

    def _do(self, action: Policy, *, updated: bool) -> None:
        assert self._notes is not None
        if action == "record":
            return
        if action in ("skip", "rollback") and not updated:
            for parameter in self._training.model.parameters():
                parameter.grad = None
            for held in self._training.optimizers:
                for group in held.param_groups:
                    for parameter in group["params"]:
                        parameter.grad = None
            self._notes.start.restore_buffers(self._training.model)
        if action == "rollback":
            snapshot = self._good[0]
            self._training.model.load_state_dict(snapshot.model)
            for held, state in zip(self._training.optimizers, snapshot.optimizers, strict=True):
                held.load_state_dict(copy.deepcopy(state))
            self.sentinel.weights_changed()

    def _keep(self, number: int) -> None:
        """Keep a state to go back to; the one before it too, as what goes wrong may have begun before it shows."""
        model = {name: value.detach().clone() for name, value in self._training.model.state_dict().items()}
        optimizers = [copy.deepcopy(optimizer.state_dict()) for optimizer in self._training.optimizers]
        self._good = [*self._good[-1:], _Snapshot(number, model, optimizers)]


def _cannot_run(batch: Any) -> Any:
    raise UserError("no step function was given to the recorder")
