"""Image files: opened with their faults reported, and those of ours that carry the request that generates them again.

PIL is imported where it is used, so that requests can be read without it.
"""

from __future__ import annotations

import functools
import io
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

if TYPE_CHECKING:
    from PIL import Image

ImageSource: TypeAlias = "str | os.PathLike[str] | Image.Image"  # a file, or an image in memory

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP"}  # what images are written as, by their suffix
QUALITY = 95  # of JPEG and WebP
EXIF_IFD, USER_COMMENT, ASCII = 0x8769, 0x9286, b"ASCII\0\0\0"  # where EXIF holds free text, and of which kind
MAX_EXIF = 65000  # bytes of text that a JPEG's EXIF segment, of 64 KiB, has room for
MAX_LABEL = 151  # ADE20K's 0..150 and one spare


class ImageFiles:
    """The images of a run, each file opened and decoded once, so that no two steps of a run see different content.

    limit: bytes of decoded images that are kept; what comes after that is opened anew whenever it is asked for.
    """

    def __init__(self, limit: int = 2**30) -> None:
        self._room = limit
        self._kept: dict[tuple[str, bool], Image.Image] = {}
        self._fingerprints: dict[str, str] = {}

    def open(self, source: ImageSource, subject: str | None = None, *, lossless: bool = False) -> Image.Image:
        """The image as `open_image` gives it, shared: it is not to be changed."""
        if not isinstance(source, (str, os.PathLike)):
            return open_image(source, subject, lossless=lossless)
        path = os.fspath(source)
        image = self._kept.get((path, lossless))
        if image is None:
            import hashlib

            subject = subject or f"image '{path}'"
            content = _read(path, subject)
            image = _decode(content, subject, lossless)
            self._fingerprints[path] = hashlib.sha256(content).hexdigest()[:16]
            size = image.width * image.height * len(image.getbands())
            if size <= self._room:
                self._room -= size
                self._kept[path, lossless] = image
        return image

    def fingerprint(self, source: ImageSource) -> str | None:
        """16 hexadecimal digits of a file's content, None if it was not opened or is an image in memory."""
        return self._fingerprints.get(os.fspath(source)) if isinstance(source, (str, os.PathLike)) else None


def open_image(source: ImageSource | bytes, subject: str | None = None, *, lossless: bool = False) -> Image.Image:
    """An image, checked, decoded and upright (EXIF), in the mode it was saved in.

    source: a file, the bytes of one, or a PIL image. subject: what errors begin with; None is the path. lossless:
    refuses files whose compression changed the pixels.
    Raises FileNotFoundError or ValueError, one line.
    """
    from PIL import Image

    if isinstance(source, (Image.Image, bytes)):
        return _decode(source, subject or "image", lossless)
    subject = subject or f"image '{source}'"
    return _decode(_read(source, subject), subject, lossless)


def _read(path: str | os.PathLike[str], subject: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{subject}: there is no such file") from None
    except OSError as error:
        raise ValueError(f"{subject}: {error.strerror}") from None


def _decode(source: bytes | Image.Image, subject: str, lossless: bool) -> Image.Image:
    """The image of a file's content, or one in memory, as `open_image` gives it."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        if isinstance(source, Image.Image):
            image = source
        else:
            image = Image.open(io.BytesIO(source))
            if image.format == "PNG":  # it alone has checksums, which decoding skips
                image.verify()
                image = Image.open(io.BytesIO(source))  # as it must be after it
        image.load()
        if image is source:  # which stays as it is
            upright = ImageOps.exif_transpose(image)
        else:
            ImageOps.exif_transpose(image, in_place=True)
            upright = image
    except UnidentifiedImageError:
        raise ValueError(f"{subject}: not an image file") from None
    except Image.DecompressionBombError:
        raise ValueError(f"{subject}: too many pixels, make it smaller") from None
    except (OSError, SyntaxError, ValueError, EOFError, RuntimeError, struct.error) as error:  # by format
        raise ValueError(f"{subject}: the image is truncated or damaged ({' '.join(str(error).split())})") from None
    if lossless and _is_lossy(image, source if isinstance(source, bytes) else b""):
        raise ValueError(f"{subject}: {image.format} compression has changed its pixels, save it as PNG from the start")
    if upright.mode == "F":
        raise ValueError(f"{subject}: its levels are floating-point numbers, save it with 8 or 16 bits")
    return upright


def _is_lossy(image: Image.Image, content: bytes) -> bool:
    """Whether the format the image was read from changes pixels. content: the file's, b'' for an image in memory."""
    if image.format == "WEBP":
        chunks, at = set(), 12  # after RIFF, its length and WEBP
        while at + 8 <= len(content):
            kind, length = content[at : at + 4], int.from_bytes(content[at + 4 : at + 8], "little")
            chunks.add(kind)
            at += 8 + (16 if kind == b"ANMF" else length + length % 2)  # a frame holds chunks of its own
        return b"VP8 " in chunks or not content  # VP8L is lossless
    if image.format == "TIFF":
        return image.info.get("compression") in ("jpeg", "tiff_jpeg", "webp")
    return image.format in ("JPEG", "MPO", "AVIF", "HEIF")


def eight_bits(image: Image.Image) -> Image.Image:
    """An image whose greys of 16 bits are scaled to 8; others as they are."""
    if image.mode not in ("I", "I;16", "I;16B"):
        return image
    import numpy as np
    from PIL import Image

    return Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))


def unused_note(image: Image.Image) -> str | None:
    """What of an image's content is not used, in words that fit behind its name: further frames or pages, and
    transparency. None if all of it is."""
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a photograph with its previews
        return f"holds {frames} pictures: the first is used"
    if image.has_transparency_data and _extrema(image.convert("RGBA").getchannel("A"))[0] < 255:
        return "has transparent parts, which become white"
    return None


def is_invisible(image: Image.Image) -> bool:
    """Whether every pixel of an image is transparent (alpha below half)."""
    return image.has_transparency_data and _extrema(image.convert("RGBA").getchannel("A"))[1] < 128


def hole(image: Image.Image) -> Image.Image | None:
    """The transparent part of an image (alpha below half): levels 255 there, 0 elsewhere (mode L); None if there is
    none, or nothing else."""
    if not image.has_transparency_data:
        return None
    alpha = image.convert("RGBA").getchannel("A")
    low, high = _extrema(alpha)
    return alpha.point([255] * 128 + [0] * 128) if low < 128 <= high else None


def mask_levels(image: Image.Image) -> Image.Image:
    """The part that a mask, as people make them, wants repainted: levels 255 there, 0 elsewhere (mode L).

    White (from half brightness on) is repainted. A mask with transparency is a painted layer if something of it is
    white, and transparent is kept; else a sheet or an image with a hole, which is what is repainted.
    """
    image = eight_bits(image)
    if (transparent := _sheet_hole(image)) is not None:
        return transparent
    grey = image.convert("RGB").convert("L")
    white = grey.point([0] * 128 + [255] * 128)
    if not image.has_transparency_data:
        return white
    from PIL import ImageChops

    opaque = image.convert("RGBA").getchannel("A").point([0] * 128 + [255] * 128)
    return ImageChops.multiply(white, opaque)


def check_mask(image: Image.Image, subject: str) -> str | None:
    """A note on what a mask means, to be logged, or None where there is nothing to note.

    Raises ValueError, beginning with `subject`, for one that is black, or no mask: up to a quarter of it, and up to
    twice as much as is white, may be neither nearly black nor nearly white (soft edges).
    """
    image = eight_bits(image)
    if not any(mask_levels(image).histogram()[128:]):
        highest = _extrema(image.convert("RGB").convert("L"))[1]
        found = f"of which nothing is bright, the most {highest} of 255" if highest else "which is black"
        raise ValueError(f"{subject}, {found}: paint white what is to be repainted")
    black, white, between = _tones(image, hole(image))
    if (transparent := _sheet_hole(image)) is not None:
        from PIL import ImageChops, ImageStat

        levels = ImageStat.Stat(image.convert("RGB"), ImageChops.invert(transparent)).extrema  # of each channel
        if between and max(high - low for low, high in levels) < 32:
            raise ValueError(f"{subject}, whose opaque part has one colour, neither black nor white: paint it white")
        share = 100 * transparent.histogram()[255] / (image.width * image.height)
        return f"the transparent part of {subject.partition(' is ')[0]}, {share:.0f} % of it, is what is repainted"
    if _is_no_mask(black, white, between):
        raise ValueError(
            f"{subject}, of which {100 * between / (black + white + between):.0f} % is neither nearly black nor nearly "
            "white: give a mask, white where is to be repainted and black elsewhere"
        )
    return None


def _sheet_hole(image: Image.Image) -> Image.Image | None:
    """The hole, if any, around which what is opaque is a sheet or an image, not a layer painted white."""
    transparent = hole(image)
    if transparent is None:
        return None
    black, white, between = _tones(image, transparent)
    return transparent if white == 0 or _is_no_mask(black, white, between) else None


def _is_no_mask(black: int, white: int, between: int) -> bool:
    return between * 4 > black + white + between or between > 2 * white


def _tones(image: Image.Image, transparent: Image.Image | None) -> tuple[int, int, int]:
    """Counts of the opaque pixels that are nearly black, nearly white, and neither."""
    from PIL import ImageChops

    opaque = None if transparent is None else ImageChops.invert(transparent)
    brightest, darkest = _brightest_darkest(image)
    black, white = sum(brightest.histogram(opaque)[:32]), sum(darkest.histogram(opaque)[224:])
    return black, white, sum(darkest.histogram(opaque)) - black - white


def _brightest_darkest(image: Image.Image) -> tuple[Image.Image, Image.Image]:
    """The highest and the lowest of each pixel's levels of red, green and blue."""
    from PIL import ImageChops

    channels = image.convert("RGB").split()
    return functools.reduce(ImageChops.lighter, channels), functools.reduce(ImageChops.darker, channels)


def levels_used(image: Image.Image) -> tuple[int, int, int]:
    """The lowest and highest level of the channel that varies most, and the highest there could be."""
    if image.mode in ("I", "I;16", "I;16B"):
        return (*_extrema(image), 65535)
    found = [_extrema(channel) for channel in image.convert("RGB").split()]
    return (*max(found, key=lambda pair: pair[1] - pair[0]), 255)


def _extrema(channel: Image.Image) -> tuple[int, int]:
    return cast("tuple[int, int]", channel.getextrema())


def map_note(image: Image.Image, name: str) -> str | None:
    """What is odd about an image given as map `name` ('depth', 'canny', ...), in words that fit behind its name.

    Legal, and seldom meant: depths and edges that are coloured (a photograph, or a colour scale of a viewer), edges or
    strokes that are dark on white, normals that are grey, levels that span less than a twentieth of what they could.
    """
    low, high, full = levels_used(image)
    if (high - low) * 20 < full:
        return (
            f"whose levels are {low} to {high} of 0 to {full}: less than a twentieth of the range, stretch it if it is "
            "meant to have contrast"
        )
    from PIL import ImageChops

    rgb = eight_bits(image).convert("RGB")
    saturation = ImageChops.subtract(*_brightest_darkest(rgb)).histogram()
    pixels = image.width * image.height
    if name == "normal":
        grey = sum(saturation[:9]) == pixels
        return "which is grey: a map of normals has x, y and z as red, green and blue" if grey else None
    if sum(saturation[48:]) * 20 > pixels:
        return f"which is in colour: a {name} map is grey, and its colours are read as other levels"
    if name != "depth" and sum(rgb.convert("L").histogram()[128:]) * 2 > pixels:
        return f"which is mostly white: a {name} map has white lines on black, invert it"
    return None


def cropped_size(size: tuple[int, int], width: int, height: int) -> tuple[int, int]:
    """The size of the largest middle part that has (width, height)'s aspect ratio, in whole pixels of an image."""
    W, H = size
    if W * height > H * width:
        return max(1, round(H * width / height)), H
    return W, max(1, round(W * height / width))


def check_labels(image: Image.Image, subject: str) -> None:
    """Raises ValueError, beginning with `subject`, unless the image is one channel of ADE20K label ids."""
    wanted = f"give one channel of ADE20K label ids 0..{MAX_LABEL - 1} ({MAX_LABEL} for none)"
    if image.mode not in ("L", "P", "I", "I;16"):
        kind = "a semantic colouring" if image.mode in ("RGB", "RGBA") else "not a label map"
        raise ValueError(f"{subject}, {kind} (mode {image.mode}): {wanted}")
    low, high = image.getextrema()
    if not isinstance(low, tuple) and not isinstance(high, tuple) and not 0 <= low <= high <= MAX_LABEL:
        raise ValueError(f"{subject}, with values {low}..{high}: {wanted}")


def save_image(
    image: Image.Image, path: str | Path, request: Mapping[str, Any], extra: Mapping[str, Any] | None = None
) -> None:
    """Writes a new image that carries JSON: {"request": request, **extra}. Its suffix, one of FORMATS', says how.

    A PNG holds it as text chunk 'gligen', JPEG and WebP as EXIF's UserComment.
    request: `gligen.request.to_dict`'s result. extra: what else repeats the run (which image of it, the checkpoint).
    Raises as `write_new_image`.
    """
    write_new_image(image, path, {"request": request, **(extra or {})})


def write_new_image(image: Image.Image, path: str | Path, record: Mapping[str, Any] | None = None) -> None:
    """Writes an image that was not there. Raises FileExistsError if it was; a write that fails leaves no file."""
    content = image_bytes(image, Path(path).suffix, record)
    file = open(path, "xb")  # noqa: SIM115 - a file that was there must survive, so opening stays outside the try
    try:
        with file:
            file.write(content)
    except BaseException:
        Path(path).unlink()
        raise


def image_bytes(image: Image.Image, suffix: str, record: Mapping[str, Any] | None = None) -> memoryview:
    """The content of an image file of the format that a suffix of FORMATS stands for, with a record as `save_image`."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    options: dict[str, Any] = {"quality": QUALITY}
    if record is not None and suffix == ".png":
        info = PngInfo()
        info.add_itxt("gligen", json.dumps(record, ensure_ascii=False))
        options["pnginfo"] = info
    elif record is not None:
        exif = Image.Exif()
        exif[EXIF_IFD] = {USER_COMMENT: ASCII + json.dumps(record).encode()}
        options["exif"] = exif
    content = io.BytesIO()
    image.save(content, FORMATS[suffix], **options)
    return content.getbuffer()


def check_record_fits(record: Mapping[str, Any], suffix: str) -> None:
    """Raises ValueError, one line, for a record that a JPEG has no room for."""
    if suffix == ".jpg" and (size := len(json.dumps(record))) > MAX_EXIF:
        raise ValueError(f"the request is {size} bytes long, and a JPEG holds {MAX_EXIF}: use --format png or webp")


def is_image_file(content: bytes) -> bool:
    """Whether a file's first bytes are those of a PNG, JPEG or WebP."""
    return content.startswith((b"\x89PNG", b"\xff\xd8\xff")) or (content[:4] == b"RIFF" and content[8:12] == b"WEBP")


def read_record(path: str | Path) -> dict[str, Any]:
    """The record that save_image stored in an image: {"request": plain data, ...}.

    Raises ValueError, one line, if the file is no whole image or holds no request; OSError if it cannot be opened.
    """
    from PIL import Image

    name = Path(path).name
    with open(Path(path).expanduser(), "rb") as file:
        try:
            with Image.open(file, formats=list(FORMATS.values())) as image:
                image.load()
                text = image.info.get("gligen") or image.getexif().get_ifd(EXIF_IFD).get(USER_COMMENT)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            raise ValueError(f"{name}: not a PNG, JPEG or WebP image, or a damaged one") from None
    if isinstance(text, bytes) and text.startswith(ASCII):
        text = text[len(ASCII) :].decode("ascii", errors="replace")
    if not isinstance(text, str):
        raise ValueError(
            f"{name}: holds no request: images this project generated do (NNNN-K, not annotated ones and grids), until "
            "another program saves them anew"
        )
    try:
        record = json.loads(text)
        record["request"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{name}: its metadata holds no request of this project") from None
    return dict(record)
