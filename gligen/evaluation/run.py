"""A model measured on held-out drawn scenes: scenes → requests → images → metrics.

    evaluation = evaluate_scenes(gligen.load("base.safetensors", adapter="adapter.safetensors"), Settings(requests=100))
    evaluation.metrics["objects"]["all"]["found"]  # {"value": 0.93, "spread": 0.01}

Which metrics there are depends on the mode; `evaluate_scenes` lists them.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from gligen.config import ModelConfig
from gligen.data.drawn import draw_scene
from gligen.data.maps import SHAPE_LABELS, semantic_map
from gligen.data.requests import asked_objects, scene_request
from gligen.data.scenes import Scene, SceneObject, detection_caption
from gligen.data.streams import Series
from gligen.evaluation.detector import Detection, detect, predict_labels
from gligen.evaluation.metrics import frechet_distance
from gligen.evaluation.scenes import keypoint_distances, score_image, summarize, summarize_keypoints
from gligen.evaluation.settings import NOISE_STRIDE, Settings
from gligen.fields import MAX_SEED
from gligen.images import fit, to_tensor
from gligen.modes import MAP_MODES, Mode
from gligen.modules.clip import CLIPImageEncoder
from gligen.pipeline import OnStep, Pipeline, Sample
from gligen.request import Request

__all__ = ["Ask", "Evaluation", "GeneratedImage", "Settings", "evaluate_scenes", "make_asks"]

RESAMPLES = 100  # of the images, for spreads that `summarize` does not give
FID_RESAMPLES = 20

T = TypeVar("T")
Metrics = dict[str, Any]  # plain JSON data; a metric with a spread is {"value": x, "spread": s}


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A scene and the request for it. The files that a request names are there only while its image is generated."""

    scene: Scene
    request: Request
    asked: tuple[SceneObject, ...]  # the scene's objects that the request is about; none where it asks for people


@dataclass(frozen=True, kw_only=True)
class GeneratedImage(Ask):
    """A scene, its request and the image generated for it."""

    image: Image.Image

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """The image as an array (H, W, 3)."""
        return np.asarray(self.image)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Metrics as plain JSON data, and the images, in the order of their scenes."""

    mode: str
    metrics: Metrics
    images: tuple[GeneratedImage, ...]


def evaluate_scenes(
    pipe: Pipeline,
    settings: Settings,
    image_encoder: CLIPImageEncoder | None = None,
    base: Pipeline | None = None,
    on_step: OnStep | None = None,
) -> Evaluation:
    """Asks for held-out scenes, generates and measures them.

    image_encoder: for FID; None is the pipeline's own, and no FID if it has none. base: the model before it was taught,
    to see what is forgotten. on_step: as for Pipeline.generate.

    Metrics, by mode (spreads are standard deviations over resampled sets of images):
    objects: gligen.evaluation.scenes.Report of all modes but keypoint; for inpainting of the object to be generated,
        where what lies around it is not spare.
    by_phrase, by_picture: the same, for objects asked for in one way alone (modes with reference images).
    joints: gligen.evaluation.scenes.summarize_keypoints (keypoint).
    labels: mean IoU of the semantic map that is seen and that of the scene ('sem').
    silhouettes: mean IoU of objects and background, whatever their shape and colour (map modes).
    kept: how far what inpainting keeps is from the autoencoder's reconstruction and from the image itself, in levels
        of 255: `mean` over the kept pixels, `largest` of an image, `max` of all.
    max_difference: with a base, and nothing grounded: of the first batch's latents from the base's own of the same
        captions and noise; 0 if nothing is forgotten.
    fid: Fréchet distance of CLIP's features of the images and of as many other drawn scenes; `floor`: the same of
        the scenes asked for, which is what perfect images would have.

    Raises ValueError before generating for a model or settings that do not fit together.
    """
    mode = settings.check_mode(pipe.mode)
    with tempfile.TemporaryDirectory() as folder:
        asks = make_asks(settings, pipe.config, mode, Path(folder))
        images, samples = generate(pipe, asks, settings, on_step)
        metrics = _kept_metrics(pipe, images) if mode.is_inpainting else {}  # needs the files
    metrics |= {"joints": _keypoint_metrics(images)} if mode.kind == "keypoint" else _object_metrics(images, mode)
    if mode.is_map:
        metrics |= _map_metrics(images, mode)
    if base is not None and settings.ungrounded:
        metrics["max_difference"] = _difference(samples[: settings.batch_size], base)
    encoder = image_encoder or pipe.image_encoder
    metrics["fid"] = None
    if encoder is not None and len(images) > 1:
        others = [make(settings, pipe.config, mode, Series.REFERENCE, i).image for i in range(settings.requests)]
        metrics["fid"] = _fid_metrics(images, others, encoder, settings.batch_size)
    return Evaluation(mode=mode.name, metrics=metrics, images=images)


def make_asks(settings: Settings, config: ModelConfig, mode: Mode, folder: Path) -> list[Ask]:
    """The requests of an evaluation, always the same; images they ask with are written into `folder`."""
    scenes = [make(settings, config, mode, Series.EVALUATION, i) for i in range(settings.requests)]
    return [make_ask(scene, i, settings, mode, folder) for i, scene in enumerate(scenes)]


def make_ask(scene: Scene, number: int, settings: Settings, mode: Mode, folder: Path) -> Ask:
    """The request for a scene, the evaluation's `number`-th, as its settings have it generated."""
    request = dataclasses.replace(
        scene_request(scene, mode.name, folder),
        seed=settings.seed * NOISE_STRIDE + number,
        sampler=settings.sampler,
        steps=settings.steps,
        guidance=settings.guidance,
        schedule=settings.gate_schedule,
    )
    if settings.captions != "full":
        prompt = detection_caption(scene) if settings.captions == "detection" else ""
        request = dataclasses.replace(request, prompt=prompt)
    return Ask(scene=scene, request=request, asked=asked_objects(scene, mode))


def generate(
    pipe: Pipeline, asks: Sequence[Ask], settings: Settings, on_step: OnStep | None = None
) -> tuple[tuple[GeneratedImage, ...], list[Sample]]:
    """Generates their images, in their order; the files they ask with have to be there."""
    unsorted = pipe.generate([ask.request for ask in asks], batch_size=settings.batch_size, on_step=on_step)
    samples = sorted(unsorted, key=lambda sample: sample.index)
    images = tuple(
        GeneratedImage(scene=ask.scene, request=sample.request, asked=ask.asked, image=sample.image)
        for ask, sample in zip(asks, samples, strict=True)
    )
    return images, samples


def make(settings: Settings, config: ModelConfig, mode: Mode, series: int, index: int) -> Scene:
    """Scene `index` of one of the series, of the kind that the mode asks for and the size that the model generates."""
    assert settings.seed < MAX_SEED  # Settings refuses others, so that series stay apart
    return draw_scene(
        mode, series + settings.seed, index, size=config.image_size, pairs=settings.pairs, places=settings.places
    )


def _object_metrics(images: Sequence[GeneratedImage], mode: Mode) -> Metrics:
    found = [detect(image.pixels) for image in images]

    def report(subsets: Sequence[Sequence[SceneObject]]) -> Metrics:
        """Metrics of some of the scenes' objects; what is seen of the others is left out."""
        left = [
            _without_others(detections, image.scene.objects, subset)
            for detections, image, subset in zip(found, images, subsets, strict=True)
        ]
        return summarize(left, subsets).to_dict()

    metrics = {"objects": report([image.asked for image in images])}
    if mode.takes_images:
        for name, is_picture in (("by_phrase", False), ("by_picture", True)):
            entities = [zip(image.asked, image.request.entities, strict=True) for image in images]
            metrics[name] = report(
                [[item for item, entity in pairs if (entity.image is not None) is is_picture] for pairs in entities]
            )
    return metrics


def _without_others(
    detections: Sequence[Detection], objects: Sequence[SceneObject], subset: Sequence[SceneObject]
) -> list[Detection]:
    """The detections less the partners of the scene's objects that are not in the subset."""
    others = [result.detection for result in score_image(detections, objects) if result.asked not in subset]
    return [detection for detection in detections if not any(detection is other for other in others)]


def _keypoint_metrics(images: Sequence[GeneratedImage]) -> Metrics:
    distances = [keypoint_distances(image.pixels, image.request.keypoints) for image in images]

    def metric(name: str) -> Metrics:
        return resampled(lambda rows: summarize_keypoints(rows)[name], distances)

    return summarize_keypoints(distances) | {name: metric(name) for name in ("found", "distance", "near")}


def _map_metrics(images: Sequence[GeneratedImage], mode: Mode) -> Metrics:
    labels = [(predict_labels(image.pixels), semantic_map(image.scene)) for image in images]
    shapes = [((seen > 0).astype(np.uint8), (drawn > 0).astype(np.uint8)) for seen, drawn in labels]
    metrics = {"silhouettes": _iou_metric(shapes)}
    return metrics | ({"labels": _iou_metric(labels)} if mode.has_labels else {})


def _iou_metric(maps: Sequence[tuple[NDArray[np.uint8], NDArray[np.uint8]]]) -> Metrics:
    """gligen.evaluation.metrics.mean_iou of maps seen and drawn, from counts of each, so that resampling is cheap."""
    bins = len(SHAPE_LABELS) + 1

    def counts(seen: NDArray[np.uint8], drawn: NDArray[np.uint8]) -> NDArray[np.int64]:
        sets = (drawn[seen == drawn], seen.ravel(), drawn.ravel())
        return np.stack([np.bincount(each, minlength=bins) for each in sets])  # (3, classes)

    def iou(items: Sequence[NDArray[np.int64]]) -> float:
        both, seen, drawn = np.sum(items, axis=0)
        return float(np.mean((both / np.maximum(seen + drawn - both, 1))[drawn > 0]))

    return resampled(iou, [counts(seen, drawn) for seen, drawn in maps])


def _kept_metrics(pipe: Pipeline, images: Sequence[GeneratedImage]) -> Metrics:
    differences: dict[str, list[NDArray[np.int64]]] = {"reconstruction": [], "original": []}
    for image in images:
        reconstruction, is_kept = pipe.kept_image(image.request)
        kept = is_kept.numpy()
        for name, pixels in (("reconstruction", np.asarray(reconstruction)), ("original", image.scene.image)):
            difference = np.abs(image.pixels.astype(np.int64) - pixels)[kept]
            if difference.size:  # else all is repainted
                differences[name].append(difference)
    return {
        "kept": {
            name: {
                "mean": resampled(mean, [float(each.mean()) for each in rows]),
                "largest": resampled(mean, [float(each.max()) for each in rows]),
                "max": max((int(each.max()) for each in rows), default=None),
            }
            for name, rows in differences.items()
        }
    }


def _fid_metrics(
    images: Sequence[GeneratedImage], others: Sequence[NDArray[np.uint8]], encoder: CLIPImageEncoder, batch_size: int
) -> Metrics:
    generated, asked, other = (
        embed_images(encoder, pixels, batch_size)
        for pixels in ([each.image for each in images], [each.scene.image for each in images], others)
    )
    fid, floor = (
        resampled(lambda rows: frechet_distance(np.stack(rows), other), list(features), FID_RESAMPLES)
        for features in (generated, asked)
    )
    return {"pictures": fid, "floor": floor, "width": generated.shape[1]}


@torch.inference_mode()
def embed_images(
    encoder: CLIPImageEncoder, images: Sequence[Image.Image | NDArray[np.uint8]], batch_size: int = 32
) -> NDArray[np.float64]:
    """CLIP's embeddings (N, E) of images, in float32 whatever the encoder's precision."""
    weight = encoder.text_projection
    if weight.dtype != torch.float32:
        encoder = copy.deepcopy(encoder).float()
    size = encoder.config.image_size
    pixels = [to_tensor(fit(i if isinstance(i, Image.Image) else Image.fromarray(i), size, size)) for i in images]
    batches = [torch.stack(pixels[i : i + batch_size]).to(weight.device) for i in range(0, len(pixels), batch_size)]
    return torch.cat([encoder(encoder.preprocess(batch)).double().cpu() for batch in batches]).numpy()


def _difference(samples: Sequence[Sample], base: Pipeline) -> float:
    """Largest difference of a latent from the base's own, generated in one batch as these were."""
    nothing: dict[str, Any] = {"entities": (), "keypoints": (), "schedule": None} | dict.fromkeys(MAP_MODES)
    asked = [dataclasses.replace(sample.request, **nothing) for sample in samples]
    generated = sorted(base.generate(asked, batch_size=len(asked)), key=lambda sample: sample.index)
    pairs = zip(samples, generated, strict=True)
    return max((sample.latents - own.latents).abs().max().item() for sample, own in pairs)


def mean(values: Sequence[float]) -> float:
    """NaN without any."""
    return sum(values) / len(values) if values else math.nan


def resampled(metric: Callable[[list[T]], float | None], items: Sequence[T], times: int = RESAMPLES) -> Metrics:
    """A metric of some items and its standard deviation over resampled sets of them; None where it is undefined."""
    rng = np.random.default_rng(0)
    sets = [list(items)] + [[items[k] for k in rng.integers(len(items), size=len(items))] for _ in range(times)]
    value, *drawn = (metric(each) if each else None for each in sets)
    spread = np.array([x for x in drawn if x is not None and math.isfinite(x)])
    is_there = value is not None and math.isfinite(value)
    return {"value": value if is_there else None, "spread": float(spread.std()) if len(spread) else None}


def by_count(
    rows: Sequence[T], count_of: Callable[[T], int], counts: Iterable[int], summary: Callable[[Sequence[T]], Metrics]
) -> Metrics:
    """A summary of all rows, and of those of each count that there are: 'all', 'of 2', …"""
    metrics = {"all": summary(rows)}
    for count in counts:
        if some := [row for row in rows if count_of(row) == count]:
            metrics[f"of {count}"] = summary(some)
    return metrics
