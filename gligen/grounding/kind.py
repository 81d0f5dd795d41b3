"""What a kind of grounding answers for, whatever asks: a request, an example to learn from, or a file of weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from gligen.config import GroundingConfig
from gligen.image_files import ImageSource
from gligen.modes import Mode
from gligen.modules.bert import BERTTextEncoder
from gligen.modules.clip import CLIPTextEncoder
from gligen.modules.position_net import GroundingInputs
from gligen.request import Entity, Person

if TYPE_CHECKING:
    from gligen.weights import LazyTensor

EncodeTexts = Callable[[Sequence[str]], dict[str, Tensor]]  # a feature (F,) for each different text
EncodeImages = Callable[[Sequence[ImageSource]], dict[str | int, Tensor]]  # and for each image, by `image_key`
Write = Callable[[str, NDArray[np.uint8]], ImageSource]
State = Mapping[str, "LazyTensor"]  # of a UNet's file, by name

TextEncoder = CLIPTextEncoder | BERTTextEncoder


class Grounded(Protocol):
    """Anything that says where things are: a `Request`, or an `Example` to learn from."""

    @property
    def entities(self) -> Sequence[Entity]: ...

    @property
    def keypoints(self) -> Sequence[Person]: ...

    @property
    def map(self) -> ImageSource | NDArray[np.uint8] | None: ...


class Shown(Grounded, Protocol):
    """An example: its `references` are pixels of each entity, or nothing."""

    @property
    def references(self) -> Sequence[NDArray[np.uint8] | None]: ...


@dataclass(frozen=True, kw_only=True)
class Readers:
    """The means by which a kind reads its inputs: texts and images become features, map files get the size (W, H)."""

    phrases: EncodeTexts
    images: EncodeImages
    size: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """An RGB image being drawn on, in place. line: pixels that a line is wide."""

    image: Image.Image
    draw: ImageDraw.ImageDraw
    line: int


class Kind(ABC):
    """One kind of grounding; it keeps nothing.

    marker: a tensor that the tokenizers of this kind have, and no others. mlp: the name of the one that ends them (the
    first where there are two). place: the grounding input that says where.
    """

    marker: str
    mlp: str = "linears"
    place: str

    @abstractmethod
    def inputs(self, asked: Sequence[Grounded], config: GroundingConfig, readers: Readers) -> GroundingInputs:
        """The tokenizer's inputs (gligen/modules/position_net.py), float32 on the CPU; what is not asked for is 0
        under mask 0, which is the null feature."""

    @abstractmethod
    def asked(self, example: Shown, mode: Mode, write: Write) -> dict[str, Any]:
        """The fields of a Request for what an example shows. write: makes an image of pixels, given a name for it."""

    @abstractmethod
    def original_params(self, config: GroundingConfig) -> dict[str, Any]:
        """The tokenizer's parameters beside out_dim, as the original's configs call them."""

    @abstractmethod
    def moved(self, inputs: GroundingInputs) -> GroundingInputs:
        """The same things elsewhere: all turned by half a turn about the image's middle. What is absent stays so."""

    def draw(self, canvas: Canvas, asked: Grounded) -> None:  # noqa: B027 - a map is an image itself, not drawn on one
        """Draws what was asked for on a finished image, for people."""

    def matches(self, mode: Mode, unet: State) -> bool:
        """Whether a tokenizer that bears this kind's marker can be of this mode, one of the kind."""
        return True

    @abstractmethod
    def sizes(self, unet: State) -> dict[str, Any]:
        """The fields of a GroundingConfig that a tokenizer of this kind shows in its shapes."""

    def start_from_boxes(self, boxes: State, fresh: State, text_encoder: TextEncoder) -> dict[str, Tensor]:
        """The tokenizer's tensors, by name, that begin as those of an adapter for boxes do; none where it shares none.

        boxes: the adapter's UNet. fresh: that of the model that is to learn, as drawn.
        """
        return {}
