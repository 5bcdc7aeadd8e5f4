"""Which samples of a batch a bad step comes from: each is run alone, and then the step without the suspects.

A sample alone is judged among the others of its batch and those of the last healthy batch, at the same weights. What
stands out there is a suspect; guilty is only what heals the step when it is left out, while leaving another one out
does not. Where the last healthy batch is bad at these weights too, or all samples are alike, it is not the data.

BatchNorm in train mode makes a sample alone another thing than in its batch, and refuses one value a channel. Alone,
samples therefore run with the statistics that the last healthy batch gives, or else with the running ones. What is too
large is judged like that throughout, as each sample that is left out changes the statistics for all others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np

from bifusion_diag.errors import UserError
from bifusion_diag.replay.examine.batches import Names, Split, sample_names, sample_notes
from bifusion_diag.replay.examine.part_runs import InputFacts, PartRun, PartRuns
from bifusion_diag.replay.incident import SampleShare
from bifusion_diag.replay.notes import StepNotes
from bifusion_diag.replay.step import Training

__all__ = ["Names", "SampleFinding", "Split", "sample_shares"]

#: Kinds that a sample can be guilty of, by how it shows.
BY_LOSS = ("loss-spike", "loss-shift")
BY_GRADIENT = ("gradient-spike", "overflowed-norm", "input-outlier", "rule")
BY_NONFINITE = ("nonfinite-loss", "nonfinite-gradient", "nonfinite-buffers")

ALONE = 16  # samples that are run one by one; more are run in so many groups first
EXPANDED = 4  # of these groups, whose members are run one by one
PEERS = 6  # of the healthy batch's samples that are run alone, at most
CHECKS = 8  # of several suspects so many are checked one by one
LEFT_OUT = 4  # samples, up to which each is left out in turn where none stands out alone
OUTLIER = 6.0  # robust standard deviations above the others' median
GAP = 2.0  # times as far above that median as the first that is not guilty
ABOVE_HEALTHY = 1.5  # times the largest of the healthy batch's samples
GROWN = 2.0  # times what the healthy batch gives: the step is bad in this
HEALED = 0.35  # of what it is more may be left without the guilty
HEALED_TRULY = 0.85  # and this much of that
GROWN_TRULY = 1.8  # times, of the step as it ran, where it is judged with BatchNorm held
SMALL = 10.0  # times fewer rows than the others
FAR_OUT = 10.0  # times the largest absolute value in all other samples

Value = Callable[[PartRun], float]
Test = Callable[[PartRun], bool]


@dataclass(frozen=True)
class SampleFinding:
    """What running the samples apart has shown.

    Attributes:
        shares: the guilty ones, the strongest first; empty: all alike, or it could not be told.
        rows: one a sample that was run alone, JSON: "sample", "name", "notes", "loss", "terms", "gradient" (L2 norm;
            None: no backward was run), "input_absmax", "input_bad", "error".
        reason: why none is guilty, in words; "" where one is.
        runs: how often the step, or a part of it, was run.
        small: that the guilty one has far fewer rows than the others, in words; "" where it has not.
        lengths: of each sample how many rows it has in some tensor, or says that it has.
        named: of each sample its name, None where the batch does not say, and the notes on it.
    """

    shares: tuple[SampleShare, ...] = ()
    rows: tuple[dict[str, Any], ...] = field(default=())
    reason: str = ""
    runs: int = 0
    small: str = ""
    lengths: tuple[frozenset[int], ...] = ()
    named: tuple[tuple[str | None, tuple[str, ...]], ...] = ()


def sample_shares(
    training: Training,
    notes: StepNotes,
    kind: str,
    *,
    contrast: StepNotes | None = None,
    split: Split | None = None,
    names: Names | None = None,
    terms: Sequence[str] = (),
) -> SampleFinding:
    """Find the samples that a bad step comes from. Never raises what the step raises.

    Args:
        training: what runs, with the weights as they are now.
        notes: of the bad step.
        kind: of the incident.
        contrast: notes of the last healthy step: its batch shows what samples are like at these weights.
        split: None: see :func:`bifusion_diag.replay.examine.batches.cut`.
        names: None: found in the batch.
        terms: that are guilty, as far as it is known: of a loss spike they are judged by.

    Raises:
        UserError: the user's split or names do not fit the batch.
    """
    if kind not in (*BY_LOSS, *BY_GRADIENT, *BY_NONFINITE, "nonfinite-input", "exception"):
        return SampleFinding(reason=f"{kind} is no matter of single samples")
    backward = kind in ("nonfinite-gradient", "exception", *BY_GRADIENT)
    try:
        runs = PartRuns(training, notes, contrast, split, backward=backward, steady=kind != "nonfinite-buffers")
    except UserError:
        if split is not None:
            raise
        return SampleFinding(reason="its samples cannot be told apart; give FlightRecorder(split=...)")
    batch = notes.batch()
    called, said = sample_names(batch, runs.size, names), sample_notes(batch, runs.size)
    search = _Search(runs)
    guilty, reason = search.find(kind, terms)
    shares = tuple(SampleShare(i, called[i], why, said[i]) for i, why in guilty.items())
    rows = tuple({"sample": i, "name": called[i], "notes": list(said[i]), **row} for i, row in search.rows())
    named = tuple(zip(called, said, strict=True))
    small = search.small(shares[0].index) if shares else ""
    return SampleFinding(shares, rows, "" if guilty else reason, runs.count, small, tuple(runs.lengths()), named)


class _Search:
    """Looks for the guilty samples of one step."""

    def __init__(self, runs: PartRuns) -> None:
        self.runs = runs
        self.size = runs.size
        self.alone: dict[tuple[int, ...], PartRun] = {}
        self._parted: set[tuple[int, ...]] = set()  # groups whose parts were run too
        self._raises = False
        self._without: dict[tuple[int, ...], PartRun] = {}

    def find(self, kind: str, terms: Sequence[str]) -> tuple[dict[int, str], str]:
        """Guilty samples with the reason why, or none and the reason for that."""
        if kind == "nonfinite-input":
            return self._by_bad_input()
        if kind == "input-outlier" and self._far_out:
            return self._far_out, ""
        whole, healthy = self.runs.whole(), self.runs.healthy()
        self._raises = bool(whole.error)
        if kind == "exception" or whole.error:
            return self._by_badness(lambda run: bool(run.error) and run.error == whole.error, whole, healthy)
        if kind in BY_NONFINITE or whole.bad:
            return self._by_badness(lambda run: run.bad, whole, healthy)
        return self._by_value(_values(kind, terms, whole), whole, healthy)

    def rows(self) -> list[tuple[int, dict[str, Any]]]:
        """What was measured of each sample that was run alone."""
        found = []
        for samples, run in sorted(self.alone.items()):
            if len(samples) == 1:
                inputs = self._inputs[samples[0]].values()
                row = {"loss": None if run.error else run.total, "terms": dict(run.terms), "gradient": run.gradient}
                row |= {"input_absmax": max((x.absmax for x in inputs), default=None)}
                found.append((samples[0], row | {"input_bad": sum(x.bad for x in inputs), "error": run.error}))
        return found

    def small(self, sample: int) -> str:
        """In words, where it has far fewer rows than the others."""
        peers = [*self._inputs[:sample], *self._inputs[sample + 1 :], *self._healthy_inputs]
        for path, x in self._inputs[sample].items():
            others = [peer[path].rows for peer in peers if path in peer]
            if others and x.rows * SMALL <= float(np.median(others)):
                return f"it has {x.rows} rows of {_input(path)}, the others {np.median(others):.0f}"
        return ""

    # --- not finite, or an error -----------------------------------------------------------------------------------

    def _by_badness(self, bad: Test, whole: PartRun, healthy: PartRun | None) -> tuple[dict[int, str], str]:
        if not bad(whole):
            return {}, "the step is not bad when it is run again"
        if healthy is not None and bad(healthy):
            return {}, "even the last healthy batch is bad in its place"
        if self.size == 1:
            known = healthy is not None and not (healthy.error and not whole.error)
            return self._only_one(whole.badness if known else None)

        def healed(run: PartRun) -> bool:
            return not run.error and not bad(run)

        self._run_alone(bad)
        suspects = sorted({samples[0] for samples, run in self.alone.items() if len(samples) == 1 and bad(run)})
        for tried in (suspects, sorted(self._sick)):
            if 0 < len(tried) < self.size and self._heals(tried, healed):
                guilty = self._needed(tried, bad)
                break
        else:
            guilty = self._left_out_in_turn(healed)
        ways = {i: [self._bad_input(i), self._bad_alone(i, bad)] for i in guilty}
        end = f"without {_them(guilty)} the step {'runs' if whole.error else 'is finite'}"
        ends = [] if tuple(guilty) in self._without and self._without[tuple(guilty)].error else [end]
        why = {i: "; ".join([*filter(None, parts), *ends]) for i, parts in ways.items()}
        return why, "no sample makes the difference, neither alone nor left out"

    def _needed(self, suspects: Sequence[int], bad: Test) -> list[int]:
        """Of several suspects those that make the others' step bad, each."""
        if not 1 < len(suspects) <= CHECKS:
            return list(suspects)
        others = [i for i in range(self.size) if i not in suspects]
        return [i for i in suspects if bad(self.runs.only(sorted([*others, i])))] or list(suspects)

    def _bad_input(self, sample: int) -> str:
        found = [f"its {_input(path)} holds {x.bad} values that are not finite" for path, x in self._sick_in(sample)]
        return "; ".join(found)

    def _bad_alone(self, sample: int, bad: Test) -> str:
        run = self.alone.get((sample,))
        return f"alone, {run.badness}" if run is not None and bad(run) else ""

    # --- too large -------------------------------------------------------------------------------------------------

    def _by_value(
        self, values: dict[str, Value], whole: PartRun, healthy: PartRun | None
    ) -> tuple[dict[int, str], str]:
        truly, usual = whole, healthy
        if self.runs.steadies and self.size > 1:
            values = {n: v for n, v in values.items() if not v(whole) < GROWN_TRULY * _usual(v, healthy)}
            whole = self.runs.alone(range(self.size))
            if healthy is not None:
                healthy = self.runs.alone(range(self.runs.healthy_size), of_healthy=True)
        then = {name: _usual(value, healthy) for name, value in values.items()}
        grown = {name: value for name, value in values.items() if not value(whole) < GROWN * then[name]}
        if not grown:
            return {}, "the last healthy batch gives as much at these weights"
        first, value = next(iter(grown.items()))
        if self.size == 1:
            much = f"its {first} is {value(whole):.3g}, the last healthy batch's {then[first]:.3g}"
            return self._only_one(None if math.isnan(then[first]) else much)
        tried: set[tuple[int, ...]] = set()
        for name, value in grown.items():
            healed = partial(_is_healed, value, value(whole), then[name])
            for suspects in (*self._outlying(value), tuple(self._far_out)):
                if suspects and suspects not in tried and 2 * len(suspects) <= self.size:
                    tried.add(suspects)
                    better = partial(_is_healed, value, value(truly), _usual(value, usual), left=HEALED_TRULY)
                    if self._heals(suspects, healed, steady=self.runs.steadies) and (
                        not self.runs.steadies or better(self.runs.without(suspects))
                    ):
                        return self._said(suspects, name, values, value(whole)), ""
        failed = sum(bool(run.error) for run in self.alone.values())
        guilty: list[int] = []
        if self.size <= LEFT_OUT or 2 * failed > len(self.alone):
            value = grown[first]
            guilty = self._left_out_in_turn(partial(_is_healed, value, value(whole), then[first]))
        end = f"without {_them(guilty)} the step's {first} is no longer {value(whole):.3g}"
        return dict.fromkeys(guilty, end), "no sample stands out and heals the step when it is left out"

    def _outlying(self, value: Value) -> list[tuple[int, ...]]:
        """Samples that stand out alone, several if they do together: the likeliest guess first."""
        self._run_alone(value)
        runs = {s: value(run) for s, run in self.alone.items() if not run.error and s not in self._parted}
        runs = {samples: x for samples, x in runs.items() if math.isfinite(x)}
        order = sorted(runs, key=lambda samples: -runs[samples])
        healthy = [value(run) for run in self._healthy_alone if not run.error]
        found: list[tuple[float, tuple[int, ...]]] = []
        for count in range(1, max(1, (len(order) - 1) // 2) + 1):
            top, rest = order[:count], np.array([runs[samples] for samples in order[count:]])
            if not len(rest) or any(len(samples) > 1 for samples in top):
                break
            middle = float(np.median(rest))
            deviation = 1.4826 * float(np.median(np.abs(rest - middle))) + 0.05 * abs(middle)
            excess, next_excess = runs[top[-1]] - middle, max(float(rest.max()) - middle, 0.0)
            above_healthy = not healthy or excess > ABOVE_HEALTHY * (max(healthy) - middle)
            if excess > max(OUTLIER * deviation, GAP * next_excess, abs(middle)) and above_healthy:
                found.append((excess / max(next_excess, deviation, 1e-300), tuple(s for (s,) in top)))
        return [samples for _, samples in sorted(found, reverse=True)]

    def _said(self, guilty: Sequence[int], name: str, values: dict[str, Value], now: float) -> dict[int, str]:
        rest = self._without[tuple(guilty)]
        end = f"without {_them(guilty)} the step's {name} is {values[name](rest):.3g} instead of {now:.3g}"
        end += ", BatchNorm's statistics held" if self.runs.steadies else ""
        ends = [] if rest.error else [end]
        return {i: "; ".join([*self._sticks_out(i, guilty, name, values), *ends]) for i in guilty}

    def _sticks_out(self, sample: int, guilty: Sequence[int], name: str, values: dict[str, Value]) -> list[str]:
        """In which term most, and in its input."""
        parts = [self._far_out[sample]] if sample in self._far_out else []
        others = [run for samples, run in self.alone.items() if not set(samples) & set(guilty) and not run.error]
        own = self.alone.get((sample,))
        if own is None or own.error or not others:
            return parts
        ratios = {}
        for what, value in values.items():
            middle = float(np.median([value(run) for run in others]))
            ratios[what] = (value(own) / max(abs(middle), 1e-12), value(own), middle)
        terms = [what for what in values if what.startswith("loss term ")]
        most = [max(terms, key=lambda what: ratios[what][0])] if terms else []
        for what in dict.fromkeys([*most, name]):
            ratio, mine, middle = ratios[what]
            if ratio > GROWN or what == name:
                parts.append(f"its {what} is {mine:.3g}, the others' median {middle:.3g}")
        return parts

    # --- both ------------------------------------------------------------------------------------------------------

    def _only_one(self, what: str | None) -> tuple[dict[int, str], str]:
        if what is None:
            return {}, "the batch has one sample, and there is no healthy one to compare it with"
        return {0: f"with it, {what}; with the last healthy batch at the same weights it is not so"}, ""

    def _heals(self, samples: Sequence[int], healed: Test, *, steady: bool = False) -> bool:
        """The step is well without these samples, and, as a counter-check, not without as many others."""
        key = tuple(samples)
        others = [i for i in range(self.size) if i not in samples]
        if key not in self._without:
            self._without[key] = self.runs.alone(others) if steady else self.runs.without(key)
        if self._without[key].error and not self._raises:
            return 2 * len(key) < self.size  # such a batch cannot be run: what they are alone has to do
        if not healed(self._without[key]):
            return False
        instead = others[: len(samples)]
        left = [i for i in range(self.size) if i not in instead]
        return not healed(self.runs.alone(left) if steady else self.runs.without(instead))

    def _left_out_in_turn(self, healed: Test) -> list[int]:
        """Samples without which the step is well; none where it is so without most of them."""
        groups = np.array_split(np.arange(self.size), min(self.size, CHECKS))
        found: list[int] = []
        for group in groups:
            samples = [int(i) for i in group]
            if len(samples) < self.size and healed(self.runs.without(samples)):
                found += samples
                if len(found) * 2 > self.size:
                    return []
        if self.size > CHECKS:
            found = [i for i in found[:CHECKS] if healed(self.runs.without([i]))]
        return found if 2 * len(found) < self.size else []

    def _run_alone(self, worth: Callable[[PartRun], Any]) -> None:
        """Run each sample; of many, groups, and the members of those that are worth it."""
        groups = [tuple(range(self.size))]
        while groups:
            group = groups.pop()
            parts = [tuple(map(int, part)) for part in np.array_split(group, min(ALONE, len(group)))]
            for part in parts:
                if part not in self.alone:
                    self.alone[part] = self.runs.alone(part)
            large = [part for part in parts if len(part) > 1 and worth(self.alone[part])]
            large.sort(key=lambda part: -float(worth(self.alone[part])))
            for part in large[:EXPANDED]:
                groups.append(part)
                self._parted.add(part)

    @cached_property
    def _healthy_alone(self) -> list[PartRun]:
        count = min(self.runs.healthy_size, PEERS)
        return [self.runs.alone([i], of_healthy=True) for i in range(count)]

    # --- inputs ----------------------------------------------------------------------------------------------------

    @cached_property
    def _inputs(self) -> list[dict[str, InputFacts]]:
        return self.runs.inputs()

    @cached_property
    def _healthy_inputs(self) -> list[dict[str, InputFacts]]:
        return self.runs.inputs(of_healthy=True)

    def _sick_in(self, sample: int) -> list[tuple[str, InputFacts]]:
        """Inputs with NaN or infinity where those of the healthy batch have none."""
        usual = {path for found in self._healthy_inputs for path, x in found.items() if x.bad}
        return [(path, x) for path, x in self._inputs[sample].items() if x.bad and path not in usual]

    @cached_property
    def _sick(self) -> list[int]:
        return [i for i in range(self.size) if self._sick_in(i)]

    def _by_bad_input(self) -> tuple[dict[int, str], str]:
        if len(self._sick) == self.size and (self.size > 1 or not self._healthy_inputs):
            return {}, "every sample's input holds values that are not finite"
        return {i: self._bad_input(i) for i in self._sick}, "no sample's input holds values that are not finite"

    @cached_property
    def _far_out(self) -> dict[int, str]:
        """Samples with an input far beyond all others' and the healthy batch's, with the words for it."""
        found = {}
        for i, inputs in enumerate(self._inputs):
            peers = [*self._inputs[:i], *self._inputs[i + 1 :], *self._healthy_inputs]
            for path, x in inputs.items():
                others = [peer[path].absmax for peer in peers if path in peer]
                if others and x.absmax > FAR_OUT * max(others) and max(others) > 0:
                    found[i] = f"its {_input(path)} reaches {x.absmax:.3g}, all others {max(others):.3g} at most"
                    break
        return found


def _values(kind: str, terms: Sequence[str], whole: PartRun) -> dict[str, Value]:
    """What samples are judged by, by name, the most telling first."""
    values: dict[str, Value] = {"gradient norm": _gradient} if kind in BY_GRADIENT else {}
    known = [term for term in terms if term in whole.terms]
    if len(whole.terms) > 1 and not known:
        values["loss"] = _total
    return values | {f"loss term {term}": partial(_term, term) for term in known or whole.terms}


def _gradient(run: PartRun) -> float:
    return math.nan if run.gradient is None else run.gradient


def _total(run: PartRun) -> float:
    return run.total


def _term(name: str, run: PartRun) -> float:
    return run.terms.get(name, math.nan)


def _usual(value: Value, healthy: PartRun | None) -> float:
    """What the healthy batch gives; NaN: there is none."""
    return math.nan if healthy is None or healthy.error else value(healthy)


def _is_healed(value: Value, now: float, then: float, run: PartRun, left: float = HEALED) -> bool:
    """Most of what the step is worse than the healthy batch is gone."""
    base = 0.0 if math.isnan(then) else then
    return not run.error and value(run) <= base + left * (now - base)


def _them(samples: Sequence[int]) -> str:
    return "it" if len(samples) == 1 else f"these {len(samples)}"


def _input(path: str) -> str:
    return f"input {path}" if path else "input"
