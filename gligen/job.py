"""A request completed for one model: the type that the pipeline trusts.

`complete` checks a request against a model's config and its images against the disk, and fills in whatever the request
leaves open. After it nothing is asked for that the model cannot do, and no field is None that sampling needs.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image

from gligen.config import ModelConfig, TextEncoderConfig
from gligen.diffusion.guidance import gate_schedule
from gligen.diffusion.samplers import skipped_steps
from gligen.image_files import ImageFiles, cropped_size, hole, mask_levels, open_image
from gligen.modes import MAP_MODES, Schedule, get_mode
from gligen.prompts import Reading
from gligen.request import STYLE_BOX, Inpaint, Request, check_files, open_field, serving_modes

log = logging.getLogger("gligen")

SHAPING = ("inpaint.image", "init_image", *MAP_MODES)  # images that the result is laid over
OFF: Schedule = (0.0, 0.0, 1.0)  # of a request that grounds nothing, or asks for grounding to be off


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """The facts about a model that decide which requests it can serve.

    has_image_encoder: CLIP's, for reference images. has_base_conv: the base's own first convolution, for the ungated
    steps of map modes.
    """

    config: ModelConfig
    has_image_encoder: bool
    has_base_conv: bool

    @property
    def mode(self) -> str | None:
        """The row of gligen.modes; None is a base model without grounding."""
        return self.config.unet.grounding.mode if self.config.unet.grounding else None


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """A request that a model can serve, with nothing left open. Made by `complete`.

    request: as asked, with its size and, where anything is grounded, its schedule filled in.
    size: width and height in pixels. skip: the first steps that image-to-image leaves out.
    gates: β of each step that is made; all 0 where nothing is grounded.
    latent_shape: (C, h, w) of one image. seeds: of image k.
    images: those of the run. notes: what a user may not expect, one line each.
    """

    request: Request
    size: tuple[int, int]
    skip: int
    gates: tuple[float, ...]
    latent_shape: tuple[int, int, int]
    seeds: tuple[int, ...]
    images: ImageFiles = field(repr=False)
    notes: tuple[str, ...] = ()

    def opened(self) -> Request:
        """The request with its images decoded in place of their paths, and the hole of an image to repaint as its
        mask."""
        opened = self.request.with_images(lambda name, source: open_field(self.images, name, source))
        if opened.inpaint is None or opened.inpaint.mask is not None:
            return opened
        transparent = hole(open_image(opened.inpaint.image))
        return dataclasses.replace(opened, inpaint=dataclasses.replace(opened.inpaint, mask=transparent))

    @property
    def plain_texts(self) -> tuple[str, ...]:
        """Prompts and phrases that are read as they stand."""
        prompts = () if self.request.prompt_weights else (self.request.prompt, self.request.negative_prompt)
        return (*prompts, *(entity.phrase for entity in self.request.entities))

    @property
    def draws_noise(self) -> bool:
        """Whether its seeds decide more than the latents it starts from."""
        r = self.request
        encodes = r.inpaint is not None or r.init_image is not None  # with the autoencoder's noise
        return encodes or r.sampler in ("ddpm", "euler-ancestral", "lcm") or r.eta > 0

    def fingerprints(self) -> dict[str, str]:
        """Fingerprints of the files that the request's images are in, by the names of their fields."""
        found = ((name, self.images.fingerprint(source)) for name, source in self.request.images)
        return {name: value for name, value in found if value is not None}

    def least_memory(self, config: ModelConfig, itemsize: int, tile: int) -> int:
        """Bytes that generating one image takes at the very least: what one convolution of the decoder's last level, or
        of the UNet's first, reads and writes, and the pixels themselves.

        itemsize: bytes of a number. tile: latent cells a side that are decoded at once.
        """
        _, h, w = self.latent_shape
        cells = min(h, tile) * min(w, tile)
        decoder = 2 * config.vae.base_channels * cells * config.vae.downsample_factor**2
        unet = 2 * config.unet.model_channels * h * w
        return max(decoder, unet) * itemsize + 3 * 4 * self.size[0] * self.size[1]

    def alone(self, k: int) -> Request:
        """The request that generates image k alone."""
        return dataclasses.replace(self.request, num_images=1, seed=self.seeds[k])

    def shortened(self, steps: int, count: int) -> Job:
        """A job for the same networks, with as few steps and images as asked, to warm up with."""
        count = min(count, len(self.seeds))
        stages = self.request.schedule
        if any(self.gates) and not all(self.gates):
            stages = (0.5, 0.0, 0.5)  # so that a step of either kind is among them
        request = dataclasses.replace(self.request, steps=steps, schedule=stages, num_images=count)
        skip = _skip(request)
        gates = tuple(gate_schedule(stages or OFF, steps - skip))
        return dataclasses.replace(self, request=request, skip=skip, gates=gates, seeds=self.seeds[:count])


def complete(request: Request, model: ModelFacts, *, images: ImageFiles | None = None, where: str = "") -> Job:
    """The job that the request is for this model.

    images: those of the run, so that no file is opened twice. where: in front of every error.
    A schedule that is not given is the mode's; a base model without grounding, and a request that grounds nothing, keep
    the fusers off, which is the base model itself.
    Raises ValueError or FileNotFoundError, one line, where the model cannot serve the request.
    """
    images = images or ImageFiles()
    try:
        _check_kind(request, model)
        notes = check_files(request, images)
        size = _size(request, model, images)
        schedule = request.schedule if model.mode else None
        if schedule is None and model.mode and (request.grounding or request.inpaint):
            schedule = get_mode(model.mode).schedule
        if request.steps > (timesteps := model.config.schedule.timesteps):
            raise ValueError(f"steps is {request.steps}: this model has {timesteps} timesteps, give at most as many")
        skip = _skip(request)
        gates = tuple(gate_schedule(schedule or OFF, request.steps - skip))
        _check_prompts(request, model.config.text_encoder)
        _check_gates(request, model, gates, size)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"{where}{error}") from None
    notes += _cropped(request, size, images) + _outside(request, size, images) + _notes(request, model, gates)
    factor = model.config.vae.downsample_factor
    request = dataclasses.replace(request, size=size, schedule=schedule)
    return Job(
        request=request,
        size=size,
        skip=skip,
        gates=gates,
        latent_shape=(model.config.vae.latent_channels, size[1] // factor, size[0] // factor),
        seeds=tuple(request.seed + k for k in range(request.num_images)),
        images=images,
        notes=tuple(notes),
    )


def complete_all(requests: Sequence[Request | Job], model: ModelFacts, images: ImageFiles | None = None) -> list[Job]:
    """A job for each request; those that are jobs already stay as they are. What is to be noted is logged, once for
    all requests that it holds for.

    Raises as `complete`, with the number of the request where there are several.
    """
    images = images or ImageFiles()
    jobs: list[Job] = []
    noted: dict[str, list[int]] = {}
    for i, request in enumerate(requests):
        if isinstance(request, Job):
            jobs.append(request)
            continue
        jobs.append(complete(request, model, images=images, where=f"request {i}: " if len(requests) > 1 else ""))
        for note in jobs[-1].notes:
            noted.setdefault(note, []).append(i)
    texts = (
        text for job, request in zip(jobs, requests, strict=True) if job is not request for text in job.plain_texts
    )
    if found := next(filter(None, map(_MARKUP.search, texts)), None):
        log.warning(
            "'%.40s' is read as text, as it stands: --prompt-weights reads (a:1.4) and [a] in prompts", found[0]
        )
    for note, numbers in noted.items():
        more = f" and {len(numbers) - 1} more" if len(numbers) > 1 else ""
        log.warning("%s%s", f"request {numbers[0]}{more}: " if len(requests) > 1 else "", note)
    return jobs


def _check_kind(request: Request, model: ModelFacts) -> None:
    """Raises ValueError unless the model takes this kind of grounding, and this much of it."""
    mode, modes = model.mode, serving_modes(request)
    if mode not in modes and (mode or request.grounding or request.inpaint):
        has = _describe(request, mode)
        found = f"the checkpoint's mode is {mode}" if mode else "the checkpoint has no grounding"
        raise ValueError(f"this request has {has}, but {found}: use a {' or '.join(modes)} checkpoint")
    grounding = model.config.unet.grounding
    if grounding:
        for name, limit in (("entities", grounding.max_entities), ("keypoints", grounding.max_persons)):
            if (count := len(getattr(request, name))) > limit:
                raise ValueError(f"{name} has {count} entries: this model takes at most {limit}")
    if any(entity.image is not None for entity in request.entities) and not model.has_image_encoder:
        raise ValueError("reference images need CLIP's image encoder: give a CLIP ViT-L/14 file with --clip")


def _size(request: Request, model: ModelFacts, images: ImageFiles) -> tuple[int, int]:
    """The size asked for, or else that of its image's shape (what to repaint or to begin with, or the map), or else
    the model's own.

    Raises ValueError for one that the model's layers cannot halve.
    """
    config = model.config
    if request.size is None:
        shaping = next((open_field(images, name, source) for name, source in request.images if name in SHAPING), None)
        grounding = config.unet.grounding
        if shaping is None or (grounding and grounding.fuser_type == "gatedSA2"):  # which needs a square
            return config.image_size, config.image_size
        return size_of_shape(shaping.width / shaping.height, config.image_size, config.even_multiple)
    size, multiple = request.size, config.size_multiple
    if any(side % multiple for side in size):
        below, above = (
            " x ".join(str(max(1, step(side / multiple)) * multiple) for side in size)
            for step in (math.floor, math.ceil)
        )
        nearest = above if below == above else f"{below} or {above}"
        raise ValueError(f"size is {size[0]} x {size[1]}: this model needs multiples of {multiple}, such as {nearest}")
    return size


def size_of_shape(ratio: float, base: int, multiple: int) -> tuple[int, int]:
    """The width and height, multiples of `multiple` around base² pixels, that are nearest to the aspect ratio."""
    sides = []
    for side in (base * ratio**0.5, base / ratio**0.5):
        below = max(1, math.floor(side / multiple)) * multiple
        sides.append({below, below + multiple} if side > below else {below})
    return min(
        itertools.product(*sides),
        key=lambda size: (abs(math.log(size[0] / size[1] / ratio)), abs(size[0] * size[1] - base**2)),
    )


def _cropped(request: Request, size: tuple[int, int], images: ImageFiles) -> list[str]:
    """Notes on what is cut off the images, a line each."""
    notes = []
    for name, source in request.images:
        image = open_field(images, name, source)
        used = cropped_size(image.size, *size)
        if name in SHAPING and used != image.size:
            notes.append(
                f"{name} is {image.width} x {image.height}: its middle {used[0]} x {used[1]} is used for a size of "
                f"{size[0]} x {size[1]}, and places are fractions of that"
            )
    references = [(name, open_field(images, name, source)) for name, source in request.images if "entities" in name]
    if oblong := [name for name, image in references if image.width != image.height]:
        notes.append(f"{', '.join(oblong)}: not square, and CLIP sees the middle square only")
    return notes


def _outside(request: Request, size: tuple[int, int], images: ImageFiles) -> list[str]:
    """The boxes that no pixel is repainted in, a line each."""
    if request.inpaint is None or (region := _repainted(request.inpaint, images)) is None:
        return []
    W, H = cropped_size(region.size, *size)
    left, top = (region.width - W) // 2, (region.height - H) // 2
    notes = []
    for i, entity in enumerate(request.entities):
        x0, y0, x1, y1 = entity.box
        box = (left + math.floor(x0 * W), top + math.floor(y0 * H), left + math.ceil(x1 * W), top + math.ceil(y1 * H))
        if entity.box != STYLE_BOX and region.crop(box).getbbox() is None:
            notes.append(f"entities[{i}].box lies outside of what is repainted: it has no effect")
    return notes


def _repainted(inpaint: Inpaint, images: ImageFiles) -> Image.Image | None:
    """Levels 255 where the mask, or else the image's hole, has pixels repainted; None where the boxes say it."""
    if inpaint.mask is not None:
        return mask_levels(open_field(images, "inpaint.mask", inpaint.mask))
    return hole(open_field(images, "inpaint.image", inpaint.image))


def _skip(request: Request) -> int:
    return 0 if request.init_image is None else skipped_steps(request.steps, request.strength)


def _check_prompts(request: Request, encoder: TextEncoderConfig) -> None:
    """Raises ValueError where the text encoder cannot read prompts as asked."""
    if encoder.kind != "clip" and request.reading != Reading():
        raise ValueError("prompt_weights, clip_skip and long_prompts are CLIP's: this model's text encoder is another")
    if request.clip_skip > encoder.layers:
        raise ValueError(
            f"clip_skip is {request.clip_skip}: this model's text encoder has {encoder.layers} layers, 1 is the last"
        )


def _check_gates(request: Request, model: ModelFacts, gates: Sequence[float], size: tuple[int, int]) -> None:
    """Raises ValueError where the model cannot do the steps with, or those without, grounding."""
    grounding = model.config.unet.grounding
    if grounding is None:
        return
    if grounding.spec.is_map and not all(gates) and not model.has_base_conv:
        raise ValueError(
            "steps without grounding run on the base model's own first convolution, which a map checkpoint "
            "lacks: give Stable Diffusion with --checkpoint and this file with --adapter, or keep grounding on with "
            "--schedule 1 0 0"
        )
    if grounding.fuser_type == "gatedSA2" and any(gates) and (not grounding.spec.is_map or size[0] != size[1]):
        raise ValueError("gatedSA2 lays tokens out on a square: it needs a map and a square size")


def _notes(request: Request, model: ModelFacts, gates: Sequence[float]) -> list[str]:
    """Notes on what is legal and may still surprise: above all what was given and has no effect."""
    notes = []
    if (request.grounding or request.inpaint) and not any(gates) and request.schedule != OFF:
        notes.append(
            f"grounding is never on: {len(gates)} steps leave none of the schedule's first stages; give "
            "--schedule 1 0 0, a larger --tau or more --steps"
        )
    if request.guidance == 0:
        asked = "the prompt has" if not request.grounding else f"neither the prompt nor {request.grounding} has"
        effect = "no effect" if not request.grounding else "an effect"
        notes.append(f"guidance is 0: {asked} {effect}, the negative prompt alone counts; 1 turns guidance off")
    elif request.guidance < 0:
        notes.append(f"guidance is {request.guidance:g}: images are sampled away from the prompt, not towards it")
    elif request.guidance == 1 and request.negative_prompt:
        notes.append("guidance is 1, which turns guidance off: the negative prompt has no effect")
    if request.schedule is not None and model.mode is None:
        notes.append("the checkpoint has no grounding: the schedule has no effect")
    for i, person in enumerate(request.keypoints):
        if not any(person):
            notes.append(f"keypoints[{i}] has no point: it has no effect")
    return notes


_MARKUP = re.compile(  # what web UIs read as a weight or a switch
    r"""\([^()]*:\s*[-+]?[\d.]+\s*\)  # (a star:1.4)
    | \(\([^()]+\)\)                  # ((a star))
    | \[[^\[\]]+\]                    # [a star], [a:b:.5], [a|b]
    | \bBREAK\b
    | <(?:lora|lyco|hypernet)\b[^<>]*>
    | \bembedding:\S+
    | (?<=[a-z,][ ])AND(?=[ ][a-z])   # a star AND a ring
    | \{[^{}]*\|[^{}]*\}              # {a|b}, one at random
    | \{\{[^{}]+\}\}
    | \b__[\w/-]+__\b                 # __colour__, a line of a file
    | \w{3,}(?:\+\+|--)(?![\w+-])     # a star++
    """,
    re.VERBOSE,
)


def _describe(request: Request, mode: str | None) -> str:
    """The part of the request that the model lacks a way for, in words."""
    if mode and get_mode(mode).is_inpainting and request.inpaint is None:
        return "no inpaint image"
    if request.inpaint is not None and not (mode and get_mode(mode).is_inpainting):
        return "an inpaint image"
    if any(entity.image is not None for entity in request.entities):
        return "entities with reference images"
    return f"a {request.grounding} map" if request.grounding in MAP_MODES else str(request.grounding)
