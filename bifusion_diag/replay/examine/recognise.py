"""Which mechanism a bad step is, from what was measured, told with its numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.nn.modules.loss import _Loss

from bifusion_diag.replay.examine.calls import named_modules
from bifusion_diag.replay.examine.choose import Choice, changed_outside, outlier
from bifusion_diag.replay.examine.facts import FEW_ROWS, GRAPH, SPIKES, UPDATE, Facts, few_row_norm, unusual, value_of
from bifusion_diag.replay.examine.mechanisms import MECHANISMS, UNKNOWN
from bifusion_diag.replay.examine.optimizer_state import held_by
from bifusion_diag.replay.examine.origin import Origin
from bifusion_diag.replay.step import TOTAL

ROOT = "(root)"  # the model itself
TINY = 1e-4  # norm of a vector that is normalised
SMALL = 1e-6  # divisor
VAGUE = ("gradient-scaled", "module-output-jump", UNKNOWN)  # which say where and not why
TORCH_FUNCTIONS = ("BackwardHookFunctionBackward", "CheckpointFunctionBackward")


@dataclass(frozen=True)
class Verdict:
    """A mechanism and what shows it.

    Attributes:
        mechanism: id.
        explanation: what happened, with this step's numbers.
        evidence: label → number or text.
        harmless: the update may be done all the same.
    """

    mechanism: str
    explanation: str
    evidence: dict[str, Any] = field(default_factory=dict)
    harmless: bool = False


Recogniser = Callable[[Facts, Choice], Verdict | None]


def recognise(facts: Facts, choice: Choice) -> Verdict:
    """The first mechanism that fits."""
    for recogniser in RECOGNISERS:
        verdict = recogniser(facts, choice)
        if verdict is not None:
            return verdict
    return Verdict(UNKNOWN, f"{_sentence(facts.plain.triggers[0].message)} {_sentence(MECHANISMS[UNKNOWN].why)}")


# --- what is said by the kind of alarm alone -------------------------------------------------------------------------


def _raised(facts: Facts, choice: Choice) -> Verdict | None:
    if facts.kind != "exception":
        return None
    return _verdict("raised", facts.plain.triggers[0].message)


def _ranks(facts: Facts, choice: Choice) -> Verdict | None:
    if facts.kind != "rank-divergence":
        return None
    return _verdict("rank-desync", facts.plain.triggers[0].message)


def _part_does_not_learn(facts: Facts, choice: Choice) -> Verdict | None:
    if facts.kind not in GRAPH:
        return None
    trigger, cause = facts.plain.triggers[0], choice.cause
    module = f"module {trigger.module}" if trigger.module else "a part"
    mine = [name for name in facts.training.parameters() if _inside(name, trigger.module)]
    if facts.kind == "frozen-module" or (cause is not None and cause.op == "requires_grad=False"):
        return _verdict("frozen", f"{module} requires no gradient any more", {"parameters": ", ".join(mine[:4])})
    if facts.kind == "not-updated":
        held = held_by(facts.training)
        loose = [name for name in mine if name not in held]
        norm = facts.vitals.norms.get(trigger.module or "", math.nan)
        numbers = {"gradient norm that goes to waste": norm, "parameters": ", ".join((loose or mine)[:4])}
        if loose:
            return _verdict("not-in-optimizer", f"{module} gets a gradient of norm {norm:.3g}", numbers)
        if mine and all(held[name] == 0 for name in mine):
            return _verdict("zero-lr", f"{module} gets a gradient of norm {norm:.3g}", numbers)
        return Verdict(UNKNOWN, _sentence(trigger.message), numbers)
    if cause is not None and cause.direction == "graph" and (facts.kind == "detached-module" or cause.op):
        if cause.op in ("unused", "not run"):
            return _verdict("detached", f"the loss does not depend on {module}, which is {cause.op}")
        where = f" at {cause.op}" if cause.op else ""
        line = f" ({cause.source})" if cause.source else ""
        return _verdict("detached", f"the gradient of {module} ends{where}{line}", {"ends at": cause.source})
    where = f" from {cause.op} on" if cause is not None and cause.op else ""
    if cause is not None and cause.op and cause.op.startswith("hook"):
        return _verdict("gradient-scaled", f"the gradient of {module} becomes zero in a {cause.op}")
    return _verdict("dead-units", f"the gradient of {module} is exactly zero{where}")


def _update(facts: Facts, choice: Choice) -> Verdict | None:
    """Weights that have moved wrongly, in this update or before this step."""
    if facts.kind not in UPDATE and not (facts.healthy_too and facts.kind in SPIKES and facts.hook is None):
        return None
    ratios = {t.module: t.value for t in facts.plain.triggers if t.kind == "update-jump" and t.module}
    far = {f"update / weights of {module}": value for module, value in list(ratios.items())[:3]}
    outside = changed_outside(facts)
    if outside and not facts.updated:
        by = facts.vitals.outside[outside[0]]
        text = f"since the last update the weights of {_list(outside)} have changed by {by:.3g} of their norm"
        return _verdict("weights-changed-outside", text, {"changed outside an update": text} | far)
    if facts.moments:
        first, more = facts.moments[0], len(facts.moments) - 1
        rest = f", and of {more} more" if more else ""
        text = f"{first.state} of {first.parameter}{rest}: {first.why}"
        return _verdict("corrupt-optimizer-state", text, {"bad state": text} | far)
    if facts.rates:
        change = facts.rates[0]
        text = f"the learning rate of group {change.group} is {change.now:.3g}, it was {change.before:.3g}"
        numbers = {"learning rate before": change.before, "learning rate now": change.now, "group": change.group}
        return _verdict("lr-jump", text, numbers | far)
    if facts.kind == "nonfinite-weights":
        names = facts.vitals.bad_weights
        return _verdict(
            "nonfinite-weights", f"the update made {_list(names)} NaN or infinite", {"weights": _list(names)}
        )
    return None


def _gate(facts: Facts, choice: Choice) -> Verdict | None:
    if facts.kind != "alpha-collapse":
        return None
    module = facts.plain.triggers[0].module or ""
    alpha = facts.vitals.alphas.get(module)
    if alpha is None:
        return _verdict("gate-saturated", facts.plain.triggers[0].message)
    text = f"α of {module} has mean {alpha.mean:.3g}; {alpha.low:.0%} are below 0.05, {alpha.high:.0%} above 0.95"
    return _verdict("gate-saturated", text, {"mean α": alpha.mean, "below 0.05": alpha.low, "above 0.95": alpha.high})


def _altered(facts: Facts, choice: Choice) -> Verdict | None:
    written = facts.kind == "altered-gradient" or (
        choice.cause is not None and choice.cause.direction == "after backward"
    )
    if not written or facts.hook is not None:
        return None
    if facts.bad_given and _spread(facts):
        return _clipped(facts)
    if facts.kind == "altered-gradient" and facts.vitals.uncleared and not facts.vitals.altered:
        names = facts.vitals.uncleared
        text = f"the gradients of {_list(names)} were not cleared after the last update"
        return _verdict("gradients-not-cleared", text, {"parameters that still had a gradient": len(names)})
    names = facts.vitals.altered or facts.bad_given
    text = f"the gradient of {_list(names)} is not what the backward left"
    if facts.given and not any(facts.given.values()):
        text += "; none is left when the optimiser steps: all were cleared, or clipped by an infinite norm"
    changes: dict[str, Any] = {}
    for name in names[:3]:
        before, after = (facts.again.norms if facts.again is not None else {}).get(name), facts.given.get(name)
        if before is not None and after is not None:
            changes[f"gradient of {name}: left by the backward, given to the optimiser"] = f"{before:.4g}, {after:.4g}"
    return _verdict("gradient-scaled", text, changes)


def _spread(facts: Facts) -> bool:
    """Whether few gradients were bad, and all are as the optimiser is about to see them: NaN, or for an infinite norm
    zero."""
    left = facts.again.bad_parameters if facts.again is not None else facts.vitals.bad_parameters
    touched = [name for name, norm in facts.given.items() if not math.isfinite(norm) or norm == 0]
    return len(touched) == len(facts.given) > 1 and len(left) <= max(1, len(facts.given) // 10)


def _clipped(facts: Facts) -> Verdict:
    left = facts.again.bad_parameters if facts.again is not None else facts.vitals.bad_parameters
    text = f"the backward left {len(left)} of {len(facts.given)} parameters with a bad gradient, "
    text += f"and the optimiser is given {len(facts.bad_given)} bad ones"
    numbers = {"bad after the backward": _list(left) or "none", "bad when the optimiser steps": len(facts.bad_given)}
    return _verdict("nan-through-clipping", text, numbers)


# --- what is not finite ----------------------------------------------------------------------------------------------


def _not_finite(facts: Facts, choice: Choice) -> Verdict | None:
    cause = choice.cause
    if not (facts.nonfinite or facts.kind == "nonfinite-gradient") or cause is None:
        return None
    if facts.forward is None and facts.backward is None and cause.direction not in ("data", "update"):
        return None
    buffers = facts.again.bad_buffers if facts.again is not None else facts.vitals.bad_buffers
    poisoned = {"buffers that are NaN after the forward": _list(buffers)} if buffers else {}
    if cause.direction == "data":
        given = facts.vitals.inputs.get(cause.parameter or "")
        count = f"{given.bad} values of " if given is not None and given.bad else ""
        text = f"{count}the batch's {cause.parameter} are not finite"
        again = facts.again
        if again is not None and again.finite and not buffers:
            text += "; every loss and gradient is finite all the same"
            return _verdict("nonfinite-input", text, {"input": cause.parameter}, harmless=True)
        if buffers:
            text += f", and after the forward {_list(buffers)} are not either"
            return _verdict("poisoned-buffers", text, poisoned | {"input": cause.parameter})
        return _verdict("nonfinite-input", text, {"input": cause.parameter, "bad values": given.bad if given else None})
    if cause.direction == "update":
        if cause.parameter in dict(facts.training.model.named_buffers()):
            return _verdict("poisoned-buffers", f"the buffer {cause.parameter} was bad before the step began", poisoned)
        changed = " and was changed outside an update" if facts.vitals.outside else ""
        text = f"the weight {cause.parameter} is not finite when the step begins{changed}"
        return _verdict("nonfinite-weights", text, {"weights": cause.parameter} | poisoned)
    origin = _origin(facts)
    mechanism = mechanism_of(origin, cause.op, facts)
    line = f", {cause.source}" if cause.source else ""
    what = f"{cause.op or 'an operation'} in {cause.module or 'the loss'} ({cause.direction}{line})"
    text = f"{what} has finite inputs and a result that is not{_given(origin)}"
    numbers = {"first bad operation": what} | poisoned
    if origin is not None and origin.bad:
        numbers["bad values made there"] = str(origin.bad)
    if mechanism in VAGUE and cause.direction in ("backward", "after backward") and _spread(facts):
        clipped = _clipped(facts)
        more = f"{_sentence(text)} {clipped.explanation}"
        return Verdict(clipped.mechanism, more, numbers | clipped.evidence)
    if mechanism in VAGUE and facts.kind == "nonfinite-buffers":
        mechanism = "poisoned-buffers"
    harmless = mechanism == "empty-selection" and _gradients_are_good(facts)
    if harmless:
        text += "; every gradient is finite"
    return Verdict(mechanism, _sentence(text) + " " + _sentence(MECHANISMS[mechanism].why), numbers, harmless)


def _gradients_are_good(facts: Facts) -> bool:
    again = facts.again
    return again is not None and again.error is None and not again.bad_parameters and not again.bad_buffers


def _origin(facts: Facts) -> Origin | None:
    found = facts.forward.origin() if facts.forward is not None else None
    if found is None and facts.backward is not None:
        found = facts.backward.origin()
    return found


def _given(origin: Origin | None) -> str:
    """What the operation was given."""
    parts = []
    for argument in origin.arguments[:2] if origin is not None else ():
        if 0 in argument.shape:
            parts.append(f"no element, shape {tuple(argument.shape)}")
        elif argument.low is not None and argument.high is not None:
            parts.append(f"values from {argument.low:.4g} to {argument.high:.4g}")
    return ": it was given " + " and ".join(parts) if parts else ""


#: Operations and autograd nodes, in lower case without underscores, by mechanism; the first that fits.
OPERATIONS: tuple[tuple[str, str], ...] = (
    (r"softmax|attention", "masked-softmax-row"),
    (r"nllloss|crossentropy", "empty-selection"),
    (r"acos|asin|atanh|arccos|arcsin|acosh", "inverse-trig-edge"),
    (r"log1p|log2|log10|\blog\b|^log(backward)?$|xlogy|binarycrossentropy", "log-of-zero"),
    (r"rsqrt|^div|reciprocal", "division-by-zero"),
    (r"sqrt|norm(backward)?$|vectornorm|cdist|std|pow|hypot|dist", "sqrt-at-zero"),
    (r"exp|sinh|cosh|sigmoid|softplus", "exp-overflow"),
    (r"batchnorm", "few-row-batchnorm"),
)


def mechanism_of(origin: Origin | None, op: str | None, facts: Facts) -> str:
    """By the first operation with a bad result, and what it was given."""
    name = re.sub(r"backward\d*$", "backward", (op or "").split(".")[-1].lower().replace("_", ""))
    given = origin.arguments if origin is not None else ()
    if any(0 in argument.shape for argument in given) or (
        "empty mean" in facts.census and name.startswith(("mean", "div"))
    ):
        return "empty-selection"
    if _is_custom(op) or (origin is not None and origin.in_function):
        return "custom-function"
    if origin is not None and origin.in_hook:
        return "gradient-scaled" if op and "." in op else "custom-function"
    if name.startswith(("mean", "var", "std", "median")) and name.find("backward") < 0:
        return "empty-selection"
    if name.startswith("div") and (
        (origin is not None and origin.of_nothing)
        or (len(given) > 1 and all(a.least == 0 == a.high == a.low for a in given[:2]))
    ):
        return "empty-selection"  # 0/0, as a sum over nothing by a count of nothing
    if origin is not None and not origin.nan and any(argument.dtype == "float16" for argument in given):
        return "half-overflow"
    backward = "backward" in name
    for pattern, mechanism in OPERATIONS:
        if re.search(pattern, name.removesuffix("backward") if mechanism != "log-of-zero" else name):
            if mechanism == "sqrt-at-zero" and name.startswith("pow") and not backward:
                return "exp-overflow" if origin is None or not origin.nan else "division-by-zero"
            return mechanism
    if "tiny norm" in facts.census and facts.census["tiny norm"].value < TINY:
        return "normalise-near-zero"
    if origin is not None and origin.direction == "loss":
        return "loss-term-jump"
    return "module-output-jump" if not backward else "gradient-scaled"


# --- what is far too large -------------------------------------------------------------------------------------------


def _overflowed(facts: Facts, choice: Choice) -> Verdict | None:
    if facts.kind != "overflowed-norm":
        return None
    norm = facts.vitals.grad_norm or math.nan
    again = facts.again.norms if facts.again is not None else {}
    largest = max(again, key=lambda name: again[name], default=None)
    text = f"the gradient's norm is {norm:.4g} in float64, and infinite as a float32 sum of squares"
    numbers: dict[str, Any] = {"norm in float64": norm, "norm in float32": facts.vitals.grad_norm32}
    if largest is not None:
        numbers["largest gradient"] = f"{again[largest]:.4g} of {largest}"
    return _verdict("overflowed-norm", text, numbers | _jump(choice))


def _hooked(facts: Facts, choice: Choice) -> Verdict | None:
    hook, cause = facts.hook, choice.cause
    if hook is None or cause is None:
        return None
    what = "a patched forward" if hook.key is None else f"a {hook.direction} hook"
    text = f"{what} on {hook.owner} ({hook.source}): without it the step is as usual"
    mechanism = {"forward": "module-output-jump", "loss": "loss-term-jump"}.get(cause.direction, "gradient-scaled")
    if mechanism == "gradient-scaled" and _is_custom(cause.op):
        mechanism = "custom-function"
    return _verdict(mechanism, text, {"the step is as usual without": f"{hook.owner}: {hook.source}"} | _jump(choice))


def _few_rows(facts: Facts, choice: Choice) -> Verdict | None:
    rows, variance = facts.census.get("batch norm rows"), facts.census.get("batch norm variance")
    named = choice.cause is not None and "batchnorm" in (choice.cause.op or "").lower().replace("_", "")
    if not (rows is not None and rows.value <= FEW_ROWS and facts.kind == "nonfinite-gradient" and named):
        rows = few_row_norm(facts)
    if rows is None:
        return None
    text = f"BatchNorm in train mode took its statistics of {rows.value:.0f} rows in {rows.module}"
    numbers: dict[str, Any] = {"rows": rows.value, "layer": rows.module}
    if variance is not None:
        where = "" if variance.module == rows.module else f" in {variance.module}"
        text += f", and its gain was up to {1 / math.sqrt(variance.value + 1e-5):.3g}{where}"
        numbers["smallest variance"] = variance.text
    value = None if facts.held is None or facts.held.error is not None else value_of(facts.held, facts)
    now = facts.plain.triggers[0].value
    if value is not None and now is not None:
        numbers["with its running statistics"] = f"{value:.4g} instead of {now:.4g}"
        text += f"; with its running statistics the number that set off the alarm is {value:.4g} instead of {now:.4g}"
    return _verdict("few-row-batchnorm", text, numbers | _jump(choice))


def _tiny_norm(facts: Facts, choice: Choice) -> Verdict | None:
    sight = facts.census.get("tiny norm")
    if facts.kind not in SPIKES or sight is None or sight.value > TINY or not _fits(facts, choice, "tiny norm"):
        return None
    gain = 1 / max(sight.value, 1e-12)
    text = f"a vector of norm {sight.value:.3g} was normalised in {sight.module or 'the loss'}: a gain of {gain:.3g}"
    return _verdict("normalise-near-zero", text, {"smallest norm": sight.text, "gain": gain} | _jump(choice))


def _small_divisor(facts: Facts, choice: Choice) -> Verdict | None:
    sight = facts.census.get("denominator")
    if facts.kind not in SPIKES or sight is None or sight.value > SMALL or not _fits(facts, choice, "denominator"):
        return None
    text = f"the smallest divisor is {sight.value:.3g}, in {sight.module or 'the loss'}"
    return _verdict("division-by-zero", text, {"smallest divisor": sight.text} | _jump(choice))


def _fits(facts: Facts, choice: Choice, what: str) -> bool:
    """Whether an extreme is new in this step; where even the healthy batch is bad, whether it is where it began."""
    if facts.healthy_too:
        return choice.cause is not None and facts.census[what].module == choice.cause.module
    return unusual(facts, what)


def _data(facts: Facts, choice: Choice) -> Verdict | None:
    if facts.kind not in SPIKES or choice.cause is None or choice.cause.direction != "data":
        return None
    who = f"sample {choice.samples[0].name or choice.samples[0].index}" if choice.samples else "the whole batch"
    known = "".join(f"; {note}" for note in choice.samples[0].notes) if choice.samples else ""
    why = f" ({choice.samples[0].why}{known})" if choice.samples else ""
    if facts.samples is not None and facts.samples.small and choice.samples:
        text = f"{who} is far smaller than all others: {facts.samples.small}{why}"
        return _verdict("tiny-sample", text, {"sample": who} | _jump(choice))
    cause = outlier(facts)
    jumped = choice.jump is not None and choice.jump.cause.direction == "data"
    if cause is None and not jumped:
        text = f"{who} has inputs like all others, and the step is bad of it{why}"
        return _verdict("wrong-labels", text, {"sample": who} if choice.samples else {})
    path = (cause or choice.cause).parameter
    given = facts.vitals.inputs.get(path or "")
    usual = facts.history.get("inputs", {}).get(path)
    size = (
        f"{given.absmax:.4g}" if given is not None else f"{choice.jump.value:.4g}" if choice.jump is not None else "?"
    )
    against = f", usual is {usual:.4g}" if usual else ""
    text = f"the largest absolute value of {path} is {size}{against}: {who}{why}"
    return _verdict("input-outlier", text, {"input": path, "largest absolute value": size, "usual": usual})


def _jumped(facts: Facts, choice: Choice) -> Verdict | None:
    if facts.kind not in SPIKES or choice.cause is None:
        return None
    cause, jump = choice.cause, choice.jump
    if cause.direction == "loss" or jump is None:
        if not choice.terms or not (cause.direction == "loss" or facts.kind in ("loss-spike", "loss-shift")):
            return None
        term = choice.terms[0]
        now = facts.vitals.terms.get(term)
        usual = facts.history.get("terms", {}).get(term)
        name = "the loss" if term == TOTAL else f"term {term}"
        against = f", usual is {usual:.4g}" if usual is not None else ""
        text = f"{name} is {now:.4g}{against}" if now is not None else f"{name} has jumped"
        return _verdict("loss-term-jump", text, {"term": term, "value": now, "usual": usual} | _jump(choice))
    if cause.module == ROOT and cause.direction == "forward" and _is_of_some_terms(facts, choice):
        return _jump_outside_modules(facts, choice)
    op = f"{cause.op} in " if cause.op else ""
    what = "output" if cause.direction == "forward" else "gradient"
    source = f" ({cause.source})" if cause.source else ""
    text = f"the {what} of {op}{cause.module or 'the loss'}{source} is {jump.value:.4g}, {jump.before:.4g} otherwise"
    if len(choice.terms) == 1 and not _is_custom(cause.op) and _is_a_loss(facts, cause.module):
        return _verdict(
            "loss-term-jump", f"of term {choice.terms[0]}, {text}", {"term": choice.terms[0]} | _jump(choice)
        )
    if cause.direction == "forward":
        return _verdict("module-output-jump", text, _jump(choice))
    return _verdict("custom-function" if _is_custom(cause.op) else "gradient-scaled", text, _jump(choice))


def _is_a_loss(facts: Facts, module: str | None) -> bool:
    """Whether a place is in the losses: outside of modules, or in one that is called so."""
    if module is None:
        return True
    found = dict(named_modules(facts.training.model)).get(module)
    kind = type(found).__name__.lower()
    return isinstance(found, _Loss) or "loss" in kind or "criterion" in kind


def _turned(facts: Facts, choice: Choice) -> Verdict | None:
    """A term that was always of one sign has the other one."""
    if facts.kind not in SPIKES or not choice.terms:
        return None
    term = choice.terms[0]
    now, usual = facts.vitals.terms.get(term), facts.history.get("terms", {}).get(term)
    if now is None or usual is None or not (now * usual < 0 and abs(now) > abs(usual) / 4):
        return None
    text = f"term {term} is {now:.4g}, usual is {usual:.4g}: its sign has turned"
    return _verdict("loss-term-jump", text, {"term": term, "value": now, "usual": usual} | _jump(choice))


def _is_of_some_terms(facts: Facts, choice: Choice) -> bool:
    """Whether not all loss terms have jumped: then what the model does outside its modules is of these losses."""
    terms = {*facts.vitals.terms} - {TOTAL}
    return bool(choice.terms) and (len(choice.terms) < len(terms) or facts.kind in ("loss-spike", "loss-shift"))


def _jump_outside_modules(facts: Facts, choice: Choice) -> Verdict:
    """A model that computes its losses itself: a term is to blame, or the batch where the last healthy one is fine."""
    cause, jump = choice.cause, choice.jump
    assert cause is not None
    assert jump is not None
    place = " in ".join(filter(None, (cause.op, "the model's own forward")))
    source = f" ({cause.source})" if cause.source else ""
    text = f"{place}{source} gives {jump.value:.4g}, {jump.before:.4g} otherwise, and term {choice.terms[0]} jumps"
    if facts.healthy_too is False and facts.kind in ("loss-spike", "loss-shift"):
        text += "; the last healthy batch with these weights is as usual, and no input of this one stands out"
        return _verdict("wrong-labels", text, _jump(choice))
    return _verdict("loss-term-jump", text, {"term": choice.terms[0]} | _jump(choice))


def _is_custom(op: str | None) -> bool:
    """Whether an autograd node is of a Function that was written by hand: PyTorch's own are numbered, or these."""
    return bool(op and op.endswith("Backward")) and op not in TORCH_FUNCTIONS


RECOGNISERS: tuple[Recogniser, ...] = (
    _raised,
    _ranks,
    _part_does_not_learn,
    _update,
    _gate,
    _altered,
    _overflowed,
    _few_rows,
    _not_finite,
    _tiny_norm,
    _small_divisor,
    _hooked,
    _turned,
    _data,
    _jumped,
)


def _verdict(mechanism: str, text: str, numbers: dict[str, Any] | None = None, *, harmless: bool = False) -> Verdict:
    known = {label: value for label, value in (numbers or {}).items() if value is not None}
    return Verdict(mechanism, f"{_sentence(text)} {_sentence(MECHANISMS[mechanism].why)}", known, harmless)


def _jump(choice: Choice) -> dict[str, Any]:
    jump = choice.jump
    if jump is None:
        return {}
    where = " in ".join(filter(None, (jump.cause.op, jump.cause.module))) or jump.cause.parameter or "the loss"
    return {f"grows {jump.ratio:.3g}-fold at": f"{where}: {jump.before:.4g} → {jump.value:.4g}"}


def _sentence(text: str) -> str:
    """Begun with a capital, unless with a name, and ended with a full stop."""
    first = text.split(" ", 1)[0]
    return (text[:1].upper() + text[1:] if first.isalpha() else text).rstrip(".") + "."


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _inside(parameter: str, module: str | None) -> bool:
    if module is None or module == "(root)":
        return "." not in parameter
    return parameter.rpartition(".")[0] == module or parameter.startswith(f"{module}.")
