"""Where a bad step starts: known by construction."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bifusion_diag.diagnosis import measure
from bifusion_diag.record.schema import Run

RunMaker = Callable[..., Run]
MODULES = ("backbone", "gate", "decoder")  # in execution order
NAN = float("nan")


def gradients(states: dict[str, list[int]], norms: dict[str, list[float]]) -> dict[str, list[float]]:
    series: dict[str, list[float]] = {f"grads/{module}/state": list(map(float, s)) for module, s in states.items()}
    return series | {f"grads/{module}/param_norm": values for module, values in norms.items()}


def test_a_nonfinite_gradient_starts_in_the_last_executed_of_the_bad_modules(make_run: RunMaker) -> None:
    series = gradients({"backbone": [3, 4], "gate": [3, 4], "decoder": [3, 3]}, {})
    run = make_run({"loss/total": [1, 1], "train/grad_norm": [1, NAN], **series}, modules=MODULES)
    (origin,) = measure(run).origins
    assert (origin.step, origin.kind, origin.module, origin.terms) == (1, "non-finite", "gate", ())


def test_a_nonfinite_term_comes_before_any_module(make_run: RunMaker) -> None:
    series = gradients({"backbone": [3, 4], "decoder": [3, 4]}, {})
    losses = {"loss/total": [1, NAN], "loss/instance/raw": [1, NAN], "loss/semantic/raw": [1, 1]}
    (origin,) = measure(make_run({**losses, **series}, modules=MODULES)).origins
    assert origin.terms == ("instance",)
    assert origin.module is None
    assert origin.place == "loss term instance"


def test_a_spike_starts_in_the_first_module_of_the_backward_pass_that_jumps(make_run: RunMaker) -> None:
    steady = np.ones(30)
    jump = np.concatenate([np.ones(29), [50]])
    state = dict.fromkeys(MODULES, [3] * 30)
    norms = {"backbone": (jump * 2).tolist(), "gate": jump.tolist(), "decoder": steady.tolist()}
    run = make_run({"train/grad_norm": jump, **gradients(state, norms)}, modules=MODULES)
    (origin,) = measure(run).origins
    assert (origin.step, origin.module, origin.growth) == (29, "gate", 50.0)


def test_without_gradients_by_module_the_place_is_unknown(make_run: RunMaker) -> None:
    (origin,) = measure(make_run({"train/grad_norm": [1, NAN]})).origins
    assert origin.place is None
