"""The ways of saying what goes where, as rows of one table: the ten published ones, and what was added here.

Everything that differs between checkpoints is a column here; the networks, the request checks and the file readers look
it up instead of having a class or a file per mode. What the four kinds differ in is in gligen/grounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["box-text", "box-text-image", "keypoint", "map"]
Schedule = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Mode:
    """One row: what the tokenizer reads, what the first convolution gets, and how sampling is scheduled.

    kind: which grounding tokenizer (gligen/modules/position_net.py).
    map_channels: channels of the map as the tokenizer sees it (one-hot labels for 'sem').
    hint_channels: channels of the map that its downsampler reads; 0 where there is none.
    hint_widths: output channels of the downsampler's two convolutions; empty means the map is only resized.
    schedule: scheduled sampling's default stages (full, linear decay, off) as fractions of the steps.
    original: the word in the original's module paths (`…diffusionmodules.<original>_grounding_net`); None for a mode
        that nobody published, of which a file of unknown origin therefore cannot be.
    has_labels: a map's pixels are label ids, not levels.
    """

    name: str
    kind: Kind
    schedule: Schedule
    original: str | None = None
    is_inpainting: bool = False
    map_channels: int = 0
    has_labels: bool = False
    hint_channels: int = 0
    hint_widths: tuple[int, ...] = ()

    @property
    def extra_channels(self) -> int:
        """Channels that join the latent in front of the first convolution (the downsampler's output,
        or 4 masked latent channels + 1 mask)."""
        if self.is_inpainting:
            return 5
        if self.kind == "map":
            return self.hint_widths[-1] if self.hint_widths else self.hint_channels
        return 0

    @property
    def field(self) -> str:
        """The request's field that says where things are."""
        return {"map": self.name, "keypoint": "keypoints"}.get(self.kind, "entities")

    @property
    def is_map(self) -> bool:
        return self.kind == "map"

    @property
    def takes_phrases(self) -> bool:
        return self.kind in ("box-text", "box-text-image")

    @property
    def takes_images(self) -> bool:
        return self.kind == "box-text-image"


_BOXES: Schedule = (0.3, 0.0, 0.7)
_THROUGHOUT: Schedule = (1.0, 0.0, 0.0)
_EDGES: Schedule = (0.9, 0.0, 0.1)
_SURFACES: Schedule = (0.7, 0.0, 0.3)


def _map(name: str, schedule: Schedule, **fields: Any) -> Mode:
    """A map mode's row; most maps are levels, of which the downsampler reads one channel."""
    usual: dict[str, Any] = {"original": name, "map_channels": 3, "hint_channels": 1, "hint_widths": (4, 8)}
    return Mode(name=name, kind="map", schedule=schedule, **usual | fields)


MODES: dict[str, Mode] = {
    mode.name: mode
    for mode in (
        Mode(name="box-text", kind="box-text", schedule=_BOXES, original="text"),
        Mode(name="box-text-image", kind="box-text-image", schedule=_THROUGHOUT, original="text_image"),
        Mode(name="keypoint", kind="keypoint", schedule=_BOXES, original="keypoint"),
        _map("hed", _EDGES, hint_widths=()),
        _map("canny", _EDGES),
        _map("depth", _SURFACES),
        _map("normal", _SURFACES, hint_channels=3),
        # ADE20K's 0..150 and one spare
        _map("sem", _SURFACES, map_channels=152, has_labels=True, hint_channels=152, hint_widths=(16, 8)),
        _map("scribble", _EDGES, original=None),  # nobody's checkpoint: what CONTRIBUTING.md shows adding a mode by
        # In the inpainting modes the widened first convolution was trained together with the fusers, so
        # grounding stays on throughout.
        Mode(name="inpaint-box-text", kind="box-text", schedule=_THROUGHOUT, original="text", is_inpainting=True),
        Mode(
            name="inpaint-box-text-image",
            kind="box-text-image",
            schedule=_THROUGHOUT,
            original="text_image",
            is_inpainting=True,
        ),
    )
}

MAP_MODES: tuple[str, ...] = tuple(name for name, mode in MODES.items() if mode.is_map)


def get_mode(name: str) -> Mode:
    """The row called `name`. Raises ValueError naming the known ones."""
    if name not in MODES:
        raise ValueError(f"unknown mode {name!r}: the known ones are {', '.join(MODES)}")
    return MODES[name]
