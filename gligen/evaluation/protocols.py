"""Published protocols by name: how images are asked for, and which metrics others reported. Imports no torch.

Metrics are those of the GLIGEN paper (Li et al., 2023) and of the papers named beside them. Table 1 is given as its AP
columns, the ablations and the text have it: training on detection data alone, under the null caption, does better.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from gligen.evaluation.settings import Captions


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One published table.

    needs: the data and tools it was measured with. fields: of the requests; count: images. Flags override both.
    published: who -> metric -> value, AP and rates as shares of 1, by the names that a report has them under.
    """

    name: str
    about: str
    needs: str
    published: Mapping[str, Mapping[str, float]]
    captions: Captions = "full"
    repaint: Literal["all", "one"] = "all"
    count: int | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


SMALL = {"size": [256, 256]}  # latent diffusion's text2img-large, of the paper's COCO experiments

PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="coco2014-detection",
            about="COCO 2014, grounded in detection boxes, null caption (paper, table 1)",
            needs="30,000 images of COCO 2014 val; a YOLO detector's JSON; Inception weights",
            captions="null",
            count=30_000,
            fields=SMALL,
            published={
                "GLIGEN, detection": {"FID": 5.61, "AP": 0.240, "AP50": 0.422, "AP75": 0.241},
                "LDM fine-tuned on COCO": {"FID": 5.91},
            },
        ),
        Protocol(
            name="coco2014-caption-detection",
            about="COCO 2014, grounded in detection boxes, with captions (paper, table 1)",
            needs="30,000 images of COCO 2014 val with captions; a YOLO detector's JSON; Inception weights",
            count=30_000,
            fields=SMALL,
            published={
                "GLIGEN, caption + detection": {"FID": 5.82, "AP": 0.217, "AP50": 0.390, "AP75": 0.217},
                "gatedCA instead of gatedSA": {"AP": 0.166},
                "MLP instead of Fourier features": {"AP": 0.032},
                "LDM fine-tuned on COCO": {"FID": 5.91},
            },
        ),
        Protocol(
            name="coco2014-grounding",
            about="COCO 2014, grounded in a caption's phrases (GLIP's pseudo boxes; paper, table 1)",
            needs="30,000 images of COCO 2014 val, captions, GLIP's boxes; a YOLO detector's JSON; Inception weights",
            count=30_000,
            fields=SMALL,
            published={"GLIGEN, grounding": {"FID": 6.38, "AP": 0.112, "AP50": 0.212, "AP75": 0.107}},
        ),
        Protocol(
            name="coco2017-layout",
            about="COCO 2017, layout to image",
            needs="COCO 2017 val, 5,000 images; a YOLO detector's JSON; Inception weights",
            captions="null",
            published={
                "GLIGEN, trained on COCO": {"FID": 21.04, "AP": 0.224, "AP50": 0.365, "AP75": 0.241},
                "GLIGEN, zero-shot": {"FID": 27.03, "AP": 0.191},
                "GLIGEN, pre-trained and fine-tuned": {"FID": 21.58, "AP": 0.308},
            },
        ),
        Protocol(
            name="lvis-zero-shot",
            about="LVIS, zero-shot",
            needs="LVIS val; GLIP's detections as JSON",
            published={
                "GLIGEN, COCO only": {"AP": 0.064},
                "GLIGEN, GoldG + O365": {"AP": 0.106},
                "GLIGEN, all data": {"AP": 0.111},
            },
        ),
        Protocol(
            name="coco2017-keypoint",
            about="COCO 2017, grounded in keypoints",
            needs="COCO 2017 val with keypoints; a pose detector's JSON; Inception weights",
            published={"GLIGEN": {"FID": 27.34, "AP": 0.315, "AP50": 0.529}},
        ),
        Protocol(
            name="coco-inpaint",
            about="COCO, one object of each image repainted, AP by its share of the image",
            needs="COCO val and an inpainting model; a YOLO detector's JSON",
            repaint="one",
            published={"GLIGEN": {"AP 1-3 %": 0.297, "AP 5-10 %": 0.309, "AP 30-50 %": 0.256}},
        ),
        Protocol(
            name="coco-mig",
            about="COCO-MIG: 800 layouts of two to six coloured objects",
            needs="the benchmark's YAML with --requests; detections of 'red apple' and the like as JSON",
            fields={"size": [512, 512]},
            published={
                "GLIGEN": {"success": 0.296, "mean IoU": 0.274},
                "MIGC": {"success": 0.664, "mean IoU": 0.570},
                "DEIG": {"success": 0.723, "mean IoU": 0.626},
            },
        ),
    )
}


def get_protocol(name: str) -> Protocol:
    """The protocol called `name`. Raises ValueError naming the known ones."""
    if name not in PROTOCOLS:
        raise ValueError(f"unknown protocol '{name}': the known ones are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
