"""Requests that ask for a drawn scene, so that evaluation asks for what training has shown the likes of."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gligen.data.example import Example
from gligen.data.maps import MAPS
from gligen.data.scenes import Scene, SceneObject, reference_image
from gligen.grounding import kind_of
from gligen.modes import Mode, get_mode
from gligen.request import Entity, Inpaint, Request


def example_request(example: Example, mode: str) -> Request:
    """The request for an example's image, as a model of that mode (gligen.modes) is asked; its images are in memory.

    Inpainting asks for the last of its entities anew, or for all where the example brings a mask of its own.
    """
    spec = get_mode(mode)
    fields = kind_of(spec).asked(example, spec, lambda name, pixels: Image.fromarray(pixels))
    if not spec.is_inpainting:
        return Request(prompt=example.caption, **fields)
    entities = fields["entities"]
    mask = None if example.mask is None else Image.fromarray(example.mask)
    inpaint = Inpaint(image=Image.fromarray(example.image), mask=mask)
    return Request(prompt=example.caption, entities=entities if mask else entities[-1:], inpaint=inpaint)


def scene_request(scene: Scene, mode: str = "box-text", folder: str | Path | None = None) -> Request:
    """The request of that mode (gligen.modes) for the scene; its seed is the scene's index.

    Modes that take pictures write them into `folder` (made if missing) as PNGs named after the scene. With
    box-text-image every second object is asked for by its picture alone; the inpainting modes give the scene
    and ask for its topmost object anew.
    Raises ValueError if a folder is needed and not given, or the scene has no such grounding.
    """
    spec = get_mode(mode)
    if bool(scene.people) != (spec.field == "keypoints"):
        has = "people" if scene.people else "shapes"
        raise ValueError(
            f"mode is {mode!r}, but the scene has {has}: 'keypoint' asks for people, all others for shapes"
        )
    request = partial(Request, prompt=scene.caption, seed=scene.index)
    if scene.people:
        return request(keypoints=scene.people)

    def write(name: str, pixels: NDArray[np.uint8]) -> str:
        if folder is None:
            raise ValueError(f"mode {mode!r} asks with pictures: give the folder to write them to")
        path = Path(folder).absolute() / f"{scene.seed}-{scene.index}-{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        return str(path)

    if draw_map := MAPS.get(mode):
        maps: dict[str, Any] = {mode: write(mode, draw_map(scene, None))}
        return request(**maps)
    entities = []
    for item in asked_objects(scene, spec):
        i = scene.objects.index(item)
        if spec.takes_images and i % 2 == 0:
            entities.append(Entity(image=write(f"object-{i}", reference_image(scene, i)), box=item.box))
        else:
            entities.append(Entity(phrase=item.phrase, box=item.box))
    inpaint = Inpaint(image=write("scene", scene.image)) if spec.is_inpainting else None
    return request(entities=tuple(entities), inpaint=inpaint)


def asked_objects(scene: Scene, mode: Mode) -> tuple[SceneObject, ...]:
    """The objects that the mode's request for the scene is about: inpainting makes the topmost anew."""
    return scene.objects[-1:] if mode.is_inpainting else scene.objects
