"""CLIP's towers, built from open_clip's classes: captions, phrases and reference images as features.

Stable Diffusion reads captions with CLIP ViT-L/14's text tower; GLIGEN's phrase and image features come from the
same CLIP. open_clip is imported only when a tower is built, and of it only what that needs (late_import.py): the whole
takes seconds.

Legend: B batch, M = 77 positions, W text width, E width of CLIP's shared space.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gligen.config import ImageEncoderConfig, TextEncoderConfig
from gligen.modules.late_import import open_clip_module

if TYPE_CHECKING:
    from open_clip.tokenizer import SimpleTokenizer

VOCAB_SIZE = 49408  # 256 bytes, 256 bytes that end a word, merges of them, and two specials at the very end
SPECIAL = {"<|startoftext|>": -2, "<|endoftext|>": -1}  # CLIP's own spelling, which may stand in a prompt
IMAGE_FEATURE_NORM = 28.7  # the published weights' scale of image features, that of phrase features
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


@cache
def bpe_tokenizer(vocab_size: int = VOCAB_SIZE) -> SimpleTokenizer:
    """open_clip's byte-pair encoder; its vocabulary comes with the package.

    vocab_size: a smaller one keeps only the most frequent merges: any text can still be written, in more pieces.
    Raises ValueError for fewer tokens than the bytes need or more than CLIP has.
    """
    if not 514 <= vocab_size <= VOCAB_SIZE:
        raise ValueError(f"vocab_size is {vocab_size}: CLIP's tokenizer has from 514 to {VOCAB_SIZE} tokens")
    bpe: SimpleTokenizer = open_clip_module("tokenizer").SimpleTokenizer(clean="whitespace")
    bpe.bpe_ranks = {pair: rank for pair, rank in bpe.bpe_ranks.items() if rank < vocab_size - 514}
    for i, name in enumerate(("<start_of_text>", "<end_of_text>"), start=vocab_size - 2):
        bpe.encoder[name], bpe.decoder[i] = i, name
    return bpe


def encode_text(text: str, vocab_size: int = VOCAB_SIZE) -> list[int]:
    """Token ids of a text of any length, without start- and end-of-text around it."""
    ids: list[int] = []
    for piece in re.split("(" + "|".join(map(re.escape, SPECIAL)) + ")", text):
        special = piece in SPECIAL
        ids += [vocab_size + SPECIAL[piece]] if special else bpe_tokenizer(vocab_size).encode(clean_text(piece))
    return ids


def clean_text(text: str) -> str:
    """Text as CLIP's vocabulary wants it: mended unicode, single spaces, lower case.

    ftfy undoes HTML escapes once, and not where there is a `<`, as the tokenizer behind the published weights did;
    open_clip's own cleaning always undoes them, and twice.
    """
    import ftfy  # comes with open_clip

    return " ".join(ftfy.fix_text(text).split()).lower()


def tokenize(texts: list[str], context_length: int = 77, vocab_size: int = VOCAB_SIZE) -> tuple[Tensor, list[str]]:
    """Token ids (B, context_length) int64, and for each text what was cut off its end ('' where nothing was).

    Padded with end-of-text (the last id: 49407), as the published text encoder was trained; the last position always
    holds it.
    """
    start, end = vocab_size - 2, vocab_size - 1
    rows, cuts = [], []
    for text in texts:
        ids = encode_text(text, vocab_size)
        room = context_length - 2
        cuts.append(bpe_tokenizer(vocab_size).decode(ids[room:]).strip())
        ids = [start, *ids[:room], end]
        rows.append(ids + [end] * (context_length - len(ids)))
    return torch.tensor(rows, dtype=torch.int64), cuts


def windows(
    segments: list[list[tuple[str, float]]], context_length: int, vocab_size: int, *, long: bool
) -> tuple[Tensor, Tensor, str]:
    """Token ids (K, context_length) int64 and their weights (K, context_length) float32, and what was cut off.

    segments: pieces of text with a weight each; every segment begins a window. long: windows follow each other until
    all is read, each with start- and end-of-text of its own; otherwise a segment has one.
    """
    start, end, room = vocab_size - 2, vocab_size - 1, context_length - 2
    rows, weights, cut = [], [], ""
    for segment in segments:
        ids = [(i, weight) for text, weight in segment for i in encode_text(text, vocab_size)]
        if not long:
            cut = bpe_tokenizer(vocab_size).decode([i for i, _ in ids[room:]]).strip()
            ids = ids[:room]
        for first in range(0, max(len(ids), 1), room):
            window = ids[first : first + room]
            padding = context_length - 1 - len(window)
            rows.append([start, *(i for i, _ in window), *[end] * padding])
            weights.append([1.0, *(weight for _, weight in window), *[1.0] * padding])
    return torch.tensor(rows, dtype=torch.int64), torch.tensor(weights), cut


def weigh(states: Tensor, weights: Tensor) -> Tensor:
    """Caption tokens (K, M, W) times their weights (K, M), each window then scaled back to the mean it had.

    What AUTOMATIC1111's web UI does, and prompts are written for; a window without weights stays as it is.
    """
    weighted = states * weights[:, :, None].to(states)  # (K, M, W)
    before, after = (x.float().mean(dim=(1, 2), keepdim=True) for x in (states, weighted))  # (K, 1, 1) each
    is_weighted = (weights != 1).any(dim=1).to(states.device)[:, None, None]  # (K, 1, 1)
    return torch.where(is_weighted, weighted * (before / after).to(states), states)


class CLIPTextEncoder(nn.Module):
    """CLIP's text tower without its projection. Parameters carry open_clip's names."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        open_clip = open_clip_module("transformer")
        tower = open_clip.TextTransformer(
            context_length=config.context_length,
            vocab_size=config.vocab_size,
            width=config.width,
            heads=config.heads,
            layers=config.layers,
            proj_type="none",
            act_layer=open_clip.QuickGELU,
        )
        self.token_embedding = tower.token_embedding
        self.positional_embedding = tower.positional_embedding
        self.transformer = tower.transformer
        self.ln_final = tower.ln_final

    def tokenize(self, texts: list[str]) -> tuple[Tensor, list[str]]:
        """Ids (B, M), and what was cut off each text."""
        return tokenize(texts, self.config.context_length, self.config.vocab_size)

    def forward(self, ids: Tensor, clip_skip: int = 1) -> Tensor:
        """Hidden states (B, M, W) after the final LayerNorm: the caption tokens of the UNet.

        ids: (B, M). Attention is causal; padding is not masked, as published. clip_skip: which layer's, counted from
        the last, 1; the final LayerNorm follows whichever it is.
        """
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]  # (B, M, W) + (M, W)
        # (M, M): 0 for a token itself and those before it, -∞ for those after it
        causal = torch.full((ids.shape[1], ids.shape[1]), float("-inf"), dtype=x.dtype, device=x.device).triu(1)
        for block in self.transformer.resblocks[: self.config.layers + 1 - clip_skip]:
            x = block(x, attn_mask=causal)
        return self.ln_final(x)

    def phrase_features(self, ids: Tensor) -> Tensor:
        """Phrase features (B, W): the state at the first end-of-text, unprojected: f_text of GLIGEN eq. 5."""
        states = self(ids)  # (B, M, W)
        # (B,): of equal values argmax gives the first
        first_end = (ids == self.config.vocab_size - 1).int().argmax(dim=1)
        return states[torch.arange(len(ids), device=ids.device), first_end]


class CLIPImageEncoder(nn.Module):
    """CLIP's image tower, with the text projection that carries its features back to where phrases live."""

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.config = config
        open_clip = open_clip_module("transformer")
        self.visual = open_clip.VisionTransformer(
            image_size=config.image_size,
            patch_size=config.patch_size,
            width=config.width,
            layers=config.layers,
            heads=config.heads,
            mlp_ratio=4.0,
            output_dim=config.embed_dim,
            act_layer=open_clip.QuickGELU,
        )
        self.text_projection = nn.Parameter(torch.empty(config.text_width, config.embed_dim).normal_(std=0.02))

    def preprocess(self, images: Tensor) -> Tensor:
        """Square images (B, 3, S, S) in [-1, 1] -> CLIP's normalised pixels."""
        mean, std = (images.new_tensor(x)[:, None, None] for x in (PIXEL_MEAN, PIXEL_STD))  # (3, 1, 1) each
        return ((images + 1) / 2 - mean) / std

    def forward(self, pixels: Tensor) -> Tensor:
        """Image embeddings (B, E) in the shared space, L2-normalised. pixels: (B, 3, S, S) of `preprocess`."""
        return F.normalize(self.visual(pixels), dim=-1)

    def image_features(self, pixels: Tensor) -> Tensor:
        """GLIGEN's image features (B, W): the embedding carried back through the text projection, norm 28.7.

        The projection is applied as e · P with P in (out, in) layout, not as its inverse: kept for published weights.
        """
        features = self(pixels) @ self.text_projection.T  # (B, E) @ (E, W)
        return IMAGE_FEATURE_NORM * F.normalize(features, dim=-1)
