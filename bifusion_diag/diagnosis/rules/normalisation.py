"""Rules of what is divided by."""

from __future__ import annotations

import numpy as np

from bifusion_diag.diagnosis.findings import Context, Evidence, Finding
from bifusion_diag.diagnosis.instruments import matching
from bifusion_diag.diagnosis.phrase import join, say
from bifusion_diag.diagnosis.quantity import NotMeasured, Quantity
from bifusion_diag.diagnosis.rules.declared import declared
from bifusion_diag.record.schema import Run

L2_NAMES = ("L2Normalize", "L2Norm", "Normalize")  # classes that divide by a length
EPSILON = 1e-12  # of F.normalize
NORMALIZE = "model.projection.normalize"


def near_zero_norm(context: Context) -> list[Finding] | NotMeasured:
    """Vectors of nearly no length are L2-normalised."""
    kinds = {module.name: module.type for module in context.run.modules}
    found = dict(matching(context.run, r"normalize/(.+)/smallest"))
    # All others divide by a deviation, to which they add an ε of 1e-5 or so: their gain is at most some hundred.
    lengths = {name: series for name, series in found.items() if kinds.get(name) in L2_NAMES}
    if not lengths:
        return NotMeasured("no L2 normalisation was measured (probe normalize)")
    limit = context.thresholds.near_zero_norm
    findings = []
    for name, series in lengths.items():
        smallest = series.stats.min
        if smallest is None or smallest >= limit:
            continue
        bad = np.flatnonzero(series.min < limit)
        gain = 1 / max(smallest, EPSILON)
        evidence = [
            Evidence("smallest norm that is divided by", Quantity(smallest), series.name),
            Evidence("gain of the backward pass there", Quantity(gain, "×"), series.name),
        ]
        if series.exact:
            evidence.append(Evidence("steps with such a norm", Quantity(int(bad.size), "steps"), series.name))
        arrived = _gradient_before(context.run, name)
        if arrived is not None:
            label = "largest gradient norm at what is normalised"
            evidence.append(Evidence(label, Quantity(context.run.all_series[arrived].stats.max), arrived))
        planted = declared(context.run.settings, NORMALIZE) == "after_sampling" and name.endswith("normalize2d")
        findings.append(
            Finding(
                "near-zero-norm",
                "warning",
                say("{module} normalises vectors of nearly no length", module=name),
                tuple(evidence),
                join(
                    [
                        say(
                            "x ÷ max(‖x‖, 1e-12) multiplies the gradient by up to {gain:.3g} there; a vector that is "
                            "exactly 0 has the largest gain of all.",
                            gain=gain,
                        ),
                        "This run normalises after the sampling: points out of view are zero vectors. What is "
                        "discarded afterwards is discarded only as long as it is finite."
                        if planted
                        else "",
                    ]
                ),
                (int(series.steps[bad[0]]), int(series.last[bad[-1]])),
                int(bad.size) if series.exact else None,
                module=name,
                remedy={NORMALIZE: "before_sampling"} if planted else None,
            )
        )
    return findings


def _gradient_before(run: Run, module: str) -> str | None:
    """The gradient at the output of the module that ran last before this one, in the same container: what enters it."""
    order = {info.name: info.order for info in run.modules}
    container = module.rpartition(".")[0]
    before = [
        name
        for name, _ in matching(run, r"grads/(.+)/output_norm")
        if name.rpartition(".")[0] == container and order.get(name, -1) < order.get(module, -1)
    ]
    return f"grads/{max(before, key=order.__getitem__)}/output_norm" if before else None
