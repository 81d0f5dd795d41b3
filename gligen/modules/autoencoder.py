"""LDM's KL autoencoder: images to latents and back, under LDM's names.

Legend: B batch, (H, W) image size, (h, w) = (H, W) / f latent size, C channels. Images are in [-1, 1]; latents are
already multiplied by the scale factor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from gligen.config import VAEConfig
from gligen.kernels.backends import attention
from gligen.modules.resample import Upsample


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """LDM's normalisation; the UNet's residual blocks have torch's default eps, 1e-5."""
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """Two 3×3 convolutions as a residual. (B, C, H, W) -> (B, C', H, W)."""

    def __init__(self, channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = group_norm(channels, groups)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if channels != out_channels:
            self.nin_shortcut = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # (B, C', H, W)
        h = self.conv2(F.silu(self.norm2(h)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class AttnBlock(nn.Module):
    """Self-attention with one head over all positions, as a residual."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(proj(h), "b c h w -> b (h w) c") for proj in (self.q, self.k, self.v))  # (B, H·W, C) each
        h = rearrange(attention(q, k, v, num_heads=1), "b (h w) c -> b c h w", h=x.shape[2])  # (B, C, H, W)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    """Half the size. LDM pads right and bottom only; symmetric padding would shift the image."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # (B, C, H + 1, W + 1) -> (B, C, H/2, W/2)


class Middle(nn.Module):
    """ResNet → attention → ResNet at the lowest resolution."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """The ResNet blocks of one resolution, with the change of size that follows them."""

    block: nn.ModuleList

    def __init__(self, channels: int, out_channels: int, num_blocks: int, groups: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(channels if i == 0 else out_channels, out_channels, groups) for i in range(num_blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)  # (B, C', H, W)
        for name in ("downsample", "upsample"):
            if name in self._modules:
                x = self.get_submodule(name)(x)  # (B, C', H/2, W/2) or (B, C', 2·H, 2·W)
        return x


class Encoder(nn.Module):
    """(B, 3, H, W) -> mean and log-variance before `quant_conv`, (B, 2·C, h, w)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.base_channels * mult for mult in config.channel_mult]
        self.conv_in = nn.Conv2d(config.in_channels, config.base_channels, 3, padding=1)
        self.down = nn.ModuleList()
        channels = config.base_channels
        for i, width in enumerate(widths):
            level = Level(channels, width, config.num_res_blocks, config.norm_groups)
            if i < len(widths) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
            channels = width
        self.mid = Middle(channels, config.norm_groups)
        self.norm_out = group_norm(channels, config.norm_groups)
        self.conv_out = nn.Conv2d(channels, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)  # (B, base_channels, H, W)
        for level in self.down:
            h = level(h)  # half the size, but for the last: (B, base_channels·channel_mult[-1], h, w) in the end
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))  # (B, 2·C, h, w)


class Decoder(nn.Module):
    """(B, C, h, w) after `post_quant_conv` -> (B, 3, H, W)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.base_channels * mult for mult in config.channel_mult]
        channels = widths[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, channels, 3, padding=1)
        self.mid = Middle(channels, config.norm_groups)
        levels = []
        for i, width in reversed(list(enumerate(widths))):
            level = Level(channels, width, config.num_res_blocks + 1, config.norm_groups)
            if i > 0:
                level.upsample = Upsample(width)
            levels.append(level)
            channels = width
        self.up = nn.ModuleList(reversed(levels))  # LDM numbers them by resolution, the lowest last
        self.norm_out = group_norm(channels, config.norm_groups)
        self.conv_out = nn.Conv2d(channels, config.in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))  # (B, base_channels·channel_mult[-1], h, w)
        for level in reversed(self.up):
            h = level(h)  # twice the size, but for the last: (B, base_channels·channel_mult[0], H, W) in the end
        return self.conv_out(F.silu(self.norm_out(h)))  # (B, 3, H, W)


@dataclass(frozen=True)
class DiagonalGaussian:
    """The posterior q(z|x), unscaled. mean, logvar: (B, C, h, w); logvar is within [-30, 20]."""

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """z = mean + σ·noise."""
        return self.mean + (0.5 * self.logvar).exp() * noise

    def kl(self) -> Tensor:
        """KL(q ‖ N(0, 1)) per sample, (B,), in nats (Kingma & Welling, 2014, app. B)."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar).sum(dim=(1, 2, 3))


class AutoencoderKL(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] <-> latents (B, C, h, w) scaled to about unit spread (latent diffusion §3.1)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def posterior(self, images: Tensor) -> DiagonalGaussian:
        """q(z|x), before scaling."""
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)  # (B, C, h, w) each
        return DiagonalGaussian(mean, logvar.clamp(-30.0, 20.0))  # LDM's bounds

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Scaled latents: a sample of the posterior made with `noise` (B, C, h, w), its mode without."""
        posterior = self.posterior(images)
        z = posterior.mean if noise is None else posterior.sample(noise)  # (B, C, h, w)
        return self.config.scale_factor * z

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) of scaled latents (B, C, h, w); values may leave [-1, 1] a little."""
        return self.decoder(self.post_quant_conv(latents / self.config.scale_factor))

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, DiagonalGaussian]:
        """Reconstruction and posterior, which is what training an autoencoder compares."""
        posterior = self.posterior(images)
        return self.decoder(self.post_quant_conv(posterior.sample(noise))), posterior
