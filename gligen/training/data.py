"""Which examples a run learns from, and on which it is diagnosed."""

from __future__ import annotations

from gligen.config import ModelConfig
from gligen.data.drawn import SceneSource
from gligen.data.streams import Series
from gligen.training.batches import GroundingBatches
from gligen.training.presets import TrainConfig


def drawn_source(config: TrainConfig, model: ModelConfig, series: Series) -> SceneSource:
    """The drawn world as this run wants it."""
    return SceneSource(
        mode=config.mode,
        series=series + config.seed,
        image_size=model.image_size,
        pairs=config.pairs,
        captions=config.captions,
        places=config.places,
    )


def training_batches(config: TrainConfig, model: ModelConfig) -> GroundingBatches:
    """Raises ValueError for timesteps that the model does not have."""
    source = drawn_source(config, model, Series.TRAINING)
    return GroundingBatches.build(config, model, source, source.series)


def held_out_batches(config: TrainConfig, model: ModelConfig) -> GroundingBatches:
    """Examples that are never trained on, at high noise, with nothing dropped."""
    source = drawn_source(config, model, Series.DIAGNOSIS)
    return GroundingBatches.build(config, model, source, source.series).held_out(model.schedule.timesteps)
