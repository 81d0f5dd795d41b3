"""The examples that a run learns from, on which it is diagnosed, and which its previews ask for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from gligen.config import ModelConfig
from gligen.data.drawn import SceneSource
from gligen.data.encoded import Encoded, open_encoded
from gligen.data.encodings import Array
from gligen.data.example import Fault, Source
from gligen.data.faults import FaultLog
from gligen.data.geometry import MULTIPLE, Buckets
from gligen.data.order import Repeated, Sized
from gligen.data.prepare import Prepared
from gligen.data.sets import Sets, open_sets
from gligen.data.streams import Series
from gligen.modes import get_mode
from gligen.training.batches import GroundingBatches
from gligen.training.presets import TrainConfig

FINGERPRINTED = 1000  # examples
FEW = 8  # pictures, of which a diagnosis says little about others


@dataclass(frozen=True, kw_only=True)
class Data:
    """held_out: examples that are never trained on, at high noise, with nothing dropped. preview: others, or the same.

    held_out_size: how many there are before they come again; None: no end. found: for people, what was understood of
    the sets.
    """

    training: GroundingBatches
    held_out: GroundingBatches
    preview: Source
    held_out_size: int | None = None
    phrases: Sequence[Mapping[str, Array]] = ()  # features that sets store, by phrase
    found: tuple[str, ...] = ()
    facts: Mapping[str, str] = field(default_factory=lambda: {"set of pictures": "drawn"})  # wherever they lie
    faults: FaultLog | None = None

    def count(self, faults: Iterable[Fault]) -> None:
        """Logs the first of each kind of fault. Raises ValueError, with the reasons, when there are too many."""
        if self.faults is not None:
            self.faults.add(faults)


def open_data(config: TrainConfig, model: ModelConfig, fingerprint: Callable[[str], str] | None = None) -> Data:
    """The drawn world, or the sets that --data names.

    fingerprint: of the run's encoder of a part ('latents', 'phrases', 'references'), so that encodings which a built
    set stores can be used; None uses none.
    Raises ValueError or FileNotFoundError, one line, for sets that cannot be used, and for timesteps that the model
    does not have.
    """
    return _open_sets(config, model, fingerprint) if config.data else _drawn(config, model)


def _drawn(config: TrainConfig, model: ModelConfig) -> Data:
    def source(series: Series) -> SceneSource:
        return SceneSource(
            mode=config.mode,
            series=series + config.seed,
            image_size=model.image_size,
            pairs=config.pairs,
            captions=config.captions,
            places=config.places,
        )

    def batches(series: Series) -> GroundingBatches:
        return GroundingBatches.build(config, model, source(series), series + config.seed)

    return Data(
        training=batches(Series.TRAINING),
        held_out=batches(Series.DIAGNOSIS).held_out(model.schedule.timesteps),
        preview=SceneSource(mode=config.mode, series=Series.PREVIEW + config.seed, image_size=model.image_size),
    )


def _open_sets(config: TrainConfig, model: ModelConfig, fingerprint: Callable[[str], str] | None) -> Data:
    width, height = config.size or (model.image_size, model.image_size)
    if odd := [side for side in (width, height) if side % model.size_multiple]:
        raise ValueError(f"size has {odd[0]}: this base needs multiples of {model.size_multiple} pixels")
    training_series, other_series = Series.TRAINING + config.seed, Series.DIAGNOSIS + config.seed
    base = round((width * height) ** 0.5 / MULTIPLE) * MULTIPLE
    buckets = Buckets(max(MULTIPLE, base)) if config.buckets else None
    encoded: list[Encoded] = []

    def with_encodings(source: Source) -> Source:
        if fingerprint is None:
            return source
        size = None if buckets is not None else (width, height)
        is_plain = config.crop == "center" and not config.flip
        encoded.append(open_encoded(source, size, fingerprint, base=config.base, is_plain=is_plain))
        return encoded[-1].source

    sets = open_sets(
        config.data,
        config.mode,
        series=training_series,
        held_out=config.held_out,
        max_bad=config.max_bad,
        captions=config.captions_file,
        images=config.images,
        maps=config.maps,
        masks=config.masks,
        change=with_encodings,
        buckets=buckets,
        batch_size=config.batch_size,
    )
    _check_latents([each.has_latents for each in encoded], config)
    compared, count, note = _compared(sets, config.held_out)
    prepared = partial(
        Prepared,
        mode=get_mode(config.mode),
        image_size=(width, height),
        captions=config.captions,
        maps=sets.made_maps,
        max_boxes=config.max_entities,
        max_persons=config.max_persons,
    )
    training = prepared(source=sets.training, series=training_series, crop=config.crop, flip=config.flip)
    if buckets is not None and isinstance(sets.training, Sized):
        training = replace(training, image_size=sets.training)
    held_out = prepared(source=compared if count is None else Repeated(compared), series=other_series)
    found = [line for findings in sets.findings for line in findings.lines()]
    return Data(
        training=GroundingBatches.build(config, model, training, training_series),
        held_out=GroundingBatches.build(config, model, held_out, other_series).held_out(model.schedule.timesteps),
        preview=prepared(source=compared, series=other_series),
        held_out_size=count,
        phrases=[each.phrases for each in encoded],
        found=(*found, *sets.notes, *(line for each in encoded for line in each.lines), note),
        facts={
            "set of pictures": _order(sets.training) + (f", batches of {config.batch_size}" if buckets else ""),
            "set of captions, phrases, boxes, keypoints, maps or masks": sets.fingerprint,
        },
        faults=sets.fault_log(),
    )


def _check_latents(has_latents: Sequence[bool], config: TrainConfig) -> None:
    if any(has_latents) and not all(has_latents):
        raise ValueError("some sets have stored latents and others not: build them all, or none, with --latents")
    if any(has_latents) and config.cache:
        raise ValueError(f"cache is {config.cache}, but stored latents are used already: give 0")


def _compared(sets: Sets, share: float) -> tuple[Source, int | None, str]:
    """What diagnosis and previews show, how many there are (None: no end), and a line that says so."""
    if sets.held_out is None:
        return sets.training, None, "nothing is held out: diagnosis and previews are on pictures that are trained on"
    count = sets.held_out.size
    if count is not None and count < 2:
        raise ValueError(f"{count} picture is held out, and each is compared with another: raise --held-out, or give 0")
    note = f"{count} pictures are held out for diagnosis and previews (--held-out {share:g})"
    if count is not None and count < FEW:
        note += f", which is few to judge a run by: --held-out {min(2.5 * share, 0.5):g} holds out more"
    return sets.held_out, count, note


def _order(source: Source) -> str:
    """Of the order in which the first examples come, by their keys: other pictures, weights or seeds give another."""
    digest = hashlib.sha256()
    for n in range(FINGERPRINTED):
        digest.update(source.key(n).encode() + b"\0")
    return digest.hexdigest()[:16]
