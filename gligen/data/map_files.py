"""Maps and masks in a folder of their own, matched to pictures by name: `images/a/1.jpg` has `depth/a/1.png`.

The map's name may end in its kind (`1_depth.png`). Depth and normals may be arrays (`.npy`), as DIODE has them: metres,
with a `1_depth_mask.npy` of what is valid, and vectors in [-1, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gligen.data.example import BadExample, Pixels
from gligen.data.pictures import SUFFIXES, check_same_shape
from gligen.image_files import check_labels, open_image
from gligen.images import load_rgb

HEAD = 1 << 16  # bytes


@dataclass(frozen=True)
class MapFolder:
    """Maps of one kind: a map mode's name, or 'mask'. suffixes: those that the folder's files have."""

    folder: Path
    kind: str
    suffixes: tuple[str, ...]

    @classmethod
    def open(cls, folder: Path, kind: str) -> MapFolder:
        """Raises ValueError if the folder holds no picture files, FileNotFoundError if there is none."""
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: there is no such folder of {kind} maps")
        known = (*SUFFIXES, ".npy") if kind in ARRAYS else SUFFIXES
        suffixes = sorted({path.suffix for path in folder.rglob("*") if path.suffix.lower() in known})
        if not suffixes:
            raise ValueError(f"{folder}: holds no {kind} maps: give pictures named as the ones they belong to")
        return cls(folder, kind, tuple(suffixes))

    def find(self, key: str) -> Path | None:
        """The map of a picture: the same relative path without suffix, with or without its first folders."""
        parts = PurePosixPath(key).with_suffix("").parts
        for start in range(len(parts)):
            for name in (parts[-1], f"{parts[-1]}_{self.kind}"):
                for suffix in self.suffixes:
                    path = self.folder.joinpath(*parts[start:-1], name + suffix)
                    if path.is_file():
                        return path
        return None

    def head(self, key: str) -> bytes:
        """What tells a picture's map from another without decoding it: how long its file is, and how it begins."""
        path = self.find(key)
        try:
            if path is None:
                return b""
            with open(path, "rb") as file:
                return b"%d " % path.stat().st_size + file.read(HEAD)
        except OSError:
            return b""  # to be told when it is read

    def read(self, key: str, pixels: Pixels) -> NDArray[np.uint8]:
        """The map at its own resolution: (H, W) labels for 'sem', (H, W) 0 or 255 for 'mask', else (H, W, 3).

        Raises BadExample if it is missing, cannot be read, or has another shape than the picture.
        """
        path = self.find(key)
        if path is None:
            raise BadExample(f"no {self.kind} map", f"{key}: nothing of that name in {self.folder}")
        try:
            image = self._open(path)
        except (OSError, ValueError) as error:
            raise BadExample(f"{self.kind} map that cannot be read", str(error)) from None
        check_same_shape(image.size, pixels, f"{self.kind} map", key)
        if self.kind == "mask":
            image = image.convert("L").point([0] * 128 + [255] * 128)
        return np.asarray(image).astype(np.uint8)

    def _open(self, path: Path) -> Image.Image:
        if path.suffix.lower() == ".npy":
            return Image.fromarray(ARRAYS[self.kind](np.load(path, allow_pickle=False), path))
        if self.kind != "sem":
            return load_rgb(path, path.name)
        labels = open_image(path, path.name)
        check_labels(labels, path.name)
        return labels


def depth_picture(metres: NDArray[np.floating], path: Path) -> NDArray[np.uint8]:
    """A picture (H, W, 3) of nearness, as the published depth model's maps: 1 / depth from the farthest, 0, to the
    nearest, 255.

    metres: (H, W) or (H, W, 1). What is 0, not finite, or 0 in the mask beside (`…_mask.npy`) is invalid: black, as
    if far. Raises ValueError for another shape.
    """
    depth = metres.reshape(metres.shape[:2]) if metres.ndim == 3 and metres.shape[2] == 1 else metres
    if depth.ndim != 2:
        raise ValueError(f"{path.name}: depth of shape {metres.shape}, not (height, width)")
    valid = np.isfinite(depth) & (depth > 0)
    mask = path.with_name(f"{path.stem}_mask.npy")
    if mask.is_file():
        valid &= np.load(mask, allow_pickle=False).reshape(depth.shape) > 0
    near = np.divide(1.0, depth, out=np.zeros(depth.shape), where=valid)
    low, high = (near[valid].min(), near[valid].max()) if valid.any() else (0.0, 0.0)
    grey = np.where(valid, (near - low) / ((high - low) or 1.0), 0)
    return np.repeat(np.rint(255 * grey).astype(np.uint8)[..., None], 3, -1)


def normal_picture(vectors: NDArray[np.floating], path: Path) -> NDArray[np.uint8]:
    """A picture (H, W, 3): colours of vectors (H, W, 3) in [-1, 1]: -1 is 0, 1 is 255. Raises ValueError for another
    shape."""
    if vectors.ndim != 3 or vectors.shape[2] != 3:
        raise ValueError(f"{path.name}: normals of shape {vectors.shape}, not (height, width, 3)")
    return np.rint((np.nan_to_num(vectors).clip(-1, 1) * 0.5 + 0.5) * 255).astype(np.uint8)


ARRAYS = {"depth": depth_picture, "normal": normal_picture}
