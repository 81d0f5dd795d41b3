"""The four kinds of grounding, each in one place: boxes (with phrases, or with images too), keypoints, maps; and
inpainting, which goes with boxes. A row of gligen.modes has one of them; what a row differs in beside is its columns.
"""

from __future__ import annotations

from PIL import Image, ImageDraw

from gligen.grounding import inpainting
from gligen.grounding.boxes import Boxes, BoxesAndImages, image_key
from gligen.grounding.keypoints import Keypoints
from gligen.grounding.kind import Canvas, Kind, Readers
from gligen.grounding.maps import Maps, read_map
from gligen.modes import Mode
from gligen.modules.position_net import GroundingInputs
from gligen.request import Request

__all__ = ["KINDS", "Kind", "Readers", "draw_request", "image_key", "kind_of", "moved", "read_map"]

KINDS: dict[str, Kind] = {
    "box-text": Boxes(),
    "box-text-image": BoxesAndImages(),
    "keypoint": Keypoints(),
    "map": Maps(),
}


def kind_of(mode: Mode) -> Kind:
    """The kind that answers for the mode's grounding."""
    return KINDS[mode.kind]


def moved(inputs: GroundingInputs) -> GroundingInputs:
    """Grounding inputs of any kind with everything elsewhere: turned by half a turn about the image's middle."""
    kind = next(kind for kind in KINDS.values() if kind.place in inputs)
    return kind.moved(inputs)


def draw_request(image: Image.Image, request: Request) -> Image.Image:
    """A copy of the image with what was asked for drawn on it: boxes and phrases, skeletons, the mask's outline."""
    image = image.convert("RGB")  # always a copy
    canvas = Canvas(image=image, draw=ImageDraw.Draw(image), line=max(1, round(min(image.size) / 170)))
    inpainting.draw(canvas, request)
    for kind in (KINDS["box-text-image"], KINDS["keypoint"], KINDS["map"]):  # boxes are drawn alike
        kind.draw(canvas, request)
    return image
