"""Attention, against logits and weights that are computed one after another in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from probe_toys import Give
from torch import Tensor, nn
from torch.nn import functional as F

from bifusion_diag.errors import UserError
from bifusion_diag.probes import AttentionProbe, Monitor
from bifusion_diag.probes.attention import ROWS, TOLD_ROWS, TURNS


def measured(model: nn.Module, forward: Any, probe: AttentionProbe | str = "attention") -> dict[str, float | None]:
    with Monitor(model, probes=[probe]) as monitor:
        with monitor.step():
            forward()
        monitor.end_step()
        return monitor.latest()


def summary(logits: np.ndarray, hidden: np.ndarray) -> dict[str, float | None]:
    """The twin: logits and hidden (R, S)."""
    entropies, largest = [], 0.0
    for row, gone in zip(logits.astype(float), hidden, strict=True):
        seen = [v for v, g in zip(row, gone, strict=True) if not g]
        largest = max([largest, *map(abs, seen)])
        if len(seen) > 1:
            total = sum(math.exp(v - max(seen)) for v in seen)
            weights = [math.exp(v - max(seen)) / total for v in seen]
            entropies.append(-sum(p * math.log(p) for p in weights if p > 0) / math.log(len(seen)))
    return {"entropy": sum(entropies) / len(entropies) if entropies else None, "max_logit": largest}


def rows_of(heads: int, queries: int) -> list[tuple[int, int]]:
    """(head, query) of the sampled rows."""
    each = math.ceil(ROWS / heads)
    step = max(1, queries // (heads * each))
    return [(i // each, i * step % queries) for i in range(heads * each)]


def logits_of(q: np.ndarray, k: np.ndarray, heads: int) -> np.ndarray:
    """Projected q (L, H·d) and k (S, H·d) → (H, L, S)."""
    q, k = (x.reshape(len(x), heads, -1).transpose(1, 0, 2) for x in (q, k))
    return q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1])


def attention_logits(module: nn.MultiheadAttention, query: Tensor, key: Tensor) -> np.ndarray:
    """(H, L, S) of one batch element."""
    width = module.embed_dim
    if module._qkv_same_embed_dim:
        weights = (module.in_proj_weight[:width], module.in_proj_weight[width : 2 * width])
    else:
        weights = (module.q_proj_weight, module.k_proj_weight)
    biases = (0.0, 0.0)
    if module.in_proj_bias is not None:
        biases = tuple(b.detach().double().numpy() for b in module.in_proj_bias.view(3, -1)[:2])  # type: ignore[assignment]
    q, k = (
        x.detach().double().numpy() @ w.detach().double().numpy().T + b
        for x, w, b in zip((query, key), weights, biases, strict=True)
    )
    return logits_of(q, k, module.num_heads)


def mha(width: int = 24, heads: int = 4, **options: Any) -> nn.MultiheadAttention:
    module = nn.MultiheadAttention(width, heads, **options)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def random_mask(*shape: int) -> Tensor:
    """True = hidden; some rows all hidden."""
    mask = torch.rand(*shape) < 0.4
    mask[..., ::3, :] |= torch.rand(*shape[:-2], len(range(0, shape[-2], 3)), 1) < 0.5
    return mask


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("heads", [3, 24])
@pytest.mark.parametrize("bias", [True, False])
def test_cross_attention(batch_first: bool, heads: int, bias: bool) -> None:
    module = mha(heads=heads, batch_first=batch_first, bias=bias, kdim=10, vdim=7)
    query, key, value = torch.randn(3, 9, 24), torch.randn(3, 13, 10), torch.randn(3, 13, 7)
    given = [x if batch_first else x.transpose(0, 1) for x in (query, key, value)]
    row = measured(module, lambda: module(*given))
    logits = attention_logits(module, query[0], key[0])
    sample = np.array([logits[head, place] for head, place in rows_of(heads, 9)])
    expected = summary(sample, np.zeros_like(sample, bool)) | {"masked_rows": 0.0}
    assert row == pytest.approx({f"attention/(root)/{k}": v for k, v in expected.items()}, rel=1e-4)


MASKS = ("none", "shared", "per head", "unbatched", "unbatched per head")


@pytest.mark.parametrize("additive", [False, True, "finite"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", MASKS)
def test_masks(kind: str, padded: bool, additive: bool | str) -> None:
    module, heads, batch = mha(batch_first=True), 4, 1 if "unbatched" in kind else 3
    query, key = torch.randn(batch, 9, 24), torch.randn(batch, 8, 24)
    whole = torch.zeros(batch, heads, 9, 8, dtype=torch.bool)  # what is hidden, in the twin
    arguments: dict[str, Tensor] = {}
    if kind != "none":
        mask = random_mask(batch, heads, 9, 8) if "per head" in kind else random_mask(9, 8)
        whole |= mask
        arguments["attn_mask"] = mask.flatten(0, 1) if "per head" in kind else mask
    if padded:
        padding = torch.rand(batch, 8) < 0.5
        padding[-1] |= batch > 1  # all of an element
        whole |= padding[:, None, None]
        arguments["key_padding_mask"] = padding[0] if "unbatched" in kind else padding
    bias = 0.0
    if additive:
        lowest = -torch.inf if additive is True else torch.finfo(torch.float32).min
        arguments = {n: torch.zeros(m.shape).masked_fill(m, lowest) for n, m in arguments.items()}
        if kind in ("shared", "unbatched"):
            bias = torch.randn(9, 8)
            arguments["attn_mask"] = arguments["attn_mask"] + bias
    given = [x[0] if "unbatched" in kind else x for x in (query, key)]
    row = measured(module, lambda: module(given[0], given[1], given[1], need_weights=False, **arguments))
    logits = attention_logits(module, query[0], key[0]) + np.asarray(bias)
    rows = rows_of(heads, 9)
    hidden = whole.numpy()
    expected = summary(np.array([logits[h, q] for h, q in rows]), np.array([hidden[0, h, q] for h, q in rows]))
    by_head = 4 if "per head" in kind else 1  # a mask that heads share is counted once
    expected["masked_rows"] = sum(
        float(all(hidden[b, h, q])) for b in range(batch) for h in range(by_head) for q in range(9)
    )
    assert row == pytest.approx({f"attention/(root)/{k}": v for k, v in expected.items()}, rel=1e-4)
    assert kind != "shared" or expected["masked_rows"] > 0


def test_every_row_hidden_and_values_that_are_not_finite() -> None:
    module, x = mha(batch_first=True), torch.randn(2, 5, 24)
    row = measured(module, lambda: module(x, x, x, attn_mask=torch.ones(5, 5, dtype=torch.bool)))
    assert row == {
        "attention/(root)/masked_rows": 10,
        "attention/(root)/entropy": None,
        "attention/(root)/max_logit": 0,
    }
    x[0, 3, 1] = torch.inf
    row = measured(module, lambda: module(x, x, x))
    assert row["attention/(root)/entropy"] is None
    assert not np.isfinite(row["attention/(root)/max_logit"])


def test_without_queries_or_keys() -> None:
    module = mha(batch_first=True)
    for queries, keys in (
        (torch.zeros(2, 0, 24), torch.zeros(2, 4, 24)),
        (torch.zeros(2, 4, 24), torch.zeros(2, 0, 24)),
    ):
        assert measured(module, lambda q=queries, k=keys: module(q, k, k, need_weights=False)) == {}


def test_extremes_of_entropy() -> None:
    module = nn.MultiheadAttention(8, 2, batch_first=True, bias=False)
    nn.init.zeros_(module.in_proj_weight)
    x = torch.randn(1, 6, 8)
    assert measured(module, lambda: module(x, x, x))["attention/(root)/entropy"] == pytest.approx(1.0)
    with torch.no_grad():
        module.in_proj_weight[:16] = torch.eye(8).repeat(2, 1) * 100
    row = measured(module, lambda: module(x, x, x))
    assert row["attention/(root)/entropy"] < 1e-3  # type: ignore[operator]


def test_of_several_calls_all_masks_are_counted_and_the_first_is_sampled() -> None:
    module = mha(batch_first=True)
    xs = [torch.randn(4, 24), torch.randn(7, 24)]

    def forward() -> None:
        for x in xs:
            module(value=x, query=x, key=x, attn_mask=torch.ones(len(x), len(x), dtype=torch.bool).triu(0))

    row = measured(module, forward)
    logits, rows = attention_logits(module, xs[0], xs[0]), rows_of(4, 4)
    hidden = np.triu(np.ones((4, 4), bool))
    expected = summary(np.array([logits[h, q] for h, q in rows]), np.array([hidden[q] for _, q in rows]))
    expected["masked_rows"] = 2.0  # the first query of each
    assert row == pytest.approx({f"attention/(root)/{k}": v for k, v in expected.items()}, rel=1e-4)


class Qkv(nn.Module):
    """The attention of vision transformers (timm, DINO)."""

    def __init__(self, width: int, heads: int, **parts: nn.Module) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, rope: Any = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=is_causal, scale=self.scale)
        return self.proj(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("mask", ["none", "causal", "seen", "padding", "added"])
def test_a_module_with_a_linear_qkv(mask: str) -> None:
    module, x = Qkv(24, 4), torch.randn(3, 9, 24) * 3
    hidden, bias, options = torch.zeros(3, 4, 9, 9, dtype=torch.bool), torch.zeros(9, 9), {}
    if mask == "causal":
        hidden |= torch.ones(9, 9, dtype=torch.bool).triu(1)
        options = {"is_causal": True}
    elif mask == "seen":
        hidden |= random_mask(9, 9)
        options = {"attn_mask": ~hidden[0, 0]}
    elif mask == "padding":
        padding = torch.rand(3, 1, 1, 9) < 0.5
        padding[1] = True
        hidden |= padding
        options = {"attn_mask": ~padding}
    elif mask == "added":
        bias = torch.randn(9, 9)
        options = {"attn_mask": bias}
    row = measured(module, lambda: module(x, **options))
    q, k = module.qkv(x[0])[:, :48].detach().double().numpy().reshape(9, 2, 24).transpose(1, 0, 2)
    logits, rows = logits_of(q, k, 4) + bias.numpy(), rows_of(4, 9)
    expected = summary(np.array([logits[h, p] for h, p in rows]), np.array([hidden[0, h, p].numpy() for h, p in rows]))
    expected["masked_rows"] = float(hidden[:, 0].all(-1).sum())
    assert row == pytest.approx({f"attention/(root)/{k}": v for k, v in expected.items()}, rel=1e-4)


def test_what_is_not_known_is_left_alone() -> None:
    x = torch.randn(2, 5, 24)
    module = Qkv(24, 4)
    assert len(measured(module, lambda: module(x))) == 3
    assert measured(module, lambda: module(x, rope=torch.zeros(1))) == {}  # rotated
    for other in (Qkv(24, 4, q_norm=nn.LayerNorm(6)), Qkv(24, 4, pool=nn.Linear(24, 24))):
        assert measured(other, lambda other=other: other(x)) == {}
    biased = Qkv(24, 4)
    biased.table = nn.Parameter(torch.zeros(3))
    assert measured(biased, lambda: biased(x)) == {}
    for options in ({"add_zero_attn": True}, {"add_bias_kv": True}):
        other = mha(batch_first=True, **options)
        assert measured(other, lambda other=other: other(x, x, x)) == {}
    assert measured(mha(), lambda: None) == {}


def test_timms_own_attention() -> None:
    timm = pytest.importorskip("timm.layers")
    module, x = timm.Attention(24, 4, qkv_bias=True), torch.randn(2, 5, 24)
    row = measured(module, lambda: module(x, attn_mask=None, is_causal=False))
    q, k = module.qkv(x[0])[:, :48].detach().double().numpy().reshape(5, 2, 24).transpose(1, 0, 2)
    logits = logits_of(q, k, 4)
    sample = np.array([logits[h, p] for h, p in rows_of(4, 5)])
    expected = summary(sample, np.zeros_like(sample, bool)) | {"masked_rows": 0.0}
    assert row == pytest.approx({f"attention/(root)/{k}": v for k, v in expected.items()}, rel=1e-4)


def test_the_layers_of_a_transformer_under_autocast() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    x = torch.randn(3, 6, 16)
    mask = nn.Transformer.generate_square_subsequent_mask(6)
    sampled = []
    with Monitor(model, probes=["attention"]) as monitor:
        for _ in range(2 * TURNS):
            with monitor.step():
                model(x, mask=mask, is_causal=True)
            monitor.end_step()
            row = monitor.latest()
            assert [row[f"attention/layers.{i}.self_attn/masked_rows"] for i in range(2)] == [0, 0]
            sampled.append([row.get(f"attention/layers.{i}.self_attn/entropy") is not None for i in range(2)])
    assert sampled == [[True, False], [False, True], *[[False, False]] * (TURNS - 2)] * 2

    def half() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            model.layers[0](x)

    row = measured(model, half)
    logits = attention_logits(model.layers[0].self_attn, x[0], x[0])
    sample = np.array([logits[h, p] for h, p in rows_of(2, 6)])
    expected = summary(sample, np.zeros_like(sample, bool))
    assert row["attention/layers.0.self_attn/max_logit"] == pytest.approx(expected["max_logit"], rel=1e-4)  # float32


@pytest.mark.parametrize("mask", ["none", "hidden", "added"])
@pytest.mark.parametrize("kind", ["logits", "weights"])
def test_told_fields(kind: str, mask: str) -> None:
    queries = TOLD_ROWS // 4 + 3  # more rows than are read
    values = torch.randn(2, 3, queries, 7) * 4
    hidden = torch.zeros(2, 1, queries, 7, dtype=torch.bool)
    if mask != "none":
        hidden = random_mask(2, 1, queries, 7)
    told = hidden if mask == "hidden" else torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)
    if kind == "weights":
        values = values.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0)
    probe = AttentionProbe(
        modules=["*"], fields={kind: "aux.0", **({} if mask == "none" else {"mask": 1})}, name="told"
    )
    model = Give()

    class Output(tuple):
        aux = (values,)

    row = measured(model, lambda: model(Output((None, told))), probe)
    flat = values.double().numpy().reshape(-1, 7)
    gone = hidden.expand(values.shape).numpy().reshape(-1, 7)
    stride = math.ceil(len(flat) / TOLD_ROWS)
    assert stride == 2
    with np.errstate(divide="ignore"):
        logs = np.log(flat) if kind == "weights" else flat
    expected = summary(logs[::stride], gone[::stride])
    if kind == "weights":
        del expected["max_logit"]
    if kind == "logits" or mask != "none":
        expected["masked_rows"] = float(gone.all(-1).sum())
    assert row == pytest.approx({f"told/(root)/{k}": v for k, v in expected.items()}, rel=1e-4)


def test_logits_that_hold_their_mask() -> None:
    values = torch.randn(2, 4, 6)
    hidden = random_mask(2, 4, 6)
    hidden[0, 0] = True
    model = Give()
    probe = AttentionProbe(modules=["*"], fields={"logits": ""})
    row = measured(model, lambda: model(values.masked_fill(hidden, -torch.inf)), probe)
    expected = summary(values.numpy().reshape(-1, 6), hidden.numpy().reshape(-1, 6))
    expected["masked_rows"] = float(hidden.all(-1).sum())
    assert row == pytest.approx({f"attention/(root)/{k}": v for k, v in expected.items()}, rel=1e-4)


def test_fields_that_do_not_fit() -> None:
    with pytest.raises(UserError, match=r"attention reads no field 'logit'\. Did you mean 'logits'\?"):
        AttentionProbe(fields={"logit": 0})
    with pytest.raises(UserError, match="tell in `fields` where one of 'logits' and 'weights' is"):
        AttentionProbe(fields={"mask": 0})
    model, probe = Give(), AttentionProbe(modules=["*"], fields={"logits": "scores"})
    assert measured(model, lambda: model({"scores": None}), probe) == {}
