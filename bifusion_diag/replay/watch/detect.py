"""Whether a step is bad, judged by its signs of life and by those of the steps before."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bifusion_diag.diagnosis.spikes import FACTOR, MIN_PREVIOUS, SpikeDetector
from bifusion_diag.probes.base import ROOT
from bifusion_diag.replay.incident import Trigger
from bifusion_diag.replay.watch.rules import Rule
from bifusion_diag.replay.watch.vitals import FINITE, FROZEN, NO_GRADIENT, ZERO, Alpha, Vitals

WINDOW = 50  # steps of the past that count
RECENT = 10  # of them, the nearest: losses fall
SUSPICIOUS = 4.0  # robust standard deviations: rare enough to look at the samples
MAD_TO_STD = 1.4826
LEAST_SPREAD = 0.05  # of a logarithm: a series that repeats itself still may move by this much at no surprise


@dataclass(frozen=True)
class Bounds:
    """What counts as bad. The whole gradient's spikes are those of :mod:`bifusion_diag.diagnosis.spikes`.

    Attributes:
        previous: steps that a number was seen before it is judged by its past. Ten are the fewest of which a spread
            says anything, and what goes wrong before is caught by what is not finite.
        deviations: robust standard deviations of the logarithm, of what happens from one step to the next, that a loss
            or a norm must lie above its median. Six, as for spikes.
        loss_factor: a spike of a loss is this many times the median of its recent past. A hard batch reaches 3.
        suspect_factor: how far it must rise above the recent ones for the samples to be looked at one by one.
        suspect_share: and by how much of the step's loss: a term that hardly counts does no harm.
        shift_steps: so many steps in a row above all before are a shift. By chance: once in 50 million windows.
        shift_factor: how far above the recent median, where the gradient has grown as well, by `shift_gradient`: wrong
            labels do both.
        shift_alone: how far, where it has not. New label smoothing raises a loss of 0.5 to some 1.2.
        shift_gradient: see `shift_factor`.
        shift_unlearnt: how far, where the term is above what it began with: what was learnt is of no use any more, as
            with labels of something else.
        module_factor: a module's gradient norm by its median. Tiny modules swing far more than the whole does; 50 is
            above all that was met in training from scratch, and a fault of a thousand is far above it.
        module_largest: and by the largest of its window, as norms behind a gate that opens grow step by step.
        module_share: and by the whole gradient's usual norm: below it a module is noise, as is a bias before a
            normalisation.
        input_factor: an input by the largest of all batches before. A hard batch reaches 3.
        alpha_share: of α beyond 0.05 or 0.95 that is a collapse.
        alpha_open: the share that it must have been below before, by its median: a gate may be made closed.
        alpha_steps: steps in a row.
        learnt: steps in a row at which a parameter must have learnt before its silence is a surprise.
        silent_steps: steps in a row without gradient, with a zero one, or without movement. A single batch may do that.
        never_steps: steps from the start on, without which a module that runs is called detached, or one that gets
            gradients is called not updated.
        update_factor: an update by the largest before it, and `update_least` of the weights: nothing trains on so.
        update_least: see `update_factor`.
        state_factor: an update by the largest of its window, learning rate taken out, where the gradient has not
            grown. Adam moves by ±lr, and by 3.2 × lr at most after a jump of the gradient; 3.5 is not its own doing.
        outside: ‖Δw‖ / ‖w‖ between two updates that is no repair of the user's, such as a clamp.
        overflows: overflows of mixed precision in a row that are its search for a scale: 65536 is halved 16 times.
    """

    previous: int = 10
    deviations: float = 6.0
    loss_factor: float = 5.0
    suspect_factor: float = 1.8
    suspect_share: float = 0.1
    shift_steps: int = 5
    shift_factor: float = 1.5
    shift_alone: float = 4.0
    shift_gradient: float = 1.5
    shift_unlearnt: float = 1.2
    module_factor: float = 50.0
    module_largest: float = 10.0
    module_share: float = 1e-3
    input_factor: float = 8.0
    alpha_share: float = 0.97
    alpha_open: float = 0.8
    alpha_steps: int = 3
    learnt: int = 8
    silent_steps: int = 3
    never_steps: int = 8
    update_factor: float = 20.0
    update_least: float = 0.02
    state_factor: float = 3.5
    outside: float = 0.25
    overflows: int = 16


DEFAULT_BOUNDS = Bounds()


class Detector:
    """Judges steps. What it has seen is only changed by :meth:`remember` and :meth:`forget`.

    Something that lasts, such as a frozen module, is told once until it ends; what is bad about the step itself, such
    as NaN or a spike, at every step.

    Args:
        bounds: what counts as bad.
        rules: the user's own.
    """

    def __init__(self, bounds: Bounds = DEFAULT_BOUNDS, rules: Iterable[Rule] = ()) -> None:
        self.bounds = bounds
        self.rules = tuple(rules)
        self._inputs: dict[str, list[float]] = {}  # by path: batches, largest ever, batches with bad values
        self._rates_most: dict[str, float] = {}
        self._whole_run = SpikeDetector()  # of the gradient's norm, which no stage makes forget
        self.forget("")

    def forget(self, what: str) -> None:
        """The next steps are meant to be different: only inputs are still expected to be as they were.

        Args:
            what: is new, in words.
        """
        self._steps = 0  # remembered since
        self._total = SpikeDetector()
        self._terms: dict[str, _Series] = {}
        self._norms: dict[str, _Series] = {}
        self._updates: dict[str, _Series] = {}  # ratio / lr of modules
        self._ratio_most: dict[str, float] = {}
        self._alphas: dict[str, deque[list[float]]] = {}
        self._parameters: dict[str, list[int]] = {}  # state; steps in a row that it learnt; lapses; steps that it ran
        self._moves: dict[str, list[int]] = {}  # steps in a row that it moved; lapses
        self._odd: dict[str, dict[str, int]] = {"altered": {}, "outside": {}, "uncleared": {}}  # steps with it before
        self._streaks: dict[str, int] = {}  # steps in a row, by "kind name"
        self._told: set[str] = set()
        self._rates: dict[str, float] = {}
        self._weights: dict[str, float] = {}
        self._calm = WINDOW  # steps since a learning rate was raised
        self._overflows = 0

    # --- judging -------------------------------------------------------------------------------------------------

    def judge(self, v: Vitals) -> list[Trigger]:
        """What is bad before the update, the most telling first."""
        return [
            *self._bad_inputs(v),
            *self._bad_numbers(v),
            *self._altered(v),
            *self._outside(v),
            *self._far_inputs(v),
            *self._spikes(v),
            *self._loss_spikes(v),
            *self._collapses(v),
            *self._silences(v),
            *self._shifts(v),
            *self._by_rules(v),
        ]

    def suspects(self, v: Vitals) -> list[Trigger]:
        """What is odd without being an alarm: a loss that is above all before it, as of one sample with wrong labels
        among others. Whether one sample alone is odd, running them apart will show."""
        if self._thawed(v):
            return []
        found = []
        for term, value in v.terms.items():
            past, least = self._terms.get(term), self.bounds.suspect_factor
            if past is None or len(past) < 2 * self.bounds.previous or not past.positive or not math.isfinite(value):
                continue
            before = past.recent()
            rise = (value - before) * v.weights.get(term, 1.0)
            if v.total is not None and rise < self.bounds.suspect_share * abs(v.total):
                continue
            if value > least * before and value > 1.2 * past.largest(RECENT) and past.surprise(value) > SUSPICIOUS:
                message = f"loss term {term} is {value:.3g}, of one sample; median of the steps before {before:.3g}"
                found.append(Trigger("loss-spike", message, term=term, value=value, limit=least * before))
        return found

    def judge_update(self, v: Vitals) -> list[Trigger]:
        """What is bad after it, where :meth:`judge` found nothing."""
        late = self._bad_numbers(v)  # of an optimiser that stepped after the step was judged
        return [*late, *self._bad_weights(v), *self._jumps(v), *self._stuck(v)]

    # What is not finite.

    def _bad_inputs(self, v: Vitals) -> Iterator[Trigger]:
        for path, found in v.inputs.items():
            seen, _, bad = self._inputs.get(path, [0, 0.0, 0])
            if found.bad and seen and not bad:
                message = (
                    f"input {path} holds {found.bad} NaN or infinite values, and none in {seen:.0f} batches before"
                )
                yield Trigger("nonfinite-input", message, parameter=path, sample=found.sample, value=float(found.bad))

    def _bad_numbers(self, v: Vitals) -> list[Trigger]:
        found: list[Trigger] = []
        for term, value in v.terms.items():
            if not math.isfinite(value):
                found.append(Trigger("nonfinite-loss", f"loss term {term} is {_word(value)}", term=term, value=value))
        if v.total is not None and not math.isfinite(v.total) and not found:
            found.append(Trigger("nonfinite-loss", f"the loss is {_word(v.total)}", value=v.total))
        excused = v.scaled_out and self._overflows < self.bounds.overflows
        if v.bad_parameters and not found and not excused:
            last = v.bad_parameters[-1]  # the backward has come from the end: what follows is finite
            count, of = len(v.bad_parameters), len([s for s in v.parameters.values() if s >= ZERO])
            message = f"the gradient of {last} is NaN or infinite, and of {count} of {of} parameters"
            found.append(Trigger("nonfinite-gradient", message, module=_owner(v, last), parameter=last))
        for name in v.bad_buffers:
            module = name.rpartition(".")[0] or ROOT
            found.append(
                Trigger("nonfinite-buffers", f"buffer {name} is NaN or infinite now", module=module, parameter=name)
            )
        bad = [name for name, alpha in v.alphas.items() if alpha.bad]
        if bad and not found and not excused and bad[0] in self._alphas:
            found.append(
                Trigger(
                    "nonfinite-loss" if v.total is None else "alpha-collapse",
                    f"{v.alphas[bad[0]].bad} values of α of {bad[0]} are NaN or infinite",
                    module=bad[0],
                    value=float(v.alphas[bad[0]].bad),
                )
            )
        over = v.grad_norm32 is not None and math.isinf(v.grad_norm32)
        if over and v.grad_norm is not None and math.isfinite(v.grad_norm) and not v.scaled_out:
            largest = max(v.norms, key=lambda name: v.norms[name], default=None)
            message = f"the gradient norm is {v.grad_norm:.3g}; in float32 it is infinite"
            found.append(Trigger("overflowed-norm", message, module=largest, value=v.grad_norm, limit=1.8e19))
        return found

    def _bad_weights(self, v: Vitals) -> Iterator[Trigger]:
        if v.bad_weights:
            first = v.bad_weights[0]
            message = f"the update has made weights of {first} NaN or infinite, and of {len(v.bad_weights)} parameters"
            yield Trigger("nonfinite-weights", message, module=_owner(v, first), parameter=first)

    # What has been changed behind the optimiser's back.

    def _altered(self, v: Vitals) -> Iterator[Trigger]:
        left = [name for name in v.uncleared if not self._odd.get("uncleared", {}).get(name)]
        if left:
            message = f"{len(left)} parameters, first {left[0]}, still had the gradients of the last update"
            yield Trigger("altered-gradient", f"{message}, and this step's were added", parameter=left[0])
        known = self._odd["altered"]
        new = [name for name in v.altered if not known.get(name)] if self._steps >= self.bounds.learnt else []
        new = [*v.spoilt] or new  # no habit of a loop, however early in a stage
        if not new:
            return
        message = f"the gradient of {new[0]} was changed after the backward pass, and of {len(new)} parameters"
        yield Trigger("altered-gradient", message, module=_owner(v, new[0]), parameter=new[0])

    def _outside(self, v: Vitals) -> Iterator[Trigger]:
        known = self._odd["outside"]
        new = {
            name: ratio for name, ratio in v.outside.items() if not known.get(name) and not ratio <= self.bounds.outside
        }
        if new and self._steps > 0:
            name = max(new, key=lambda module: new[module])
            message = f"weights of {name} were changed outside an update, by {new[name]:.3g} of their norm"
            yield Trigger("update-jump", message, module=name, value=new[name], limit=self.bounds.outside)

    # What is far from its past.

    def _far_inputs(self, v: Vitals) -> Iterator[Trigger]:
        for path, found in v.inputs.items():
            seen, most, _ = self._inputs.get(path, [0, 0.0, 0])
            limit = self.bounds.input_factor * most
            if seen >= self.bounds.previous and found.absmax > limit > 0:
                message = f"input {path} reaches {found.absmax:.3g}; at most {most:.3g} in {seen:.0f} batches before"
                yield Trigger(
                    "input-outlier", message, parameter=path, sample=found.sample, value=found.absmax, limit=limit
                )

    def _spikes(self, v: Vitals) -> Iterator[Trigger]:
        if v.scaled_out or v.grad_norm is None or not math.isfinite(v.grad_norm) or self._thawed(v):
            return
        if self._reweighted(v):
            return
        usual = {name: self._norms[name].median() for name in v.norms if name in self._norms}
        growth = {name: v.norms[name] / value for name, value in usual.items() if value > 0}
        if self._is_spike(v.grad_norm):
            before = statistics.median(self._total.previous)
            module = max(growth, key=lambda name: growth[name], default=None)
            stands_out = module is not None and growth[module] > 5 * statistics.median(growth.values())
            message = f"gradient norm {v.grad_norm:.3g}; median of the steps before {before:.3g}"
            yield Trigger(
                "gradient-spike",
                message,
                module=module if stands_out else None,
                value=v.grad_norm,
                limit=8 * before,
            )
            return
        bounds = self.bounds
        least = bounds.module_share * _median(self._total.previous)
        far = [
            name
            for name, factor in growth.items()
            if factor > bounds.module_factor
            and v.norms[name] > least
            and len(self._norms[name]) >= bounds.previous
            and v.norms[name] > bounds.module_largest * self._norms[name].largest()
            and self._norms[name].surprise(v.norms[name]) > bounds.deviations
        ]
        if far:
            name = max(far, key=lambda module: growth[module])
            message = f"gradient norm of {name} {v.norms[name]:.3g}; median of the steps before {usual[name]:.3g}"
            yield Trigger(
                "gradient-spike",
                message,
                module=name,
                value=v.norms[name],
                limit=bounds.module_factor * usual[name],
            )

    def _is_spike(self, norm: float) -> bool:
        """Whether the norm is a spike among those since the last stage began; where these are few, among all of the run
        if it is as far above these few."""
        since = self._total.previous
        few = 2 <= len(since) < MIN_PREVIOUS
        return self._total.judge(norm) or (
            few and norm > FACTOR * statistics.median(since) and self._whole_run.judge(norm)
        )

    def _loss_spikes(self, v: Vitals) -> Iterator[Trigger]:
        if self._thawed(v):
            return
        found = [
            (self._terms[term].height(value), term)
            for term, value in v.terms.items()
            if self._spiked(term, value) and not self._switched_on(v, term)
        ]
        for _, term in sorted(found, reverse=True):
            value, before = v.terms[term], self._terms[term].recent()
            message = f"loss term {term} is {value:.3g}; median of the steps before {before:.3g}"
            yield Trigger("loss-spike", message, term=term, value=value, limit=self.bounds.loss_factor * before)

    def _spiked(self, term: str, value: float) -> bool:
        past = self._terms.get(term)
        if past is None or len(past) < self.bounds.previous or not math.isfinite(value):
            return False
        if past.positive and value > 0:
            return (
                value > self.bounds.loss_factor * past.recent()
                and value > 1.5 * past.largest(RECENT)
                and past.surprise(value) > self.bounds.deviations
            )
        return value > past.largest() and past.height(value) > 3 * self.bounds.deviations

    def _turned(self, term: str, value: float) -> bool:
        """Whether a term that was well above zero is below it all of a sudden: its sign has changed. One that may be
        negative comes down to zero step by step."""
        past = self._terms.get(term)
        if past is None or len(past) < self.bounds.previous or not past.positive or not -math.inf < value < 0:
            return False
        recent = list(past.every)[-2 * RECENT :]
        step = max(abs(b - a) for a, b in itertools.pairwise(recent))
        return recent[-1] - value > 5 * step

    def _shifts(self, v: Vitals) -> Iterator[Trigger]:
        for term, value in v.terms.items():
            if self._turned(term, value) and not self._thawed(v):
                usual = self._terms[term].recent()
                message = f"loss term {term} is {value:.3g}: below zero, after {usual:.3g} in the steps before"
                yield Trigger("loss-shift", message, term=term, value=value, limit=0.0)
        for term in v.terms:
            key = f"loss-shift {term}"
            before = self._shifted(v, term)
            if before is not None and key not in self._told:
                n = self.bounds.shift_steps
                message = (
                    f"loss term {term} has been {v.terms[term]:.3g} or so for {n} steps, above all {2 * RECENT} before"
                )
                yield Trigger(
                    "loss-shift",
                    f"{message}; its median was {before:.3g}",
                    term=term,
                    value=v.terms[term],
                    limit=self.bounds.shift_factor * before,
                    since=v.step - n + 1,
                )

    def _shifted(self, v: Vitals, term: str) -> float | None:
        """The median before a shift of a term that this step completes; None: there is none."""
        past, bounds = self._terms.get(term), self.bounds
        n = bounds.shift_steps
        if past is None or len(past.every) < bounds.previous + n - 1 or self._calm < RECENT or self._thawed(v):
            return None
        every = [*past.every, v.terms[term]]
        new, old = every[-n:], every[:-n]
        if not all(map(math.isfinite, new)) or min(old) <= 0:
            return None
        before = past.recent(n - 1)
        growth = statistics.median(new) / before
        ramp = sum(new[-2:]) > 1.5 * sum(new[:2])  # a weight that rises by schedule
        if (
            min(new) <= 1.1 * max(old[-2 * RECENT :])
            or ramp
            or past.surprise(statistics.median(new), n - 1) <= bounds.deviations
        ):
            return None
        norms = [*self._total.previous, v.grad_norm or 0.0]
        known = len(norms) > n + bounds.previous
        gradient = statistics.median(norms[-n:]) / statistics.median(norms[-2 * RECENT - n : -n]) if known else 1.0
        enough = growth > bounds.shift_alone or (growth > bounds.shift_factor and gradient > bounds.shift_gradient)
        unlearnt = growth > bounds.shift_unlearnt and statistics.median(new) > past.began
        return before if unlearnt or (enough and self._calm >= WINDOW // 2) else None

    def _collapses(self, v: Vitals) -> Iterator[Trigger]:
        for name, alpha in v.alphas.items():
            key = f"alpha-collapse {name}"
            if not self._collapsed(name, alpha) or key in self._told:
                continue
            streak = self._streaks.get(key, 0) + 1
            if streak >= self.bounds.alpha_steps:
                end, share = ("0", alpha.low) if alpha.low > alpha.high else ("1", alpha.high)
                message = f"{share:.1%} of α of {name} are at {end}"
                yield Trigger(
                    "alpha-collapse",
                    message,
                    module=name,
                    value=alpha.mean,
                    limit=self.bounds.alpha_share,
                    since=v.step - streak + 1,
                )

    def _collapsed(self, name: str, alpha: Alpha) -> bool:
        past = self._alphas.get(name)
        if past is None or len(past) < self.bounds.learnt:
            return False
        for end, share in enumerate((alpha.low, alpha.high)):
            before = statistics.median(values[end] for values in past)
            if share >= self.bounds.alpha_share and before < self.bounds.alpha_open:
                return True
        return f"alpha-collapse {name}" in self._streaks and max(alpha.low, alpha.high) >= self.bounds.alpha_share

    # What has fallen silent.

    def _silences(self, v: Vitals) -> Iterator[Trigger]:
        if not v.parameters or v.scaled_out:
            return
        known = {name: seen for name, seen in self._parameters.items() if seen[1] >= self.bounds.learnt}
        texts = {
            "frozen-module": "does not require a gradient any more",
            "detached-module": "gets no gradient any more",
            "dead-module": "gets a gradient of exactly zero",
        }
        learners = {name for name, state in v.parameters.items() if name in known or state > FROZEN}
        for kind, text in texts.items():
            need = 1 if kind == "frozen-module" else self.bounds.silent_steps
            here = self._silent(v, kind)
            ready = {n for n in here if self._streaks.get(f"{kind} {n}", 0) + 1 >= need}
            yield from self._grouped(v, kind, ready, learners, text)
        never = self._never(v)
        for trigger in self._grouped(v, "detached-module", never, learners, "has never got a gradient, though it runs"):
            yield dataclasses.replace(trigger, since=0)

    def _silent(self, v: Vitals, kind: str) -> list[str]:
        """Parameters that learnt and are silent at this step, in this way."""
        state = {"frozen-module": FROZEN, "detached-module": NO_GRADIENT, "dead-module": ZERO}[kind]
        found = [name for name, now in v.parameters.items() if now == state and self._expected(name, kind)]
        if not found or (state == FROZEN and self._thawed(v)) or (state != FROZEN and self._dropped(v)):
            return []
        if state != FROZEN and not any(now >= FINITE for now in v.parameters.values()):
            return []  # the whole model is: a loss of zero, a batch without any target
        return [name for name in found if state == FROZEN or v.ran.intersection(v.owners.get(name, ()))]

    def _expected(self, name: str, kind: str) -> bool:
        seen = self._parameters.get(name)
        if seen is None:
            return False
        return (seen[1] >= self.bounds.learnt and seen[2] == 0) or f"{kind} {name}" in self._streaks

    def _never(self, v: Vitals) -> set[str]:
        need = self.bounds.never_steps
        return {
            name
            for name, state in v.parameters.items()
            if state == NO_GRADIENT
            and name not in v.loose
            and self._parameters.get(name, [0, 0, 0, 0])[3] + 1 >= need
            and self._parameters[name][1] == self._parameters[name][2] == 0
            and v.held.intersection(v.owners.get(name, ()))
            and v.ran.intersection(v.owners.get(name, ()))
        }

    def _stuck(self, v: Vitals) -> Iterator[Trigger]:
        if v.moved is None or v.scaled_out:
            return
        here = self._unmoved(v)
        ready = {
            name
            for name in here
            if self._streaks.get(f"not-updated {name}", 0) + 1
            >= (self.bounds.silent_steps if self._moves.get(name, [0, 0])[0] else self.bounds.never_steps)
        }
        learners = {name for name, state in v.parameters.items() if state >= FINITE}
        text = "gets a gradient, and its weights do not move"
        yield from self._grouped(v, "not-updated", ready, learners, text)

    def _unmoved(self, v: Vitals) -> list[str]:
        """Parameters with a gradient that should have moved and have not, while others did."""
        if v.moved is None or not any(v.moved.values()) or v.scaled_out:
            return []
        found: list[str] = []
        for name in v.stuck:
            moved, lapses = self._moves.get(name, [0, 0])
            fell_silent = moved >= self.bounds.learnt and not lapses and not self._faded(v, name)
            if (
                fell_silent
                or (moved == 0 and (name in v.loose or self._no_rate(v)))
                or f"not-updated {name}" in self._streaks
            ):
                found.append(name)
        return found

    def _faded(self, v: Vitals, name: str) -> bool:
        """Whether all learning rates have become so small that nothing need move."""
        return bool(v.rates) and all(rate <= 1e-2 * self._rates_most.get(g, rate) for g, rate in v.rates.items())

    def _no_rate(self, v: Vitals) -> bool:
        return any(rate == 0 for rate in v.rates.values()) and any(rate > 0 for rate in v.rates.values())

    def _grouped(self, v: Vitals, kind: str, names: set[str], learners: set[str], text: str) -> Iterator[Trigger]:
        """One trigger for each largest part of the model that is affected as a whole, the last in execution first."""
        new = {name for name in names if f"{kind} {name}" not in self._told}
        if not new:
            return
        parts: dict[str, list[str]] = {}
        for name in v.parameters:
            if name in new:
                parts.setdefault(_whole(name, names, learners, v), []).append(name)
        for part, members in sorted(parts.items(), key=lambda item: -len(item[1])):
            streak = max(self._streaks.get(f"{kind} {name}", 0) for name in members) + 1
            is_module = part not in v.parameters
            module = part if is_module else _owner(v, part)
            steps = f" for {streak} steps" if streak > 1 else ""
            of = f", {len(members)} parameters" if len(members) > 1 else ""
            yield Trigger(
                kind,
                f"{part}{of}: {text}{steps}",
                module=module,
                parameter=members[0],
                since=v.step - streak + 1,
            )

    # What the optimiser does.

    def _jumps(self, v: Vitals) -> Iterator[Trigger]:
        if v.moved is None or self._steps < self.bounds.learnt:
            return
        found: list[tuple[float, str, str, float]] = []
        rate = self._rate(v)
        for name, ratio in v.update_ratio.items():
            most, past = self._ratio_most.get(name, 0.0), self._updates.get(name)
            if past is None or len(past) < self.bounds.previous or name in v.outside:
                continue
            if ratio > self.bounds.update_factor * most and ratio > self.bounds.update_least:
                found.append((ratio / max(most, 1e-30), name, "the largest before", most))
            elif rate > 0 and self._unexplained(v, name, ratio / rate):
                usual = past.median() * rate
                found.append((ratio / usual, name, "usual at this gradient and learning rate", usual))
        if found:
            _, name, what, before = max(found)
            message = f"the update has changed {name} by {v.update_ratio[name]:.3g} of its norm; {what}: {before:.3g}"
            yield Trigger("update-jump", message, module=name, value=v.update_ratio[name], limit=before)

    def _unexplained(self, v: Vitals, name: str, speed: float) -> bool:
        """Whether an update is larger than its gradient and learning rate make it: an optimiser's state was changed."""
        past, norms = self._updates[name], self._norms.get(name)
        if v.update_ratio[name] < 1e-5 or norms is None or not len(norms) or speed <= 0:
            return False
        factor = speed / max(past.largest(3 * RECENT), 1e-300)
        if factor < self.bounds.state_factor or past.surprise(speed) < self.bounds.deviations:
            return False
        now = max([v.norms.get(name, 0.0), *list(norms.every)[-5:]])
        return factor > 2 * now / max(norms.median(), 1e-300)

    def _by_rules(self, v: Vitals) -> Iterator[Trigger]:
        for rule in self.rules:
            message = rule(v)
            if message:
                yield Trigger("rule", message)

    # --- what is going on ----------------------------------------------------------------------------------------

    def _thawed(self, v: Vitals) -> bool:
        """Whether something learns that was frozen: a stage begins, and levels change."""
        return any(
            seen[0] == FROZEN and v.parameters.get(name, FROZEN) != FROZEN for name, seen in self._parameters.items()
        )

    def _dropped(self, v: Vitals) -> bool:
        """Whether a term is not there any more, or has no weight: who it alone taught learns no more."""
        gone = [term for term in self._terms if term not in v.terms]
        return bool(gone) or any(v.weights.get(term) == 0 for term in v.terms)

    def _reweighted(self, v: Vitals) -> bool:
        if self._terms and set(v.terms) - set(self._terms):
            return True
        if any(self._switched_on(v, term) for term in v.terms):
            return True
        before = self._weights
        return any(not 0.5 <= (w + 1e-12) / (before.get(t, w) + 1e-12) <= 2 for t, w in v.weights.items())

    def _switched_on(self, v: Vitals, term: str) -> bool:
        """Whether a term begins that was exactly zero all the time, and is no larger than `loss_factor` times the
        others together."""
        past = self._terms.get(term)
        if past is None or not past.never or not v.terms[term]:
            return False
        others = sum(abs(value) for name, value in v.terms.items() if name != term)
        return abs(v.terms[term]) <= self.bounds.loss_factor * others

    def _rate(self, v: Vitals) -> float:
        return max(v.rates.values(), default=1.0)

    # --- remembering ---------------------------------------------------------------------------------------------

    def remember(self, v: Vitals) -> None:
        """The step is over, good or bad."""
        lasting = self._lasting(v)
        for trigger_key, need in lasting.items():
            self._streaks[trigger_key] = self._streaks.get(trigger_key, 0) + 1
            if self._streaks[trigger_key] >= need:
                self._told.add(trigger_key)
        for key in [key for key in self._streaks if key not in lasting and not self._unknown(key, v)]:
            del self._streaks[key]
            self._told.discard(key)
        if self._thawed(v) or self._reweighted(v):
            self._total = SpikeDetector()
            self._norms, self._updates, self._terms = {}, {}, {}
            self._calm = 0
        self._steps += 1
        self._overflows = self._overflows + 1 if v.scaled_out else 0
        self._remember_inputs(v)
        raised = any(rate > 1.2 * self._rates.get(group, rate) + 1e-30 for group, rate in v.rates.items())
        warming = any(rate > 1.001 * self._rates.get(group, rate) for group, rate in v.rates.items())
        self._calm = 0 if raised or warming else self._calm + 1
        for term, value in v.terms.items():
            if math.isfinite(value):
                self._terms.setdefault(term, _Series()).add(value, odd=self._spiked(term, value))
        self._weights = dict(v.weights)
        if v.grad_norm is not None and not v.scaled_out:
            self._total.update(v.grad_norm)
            self._whole_run.update(v.grad_norm)
            for name, norm in v.norms.items():
                if math.isfinite(norm) and norm > 0:
                    series = self._norms.setdefault(name, _Series())
                    series.add(norm, odd=len(series) >= self.bounds.previous and norm > 50 * series.median())
        for name, alpha in v.alphas.items():
            self._alphas.setdefault(name, deque(maxlen=WINDOW)).append([alpha.low, alpha.high])
        if not v.scaled_out:
            self._remember_parameters(v)
        self._remember_update(v)
        for kind, names in (("altered", v.altered), ("outside", tuple(v.outside)), ("uncleared", v.uncleared)):
            seen = self._odd.setdefault(kind, {})
            for name in names:
                seen[name] = seen.get(name, 0) + 1
        for group, rate in v.rates.items():
            self._rates_most[group] = max(rate, self._rates_most.get(group, 0.0))
        self._rates = dict(v.rates)

    def _lasting(self, v: Vitals) -> dict[str, int]:
        """What holds at this step and may last, with the steps after which it is told."""
        bounds = self.bounds
        found: dict[str, int] = {}
        if v.parameters and not v.scaled_out:
            for kind in ("frozen-module", "detached-module", "dead-module"):
                need = 1 if kind == "frozen-module" else bounds.silent_steps
                found |= {f"{kind} {name}": need for name in self._silent(v, kind)}
            found |= {f"detached-module {name}": 1 for name in self._never(v)}
        for name in self._unmoved(v):
            moved = self._moves.get(name, [0, 0])[0]
            found[f"not-updated {name}"] = bounds.silent_steps if moved else bounds.never_steps
        for name, alpha in v.alphas.items():
            if self._collapsed(name, alpha):
                found[f"alpha-collapse {name}"] = bounds.alpha_steps
        for term, value in v.terms.items():
            key = f"loss-shift {term}"
            past = self._terms.get(term)
            lasts = key in self._told and past is not None and value > 0.5 * past.median()
            if self._shifted(v, term) is not None or lasts:
                found[key] = 1
        return found

    def _unknown(self, key: str, v: Vitals) -> bool:
        """Whether the step says nothing of something that lasts: the module has not run."""
        kind, _, name = key.partition(" ")
        if kind == "alpha-collapse":
            return name not in v.alphas
        if kind == "loss-shift":
            return name not in v.terms
        if kind == "not-updated":
            return v.moved is None or v.scaled_out
        if v.scaled_out or name not in v.parameters:
            return True
        return v.parameters[name] in (NO_GRADIENT, ZERO) and not v.ran.intersection(v.owners.get(name, ()))

    def _remember_inputs(self, v: Vitals) -> None:
        for path, found in v.inputs.items():
            seen = self._inputs.setdefault(path, [0, 0.0, 0])
            far = seen[0] >= self.bounds.previous and found.absmax > self.bounds.input_factor * seen[1] > 0
            seen[0] += 1
            seen[2] += found.bad > 0
            if not far:
                seen[1] = max(seen[1], found.absmax)
            else:
                seen[1] *= 1.5  # what comes again and again is not an outlier

    def _remember_parameters(self, v: Vitals) -> None:
        if not any(state >= FINITE for state in v.parameters.values()):
            return
        for name, state in v.parameters.items():
            seen = self._parameters.setdefault(name, [state, 0, 0, 0])
            seen[0] = state
            if state == FROZEN:
                seen[1], seen[2], seen[3] = (seen[1], seen[2], seen[3]) if self._expected_silent(name) else (0, 0, 0)
            elif state >= FINITE:
                seen[1] += 1
            elif v.ran.intersection(v.owners.get(name, ())) and seen[1] and not self._expected_silent(name):
                seen[2] += 1
            if state != FROZEN and v.ran.intersection(v.owners.get(name, ())):
                seen[3] += 1

    def _expected_silent(self, name: str) -> bool:
        return any(f"{kind} {name}" in self._streaks for kind in ("frozen-module", "detached-module", "dead-module"))

    def _remember_update(self, v: Vitals) -> None:
        if v.moved is None:
            return
        rate = self._rate(v)
        for name, ratio in v.update_ratio.items():
            if math.isfinite(ratio) and ratio > 0 and rate > 0:
                self._updates.setdefault(name, _Series()).add(ratio / rate)
                self._ratio_most[name] = max(ratio, self._ratio_most.get(name, 0.0))
        stuck = set(v.stuck)
        for name, state in v.parameters.items():
            if state < FINITE:
                continue
            seen = self._moves.setdefault(name, [0, 0])
            if name not in stuck:
                seen[0] += 1
            elif seen[0] and f"not-updated {name}" not in self._streaks:
                seen[1] += 1

    # --- telling -------------------------------------------------------------------------------------------------

    def typical(self) -> dict[str, Any]:
        """What is usual, as the diagnosis compares with it:

        "steps": how many are remembered; "grad_norm": median of the last 50, None before the first; "terms": median of
        each loss term; "norms": of each module's gradient norm; "updates": of each module's ratio of update to weight,
        divided by the learning rate; "rates": the last learning rates by group; "inputs": largest absolute value of
        each input in all batches; "alphas": median shares [low, high] of each gate.
        """
        return {
            "steps": self._steps,
            "grad_norm": _median(self._total.previous) if self._total.previous else None,
            "terms": {name: series.median() for name, series in self._terms.items()},
            "norms": {name: series.median() for name, series in self._norms.items()},
            "updates": {name: series.median() for name, series in self._updates.items()},
            "rates": dict(self._rates),
            "inputs": {path: seen[1] for path, seen in self._inputs.items()},
            "alphas": {
                name: [statistics.median(row[end] for row in rows) for end in (0, 1)]
                for name, rows in self._alphas.items()
            },
        }

    def state(self) -> dict[str, Any]:
        """All that was seen, JSON."""
        series = {
            name: {key: one.state() for key, one in getattr(self, f"_{name}").items()}
            for name in ("terms", "norms", "updates")
        }
        return {
            **series,
            **{name: getattr(self, f"_{name}") for name in _PLAIN},
            "total": self._total.previous,
            "whole_run": self._whole_run.previous,
            "alphas": {name: list(rows) for name, rows in self._alphas.items()},
            "told": sorted(self._told),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`state` returned."""
        self.forget("")
        for name in ("terms", "norms", "updates"):
            setattr(self, f"_{name}", {key: _Series.of(one) for key, one in state[name].items()})
        for name in _PLAIN:
            setattr(self, f"_{name}", state[name])
        self._total = SpikeDetector(state["total"])
        self._whole_run = SpikeDetector(state["whole_run"])
        self._alphas = {name: deque(rows, maxlen=WINDOW) for name, rows in state["alphas"].items()}
        self._told = set(state["told"])


_PLAIN = (
    "steps",
    "inputs",
    "rates",
    "rates_most",
    "ratio_most",
    "parameters",
    "moves",
    "odd",
    "streaks",
    "weights",
    "calm",
    "overflows",
)


class _Series:
    """A number's past. What was odd waits, and counts as soon as it is the new usual: three times in a row."""

    def __init__(self, every: Iterable[float] = (), waiting: Iterable[float] = (), first: Iterable[float] = ()) -> None:
        self.every: deque[float] = deque(every, maxlen=WINDOW)
        self._waiting = list(waiting)
        self._first = list(first)

    def __len__(self) -> int:
        return len(self.every)

    def add(self, value: float, odd: bool = False) -> None:
        if len(self._first) < 3:
            self._first.append(value)
        self._waiting.append(value)
        if not odd or len(self._waiting) >= 3:
            self.every.extend(self._waiting if odd else self._waiting[-1:])
            self._waiting = []

    @property
    def began(self) -> float:
        """The median of its first three."""
        return statistics.median(self._first)

    @property
    def never(self) -> bool:
        """Whether it has been exactly zero all the time."""
        return not any(self.every)

    @property
    def positive(self) -> bool:
        return min(self.every, default=0.0) > 0

    def median(self) -> float:
        return statistics.median(self.every)

    def recent(self, leave_out: int = 0) -> float:
        """Median of the last values but some."""
        return statistics.median(self._but(leave_out)[-2 * RECENT :])

    def _but(self, last: int) -> list[float]:
        return list(self.every)[: len(self.every) - last]

    def largest(self, last: int = WINDOW) -> float:
        return max(list(self.every)[-last:])

    def surprise(self, value: float, leave_out: int = 0) -> float:
        """Robust standard deviations that the logarithm of a value lies above the recent median's. The deviation is
        that of one step to the next, which a trend does not widen."""
        logs = [math.log(max(x, 1e-300)) for x in self._but(leave_out)]
        return (math.log(value) - math.log(max(self.recent(leave_out), 1e-300))) / max(_spread(logs), LEAST_SPREAD)

    def height(self, value: float) -> float:
        """The same of the value itself, which may be negative."""
        centre = self.recent()
        return (value - centre) / max(_spread(list(self.every)), LEAST_SPREAD * abs(centre), 1e-12)

    def state(self) -> list[list[float]]:
        return [list(self.every), self._waiting, self._first]

    @classmethod
    def of(cls, state: Sequence[Iterable[float]]) -> _Series:
        return cls(*state)


def _spread(values: Sequence[float]) -> float:
    steps = [b - a for a, b in itertools.pairwise(values)]
    if not steps:
        return math.inf
    centre = statistics.median(steps)
    return MAD_TO_STD * statistics.median(abs(step - centre) for step in steps) / math.sqrt(2)


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else 0.0


def _owner(v: Vitals, parameter: str) -> str:
    owners = v.owners.get(parameter)
    return owners[0] if owners else parameter.rpartition(".")[0] or ROOT


def _whole(parameter: str, affected: set[str], learners: set[str], v: Vitals) -> str:
    """The largest module around a parameter of which all that learns is affected; the parameter itself if none is."""
    best, above = parameter, parameter.rpartition(".")[0]
    while above:
        inside = [name for name in learners if name.startswith(f"{above}.")]
        if not all(name in affected for name in inside):
            break
        best, above = above, above.rpartition(".")[0]
    return best


def _word(value: float) -> str:
    return "NaN" if math.isnan(value) else "infinite"
