"""Puts faults into a run, at the steps that its settings name.

A fault is a pure function of the settings and the step: a resumed run, a step that runs again in place, and a
capsule's replay have the very same one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from bifusion_diag.data.batch import Batch
from bifusion_diag.errors import UserError, near_matches
from bifusion_diag.model.outputs import LossOutput
from bifusion_diag.model.segmenter import Segmenter
from bifusion_diag.probes.ranks import own_rank, world_size
from bifusion_diag.training.faults import states
from bifusion_diag.training.faults.catalogue import FAULTS, Fault
from bifusion_diag.training.faults.outputs import changed
from bifusion_diag.training.faults.states import split_off

#: Where a fault of a module strikes if nothing is said: the first of these that the model has.
MODULES = ("encoder.head3d", "decoder.layers.1", "decoder.layers.0", "decoder")
FORM = "NAME@STEP or NAME@STEP:WHERE, for example nan-output@20:encoder.film"


@dataclass(frozen=True)
class Injection:
    """One fault of a run.

    Attributes:
        fault: what it does.
        step: its first step, from 0 on.
        where: module, term, sample or rank; "" = the fault's default, or it has none.
    """

    fault: Fault
    step: int
    where: str = ""

    @property
    def message(self) -> str:
        """What is said of it in the record."""
        place = f" ({self.fault.where} {self.where})" if self.where else ""
        until = "from here on" if self.fault.lasts else "in this step"
        return f"fault injected on purpose: {self.fault.name}{place}: {self.fault.description}; {until}"

    def strikes(self, step: int) -> bool:
        """Whether it is active in a step."""
        return step == self.step or (self.fault.lasts and step > self.step)


def parse_injections(specs: Sequence[str]) -> list[Injection]:
    """Read ``NAME@STEP[:WHERE]``. What WHERE names is checked when the model is known.

    Raises:
        UserError: an unknown name, a step that is no number, or a WHERE for a fault that takes none.
    """
    return [_parse(spec) for spec in specs]


def _parse(spec: str) -> Injection:
    name, at, rest = spec.partition("@")
    step, _, where = rest.partition(":")
    if name not in FAULTS:
        raise UserError(f"--inject {spec}: unknown fault {name!r}.{near_matches(name, FAULTS)} List: --inject list")
    if not at or not step.isdecimal():
        raise UserError(f"--inject {spec}: give {FORM}")
    fault = FAULTS[name]
    if where and not fault.where:
        raise UserError(f"--inject {spec}: {name} takes no place; give {name}@{step}")
    return Injection(fault, int(step), where)


class Faults:
    """The faults of a run, and the points of a step at which they strike::

        faults = Faults(settings.training.inject, model, optimizer, batch_size=4)
        for step in ...:
            faults.before_step(step)                 weights, buffers, moments, frozen parts; after stages and rates
            batch = faults.batch(step, batch)        before monitor.step(batch): capsules hold the faulty batch
            with faults.context(step):               hooks on modules and criterion, gone afterwards
                with monitor.step(batch):
                    forward, loss, backward
                    faults.after_backward(step)      before clipping
                    clip
                    faults.before_update(step)       learning rates
                    optimizer.step()

    When a step runs again, in place or of a capsule, ``context`` alone is needed: the rest is in the batch and the
    state.

    Args:
        specs: NAME@STEP[:WHERE] each.
        model: with its criterion.
        optimizer: None: of a step that runs again.
        batch_size: samples of a process.

    Raises:
        UserError: a fault that is unknown, or a place that this run has not.
    """

    def __init__(
        self, specs: Sequence[str], model: Segmenter, optimizer: Optimizer | None = None, *, batch_size: int
    ) -> None:
        self._model, self._optimizer = model, optimizer
        self._modules = dict(model.named_modules())
        self.injections = [self._placed(injection, batch_size) for injection in parse_injections(specs)]
        for injection in self.injections:
            if injection.fault.point == "rates" and injection.where and optimizer is not None:
                split_off(optimizer, self._parameters(injection))

    def provenance(self) -> list[str]:
        """Each as NAME@STEP[:WHERE], for the record's header; defaults are filled in."""
        return [f"{i.fault.name}@{i.step}" + (f":{i.where}" if i.where else "") for i in self.injections]

    def beginning(self, step: int) -> list[str]:
        """Messages of the faults that begin at this step, for events of kind "inject"."""
        return [injection.message for injection in self.injections if injection.step == step]

    def before_step(self, step: int, *, begun: bool = False) -> None:
        """Change weights, buffers, the optimiser's state, and what requires a gradient.

        Args:
            step: that is about to begin.
            begun: its state was saved when it had begun, and is restored: what lasts is done again, and nothing twice.
        """
        for injection in self._due(step, "weights"):
            if begun and not injection.fault.lasts:
                continue
            try:
                injection.fault.act(self._module(injection), self._optimizer)
            except (IndexError, StopIteration, ValueError) as error:
                name = injection.fault.name
                has = "no weights or buffers" if "moment" not in name else "no moments yet"
                raise UserError(f"--inject {name}@{step}: '{injection.where}' has {has}; give another") from error

    def batch(self, step: int, batch: Batch) -> Batch:
        """The batch with the step's faults in it."""
        for injection in self._due(step, "batch"):
            sample = int(injection.where) if injection.fault.where == "sample" else 0
            batch = injection.fault.act(batch, sample, step)
        return batch

    @contextmanager
    def context(self, step: int) -> Iterator[None]:
        """Inside, forward, backward and losses have the step's faults."""
        handles = self.install(step)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def install(self, step: int) -> list[RemovableHandle]:
        """As :meth:`context`, for good: for a model that runs this one step again and again."""
        handles = []
        for injection in self._due(step, "output"):
            handles.append(self._module(injection).register_forward_hook(_on_output(injection.fault), prepend=True))
        criterion = self._model.criterion
        for injection in self._due(step, "term"):
            handles.append(criterion.register_forward_hook(_on_term(injection), prepend=True))
        for injection in self._due(step, "criterion"):
            before, after = _with_settings(injection.fault)
            handles.append(criterion.register_forward_pre_hook(before))
            handles.append(criterion.register_forward_hook(after, prepend=True, always_call=True))
        return handles

    def after_backward(self, step: int) -> None:
        """Change gradients before they are clipped."""
        for injection in self._due(step, "gradients"):
            injection.fault.act(self._parameters(injection))

    def before_update(self, step: int) -> None:
        """Change learning rates for this update; the loop sets them anew in each step."""
        assert self._optimizer is not None
        for injection in self._due(step, "rates"):
            own = {id(p) for p in self._parameters(injection)} if injection.where else None
            for group in self._optimizer.param_groups:
                if own is None or any(id(p) in own for p in group["params"]):
                    injection.fault.act(group)

    def _due(self, step: int, point: str) -> Iterator[Injection]:
        for injection in self.injections:
            mine = injection.fault.where != "rank" or int(injection.where) == own_rank()
            if injection.fault.point == point and injection.strikes(step) and mine:
                yield injection

    def _module(self, injection: Injection) -> nn.Module:
        if injection.fault.where == "rank":
            return self._modules[self._default_module()]
        return self._modules[injection.where]

    def _parameters(self, injection: Injection) -> list[nn.Parameter]:
        return list(self._module(injection).parameters())

    def _default_module(self) -> str:
        return next(name for name in MODULES if name in self._modules)

    def _placed(self, injection: Injection, batch_size: int) -> Injection:
        """With its default filled in, and what it names checked."""
        fault, where = injection.fault, injection.where or injection.fault.default
        told = f"--inject {fault.name}@{injection.step}:{where}"
        if fault.where == "module":
            where = where or self._default_module()
            if where not in self._modules or not where:
                raise UserError(f"{told}: the model has no module {where!r}.{near_matches(where, self._modules)}")
            if fault.point in ("weights", "gradients", "rates"):
                what = "buffers" if fault.act is states.nan_buffer else "weights"
                module = self._modules[where]
                if not any(
                    x.is_floating_point() for x in (module.buffers if what == "buffers" else module.parameters)()
                ):
                    raise UserError(f"{told}: {where!r} has no {what}; give another")
            if injection.step == 0 and fault.act in (states.nan_moment, states.zero_second_moment):
                raise UserError(f"{told}: there are no moments before the first update; give a later step")
        elif fault.where == "term":
            names = self._model.criterion.term_names
            where = where if injection.where or where in names else names[0]
            if where not in names:
                raise UserError(f"{told}: the loss has no term {where!r}.{near_matches(where, names)}")
        elif fault.where == "sample":
            where = where or "0"
            if not where.isdecimal() or int(where) >= batch_size:
                raise UserError(
                    f"{told}: {where!r} is no sample of a batch of {batch_size}; give 0 to {batch_size - 1}"
                )
        elif fault.where == "rank":
            where = where or "1"
            if not where.isdecimal() or int(where) >= world_size():
                raise UserError(
                    f"{told}: there is no rank {where}; this run has {world_size()} process(es): start it with "
                    "torchrun --nproc-per-node N -m bifusion_diag train ..."
                )
        if fault.point == "criterion" and "clip_align" not in self._model.criterion.term_names:
            raise UserError(f"{told.rstrip(':')}: this model's loss has no term clip_align")
        return Injection(fault, injection.step, where)


def _on_output(fault: Fault) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        result, done = changed(output, fault.act)
        if not done:
            raise UserError(f"--inject {fault.name}: a {type(module).__name__} gives no tensor; name another module")
        return result

    return hook


def _on_term(injection: Injection) -> Any:
    def hook(module: nn.Module, args: Any, output: LossOutput) -> LossOutput:
        name = injection.where if injection.fault.where == "term" else next(iter(output.terms))
        terms: dict[str, Tensor] = {**output.terms, name: injection.fault.act(output.terms[name])}
        weighted = [output.weights[term] * value for term, value in terms.items() if output.weights[term]]
        return output._replace(total=sum(weighted, start=output.total.new_zeros(())), terms=terms)

    return hook


def _with_settings(fault: Fault) -> tuple[Any, Any]:
    """Hooks that give the criterion other settings for one call."""
    kept: list[Any] = []

    def before(module: Any, args: Any) -> None:
        kept.append(module.settings)
        module.settings = fault.act(module.settings)

    def after(module: Any, args: Any, output: Any) -> None:
        module.settings = kept.pop()

    return before, after
