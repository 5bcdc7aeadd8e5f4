"""What is extreme in a step's forward: tiny norms that are divided by, large logits, means over nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bifusion_diag.replay.examine.calls import Calls, eagerly
from bifusion_diag.replay.examine.frames import told, user_line
from bifusion_diag.replay.notes import StepNotes
from bifusion_diag.replay.step import Training


@dataclass(frozen=True)
class Kind:
    """A quantity that is looked for.

    Attributes:
        meaning: in words.
        largest: the largest is the extreme, not the smallest.
        alarm: from where on it is worth saying: gains of 1e4 and more, float32's range, statistics of a few values.
    """

    meaning: str
    largest: bool
    alarm: float


#: What is looked for, the most telling first.
KINDS: dict[str, Kind] = {
    "masked row": Kind("softmax rows of which every entry is −∞", True, 1),
    "empty mean": Kind("means over no element", True, 1),
    "variance of one": Kind("variances of fewer than two values", True, 1),
    "tiny norm": Kind("smallest norm that was divided by", False, 1e-4),
    "denominator": Kind("smallest absolute value that was divided by", False, 1e-6),
    "log": Kind("smallest argument of a logarithm", False, 1e-12),
    "sqrt": Kind("smallest argument of a square root", False, 1e-12),
    "power": Kind("smallest base of a power below 1", False, 1e-8),
    "arc": Kind("largest argument of acos, asin or atanh", True, 1 - 1e-6),
    "exp": Kind("largest argument of an exponential", True, 80.0),
    "batch norm rows": Kind("fewest values a channel that BatchNorm took statistics of", False, 16),
    "batch norm variance": Kind("smallest variance that BatchNorm divided by", False, 1e-6),
    "layer norm variance": Kind("smallest variance that a layer or group norm divided by", False, 1e-8),
    "logits": Kind("largest absolute logit", True, 100.0),
    "empty selection": Kind("selections of no element", True, 1),
}

#: The same in words.
SIGHTS: dict[str, str] = {name: kind.meaning for name, kind in KINDS.items()}


@dataclass(frozen=True)
class Sight:
    """The most extreme that was seen of one kind.

    Attributes:
        what: of :data:`KINDS`.
        value: the number; of what is counted ("masked row", "empty mean"), how many in one operation.
        module: in whose forward; None: in none, such as the loop's own loss.
        op: PyTorch's name, such as "aten.div".
        source: "file.py:123: the line's text".
    """

    what: str
    value: float
    module: str | None
    op: str
    source: str | None

    @property
    def alarming(self) -> bool:
        """Far enough out to be worth saying."""
        kind = KINDS[self.what]
        return self.value >= kind.alarm if kind.largest else self.value <= kind.alarm

    @property
    def text(self) -> str:
        """Value and place in words."""
        value = f"{self.value:.4g}" if self.module is None else f"{self.value:.4g} in {self.module}"
        return value if self.source is None else f"{value} ({self.source})"


def take_census(training: Training, notes: StepNotes) -> dict[str, Sight]:
    """Run the step's forward and loss once and note the extremes, by kind: those worth saying first, then in the order
    of :data:`KINDS`. Where the step raises, what came before it."""
    calls = Calls(training.model, nullcontext, measured=False)
    watch = _Watch(calls)
    # The trace tells what was raised, if anything: here is what was seen until then.
    with notes.again() as batch, eagerly(training.model), calls.watching(), suppress(Exception), watch:
        training.loss(batch)
    order = list(KINDS)
    found = sorted(watch.found.values(), key=lambda sight: (not sight.alarming, order.index(sight.what)))
    return {sight.what: sight for sight in found}


def evidence(census: Mapping[str, Sight], contrast: Mapping[str, Sight] | None = None) -> dict[str, str]:
    """What is alarming, in words, as an incident's evidence holds it. What a healthy step has as much of is left out.

    Args:
        census: of the bad step.
        contrast: of a healthy one.
    """
    found = {}
    for name, sight in census.items():
        usual = (contrast or {}).get(name)
        if sight.alarming and (usual is None or _beyond(sight, usual.value)):
            beside = "" if usual is None else f"; {usual.value:.4g} in the healthy step"
            found[KINDS[name].meaning] = sight.text + beside
    return found


def _beyond(sight: Sight, usual: float) -> bool:
    return sight.value > usual if KINDS[sight.what].largest else sight.value < usual


class _Watch(TorchDispatchMode):
    """Looks at the arguments of the operations that can amplify, before they run."""

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self.found: dict[str, Sight] = {}
        self._calls = calls
        self._norms: dict[int, tuple[Tensor, float]] = {}  # storage of norms → kept alive, the smallest norm

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__ if hasattr(func, "overloadpacket") else str(func)
        look = _LOOKS.get(name)
        if look is not None:
            with suppress(TypeError, KeyError, IndexError, AttributeError):  # an overload that takes other things
                look(self, f"aten.{name}", _named(func, args, kwargs or {}), result)
        return result

    def note(self, kind: str, op: str, value: float | None) -> None:
        """Keep a value if it is the most extreme of its kind."""
        if value is None or math.isnan(value):
            return
        old = self.found.get(kind)
        if old is None or (value > old.value if KINDS[kind].largest else value < old.value):
            self.found[kind] = Sight(kind, value, self._calls.current, op, told(user_line()))

    def count(self, kind: str, op: str, count: int) -> None:
        """Keep how many there are, if any."""
        if count:
            self.note(kind, op, float(count))

    def remember_norm(self, tensor: Tensor, smallest: float | None) -> None:
        """These are norms, or come from them."""
        if smallest is not None and tensor.dim():
            self._norms[tensor.untyped_storage().data_ptr()] = (tensor, smallest)

    def norm_in(self, tensor: Any) -> float | None:
        """The smallest norm in it; None where it holds none."""
        return self._norms.get(tensor.untyped_storage().data_ptr(), (None, None))[1] if _is_float(tensor) else None


Look = Callable[[_Watch, str, Mapping[str, Any], Any], None]


def _named(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, with their defaults."""
    schema = func._schema.arguments
    values = {a.name: a.default_value for a in schema if a.has_default_value()}
    return {**values, **{a.name: value for a, value in zip(schema, args, strict=False)}, **kwargs}


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and not x.is_meta


def _least(x: Any) -> float | None:
    """Smallest value that is a number; None: there is none."""
    return _reduced(x, torch.amin)


def _most(x: Any) -> float | None:
    """Largest finite value; None: there is none."""
    return _reduced(x, torch.amax)


def _reduced(x: Any, reduce: Callable[[Tensor], Tensor]) -> float | None:
    if not _is_float(x) or not x.numel():
        return None
    value = float(reduce(x))
    if math.isfinite(value):
        return value
    x = x[x.isfinite()]
    return float(reduce(x)) if x.numel() else None


def _size(x: Any) -> Tensor | None:
    return x.abs() if _is_float(x) else None


def _softmax(watch: _Watch, op: str, args: Mapping[str, Any], result: Any) -> None:
    x, dim = args["self"], args["dim"]
    watch.note("logits", op, _most(_size(x)))
    if x.dim() and x.numel():
        watch.count("masked row", op, int((x == -torch.inf).all(dim).sum()))


def _attention(watch: _Watch, op: str, args: Mapping[str, Any], result: Any) -> None:
    mask = args.get("attn_mask", args.get("attn_bias"))
    if isinstance(mask, Tensor) and mask.numel():
        hidden = ~mask if mask.dtype == torch.bool else mask == -torch.inf
        watch.count("masked row", op, int(hidden.all(-1).sum()))


def _logits(watch: _Watch, op: str, args: Mapping[str, Any], result: Any) -> None:
    watch.note("logits", op, _most(_size(args["self"])))
    _mean_loss(watch, op, args, result)


def _mean(watch: _Watch, op: str, args: Mapping[str, Any], result: Any) -> None:
    if args["self"].numel() == 0 and result.numel():
        watch.count("empty mean", op, result.numel())


def _mean_loss(watch: _Watch, op: str, args: Mapping[str, Any], result: Any) -> None:
    if args.get("reduction") == 1 and args["self"].numel() == 0:
        watch.count("empty mean", op, 1)


def _nll(watch: _Watch, op: str, args: Mapping[str, Any], result: Any) -> None:
    if args["reduction"] == 1 and float(result[1]) == 0:  # every target is ignored, or of weight 0
        watch.count("empty mean", op, 1)


def _variance(watch: _Watch, op: str, args: Mapping[str, Any], result: Any) -> None:
    found = result[0] if isinstance(result, tuple) else result
    correction = args.get("correction", int(args.get("unbiased", True)))
    values = args["self"].numel() // max(found.numel(), 1)
    if found.numel() and values <= (1 if correction is None else correction):
        watch.count("variance of one", op, found.numel())


def _norm(watch: _Watch, op: str, args: Mapping[str, Any], result: Any) -> None:
    watch.remember_norm(result, _least(result))


def _passes_on(watch: _Watch, op: str, args: Mapping[str, Any], result: Any) -> None:
    if (smallest := watch.norm_in(args["self"])) is not None:
        watch.remember_norm(result, smallest)


def _divide(watch: _Watch, op: str, args: Mapping[str, Any], result: Any) -> None:
    other = args["other"]
    if isinstance(other, (int, float)):
        watch.note("denominator", op, abs(other))
    elif (norm := watch.norm_in(other)) is not None:
        watch.note("tiny norm", op, norm)
    else:
        watch.note("denominator", op, _least(_size(other)))
        if not other.is_floating_point() and other.numel():
            watch.note("denominator", op, float(other.abs().min()))


def _reciprocal(watch: _Watch, op: str, args: Mapping[str, Any], result: Any) -> None:
    x = args["self"]
    norm = watch.norm_in(x)
    watch.note("denominator" if norm is None else "tiny norm", op, _least(_size(x)) if norm is None else norm)


def _power(watch: _Watch, op: str, args: Mapping[str, Any], result: Any) -> None:
    exponent = args["exponent"]
    if isinstance(exponent, (int, float)) and exponent < 1:
        watch.note("power", op, _least(args["self"]) if exponent > 0 else _least(_size(args["self"])))


def _of(kind: str, value: Callable[[Any], float | None]) -> Look:
    return lambda watch, op, args, result: watch.note(kind, op, value(args["self"]))


def _batch_norm(watch: _Watch, op: str, args: Mapping[str, Any], result: Any) -> None:
    if args.get("training", True):
        x = args["input"]
        watch.note("batch norm rows", op, float(x.numel() // max(x.shape[1], 1)))
        watch.note("batch norm variance", op, _from_inverse(result[2], args.get("eps", args.get("epsilon", 0.0))))


def _layer_norm(watch: _Watch, op: str, args: Mapping[str, Any], result: Any) -> None:
    watch.note("layer norm variance", op, _from_inverse(result[2], args["eps"]))


def _from_inverse(inverse: Tensor, eps: float) -> float | None:
    """The smallest variance, of the largest 1/√(variance + eps)."""
    largest = _most(inverse)
    return None if not largest else max(largest**-2 - eps, 0.0)


def _select(watch: _Watch, op: str, args: Mapping[str, Any], result: Any) -> None:
    if result.numel() == 0 and args["self"].numel():
        watch.count("empty selection", op, 1)


_LOOKS: dict[str, Look] = {
    **dict.fromkeys(("_softmax", "_log_softmax", "_safe_softmax"), _softmax),
    **dict.fromkeys(
        (
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_fused_attention_overrideable",
        ),
        _attention,
    ),
    **dict.fromkeys(("sigmoid", "log_sigmoid_forward", "binary_cross_entropy_with_logits"), _logits),
    **dict.fromkeys(("binary_cross_entropy", "mse_loss", "smooth_l1_loss", "huber_loss"), _mean_loss),
    **dict.fromkeys(("nll_loss_forward", "nll_loss2d_forward"), _nll),
    "mean": _mean,
    **dict.fromkeys(("var", "std", "var_mean", "std_mean"), _variance),
    **dict.fromkeys(("linalg_vector_norm", "norm"), _norm),
    **dict.fromkeys(("clamp_min", "clamp", "maximum", "add", "clamp_min_", "add_", "clone", "_to_copy"), _passes_on),
    **dict.fromkeys(("div", "div_"), _divide),
    "reciprocal": _reciprocal,
    **dict.fromkeys(("log", "log2", "log10"), _of("log", _least)),
    "log1p": _of("log", lambda x: None if (least := _least(x)) is None else least + 1),
    "sqrt": _of("sqrt", _least),
    "rsqrt": _of("sqrt", _least),
    **dict.fromkeys(("acos", "asin", "atanh"), _of("arc", lambda x: _most(_size(x)))),
    **dict.fromkeys(("exp", "expm1"), _of("exp", _most)),
    "pow": _power,
    **dict.fromkeys(
        (
            "native_batch_norm",
            "_native_batch_norm_legit",
            "_batch_norm_with_update",
            "cudnn_batch_norm",
            "miopen_batch_norm",
        ),
        _batch_norm,
    ),
    **dict.fromkeys(("native_layer_norm", "native_group_norm"), _layer_norm),
    **dict.fromkeys(("index", "index_select", "masked_select"), _select),
}
