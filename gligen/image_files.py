"""Image files: opened with their faults told, and PNGs that carry the request that generates them again.

PIL is imported where it is used, so that requests can be read without it.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

MAX_LABEL = 151  # ADE20K's 0..150 and one spare


def open_image(path: str | Path | bytes, subject: str | None = None) -> Image.Image:
    """The picture of a file, or of the bytes of one, checked, decoded and upright (EXIF), in the mode it was saved in.

    subject: what errors begin with; None is the path. Raises FileNotFoundError or ValueError, one line.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not subject:
        subject = "image" if isinstance(path, bytes) else f"image '{path}'"

    def file() -> str | Path | io.BytesIO:
        return io.BytesIO(path) if isinstance(path, bytes) else path

    try:
        image = Image.open(file())
        if image.format == "PNG":  # it alone has checksums, which decoding skips; it must be opened again after them
            image.verify()
            image = Image.open(file())
        with image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{subject}: there is no such file") from None
    except UnidentifiedImageError:
        raise ValueError(f"{subject}: not an image file") from None
    except Image.DecompressionBombError:
        raise ValueError(f"{subject}: too many pixels, make it smaller") from None
    except (OSError, SyntaxError, ValueError, EOFError, RuntimeError, struct.error) as error:  # by format
        damage = f"the image is truncated or damaged ({' '.join(str(error).split())})"
        reason = error.strerror if isinstance(error, OSError) and error.strerror else damage
        raise ValueError(f"{subject}: {reason}") from None
    if image.mode == "F":
        raise ValueError(f"{subject}: its levels are floating-point numbers, save it with 8 or 16 bits")
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture as RGB: greys of 16 bits are scaled to 8, where PIL alone would clip them; what is transparent
    becomes white."""
    image = eight_bits(image)
    if image.has_transparency_data:
        image = flatten(image, "white")
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def eight_bits(image: Image.Image) -> Image.Image:
    """Greys of 16 bits scaled to 8; others as they are."""
    if image.mode not in ("I", "I;16", "I;16B"):
        return image
    import numpy as np
    from PIL import Image

    return Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))


def flatten(image: Image.Image, background: str) -> Image.Image:
    """The picture (any mode) laid on a background, RGBA."""
    from PIL import Image

    return Image.alpha_composite(Image.new("RGBA", image.size, background), image.convert("RGBA"))


def check_labels(image: Image.Image, subject: str) -> None:
    """Raises ValueError, beginning with `subject`, unless the image is one channel of ADE20K label ids."""
    wanted = f"give one channel of ADE20K label ids 0..{MAX_LABEL - 1} ({MAX_LABEL} for none)"
    if image.mode not in ("L", "P", "I", "I;16"):
        kind = "a semantic colouring" if image.mode in ("RGB", "RGBA") else "not a label map"
        raise ValueError(f"{subject}, {kind} (mode {image.mode}): {wanted}")
    low, high = image.getextrema()
    if not isinstance(low, tuple) and not isinstance(high, tuple) and not 0 <= low <= high <= MAX_LABEL:
        raise ValueError(f"{subject}, with values {low}..{high}: {wanted}")


def save_png(
    image: Image.Image, path: str | Path, request: Mapping[str, Any], extra: Mapping[str, Any] | None = None
) -> None:
    """Writes a new PNG whose text chunk 'gligen' holds JSON: {"request": request, **extra}.

    request: `gligen.request.to_dict`'s result. extra: what else repeats the run (which image of it, the checkpoint).
    Raises FileExistsError rather than overwrite; a write that fails leaves no file.
    """
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("gligen", json.dumps({"request": request, **(extra or {})}, ensure_ascii=False))
    write_new_png(image, path, info)


def write_new_png(image: Image.Image, path: str | Path, info: PngInfo | None = None) -> None:
    """Writes a PNG that was not there. Raises FileExistsError if it was; a write that fails leaves no file."""
    content = io.BytesIO()
    image.save(content, "PNG", pnginfo=info)
    file = open(path, "xb")  # noqa: SIM115 - a file that was there must survive, so opening stays outside the try
    try:
        with file:
            file.write(content.getbuffer())
    except BaseException:
        Path(path).unlink()
        raise


def read_png_request(path: str | Path) -> dict[str, Any]:
    """The request, as plain data, that save_png stored in a PNG.

    Raises ValueError, one line, if the file is no whole PNG or holds no request; OSError if it cannot be opened.
    """
    from PIL import Image

    name = Path(path).name
    with open(path, "rb") as file:
        try:
            with Image.open(file, formats=["PNG"]) as image:
                image.load()
                text = image.info.get("gligen")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            raise ValueError(f"{name}: not a PNG, or a damaged one") from None
    if not isinstance(text, str):
        raise ValueError(f"{name}: holds no request: only PNGs written by this project do")
    try:
        return json.loads(text)["request"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{name}: its text chunk 'gligen' holds no request") from None
