"""The signs of life of a step: plain numbers, from which the detector decides whether the step is bad."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

#: What a module's own parameters got from the backward pass, worst last; as `grads/<module>/state` of the record.
FROZEN, NO_GRADIENT, ZERO, FINITE, NONFINITE = range(5)


@dataclass(frozen=True)
class InputRange:
    """One floating-point tensor of the batch.

    Attributes:
        absmax: largest absolute value that is finite.
        bad: NaN and infinite values.
        sample: the sample that holds the largest or, if there are bad ones, the first bad value; None where the
            tensor's first dimension is not the batch.
    """

    absmax: float
    bad: int
    sample: int | None


@dataclass(frozen=True)
class Alpha:
    """What a fusion gate returned: finite values of α only."""

    mean: float
    low: float  # share below 0.05
    high: float  # share above 0.95
    bad: int


@dataclass(frozen=True)
class Vitals:
    """A step as it was measured up to the optimiser's step; `moved` and what follows is known after it.

    Modules are those that own parameters. A module is missing where it was not measured.

    Attributes:
        step: its number.
        terms: raw loss terms.
        weights: of the terms, where they are known.
        total: the loss that was differentiated.
        grad_norm: L2 norm of all parameter gradients before clipping, in float64: finite wherever every element is.
        grad_norm32: as float32 code computes it: infinite where a sum of squares overflows. None: not computed.
        norms: by module: L2 norm of its own parameters' gradients; 0 for none.
        states: by module: FROZEN ... NONFINITE.
        bad_parameters: names of those whose gradient is NaN or infinite.
        altered: names of parameters whose gradient was changed between the backward's end and the optimiser's step by
            more than one common finite factor.
        spoilt: those of them whose gradient is not finite now; all of them where no gradient is left at all.
        uncleared: names of parameters that still held the gradient of the last update when the first backward began.
        ran: modules whose forward ran in this step.
        scaled_out: a GradScaler has found an overflow and skips the step, which is its work.
        inputs: by path in the batch.
        alphas: by module.
        bad_buffers: names of buffers that are NaN or infinite and were not when the step began.
        rates: learning rate by group: "0" ... or the group's name, "1:0" for the second optimiser's first.
        held: modules of which an optimiser holds a parameter.
        moved: by module: whether any sampled weight changed in the update; None: there was no update.
        update_ratio: by module: ‖Δw‖ / ‖w‖ of the sampled weights.
        bad_weights: names of parameters that the update made NaN or infinite.
        parameters: by parameter: FROZEN ... NONFINITE, as of modules; empty where no backward was seen.
        owners: by parameter: the modules that own it.
        outside: by module: ‖Δw‖ / ‖w‖ of the sampled weights from the last update to just before this one, where they
            have changed in between; only of modules that an optimiser holds.
        stuck: names of parameters that got a gradient and whose sampled weights did not move in the update.
        loose: names of parameters that require a gradient and that no optimiser holds.
        local_norm: L2 norm of this process's own gradient, before it was reduced over processes; None: not measured.
    """

    step: int
    terms: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    total: float | None = None
    grad_norm: float | None = None
    grad_norm32: float | None = None
    norms: Mapping[str, float] = field(default_factory=dict)
    states: Mapping[str, int] = field(default_factory=dict)
    bad_parameters: tuple[str, ...] = ()
    altered: tuple[str, ...] = ()
    spoilt: tuple[str, ...] = ()
    uncleared: tuple[str, ...] = ()
    ran: frozenset[str] = frozenset()
    scaled_out: bool = False
    inputs: Mapping[str, InputRange] = field(default_factory=dict)
    alphas: Mapping[str, Alpha] = field(default_factory=dict)
    bad_buffers: tuple[str, ...] = ()
    rates: Mapping[str, float] = field(default_factory=dict)
    held: frozenset[str] = frozenset()
    moved: Mapping[str, bool] | None = None
    update_ratio: Mapping[str, float] = field(default_factory=dict)
    bad_weights: tuple[str, ...] = ()
    parameters: Mapping[str, int] = field(default_factory=dict)
    owners: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    outside: Mapping[str, float] = field(default_factory=dict)
    stuck: tuple[str, ...] = ()
    loose: frozenset[str] = frozenset()
    local_norm: float | None = None
