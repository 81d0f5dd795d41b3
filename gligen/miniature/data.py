"""Scenes → batches. A batch, its noise included, is a pure function of the seed and its samples' numbers.

So nothing random has to be kept to go on exactly where a run stopped, and any number of workers gives the same.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from gligen.data.captions import tokenize_captions
from gligen.data.people import make_people_scene
from gligen.data.scenes import Scene, SceneObject, make_scene, reference_image
from gligen.data.shapes import phrase_of
from gligen.data.streams import Purpose, Series
from gligen.data.streams import rng as stream
from gligen.miniature.config import IMAGE_SIZE, CLIPStage, UNetStage, VAEStage
from gligen.training.kept import Rounds

Tensors = dict[str, Tensor]


class SceneBatches:
    """Batches of a stage, tensors on the CPU; images are (B, 3, 64, 64) uint8.

    make: (series, numbers of the samples, rng, generator, begin) -> Tensors, a pure function. begin: the first sample
    that was asked for; what is given only once is given from there on. cache: scenes before they come again, if not 0.
    """

    def __init__(
        self,
        make: Callable[[int, range, np.random.Generator, torch.Generator, int], Tensors],
        seed: int,
        stage: str,
        cache: int = 0,
    ) -> None:
        self.make, self.seed, self.stage, self.cache = make, seed, stage, cache

    def batch(self, numbers: range, begin: int) -> Tensors:
        return self._batch(Series.MINIATURE_TRAINING + self.seed, numbers, begin)

    def held_out(self, numbers: range) -> Tensors:
        """Samples of a series that training never sees, the same for every seed."""
        return self._batch(Series.MINIATURE_HELD_OUT, numbers, 0)

    def _batch(self, series: int, numbers: range, begin: int) -> Tensors:
        sequence = np.random.SeedSequence([series, zlib.crc32(self.stage.encode()), numbers.start])
        generator = torch.Generator().manual_seed(int(sequence.generate_state(1)[0]))
        return self.make(series, numbers, np.random.default_rng(sequence), generator, begin)


class MakeVAE:
    """Makes images, and noise (B, C, h, w) for the posterior."""

    def __init__(self, config: VAEStage) -> None:
        self.config, self.latent = config, config.vae

    def __call__(
        self, series: int, numbers: range, rng: np.random.Generator, generator: torch.Generator, begin: int
    ) -> Tensors:
        scenes = [draw(series, n, self.config.people) for n in numbers]
        side = IMAGE_SIZE // self.latent.downsample_factor
        shape = (len(scenes), self.latent.latent_channels, side, side)
        return {"images": stack([s.image for s in scenes]), "noise": torch.randn(shape, generator=generator)}


class MakeUNet:
    """Makes `images` and caption `ids` (B, M); timesteps (B,) and, for the end of a run, even_timesteps (B,); whether
    to drop_caption (B,); ε `noise` and the posterior's `posterior_noise` (B, C, h, w).

    With config.cache, scenes come again: `examples` (B,) are their numbers, and images and ids are there only of the
    samples `new` (A,) that show a scene for the first time. Noise and timesteps never come again.
    """

    def __init__(
        self,
        config: UNetStage,
        *,
        latent_shape: tuple[int, int, int],
        timesteps: int,
        context_length: int,
        vocab_size: int,
    ) -> None:
        self.config = config
        self.latent_shape, self.timesteps = latent_shape, timesteps
        self.context_length, self.vocab_size = context_length, vocab_size

    def __call__(
        self, series: int, numbers: range, rng: np.random.Generator, generator: torch.Generator, begin: int
    ) -> Tensors:
        config, count = self.config, len(numbers)
        drop_caption = rng.random(count) < config.caption_drop
        timesteps = draw_timesteps(rng, count, config, self.timesteps)
        shape = (count, *self.latent_shape)
        batch = {
            "drop_caption": torch.from_numpy(drop_caption),
            "timesteps": torch.from_numpy(timesteps),
            "even_timesteps": torch.from_numpy((rng.random(count) * self.timesteps).astype(np.int64)),
            "noise": torch.randn(shape, generator=generator),
            "posterior_noise": torch.randn(shape, generator=generator),
        }
        if not config.cache or series == Series.MINIATURE_HELD_OUT:
            return batch | self.images_and_ids(series, numbers)
        rounds = Rounds(size=config.cache, reuse=config.reuse)
        scenes = [rounds.example(n) for n in numbers]
        new = [i for i, n in enumerate(numbers) if rounds.is_new(n, begin)]
        batch |= {"examples": torch.tensor(scenes), "new": torch.tensor(new, dtype=torch.int64)}
        return batch | (self.images_and_ids(series, [scenes[i] for i in new]) if new else {})

    def images_and_ids(self, series: int, numbers: Sequence[int]) -> Tensors:
        """Images (B, 3, 64, 64) uint8 and ids (B, M) of scenes."""
        scenes = [draw(series, n, self.config.people, places=self.config.places) for n in numbers]
        captions = [scene.caption for scene in scenes]
        return {
            "images": stack([scene.image for scene in scenes]),
            "ids": tokenize_captions(captions, self.context_length, self.vocab_size),
        }


def draw_timesteps(rng: np.random.Generator, count: int, config: UNetStage, total: int) -> NDArray[np.int64]:
    """Timesteps (count,) in [0, total): a share of config.focus evenly from focus_low to focus_high, the rest evenly
    from all."""
    is_focused = rng.random(count) < config.focus
    low = np.where(is_focused, config.focus_low, 0)
    end = np.where(is_focused, config.focus_high + 1, total)
    return low + (rng.random(count) * (end - low)).astype(np.int64)


class MakeCLIP:
    """Makes images (B), ids (B + K, M), labels (B + K,): texts with the same label mean the same.

    The first half are single objects with their phrases, the second half scenes with their captions. The K texts at
    the end belong to no image: captions in which two objects have swapped colours, so that the text tower has to
    learn which colour goes with which shape. ids are cut to the longest text, which changes nothing: the tower is
    causal and is read at the first end-of-text.
    """

    def __init__(self, config: CLIPStage) -> None:
        self.config = config

    def __call__(
        self, series: int, numbers: range, rng: np.random.Generator, generator: torch.Generator, begin: int
    ) -> Tensors:
        images, texts, labels, swapped = [], [], [], []
        for i, n in enumerate(numbers):
            if i < len(numbers) // 2:
                scene = make_scene(series, n, size=IMAGE_SIZE)
                which = int(rng.random() * len(scene.objects))
                item = scene.objects[which]
                images.append(reference_image(scene, which) if rng.random() < 0.5 else crop(scene, item, rng))
                texts.append(item.phrase if rng.random() < 0.75 else f"{item.color} {item.shape}")
                labels.append(item.phrase)
                continue
            has_places = rng.random() < self.config.places
            scene = draw(series, n, self.config.people, places=float(has_places))
            images.append(scene.image)
            texts.append(scene.caption)
            labels.append(scene.caption if scene.people or has_places else _content(scene.objects))
            swapped += swapped_captions(scene)[:1]
        numbered = {label: i for i, label in enumerate(dict.fromkeys(labels))}
        context_length = self.config.text_encoder.context_length
        ids = tokenize_captions(texts + swapped, context_length, self.config.vocab_size)
        longest = int((ids == self.config.vocab_size - 1).int().argmax(dim=1).max()) + 1
        return {
            "images": stack(images),
            "ids": ids[:, :longest].contiguous(),
            "labels": torch.tensor([numbered[label] for label in labels] + [-1] * len(swapped)),
        }


def draw(series: int, number: int, people: float, **kwargs: Any) -> Scene:
    """Scene `number` of a series, in which this share is of people."""
    if people and stream(series, number, Purpose.KIND).random() < people:
        return make_people_scene(series, number, size=IMAGE_SIZE)
    return make_scene(series, number, size=IMAGE_SIZE, **kwargs)


def crop(scene: Scene, item: SceneObject, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A square around an object, with more or less of what is beside it, at the size of a scene."""
    x0, y0, x1, y1 = (value * scene.size for value in item.box)
    side = min(scene.size, max(x1 - x0, y1 - y0) * (1.05 + 0.4 * rng.random()))
    left = min(max(0.0, (x0 + x1 - side) / 2), scene.size - side)
    top = min(max(0.0, (y0 + y1 - side) / 2), scene.size - side)
    box = (left, top, left + side, top + side)
    size = (scene.size, scene.size)
    return np.asarray(Image.fromarray(scene.image).resize(size, Image.Resampling.BILINEAR, box=box))


def swapped_captions(scene: Scene) -> list[str]:
    """The caption with the colours of two objects exchanged, for each two that differ in colour and shape."""
    found = []
    for i, a in enumerate(scene.objects):
        for b in scene.objects[:i]:
            if a.color != b.color and a.shape != b.shape:
                text = scene.caption.replace(a.phrase, "{a}").replace(b.phrase, "{b}")
                found.append(text.format(a=phrase_of(b.color, a.shape), b=phrase_of(a.color, b.shape)))
    return found


def stack(images: list[NDArray[np.uint8]]) -> Tensor:
    """Stacks images (H, W, 3) as (B, 3, H, W) uint8."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def _content(objects: tuple[SceneObject, ...]) -> str:
    return " + ".join(sorted(item.phrase for item in objects))
