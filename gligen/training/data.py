"""Scenes → batches. Everything random in a training step is drawn here, from (seed, number of the sample) alone.

So sample n is the same on every machine, with any number of workers, processes and restarts: a resumed run needs no
random state, two processes see what one with twice the batch would, and diagnosis can repeat a batch exactly.
Dropping is only decided here; the training step does it (objective.py).

Legend: B batch, M caption tokens, (h, w) latent size, S side of CLIP's pictures, R reference pictures in the batch.
"""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from gligen.config import GroundingConfig, ModelConfig
from gligen.data.captions import tokenize_captions
from gligen.data.maps import MAPS
from gligen.data.people import make_people_scene
from gligen.data.scenes import Pairs, Scene, detection_caption, make_scene, reference_image
from gligen.data.shapes import PAIRS, phrase_of
from gligen.grounding import box_inputs, image_key, keypoint_inputs, map_inputs
from gligen.image_files import ImageSource
from gligen.images import fit, label_tensor, to_tensor
from gligen.inpainting import boxes_mask, mask_to_latent
from gligen.modules.position_net import GroundingInputs
from gligen.request import Entity, Request
from gligen.training.kept import Rounds
from gligen.training.presets import TrainConfig
from gligen.training.step_graph import map_tensors

# Series of scenes by what they are for, far from the small seeds of tests and from evaluation's own series.
TRAINING_SERIES, DIAGNOSIS_SERIES, PREVIEW_SERIES = 1_000_000_000, 2_000_000_000, 3_000_000_000
HIGH_NOISE = (0.6, 0.9)  # fractions of T between which a diagnosis draws timesteps: where layout is decided

NO_PICTURE = np.zeros((0, 0, 3), np.uint8)
PHRASES: tuple[str, ...] = tuple(phrase_of(color, shape) for color, shape in PAIRS)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B samples with all their randomness; tensors on the CPU until `to`.

    grounding: inputs of the tokenizer; where there are reference pictures, image_features are still 0.
    `Objective.encode` puts mean, logvar and context in the place of pictures and captions.
    """

    grounding: GroundingInputs
    timesteps: Tensor  # (B,) int64
    noise: Tensor  # (B, C, h, w), the ε to predict
    posterior_noise: Tensor  # (B, C, h, w), of the autoencoder
    drop_caption: Tensor  # (B,) bool
    drop_grounding: Tensor  # (B,) bool
    drop_map: Tensor  # (B,) bool, of a map's extra channels; its tokens stay
    images: Tensor | None = None  # (B, 3, H, W) uint8; (A, 3, H, W) of `new`
    ids: Tensor | None = None  # (B, M) caption; (A, M)
    scenes: Tensor | None = None  # (B,) int64 numbers of scenes that come again, under which encodings are kept
    new: Tensor | None = None  # (A,) int64 which samples have pictures and captions, where scenes come again
    keep: Tensor | None = None  # (B, 1, h, w) inpainting's keep mask: 0 where to repaint
    references: Tensor | None = None  # (R, 3, S, S) uint8 reference pictures
    reference_slots: Tensor | None = None  # (R, 2) int64: sample and entity of each
    mean: Tensor | None = None  # (B, C, h, w) of the latents' posterior, unscaled
    logvar: Tensor | None = None  # (B, C, h, w)
    context: Tensor | None = None  # (B, M, D) the captions' states

    def __len__(self) -> int:
        return len(self.timesteps)

    def to(self, device: torch.device) -> Batch:
        return map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return map_tensors(self, Tensor.pin_memory)


@dataclass(frozen=True, kw_only=True)
class SceneSource:
    """An endless series of samples of one mode: `source.batch(numbers)`.

    phrase_features: of every phrase of the world, (F,) on the CPU, made once by the frozen encoder.
    cache, reuse: how many scenes there are before they come again, and how (`Rounds`); 0 is endless. What is known of
        them is kept, but not their pictures.
    """

    series: int
    grounding: GroundingConfig
    image_size: int  # pixels a side
    latent_shape: tuple[int, int, int]  # C, h, w
    context_length: int
    vocab_size: int
    reference_size: int  # pixels a side of reference pictures; 0 where the mode has none
    phrase_features: dict[str, Tensor]
    timesteps: tuple[int, int]  # first and last that may be drawn
    pairs: Pairs
    captions: str
    places: float
    caption_drop: float
    grounding_drop: float
    map_drop: float
    feature_drop: float
    stroke_masks: float
    cache: int = 0
    reuse: int = 0
    drawn: dict[int, Scene] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def build(cls, config: TrainConfig, model: ModelConfig, phrase_features: dict[str, Tensor]) -> SceneSource:
        """The training series of a run. Raises ValueError for timesteps that the model does not have."""
        grounding = model.unet.grounding
        assert grounding is not None  # build_model adds it
        last = model.schedule.timesteps - 1
        if config.timestep_high > last:
            raise ValueError(f"timestep_high is {config.timestep_high}: the base model's last timestep is {last}")
        side = model.image_size // model.vae.downsample_factor
        takes_images = grounding.spec.takes_images and model.image_encoder is not None
        return cls(
            series=TRAINING_SERIES + config.seed,
            grounding=grounding,
            image_size=model.image_size,
            latent_shape=(model.vae.latent_channels, side, side),
            context_length=model.text_encoder.context_length,
            vocab_size=model.text_encoder.vocab_size,
            reference_size=model.image_encoder.image_size if takes_images and model.image_encoder else 0,
            phrase_features=phrase_features,
            timesteps=(config.timestep_low, config.timestep_high),
            pairs=config.pairs,
            captions=config.captions,
            places=config.places,
            caption_drop=config.caption_drop,
            grounding_drop=config.grounding_drop,
            map_drop=config.map_drop,
            feature_drop=config.feature_drop,
            stroke_masks=config.stroke_masks,
            cache=config.cache,
            reuse=config.reuse,
        )

    def held_out(self, seed: int, total_timesteps: int) -> SceneSource:
        """Samples of another series, at high noise, from which nothing is dropped: what diagnosis compares on."""
        low, high = (int(share * total_timesteps) for share in HIGH_NOISE)
        return dataclasses.replace(
            self,
            series=DIAGNOSIS_SERIES + seed,
            timesteps=(low, high),
            caption_drop=0.0,
            grounding_drop=0.0,
            map_drop=0.0,
            feature_drop=0.0,
            stroke_masks=0.0,
            cache=0,
        )

    @property
    def rounds(self) -> Rounds | None:
        """How scenes come again, if they do."""
        return Rounds(size=self.cache, reuse=self.reuse) if self.cache else None

    def scene(self, number: int) -> Scene:
        """Of sample `number`."""
        return self._draw(self.rounds.scene(number) if self.rounds else number)

    def _known(self, number: int, has_picture: bool) -> Scene:
        """A scene that comes again, of which only what is not its picture is kept."""
        scene = None if has_picture else self.drawn.get(number)
        if scene is None:
            scene = self._draw(number)
            self.drawn[number] = dataclasses.replace(scene, image=NO_PICTURE)
        return scene

    def _draw(self, number: int) -> Scene:
        if self.grounding.spec.kind == "keypoint":
            return make_people_scene(self.series, number, size=self.image_size)
        return make_scene(self.series, number, size=self.image_size, pairs=self.pairs, places=self.places)

    def batch(
        self,
        numbers: Iterable[int],
        begin: int | None = None,
        *,
        asked_as: Callable[[Scene], Scene] | None = None,
    ) -> Batch:
        """The samples of these numbers. A pure function.

        begin: the first sample that was asked for; scenes that have come since then come without picture and caption.
        asked_as: another scene whose grounding each sample gets; picture, caption and all that is random stay its own.
        """
        numbers = list(numbers)
        draws = [_Draws.make(self, number) for number in numbers]
        new, which = None, numbers
        if self.rounds is None:
            scenes = [self._draw(number) for number in numbers]
        else:
            which = [self.rounds.scene(number) for number in numbers]
            is_new = [begin is None or self.rounds.is_new(number, begin) for number in numbers]
            scenes = [self._known(number, has_picture) for number, has_picture in zip(which, is_new, strict=True)]
            new = [i for i, has_picture in enumerate(is_new) if has_picture]
        images, ids = self._pictures(scenes if new is None else [scenes[i] for i in new])
        if asked_as is not None:
            scenes = [asked_as(scene) for scene in scenes]
        spec = self.grounding.spec
        keep, references, slots = None, None, None
        if spec.kind == "keypoint":
            requests = [Request(prompt="", keypoints=scene.people) for scene in scenes]
            grounding = keypoint_inputs(requests, self.grounding)
        elif spec.is_map:
            maps = [map_tensor(scene, spec.name) for scene in scenes]
            grounding = map_inputs(maps, self.grounding, self.image_size, self.image_size)
        else:
            asked = [self._entities(scene, drawn) for scene, drawn in zip(scenes, draws, strict=True)]
            requests = [Request(prompt="", entities=entities) for entities in asked]
            grounding = box_inputs(requests, self.grounding, self._phrases, self._no_images)
            if spec.takes_images:
                references, slots = self._references(asked)
            if spec.is_inpainting:
                keep = torch.stack([self._keep(e, drawn) for e, drawn in zip(asked, draws, strict=True)])
        return Batch(
            images=images,
            ids=ids,
            grounding=grounding,
            timesteps=torch.tensor([drawn.timestep for drawn in draws]),
            noise=torch.from_numpy(np.stack([drawn.noise[0] for drawn in draws])),
            posterior_noise=torch.from_numpy(np.stack([drawn.noise[1] for drawn in draws])),
            drop_caption=torch.tensor([drawn.drop_caption for drawn in draws]),
            drop_grounding=torch.tensor([drawn.drop_grounding for drawn in draws]),
            drop_map=torch.tensor([drawn.drop_map for drawn in draws]),
            scenes=None if new is None else torch.tensor(which),
            new=None if new is None else torch.tensor(new, dtype=torch.int64),
            keep=keep,
            references=references,
            reference_slots=slots,
        )

    def pictures(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """images (B, 3, H, W) uint8 and ids (B, M) of scenes that come again."""
        images, ids = self._pictures([self._draw(number) for number in numbers])
        assert images is not None
        assert ids is not None
        return images, ids

    def _pictures(self, scenes: Sequence[Scene]) -> tuple[Tensor | None, Tensor | None]:
        if not scenes:
            return None, None
        captions = [
            detection_caption(scene) if self.captions == "detection" and scene.objects else scene.caption
            for scene in scenes
        ]
        images = torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2).contiguous()
        return images, tokenize_captions(captions, self.context_length, self.vocab_size)

    def _entities(self, scene: Scene, drawn: _Draws) -> tuple[Entity, ...]:
        """What is asked for. Inpainting asks for a random part of the objects, so that the rest is known context
        (the original always repaints all)."""
        spec = self.grounding.spec
        objects = list(enumerate(scene.objects))
        if spec.is_inpainting:
            order = sorted(objects, key=lambda pair: drawn.by_object[pair[0]][0])
            objects = sorted(order[: 1 + int(drawn.share * len(order))], key=lambda pair: pair[0])
        entities = []
        for i, item in objects:
            phrase, has_image = item.phrase, spec.takes_images
            _, dropped, which = drawn.by_object[i]
            if has_image and dropped < self.feature_drop:  # never both
                phrase, has_image = (phrase, False) if which < 0.5 else ("", True)
            image = Image.fromarray(reference_image(scene, i)) if has_image else None
            entities.append(Entity(phrase=phrase, image=image, box=item.box))
        return tuple(entities)

    def _phrases(self, phrases: Sequence[str]) -> dict[str, Tensor]:
        return {phrase: self.phrase_features[phrase] for phrase in phrases}

    def _no_images(self, images: Sequence[ImageSource]) -> dict[str | int, Tensor]:
        """Pictures are encoded on the model's device; until then their features are 0."""
        return dict.fromkeys(map(image_key, images), torch.zeros(self.grounding.feature_dim))

    def _references(self, asked: Sequence[tuple[Entity, ...]]) -> tuple[Tensor | None, Tensor | None]:
        pictures, slots = [], []
        for b, entities in enumerate(asked):
            for n, entity in enumerate(entities):
                if isinstance(entity.image, Image.Image):
                    pictures.append(np.array(fit(entity.image, self.reference_size, self.reference_size)))
                    slots.append((b, n))
        if not pictures:
            return None, None
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous(), torch.tensor(slots)

    def _keep(self, entities: tuple[Entity, ...], drawn: _Draws) -> Tensor:
        """The keep mask (1, h, w): the boxes, or strokes within them."""
        _, h, w = self.latent_shape
        if drawn.strokes >= self.stroke_masks:
            return boxes_mask(torch.tensor([[entity.box for entity in entities]]), h, w)[0]
        side = self.image_size
        mask = Image.new("L", (side, side))
        draw = ImageDraw.Draw(mask)
        rng = np.random.default_rng((self.series, drawn.number, 2))
        for entity in entities:
            x0, y0, x1, y1 = (side * value for value in entity.box)
            width = max(2, round(0.3 * min(x1 - x0, y1 - y0)))
            points = [(x0 + u * (x1 - x0), y0 + v * (y1 - y0)) for u, v in rng.random((6, 2)).tolist()]
            draw.line(points, fill=255, width=width, joint="curve")
        return mask_to_latent((label_tensor(mask) > 0).float(), side // h)


@dataclass(frozen=True, kw_only=True)
class _Draws:
    """What is random about one sample beside its scene."""

    number: int
    timestep: int
    drop_caption: bool
    drop_grounding: bool
    drop_map: bool
    strokes: float
    share: float
    by_object: list[list[float]]  # three numbers for each of up to 4 objects
    noise: np.ndarray  # (2, C, h, w) float32

    @classmethod
    def make(cls, source: SceneSource, number: int) -> _Draws:
        # (seed, index) alone is the scene's own stream; the third word makes another of it
        rng = np.random.default_rng((source.series, number, 1_000_003))
        t, caption, grounding, strokes, share = rng.random(5).tolist()
        low, high = source.timesteps
        return cls(
            number=number,
            timestep=low + int(t * (high + 1 - low)),
            drop_caption=caption < source.caption_drop,
            drop_grounding=grounding < source.grounding_drop,
            drop_map=strokes < source.map_drop,  # a map has no strokes
            strokes=strokes,
            share=share,
            by_object=rng.random((4, 3)).tolist(),
            noise=rng.standard_normal((2, *source.latent_shape), dtype=np.float32),
        )


def map_tensor(scene: Scene, mode: str) -> Tensor:
    """A scene's map as `gligen.images.load_map` would read it from a file."""
    picture = Image.fromarray(MAPS[mode](scene, None))
    return label_tensor(picture) if mode == "sem" else to_tensor(picture.convert("RGB"))


@dataclass(frozen=True, kw_only=True)
class StepBatches:
    """Batch k of a process: samples that no other process and no other k has.

    Numbers run on through accumulated batches and processes, so that these share out what one large batch would hold.
    begin: the first batch that is asked for: from there on, scenes that come again come with their picture once.
    """

    source: SceneSource
    batch_size: int
    rank: int = 0
    processes: int = 1
    begin: int = 0

    def __getitem__(self, k: int) -> Batch:
        first = (k * self.processes + self.rank) * self.batch_size
        begin = self.begin * self.processes * self.batch_size
        return self.source.batch(range(first, first + self.batch_size), begin)


def pick_workers(workers: int, device: torch.device) -> int:
    """-1 is 0 on a CPU, which is busy with the model, else two less than the machine has cores, up to 14."""
    if workers >= 0:
        return workers
    return 0 if device.type == "cpu" else max(1, min(14, (os.cpu_count() or 2) - 2))


def iterate(batches: StepBatches, first: int, last: int, *, workers: int, pin: bool) -> Iterator[Batch]:
    """Batches first … last - 1, drawn ahead by `workers` processes where there are any."""
    batches = dataclasses.replace(batches, begin=first)
    rounds = batches.source.cache // batches.batch_size
    # then a scene always comes to the worker that knows it
    workers = next((n for n in range(workers, workers // 2, -1) if rounds % n == 0), workers)
    if workers == 0:
        return (batches[k] for k in range(first, last))
    loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
        batches,  # type: ignore[arg-type]  # it only needs __getitem__
        sampler=range(first, last),
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin,
        prefetch_factor=4,
        worker_init_fn=leave_signals_to_parent,
    )
    return iter(loader)


def _as_it_is(batch: Any) -> Any:
    return batch


def leave_signals_to_parent(_: int) -> None:
    """Ctrl-C and SIGTERM reach the whole group; the parent saves first, and workers end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
