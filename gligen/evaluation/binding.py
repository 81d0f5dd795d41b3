"""Attribute binding: does every object get its own colour, and not the one of the object beside it?

Requests for two or three objects that differ in colour and in shape. They come in sets that are alike but for the
colours, which are exchanged: whoever knows which colours and which shapes there are, and not which goes with which,
is right by chance alone. Metrics are those of COCO-MIG (Zhou et al., "MIGC", 2024): a request's instances, each with a
box and an attribute, are checked one by one.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

from gligen.data.scenes import Scene, make_scene, repaint
from gligen.data.shapes import phrase_of
from gligen.data.streams import Series
from gligen.evaluation.detector import Detection, detect
from gligen.evaluation.metrics import box_iou
from gligen.evaluation.run import Evaluation, Metrics, by_count, generate, make_ask, mean, resampled
from gligen.evaluation.scenes import FOUND_IOU, ObjectResult, score_image
from gligen.evaluation.settings import Settings
from gligen.pipeline import OnStep, Pipeline

TRIES = 1000  # scenes looked at for a set; one in ten or so will do
COUNTS = (2, 3)  # objects of a request, in turn


def binding_scene(seed: int, index: int, *, size: int = 64) -> Scene:
    """Request `index` of series `seed`: of 5 in a row two have two objects, three have three, alike but for colours."""
    group, turn = divmod(index, sum(COUNTS))
    count = COUNTS[0] if turn < COUNTS[0] else COUNTS[1]
    turn -= 0 if count == COUNTS[0] else COUNTS[0]
    for number in range(group * TRIES, (group + 1) * TRIES):
        scene = make_scene(Series.BINDING + seed, number, size=size, places=0.0)
        colors, shapes = ({item.pair[k] for item in scene.objects} for k in (0, 1))
        if len(scene.objects) == len(colors) == len(shapes) == count:
            return exchange_colors(scene, turn)
    raise AssertionError(f"no scene of {count} objects among {TRIES}")


def exchange_colors(scene: Scene, turn: int) -> Scene:
    """The scene with its objects' colours handed on by `turn` places, in image, phrases and caption."""
    count = len(scene.objects)
    objects = []
    for i, item in enumerate(scene.objects):
        source = scene.objects[(i + turn) % count]
        phrase = phrase_of(source.color, item.shape)
        objects.append(dataclasses.replace(item, color=source.color, rgb=source.rgb, phrase=phrase))
    caption = scene.caption
    for i, item in enumerate(scene.objects):
        caption = caption.replace(item.phrase, f"{{{i}}}")
    return repaint(scene, objects, caption.format(*(item.phrase for item in objects)))


def evaluate_binding(pipe: Pipeline, settings: Settings, on_step: OnStep | None = None) -> Evaluation:
    """Asks for `settings.requests` of these requests, generates and measures them.

    Metrics: `summarize_binding` of all, and by the number of objects. Raises ValueError at once for a model or
    settings that do not fit.
    """
    mode = settings.check_mode(pipe.mode)
    if mode.kind == "keypoint" or mode.is_map or mode.is_inpainting:
        raise ValueError(f"binding is measured by objects in boxes, on an empty image: mode {mode.name} has none")
    for name, default in (("pairs", "all"), ("places", 0.0)):
        if getattr(settings, name) != default:
            raise ValueError(f"{name} is {getattr(settings, name)}: give {default}, binding has its own requests")
    size = pipe.config.image_size
    with tempfile.TemporaryDirectory() as folder:
        scenes = [binding_scene(settings.seed, i, size=size) for i in range(settings.requests)]
        asks = [make_ask(scene, i, settings, mode, Path(folder)) for i, scene in enumerate(scenes)]
        images, _ = generate(pipe, asks, settings, on_step)
    found = [detect(image.pixels) for image in images]
    seen = [(each, score_image(each, image.asked)) for each, image in zip(found, images, strict=True)]
    metrics = by_count(seen, lambda row: len(row[1]), COUNTS, summarize_binding)
    return Evaluation(mode=mode.name, metrics={"binding": metrics}, images=images)


def summarize_binding(rows: Sequence[tuple[Sequence[Detection], Sequence[ObjectResult]]]) -> Metrics:
    """Metrics of images, each given by what is seen in it and what became of each instance.

    instances: how many were asked for. success: share of them at IoU ≥ 0.5 in colour and shape. mean_iou: 0 for those
    of another colour or shape. pictures: share of images all of whose instances succeed. exchanged: share of
    instances in whose place, at IoU ≥ 0.5, lies something in the colour of another one.
    """

    def over(value: str) -> Metrics:
        return resampled(lambda sets: mean([x for each in sets for x in each[value]]), counted)

    counted: list[dict[str, list[float]]] = []
    for detections, results in rows:
        success = [float(result.is_found_with_shape) for result in results]
        counted.append(
            {
                "success": success,
                "mean_iou": [result.iou * _is_as_asked(result) for result in results],
                "pictures": [float(all(success))],
                "exchanged": [float(_is_anothers(result, results, detections)) for result in results],
            }
        )
    instances = sum(len(results) for _, results in rows)
    return {"instances": instances} | {name: over(name) for name in ("success", "mean_iou", "pictures", "exchanged")}


def _is_as_asked(result: ObjectResult) -> bool:
    return result.detection is not None and result.detection.pair == result.asked.pair


def _is_anothers(result: ObjectResult, results: Sequence[ObjectResult], detections: Sequence[Detection]) -> bool:
    others = {other.asked.color for other in results} - {result.asked.color}
    overlaps = box_iou([result.asked.box], [detection.box for detection in detections])[0]
    return any(
        iou >= FOUND_IOU and detection.color in others for iou, detection in zip(overlaps, detections, strict=True)
    )
