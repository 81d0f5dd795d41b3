"""Batch → loss of each sample: the noise-prediction objective with GLIGEN's layers in the frozen model.

    L = E ‖ε - ε_θ(x_t, t, caption, grounding)‖²,  x_t = √ᾱ_t x₀ + √(1-ᾱ_t) ε      (GLIGEN eq. 9)

Captions and grounding are dropped here, sample by sample, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from gligen.data.encodings import Array
from gligen.diffusion.loss import noise_loss
from gligen.diffusion.schedule import Schedule
from gligen.grounding.inpainting import inpaint_channels
from gligen.grounding.kind import TextEncoder
from gligen.images import to_pixels
from gligen.modules.autoencoder import DiagonalGaussian
from gligen.modules.position_net import GroundingInputs, null_where
from gligen.training.batches import Batch, EncodedBatch, GroundingBatches, Samples
from gligen.training.kept import KeptEncodings, kept_dtype
from gligen.training.trainable import Networks


@dataclass(frozen=True)
class Inputs:
    """The UNet's inputs in one step, and the ε that it should predict. Dropping is done."""

    x_t: Tensor  # (B, C, h, w)
    timesteps: Tensor  # (B,)
    noise: Tensor  # (B, C, h, w)
    context: Tensor  # (B, M, context_dim)
    grounding: GroundingInputs
    map: Tensor | None = None  # (B, 1 or 3, H, W), kept where grounding is null: as in sampling's null branch
    drop_map: Tensor | None = None  # (B,) bool: where its extra channels are 0
    inpaint: Tensor | None = None  # (B, 5, h, w)


class Objective:
    """The loss of a batch under frozen encoders.

    dtype: of the computation (autocast); weights stay as they are, losses are float32.
    weights: of the loss at each timestep, (T,), see gligen/diffusion/loss.py; None weighs all alike, as the paper does.
    batches: that will come; the encodings of their examples are kept if they come again. phrases: features of phrases
    that are known already.
    casts_inputs: the UNet's weights are in `dtype` themselves, and what it reads is rounded instead of autocast.
    """

    def __init__(
        self,
        networks: Networks,
        schedule: Schedule,
        *,
        dtype: torch.dtype = torch.float32,
        weights: Tensor | None = None,
        batches: GroundingBatches | None = None,
        phrases: Sequence[Mapping[str, Array]] = (),
        casts_inputs: bool = False,
    ) -> None:
        self.networks = networks
        self.schedule = schedule
        self.dtype, self.casts_inputs = dtype, casts_inputs
        self.device = networks.unet.first_conv.weight.device
        with torch.no_grad():
            empty_ids = networks.text_encoder.tokenize([""])[0].to(self.device)
            self.no_caption = networks.text_encoder(empty_ids).float()  # (1, M, D), as sampling's null branch reads
        self.phrases = PhraseFeatures(networks.text_encoder, self.device, phrases)
        self.kept: KeptEncodings | None = None
        if batches is not None and batches.cache:
            kept = kept_dtype(self.device, dtype)
            self.kept = KeptEncodings(batches.cache, self.device, self._encode, batches.encodable, kept)
        self.weights = None if weights is None else weights.to(self.device)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @torch.no_grad()
    def encode(self, batch: Batch) -> EncodedBatch:
        """The batch with encodings, on this device, in place of images, captions and phrases: what the frozen encoders
        do. So what is left to do is of the same shape in every step, and can be recorded (engine/step.py).

        What needs no encoding may stay where it is.
        """
        grounding = batch.grounding
        if batch.phrases:
            samples, entities, which = self._here(batch.phrase_slots).unbind(1)  # (E,) each
            features, empty = self.phrases.encode(batch.phrases)[which], self._here(grounding["text_features"])
            grounding = grounding | {"text_features": empty.index_put((samples, entities), features)}  # (B, N, F)
        # the phrases' features above are not autocast, see PhraseFeatures
        with self.autocast():
            if batch.latents is not None:
                assert batch.ids is not None
                mean, logvar = map(self._here, batch.latents)
                context = self.networks.text_encoder(self._here(batch.ids)).float()
            elif self.kept is not None and batch.examples is not None:
                mean, logvar, context = self.kept.take(batch.examples, batch.new, batch.images, batch.ids)
            else:
                assert batch.images is not None
                assert batch.ids is not None
                mean, logvar, context = self._encode(batch.images, batch.ids)
            if batch.references is not None:
                encoder = self.networks.image_encoder
                assert encoder is not None  # build_model requires it for these modes
                references, slots = self._here(batch.references), self._here(batch.reference_slots)
                features = encoder.image_features(encoder.preprocess(to_pixels(references))).float()  # (R, F)
                empty = self._here(grounding["image_features"])
                grounding = grounding | {"image_features": empty.index_put(tuple(slots.unbind(1)), features)}
        own: dict[str, Any] = {f.name: getattr(batch, f.name) for f in fields(Samples)}
        return EncodedBatch(**own | {"grounding": grounding}, mean=mean, logvar=logvar, context=context)

    @torch.no_grad()
    def inputs(self, batch: EncodedBatch) -> Inputs:
        """Noises a batch, and drops what is to be dropped (Ho & Salimans alg. 1)."""
        batch = batch.to(self.device)
        with self.autocast():
            # drawn anew at every step, of kept encodings too: the mean and variance are kept, not a sample
            posterior = DiagonalGaussian(batch.mean, batch.logvar)
            x0 = self.networks.vae.config.scale_factor * posterior.sample(batch.posterior_noise)  # (B, C, h, w)
            context = torch.where(batch.drop_caption[:, None, None], self.no_caption, batch.context)  # (B, M, D)
        return Inputs(
            x_t=self.schedule.q_sample(x0, batch.timesteps, batch.noise),  # (B, C, h, w)
            timesteps=batch.timesteps,
            noise=batch.noise,
            context=context,
            grounding=null_where(batch.grounding, batch.drop_grounding),  # null tokens, not none: as in sampling
            map=batch.grounding.get("map"),
            drop_map=batch.drop_map,
            inpaint=None if batch.keep is None else inpaint_channels(x0, batch.keep),
        )

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    def _encode(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and logarithm of the variance of the latents' posterior, unscaled, and the captions' states (B, M, D);
        float32."""
        posterior = self.networks.vae.posterior(to_pixels(self._here(images)))
        context = self.networks.text_encoder(self._here(ids))
        return posterior.mean.float(), posterior.logvar.float(), context.float()

    def losses(self, inputs: Inputs) -> Tensor:
        """‖ε - ε_θ‖² of each sample (GLIGEN eq. 9), (B,) float32, not weighted."""
        unet = self.networks.unet

        def cast(tensor: Tensor) -> Tensor:
            return tensor.to(self.dtype) if self.casts_inputs else tensor

        with nullcontext() if self.casts_inputs else self.autocast():
            extra = None if inputs.inpaint is None else cast(inputs.inpaint)
            if inputs.map is not None:
                extra = unet.map_channels(cast(inputs.map), *inputs.x_t.shape[2:])  # (B, C', h, w)
                if inputs.drop_map is not None:
                    extra = extra.masked_fill(inputs.drop_map[:, None, None, None], 0)
            x_t, context = cast(inputs.x_t), cast(inputs.context)
            eps = unet(x_t, inputs.timesteps, context, inputs.grounding, extra)  # (B, C, h, w)
        return noise_loss(eps, inputs.noise)

    def loss(self, batch: EncodedBatch) -> tuple[Tensor, Tensor]:
        """The loss to minimise (a scalar), and the plain mean squared error (detached, for the log)."""
        inputs = self.inputs(batch)
        losses = self.losses(inputs)
        weighted = losses if self.weights is None else losses * self.weights[inputs.timesteps]
        return weighted.mean(), losses.detach().mean()


class PhraseFeatures:
    """Features (F,) of phrases, each encoded once and kept on the device in float32.

    stored: features that need no encoding. Autocast is off: they are as precise as the encoder's weights. The MOST
    latest are kept. On a CPU each is encoded alone, elsewhere always as many together: so a phrase's feature does not
    depend on what it came with, and a resumed run computes what an unbroken one does.
    """

    MOST = 65_536
    TOGETHER = 32

    def __init__(self, encoder: TextEncoder, device: torch.device, stored: Sequence[Mapping[str, Array]] = ()) -> None:
        self.encoder, self.device, self.stored = encoder, device, stored
        self.features: dict[str, Tensor] = {}

    @torch.no_grad()
    def encode(self, phrases: Sequence[str]) -> Tensor:
        """The features (P, F) of P phrases."""
        lacking = []
        for phrase in dict.fromkeys(phrases):
            if phrase in self.features:
                continue
            kept = (features.get(phrase) for features in self.stored)  # each look-up may read a file
            stored = next((feature for feature in kept if feature is not None), None)
            if stored is None:
                lacking.append(phrase)
            else:
                self.features[phrase] = torch.tensor(stored, device=self.device)
        together = 1 if self.device.type == "cpu" else self.TOGETHER
        for i in range(0, len(lacking), together):
            chunk = lacking[i : i + together]
            # filled up with empty texts: of another number of texts a product may be rounded otherwise
            ids = self.encoder.tokenize(chunk + [""] * (together - len(chunk)))[0].to(self.device)
            with torch.autocast(self.device.type, enabled=False):
                self.features |= dict(zip(chunk, self.encoder.phrase_features(ids).float(), strict=False))
        found = torch.stack([self.features[phrase] for phrase in phrases])  # (P, F)
        while len(self.features) > self.MOST:
            del self.features[next(iter(self.features))]  # the one that came first
        return found
