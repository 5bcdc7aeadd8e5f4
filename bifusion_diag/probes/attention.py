"""What attention attends to: rows without a key, entropy, and the size of the logits.

Legend: B batch · H heads · L queries · S keys · E width · d width of a head · R sampled rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from bifusion_diag.errors import UserError, near_matches
from bifusion_diag.probes.base import Call, Schedule, matches
from bifusion_diag.probes.fields import Key, get_field
from bifusion_diag.probes.per_module import ModuleProbe

ROWS = 16  # rows of logits (a query in a head) that are computed again in a call, or one a head where heads are more
TOLD_ROWS = 1024  # rows that are read of logits or weights that a module returns
MHA_ARGUMENTS = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask")
QKV_PARTS = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"}
TURNS = 4  # steps in which every module has its turn to be sampled

_SAMPLE = (
    f"of {ROWS} or more evenly spaced rows (a query in a head) of the first batch element, every head alike, in the "
    f"first call of every {TURNS}th step"
)


class _Masks(NamedTuple):
    """What hides keys in one call."""

    batch: int
    queries: int
    keys: int
    hidden: Tensor | None  # (1 or B, 1 or H, 1 or L, S) bool, True = not seen
    added: Tensor | None  # the same shape: what is added to the logits
    padded: Tensor | None  # (B, S) bool, True = not seen by any query
    causal: bool


class _Projections(NamedTuple):
    """What logits are made of."""

    queries: Tensor  # (L, E) of the first batch element
    keys: Tensor  # (S, E) of the same
    query_weight: Tensor  # (H·d, E)
    key_weight: Tensor  # (H·d, E)
    query_bias: Tensor | None  # (H·d,)
    key_bias: Tensor | None
    heads: int
    scale: float


class AttentionProbe(ModuleProbe):
    """Watches nn.MultiheadAttention (so nn.Transformer's layers, OpenCLIP's, torchvision's), and modules with a linear
    ``qkv`` and ``num_heads`` that do nothing else to queries and keys (timm's ViT, DINO's). Queries and keys of the
    sampled rows are projected again in float32: exact for these rows but for rounding. Modules take turns in being
    sampled; rows that a mask hides are counted in every call.

    Left out are modules with ``bias_k`` or ``add_zero_attn``, norms or rotations between projection and logits, or
    other parameters such as a position bias; and the rows of sharded weights.

    Args:
        modules: name patterns of the modules that are watched.
        fields: where another module returns ``logits`` or ``weights`` (..., queries, keys), and the ``mask`` that
            belongs to them (bool, True = not seen, or added to the logits; the logits are meant before it), as for a
            FieldProbe. The probe then watches these modules only, and reads 1024 evenly spaced rows of every call;
            `max_logit` is of logits only, and `masked_rows` of weights needs the mask.
        name, every: as for every Probe.

    Raises:
        UserError: `fields` names a field that this probe does not read, or not one of logits and weights.
    """

    prefix = "attention"
    TABLE: ClassVar[dict[str, Key]] = {
        "masked_rows": Key(
            "sum",
            "queries that may see no key (softmax 0/0), by the whole mask; in each head that has its own",
        ),
        "entropy": Key(
            "mean",
            f"mean entropy ÷ log of the number of keys that may be seen: 0 one key, 1 all alike; {_SAMPLE}; missing if "
            "no row may see two keys or a logit is not finite",
        ),
        "max_logit": Key("max", f"largest |logit| of a key that may be seen; {_SAMPLE}"),
    }
    NAN_IS_MISSING = frozenset({"entropy"})
    FIELDS = ("logits", "weights", "mask")

    def __init__(
        self,
        *,
        modules: Sequence[str] = ("*",),
        fields: Mapping[str, str | int] | None = None,
        name: str | None = None,
        every: int | Schedule | None = None,
    ) -> None:
        super().__init__(name=name, every=every)
        self.modules = tuple(modules)
        self.places = dict(fields or {})
        for field in self.places:
            if field not in self.FIELDS:
                raise UserError(f"attention reads no field {field!r}.{near_matches(field, self.FIELDS)}")
        if self.places and len({"logits", "weights"} & set(self.places)) != 1:
            raise UserError("attention: tell in `fields` where one of 'logits' and 'weights' is")
        self._slots: dict[str, int] = {}  # by module: in which of the TURNS it is sampled
        self._none: dict[torch.device, Tensor] = {}

    def watches(self, name: str, module: nn.Module) -> bool:
        return matches(name, self.modules) and (bool(self.places) or _is_mha(module) or _is_qkv(module))

    def begin(self) -> None:
        super().begin()
        self._sampled: set[str] = set()

    def seen(self, call: Call) -> None:
        if self.places:
            self._of_fields(call)
            return
        is_mha = isinstance(call.module, nn.MultiheadAttention)
        given = _arguments(call)
        masks = _masks_of_mha(call.module, given) if is_mha else _masks_of_qkv(call, given)
        if masks is None or not masks.queries or not masks.keys:
            return
        self.record(call.name, self._masked_rows(masks, given), ("masked_rows",))
        slot = self._slots.setdefault(call.name, len(self._slots))
        if (self.turn - slot) % TURNS or call.name in self._sampled:
            return
        parts = _parts_of_mha(call.module, given) if is_mha else _parts_of_qkv(call.module, given)
        if parts is None:
            return
        self._sampled.add(call.name)
        self.record(call.name, torch.stack(_summary(*_logits(parts, masks))), ("entropy", "max_logit"))

    def _masked_rows(self, masks: _Masks, given: Mapping[str, Any]) -> Tensor:
        """Queries without a key, (1,)."""
        if masks.hidden is not None or masks.padded is not None:
            return _masked_rows(masks).float().view(1)
        device = given["query"].device
        if device not in self._none:
            self._none[device] = torch.zeros(1, device=device)
        return self._none[device]

    def _of_fields(self, call: Call) -> None:
        told = {field: get_field(call.output, place) for field, place in self.places.items()}
        kind = "logits" if "logits" in told else "weights"
        values, mask = told[kind], told.get("mask")
        if not isinstance(values, Tensor) or values.dim() < 2 or not values.numel():
            return
        values = values.detach()
        places = torch.arange(0, values.numel() // values.shape[-1], _stride(values), device=values.device)
        rows = _coordinates(places, values.shape[:-1])
        sample = values[rows].float()
        hidden = None
        numbers: dict[str, Tensor] = {}
        if isinstance(mask, Tensor) and mask.numel():
            whole = _hides(mask.detach())
            hidden = whole.expand(values.shape)[rows]
            numbers["masked_rows"] = _hidden_rows(whole) * (values[..., 0].numel() // whole[..., 0].numel())
            if kind == "logits" and mask.is_floating_point():
                sample = sample + mask.detach().expand(values.shape)[rows].float()
        elif kind == "logits":
            hidden = sample <= _lowest(values)
            numbers["masked_rows"] = (values.amax(-1) <= _lowest(values)).sum()
        if kind == "logits":
            numbers["entropy"], numbers["max_logit"] = _summary(sample, hidden)
        else:
            terms = -torch.special.entr(sample)
            numbers["entropy"] = terms.sum() / _most(sample) if hidden is None else _entropy(terms, hidden)
        self.record(call.name, torch.stack([value.float() for value in numbers.values()]), tuple(numbers))


def _is_mha(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention) and module.bias_k is None and not module.add_zero_attn


def _is_qkv(module: nn.Module) -> bool:
    """Whether the logits are q · k of one linear layer's output, split in the order (q k v, head, width of a head)."""
    qkv, heads = getattr(module, "qkv", None), getattr(module, "num_heads", None)
    parts = dict(module.named_children())
    plain = all(isinstance(parts.get(name), (nn.Identity, type(None))) for name in ("q_norm", "k_norm"))
    if not (isinstance(qkv, nn.Linear) and isinstance(heads, int) and plain):
        return False
    return parts.keys() <= QKV_PARTS and not module._parameters and not qkv.out_features % (3 * heads)


def _arguments(call: Call) -> dict[str, Any]:
    """A call's arguments by name."""
    names = MHA_ARGUMENTS if isinstance(call.module, nn.MultiheadAttention) else ("query",)
    return {**dict(zip(names, call.inputs, strict=False)), **call.keywords}


def _masks_of_mha(module: Any, given: Mapping[str, Any]) -> _Masks | None:
    query, key, mask, padded = (given.get(name) for name in ("query", "key", "attn_mask", "key_padding_mask"))
    if not isinstance(query, Tensor) or not isinstance(key, Tensor) or query.is_nested:
        return None
    batched, along = query.dim() == 3, 1 if module.batch_first else 0
    if mask is not None:
        mask = mask.unflatten(0, (-1, module.num_heads)) if mask.dim() == 3 else mask[None, None]
    batch = query.shape[1 - along] if batched else 1
    return _Masks(
        batch=batch,
        queries=query.shape[along] if batched else len(query),
        keys=key.shape[along] if batched else len(key),
        hidden=None if mask is None else _hides(mask),
        added=mask if mask is not None and mask.is_floating_point() else None,
        padded=None if padded is None else _hides(padded).view(batch, -1),
        causal=False,  # is_causal is a hint only: the mask says it too
    )


def _parts_of_mha(module: Any, given: Mapping[str, Any]) -> _Projections | None:
    query, key, width = given["query"], given["key"], module.embed_dim
    if query.dim() == 3:
        query, key = (x[0] if module.batch_first else x[:, 0] for x in (query, key))
    together = module._qkv_same_embed_dim
    if _is_sharded(module.in_proj_weight if together else module.q_proj_weight):
        return None
    bias = module.in_proj_bias
    return _Projections(
        queries=query,
        keys=key,
        query_weight=module.in_proj_weight[:width] if together else module.q_proj_weight,
        key_weight=module.in_proj_weight[width : 2 * width] if together else module.k_proj_weight,
        query_bias=None if bias is None else bias[:width],
        key_bias=None if bias is None else bias[width : 2 * width],
        heads=module.num_heads,
        scale=module.head_dim**-0.5,
    )


def _masks_of_qkv(call: Call, given: Mapping[str, Any]) -> _Masks | None:
    x, mask = given.get("query"), given.get("attn_mask")
    others = [value for name, value in call.keywords.items() if name not in ("attn_mask", "is_causal")]
    if not isinstance(x, Tensor) or x.dim() != 3 or len(call.inputs) > 1 or any(o is not None for o in others):
        return None
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
        mask = ~mask if mask.dtype == torch.bool else mask  # as scaled_dot_product_attention has it: True = seen
    return _Masks(
        batch=len(x),
        queries=x.shape[1] * min(1, len(x)),
        keys=x.shape[1],
        hidden=None if mask is None else _hides(mask),
        added=mask if mask is not None and mask.is_floating_point() else None,
        padded=None,
        causal=bool(given.get("is_causal")),
    )


def _parts_of_qkv(module: Any, given: Mapping[str, Any]) -> _Projections | None:
    qkv, heads, x = module.qkv, module.num_heads, given["query"][0]
    if _is_sharded(qkv.weight):
        return None
    width = qkv.out_features // 3
    scale = getattr(module, "scale", None)
    return _Projections(
        queries=x,
        keys=x,
        query_weight=qkv.weight[:width],
        key_weight=qkv.weight[width : 2 * width],
        query_bias=None if qkv.bias is None else qkv.bias[:width],
        key_bias=None if qkv.bias is None else qkv.bias[width : 2 * width],
        heads=heads,
        scale=scale if isinstance(scale, float) else (width // heads) ** -0.5,
    )


def _logits(parts: _Projections, masks: _Masks) -> tuple[Tensor, Tensor | None]:
    """Logits (R, S) float32 of the sampled rows, and which of the keys are hidden (R, S).

    Keys are not projected: q · (W k + b) = (Wᵀ q) · k + q · b, of which the left side costs a row and not a key each.
    """
    heads, length = parts.heads, masks.queries
    each = -(-ROWS // heads)
    number, step = heads * each, max(1, length // (heads * each))
    device, places = parts.queries.device, None
    if masks.hidden is not None or masks.causal or length < number:
        places = torch.arange(number, device=device) * step % length
    rows = parts.queries[: number * step : step] if places is None else parts.queries.index_select(0, places)
    rows = rows.float().view(heads, each, -1)
    query_weight = parts.query_weight.float().view(heads, -1, rows.shape[-1])
    key_weight = parts.key_weight.float().view(heads, query_weight.shape[1], -1)
    if parts.query_bias is None:
        query = (rows @ query_weight.mT) * parts.scale
    else:
        bias = parts.query_bias.float().view(heads, 1, -1)
        query = torch.baddbmm(bias, rows, query_weight.mT, beta=parts.scale, alpha=parts.scale)
    turned, keys = (query @ key_weight).flatten(0, 1), parts.keys.float().mT
    if parts.key_bias is None:
        logits = turned @ keys
    else:
        offsets = (query @ parts.key_bias.float().view(heads, -1, 1)).flatten(0, 1)
        logits = torch.addmm(offsets, turned, keys)
    hidden = None
    if masks.hidden is not None:
        head = torch.arange(heads, device=device).repeat_interleave(each)
        whole = (heads, length, masks.keys)
        hidden = masks.hidden[0].expand(whole)[head, places]
        if masks.added is not None:
            logits = logits + masks.added[0].expand(whole)[head, places].float()
    if places is not None and masks.causal:
        hidden = torch.arange(masks.keys, device=device) > places[:, None]
    if masks.padded is not None:
        hidden = masks.padded[0].expand_as(logits) if hidden is None else hidden | masks.padded[0]
    return logits, hidden


def _summary(logits: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
    """Entropy and largest magnitude, () each, of logits (R, S)."""
    seen = logits if hidden is None else logits.masked_fill(hidden, 0.0)
    largest = torch.linalg.vector_norm(seen, torch.inf)
    log_weights = (logits if hidden is None else logits.masked_fill(hidden, -torch.inf)).log_softmax(-1)
    weights = log_weights.exp()
    if hidden is None:
        return torch.dot(weights.view(-1), log_weights.view(-1)) / _most(logits), largest
    return _entropy((weights * log_weights).masked_fill(hidden, 0.0), hidden), largest


def _entropy(terms: Tensor, hidden: Tensor) -> Tensor:
    """Mean of −Σ terms over the rows (R, S) that may see two keys, relative to that of equal weights, ()."""
    keys = (~hidden).sum(-1).float()
    counts = keys > 1
    return torch.where(counts, -terms.sum(-1) / keys.log(), 0.0).sum() / counts.sum()


def _most(rows: Tensor) -> float:
    """Minus the sum of the entropies of equal weights, of rows (R, S)."""
    number, keys = rows.shape
    return -number * math.log(keys) if keys > 1 else math.nan


def _masked_rows(masks: _Masks) -> Tensor:
    """Queries without a key, ()."""
    hidden, padded = masks.hidden, masks.padded
    if padded is None:
        assert hidden is not None
        stands_for = (masks.batch if len(hidden) == 1 else 1) * (masks.queries if hidden.shape[2] == 1 else 1)
        return _hidden_rows(hidden) * stands_for
    if hidden is None:
        return _hidden_rows(padded) * masks.queries
    if hidden.shape[:2] == (1, 1):  # without a mask for each batch element
        return ((~hidden[0, 0]).float() @ (~padded).float().mT == 0).sum()
    return _hidden_rows(hidden | padded[:, None, None])


def _hidden_rows(hidden: Tensor) -> Tensor:
    """Rows (..., S) of which all are True; Tensor.all is 60 times slower along a dimension on a CPU."""
    return hidden.view(torch.uint8).amin(-1).sum()


def _hides(mask: Tensor) -> Tensor:
    """Where a mask, bool or added to the logits, hides a key: by minus infinity or about the smallest number."""
    return mask <= _lowest(mask) if mask.is_floating_point() else mask.bool()


def _coordinates(places: Tensor, shape: torch.Size) -> tuple[Tensor, ...]:
    """Positions in a flattened tensor → its coordinates. torch.unravel_index copies the shape to the device."""
    coordinates = []
    for size in reversed(shape):
        coordinates.append(places % size)
        places = places // size
    return tuple(reversed(coordinates))


def _lowest(x: Tensor) -> float:
    return torch.finfo(x.dtype).min / 2


def _stride(values: Tensor) -> int:
    return -(-(values.numel() // values.shape[-1]) // TOLD_ROWS)


def _is_sharded(weight: Tensor) -> bool:
    """Whether this process holds a part only (a DTensor of FSDP)."""
    return hasattr(weight, "placements")
