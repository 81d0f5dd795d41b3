"""From requests to images: captions and grounding → tokens, once → sampler → autoencoder → images.

    pipe = gligen.load("sd-v1-4.ckpt", adapter="gligen-box-text.safetensors")
    images = pipe(prompt="a cat on a sofa", entities=[{"phrase": "a cat", "box": [0.2, 0.3, 0.6, 0.9]}])

`pipe.unet`, `pipe.vae` and `pipe.text_encoder` are plain modules to study.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args, overload

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from gligen.config import ModelConfig
from gligen.device import check_memory, memory_errors, own_defaults
from gligen.diffusion.guidance import guide
from gligen.diffusion.noise import NoiseStream, start_latents
from gligen.diffusion.samplers import EpsModel, build_sampler, start_timestep
from gligen.diffusion.schedule import Schedule
from gligen.fields import read_whole, show
from gligen.grounding import Readers, image_key, kind_of
from gligen.grounding.inpainting import inpaint_channels, keep_known, keep_mask, put_back
from gligen.image_files import ImageFiles, ImageSource
from gligen.images import NotFiniteError, fit, load_rgb, to_pil, to_tensor
from gligen.job import Job, ModelFacts, complete, complete_all
from gligen.low_memory import Offload
from gligen.modules.autoencoder import AutoencoderKL
from gligen.modules.bert import BERTTextEncoder
from gligen.modules.clip import CLIPImageEncoder, CLIPTextEncoder, weigh, windows
from gligen.modules.fusers import GateScale
from gligen.modules.position_net import GroundingInputs, null_where
from gligen.modules.unet import Conditioning, UNetModel
from gligen.prompts import Reading, parse_prompt
from gligen.request import Request, parse_request
from gligen.tiles import decode_tiled

log = logging.getLogger("gligen")

OutputType = Literal["pil", "np", "pt", "latent"]
Embeds = tuple[Tensor | None, Tensor | None]  # tokens (M, W) in place of a prompt's and of its negative's
Denoise = Callable[[Tensor, Tensor, Conditioning, GateScale], Tensor]  # as UNetModel.denoise
USUAL_GUIDANCE = 30.0  # what web UIs offer at most
LOW_MEMORY_TILE = 96  # latent cells a side that are decoded at once: 768 pixels


@dataclass(frozen=True)
class Sample:
    """One image, and the request that generates it alone.

    index: (request, image) as asked. request: with one image and that image's own seed, so that it can be run again.
    image: as `generate`'s output_type says: a PIL image; 'np' (H, W, 3) uint8; 'pt' (3, H, W) float32 in [-1, 1] on the
        CPU; 'latent' None.
    latents: (C, h, w) float32 on the CPU, scaled, as they went into the autoencoder.
    """

    index: tuple[int, int]
    request: Request
    image: Any
    latents: Tensor


@dataclass(eq=False)
class Progress:
    """The state of a batch after a step, as a callback sees it.

    indices: (request, image) of each image. step: how many of `steps` are done. latents: x_t (B, C, h, w), not to be
    changed. `stop()` ends the run after this step: what was finished before has been handed out, this batch is not.
    """

    indices: tuple[tuple[int, int], ...]
    step: int
    steps: int
    latents: Tensor
    preview: Callable[[], list[Image.Image]]  # the images of x₀ as last predicted, decoded when asked for
    is_stopped: bool = False

    def stop(self) -> None:
        """Ends the run after this step."""
        self.is_stopped = True


OnStep = Callable[[Progress], object]


class _StoppedError(Exception):
    """A callback asked for the end."""


@dataclass(frozen=True)
class _Share:
    """One image of a job. `start`: latents to start from instead of the seed's own."""

    index: tuple[int, int]
    job: Job
    start: Tensor | None
    embeds: Embeds

    @property
    def seed(self) -> int:
        return self.job.seeds[self.index[1]]

    def batch_key(self) -> tuple[Any, ...]:
        """Images can be sampled together where all of this agrees."""
        r = self.job.request
        begins = (r.init_image is not None, self.job.skip)
        tokens = tuple(0 if each is None else len(each) for each in self.embeds)
        return (self.job.size, r.sampler, r.steps, begins, self.job.gates, r.guidance, r.eta, r.reading, tokens)


class _Overflow:
    """Sees to it that numbers stay finite: beyond what a precision holds all that follows is lost."""

    def __init__(self, jobs: list[Job], dtype: torch.dtype) -> None:
        self.jobs, self.dtype = jobs, dtype  # of each sample of the batch
        self.steps: list[Tensor] = []  # (B,) bool of each step: whose latents are finite

    def watch(self, x: Tensor) -> None:
        """Takes note of the latents after a step, and looks at once where that keeps no device waiting."""
        self.steps.append(x.isfinite().flatten(1).all(1))
        if x.device.type == "cpu" and not self.steps[-1].all():
            self.check()

    def check(self) -> None:
        """Raises ValueError, one line with what to change, for the first step whose latents are not finite."""
        for step, are_finite in enumerate(torch.stack(self.steps).tolist(), 1):
            if not all(are_finite):
                job = self.jobs[are_finite.index(False)]
                raise ValueError(self.line(job, f"the latents are not finite after step {step} of {len(job.gates)}"))

    def check_images(self, decoded: list[Tensor]) -> None:
        """The same for decoded images (3, H, W), after `check`."""
        for job, image in zip(self.jobs, decoded, strict=True):
            if not image.isfinite().all():
                raise ValueError(self.line(job, "the decoded image is not finite"))

    def line(self, job: Job, what: str) -> str:
        """One line on what is not finite, with what to change."""
        guidance = job.request.guidance
        advice = [f"lower guidance, which is {guidance:g}"] if abs(guidance) > USUAL_GUIDANCE else []
        if self.dtype == torch.float16:
            advice.append("use dtype bfloat16 or float32 in place of float16")
        advice.append(
            "lower the weight of a LoRA, if any, or look for numbers in the model's files that are not finite"
        )
        return f"'{job.request.prompt:.40}': {what}: {'; else '.join(advice)}"


class Pipeline:
    """A model ready to generate. Built by `gligen.load`; the networks are in eval mode and need no gradients."""

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
        return self.facts.mode

    @property
    def device(self) -> torch.device:
        """The device that everything is computed on."""
        return self.offload.device if self.offload else self.unet.first_conv.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.first_conv.weight.dtype

    @overload
    def __call__(self, *prompt: str, output_type: Literal["pil"] = "pil", **given: Any) -> list[Image.Image]: ...
    @overload
    def __call__(self, *prompt: str, output_type: Literal["np"], **given: Any) -> NDArray[np.uint8]: ...
    @overload
    def __call__(self, *prompt: str, output_type: Literal["pt", "latent"], **given: Any) -> Tensor: ...
    def __call__(
        self,
        *prompt: str,
        output_type: OutputType = "pil",
        batch_size: int = 4,
        init_latents: Tensor | None = None,
        on_step: OnStep | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        **fields: Any,
    ) -> list[Image.Image] | NDArray[np.uint8] | Tensor:
        """The images of one request, given by its fields (gligen.request.Request); `tau` as in a request file. The
        prompt may also stand first.

        output_type: 'pil' images, 'np' (N, H, W, 3) uint8, 'pt' (N, 3, H, W) float32 in [-1, 1], or 'latent'
            (N, C, h, w) float32, scaled.
        prompt_embeds, negative_prompt_embeds: caption tokens (M, W) in place of text. The others: as for `generate`.
        Raises ValueError or FileNotFoundError, one line, for what is wrong with it.
        """
        if len(prompt) > 1 or (prompt and "prompt" in fields):
            raise ValueError("give one prompt, first or by name, and all else by name")
        if prompt:
            fields["prompt"] = prompt[0]
        elif prompt_embeds is not None:
            fields.setdefault("prompt", "")
        samples = list(
            self.generate(
                [parse_request(fields)],
                output_type=output_type,
                batch_size=batch_size,
                init_latents=init_latents,
                on_step=on_step,
                prompt_embeds=[prompt_embeds],
                negative_prompt_embeds=[negative_prompt_embeds],
            )
        )
        if output_type == "pil" or not samples:  # a callback may have stopped it
            return [sample.image for sample in samples]
        if output_type == "latent":
            return torch.stack([sample.latents for sample in samples])
        stack: Any = np.stack if output_type == "np" else torch.stack
        return cast("NDArray[np.uint8] | Tensor", stack([sample.image for sample in samples]))

    @property
    def facts(self) -> ModelFacts:
        """The facts about the model that decide which requests it can serve."""
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
        output_type: OutputType = "pil",
        prompt_embeds: Sequence[Tensor | None] | None = None,
        negative_prompt_embeds: Sequence[Tensor | None] | None = None,
    ) -> Iterator[Sample]:
        """Generates every image of every request, yielding each as it is done.

        requests: a Job was completed for this model before and is trusted; a Request is completed now.
        Images whose size, sampler, steps, schedule, guidance and way of reading prompts agree are sampled together, up
        to batch_size; an image does not depend on what it shares a batch with. Image k of a request has seed + k.
        What does not depend on the step (tokens, keys and values, map features) is made once per batch.
        init_latents: (total images, C, h, w), what each image starts from instead of its seed's own noise.
        on_step: `on_step(progress)` after every step of a batch; it can look, preview and stop the run (Progress).
        only: which of the images, counted over all requests, this process generates (all by default).
        output_type: what Sample.image is. With 'latent' nothing is decoded.
        prompt_embeds, negative_prompt_embeds: for each request caption tokens (M, W), as wide as the UNet reads them,
            in place of its text, which is '' then; or None. The request alone does not generate such an image again.
        Raises ValueError or FileNotFoundError before sampling, MemoryError where it does not fit.
        """
        read_whole(batch_size, "batch_size", low=1)
        for name, function in (("on_step", on_step), ("only", only)):
            if function is not None and not callable(function):
                raise ValueError(f"{name} is {show(function)}: give a function")
        if output_type not in get_args(OutputType):
            raise ValueError(f"output_type is {output_type!r}: give one of {', '.join(get_args(OutputType))}")
        given = list(requests) if isinstance(requests, Iterable) else [None]
        if not all(isinstance(request, (Request, Job)) for request in given):
            raise ValueError(f"requests is {show(requests)}: give a list of gligen.Request")
        init_latents = None if init_latents is None else read_tensor(init_latents, "init_latents")
        jobs = complete_all(given, self.facts)
        embeds = self._embeds(jobs, prompt_embeds, negative_prompt_embeds)
        check_sizes(jobs, self.config, self.device, self.dtype, low_memory=self.offload is not None)
        alike: dict[tuple[Any, ...], list[_Share]] = {}  # in order of first appearance
        for n, share in enumerate(_shares(jobs, init_latents, embeds)):
            if only is None or only(n):
                key = (*share.batch_key(), self._windows(share.job.request))
                alike.setdefault(key, []).append(share)
        for same in alike.values():
            for i in range(0, len(same), batch_size):
                batch = same[i : i + batch_size]
                several = "{} images of {} x {} at once".format(len(batch), *batch[0].job.size)
                try:
                    with memory_errors(f"{several}: lower --batch-size or --size, or use --dtype"):
                        samples = self._generate_batch(batch, on_step, output_type)
                except _StoppedError:
                    return
                yield from map(_usable, samples)

    def _embeds(
        self,
        jobs: Sequence[Job],
        prompts: Sequence[Tensor | None] | None,
        negatives: Sequence[Tensor | None] | None,
    ) -> list[Embeds]:
        """The tokens given in place of each job's prompt and negative prompt. Raises ValueError unless they fit."""
        width, length = self.config.unet.context_dim, self.config.text_encoder.context_length
        given: dict[str, Sequence[Tensor | None]] = {}
        for name, embeds in (("prompt", prompts), ("negative_prompt", negatives)):
            if embeds is not None and not isinstance(embeds, Iterable):
                raise ValueError(f"{name}_embeds is {show(embeds)}: give a list with a tensor or None for each request")
            given[name] = [
                None if tokens is None else read_tensor(tokens, f"{name}_embeds[{i}]")
                for i, tokens in enumerate([None] * len(jobs) if embeds is None else embeds)
            ]
            if len(given[name]) != len(jobs):
                raise ValueError(
                    f"{name}_embeds has {len(given[name])} entries: give one for each of {len(jobs)} requests"
                )
            for i, (job, tokens) in enumerate(zip(jobs, given[name], strict=True)):
                if tokens is None:
                    continue
                if tokens.ndim != 2 or tokens.shape[1] != width:
                    raise ValueError(f"{name}_embeds[{i}] has shape {tuple(tokens.shape)}: give (tokens, {width})")
                if getattr(job.request, name):
                    raise ValueError(f"request {i}: {name} and {name}_embeds are both given: leave one out")
        pairs = list(zip(given["prompt"], given["negative_prompt"], strict=True))
        for i, (job, pair) in enumerate(zip(jobs, pairs, strict=True)):
            prompt, negative = (length if tokens is None else len(tokens) for tokens in pair)
            if prompt != negative and job.request.guidance != 1:
                raise ValueError(
                    f"request {i}: the prompt has {prompt} tokens, the negative prompt {negative}: give both as many"
                )
            for field in _without_effect(job.request, *pair):
                log.warning("request %d: %s has no effect beside the given embeddings and guidance", i, field)
        return pairs

    @own_defaults()
    @torch.no_grad()  # not inference mode, whose tensors others may not build on
    def encode_text(self, texts: Iterable[str]) -> dict[str, Tensor]:
        """Caption tokens (M, W) of each different text. What does not fit into 77 tokens is cut off, and logged."""
        return self._encode_texts(texts, self.text_encoder, "prompt")

    @own_defaults()
    @torch.no_grad()
    def encode_prompts(self, texts: Iterable[str], reading: Reading) -> dict[str, Tensor]:
        """Caption tokens (77·K, W) of each different text, read as asked; K windows, as many as the longest has.

        Shorter texts go on with windows of no text. Needs CLIP's text encoder; raises ValueError as `parse_prompt`.
        """
        unique = list(dict.fromkeys(texts))
        read = {text: self._read(text, reading) for text in unique}
        for text, (_, _, cut) in read.items():
            self._log_cut("prompt", text, cut)
        most = max(len(ids) for ids, _, _ in read.values())
        empty, _, _ = self._read("", Reading())
        encoded = {}
        self._bring(self.text_encoder)
        for text, (ids, weights, _) in read.items():
            ids = torch.cat([ids, *[empty] * (most - len(ids))])  # (K, 77)
            weights = F.pad(weights, (0, 0, 0, most - len(weights)), value=1.0)  # (K, 77)
            states = self.text_encoder(ids.to(self.device), reading.clip_skip)  # (K, 77, W)
            encoded[text] = weigh(states, weights).flatten(0, 1)  # (77·K, W)
        return encoded

    def _read(self, text: str, reading: Reading) -> tuple[Tensor, Tensor, str]:
        """Ids and weights (K, 77) of a prompt's windows, and what is cut off."""
        config = self.config.text_encoder
        return windows(parse_prompt(text, reading), config.context_length, config.vocab_size, long=reading.long)

    def _windows(self, request: Request) -> int:
        """The number of windows of 77 tokens that the request's prompts take."""
        if not request.long_prompts:
            return 1
        texts = [request.prompt] if request.guidance == 1 else [request.prompt, request.negative_prompt]
        return max(len(self._read(text, request.reading)[0]) for text in texts)

    @own_defaults()
    @torch.no_grad()
    def encode_phrases(self, phrases: Iterable[str]) -> dict[str, Tensor]:
        """Phrase features (W,) of each different phrase."""
        return self._encode_texts(phrases, self.text_encoder.phrase_features, "phrase")

    @own_defaults()
    @torch.no_grad()
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
            pixels = to_tensor(fit(load_rgb(source), size, size))[None].to(self.device, self.dtype)  # (1, 3, S, S)
            features[image_key(source)] = self.image_encoder.image_features(self.image_encoder.preprocess(pixels))[0]
        return features

    @own_defaults()
    @torch.inference_mode()
    def kept_image(self, request: Request) -> tuple[Image.Image, Tensor]:
        """An inpainting request's image as the autoencoder gives it back, and where it is kept, (H, W) bool.

        Raises ValueError if the request has no inpaint image, or cannot be served.
        """
        if request.inpaint is None:
            raise ValueError("the request has no inpaint image, so nothing is kept: give one")
        job = self.complete(request)
        factor = self.vae.config.downsample_factor
        opened = job.opened()
        x0, keep = self._known(job, [opened], [job.seeds[0]], [_inpaint_image(opened, job.size)])
        pixels = keep[0, 0].repeat_interleave(factor, 0).repeat_interleave(factor, 1)  # (h, w) -> (H, W)
        return to_pil(self._decode(x0)[0]), pixels.bool().cpu()

    def _bring(self, network: nn.Module) -> None:
        """Sees to it that the network is on the device, where networks are offloaded."""
        if self.offload:
            self.offload.bring(network)

    def _decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) of latents (B, C, h, w), one at a time; with low memory large ones in tiles."""
        self._bring(self.vae)
        tile = LOW_MEMORY_TILE if self.offload else max(latents.shape[2:])
        return decode_tiled(self.vae, latents.to(self.dtype), tile=tile)

    def _encode_texts(self, texts: Iterable[str], encode: Callable[[Tensor], Tensor], what: str) -> dict[str, Tensor]:
        unique = list(dict.fromkeys(texts))
        if not unique:
            return {}
        ids, cuts = self.text_encoder.tokenize(unique)
        for text, cut in zip(unique, cuts, strict=True):
            self._log_cut(what, text, cut)
        self._bring(self.text_encoder)
        return dict(zip(unique, encode(ids.to(self.device)), strict=True))

    @staticmethod
    def _log_cut(what: str, text: str, cut: str) -> None:
        if cut:
            mend = "; --long-prompts reads it whole" if what == "prompt" else ""
            log.warning("the %s '%.40s…' is too long: cut off '%s'%s", what, text, cut, mend)

    @own_defaults()
    @torch.inference_mode()
    def _generate_batch(self, shares: list[_Share], on_step: OnStep | None, output_type: OutputType) -> list[Sample]:
        """One batch, from requests to images."""
        job = shares[0].job  # all agree in what the batch's sampling needs
        opened = {id(share.job): share.job.opened() for share in shares}
        requests, seeds = [opened[id(share.job)] for share in shares], [share.seed for share in shares]
        x = self._start(job, shares, requests, seeds)  # (B, C, h, w), float32 throughout sampling
        originals = [_inpaint_image(r, job.size) for r in requests if r.inpaint is not None]  # of all or of none
        known = self._known(job, requests, seeds, originals) if originals else None
        model = self._model(job, requests, known, [share.embeds for share in shares])
        predicted: list[tuple[Tensor, int, Tensor]] = []  # the last (x, t, ε)
        noise_known = NoiseStream(seeds, "inpainting")

        def put_known_back(x: Tensor, t: int) -> Tensor:
            if known is None:
                return x
            x0, keep = known
            return keep_known(x, self.schedule.q_sample(x0, t, noise_known(x0)), keep)

        def remembering(x: Tensor, t: int, step: int) -> Tensor:
            eps = model(x, t, step)
            predicted[:] = [(x, t, eps)]
            return eps

        def preview() -> list[Image.Image]:
            x0 = self.schedule.x0_from_eps(*predicted[0][:2], predicted[0][2])
            return [to_pil(self._decode(latents[None])[0]) for latents in (keep_known(x0, *known) if known else x0)]

        overflow = _Overflow([share.job for share in shares], self.dtype)

        def after_step(step: int, x: Tensor) -> None:
            overflow.watch(x)
            if on_step is None:
                return
            progress = Progress(tuple(share.index for share in shares), step + 1, len(job.gates), x, preview)
            on_step(progress)
            self._bring(self.unet)  # which a preview may have sent away
            if progress.is_stopped:
                raise _StoppedError

        x = build_sampler(job.request.sampler, job.request.eta)(
            remembering if on_step else model,
            x,
            self.schedule,
            job.request.steps,
            skip=job.skip,
            noise=NoiseStream(seeds, "sampler"),
            before_step=put_known_back,
            on_step=after_step,
        )
        if known is not None:  # so that what was to be kept comes back as it was, not as the last step left it
            x = keep_known(x, *known)  # (B, C, h, w)
        images: list[Any] = [None] * len(shares)
        if output_type == "latent":
            overflow.check()
        else:
            decoded = [self._decode(latents[None])[0] for latents in x]  # (3, H, W) each
            try:
                images = _output(decoded, originals, None if known is None else known[1], output_type)
            except NotFiniteError:
                overflow.check()  # which knows the step, where it was one
                overflow.check_images(decoded)
                raise
        return [
            Sample(share.index, share.job.alone(share.index[1]), image, latents.cpu())
            for share, image, latents in zip(shares, images, x, strict=True)
        ]

    def _start(self, job: Job, shares: list[_Share], requests: list[Request], seeds: list[int]) -> Tensor:
        """The latents (B, C, h, w) that sampling starts from: noise, or an image with the noise of a later step."""
        x = start_latents(seeds, job.latent_shape)
        for i, share in enumerate(shares):
            if share.start is not None:
                x[i] = share.start
        x = x.to(self.device)
        begun = [fit(load_rgb(r.init_image), *job.size) for r in requests if r.init_image is not None]  # of all or none
        if not begun:
            return x
        t = start_timestep(job.request.sampler, self.schedule, job.request.steps, job.skip)
        return self.schedule.q_sample(self._encode(begun, seeds, job.latent_shape), t, x)

    def _model(
        self,
        job: Job,
        requests: list[Request],
        known: tuple[Tensor, Tensor] | None,
        embeds: Sequence[Embeds],
    ) -> EpsModel:
        """ε(x, t, step) of a batch, guided and gated; everything that does not depend on the step is made here."""
        gates, guidance = job.gates, job.request.guidance
        is_guided = guidance != 1

        prompts = [r.prompt for r in requests]
        negatives = [r.negative_prompt for r in requests] if is_guided else []
        reading, texts = job.request.reading, negatives + prompts
        encoded = self.encode_text(texts) if reading == Reading() else self.encode_prompts(texts, reading)
        given = [negative for _, negative in embeds][: len(negatives)] + [prompt for prompt, _ in embeds]
        # (B, M, W), or with guidance (2·B, M, W), the null branch first: so is the grounding
        context = torch.stack(
            [
                encoded[text] if tokens is None else tokens.to(self.device, self.dtype)
                for text, tokens in zip(texts, given, strict=True)
            ]
        )

        grounding, extra = None, None
        if any(gates):
            grounding = {k: v.to(self.device) for k, v in self._grounding(requests, *job.size).items()}
        self._bring(self.unet)
        if grounding is not None and "map" in grounding:
            extra = self.unet.map_channels(grounding["map"].to(self.dtype), *job.latent_shape[1:])
        if known is not None:
            extra = inpaint_channels(*known).to(self.dtype)
        if is_guided and grounding is not None:  # the null branch; map and inpaint image are the same for both
            null = null_where(grounding, torch.ones(len(requests), dtype=torch.bool, device=self.device))
            grounding = {name: torch.cat([null[name], value]) for name, value in grounding.items()}
        cond = self.unet.condition(context, grounding, extra)
        # tensors, so that compiled code is the same for every β; 0 stays a number, which leaves the fusers out
        denoise = self.recorded or self.unet.denoise
        betas = torch.tensor(gates, device=self.device)
        scales = [betas[i] if gate else 0.0 for i, gate in enumerate(gates)]

        def model(x: Tensor, t: int, step: int) -> Tensor:
            timesteps = torch.full((len(x),), t, device=x.device)
            # the network in its own precision, the sampler in float32: its sums over steps would lose digits
            eps = denoise(x.to(self.dtype), timesteps, cond, scales[step]).to(x.dtype)  # (2·B, …) or (B, C, h, w)
            return guide(eps, guidance) if is_guided else eps  # (B, C, h, w)

        return model

    def _grounding(self, requests: list[Request], width: int, height: int) -> GroundingInputs:
        config = self.config.unet.grounding
        assert config is not None  # the gates of a plain base model's jobs are 0
        readers = Readers(phrases=self.encode_phrases, images=self.encode_images, size=(width, height))
        return kind_of(config.spec).inputs(requests, config, readers)

    def _known(
        self, job: Job, requests: Sequence[Request], seeds: list[int], originals: Sequence[Image.Image]
    ) -> tuple[Tensor, Tensor]:
        """Latents (B, C, h, w) of the images to repaint and what to keep of them (B, 1, h, w), float32."""
        keeps = []
        for request in requests:
            keeps.append(keep_mask(request, job.latent_shape[1:], self.vae.config.downsample_factor))
            if keeps[-1].all():
                log.warning("'%s' is kept whole: what is to be repainted is smaller than a latent cell", request.prompt)
        return self._encode(originals, seeds, job.latent_shape), torch.stack(keeps).to(self.device)

    def _encode(self, images: Sequence[Image.Image], seeds: list[int], shape: tuple[int, int, int]) -> Tensor:
        """Latents (B, C, h, w) float32 of images, each with the autoencoder's noise of its own seed."""
        noise = NoiseStream(seeds, "autoencoder")(torch.empty(len(seeds), *shape))  # (B, C, h, w)
        pixels = torch.stack([to_tensor(image) for image in images]).to(self.device, self.dtype)  # (B, 3, H, W)
        self._bring(self.vae)
        x0 = [self.vae.encode(p[None], n[None].to(p)) for p, n in zip(pixels, noise, strict=True)]  # one at a time
        return torch.cat(x0).float()


def _usable(sample: Sample) -> Sample:
    """The sample with tensors that may be changed and differentiated through, as inference mode's may not."""
    image = sample.image.clone() if isinstance(sample.image, Tensor) else sample.image
    return dataclasses.replace(sample, image=image, latents=sample.latents.clone())


def _without_effect(request: Request, prompt: Tensor | None, negative: Tensor | None) -> list[str]:
    """The fields, and embeddings, of a request with embeddings that say how texts are read that are not read."""
    if prompt is None and negative is None:
        return []
    is_guided = request.guidance != 1
    read = [request.prompt] * (prompt is None) + [request.negative_prompt] * (negative is None and is_guided)
    found = ["clip_skip"] if request.clip_skip != 1 and not read else []
    if not any(read):  # nothing is read of a text, or of the empty one, which holds no brackets and fits
        found += [name for name in ("prompt_weights", "long_prompts") if getattr(request, name)]
    return found + (["negative_prompt_embeds"] if negative is not None and not is_guided else [])


def read_tensor(value: Any, name: str) -> Tensor:
    """A tensor, array or nested list of numbers as a tensor. Raises ValueError for what is none, or not finite."""
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} is {show(value)}: give a tensor") from None
    if not tensor.is_floating_point() or not tensor.isfinite().all():
        raise ValueError(f"{name} holds {tensor.dtype} or what is not finite: give finite floating-point numbers")
    return tensor.detach()


def check_sizes(
    jobs: Sequence[Job], config: ModelConfig, device: torch.device, dtype: torch.dtype, low_memory: bool
) -> None:
    """Raises MemoryError, one line, for the first size that the device plainly has no memory for."""
    for job in {job.size: job for job in jobs}.values():
        tile = LOW_MEMORY_TILE if low_memory else max(job.latent_shape[1:])
        width, height = job.size
        check_memory(
            job.least_memory(config, dtype.itemsize, tile),
            device,
            f"an image of {width} x {height}",
            "give a smaller --size, --low-memory, or --dtype bfloat16 or float16",
        )


def _inpaint_image(request: Request, size: tuple[int, int]) -> Image.Image:
    """The image to repaint, fitted to the size."""
    assert request.inpaint is not None
    return fit(load_rgb(request.inpaint.image), *size)


def _output(
    decoded: list[Tensor], originals: list[Image.Image], keep: Tensor | None, output_type: OutputType
) -> list[Any]:
    """Decoded images (3, H, W) as they are given back; of inpainting, with what was to be kept as it was."""
    images = [to_pil(image) for image in decoded]
    if keep is not None:  # the decoder looks over the edge of what is repainted, and is not exact beyond it
        images = [put_back(*each) for each in zip(images, originals, keep, strict=True)]
    if output_type == "np":
        return [np.array(image) for image in images]
    if output_type == "pt":
        exact = [image.float().clamp(-1, 1).cpu() for image in decoded]
        return exact if keep is None else [to_tensor(image) for image in images]
    return images


def _shares(jobs: Sequence[Job], init_latents: Tensor | None, embeds: Sequence[Embeds]) -> Iterator[_Share]:
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
            yield _Share((i, k), job, None if init_latents is None else init_latents[n], embeds[i])
            n += 1
