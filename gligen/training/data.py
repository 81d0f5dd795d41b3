"""The examples that a run learns from, on which it is diagnosed, and which its previews ask for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from gligen.config import ModelConfig
from gligen.data.drawn import SceneSource
from gligen.data.encoded import EncodedSource, stored_latents
from gligen.data.example import Fault, Source
from gligen.data.faults import FaultLog
from gligen.data.geometry import MULTIPLE, Buckets
from gligen.data.order import Repeated, Sized
from gligen.data.prepare import Prepared
from gligen.data.sets import open_sets
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
    found: tuple[str, ...] = ()
    facts: Mapping[str, str] = field(default_factory=lambda: {"set of pictures": "drawn"})  # wherever they lie
    faults: FaultLog | None = None

    def count(self, faults: Iterable[Fault]) -> None:
        """Logs the first of each kind of fault. Raises ValueError, with the reasons, when there are too many."""
        if self.faults is not None:
            self.faults.add(faults)


def open_data(config: TrainConfig, model: ModelConfig, vae_fingerprint: Callable[[], str] | None = None) -> Data:
    """The drawn world, or the sets that --data names.

    vae_fingerprint: of the base's autoencoder, so that latents which a built set stores can be used.
    Raises ValueError or FileNotFoundError, one line, for sets that cannot be used, and for timesteps that the model
    does not have.
    """
    return _open_sets(config, model, vae_fingerprint) if config.data else _drawn(config, model)


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


def _open_sets(config: TrainConfig, model: ModelConfig, vae_fingerprint: Callable[[], str] | None) -> Data:
    size = config.size or (model.image_size, model.image_size)
    if odd := [side for side in size if side % model.size_multiple]:
        raise ValueError(f"size has {odd[0]}: this base needs multiples of {model.size_multiple} pixels")
    series = Series.TRAINING + config.seed
    stored: list[str] = []
    encoded: set[bool] = set()  # of each set, whether its stored latents are used
    base = round((size[0] * size[1]) ** 0.5 / MULTIPLE) * MULTIPLE
    buckets = Buckets(max(MULTIPLE, base)) if config.buckets else None

    def with_latents(source: Source) -> Source:
        if vae_fingerprint is None:
            return source
        is_plain = config.crop == "center" and not config.flip
        source, line = stored_latents(
            source,
            None if buckets is not None else (size[0], size[1]),
            vae_fingerprint,
            base=config.base,
            is_plain=is_plain,
        )
        encoded.add(isinstance(source, EncodedSource))
        if isinstance(source, EncodedSource) and config.cache:
            raise ValueError(f"cache is {config.cache}, but '{source.source.path}' stores its latents already: give 0")
        stored.extend([line] if line else [])
        return source

    sets = open_sets(
        config.data,
        config.mode,
        series=series,
        held_out=config.held_out,
        max_bad=config.max_bad,
        captions=config.captions_file,
        images=config.images,
        maps=config.maps,
        masks=config.masks,
        change=with_latents,
        buckets=buckets,
        batch_size=config.batch_size,
    )

    if len(encoded) > 1:
        raise ValueError("some sets have stored latents and others not: build them all, or none, with --latents")

    def prepared(source: Source, series: int, *, is_training: bool) -> Prepared:
        image_size: tuple[int, int] | Sized = (size[0], size[1])
        if buckets is not None and is_training and isinstance(sets.training, Sized):
            image_size = sets.training
        return Prepared(
            source=source,
            mode=get_mode(config.mode),
            image_size=image_size,
            series=series,
            crop=config.crop if is_training else "center",
            flip=config.flip if is_training else 0.0,
            captions=config.captions,
            maps=sets.made_maps,
            max_boxes=config.max_entities,
            max_persons=config.max_persons,
        )

    training = GroundingBatches.build(config, model, prepared(sets.training, series, is_training=True), series)
    compared, count = sets.held_out, sets.held_out.size if sets.held_out is not None else None
    if compared is None:
        compared, note = (
            sets.training,
            "nothing is held out: diagnosis and previews are on pictures that are trained on",
        )
    elif count is not None and count < 2:
        raise ValueError(f"{count} picture is held out, and each is compared with another: raise --held-out, or give 0")
    else:
        note = f"{count} pictures are held out for diagnosis and previews (--held-out {config.held_out:g})"
        if count is not None and count < FEW:
            note += f", which is few to judge a run by: --held-out {min(2.5 * config.held_out, 0.5):g} holds out more"
    other = Series.DIAGNOSIS + config.seed
    again = prepared(compared if count is None else Repeated(compared), other, is_training=False)
    held_out = GroundingBatches.build(config, model, again, other).held_out(model.schedule.timesteps)
    found = [line for findings in sets.findings for line in findings.lines()]
    return Data(
        training=training,
        held_out=held_out,
        preview=prepared(compared, other, is_training=False),
        held_out_size=count,
        found=(*found, *sets.notes, *stored, note),
        facts={
            "set of pictures": _order(sets.training) + (f", batches of {config.batch_size}" if buckets else ""),
            "set of captions, phrases, boxes, keypoints, maps or masks": sets.fingerprint,
        },
        faults=sets.fault_log(),
    )


def _order(source: Source) -> str:
    """Of the order in which the first examples come, by their keys: other pictures, weights or seeds give another."""
    digest = hashlib.sha256()
    for n in range(FINGERPRINTED):
        digest.update(source.key(n).encode() + b"\0")
    return digest.hexdigest()[:16]
