"""What the optimiser holds against what learns, in every stage."""

from __future__ import annotations

from torch import nn

from bifusion_diag.diagnosis.phrase import say
from bifusion_diag.experiments.audit.bench import Bench, part_of
from bifusion_diag.experiments.audit.gradient_flow import listed
from bifusion_diag.experiments.audit.result import Cell, Draft, Section
from bifusion_diag.model.sparse import BatchNorm


def optimiser(bench: Bench) -> Section:
    """Groups, what learns and is in none, what is held and never learns, and what decays although it is a norm."""
    draft = Draft("optimiser", "Optimiser and frozen parameters")
    names = {id(p): name for name, p in bench.model.named_parameters()}
    sizes = {name: p.numel() for name, p in bench.model.named_parameters()}
    groups = bench.optimizer.param_groups
    held = {names[id(p)] for group in groups for p in group["params"] if id(p) in names}
    strangers = sum(id(p) not in names for group in groups for p in group["params"])
    learns = {name for measured in bench.measured for name in measured.trainable}
    rows: list[list[Cell]] = []
    for number, group in enumerate(groups):
        own = [names[id(p)] for p in group["params"] if id(p) in names]
        frozen = [sum(sizes[name] for name in own if name not in measured.trainable) for measured in bench.measured]
        rows.append(
            [
                str(group.get("name", number)),
                sum(sizes[name] for name in own),
                max(frozen, default=0),
                bench.settings.optim.lr,
                float(group["weight_decay"]),
            ]
        )
    draft.table("Groups of the optimiser", ("group", "weights", "at most frozen", "lr", "decay"), rows, shown=False)
    _outside(draft, [name for name in sizes if name in learns - held], sizes)
    _useless(draft, [name for name in sizes if name in held - learns], sizes, strangers)
    _decay(draft, bench, held)
    return draft.done()


def _outside(draft: Draft, names: list[str], sizes: dict[str, int]) -> None:
    count = draft.number(
        "outside", "weights that learn and are in no group", sum(sizes[name] for name in names), "weights"
    )
    if names:
        parts = list(dict.fromkeys(map(part_of, names)))
        draft.report(
            "not-in-optimiser",
            "error",
            say("{parts} gets gradients, and no optimiser holds it", parts=listed(parts)),
            "Its weights never move. It was added, replaced or released after the optimiser was made.",
            count,
            module=parts[0],
        )


def _useless(draft: Draft, names: list[str], sizes: dict[str, int], strangers: int) -> None:
    count = draft.number(
        "never_learn", "weights in a group that no stage ever releases", sum(sizes[name] for name in names), "weights"
    )
    other = draft.number("strangers", "parameters in a group that the model does not have", strangers, "parameters")
    if names or strangers:
        parts = list(dict.fromkeys(map(part_of, names)))
        draft.report(
            "frozen-in-optimiser",
            "warning",
            say("The optimiser holds {parts}, which never learns", parts=listed(parts) or "foreign parameters"),
            "Without a gradient AdamW leaves a parameter as it is. But an optimiser that is given zeros instead of no "
            "gradient decays it, and its moments are memory for nothing.",
            count,
            other,
            module=parts[0] if parts else None,
        )


def _decay(draft: Draft, bench: Bench, held: set[str]) -> None:
    """Weight decay on norms and biases, as ESAM has it too: a number."""
    norms = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, BatchNorm)
    decayed = {id(p) for group in bench.optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    found = sum(
        p.numel()
        for module in bench.model.modules()
        if isinstance(module, norms)
        for p in module._parameters.values()
        if p is not None and id(p) in decayed
    )
    draft.number(
        "decayed_norms",
        "weights of BatchNorm and LayerNorm that decay",
        found,
        "weights",
        "ESAM decays them too; over a long run their scales shrink",
    )
    draft.number("held", "parameters that the optimiser holds", len(held), "parameters")
