"""The caption encoder of LDM text2img-large: a pre-norm transformer over WordPiece ids, under its file's names.

Legend: B batch, M = 77 positions, W = 1280.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gligen.config import TextEncoderConfig
from gligen.kernels.backends import attention
from gligen.modules.wordpiece import WordPiece


class SelfAttention(nn.Module):
    """Heads whose joint width (8 × 64) is not the model's."""

    def __init__(self, width: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(width, num_heads * head_dim, bias=False)
        self.to_k = nn.Linear(width, num_heads * head_dim, bias=False)
        self.to_v = nn.Linear(width, num_heads * head_dim, bias=False)
        self.to_out = nn.Linear(num_heads * head_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        h = attention(self.to_q(x), self.to_k(x), self.to_v(x), self.num_heads)  # (B, M, num_heads·head_dim)
        return self.to_out(h)  # (B, M, W)


class FeedForward(nn.Module):
    """W → 4·W → W with GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU()), nn.Identity(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Residual(nn.ModuleList):
    """[LayerNorm, layer] as x + layer(norm(x))."""

    def forward(self, x: Tensor) -> Tensor:
        norm, layer = self
        return x + layer(norm(x))


class AttentionLayers(nn.Module):
    """Alternating self-attention and feed-forward layers."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(config.layers):
            for layer in (SelfAttention(config.width, config.heads, config.head_dim), FeedForward(config.width)):
                self.layers.append(Residual([nn.LayerNorm(config.width), layer]))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class PositionEmbedding(nn.Module):
    """A learned vector a position."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(length, width)

    def forward(self, positions: Tensor) -> Tensor:
        return self.emb(positions)


class BERTTextEncoder(nn.Module):
    """Caption states (B, M, W) of LDM text2img-large.

    The WordPiece vocabulary (bert-base-uncased's `vocab.txt`) is not in the checkpoint; give it with `vocabulary`.
    """

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.vocabulary: WordPiece | None = None
        self.token_emb = nn.Embedding(config.vocab_size, config.width)
        self.pos_emb = PositionEmbedding(config.context_length, config.width)
        self.attn_layers = AttentionLayers(config)
        self.norm = nn.LayerNorm(config.width)
        self.to_logits = nn.Linear(config.width, config.vocab_size)  # in the file; never used for conditioning

    def tokenize(self, texts: list[str]) -> tuple[Tensor, list[str]]:
        """Ids (B, M), and what was cut off each text. Raises ValueError without a vocabulary."""
        if self.vocabulary is None:
            raise ValueError("this model reads WordPiece ids: give bert-base-uncased's vocab.txt with --vocab FILE")
        rows, cuts = zip(*(self.vocabulary.encode(text, self.config.context_length) for text in texts), strict=True)
        return torch.tensor(rows, dtype=torch.int64), list(cuts)

    def forward(self, ids: Tensor) -> Tensor:
        """Caption tokens (B, M, W). ids: (B, M)."""
        positions = torch.arange(ids.shape[1], device=ids.device)  # (M,)
        return self.norm(self.attn_layers(self.token_emb(ids) + self.pos_emb(positions)))  # (B, M, W) + (M, W)

    def phrase_features(self, ids: Tensor) -> Tensor:
        """Phrase features (B, W): the mean over the phrase's own tokens, without [CLS], [SEP] and [PAD] (id 0).

        GLIGEN's LDM models are not published with a recipe for phrases; this is what a model trained here uses.
        """
        states = self(ids)  # (B, M, W)
        has_next = torch.cat([ids[:, 1:] != 0, torch.zeros_like(ids[:, :1], dtype=torch.bool)], dim=1)  # (B, M)
        own = has_next.to(states.dtype)  # all but the last token, [SEP], and the padding ...
        own[:, 0] = 0  # ... and [CLS]
        return (states * own[..., None]).sum(dim=1) / own.sum(dim=1, keepdim=True).clamp(min=1)
