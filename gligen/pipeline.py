"""From requests to pictures: captions and grounding → tokens, once → sampler → autoencoder → images.

    pipe = gligen.load("sd-v1-4.ckpt", adapter="gligen-box-text.safetensors")
    images = pipe(prompt="a cat on a sofa", entities=[{"phrase": "a cat", "box": [0.2, 0.3, 0.6, 0.9]}])

`pipe.unet`, `pipe.vae` and `pipe.text_encoder` are plain modules to study.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from gligen.config import ModelConfig
from gligen.device import memory_errors
from gligen.diffusion.guidance import gate_schedule, guide
from gligen.diffusion.noise import NoiseStream, start_latents
from gligen.diffusion.samplers import EpsModel, build_sampler
from gligen.diffusion.schedule import Schedule
from gligen.grounding import box_inputs, keypoint_inputs, map_inputs
from gligen.images import fit, load_map, load_rgb, to_pil, to_tensor
from gligen.inpainting import inpaint_channels, keep_known, keep_mask, put_back
from gligen.low_memory import Offload
from gligen.modules.autoencoder import AutoencoderKL
from gligen.modules.bert import BERTTextEncoder
from gligen.modules.clip import CLIPImageEncoder, CLIPTextEncoder
from gligen.modules.fusers import GateScale
from gligen.modules.position_net import GroundingInputs
from gligen.modules.unet import Conditioning, UNetModel
from gligen.request import Request, check_files, check_for_model, parse_request
from gligen.tiles import decode_tiled

log = logging.getLogger("gligen")

OFF = (0.0, 0.0, 1.0)  # the schedule of a request that grounds nothing, or asks for grounding to be off
OnStep = Callable[[int, Tensor], object]
Denoise = Callable[[Tensor, Tensor, Conditioning, GateScale], Tensor]  # as UNetModel.denoise
LOW_MEMORY_TILE = 96  # latent cells a side that are decoded at once: 768 pixels


@dataclass(frozen=True)
class Sample:
    """One picture, and the request that paints it alone.

    index: (request, image) as asked. request: with one image and that image's own seed, so that it can be run again.
    latents: (C, h, w) float32 on the CPU, scaled, as they went into the autoencoder.
    """

    index: tuple[int, int]
    request: Request
    image: Image.Image
    latents: Tensor


@dataclass(frozen=True)
class _Job:
    """One picture to paint. `start`: latents to start from instead of the seed's own."""

    index: tuple[int, int]
    request: Request
    start: Tensor | None

    @property
    def seed(self) -> int:
        return self.request.seed

    def batch_key(self) -> tuple[Any, ...]:
        """Pictures can be painted together where all of this agrees."""
        r = self.request
        return (r.size, r.sampler, r.steps, r.schedule, r.guidance, r.eta)


class Pipeline:
    """A model ready to paint. Built by `gligen.load`; the networks are in eval mode and need no gradients."""

    def __init__(
        self,
        config: ModelConfig,
        unet: UNetModel,
        vae: AutoencoderKL,
        text_encoder: CLIPTextEncoder | BERTTextEncoder,
        image_encoder: CLIPImageEncoder | None = None,
    ) -> None:
        self.config = config
        self.unet = unet
        self.vae = vae
        self.text_encoder = text_encoder
        self.image_encoder = image_encoder
        self.schedule = Schedule(**dataclasses.asdict(config.schedule))
        self.recorded: Denoise | None = None  # `unet.denoise` as CUDA graphs, of gligen.runtime.optimize
        self.offload: Offload | None = None  # networks that share the device, of gligen.low_memory.offload

    @property
    def mode(self) -> str | None:
        """The grounding mode, or None for a plain base model."""
        return self.config.unet.grounding.mode if self.config.unet.grounding else None

    @property
    def device(self) -> torch.device:
        """Where is computed."""
        return self.offload.device if self.offload else self.unet.first_conv.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.first_conv.weight.dtype

    def __call__(self, **fields: Any) -> list[Image.Image]:
        """The images of one request, given by the fields of a request file (gligen/request.py).

        Raises ValueError or FileNotFoundError, one line, for what is wrong with it.
        """
        return [sample.image for sample in self.generate([parse_request(fields)])]

    def check(self, request: Request, where: str = "") -> Request:
        """The request completed for this model (size, schedule). Raises ValueError if it cannot be served."""
        return check_request(
            request,
            self.config,
            has_image_encoder=self.image_encoder is not None,
            has_base_conv=self.unet.base_conv_weight is not None,
            where=where,
        )

    def generate(
        self,
        requests: Sequence[Request],
        *,
        batch_size: int = 4,
        init_latents: Tensor | None = None,
        on_step: OnStep | None = None,
        only: Callable[[int], bool] | None = None,
    ) -> Iterator[Sample]:
        """Paints every image of every request, yielding each as it is done.

        Images whose size, sampler, steps, schedule and guidance agree are painted together, up to batch_size; an image
        does not depend on what it shares a batch with. Image k of a request has seed + k.
        What does not depend on the step (tokens, keys and values, map features) is made once per batch.
        init_latents: (total images, C, h, w), what each image starts from instead of its seed's own noise.
        on_step: `on_step(images in the batch, latents)` after every step, for progress and previews.
        only: which of the images, counted over all requests, this process paints (all by default).
        Raises ValueError or FileNotFoundError before painting, MemoryError where it does not fit.
        """
        checked = [
            self.check(request, f"request {i}: " if len(requests) > 1 else "") for i, request in enumerate(requests)
        ]
        for i, request in enumerate(checked):
            check_files(request, where=f"request {i}: " if len(requests) > 1 else "")
        jobs = [job for n, job in enumerate(_jobs(checked, init_latents, self.config)) if only is None or only(n)]
        alike: dict[tuple[Any, ...], list[_Job]] = {}  # in order of first appearance
        for job in jobs:
            alike.setdefault(job.batch_key(), []).append(job)
        for same in alike.values():
            for i in range(0, len(same), batch_size):
                batch = same[i : i + batch_size]
                width, height = batch[0].request.size or (0, 0)
                advice = (
                    f"{len(batch)} images of {width} x {height} at once: lower --batch-size or --size, or use --dtype"
                )
                with memory_errors(advice):
                    yield from self._paint(batch, on_step)

    @torch.inference_mode()
    def encode_text(self, texts: Iterable[str]) -> dict[str, Tensor]:
        """Caption tokens (M, W) of each different text. What does not fit into 77 tokens is cut off, and logged."""
        return self._encode_texts(texts, self.text_encoder, "prompt")

    @torch.inference_mode()
    def encode_phrases(self, phrases: Iterable[str]) -> dict[str, Tensor]:
        """Phrase features (W,) of each different phrase."""
        return self._encode_texts(phrases, self.text_encoder.phrase_features, "phrase")

    @torch.inference_mode()
    def encode_images(self, paths: Iterable[str]) -> dict[str, Tensor]:
        """Picture features (W,) of each reference picture's centre. Raises ValueError without an image encoder."""
        features = {}
        for path in paths:
            if self.image_encoder is None:
                raise ValueError("reference images need CLIP's image encoder: give a CLIP ViT-L/14 file with --clip")
            self._bring(self.image_encoder)
            size = self.image_encoder.config.image_size
            pixels = to_tensor(fit(load_rgb(path), size, size))[None].to(self.device, self.dtype)
            features[path] = self.image_encoder.image_features(self.image_encoder.preprocess(pixels))[0]
        return features

    @torch.inference_mode()
    def kept_picture(self, request: Request) -> tuple[Image.Image, Tensor]:
        """What an inpainting request keeps, as the autoencoder gives it back, and where: (H, W) bool, true = kept.

        request: as `check` completes it. Raises ValueError if it has no inpaint picture.
        """
        width, height = request.size or (0, 0)
        factor = self.vae.config.downsample_factor
        shape = (self.vae.config.latent_channels, height // factor, width // factor)
        if request.inpaint is None:
            raise ValueError("the request has no inpaint picture, so nothing is kept: give one")
        x0, keep = self._known([request], [request.seed], shape, [self._picture(request)])
        pixels = keep[0, 0].repeat_interleave(factor, 0).repeat_interleave(factor, 1)  # (h, w) -> (H, W)
        return to_pil(self._decode(x0)[0]), pixels.bool().cpu()

    def _bring(self, network: nn.Module) -> None:
        """Sees to it that the network is on the device, where networks take turns there."""
        if self.offload:
            self.offload.bring(network)

    def _decode(self, latents: Tensor) -> Tensor:
        """Pictures of latents (B, C, h, w), one at a time; with low memory large ones in tiles."""
        self._bring(self.vae)
        tile = LOW_MEMORY_TILE if self.offload else max(latents.shape[2:])
        return decode_tiled(self.vae, latents.to(self.dtype), tile=tile)

    def _encode_texts(self, texts: Iterable[str], encode: Callable[[Tensor], Tensor], what: str) -> dict[str, Tensor]:
        unique = list(dict.fromkeys(texts))
        if not unique:
            return {}
        ids, cuts = self.text_encoder.tokenize(unique)
        for text, cut in zip(unique, cuts, strict=True):
            if cut:
                log.warning("the %s '%.40s…' is too long: cut off '%s'", what, text, cut)
        self._bring(self.text_encoder)
        return dict(zip(unique, encode(ids.to(self.device)), strict=True))

    @torch.inference_mode()
    def _paint(self, jobs: list[_Job], on_step: OnStep | None) -> list[Sample]:
        """One batch, from requests to pictures."""
        first = jobs[0].request
        requests, seeds = [job.request for job in jobs], [job.seed for job in jobs]
        width, height = first.size or (0, 0)
        factor = self.vae.config.downsample_factor
        latent_shape = (self.vae.config.latent_channels, height // factor, width // factor)
        x = start_latents(seeds, latent_shape)
        for i, job in enumerate(jobs):
            if job.start is not None:
                x[i] = job.start
        x = x.to(self.device)

        pictures = [self._picture(r) for r in requests if r.inpaint is not None]  # of all or of none
        known = self._known(requests, seeds, latent_shape, pictures) if pictures else None
        model = self._model(requests, known)
        noise_known = NoiseStream(seeds, "inpainting")

        def put_known_back(x: Tensor, t: int) -> Tensor:
            if known is None:
                return x
            x0, keep = known
            return keep_known(x, self.schedule.q_sample(x0, t, noise_known(x0)), keep)

        x = build_sampler(first.sampler, first.eta)(
            model,
            x,
            self.schedule,
            first.steps,
            noise=NoiseStream(seeds, "sampler"),
            before_step=put_known_back,
            on_step=lambda step, x: on_step(len(jobs), x) if on_step else None,
        )
        if known is not None:  # so that what was to be kept comes back as it was, not as the last step left it
            x = keep_known(x, *known)
        images = [to_pil(self._decode(latents[None])[0]) for latents in x]
        if known is not None:  # the decoder looks over the edge of what is repainted, and is not exact beyond it
            images = [put_back(*each) for each in zip(images, pictures, known[1], strict=True)]
        return [
            Sample(job.index, job.request, image, latents.cpu())
            for job, image, latents in zip(jobs, images, x, strict=True)
        ]

    def _model(self, requests: list[Request], known: tuple[Tensor, Tensor] | None) -> EpsModel:
        """ε(x, t, step) of a batch, guided and gated; everything that does not depend on the step is made here."""
        first = requests[0]
        width, height = first.size or (0, 0)
        factor = self.vae.config.downsample_factor
        gates = gate_schedule(first.schedule or OFF, first.steps)
        is_guided = first.guidance != 1

        prompts = [r.prompt for r in requests]
        negatives = [r.negative_prompt for r in requests] if is_guided else []
        encoded = self.encode_text(negatives + prompts)
        context = torch.stack([encoded[text] for text in negatives + prompts])

        grounding, extra = None, None
        if any(gates):
            grounding = {k: v.to(self.device) for k, v in self._grounding(requests, width, height).items()}
        self._bring(self.unet)
        if grounding is not None and "map" in grounding:
            extra = self.unet.map_channels(grounding["map"].to(self.dtype), height // factor, width // factor)
        if known is not None:
            extra = inpaint_channels(*known).to(self.dtype)
        if is_guided:  # the null branch: negative prompt and null grounding, but the same map and picture
            if grounding is not None:
                null = {name: torch.zeros_like(value) for name, value in grounding.items()}
                grounding = {name: torch.cat([null[name], value]) for name, value in grounding.items()}
            extra = None if extra is None else torch.cat([extra, extra])
        cond = self.unet.condition(context, grounding, extra)
        # tensors, so that compiled code is the same for every β; 0 stays a number, which leaves the fusers out
        denoise = self.recorded or self.unet.denoise
        betas = torch.tensor(gates, device=self.device)
        scales = [betas[i] if gate else 0.0 for i, gate in enumerate(gates)]

        def model(x: Tensor, t: int, step: int) -> Tensor:
            batch = torch.cat([x, x]) if is_guided else x
            timesteps = torch.full((len(batch),), t, device=x.device)
            eps = denoise(batch.to(self.dtype), timesteps, cond, scales[step]).to(x.dtype)
            return guide(eps, first.guidance) if is_guided else eps

        return model

    def _grounding(self, requests: list[Request], width: int, height: int) -> GroundingInputs:
        config = self.config.unet.grounding
        assert config is not None  # check_for_model gives a plain base model gates of 0
        if config.spec.kind == "keypoint":
            return keypoint_inputs(requests, config)
        if config.spec.is_map:
            paths = [getattr(request, config.mode) for request in requests]
            maps = [load_map(path, config.mode, width, height) if path else None for path in paths]
            return map_inputs(maps, config, width, height)
        return box_inputs(requests, config, self.encode_phrases, self.encode_images)

    @staticmethod
    def _picture(request: Request) -> Image.Image:
        """The picture to repaint, fitted to the request's size."""
        assert request.inpaint is not None
        return fit(load_rgb(request.inpaint.image), *(request.size or (0, 0)))

    def _known(
        self, requests: list[Request], seeds: list[int], shape: tuple[int, int, int], pictures: list[Image.Image]
    ) -> tuple[Tensor, Tensor]:
        """Latents (B, C, h, w) of the pictures to repaint and what to keep of them (B, 1, h, w), float32."""
        keeps = []
        for request in requests:
            keeps.append(keep_mask(request, shape[1:], self.vae.config.downsample_factor))
            if keeps[-1].all():
                log.warning("'%s' is kept whole: what is to be repainted is smaller than a latent cell", request.prompt)
        noise = NoiseStream(seeds, "autoencoder")(torch.empty(len(seeds), *shape))
        pixels = torch.stack([to_tensor(picture) for picture in pictures]).to(self.device, self.dtype)
        self._bring(self.vae)
        x0 = torch.cat(
            [self.vae.encode(p[None], n[None].to(p)) for p, n in zip(pixels, noise, strict=True)]  # one at a time
        )
        return x0.float(), torch.stack(keeps).to(self.device)


def check_request(
    request: Request, config: ModelConfig, *, has_image_encoder: bool, has_base_conv: bool, where: str = ""
) -> Request:
    """The request completed for a model of this config. Raises ValueError, one line, if it cannot serve it.

    has_image_encoder: CLIP's, for reference images. has_base_conv: the base's own first convolution, for the ungated
    steps of map modes.
    """
    grounding = config.unet.grounding
    request = check_for_model(
        request,
        mode=grounding.mode if grounding else None,
        size_multiple=config.size_multiple,
        max_entities=grounding.max_entities if grounding else 0,
        max_persons=grounding.max_persons if grounding else 0,
        default_size=config.image_size,
        where=where,
    )
    if any(entity.image for entity in request.entities) and not has_image_encoder:
        raise ValueError(f"{where}reference images need CLIP's image encoder: give a CLIP ViT-L/14 file with --clip")
    gates = gate_schedule(request.schedule or OFF, request.steps)
    if grounding and grounding.spec.is_map and not all(gates) and not has_base_conv:
        raise ValueError(
            f"{where}steps without grounding run on the base model's own first convolution, which a map checkpoint "
            "lacks: give Stable Diffusion with --checkpoint and this file with --adapter, or keep grounding on with "
            "--schedule 1 0 0"
        )
    if grounding and grounding.fuser_type == "gatedSA2" and any(gates):
        width, height = request.size or (0, 0)
        if not grounding.spec.is_map or width != height:
            raise ValueError(f"{where}gatedSA2 lays tokens out on a square: it needs a map and a square size")
    if (request.grounding or request.inpaint) and not any(gates) and request.schedule != OFF:
        log.warning(
            "%sgrounding is never on: %d steps leave none of the schedule's first stages; give --schedule 1 0 0, a "
            "larger --tau or more --steps",
            where,
            request.steps,
        )
    return request


def count_images(requests: Sequence[Request]) -> int:
    return sum(request.num_images for request in requests)


def _jobs(requests: Sequence[Request], init_latents: Tensor | None, config: ModelConfig) -> Iterator[_Job]:
    total = count_images(requests)
    if init_latents is not None and len(init_latents) != total:
        raise ValueError(f"the initial latents are for {len(init_latents)} images, but {total} are asked for")
    sizes = {request.size or (0, 0) for request in requests}
    shapes = {(config.vae.latent_channels, h // f, w // f) for w, h in sizes for f in [config.vae.downsample_factor]}
    if init_latents is not None and shapes != {tuple(init_latents.shape[1:])}:
        raise ValueError(f"the initial latents have shape {tuple(init_latents.shape[1:])}, the images {sorted(shapes)}")
    n = 0
    for i, request in enumerate(requests):
        for k in range(request.num_images):
            alone = dataclasses.replace(request, num_images=1, seed=request.seed + k)
            yield _Job((i, k), alone, None if init_latents is None else init_latents[n])
            n += 1
