"""Decoding large images in tiles, for devices that cannot hold the decoder's activations at once."""

from __future__ import annotations

import torch
from torch import Tensor

from gligen.modules.autoencoder import AutoencoderKL


def decode_tiled(vae: AutoencoderKL, latents: Tensor, *, tile: int = 96, overlap: int = 24) -> Tensor:
    """Images (B, 3, H, W) of scaled latents (B, C, h, w), sample by sample and tile by tile; on the latents' device.

    tile: latent cells a side; overlap: cells that neighbours share, over which they are blended linearly.
    Exactly `vae.decode` where one tile holds the latent. Beyond that GroupNorm and attention see a tile instead of the
    image, so that tones may differ a little: there is no exact tiling of this network without running it twice.
    Raises ValueError for tiles that do not advance.
    """
    if max(latents.shape[2:]) <= tile:
        return torch.cat([vae.decode(latent[None]) for latent in latents])
    if not 0 <= overlap < tile:
        raise ValueError(f"overlap is {overlap} and tile {tile}: give 0 <= overlap < tile")
    factor = vae.config.downsample_factor
    height, width = latents.shape[2:]
    images = []
    for latent in latents:
        total = latents.new_zeros(1, vae.config.in_channels, factor * height, factor * width, dtype=torch.float32)
        weights = torch.zeros_like(total[:, :1])  # (1, 1, H, W): those of `_ramp`, summed over tiles
        for top in _starts(height, tile, overlap):
            for left in _starts(width, tile, overlap):
                part = vae.decode(latent[None, :, top : top + tile, left : left + tile]).float()
                rows = _ramp(part.shape[2], factor * overlap, top > 0, top + tile < height).to(total)
                columns = _ramp(part.shape[3], factor * overlap, left > 0, left + tile < width).to(total)
                weight = rows[:, None] * columns  # (rows, columns) of the tile
                place = (..., slice(factor * top, None), slice(factor * left, None))
                total[place][..., : part.shape[2], : part.shape[3]] += part * weight
                weights[place][..., : part.shape[2], : part.shape[3]] += weight
        images.append(total / weights)  # (1, 3, H, W)
    return torch.cat(images).to(latents.dtype)


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    """The starts of tiles, such that they cover the length; the last ends with it."""
    return [*range(0, length - tile, tile - overlap), max(0, length - tile)]


def _ramp(length: int, overlap: int, rises: bool, falls: bool) -> Tensor:
    """Weights (length,) that rise from, and fall to, almost 0 over the overlap where there is a neighbour."""
    slope = (torch.arange(length) + 1) / (overlap + 1)
    weights = torch.ones(length)
    if rises:
        weights = weights.minimum(slope)
    return weights.minimum(slope.flip(0)) if falls else weights
