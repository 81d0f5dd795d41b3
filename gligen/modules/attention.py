"""Attention and feed-forward layers of LDM's transformer blocks, under LDM's names.

Legend: B batch, L queries, S keys, N keys of a second segment, C channels.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from gligen.kernels.backends import KeysValues, attention


class Attention(nn.Module):
    """Multi-head attention from `query_dim`-wide queries to `context_dim`-wide keys and values.

    Projections of queries, keys and values have no bias; the output's has. The projections are methods of their
    own because keys and values of captions and grounding tokens are computed once per request.
    """

    def __init__(self, query_dim: int, context_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(query_dim, query_dim, bias=False)
        self.to_k = nn.Linear(context_dim, query_dim, bias=False)
        self.to_v = nn.Linear(context_dim, query_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(query_dim, query_dim))

    def keys_values(self, context: Tensor) -> KeysValues:
        """Keys and values (B, S, C) of a context (B, S, context_dim)."""
        return self.to_k(context), self.to_v(context)

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All three (B, L, C) of the same tokens x (B, L, C), for self-attention."""
        return self.to_q(x), *self.keys_values(x)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, extra: KeysValues | None = None) -> Tensor:
        """Ready queries (B, L, C) against ready keys and values (B, S, C), and `extra` ones (B, N, C) as `attention`
        takes them; returns (B, L, C).
        """
        return self.to_out(attention(q, k, v, self.num_heads, extra))

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries from x (B, L, C) against ready keys and values (B, S, C); returns (B, L, C)."""
        return self.attend(self.to_q(x), k, v)


class GEGLU(nn.Module):
    """(x V + c) · GELU(x W + b), with the exact GELU (Shazeer, 2020, eq. 5)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)  # (B, L, hidden_dim) each
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width and back. (B, L, C) -> (B, L, C)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # the Identity stands where LDM has a dropout of 0, so that names agree
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # (B, L, C) -> (B, L, 4·C) -> (B, L, C)
