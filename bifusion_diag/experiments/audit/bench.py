"""What the checks measure on: the configured model and its first batch, in every stage of the run.

Legend: N points · B scenes · R rows of a module's input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from bifusion_diag.config import Settings
from bifusion_diag.data import Batch, BatchLoader, SceneSource
from bifusion_diag.diagnosis.thresholds import DEFAULT_THRESHOLDS, Thresholds
from bifusion_diag.experiments.audit.calendar import Phase, phases_of
from bifusion_diag.model.build import build_model
from bifusion_diag.model.checkpoints import load_weights
from bifusion_diag.model.gate import LearnedGate
from bifusion_diag.model.heads import L2Normalize
from bifusion_diag.model.outputs import SegmenterOutput
from bifusion_diag.model.projection import PointSampling
from bifusion_diag.model.segmenter import Segmenter
from bifusion_diag.training.determinism import choose_device
from bifusion_diag.training.evaluation import training_source
from bifusion_diag.training.optim import build_optimizer
from bifusion_diag.training.stages import StageSwitch, stages_of

Say = Callable[[str], None]


@dataclass
class Sights:
    """What was seen of modules in one forward."""

    rows: dict[str, int] = field(default_factory=dict)  # BatchNorm → rows R that its statistics are of
    masked_rows: dict[str, tuple[int, int]] = field(default_factory=dict)  # attention → rows without a key, of so many
    normalised: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)  # L2Normalize → (input, output)
    maps: Tensor | None = None  # what the 2D features are sampled from


@dataclass(frozen=True)
class Step:
    """A forward with its graph, and what was seen on the way."""

    output: SegmenterOutput
    sights: Sights


@dataclass(frozen=True)
class Measured:
    """The gradient of the total loss where a phase of the run begins.

    Attributes:
        phase: of the run.
        trainable: names of the parameters that require a gradient then.
        arrived: name → norm of the gradient in ``.grad`` after the backward, of those that have one.
        total: the loss.
    """

    phase: Phase
    trainable: frozenset[str]
    arrived: Mapping[str, float]
    total: float

    @property
    def norm(self) -> float:
        """Of the whole gradient, before clipping."""
        return float(torch.tensor(list(self.arrived.values()), dtype=torch.float64).norm()) if self.arrived else 0.0


class Bench:
    """Model, data and optimiser as the first step of the run has them.

    Args:
        settings: of the run.
        thresholds: of the findings.
        source: of the scenes; None opens the run's own.
        say: is told what is under way.

    Raises:
        UserError: data or weights that are not there or do not fit.
    """

    def __init__(
        self,
        settings: Settings,
        thresholds: Thresholds = DEFAULT_THRESHOLDS,
        source: SceneSource | None = None,
        say: Say = lambda what: None,
    ) -> None:
        self.settings = settings
        self.thresholds = thresholds
        self.say = say
        self.device = choose_device(settings.training.device)
        self.source = training_source(settings) if source is None else source
        training = settings.training
        self.loader = BatchLoader(self.source, settings.data, batch_size=training.batch_size, seed=training.seed)
        torch.manual_seed(training.seed)
        self.model: Segmenter = build_model(settings).to(self.device).train()
        if settings.model.init_from is not None:
            load_weights(self.model, Path(settings.model.init_from))
        self.optimizer = build_optimizer(self.model, settings.optim)
        self.stages = stages_of(settings)
        self.phases = phases_of(settings, self._gate_is_early)

    @cached_property
    def batch(self) -> Batch:
        """That of the run's first step."""
        self.say("loading a batch")
        return self.loader.batch(0).to(self.device)

    @property
    def fused(self) -> bool:
        """The model has a 2D branch."""
        return self.settings.model.uses_clip

    @cached_property
    def measured(self) -> tuple[Measured, ...]:
        """The gradient in every phase; where the same parameters learn from the same terms, it is measured once.

        Afterwards the model is in the last phase.
        """
        switch = StageSwitch(self.model, self.stages, self.settings.training.steps)
        found: list[Measured] = []
        for phase in self.phases:
            self.model.set_progress(phase.begin, self.settings.training.steps)
            switch.enter(phase.begin)
            trainable = frozenset(name for name, p in self.model.named_parameters() if p.requires_grad)
            if found and _reaches_alike(found[-1], phase, trainable):
                found.append(Measured(phase, trainable, found[-1].arrived, found[-1].total))
                continue
            self.say(f"measuring gradients at step {phase.begin}, stage {phase.stage.name}")
            found.append(self._measure(phase, trainable))
        return tuple(found)

    def _measure(self, phase: Phase, trainable: frozenset[str]) -> Measured:
        self.model.zero_grad(set_to_none=True)
        loss = self.forward(self.batch).output.loss
        if loss.total.requires_grad:
            loss.total.backward()
        arrived = {
            name: float(torch.linalg.vector_norm(p.grad, dtype=torch.float64))
            for name, p in self.model.named_parameters()
            if p.grad is not None
        }
        self.model.zero_grad(set_to_none=True)
        return Measured(phase, trainable, arrived, loss.total.item())

    @cached_property
    def step(self) -> Step:
        """A step of the last phase, in which the most learns; its graph may be walked again and again."""
        _ = self.measured
        return self.forward(self.batch)

    @cached_property
    def learning(self) -> dict[str, nn.Parameter]:
        """The parameters that learn in the last phase, by name."""
        _ = self.measured
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @cached_property
    def term_gradients(self) -> dict[str, dict[str, float | None]]:
        """Term → parameter → norm of the unweighted term's gradient; None where no path leads there."""
        found: dict[str, dict[str, float | None]] = {}
        terms = self.step.output.loss.terms
        for place, (name, term) in enumerate(terms.items(), start=1):
            self.say(f"backward of {name} ({place} of {len(terms)})")
            found[name] = gradient_norms(term, self.learning)
        return found

    def forward(self, batch: Batch) -> Step:
        """A forward in train mode with the queries of the run's seed."""
        torch.manual_seed(self.settings.training.seed)
        sights = Sights()
        with watching(self.model, sights):
            return Step(self.model(batch), sights)

    def _gate_is_early(self, step: int) -> bool:
        """Whether the gate is still held at this step: the gate itself is asked."""
        gates = [module for module in self.model.modules() if isinstance(module, LearnedGate)]
        for gate in gates:
            gate.set_progress(step, self.settings.training.steps)
        return any(gate.early for gate in gates)


def _reaches_alike(before: Measured, phase: Phase, trainable: frozenset[str]) -> bool:
    """The same parameters learn from the same terms as in the phase before: only how much these weigh has changed."""
    on = [{name for name, weight in one.weights.items() if weight} for one in (before.phase, phase)]
    return before.trainable == trainable and on[0] == on[1] and before.phase.gate_held == phase.gate_held


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to: of the encoder its children, else the child of the model."""
    words = name.split(".")
    return ".".join(words[:2]) if words[0] == "encoder" else words[0]


def gradient_norms(value: Tensor, parameters: Mapping[str, nn.Parameter]) -> dict[str, float | None]:
    """Norm of the gradient of a scalar by parameter, None where no path leads there; the graph is kept."""
    if not value.requires_grad:
        return dict.fromkeys(parameters)
    gradients = torch.autograd.grad(value, list(parameters.values()), retain_graph=True, allow_unused=True)
    return {
        name: None if gradient is None else float(torch.linalg.vector_norm(gradient, dtype=torch.float64))
        for name, gradient in zip(parameters, gradients, strict=True)
    }


@contextmanager
def watching(model: nn.Module, sights: Sights) -> Iterator[None]:
    """Within it, a forward of the model fills `sights`."""
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            handles.append(module.register_forward_pre_hook(_note_rows(sights, name)))
        elif isinstance(module, nn.MultiheadAttention):
            handles.append(module.register_forward_pre_hook(_note_mask(sights, name), with_kwargs=True))
        elif isinstance(module, L2Normalize):
            handles.append(module.register_forward_hook(_note_pair(sights, name)))
        elif isinstance(module, PointSampling):
            handles.append(module.register_forward_pre_hook(_note_maps(sights)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _note_rows(sights: Sights, name: str) -> Callable[..., None]:
    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if module.training:
            rows = inputs[0].numel() // max(inputs[0].shape[1], 1)
            sights.rows[name] = min(rows, sights.rows.get(name, rows))

    return note


def _note_mask(sights: Sights, name: str) -> Callable[..., None]:
    def note(module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor | None]) -> None:
        mask = named.get("attn_mask")
        if mask is not None:
            hidden = mask if mask.dtype == torch.bool else torch.isneginf(mask)
            rows = hidden.flatten(0, -2)
            bad, all_rows = sights.masked_rows.get(name, (0, 0))
            sights.masked_rows[name] = (bad + int(rows.all(-1).sum()), all_rows + len(rows))

    return note


def _note_pair(sights: Sights, name: str) -> Callable[..., None]:
    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        sights.normalised.setdefault(name, []).append((inputs[0], output))

    return note


def _note_maps(sights: Sights) -> Callable[..., None]:
    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        sights.maps = inputs[0]

    return note
