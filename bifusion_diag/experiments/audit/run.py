"""All checks, one after another."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from bifusion_diag.config import Settings
from bifusion_diag.data import SceneSource
from bifusion_diag.diagnosis.thresholds import DEFAULT_THRESHOLDS, Thresholds
from bifusion_diag.errors import UserError
from bifusion_diag.experiments.audit.balance import balance
from bifusion_diag.experiments.audit.bench import Bench, Say
from bifusion_diag.experiments.audit.coarse import coarse
from bifusion_diag.experiments.audit.data_scan import data_scan
from bifusion_diag.experiments.audit.declared_flow import declared_flow
from bifusion_diag.experiments.audit.gradient_flow import gradient_flow
from bifusion_diag.experiments.audit.mechanisms import mechanisms
from bifusion_diag.experiments.audit.near_zero import near_zero
from bifusion_diag.experiments.audit.optimiser import optimiser
from bifusion_diag.experiments.audit.result import Audit, Draft, Section
from bifusion_diag.experiments.audit.sanitising import sanitising
from bifusion_diag.experiments.audit.schedule import schedule
from bifusion_diag.experiments.audit.slopes import normalisation, temperature
from bifusion_diag.training.determinism import make_deterministic, random_state, restore_random_state

Check = Callable[[Bench], Section]

#: In the order of their execution: what is cheap and needs no model comes first.
CHECKS: dict[str, tuple[str, Check]] = {
    "schedule": ("Calendar of the run", schedule),
    "flow": ("Gradient flow", gradient_flow),
    "declared_flow": ("Declared and measured gradient flow", declared_flow),
    "optimiser": ("Optimiser and frozen parameters", optimiser),
    "temperature": ("Temperature", temperature),
    "normalisation": ("Normalisation of small vectors", normalisation),
    "near_zero": ("Zero vectors into normalisations", near_zero),
    "sanitise": ("Coordinates that are not finite", sanitising),
    "coarse": ("Few rows", coarse),
    "balance": ("Loss weights against the baseline", balance),
    "mechanisms": ("Mechanisms, on this run's own code", mechanisms),
}
SCENES, SECONDS = 32, 60.0


def audit(
    settings: Settings,
    *,
    thresholds: Thresholds = DEFAULT_THRESHOLDS,
    scenes: int = SCENES,
    seconds: float = SECONDS,
    source: SceneSource | None = None,
    say: Say = lambda what: None,
) -> Audit:
    """Measure a configured run before it is trained. Nothing is written, and the random generators are afterwards as
    they were.

    Args:
        settings: of the run.
        thresholds: of the findings.
        scenes: most scenes that the data scan looks at.
        seconds: after so long the data scan looks at no further one.
        source: of the scenes; None opens the run's own.
        say: is told what is under way.

    Raises:
        UserError: a model that cannot be built, data that are not there.
    """
    began = time.monotonic()
    with _undisturbed(settings):
        bench = Bench(settings, thresholds, source, say)
        data = data_scan(bench, scenes, seconds)  # first: where it says why, nothing else has to be waited for
        sections = [*_checked(bench), data]
        return Audit(
            preset=settings.preset,
            scale=settings.scale,
            settings=settings.model_dump(mode="json"),
            batch=bench.batch.names,
            provenance={**bench.model.provenance(), "data": bench.source.describe()},
            sections=tuple(sections),
            seconds=time.monotonic() - began,
        )


def _checked(bench: Bench) -> list[Section]:
    """Every check; where the very step fails, those that need it say so, and one finding does."""
    sections: list[Section] = []
    failed = False
    for name, (title, check) in CHECKS.items():
        bench.say(title)
        try:
            sections.append(check(bench))
        except UserError as error:
            if failed:
                sections.append(Section(name, title, not_measured=str(error)))
                continue
            failed = True
            draft = Draft(name, title)
            draft.report("step-fails", "error", "The run's first step fails", str(error))
            sections.append(Section(name, title, findings=tuple(draft.findings), not_measured=str(error)))
    return sections


@contextmanager
def _undisturbed(settings: Settings) -> Iterator[None]:
    """Within it torch is set up as for the run; afterwards as before."""
    threads, state = torch.get_num_threads(), random_state()
    deterministic = torch.are_deterministic_algorithms_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    benchmark = torch.backends.cudnn.benchmark
    try:
        make_deterministic(settings.training.seed, settings.training.threads)
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = filling  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = benchmark
        restore_random_state(state)
