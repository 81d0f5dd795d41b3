"""Images generated for a data set or requests, measured: OUT/report.json, report.html, asked.json and images/.

`evaluate_pictures` is `evaluate.py pictures` from its flags on; `measure` works on the images that lie there, so that
detections that another tool made of them afterwards are measured without generating anything again.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from gligen.evaluation import coco
from gligen.evaluation.asked import Asked
from gligen.evaluation.coco import AskedImage, Dataset, Detections
from gligen.evaluation.features import (
    Clip,
    Embed,
    clip_scores,
    features_of,
    folder_images,
    frechet_from,
    image_files,
    inception,
    read_statistics,
    require_inception,
)
from gligen.evaluation.generate import image_file
from gligen.evaluation.instances import instance_ious, instance_metrics
from gligen.evaluation.metrics import Float, statistics
from gligen.evaluation.page import Cell, build_page, flat_metrics, shown_metric
from gligen.evaluation.protocols import Protocol
from gligen.evaluation.run import Metrics, mean, resampled
from gligen.evaluation.torchvision_detector import build_detector, class_names, detect_images
from gligen.files import write_atomically
from gligen.grounding.inpainting import keep_mask
from gligen.images import fit, load_rgb
from gligen.job import complete
from gligen.loading import OpenModel
from gligen.modes import MAP_MODES, get_mode
from gligen.request import Inpaint, Request, parse_request

log = logging.getLogger("gligen")

REPORT, PAGE, ASKED, DETECTIONS = "report.json", "report.html", "asked.json", "detections.json"


@dataclass(frozen=True, kw_only=True)
class Tools:
    """The tools that images are measured with; files of the user. `check` looks at them before anything is generated.

    detections: COCO results of any tool; categories: whose names its ids have. detector: torchvision's, with its
    weights and class names. inception: FID's weights, or features: those of the images, (N, D) in their order, of any
    network. reference: what FID compares with: a folder of images, an .npz of mu and sigma, or an .npy of features;
    None: the data set's own images. clip: CLIP's file. class_agnostic: boxes are compared whatever their class.
    """

    detections: str | None = None
    categories: str | None = None
    detector: str | None = None
    detector_weights: str | None = None
    detector_classes: str | None = None
    inception: str | None = None
    features: str | None = None
    reference: str | None = None
    clip: str | None = None
    class_agnostic: bool = False
    batch_size: int = 32

    def check(self) -> None:
        """Raises ValueError or FileNotFoundError, one line, for what cannot work."""
        if self.detections and self.detector:
            raise ValueError("--detections and --detector are both given: leave one out")
        if self.detections or self.detector:
            coco.require_evaluator()
        if self.detector and not self.detector_weights:
            raise ValueError(f"--detector {self.detector} needs its weights: give --detector-weights FILE")
        if not self.detector and (self.detector_weights or self.detector_classes):
            raise ValueError(
                "detector weights or classes are given without --detector NAME: say which network they are"
            )
        if self.categories and not self.detections:
            raise ValueError("--categories says what ids of --detections mean: give those too")
        if self.inception and self.features:
            raise ValueError("--inception and --features are both given: leave one out")
        self._check_files()

    def _check_files(self) -> None:
        for name in ("detections", "categories", "detector_weights", "inception", "features", "reference"):
            path = getattr(self, name)
            if path and not Path(path).exists():
                raise FileNotFoundError(f"--{name.replace('_', '-')} '{path}': there is no such file")
        if self.detector:
            class_names(self.detector, self.detector_classes)
        if self.inception:
            require_inception()
        if self.features:
            read_statistics(self.features, "--features")
        if self.reference and not self.has_statistics:
            image_files(self.reference)
        elif self.reference:
            read_statistics(self.reference, "--reference")

    @property
    def has_statistics(self) -> bool:
        """True if the reference is numbers, not images."""
        return self.reference is not None and not Path(self.reference).is_dir()


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The images there are and what was found of them."""

    images: Sequence[AskedImage]
    truth: Dataset
    detections: Detections | None
    metrics: Metrics
    not_measured: dict[str, str]

    @property
    def summary(self) -> dict[str, Any]:
        """The metrics that papers report, by the names that protocols have them under."""
        boxes = self.metrics.get("keypoints") or self.metrics.get("boxes") or {}
        instances = self.metrics.get("instances", {}).get("all", {})
        shares = self.metrics.get("boxes by share of the image", {})
        return (
            {name: boxes.get(name) for name in ("AP", "AP50", "AP75")}
            | {"FID": self.metrics.get("FID"), "CLIP score": (self.metrics.get("CLIP score") or {}).get("value")}
            | {f"AP {name}": shares.get(name) for name in coco.SHARES}
            | {
                "success": instances.get("success", {}).get("value"),
                "mean IoU": instances.get("mean_iou", {}).get("value"),
            }
        )


def asked_images(asked: Asked, model: OpenModel, out: Path) -> tuple[list[AskedImage], list[int]]:
    """The images that are there, and the numbers of those that are not.

    Raises ValueError, one line, for images that were generated for other requests, as where the data has changed since.
    """
    images, missing, stale = [], [], []
    for n in range(asked.size):
        request = asked.request(n)
        if request is None:
            continue
        path = image_file(out, n)
        if not path.exists():
            missing.append(n)
            continue
        request = complete(request, model.facts, where=f"image {n}: ").request
        assert request.size is not None
        if not _is_for(path, request):
            stale.append(path)
        name = path.relative_to(out).as_posix()
        images.append(AskedImage(number=n, file_name=name, size=request.size, request=request, key=asked.key(n)))
    if stale:
        raise ValueError(
            f"{len(stale)} images, the first '{stale[0]}', were generated for other requests than are made now: the "
            "data has changed since; delete them, or choose another --out"
        )
    return images, missing


def _is_for(path: Path, request: Request) -> bool:
    """Whether an image says that it was generated for this request, or says nothing. Where its inputs lie is no matter:
    folders are moved."""
    try:
        with Image.open(path) as image:  # text is read without decoding pixels
            size, text = image.size, image.info.get("gligen")
    except (OSError, SyntaxError):
        raise ValueError(f"'{path}' is damaged: delete it, and the same command generates it again") from None
    if not isinstance(text, str):
        return size == request.size
    before = parse_request(json.loads(text)["request"])

    def placeless(request: Request) -> Request:
        entities = tuple(dataclasses.replace(e, image=e.image and "x") for e in request.entities)
        maps: dict[str, Any] = {name: getattr(request, name) and "x" for name in MAP_MODES}
        inpaint = request.inpaint and Inpaint(image="x", mask=request.inpaint.mask and "x")
        return dataclasses.replace(request, entities=entities, inpaint=inpaint, **maps)

    return placeless(before) == placeless(request)


def measure(out: Path, asked: Asked, model: OpenModel, tools: Tools, device: torch.device) -> Measured:
    """Everything that the tools can measure of the images in `out`, and why not for the rest. Writes asked.json and,
    with a detector, detections.json.

    Raises ValueError, one line, where there are no images, or files do not fit.
    """
    images, missing = asked_images(asked, model, out)
    if missing:
        raise ValueError(f"{len(missing)} images are missing, the first {missing[0]}: generate them first")
    if not images:
        raise ValueError(
            f"there is nothing to measure: of {asked.size} none could be asked for ({dict(asked.left_out)})"
        )
    truth = coco.asked_dataset(images, asked.federation)
    write_json(out / ASKED, truth)
    metrics: Metrics = {"images": len(images)}
    reasons: dict[str, str] = {}
    detections = _detections(out, images, truth, tools, device)
    mode = get_mode(model.config.unet.grounding.mode) if model.config.unet.grounding else None
    is_inpainting = mode is not None and mode.is_inpainting
    if is_inpainting:
        metrics["kept pixels"] = _kept_metrics(out, images, model)
    if detections is None:
        why = "no detections: give --detections FILE.json, or --detector NAME --detector-weights FILE"
        reasons |= dict.fromkeys(("boxes", "instances"), why)
    elif not truth["annotations"]:
        reasons |= dict.fromkeys(("boxes", "instances"), "no boxes or keypoints were asked for")
    else:
        if is_inpainting:
            numbered = {image.number: image for image in images}
            detections, outside = coco.inside(detections, lambda number: ~_kept(numbered[number], model))
            metrics["detections outside what is repainted"] = outside
        metrics |= _place_metrics(truth, detections, tools, reasons, is_inpainting=is_inpainting)
        metrics["detections"] = len(detections.results)
        if detections.unknown:
            metrics["detections of classes not asked for"] = sum(detections.unknown.values())
    looked = _Looked(out, images, asked, tools)
    fid = _fid(looked, device)
    if isinstance(fid, str):
        reasons["FID"] = fid
    else:
        metrics["FID"] = fid
    metrics |= _clip_metrics(looked, model, device, reasons)
    if mode is not None and mode.is_map:
        reasons["map"] = f"how well a {mode.name} map is kept to needs a network that reads such maps from images"
    return Measured(images=images, truth=truth, detections=detections, metrics=metrics, not_measured=reasons)


def write_report(
    out: Path,
    measured: Measured,
    asked: Asked,
    origin: Mapping[str, Any],
    about: Mapping[str, Any],
    *,
    sheet: int,
    protocol: Protocol | None,
) -> list[Path]:
    """Writes report.json and report.html, the first `sheet` images on it. Returns their paths and asked.json's."""
    names = {item["id"]: item["name"] for item in measured.truth["categories"]}
    report: dict[str, Any] = {
        "title": f"Evaluation of {origin['model']['name']}",
        "run": origin,
        "asked": asked.description,
        "left_out": dict(asked.left_out),
        **about,
        "figures": measured.metrics,
        "not_measured": measured.not_measured,
        "summary": measured.summary,
    }
    if protocol is not None:
        report["protocol"] = {name: getattr(protocol, name) for name in ("name", "about", "needs", "published")}
    found = measured.detections.by_image() if measured.detections else {}

    def cells() -> Iterator[Cell]:
        for image in measured.images[:sheet]:
            pixels, beside = load_pixels(out, image), _beside(image, asked)
            yield Cell(image=image, pixels=pixels, beside=beside, detections=found.get(image.number, ()))

    page = build_page(report, cells(), names, len(measured.images))
    return [write_json(out / REPORT, report), write_atomically(out / PAGE, page.encode()), out / ASKED]


def table(measured: Measured, protocol: Protocol | None) -> str:
    """The metrics for people, one a line, with what was not measured and the published ones."""
    lines = [f"{name:<36}{shown_metric(value)}" for name, value in flat_metrics(measured.metrics)]
    lines += [f"{name:<36}not measured: {reason}" for name, reason in measured.not_measured.items()]
    if protocol is not None:
        for who, row in protocol.published.items():
            shown = ", ".join(
                f"{name} {shown_metric(value)} (here {shown_metric(measured.summary.get(name))})"
                for name, value in row.items()
            )
            lines.append(f"published, {who}: {shown}")
    return "\n".join(lines)


def load_pixels(out: Path, image: AskedImage) -> NDArray[np.uint8]:
    return np.asarray(load_rgb(out / image.file_name))


def write_json(path: Path, data: Any) -> Path:
    return write_atomically(path, (json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def _detections(
    out: Path, images: Sequence[AskedImage], truth: Dataset, tools: Tools, device: torch.device
) -> Detections | None:
    path: str | Path | None = tools.detections
    if tools.detector:
        assert tools.detector_weights is not None  # Tools.check
        names = class_names(tools.detector, tools.detector_classes)
        network = build_detector(tools.detector, tools.detector_weights, names, device)
        pixels = ((image.number, load_pixels(out, image)) for image in images)
        path = write_json(out / DETECTIONS, detect_images(network, names, pixels, device, min(8, tools.batch_size)))
    return None if path is None else coco.read_detections(path, truth, tools.categories)


def _place_metrics(
    truth: Dataset, detections: Detections, tools: Tools, reasons: dict[str, str], *, is_inpainting: bool
) -> Metrics:
    agnostic = tools.class_agnostic
    if any("keypoints" in item for item in truth["annotations"]):
        if detections.results and not any("keypoints" in result for result in detections.results):
            reasons["keypoints"] = "the detections have no keypoints: use a pose detector"
            return {}
        return {"keypoints": coco.coco_metrics(truth, detections, "keypoints")}
    if detections.results and not any("bbox" in result for result in detections.results):
        reasons["boxes"] = "the detections have no bbox"
        return {}
    if coco.is_federated(truth) and agnostic:
        log.warning("the annotations are LVIS's, but AP without classes is not: it counts every detection")
    elif coco.is_federated(truth):
        log.info("AP of boxes is LVIS's: of an image only classes count that the data set has labelled in it")
    metrics: Metrics = {"boxes": coco.coco_metrics(truth, detections, class_agnostic=agnostic)}
    if is_inpainting:
        metrics["boxes by share of the image"] = coco.shares_metrics(truth, detections, class_agnostic=agnostic)
    ious = instance_ious(truth, detections, class_agnostic=agnostic)
    return metrics | {"instances": instance_metrics(ious)}


def _kept(image: AskedImage, model: OpenModel) -> NDArray[np.bool_]:
    """(H, W), true where inpainting must not change the image."""
    factor = model.config.vae.downsample_factor
    job = complete(image.request, model.facts)
    cells = keep_mask(job.opened(), job.latent_shape[1:], factor)[0].bool().numpy()
    return cells.repeat(factor, 0).repeat(factor, 1)


def _kept_metrics(out: Path, images: Sequence[AskedImage], model: OpenModel) -> Metrics:
    """How far kept pixels are from the photograph's, in levels of 255."""
    means, largest = [], []
    for image in images:
        assert image.request.inpaint is not None  # an inpainting model takes nothing else
        photograph = np.asarray(fit(load_rgb(image.request.inpaint.image), *image.size))
        difference = np.abs(load_pixels(out, image).astype(np.int64) - photograph)[_kept(image, model)]
        if difference.size:
            means.append(float(difference.mean()))
            largest.append(int(difference.max()))
    return {"mean": resampled(mean, means), "max": max(largest, default=None), "images": len(means)}


class _Looked:
    """Generated images and the real ones they are compared with, read anew whenever they are looked at."""

    def __init__(self, out: Path, images: Sequence[AskedImage], asked: Asked, tools: Tools) -> None:
        self.out, self.images, self.asked, self.tools = out, images, asked, tools

    def generated(self) -> Iterator[NDArray[np.uint8]]:
        return (load_pixels(self.out, image) for image in self.images)

    def real(self) -> Iterable[NDArray[np.uint8]] | None:
        """A folder's, or those of the data set that were asked for, each once; None where there are none."""
        if self.tools.reference and not self.tools.has_statistics:
            return folder_images(self.tools.reference, self.images[0].size)
        if self.asked.reference(self.images[0].number) is None:
            return None
        return _unlike(self.asked.reference(image.number) for image in self.images)

    def features(self, images: Iterable[NDArray[np.uint8]], embed: Embed) -> Float:
        return features_of(images, embed, self.tools.batch_size)


def _fid(looked: _Looked, device: torch.device) -> float | str:
    """FID, or why there is none."""
    tools = looked.tools
    if len(looked.images) < 2:
        return "one image has no spread: ask for more"
    if not (tools.inception or tools.features):
        return "no Inception weights: give --inception FILE, or --features FILE.npy of another network"
    if tools.inception:
        real = None if tools.has_statistics else looked.real()
        if real is None and not tools.has_statistics:
            return "no real images to compare with: give --reference with a folder, .npz or .npy"
        embed = inception(tools.inception, device)
        own = looked.features(looked.generated(), embed)
        if real is not None:
            features = looked.features(real, embed)
            return frechet_from(own, statistics(features)) if len(features) > 1 else "one real image has no spread"
    else:
        if not tools.has_statistics:
            return "--features are of another network: give --reference with its .npz or .npy too"
        own = np.load(str(tools.features), allow_pickle=False).astype(np.float64)
        if own.ndim != 2 or len(own) != len(looked.images):
            raise ValueError(f"--features '{tools.features}' is {own.shape}, but there are {len(looked.images)} images")
    return frechet_from(own, read_statistics(str(tools.reference), "--reference"))


def _clip_metrics(looked: _Looked, model: OpenModel, device: torch.device, reasons: dict[str, str]) -> Metrics:
    """CLIP score, and the Fréchet distance of CLIP's image features, which needs no Inception."""
    distance, score = "Fréchet distance of CLIP's features", "CLIP score"
    if model.config.image_encoder is None or "image_encoder" not in model.parts:
        reasons |= dict.fromkeys((distance, score), "no CLIP image tower: give --clip FILE")
        return {}
    clip = Clip(model, looked.tools.clip, device)
    own = looked.features(looked.generated(), clip.embed)
    metrics: Metrics = {}
    real = looked.real()
    if len(looked.images) < 2:
        reasons[distance] = "one image has no spread"
    elif real is None:
        reasons[distance] = "no real images: give --reference with a folder"
    elif len(features := looked.features(real, clip.embed)) > 1:
        metrics[distance] = frechet_from(own, statistics(features))
    else:
        reasons[distance] = "one real image has no spread"
    captions = [image.request.prompt for image in looked.images]
    if clip.text is None:
        reasons[score] = "the text encoder is not that of this CLIP: give --clip FILE"
    elif not any(captions):
        reasons[score] = "no image was asked for with a caption"
    else:
        size = looked.tools.batch_size
        texts = np.concatenate([clip.embed_texts(captions[i : i + size]) for i in range(0, len(captions), size)])
        scores = [float(x) for x, caption in zip(clip_scores(own, texts), captions, strict=True) if caption]
        metrics[score] = resampled(mean, scores)
    return metrics


def _unlike(images: Iterable[NDArray[np.uint8] | None]) -> Iterator[NDArray[np.uint8]]:
    """Those that are there and not the one before again: several images may be asked for after one photograph."""
    before = None
    for image in images:
        if image is not None and image is not before:
            yield image
        before = image


def _beside(image: AskedImage, asked: Asked) -> NDArray[np.uint8] | None:
    """What the image was asked with, or the photograph it was asked after."""
    request = image.request
    path = request.inpaint.image if request.inpaint else getattr(request, request.grounding or "", None)
    return np.asarray(load_rgb(path)) if isinstance(path, str) else asked.reference(image.number)
