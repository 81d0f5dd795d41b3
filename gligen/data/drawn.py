"""The drawn world as a source of examples: endless, nothing to download, and all that is true of it is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gligen.data.example import Example
from gligen.data.maps import MAPS
from gligen.data.people import make_people_scene
from gligen.data.scenes import Pairs, Scene, detection_caption, make_scene, other_shapes, reference_image
from gligen.modes import Mode, get_mode
from gligen.request import Entity


def draw_scene(mode: Mode, series: int, n: int, *, size: int = 64, pairs: Pairs = "all", places: float = 0.25) -> Scene:
    """Scene n of a series, of people or of shapes as the mode asks for them; pairs and places are those of shapes."""
    if mode.field == "keypoints":
        return make_people_scene(series, n, size=size)
    return make_scene(series, n, size=size, pairs=pairs, places=places)


@dataclass(frozen=True, kw_only=True)
class SceneSource:
    """Scenes of one series (gligen/data/streams.py) as examples of a mode.

    image_size: pixels a side. pairs, places: as `make_scene` has them. captions: 'full', or 'detection', class names
    and commas as detection data has them.
    """

    mode: str
    series: int
    image_size: int = 64
    pairs: Pairs = "all"
    captions: str = "full"
    places: float = 0.25

    @property
    def size(self) -> None:
        """There is no last scene."""
        return

    def key(self, n: int) -> str:
        return f"{self.series}/{n}"

    def picture_name(self, n: int) -> str:
        """As `python -m gligen.data draw` names the file."""
        return f"{n:06d}"

    def scene(self, n: int) -> Scene:
        spec = get_mode(self.mode)
        return draw_scene(spec, self.series, n, size=self.image_size, pairs=self.pairs, places=self.places)

    def example(self, n: int) -> Example:
        return self._example(self.scene(n))

    def reshaped(self, n: int) -> Example | None:
        """Example n as it would be described if its objects had other shapes: image and caption stay its own. None
        where it has people."""
        scene = self.scene(n)
        return self._example(scene, other_shapes) if scene.objects else None

    def _example(self, scene: Scene, asked_as: Callable[[Scene], Scene] = lambda scene: scene) -> Example:
        spec = get_mode(self.mode)
        is_detection = self.captions == "detection" and bool(scene.objects)
        asked = asked_as(scene)
        return Example(
            image=scene.image,
            caption=detection_caption(scene) if is_detection else scene.caption,
            entities=tuple(Entity(phrase=o.phrase, box=o.box) for o in asked.objects) if spec.takes_phrases else (),
            keypoints=asked.people,
            map=draw_map(asked, None) if (draw_map := MAPS.get(spec.name)) else None,
            references=tuple(reference_image(asked, i) for i in range(len(asked.objects))) if spec.takes_images else (),
            key=f"{scene.seed}/{scene.index}",
        )
