"""The small autoencoder: KL-regularised, trained on |x - x̂| + (x - x̂)² without LDM's perceptual and adversarial terms,
which flat colours do not need. At the end the spread of its latents is measured, as LDM does, and kept as scale factor.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from gligen.images import to_pixels
from gligen.miniature.config import VAEStage
from gligen.miniature.data import MakeVAE, SceneBatches, Tensors
from gligen.miniature.stage import StageTask
from gligen.modules.autoencoder import AutoencoderKL


class VAETask(StageTask):
    """The autoencoder. network: vae, with a scale factor of 1 until it is measured."""

    name = "vae"
    config: VAEStage

    def __init__(self, config: VAEStage, device: torch.device, dtype: torch.dtype) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            network = nn.ModuleDict({"vae": AutoencoderKL(config.vae)})
        super().__init__(config, network, SceneBatches(MakeVAE(config), config.seed, self.name), device, dtype)

    def loss(self, batch: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        with self.autocast():
            images = to_pixels(batch["images"])
            decoded, posterior = self.network["vae"](images, batch["noise"])
            difference = decoded.float() - images
            l1, l2 = difference.abs().mean(), difference.square().mean()
            kl = posterior.kl().mean() / posterior.mean[0].numel()
            loss = l1 + l2 + self.config.kl_weight * kl
        parts = {"loss": loss, "l1": l1, "l2": l2, "kl": kl}
        return loss, {name: part.detach() for name, part in parts.items()}

    def evaluate(self) -> dict[str, float]:
        """Measures psnr: in dB over all pixels, of decoded samples of the posterior, clamped as images are."""
        vae = cast(AutoencoderKL, self.network["vae"])
        errors = [(vae.decode(z).clamp(-1, 1) - images).square().mean().item() for images, z in self._held_out(vae)]
        mse = sum(errors) / len(errors) / 4  # pixels span 2
        return {"psnr": -10 * math.log10(mse)}

    def measure(self) -> dict[str, float]:
        """Measures scale_factor: 1 / standard deviation of the latents, all channels together (LDM, app. G)."""
        latents = torch.cat([z for _, z in self._held_out(cast(AutoencoderKL, self.network["vae"]))])
        return {"scale_factor": 1 / latents.double().std().item()}

    def _held_out(self, vae: AutoencoderKL) -> list[tuple[Tensor, Tensor]]:
        """Images and latents (a sample of the posterior, unscaled) of whole batches."""
        found = []
        for batch in self.held_out():
            images = to_pixels(batch["images"])
            found.append((images, vae.posterior(images).sample(batch["noise"])))
        return found
