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
from gligen.miniature.data import Batch, Batches, MakeVAE
from gligen.miniature.loop import Stage
from gligen.modules.autoencoder import AutoencoderKL


class VAETraining(Stage):
    """networks: vae, with a scale factor of 1 until it is measured."""

    name = "vae"

    def __init__(self, config: VAEStage) -> None:
        self.config: VAEStage = config
        self.batches = Batches(MakeVAE(config), config.batch_size, config.seed, self.name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.networks = nn.ModuleDict({"vae": AutoencoderKL(config.vae)})

    def loss(self, networks: nn.ModuleDict, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        images = to_pixels(batch["images"])
        decoded, posterior = networks["vae"](images, batch["noise"])
        difference = decoded.float() - images
        l1, l2 = difference.abs().mean(), difference.square().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return l1 + l2 + self.config.kl_weight * kl, {"l1": l1.detach(), "l2": l2.detach(), "kl": kl.detach()}

    def evaluate(self, networks: nn.ModuleDict) -> dict[str, float]:
        """psnr: in dB over all pixels, of decoded samples of the posterior, clamped as pictures are."""
        vae = cast(AutoencoderKL, networks["vae"])
        errors = [(vae.decode(z).clamp(-1, 1) - images).square().mean().item() for images, z in self._held_out(vae)]
        mse = sum(errors) / len(errors) / 4  # pixels span 2
        return {"psnr": -10 * math.log10(mse)}

    def finish(self, networks: nn.ModuleDict) -> dict[str, float]:
        """scale_factor: 1 / standard deviation of the latents, all channels together (LDM, app. G)."""
        latents = torch.cat([z for _, z in self._held_out(cast(AutoencoderKL, networks["vae"]))])
        return {"scale_factor": 1 / latents.double().std().item()}

    def _held_out(self, vae: AutoencoderKL) -> list[tuple[Tensor, Tensor]]:
        """Pictures and latents (a sample of the posterior, unscaled) of whole batches."""
        device = vae.quant_conv.weight.device
        found = []
        for i in range(max(1, self.config.eval_scenes // self.config.batch_size)):
            batch = self.batches.held_out(i)
            images = to_pixels(batch["images"].to(device))
            found.append((images, vae.posterior(images).sample(batch["noise"].to(device))))
        return found
