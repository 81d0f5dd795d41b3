"""The transformer inside the UNet: self-attention → fuser → cross-attention → feed-forward, each a residual."""

from __future__ import annotations

from typing import NamedTuple

from einops import rearrange
from torch import Tensor, nn

from gligen.modules.attention import Attention, FeedForward
from gligen.modules.fusers import GateScale, Projected, build_fuser


class BlockConditioning(NamedTuple):
    """Caption and grounding as one transformer block needs them, made once per request.

    caption: keys and values (B, M, C) of the caption tokens.
    grounding: what the fuser keeps of the grounding tokens; None leaves the fuser out altogether.
    """

    caption: tuple[Tensor, Tensor]
    grounding: Projected | None


class BasicTransformerBlock(nn.Module):
    """LDM's block with GLIGEN's fuser between self- and cross-attention (GLIGEN eqs. 6 to 8, fig. 3); all pre-norm.

    fuser_type None builds LDM's own block.
    """

    def __init__(
        self, dim: int, num_heads: int, context_dim: int, fuser_type: str | None = None, token_dim: int = 0
    ) -> None:
        super().__init__()
        self.attn1 = Attention(dim, dim, num_heads)
        self.ff = FeedForward(dim)
        self.attn2 = Attention(dim, context_dim, num_heads)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        if fuser_type is not None:
            self.fuser = build_fuser(fuser_type, dim, token_dim, num_heads)

    def condition(self, context: Tensor, tokens: Tensor | None) -> BlockConditioning:
        """context: (B, M, context_dim) caption tokens; tokens: (B, N, D) grounding tokens or None."""
        projected = None if tokens is None else self.fuser.project(tokens)
        return BlockConditioning(self.attn2.keys_values(context), projected)

    def forward(self, visual: Tensor, cond: BlockConditioning, gate_scale: GateScale = 1.0) -> Tensor:
        """The visual tokens (B, L, C) after all four residuals, each of which keeps their shape.

        cond: of the same B samples, or of n·B where this is their first look at it (`UNetModel.denoise`): so many are
        then returned.
        """
        visual = visual + self.attn1.attend(*self.attn1.queries_keys_values(self.norm1(visual)))
        visual = repeat_to(visual, like=cond.caption[0])
        if cond.grounding is not None:
            visual = self.fuser(visual, cond.grounding, gate_scale)
        visual = visual + self.attn2(self.norm2(visual), *cond.caption)
        return visual + self.ff(self.norm3(visual))


def repeat_to(x: Tensor, like: Tensor) -> Tensor:
    """The samples of x (B, …) as often as there are of `like` (n·B, …): all of them n times, one set behind another.

    x itself where `like` has no more of them: one caption serves several latents.
    """
    times = like.shape[0] // x.shape[0]
    return x if times <= 1 else x.repeat(times, *[1] * (x.ndim - 1))


class SpatialTransformer(nn.Module):
    """A transformer block over the pixels of a feature map, as a residual. (B, C, H, W) -> (B or n·B, C, H, W)."""

    def __init__(
        self,
        channels: int,
        num_heads: int,
        context_dim: int,
        norm_groups: int,
        fuser_type: str | None = None,
        token_dim: int = 0,
    ) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, channels, eps=1e-6)  # residual blocks have 1e-5
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            [BasicTransformerBlock(channels, num_heads, context_dim, fuser_type, token_dim)]
        )
        self.proj_out = nn.Conv2d(channels, channels, 1)

    @property
    def block(self) -> BasicTransformerBlock:
        """The one block (every published model has depth 1)."""
        return self.transformer_blocks[0]  # type: ignore[return-value]  # ModuleList holds plain Modules

    def forward(self, x: Tensor, cond: BlockConditioning, gate_scale: GateScale = 1.0) -> Tensor:
        height = x.shape[2]
        visual = rearrange(self.proj_in(self.norm(x)), "b c h w -> b (h w) c")  # (B, L, C), L = H·W
        visual = self.block(visual, cond, gate_scale)
        out = self.proj_out(rearrange(visual, "b (h w) c -> b c h w", h=height))  # (B, C, H, W)
        return repeat_to(x, like=out) + out
