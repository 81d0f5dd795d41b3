"""Examples → batches. Everything random in a training step is drawn here, from (seed, number of the sample) alone.

So sample n is the same on every machine, with any number of workers, processes and restarts: a resumed run needs no
random state, two processes see what one with twice the batch would, and diagnosis can repeat a batch exactly.
Dropping is only decided here; the training step does it (objective.py).

Legend: B batch, M caption tokens, (h, w) latent size, S side of CLIP's images, R reference images in the batch,
P different phrases in the batch, E entities with a phrase in the batch, A samples whose example is new.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from gligen.config import GroundingConfig, ModelConfig, TextEncoderConfig
from gligen.data.captions import tokenize_captions
from gligen.data.example import NO_IMAGE, Example, Fault, Source
from gligen.data.streams import Purpose, rng
from gligen.grounding import Readers, image_key, kind_of
from gligen.grounding.inpainting import boxes_mask, mask_to_latent
from gligen.image_files import ImageSource
from gligen.images import fit, label_tensor
from gligen.modules.position_net import GroundingInputs
from gligen.modules.wordpiece import WordPiece
from gligen.request import Entity
from gligen.training.engine.step import map_tensors
from gligen.training.kept import Rounds
from gligen.training.presets import TrainConfig

HIGH_NOISE = (0.6, 0.9)  # fractions of T between which a diagnosis draws timesteps: where layout is decided


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What B samples hold before and after encoding: their grounding and all their randomness."""

    grounding: GroundingInputs  # inputs of the tokenizer
    timesteps: Tensor  # (B,) int64
    noise: Tensor  # (B, C, h, w), the ε to predict
    posterior_noise: Tensor  # (B, C, h, w), of the autoencoder
    drop_caption: Tensor  # (B,) bool
    drop_grounding: Tensor  # (B,) bool
    drop_map: Tensor  # (B,) bool, of a map's extra channels; its tokens stay
    keep: Tensor | None = None  # (B, 1, h, w) inpainting's keep mask: 0 where to repaint

    def __len__(self) -> int:
        return len(self.timesteps)

    def to(self, device: torch.device) -> Self:
        return map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        return map_tensors(self, Tensor.pin_memory)


@dataclass(frozen=True, kw_only=True)
class Batch(Samples):
    """Samples as their examples are, on the CPU: `Objective.encode` makes an EncodedBatch of them.

    Of what has a slot here, text_features and image_features of the grounding are still 0.
    """

    images: Tensor | None = None  # (B, 3, H, W) uint8; (A, 3, H, W) of `new`
    latents: tuple[Tensor, Tensor] | None = None  # in their place, stored with the set: mean and logvar (B, C, h, w)
    ids: Tensor | None = None  # (B, M) caption; (A, M)
    examples: Tensor | None = None  # (B,) int64 numbers of examples that come again, under which encodings are kept
    new: Tensor | None = None  # (A,) int64 which samples have images and captions, where examples come again
    phrases: tuple[str, ...] = ()  # (P,)
    phrase_slots: Tensor  # (E, 3) int64: sample, entity and phrase of each
    references: Tensor | None = None  # (R, 3, S, S) uint8 reference images
    reference_slots: Tensor  # (R, 2) int64: sample and entity of each
    faults: tuple[Fault, ...] = ()  # of what examples stand in for bad ones, to be counted


@dataclass(frozen=True, kw_only=True)
class EncodedBatch(Samples):
    """Samples that the frozen encoders have read, on their device. All batches of a run have the same shapes."""

    mean: Tensor  # (B, C, h, w) of the latents' posterior, unscaled
    logvar: Tensor  # (B, C, h, w)
    context: Tensor  # (B, M, D) the captions' states


@dataclass(frozen=True, kw_only=True)
class GroundingBatches:
    """Samples of one mode, collated: `batches.batch(numbers)`.

    source: of examples, one image size a batch, no more entities or people than the model takes.
    series: of what is drawn about samples (gligen/data/streams.py).
    cache, reuse: how many examples there are before they come again, and how (`Rounds`); 0 is all of the source. What
        is known of them is kept, but not their images.
    """

    source: Source
    series: int
    grounding: GroundingConfig
    latent_shape: tuple[int, int, int]  # C, h, w; of buckets, that of images whose pixels are not there
    factor: int  # pixels a latent cell
    tokenize: Callable[[Sequence[str]], Tensor]  # captions -> (B, M) int64
    reference_size: int = 0  # pixels a side of reference images; 0 where the mode has none
    timesteps: tuple[int, int] = (0, 999)  # first and last that may be drawn
    caption_drop: float = 0.0
    grounding_drop: float = 0.0
    map_drop: float = 0.0
    feature_drop: float = 0.0
    stroke_masks: float = 0.0
    cache: int = 0
    reuse: int = 0
    known: dict[int, Example] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def build(cls, config: TrainConfig, model: ModelConfig, source: Source, series: int) -> GroundingBatches:
        """The batches of a run. Raises ValueError for timesteps that the model does not have."""
        grounding = model.unet.grounding
        assert grounding is not None  # build_networks adds it
        last = model.schedule.timesteps - 1
        if config.timestep_high > last:
            raise ValueError(f"timestep_high is {config.timestep_high}: the base model's last timestep is {last}")
        factor = model.vae.downsample_factor
        width, height = config.size or (model.image_size, model.image_size)
        takes_images = grounding.spec.takes_images and model.image_encoder is not None
        return cls(
            source=source,
            series=series,
            grounding=grounding,
            latent_shape=(model.vae.latent_channels, height // factor, width // factor),
            factor=factor,
            tokenize=tokenizer(model.text_encoder, config.vocab),
            reference_size=model.image_encoder.image_size if takes_images and model.image_encoder else 0,
            timesteps=(config.timestep_low, config.timestep_high),
            caption_drop=config.caption_drop,
            grounding_drop=config.grounding_drop,
            map_drop=config.map_drop,
            feature_drop=config.feature_drop,
            stroke_masks=config.stroke_masks,
            cache=config.cache,
            reuse=config.reuse,
        )

    def held_out(self, total_timesteps: int) -> GroundingBatches:
        """The same at high noise, and nothing is dropped: what diagnosis compares on."""
        low, high = (int(share * total_timesteps) for share in HIGH_NOISE)
        drops = dict.fromkeys(("caption_drop", "grounding_drop", "map_drop", "feature_drop", "stroke_masks"), 0.0)
        return dataclasses.replace(self, timesteps=(low, high), cache=0, reuse=0, **drops)  # type: ignore[arg-type]

    @property
    def rounds(self) -> Rounds | None:
        """How examples come again, if they do."""
        return Rounds(size=self.cache, reuse=self.reuse) if self.cache else None

    def batch(
        self,
        numbers: Iterable[int],
        begin: int | None = None,
        *,
        asked: Callable[[int], Example | None] | None = None,
    ) -> Batch:
        """The samples of these numbers. A pure function.

        begin: the first sample that was asked for; examples that have come since then come without image and caption.
        asked: another example whose grounding sample n gets; image, caption and all that is random stay its own.
        """
        numbers = list(numbers)  # (B,)
        if self.rounds is None:
            examples, which, new = [self.source.example(number) for number in numbers], None, None
        else:
            examples, which, new = self._repeated(numbers, begin, self.rounds)
        images, ids = self._encodable(examples if new is None else [examples[i] for i in new])
        latents = self._latents(examples)
        if asked is not None:  # after images and captions were taken: these stay the samples' own
            examples = [asked(number) or example for number, example in zip(numbers, examples, strict=True)]
        # by the sample's number and not the example's: one that comes again has other noise, timestep and drops
        draws = [_Draws.make(self, n, example) for n, example in zip(numbers, examples, strict=True)]
        spec = self.grounding.spec
        examples = [self._ask(e, drawn) for e, drawn in zip(examples, draws, strict=True)]
        # an example's map has its size
        readers = Readers(phrases=self._no_phrase_features, images=self._no_image_features, size=(0, 0))
        grounding = kind_of(spec).inputs(examples, self.grounding, readers)
        phrases, phrase_slots = self._phrases(examples)
        references, reference_slots = self._references(examples, grounding)
        keep = None
        if spec.is_inpainting:
            keep = torch.stack([self._keep(e, drawn) for e, drawn in zip(examples, draws, strict=True)])
        return Batch(
            images=images,
            latents=latents,
            ids=ids,
            grounding=grounding,
            timesteps=torch.tensor([drawn.timestep for drawn in draws]),
            noise=torch.from_numpy(np.stack([drawn.noise[0] for drawn in draws])),
            posterior_noise=torch.from_numpy(np.stack([drawn.noise[1] for drawn in draws])),
            drop_caption=torch.tensor([drawn.drop_caption for drawn in draws]),
            drop_grounding=torch.tensor([drawn.drop_grounding for drawn in draws]),
            drop_map=torch.tensor([drawn.drop_map for drawn in draws]),
            examples=None if which is None else torch.tensor(which),
            new=None if new is None else torch.tensor(new, dtype=torch.int64),
            keep=keep,
            phrases=phrases,
            phrase_slots=phrase_slots,
            references=references,
            reference_slots=reference_slots,
            faults=tuple(fault for example in examples for fault in example.faults),
        )

    def encodable(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) uint8 and ids (B, M) of examples that come again."""
        images, ids = self._encodable([self.source.example(number) for number in numbers])
        assert images is not None
        assert ids is not None
        return images, ids

    def shape_of(self, example: Example) -> tuple[int, int, int]:
        """The shape (C, h, w) of the example's latent."""
        H, W, _ = example.image.shape
        if not H:  # pixels were not read: latents are stored, or kept since the example came first
            return self.latent_shape
        return self.latent_shape[0], H // self.factor, W // self.factor

    def _repeated(
        self, numbers: Sequence[int], begin: int | None, rounds: Rounds
    ) -> tuple[list[Example], list[int], list[int]]:
        """Samples' examples where these come again, their numbers, and the positions (A,) of those that are new."""
        which = [rounds.example(number) for number in numbers]
        is_new = [begin is None or rounds.is_new(number, begin) for number in numbers]
        examples = [self._known_example(number, is_whole) for number, is_whole in zip(which, is_new, strict=True)]
        return examples, which, [i for i, is_whole in enumerate(is_new) if is_whole]

    def _known_example(self, number: int, is_whole: bool) -> Example:
        """Makes an example that is whole, and what was kept of one that has come: all but its image."""
        example = None if is_whole else self.known.get(number)
        if example is None:
            example = self.source.example(number)
            self.known[number] = dataclasses.replace(example, image=NO_IMAGE)  # pixels would fill the memory
        return example

    def _encodable(self, examples: Sequence[Example]) -> tuple[Tensor | None, Tensor | None]:
        if not examples:
            return None, None
        ids = self.tokenize([example.caption for example in examples])
        if all(example.latents is not None for example in examples):
            return None, ids
        images = torch.from_numpy(np.stack([example.image for example in examples]))  # (A, H, W, 3) uint8
        return images.permute(0, 3, 1, 2).contiguous(), ids  # (A, 3, H, W), (A, M)

    def _latents(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor] | None:
        """Mean and logarithm of the variance (B, C, h, w) of latents that are stored."""
        stored = [example.latents for example in examples if example.latents is not None]
        if not stored:
            return None
        if len(stored) < len(examples):
            raise ValueError("some sets have stored latents and others not: build them all, or none, with --latents")
        mean, logvar = (torch.from_numpy(np.stack(kind)) for kind in zip(*stored, strict=True))
        return mean, logvar

    def _ask(self, example: Example, drawn: _Draws) -> Example:
        """The example with the entities that are asked for. Inpainting asks for a random part of them, so that the rest
        is known context (the original always repaints all)."""
        spec = self.grounding.spec
        items = list(range(len(example.entities)))
        if spec.is_inpainting:
            order = sorted(items, key=lambda i: drawn.by_entity[i][0])
            # back in the example's order, as entities stand without inpainting
            items = sorted(order[: 1 + int(drawn.share * len(order))])
        entities = []
        for i in items:
            phrase = example.entities[i].phrase
            reference = example.references[i] if example.references and self.reference_size else None
            image = None if reference is None else Image.fromarray(reference)
            _, dropped, which = drawn.by_entity[i]
            if image is not None and dropped < self.feature_drop:  # never both
                phrase, image = (phrase, None) if which < 0.5 else ("", image)
            entities.append(Entity(phrase=phrase, image=image, box=example.entities[i].box))
        features = tuple(example.reference_features[i] for i in items) if example.reference_features else ()
        return dataclasses.replace(example, entities=tuple(entities), reference_features=features)

    def _no_phrase_features(self, phrases: Sequence[str]) -> dict[str, Tensor]:
        """Phrases and reference images are encoded on the model's device; until then their features are 0."""
        return dict.fromkeys(phrases, torch.zeros(self.grounding.feature_dim))

    def _no_image_features(self, images: Sequence[ImageSource]) -> dict[str | int, Tensor]:
        return dict.fromkeys(map(image_key, images), torch.zeros(self.grounding.feature_dim))

    def _phrases(self, examples: Sequence[Example]) -> tuple[tuple[str, ...], Tensor]:
        numbered: dict[str, int] = {}
        slots = [
            (b, n, numbered.setdefault(entity.phrase, len(numbered)))
            for b, example in enumerate(examples)
            for n, entity in enumerate(example.entities)
            if entity.phrase
        ]
        return tuple(numbered), torch.tensor(slots, dtype=torch.int64).reshape(-1, 3)

    def _references(self, examples: Sequence[Example], grounding: GroundingInputs) -> tuple[Tensor | None, Tensor]:
        """Reference images and their slots. Those whose features are stored with the set need no encoding: the features
        are put into the grounding inputs (B, N, F) here."""
        images, slots = [], []
        for b, example in enumerate(examples):
            for n, entity in enumerate(example.entities):
                if not isinstance(entity.image, Image.Image):
                    continue
                if example.reference_features:
                    grounding["image_features"][b, n] = torch.tensor(example.reference_features[n])
                else:
                    images.append(np.array(fit(entity.image, self.reference_size, self.reference_size)))
                    slots.append((b, n))
        references = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous() if images else None
        return references, torch.tensor(slots, dtype=torch.int64).reshape(-1, 2)  # (R, 3, S, S) uint8, (R, 2)

    def _keep(self, example: Example, drawn: _Draws) -> Tensor:
        """The keep mask (1, h, w): what the example says, or the boxes, or strokes within them."""
        _, h, w = self.shape_of(example)
        if example.mask is not None:
            mask = Image.fromarray(example.mask)
            return mask_to_latent((label_tensor(mask) > 127).float(), mask.height // h)
        if drawn.strokes >= self.stroke_masks:
            return boxes_mask(torch.tensor([[entity.box for entity in example.entities]]), h, w)[0]
        height, width = 8 * h, 8 * w  # pixels, fine enough for strokes whatever the autoencoder's factor
        mask = Image.new("L", (width, height))
        draw = ImageDraw.Draw(mask)
        strokes = rng(self.series, drawn.number, Purpose.MASK)  # a stream of its own: other draws do not move with it
        for entity in example.entities:
            x0, y0, x1, y1 = (side * value for side, value in zip((width, height) * 2, entity.box, strict=True))
            # of the shorter side, so that strokes leave part of the box as it is
            thickness = max(2, round(0.3 * min(x1 - x0, y1 - y0)))
            points = [(x0 + u * (x1 - x0), y0 + v * (y1 - y0)) for u, v in strokes.random((6, 2)).tolist()]
            draw.line(points, fill=255, width=thickness, joint="curve")
        return mask_to_latent((label_tensor(mask) > 0).float(), height // h)


def tokenizer(encoder: TextEncoderConfig, vocab: str | None) -> Callable[[Sequence[str]], Tensor]:
    """Returns a function from captions to ids (B, M), in the base's own vocabulary. vocab: the file of an LDM's."""
    if encoder.kind == "clip":
        return Tokenize(encoder.context_length, encoder.vocab_size)
    assert vocab is not None  # open_base asks for it
    return TokenizePieces(encoder.context_length, WordPiece(vocab))


@dataclass(frozen=True)
class TokenizePieces:
    """Ids (B, M) of captions, in the vocabulary of LDM text2img-large: word pieces."""

    context_length: int
    vocabulary: WordPiece

    def __call__(self, captions: Sequence[str]) -> Tensor:
        return torch.tensor([self.vocabulary.encode(text, self.context_length)[0] for text in captions])


@dataclass(frozen=True)
class Tokenize:
    """Ids (B, M) of captions, in CLIP's vocabulary."""

    context_length: int
    vocab_size: int

    def __call__(self, captions: Sequence[str]) -> Tensor:
        return tokenize_captions(captions, self.context_length, self.vocab_size)


@dataclass(frozen=True, kw_only=True)
class _Draws:
    """What is random about one sample beside its example."""

    number: int
    timestep: int
    drop_caption: bool
    drop_grounding: bool
    drop_map: bool
    strokes: float  # below `stroke_masks`: strokes in place of boxes
    share: float  # of the entities, that inpainting repaints
    by_entity: list[list[float]]  # of each: its place in that draw, whether a feature is dropped, and which
    noise: np.ndarray  # (2, C, h, w) float32

    @classmethod
    def make(cls, batches: GroundingBatches, number: int, example: Example) -> _Draws:
        random = rng(batches.series, number, Purpose.SAMPLE)
        # always the same draws in the same order, used or not: an option that is off does not change the others
        t, caption, grounding, strokes, share = random.random(5).tolist()
        low, high = batches.timesteps
        return cls(
            number=number,
            timestep=low + int(t * (high + 1 - low)),
            drop_caption=caption < batches.caption_drop,
            drop_grounding=grounding < batches.grounding_drop,
            drop_map=strokes < batches.map_drop,  # a map has no strokes, so their number is free
            strokes=strokes,
            share=share,
            by_entity=random.random((max(4, len(example.entities)), 3)).tolist(),
            # ε and the posterior's; last, since how many there are depends on the image's size
            noise=random.standard_normal((2, *batches.shape_of(example)), dtype=np.float32),
        )
