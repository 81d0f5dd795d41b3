"""The small base model: LDM's UNet, ε-prediction, on the frozen autoencoder's latents and the frozen CLIP's states.

Drawing and encoding take a fifth of a step, on a CPU too much: with a cache, each scene's posterior and caption are
encoded when it comes for the first time and kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from gligen.config import ModelConfig, ScheduleConfig
from gligen.data.scenes import make_scene
from gligen.data.streams import Series
from gligen.diffusion.loss import min_snr_weights, noise_loss
from gligen.diffusion.schedule import Schedule
from gligen.images import grid, to_pixels
from gligen.miniature.config import IMAGE_SIZE, CLIPStage, UNetStage, VAEStage
from gligen.miniature.data import MakeUNet, SceneBatches, Tensors
from gligen.miniature.stage import StageTask, Trained
from gligen.modules.autoencoder import AutoencoderKL, DiagonalGaussian
from gligen.modules.clip import CLIPTextEncoder
from gligen.modules.unet import ResBlock, UNetModel
from gligen.pipeline import Pipeline
from gligen.request import parse_request
from gligen.training.engine.logs import RunLog
from gligen.training.engine.task import Event, keeps_master_weights
from gligen.training.kept import KeptEncodings, kept_dtype


class UNetTask(StageTask):
    """The base UNet. network: unet. clip, vae: the outcomes of the other stages, frozen. folder: for previews."""

    name = "unet"
    config: UNetStage

    def __init__(
        self,
        config: UNetStage,
        clip: Trained,
        vae: Trained,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.folder = folder
        self.facts = {"clip": clip.fingerprint, "vae": vae.fingerprint}
        self.model = model_config(config, clip.config, vae.config, vae.measured["scale_factor"])
        self.schedule = Schedule(**dataclasses.asdict(self.model.schedule))
        self.vae = AutoencoderKL(self.model.vae)
        self.vae.load_state_dict(vae.networks["vae"])
        self.text_encoder = CLIPTextEncoder(self.model.text_encoder)
        self.text_encoder.load_state_dict(clip.networks["text_encoder"])
        for frozen in (self.vae, self.text_encoder):
            frozen.to(device).eval().requires_grad_(False)
        if config.focus_high >= self.schedule.timesteps:
            raise ValueError(f"focus_high is {config.focus_high}: the last timestep is {self.schedule.timesteps - 1}")
        side = IMAGE_SIZE // self.model.vae.downsample_factor
        self.make = MakeUNet(
            config,
            latent_shape=(self.model.vae.latent_channels, side, side),
            timesteps=self.schedule.timesteps,
            context_length=self.model.text_encoder.context_length,
            vocab_size=self.model.text_encoder.vocab_size,
        )
        self.kept: KeptEncodings | None = None
        if config.cache:
            self.kept = KeptEncodings(config.cache, device, self._encode, self._draw, kept_dtype(device, dtype))
        with torch.no_grad():
            self.no_caption = self.text_encoder(self.text_encoder.tokenize([""])[0].to(device))  # (1, M, D)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            unet = UNetModel(self.model.unet)
        init_for_training(unet)
        batches = SceneBatches(self.make, config.seed, self.name, config.cache)
        super().__init__(config, nn.ModuleDict({"unet": unet}), batches, device, dtype)
        self.has_master_weights = keeps_master_weights(device, dtype)

    def events(self) -> Sequence[Event]:
        return [*super().events(), Event(self._preview, self.config.preview_every, at_end=True)]

    def loss(self, batch: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean squared error on ε (LDM eq. 3)."""
        with nullcontext() if self.has_master_weights else self.autocast():
            errors = self._errors(batch)
        if limit := self.config.min_snr:
            # where there is little noise, most of the error is noise that the autoencoder's posterior has added itself
            errors = errors * min_snr_weights(self.schedule, batch["timesteps"], limit)
        loss = errors.mean()
        return loss, {"loss": loss.detach()}

    def evaluate(self) -> dict[str, float]:
        """Losses. eval_loss: on held-out scenes, timesteps drawn as in training; eval_high: at 400 and above alone."""
        errors, timesteps = [], []
        for batch in self.held_out():
            errors.append(self._errors(self.prepare(batch, 0.0)))
            timesteps.append(batch["timesteps"])
        error, is_high = torch.cat(errors), torch.cat(timesteps) >= 400
        high = {"eval_high": error[is_high].mean().item()} if is_high.any() else {}
        return {"eval_loss": error.mean().item()} | high

    def _preview(self, step: int, run_log: RunLog) -> None:
        """previews/STEP.png: what is generated for 16 captions that it has not seen, always the same."""
        unet = cast(UNetModel, self.network["unet"])
        pipeline = Pipeline(self.model, unet, self.vae, self.text_encoder)
        prompts = [make_scene(Series.MINIATURE_HELD_OUT, n, size=IMAGE_SIZE).caption for n in range(16)]
        requests = [
            parse_request({"prompt": prompt, "seed": n, "steps": 25, "guidance": 4}) for n, prompt in enumerate(prompts)
        ]
        sheet = self.folder / "previews" / f"{step:07d}.png"
        sheet.parent.mkdir(parents=True, exist_ok=True)
        grid([sample.image for sample in pipeline.generate(requests, batch_size=16)]).save(sheet)

    @torch.no_grad()
    def prepare(self, batch: Tensors, progress: float) -> Tensors:
        """Posteriors (mean, logvar) and captions' states (context) in place of images and captions; towards the end
        all timesteps alike."""
        if self.kept is not None and "examples" in batch:
            made = self.kept.take(batch["examples"], *(batch.get(name) for name in ("new", "images", "ids")))
        else:
            made = self._encode(batch["images"], batch["ids"])
        rest = {name: batch[name] for name in ("drop_caption", "timesteps", "noise", "posterior_noise")}
        if progress >= 1 - self.config.finish:
            rest["timesteps"] = batch["even_timesteps"]
        return rest | dict(zip(("mean", "logvar", "context"), made, strict=True))

    def _errors(self, batch: Tensors) -> Tensor:
        """Mean squared error of each sample of a prepared batch, (B,)."""
        unet = cast(UNetModel, self.network["unet"])
        posterior, context = DiagonalGaussian(batch["mean"], batch["logvar"]), batch["context"]
        x0 = self.vae.config.scale_factor * posterior.sample(batch["posterior_noise"]).float()
        context = torch.where(batch["drop_caption"][:, None, None], self.no_caption.to(context.dtype), context)
        x = self.schedule.q_sample(x0, batch["timesteps"], batch["noise"])
        dtype = unet.first_conv.weight.dtype
        eps = unet(x.to(dtype), batch["timesteps"], context.to(dtype))
        return noise_loss(eps, batch["noise"])

    def _encode(self, images: Tensor, ids: Tensor) -> list[Tensor]:
        """Mean and logarithm of the variance of the latents' posterior, unscaled; captions' states (B, M, D)."""
        device = self.no_caption.device
        posterior = self.vae.posterior(to_pixels(images.to(device, non_blocking=True)))
        return [posterior.mean, posterior.logvar, self.text_encoder(ids.to(device, non_blocking=True))]

    def _draw(self, numbers: list[int]) -> tuple[Tensor, Tensor]:
        made = self.make.images_and_ids(Series.MINIATURE_TRAINING + self.config.seed, numbers)
        return made["images"], made["ids"]


def model_config(unet: UNetStage, clip: CLIPStage, vae: VAEStage, scale_factor: float) -> ModelConfig:
    """The whole model, as it is written beside the exported file. scale_factor: as measured when `vae` ended."""
    return ModelConfig(
        unet=unet.unet(context_dim=clip.text_width),
        vae=dataclasses.replace(vae.vae, scale_factor=scale_factor),
        text_encoder=clip.text_encoder,
        image_encoder=clip.image_encoder,
        schedule=ScheduleConfig(),
        image_size=IMAGE_SIZE,
    )


@torch.no_grad()
def init_for_training(unet: UNetModel) -> None:
    """LDM's start: every residual branch, and the output, begins at zero.

    So the untrained UNet is a chain of identities and predicts ε = 0. Published weights overwrite this, which is why
    the modules do not do it.
    """
    zeroed: list[nn.Module] = [unet.out[-1]]
    zeroed += [module.out_layers[-1] for module in unet.modules() if isinstance(module, ResBlock)]
    zeroed += [transformer.proj_out for transformer in unet.transformers]
    for module in zeroed:
        for parameter in module.parameters():
            parameter.zero_()
