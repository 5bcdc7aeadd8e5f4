"""Rules that state a count that ought to be zero: of the probes activations, attention and data."""

from __future__ import annotations

import numpy as np

from bifusion_diag.diagnosis.findings import Context, Evidence, Finding, Severity
from bifusion_diag.diagnosis.instruments import matching, total
from bifusion_diag.diagnosis.phrase import say
from bifusion_diag.diagnosis.quantity import NotMeasured, Quantity
from bifusion_diag.diagnosis.rules.series import innermost

SHOWN_COUNTS = 5  # series that one finding names


def nonfinite_output(context: Context) -> list[Finding] | NotMeasured:
    """A module's output is NaN or infinite: one finding, with the first one."""
    outputs = dict(matching(context.run, r"activations/(.+)/nonfinite"))
    if not outputs:
        return NotMeasured("the outputs of modules were not measured (probe activations)")
    bad = {module: series for module, series in outputs.items() if (series.max > 0).any()}
    if not bad:
        return []
    first = {module: int(series.steps[np.argmax(series.max > 0)]) for module, series in bad.items()}
    begin = min(first.values())
    order = {info.name: info.order for info in context.run.modules}
    at_once = [module for module, step in first.items() if step == begin]
    # A module that contains another one is entered before it and returns after it.
    module = min(innermost(at_once), key=lambda name: order.get(name, len(order)))
    mechanism = say(
        "Of the modules whose output is non-finite at step {step}, {module} is the one that runs first, leaving out "
        "those that only contain another. Where a module masks with infinity this is as it should be.",
        step=begin,
        module=module,
    )
    evidence = (
        Evidence("steps", Quantity(int((bad[module].max > 0).sum()), "steps"), bad[module].name)
        if bad[module].exact
        else Evidence("steps", NotMeasured("the record is reduced"), bad[module].name),
        Evidence("modules with such an output", Quantity(len(bad), "modules"), bad[module].name),
    )
    title = say("The output of {module} is NaN or infinite", module=module)
    return [Finding("nonfinite-output", "warning", title, evidence, mechanism, (begin, begin), module=module)]


def labels_out_of_range(context: Context) -> list[Finding] | NotMeasured:
    """A batch holds class ids that no class has."""
    return _counted(
        context,
        r"data/(.+)/out_of_range",
        "the labels were not measured (probe data, told their range)",
        ("labels-out-of-range", "error", "Labels hold ids that no class has"),
        "Such an id is neither a class nor the one that is ignored. A loss that looks it up fails, and on CUDA takes "
        "the process with it.",
    )


def data_nonfinite(context: Context) -> list[Finding] | NotMeasured:
    """A batch holds NaN or infinity."""
    return _counted(
        context,
        r"data/(.+)/nonfinite",
        "the batches were not measured (probe data)",
        ("data-nonfinite", "warning", "The batches hold NaN or infinity"),
        "The loader hands it out so. In train mode BatchNorm takes it into its buffers already in the forward, where "
        "skipping the step does not help.",
    )


def attention_masked_rows(context: Context) -> list[Finding] | NotMeasured:
    """A query may see no key at all."""
    return _counted(
        context,
        r"attention/(.+)/masked_rows",
        "no attention was measured (probe attention)",
        ("attention-masked-rows", "warning", "Attention has rows that may see no key"),
        "The softmax of such a row is 0/0: NaN, or whatever the kernel makes of it.",
    )


def empty_matches(context: Context) -> list[Finding] | NotMeasured:
    """A scene has objects and no query is matched with any of them."""
    return _counted(
        context,
        r"matching/(empty)",
        "the matching of queries was not measured (probe matching)",
        ("empty-match", "warning", "Scenes have objects that no query is matched with"),
        "What is averaged over the matched queries is then averaged over nothing: NaN with every gradient finite, "
        "unless the loss takes care of it.",
    )


def _counted(
    context: Context, pattern: str, gap: str, words: tuple[str, Severity, str], mechanism: str
) -> list[Finding] | NotMeasured:
    """One finding where one of some counts is ever above zero, with the largest of them and the steps."""
    counts = dict(matching(context.run, pattern))
    if not counts:
        return NotMeasured(gap)
    bad = {name: series for name, series in counts.items() if (series.max > 0).any()}
    if not bad:
        return []
    steps = np.unique(np.concatenate([series.steps[series.max > 0] for series in bad.values()]))
    largest = sorted(bad, key=lambda name: -(total(bad[name].stats) or 0.0))[:SHOWN_COUNTS]
    evidence = tuple(
        Evidence(say("{name}, over all steps", name=name), Quantity(total(bad[name].stats)), bad[name].name)
        for name in largest
    )
    if len(bad) > SHOWN_COUNTS:
        others = Quantity(len(bad) - SHOWN_COUNTS, "others")
        evidence += (Evidence("and so many more", others, bad[largest[0]].name),)
    exact = all(series.exact for series in bad.values())  # else these are buckets of several steps
    count = int(steps.size) if exact else None
    return [Finding(*words, evidence, mechanism, (int(steps[0]), int(steps[-1])), count)]
