"""The transformer layer of the query decoders: cross-attention, self-attention, feed-forward; each with post-norm.

Queries of all scenes are concatenated; attention stays within a scene.

Legend: Q queries · K keys (superpoints or voxels) of a scene · d width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bifusion_diag.model.segments import split_rows


class QueryAttention(nn.Module):
    """Multi-head attention of each scene's queries to the scene's own keys, residual, post-norm.

    Args:
        width: d.
        heads: attention heads.
        dropout: on the attention weights and on the output.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)

    def forward(
        self,
        queries: Tensor,
        query_counts: tuple[int, ...],
        keys: Tensor,
        key_counts: tuple[int, ...],
        hidden: Sequence[Tensor] | None = None,
        query_places: Tensor | None = None,
        key_places: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            queries: (ΣQ_i, d).
            query_counts: Q_i.
            keys: (ΣK_i, d); also the values.
            key_counts: K_i.
            hidden: per scene (Q_i, K_i) bool, True = the query does not see the key. No row may be all True: its
                softmax would be 0/0.
            query_places: (ΣQ_i, d) code of where each query is, added where it is compared, or None.
            key_places: (ΣK_i, d) code of where each key is, added where it is compared and not to the values, or None.

        Returns:
            (ΣQ_i, d).
        """
        asking = queries if query_places is None else queries + query_places
        asked = keys if key_places is None else keys + key_places
        attended = []
        # The plain kernel: the fused CUDA kernels add the gradient of the keys in an order that varies.
        with sdpa_kernel(SDPBackend.MATH):
            compared = split_rows(asking, query_counts)
            values = split_rows(keys, key_counts)
            # Without places, keys and values are the same tensors: the attention then projects both at once.
            with_places = values if asked is keys else split_rows(asked, key_counts)
            for scene, (query, key, value) in enumerate(zip(compared, with_places, values, strict=True)):
                mask = None if hidden is None else hidden[scene]
                attended.append(self.attention(query, key, value, attn_mask=mask, need_weights=False)[0])
        return self.norm(queries + self.dropout(torch.cat(attended)))


class FeedForward(nn.Module):
    """Two linear layers around an activation, residual, post-norm."""

    def __init__(self, width: int, hidden: int, dropout: float, activation: type[nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(width, hidden), activation(), nn.Dropout(dropout), nn.Linear(hidden, width), nn.Dropout(dropout)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, queries: Tensor) -> Tensor:
        """(ΣQ_i, d) → (ΣQ_i, d)."""
        return self.norm(queries + self.net(queries))


class DecoderLayer(nn.Module):
    """Queries look at the superpoints, then at each other, then think."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.cross_attention = QueryAttention(width, heads, dropout)
        self.self_attention = QueryAttention(width, heads, dropout)
        self.feed_forward = FeedForward(width, hidden, dropout)
        # As in ESAM: PyTorch gives Xavier to the input projections only, and ESAM adds this one output projection.
        nn.init.xavier_uniform_(self.cross_attention.attention.out_proj.weight)

    def forward(
        self,
        queries: Tensor,
        query_counts: tuple[int, ...],
        keys: Tensor,
        key_counts: tuple[int, ...],
        hidden: Sequence[Tensor],
    ) -> Tensor:
        """One layer; arguments as in :meth:`QueryAttention.forward`."""
        queries = self.cross_attention(queries, query_counts, keys, key_counts, hidden)
        queries = self.self_attention(queries, query_counts, queries, query_counts)
        return self.feed_forward(queries)


def unmask_hidden_rows(hidden: Tensor) -> Tensor:
    """Let a query that sees no key at all see every key: (Q, K) bool → (Q, K) bool."""
    return hidden & ~hidden.all(dim=1, keepdim=True)
