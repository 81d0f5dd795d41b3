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
from gligen.diffusion.guidance import guide
from gligen.diffusion.noise import NoiseStream, start_latents
from gligen.diffusion.samplers import EpsModel, build_sampler
from gligen.diffusion.schedule import Schedule
from gligen.grounding import box_inputs, image_key, keypoint_inputs, map_inputs
from gligen.image_files import ImageFiles, ImageSource
from gligen.images import fit, load_map, load_rgb, to_pil, to_tensor
from gligen.inpainting import boxes_mask, inpaint_channels, keep_known, load_mask, mask_to_latent, put_back
from gligen.job import Job, ModelFacts, complete, complete_all
from gligen.low_memory import Offload
from gligen.modules.autoencoder import AutoencoderKL
from gligen.modules.bert import BERTTextEncoder
from gligen.modules.clip import CLIPImageEncoder, CLIPTextEncoder
from gligen.modules.fusers import GateScale
from gligen.modules.position_net import GroundingInputs
from gligen.modules.unet import Conditioning, UNetModel
from gligen.request import Request, parse_request
from gligen.tiles import decode_tiled

log = logging.getLogger("gligen")

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
class _Share:
    """One image of a job. `start`: latents to start from instead of the seed's own."""

    index: tuple[int, int]
    job: Job
    start: Tensor | None

    @property
    def seed(self) -> int:
        return self.job.seeds[self.index[1]]

    def batch_key(self) -> tuple[Any, ...]:
        """Images can be painted together where all of this agrees."""
        r = self.job.request
        return (self.job.size, r.sampler, r.steps, self.job.gates, r.guidance, r.eta)


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
        """The images of one request, given by its fields (gligen.request.Request); `tau` as in a request file.

        Raises ValueError or FileNotFoundError, one line, for what is wrong with it.
        """
        return [sample.image for sample in self.generate([parse_request(fields)])]

    @property
    def facts(self) -> ModelFacts:
        """What decides which requests can be served."""
        return ModelFacts(
            config=self.config,
            has_image_encoder=self.image_encoder is not None,
            has_base_conv=self.unet.base_conv_weight is not None,
        )

    def complete(self, request: Request, *, images: ImageFiles | None = None, where: str = "") -> Job:
        """The request completed for this model (gligen.job.complete). Raises ValueError if it cannot be served."""
        return complete(request, self.facts, images=images, where=where)

    def generate(
        self,
        requests: Sequence[Request | Job],
        *,
        batch_size: int = 4,
        init_latents: Tensor | None = None,
        on_step: OnStep | None = None,
        only: Callable[[int], bool] | None = None,
    ) -> Iterator[Sample]:
        """Paints every image of every request, yielding each as it is done.

        requests: a Job was completed for this model before and is trusted; a Request is completed now.
        Images whose size, sampler, steps, schedule and guidance agree are painted together, up to batch_size; an image
        does not depend on what it shares a batch with. Image k of a request has seed + k.
        What does not depend on the step (tokens, keys and values, map features) is made once per batch.
        init_latents: (total images, C, h, w), what each image starts from instead of its seed's own noise.
        on_step: `on_step(images in the batch, latents)` after every step, for progress and previews.
        only: which of the images, counted over all requests, this process paints (all by default).
        Raises ValueError or FileNotFoundError before painting, MemoryError where it does not fit.
        """
        jobs = complete_all(requests, self.facts)
        alike: dict[tuple[Any, ...], list[_Share]] = {}  # in order of first appearance
        for n, share in enumerate(_shares(jobs, init_latents)):
            if only is None or only(n):
                alike.setdefault(share.batch_key(), []).append(share)
        for same in alike.values():
            for i in range(0, len(same), batch_size):
                batch = same[i : i + batch_size]
                width, height = batch[0].job.size
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
    def encode_images(self, sources: Iterable[ImageSource]) -> dict[str | int, Tensor]:
        """Image features (W,) of each reference image's centre, by gligen.grounding.image_key.

        Raises ValueError without an image encoder.
        """
        features = {}
        for source in sources:
            if self.image_encoder is None:
                raise ValueError("reference images need CLIP's image encoder: give a CLIP ViT-L/14 file with --clip")
            self._bring(self.image_encoder)
            size = self.image_encoder.config.image_size
            pixels = to_tensor(fit(load_rgb(source), size, size))[None].to(self.device, self.dtype)
            features[image_key(source)] = self.image_encoder.image_features(self.image_encoder.preprocess(pixels))[0]
        return features

    @torch.inference_mode()
    def kept_picture(self, request: Request) -> tuple[Image.Image, Tensor]:
        """What an inpainting request keeps, as the autoencoder gives it back, and where: (H, W) bool, true = kept.

        Raises ValueError if the request has no inpaint picture, or cannot be served.
        """
        if request.inpaint is None:
            raise ValueError("the request has no inpaint picture, so nothing is kept: give one")
        job = self.complete(request)
        factor = self.vae.config.downsample_factor
        x0, keep = self._known([job.opened()], [job.seeds[0]], job.latent_shape, [_picture(job.opened(), job.size)])
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
    def _paint(self, shares: list[_Share], on_step: OnStep | None) -> list[Sample]:
        """One batch, from requests to pictures."""
        job = shares[0].job  # all agree in what the batch's sampling needs
        opened = {id(share.job): share.job.opened() for share in shares}
        requests, seeds = [opened[id(share.job)] for share in shares], [share.seed for share in shares]
        x = start_latents(seeds, job.latent_shape)
        for i, share in enumerate(shares):
            if share.start is not None:
                x[i] = share.start
        x = x.to(self.device)

        pictures = [_picture(r, job.size) for r in requests if r.inpaint is not None]  # of all or of none
        known = self._known(requests, seeds, job.latent_shape, pictures) if pictures else None
        model = self._model(job, requests, known)
        noise_known = NoiseStream(seeds, "inpainting")

        def put_known_back(x: Tensor, t: int) -> Tensor:
            if known is None:
                return x
            x0, keep = known
            return keep_known(x, self.schedule.q_sample(x0, t, noise_known(x0)), keep)

        x = build_sampler(job.request.sampler, job.request.eta)(
            model,
            x,
            self.schedule,
            job.request.steps,
            noise=NoiseStream(seeds, "sampler"),
            before_step=put_known_back,
            on_step=lambda step, x: on_step(len(shares), x) if on_step else None,
        )
        if known is not None:  # so that what was to be kept comes back as it was, not as the last step left it
            x = keep_known(x, *known)
        images = [to_pil(self._decode(latents[None])[0]) for latents in x]
        if known is not None:  # the decoder looks over the edge of what is repainted, and is not exact beyond it
            images = [put_back(*each) for each in zip(images, pictures, known[1], strict=True)]
        return [
            Sample(share.index, share.job.alone(share.index[1]), image, latents.cpu())
            for share, image, latents in zip(shares, images, x, strict=True)
        ]

    def _model(self, job: Job, requests: list[Request], known: tuple[Tensor, Tensor] | None) -> EpsModel:
        """ε(x, t, step) of a batch, guided and gated; everything that does not depend on the step is made here."""
        gates, guidance = job.gates, job.request.guidance
        is_guided = guidance != 1

        prompts = [r.prompt for r in requests]
        negatives = [r.negative_prompt for r in requests] if is_guided else []
        encoded = self.encode_text(negatives + prompts)
        context = torch.stack([encoded[text] for text in negatives + prompts])

        grounding, extra = None, None
        if any(gates):
            grounding = {k: v.to(self.device) for k, v in self._grounding(requests, *job.size).items()}
        self._bring(self.unet)
        if grounding is not None and "map" in grounding:
            extra = self.unet.map_channels(grounding["map"].to(self.dtype), *job.latent_shape[1:])
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
            return guide(eps, guidance) if is_guided else eps

        return model

    def _grounding(self, requests: list[Request], width: int, height: int) -> GroundingInputs:
        config = self.config.unet.grounding
        assert config is not None  # the gates of a plain base model's jobs are 0
        if config.spec.kind == "keypoint":
            return keypoint_inputs(requests, config)
        if config.spec.is_map:
            sources = [getattr(request, config.mode) for request in requests]
            maps = [None if source is None else load_map(source, config.mode, width, height) for source in sources]
            return map_inputs(maps, config, width, height)
        return box_inputs(requests, config, self.encode_phrases, self.encode_images)

    def _known(
        self,
        requests: Sequence[Request],
        seeds: list[int],
        shape: tuple[int, int, int],
        pictures: Sequence[Image.Image],
    ) -> tuple[Tensor, Tensor]:
        """Latents (B, C, h, w) of the pictures to repaint and what to keep of them (B, 1, h, w), float32."""
        keeps = []
        for request in requests:
            assert request.inpaint is not None  # an inpainting model takes nothing else
            if request.inpaint.mask is not None:
                mask = load_mask(request.inpaint.mask, *pictures[0].size)
                keeps.append(mask_to_latent(mask, self.vae.config.downsample_factor))
            else:
                boxes = torch.tensor([[entity.box for entity in request.entities]])
                keeps.append(boxes_mask(boxes, *shape[1:])[0])
            if keeps[-1].all():
                log.warning("'%s' is kept whole: what is to be repainted is smaller than a latent cell", request.prompt)
        noise = NoiseStream(seeds, "autoencoder")(torch.empty(len(seeds), *shape))
        pixels = torch.stack([to_tensor(picture) for picture in pictures]).to(self.device, self.dtype)
        self._bring(self.vae)
        x0 = torch.cat(
            [self.vae.encode(p[None], n[None].to(p)) for p, n in zip(pixels, noise, strict=True)]  # one at a time
        )
        return x0.float(), torch.stack(keeps).to(self.device)


def _picture(request: Request, size: tuple[int, int]) -> Image.Image:
    """The picture to repaint, fitted to the size."""
    assert request.inpaint is not None
    return fit(load_rgb(request.inpaint.image), *size)


def _shares(jobs: Sequence[Job], init_latents: Tensor | None) -> Iterator[_Share]:
    if init_latents is not None:
        total, shapes = sum(len(job.seeds) for job in jobs), {job.latent_shape for job in jobs}
        if len(init_latents) != total:
            raise ValueError(f"the initial latents are for {len(init_latents)} images, but {total} are asked for")
        if shapes != {tuple(init_latents.shape[1:])}:
            raise ValueError(
                f"the initial latents have shape {tuple(init_latents.shape[1:])}, the images {sorted(shapes)}"
            )
    n = 0
    for i, job in enumerate(jobs):
        for k in range(len(job.seeds)):
            yield _Share((i, k), job, None if init_latents is None else init_latents[n])
            n += 1
