"""What attention attends to: rows without a key, entropy, and the size of the logits.

Legend: B batch · H heads · L queries · S keys · E width · d width of a head · R sampled rows.
"""

from __future__ import annotations

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

_SAMPLE = f"of {ROWS} evenly spaced rows (a query in a head) of the first batch element, every head alike"


class _Attention(NamedTuple):
    """One call."""

    queries: Tensor  # (L, E) of the first batch element
    keys: Tensor  # (S, E) of the same
    query_weight: Tensor  # (H·d, E)
    key_weight: Tensor  # (H·d, E)
    query_bias: Tensor | None  # (H·d,)
    key_bias: Tensor | None
    heads: int
    scale: float
    batch: int
    hidden: Tensor | None  # (1 or B, 1 or H, 1 or L, S) bool, True = not seen
    added: Tensor | None  # the same shape: what is added to the logits
    padded: Tensor | None  # (B, S) bool, True = not seen by any query
    causal: bool


class AttentionProbe(ModuleProbe):
    """Watches nn.MultiheadAttention (so nn.Transformer's layers, OpenCLIP's, torchvision's), and modules with a linear
    ``qkv`` and ``num_heads`` that do nothing else to queries and keys (timm's ViT, DINO's). Queries and keys of the
    sampled rows are projected again in float32: exact for these rows but for rounding, and less than 0.3 % of a layer.

    Left out are modules with ``bias_k`` or ``add_zero_attn``, norms or rotations between projection and logits, or
    other parameters such as a position bias; and the rows of sharded weights.

    Args:
        modules: name patterns of the modules that are watched.
        fields: where another module returns ``logits`` or ``weights`` (..., queries, keys), and the ``mask`` that
            belongs to them (bool, True = not seen, or added to the logits; the logits are meant before it), as for a
            FieldProbe. The probe then watches these modules only.
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

    def watches(self, name: str, module: nn.Module) -> bool:
        return matches(name, self.modules) and (bool(self.places) or _is_mha(module) or _is_qkv(module))

    def seen(self, call: Call) -> None:
        if self.places:
            self._of_fields(call)
            return
        found = _of_mha(call) if isinstance(call.module, nn.MultiheadAttention) else _of_qkv(call)
        if found is None or not len(found.queries) or not len(found.keys):
            return
        self.record(call.name, torch.stack([_masked_rows(found).float(), *_summary(*_sampled(found))]))

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
            numbers["entropy"] = _entropy(torch.special.entr(sample).sum(-1), sample, hidden)
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


def _of_mha(call: Call) -> _Attention | None:
    module = call.module
    assert isinstance(module, nn.MultiheadAttention)
    given: dict[str, Any] = dict(zip(MHA_ARGUMENTS, call.inputs, strict=False)) | dict(call.keywords)
    query, key, mask, padded = given["query"], given["key"], given.get("attn_mask"), given.get("key_padding_mask")
    same = module._qkv_same_embed_dim
    width = module.embed_dim
    query_weight = module.in_proj_weight[:width] if same else module.q_proj_weight
    key_weight = module.in_proj_weight[width : 2 * width] if same else module.k_proj_weight
    if query.is_nested or not query.numel() or _is_sharded(module.in_proj_weight if same else module.q_proj_weight):
        return None
    bias = module.in_proj_bias
    batched, heads = query.dim() == 3, module.num_heads
    size = query.shape[0 if module.batch_first else 1] if batched else 1
    if batched:
        query, key = (x[0] if module.batch_first else x[:, 0] for x in (query, key))
    if mask is not None:
        mask = mask.detach().unflatten(0, (-1, heads)) if mask.dim() == 3 else mask.detach()[None, None]
    if padded is not None:
        padded = _hides(padded.detach()).view(size, -1)
    return _Attention(
        queries=query.detach(),
        keys=key.detach(),
        query_weight=query_weight,
        key_weight=key_weight,
        query_bias=None if bias is None else bias[:width],
        key_bias=None if bias is None else bias[width : 2 * width],
        heads=heads,
        scale=module.head_dim**-0.5,
        batch=size,
        hidden=None if mask is None else _hides(mask),
        added=mask if mask is not None and mask.is_floating_point() else None,
        padded=padded,
        causal=False,  # a hint only: the mask says it too
    )


def _of_qkv(call: Call) -> _Attention | None:
    module = call.module
    qkv: Any = module.qkv
    mask = call.keywords.get("attn_mask")
    others = [value for name, value in call.keywords.items() if name not in ("attn_mask", "is_causal")]
    x = call.inputs[0] if len(call.inputs) == 1 else None
    if (
        not isinstance(x, Tensor)
        or x.dim() != 3
        or not len(x)
        or _is_sharded(qkv.weight)
        or any(o is not None for o in others)
    ):
        return None
    heads: Any = module.num_heads
    width = qkv.out_features // 3
    scale = getattr(module, "scale", None)
    if mask is not None:
        mask = mask.detach().view((1,) * (4 - mask.dim()) + tuple(mask.shape))
        mask = ~mask if mask.dtype == torch.bool else mask  # as scaled_dot_product_attention has it: True = seen
    return _Attention(
        queries=x[0].detach(),
        keys=x[0].detach(),
        query_weight=qkv.weight[:width],
        key_weight=qkv.weight[width : 2 * width],
        query_bias=None if qkv.bias is None else qkv.bias[:width],
        key_bias=None if qkv.bias is None else qkv.bias[width : 2 * width],
        heads=heads,
        scale=scale if isinstance(scale, float) else (width // heads) ** -0.5,
        batch=len(x),
        hidden=None if mask is None else _hides(mask),
        added=mask if mask is not None and mask.is_floating_point() else None,
        padded=None,
        causal=bool(call.keywords.get("is_causal")),
    )


def _sampled(a: _Attention) -> tuple[Tensor, Tensor | None]:
    """Logits (R, S) float32 of the sampled rows, and which of the keys are hidden (R, S).

    Keys are not projected: q · (W k + b) = (Wᵀ q) · k + q · b, of which the left side costs a row and not a key each.
    """
    heads, length = a.heads, len(a.queries)
    each = -(-ROWS // heads)
    places = torch.arange(heads * each, device=a.queries.device) * length // (heads * each)
    rows = a.queries.index_select(0, places).float().view(heads, each, -1)
    query = rows @ a.query_weight.detach().float().view(heads, -1, rows.shape[-1]).mT
    if a.query_bias is not None:
        query = query + a.query_bias.detach().float().view(heads, 1, -1)
    turned = query @ a.key_weight.detach().float().view(heads, query.shape[-1], -1)
    logits = turned.flatten(0, 1) @ a.keys.float().mT
    if a.key_bias is not None:
        logits = logits + (query @ a.key_bias.detach().float().view(heads, -1, 1)).view(-1, 1)
    logits = logits * a.scale
    hidden = None
    if a.hidden is not None:
        head = torch.arange(heads, device=places.device).repeat_interleave(each)
        whole = (heads, length, len(a.keys))
        hidden = a.hidden[0].expand(whole)[head, places]
        if a.added is not None:
            logits = logits + a.added[0].expand(whole)[head, places].float()
    if a.causal:
        hidden = torch.arange(len(a.keys), device=places.device) > places[:, None]
    if a.padded is not None:
        hidden = a.padded[0].expand_as(logits) if hidden is None else hidden | a.padded[0]
    return logits, hidden


def _summary(logits: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
    """Entropy and largest magnitude, () each, of logits (R, S)."""
    if hidden is None:
        log_weights = logits.log_softmax(-1)
        largest = logits.abs().amax()
    else:
        log_weights = logits.masked_fill(hidden, -torch.inf).log_softmax(-1)
        largest = logits.masked_fill(hidden, 0.0).abs().amax()
    weights = log_weights.exp()
    terms = -weights * log_weights if hidden is None else -(weights * log_weights).masked_fill(hidden, 0.0)
    return _entropy(terms.sum(-1), logits, hidden), largest


def _entropy(entropies: Tensor, rows: Tensor, hidden: Tensor | None) -> Tensor:
    """The mean (): of rows' entropies (R,), relative to that of equal weights; of rows that may see two keys."""
    keys = rows.new_full((len(rows),), rows.shape[-1]) if hidden is None else (~hidden).sum(-1).float()
    counts = keys > 1
    return torch.where(counts, entropies / keys.log(), 0.0).sum() / counts.sum()


def _masked_rows(a: _Attention) -> Tensor:
    """Queries without a key, ()."""
    length = len(a.queries)
    if a.padded is None:
        if a.hidden is None:
            return torch.zeros((), device=a.queries.device)
        stands_for = (a.batch if len(a.hidden) == 1 else 1) * (length if a.hidden.shape[2] == 1 else 1)
        return _hidden_rows(a.hidden) * stands_for
    if a.hidden is None:
        return _hidden_rows(a.padded) * length
    if a.hidden.shape[:2] == (1, 1):  # without a mask for each batch element
        return ((~a.hidden[0, 0]).float() @ (~a.padded).float().mT == 0).sum()
    return _hidden_rows(a.hidden | a.padded[:, None, None])


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
