"""The paper's idea: layers that let visual tokens look at grounding tokens, behind gates that start shut.

Legend: B batch, L visual tokens, N grounding tokens, C channels of the UNet at this place, D width of a grounding
token. In equations v: visual tokens (B, L, C); h: grounding tokens (B, N, D); β: the gate scale of scheduled sampling.
In code `visual` and `tokens`; v is values there, as q and k are queries and keys.

A fuser works in two steps. `project(h)` makes what does not depend on the visual tokens (their keys and values, say)
once per request; `forward(visual, projected, β)` runs at every denoising step.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gligen.modules.attention import Attention, FeedForward

GateScale = float | Tensor  # β in [0, 1]: a number, or a 0-dim tensor on the model's device
Projected = tuple[Tensor, ...]  # what a fuser keeps of the grounding tokens


class Fuser(nn.Module, ABC):
    """The two gated residuals every kind shares (GLIGEN eq. 8, and its dense half):

        v ← v + β·tanh(α_attn) · f(v, h)
        v ← v + β·tanh(α_dense) · FF(LN(v))

    Both α (the paper's γ; published weights call it alpha) start at 0, so that the model starts as exactly the one it
    was grafted on.
    """

    def __init__(self, dim: int, key_dim: int, num_heads: int) -> None:
        super().__init__()
        self.attn = Attention(dim, key_dim, num_heads)
        self.ff = FeedForward(dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.alpha_attn = nn.Parameter(torch.tensor(0.0))
        self.alpha_dense = nn.Parameter(torch.tensor(0.0))

    @abstractmethod
    def project(self, tokens: Tensor) -> Projected:
        """The part of the grounding tokens (B, N, D) that every step needs."""

    @abstractmethod
    def attend(self, visual: Tensor, projected: Projected) -> Tensor:
        """f(v, h): the attention's part of the residual, (B, L, C)."""

    def forward(self, visual: Tensor, projected: Projected, gate_scale: GateScale = 1.0) -> Tensor:
        """The visual tokens (B, L, C) after both residuals. projected: of `project`; gate_scale: β."""
        visual = visual + gate_scale * self.alpha_attn.tanh() * self.attend(visual, projected)
        return visual + gate_scale * self.alpha_dense.tanh() * self.ff(self.norm2(visual))


class GatedSelfAttention(Fuser):
    """f(v, h) = TS(SelfAttn(LN([v, W h]))) (GLIGEN eq. 8): attention over both kinds of tokens, of which TS keeps the
    visual ones.

    LayerNorm and the projections work token by token, so those of the grounding tokens are made once; and since TS
    drops the grounding tokens' outputs, only visual tokens ask.
    """

    def __init__(self, dim: int, token_dim: int, num_heads: int) -> None:
        super().__init__(dim, dim, num_heads)
        self.linear = nn.Linear(token_dim, dim)

    def project(self, tokens: Tensor) -> Projected:
        return self.attn.keys_values(self.norm1(self.linear(tokens)))  # (B, N, D) -> (B, N, C) each

    def attend(self, visual: Tensor, projected: Projected) -> Tensor:
        q, k, v = self.attn.queries_keys_values(self.norm1(visual))  # (B, L, C) each
        k_grounding, v_grounding = projected  # (B, N, C) each
        return self.attn.attend(q, k, v, extra=(k_grounding, v_grounding))  # one softmax over both


class GatedCrossAttention(Fuser):
    """f(v, h) = CrossAttn(LN(v), h): the ablation of GLIGEN §5.1, which looks at the grounding tokens alone."""

    def __init__(self, dim: int, token_dim: int, num_heads: int) -> None:
        super().__init__(dim, token_dim, num_heads)

    def project(self, tokens: Tensor) -> Projected:
        return self.attn.keys_values(tokens)  # (B, N, D) -> (B, N, C) each

    def attend(self, visual: Tensor, projected: Projected) -> Tensor:
        return self.attn(self.norm1(visual), *projected)  # (B, L, C)


class GatedSelfAttentionResized(GatedSelfAttention):
    """gatedSA2, for maps: attention over both kinds of tokens, of which the *grounding* tokens' outputs are kept, laid
    out on their square grid and resized bicubically to the visual one.

    Both grids must be square: raises ValueError if N or L is no square number.
    """

    def project(self, tokens: Tensor) -> Projected:
        return self.attn.queries_keys_values(self.norm1(self.linear(tokens)))  # (B, N, C) each

    def attend(self, visual: Tensor, projected: Projected) -> Tensor:
        q_grounding, k_grounding, v_grounding = projected  # (B, N, C) each
        grid, target = math.isqrt(q_grounding.shape[1]), math.isqrt(visual.shape[1])
        if grid**2 != q_grounding.shape[1] or target**2 != visual.shape[1]:
            raise ValueError(
                f"gatedSA2 needs square grids: got {q_grounding.shape[1]} grounding and {visual.shape[1]} visual tokens"
            )
        k, v = self.attn.keys_values(self.norm1(visual))  # (B, L, C) each
        out = self.attn.attend(q_grounding, k, v, extra=(k_grounding, v_grounding))  # (B, N, C)
        out = out.transpose(1, 2).unflatten(2, (grid, grid))  # (B, C, √N, √N)
        out = F.interpolate(out, (target, target), mode="bicubic")  # (B, C, √L, √L)
        return out.flatten(2).transpose(1, 2)  # (B, L, C)


FUSERS: dict[str, type[Fuser]] = {
    "gatedSA": GatedSelfAttention,
    "gatedCA": GatedCrossAttention,
    "gatedSA2": GatedSelfAttentionResized,
}


def build_fuser(fuser_type: str, dim: int, token_dim: int, num_heads: int) -> Fuser:
    """The fuser called `fuser_type` for a place with `dim` channels."""
    return FUSERS[fuser_type](dim, token_dim, num_heads)
