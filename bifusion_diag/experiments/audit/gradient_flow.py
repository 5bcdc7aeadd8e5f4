"""What gradient reaches which part of the model from which loss term, and in which stage."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from bifusion_diag.diagnosis.phrase import join, say
from bifusion_diag.experiments.audit.bench import Bench, Measured, part_of
from bifusion_diag.experiments.audit.result import Cell, Draft, Section

CLIP = "encoder.clip"
_SHOWN = 4  # names in a sentence

NO_PATH = "–"  # in the table: no path of the graph leads there


def gradient_flow(bench: Bench) -> Section:
    """The table part × term of gradient norms, what gets none, and what gets some although it is frozen."""
    draft = Draft("flow", "Gradient flow")
    terms = bench.term_gradients
    parts = list(dict.fromkeys(part_of(name) for name, _ in bench.model.named_parameters()))
    rows: list[list[Cell]] = []
    for part in parts:
        row: list[Cell] = [part]
        for name, norms in terms.items():
            value = of_part(norms, part)
            row.append(NO_PATH if value is None else value)
            if value is not None:
                draft.number(
                    f"{part}/{name}", say("gradient of {term} in {part}, unweighted", term=name, part=part), value
                )
        row.append(_learns_in(bench, part))
        rows.append(row)
    draft.table("Gradient norm by part and term, unweighted", ("part", *terms, "learns in"), rows)
    _by_phase(draft, bench, parts)
    _not_finite(draft, bench)
    _without_gradient(draft, bench)
    _frozen_with_gradient(draft, bench)
    return draft.done()


def _learns_in(bench: Bench, part: str) -> str:
    """The stages in which a part learns: "S1–S2"."""
    stages = [measured.phase.stage.name for measured in bench.measured if _any_in(measured.trainable, part)]
    if not stages:
        return "never"
    return stages[0] if stages[0] == stages[-1] else f"{stages[0]}–{stages[-1]}"


def of_part(norms: Mapping[str, float | None], part: str) -> float | None:
    """Norm of a part's gradient from those of its parameters; None where no path leads to any of them."""
    found = [norm for name, norm in norms.items() if norm is not None and part_of(name) == part]
    return math.hypot(*found) if found else None


def _by_phase(draft: Draft, bench: Bench, parts: Iterable[str]) -> None:
    """The gradient of the weighted total by part where each phase begins."""
    first = bench.measured[0]
    draft.number(
        "first_norm",
        "pre-clip gradient norm of the first batch",
        first.norm,
        "",
        "from scratch, 100 to 700 with swings of 3 to 6 times is healthy",
    )
    columns = [say("{stage}, step {step}", stage=one.phase.stage.name, step=one.phase.begin) for one in bench.measured]
    rows: list[list[Cell]] = [[part, *(_arrived(one, part) for one in bench.measured)] for part in parts]
    draft.table("Gradient norm of the total by part, where each phase begins", ("part", *columns), rows, shown=False)


def _arrived(measured: Measured, part: str) -> Cell:
    value = of_part(measured.arrived, part)
    return NO_PATH if value is None else value


def _not_finite(draft: Draft, bench: Bench) -> None:
    """A loss or a gradient that is not finite on the very first batch."""
    losses = {name: float(term.detach()) for name, term in bench.step.output.loss.terms.items()}
    for name, value in losses.items():
        noted = draft.number(f"loss/{name}", say("{term} on the first batch, unweighted", term=name), value)
        if not math.isfinite(value):
            draft.report(
                "nonfinite-loss",
                "error",
                say("{term} is not finite on the first batch", term=name),
                "The model is fresh and the batch is the run's first one: this is no matter of training.",
                noted,
                term=name,
            )
    for measured in bench.measured:
        bad = [name for name, norm in measured.arrived.items() if not math.isfinite(norm)]
        if bad:
            noted = draft.number("nonfinite", "parameters with a gradient that is not finite", len(bad), "parameters")
            draft.report(
                "nonfinite-gradient",
                "error",
                say("The gradient of the first batch is not finite in stage {stage}", stage=measured.phase.stage.name),
                "With clipping, one such element makes all others NaN, and after the update every weight.",
                noted,
                module=part_of(bad[0]),
            )
            break


def _without_gradient(draft: Draft, bench: Bench) -> None:
    """Parameters that learn, are held by the optimiser, and that no term reaches in any phase."""
    reached = {name for one in bench.measured for name, norm in one.arrived.items() if norm > 0 or math.isnan(norm)}
    for norms in bench.term_gradients.values():
        reached |= {name for name, norm in norms.items() if norm is not None}
    learns = {name for measured in bench.measured for name in measured.trainable}
    idle = [name for name, _ in bench.model.named_parameters() if name in learns - reached]
    sizes = {name: p.numel() for name, p in bench.model.named_parameters()}
    count = draft.number(
        "without_gradient",
        "trainable weights that no term reaches in any stage",
        sum(sizes[name] for name in idle),
        "weights",
    )
    if not idle:
        return
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in idle))
    whole = [part for part in dict.fromkeys(map(part_of, idle)) if not _any_in(learns - set(idle), part)]
    draft.report(
        "trainable-without-gradient",
        "warning" if whole else "note",
        say("{names} can learn, and no loss term reaches it", names=listed(whole or modules)),
        join(
            [
                "The backward of every term, in every stage, finds no path to these weights: they stay as they were "
                "initialised.",
                "Whatever of the forward depends on them is random."
                if not whole
                else "The part costs time and memory and does nothing for the loss.",
            ]
        ),
        count,
        module=(whole or modules)[0],
    )


def _frozen_with_gradient(draft: Draft, bench: Bench) -> None:
    """What the settings freeze, and where a gradient arrives all the same."""
    tuned = bench.settings.model.clip.tune != "none"
    worst: tuple[str, float, Measured] | None = None
    total = 0
    for measured in bench.measured:
        patterns = [f"{name}.*" for name in measured.phase.stage.frozen] + ([] if tuned else [f"{CLIP}.*"])
        for name, norm in measured.arrived.items():
            if any(fnmatchcase(name, pattern) for pattern in patterns):
                total += 1
                if worst is None or norm > worst[1]:
                    worst = name, norm, measured
    draft.number("frozen_with_gradient", "frozen parameters that get a gradient, over all phases", total, "parameters")
    if worst is None:
        return
    name, norm, measured = worst
    noted = draft.number(
        "frozen_gradient", say("gradient that arrives in {name}", name=name), norm, "", "what is frozen gets none"
    )
    of_clip = name.startswith(f"{CLIP}.")
    draft.report(
        "clip-leak" if of_clip else "frozen-with-gradient",
        "error",
        say(
            "{part} is frozen in stage {stage} and gets a gradient", part=part_of(name), stage=measured.phase.stage.name
        ),
        "These weights require a gradient although the settings freeze them: the optimiser will move what it holds of "
        "them, and the norm that is clipped counts all of it.",
        noted,
        module=part_of(name),
    )


def _any_in(names: Iterable[str], part: str) -> bool:
    return any(part_of(name) == part for name in names)


def listed(names: Iterable[str]) -> str:
    """Names in a sentence; of many, the first ones."""
    found = list(names)
    shown = ", ".join(found[:_SHOWN])
    return shown if len(found) <= _SHOWN else say("{names} and {more} more", names=shown, more=len(found) - _SHOWN)
