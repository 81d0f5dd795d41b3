"""Pictures: preparation equals the original's, drawing leaves its input alone, PNGs give their request back."""

from __future__ import annotations

import errno
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image, PngImagePlugin

from gligen.grounding import draw_request
from gligen.image_files import read_record, save_image
from gligen.images import NEAREST, fit, grid, label_tensor, load_map, load_rgb, to_pil, to_tensor
from gligen.output import OutputFolder
from gligen.request import parse_request, read_requests, to_dict

ROOT = Path(__file__).parents[2]
BOX = [0.1, 0.2, 0.6, 0.9]


def noise(width: int, height: int, channels: int = 3) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze())


@pytest.mark.parametrize("size", [(40, 31), (31, 40), (33, 64), (64, 35), (37, 37), (32, 32)])
def test_fitting_to_a_square_equals_the_originals_crop_and_resize(size: tuple[int, int]) -> None:
    image = noise(*size)
    expected = TF.center_crop(image, min(size)).resize((32, 32))
    assert np.array_equal(np.array(fit(image, 32, 32)), np.array(expected))


@pytest.mark.parametrize("size", [(100, 50), (50, 100), (1, 90), (90, 1), (64, 32)])
def test_fitting_keeps_the_aspect_ratio_and_the_centre(size: tuple[int, int]) -> None:
    W, H = size
    ramp = np.stack([np.tile(np.arange(W), (H, 1)), np.tile(np.arange(H)[:, None], (1, W)), np.zeros((H, W))], -1)
    fitted = fit(Image.fromarray(ramp.astype(np.uint8)), 32, 16, Image.Resampling.BOX)
    assert fitted.size == (32, 16)
    mean = np.array(fitted).reshape(-1, 3).mean(0)
    assert abs(mean[0] - (W - 1) / 2) <= 1  # rounding to whole pixels
    assert abs(mean[1] - (H - 1) / 2) <= 1


def test_tensors_and_pictures_convert_without_loss() -> None:
    image = noise(7, 5)
    tensor = to_tensor(image)
    assert tensor.shape == (3, 5, 7)
    assert tensor.dtype == torch.float32
    expected = (TF.pil_to_tensor(image).float() / 255 - 0.5) / 0.5
    assert torch.equal(tensor, expected)
    # truncation may lose a level where x/255 is not exact in float32, as it did in the original
    assert np.abs(np.array(to_pil(tensor)).astype(int) - np.array(image)).max() <= 1


def test_levels_are_clamped_and_truncated() -> None:
    values = torch.tensor([-9.0, -1.0, 0.0, 0.999, 1.0, 9.0]).expand(3, 1, 6)
    assert np.array(to_pil(values))[0, :, 0].tolist() == [0, 0, 127, 254, 255, 255]
    assert np.array(to_pil(values.bfloat16())).shape == (1, 6, 3)


def test_nan_is_an_error_and_not_a_dark_pixel() -> None:
    with pytest.raises(ValueError, match="NaN"):
        to_pil(torch.full((3, 2, 2), float("nan")))


def test_pictures_load_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (20, 10), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    image.save(tmp_path / "a.jpg", exif=exif)
    assert load_rgb(tmp_path / "a.jpg").size == (10, 20)


def test_transparency_becomes_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    for name, saved in (("a.png", image), ("b.png", image.quantize(4)), ("c.png", image.convert("LA"))):
        saved.save(tmp_path / name)
        loaded = load_rgb(tmp_path / name)
        assert loaded.mode == "RGB"
        assert loaded.getpixel((3, 3)) == (255, 255, 255)
        assert loaded.getpixel((0, 0)) != (255, 255, 255)


def test_sixteen_bit_greys_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    levels = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "a.png")
    Image.fromarray(levels.astype(np.int32)).save(tmp_path / "b.tif")
    for name in ("a.png", "b.tif"):
        assert np.array(load_rgb(tmp_path / name))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_a_picture_that_cannot_be_read_is_named_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^image '.*a.png': there is no such file$"):
        load_rgb(tmp_path / "a.png")
    (tmp_path / "a.png").write_text("hello")
    with pytest.raises(ValueError, match=r"^image '.*a.png': not an image file$"):
        load_rgb(tmp_path / "a.png")


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_every_picture_mode_loads_as_rgb(tmp_path: Path, mode: str) -> None:
    noise(6, 4).convert(mode).save(tmp_path / "a.tif")
    assert load_rgb(tmp_path / "a.tif").mode == "RGB"


@pytest.mark.parametrize("mode", ["L", "P", "I", "I;16"])
def test_labels_keep_their_ids(tmp_path: Path, mode: str) -> None:
    ids = np.arange(64, dtype=np.uint8).reshape(8, 8) + 88
    image = Image.fromarray(ids)
    if mode == "P":
        image.putpalette(bytes(reversed(range(256))) * 3)
    elif mode == "I;16":
        image = Image.fromarray(ids.astype(np.uint16))
    else:
        image = image.convert(mode)
    assert image.mode == mode
    image.save(tmp_path / "sem.tif")
    labels = load_map(tmp_path / "sem.tif", "sem", 8, 8)
    assert labels.dtype == torch.int64
    assert torch.equal(labels, torch.from_numpy(ids.astype(np.int64))[None])
    assert set(load_map(tmp_path / "sem.tif", "sem", 30, 12).unique().tolist()) <= set(ids.ravel().tolist())
    assert torch.equal(label_tensor(fit(image, 16, 16, NEAREST))[:, ::2, ::2], labels)


def test_a_coloured_label_map_is_refused(tmp_path: Path) -> None:
    noise(8, 8).save(tmp_path / "sem.png")
    with pytest.raises(ValueError, match="semantic colouring"):
        load_map(tmp_path / "sem.png", "sem", 8, 8)


@pytest.mark.parametrize("mode", ["hed", "canny", "depth", "normal", "scribble"])
def test_other_maps_are_pictures(mode: str) -> None:
    tensor = load_map(ROOT / "examples" / "inputs" / f"{mode}.png", mode, 96, 64)
    assert tensor.shape == (3, 64, 96)
    assert -1 <= tensor.min() < tensor.max() <= 1
    assert (mode == "normal") != torch.equal(tensor[0], tensor[1])


REQUESTS: list[dict[str, Any]] = [
    {"entities": [{"phrase": "a cat", "box": BOX}, {"phrase": "ein sehr langer Satz – " * 9, "box": [0.9, 0.9, 1, 1]}]},
    {"entities": [{"image": "a.png", "box": [0, 0, 1e-4, 1e-4]}, {"image": "a.png", "box": [0, 1, 0, 1]}]},
    {"keypoints": [[[0.5, 0.05 * (i + 1)] for i in range(17)], [None] * 16 + [[1, 1]]]},
    {"inpaint": {"image": "a.png", "mask": str(ROOT / "examples" / "inputs" / "mask.png")}},
]


@pytest.mark.parametrize("data", REQUESTS)
@pytest.mark.parametrize("size", [(64, 64), (512, 512), (64, 192), (8, 8)])
def test_drawing_a_request_leaves_the_picture_as_it_was(data: dict[str, Any], size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, "grey")
    drawn = draw_request(image, parse_request({"prompt": "x", **data}))
    assert drawn.size == size
    assert drawn.tobytes() != image.tobytes()
    assert image.tobytes() == Image.new("RGB", size, "grey").tobytes()


def test_a_request_without_grounding_draws_nothing() -> None:
    image = noise(16, 16)
    assert draw_request(image, parse_request({"prompt": "x"})).tobytes() == image.tobytes()


def test_boxes_are_drawn_where_they_were_asked_for() -> None:
    request = parse_request({"prompt": "x", "entities": [{"phrase": "a", "box": [0.25, 0.5, 0.75, 1]}]})
    drawn = np.array(draw_request(Image.new("L", (101, 101)), request).convert("L")) > 0
    rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (25, 50, 75, 100)


def labelled(phrase: str) -> bytes:
    request = parse_request({"prompt": "x", "entities": [{"phrase": phrase, "box": BOX}]})
    return draw_request(Image.new("RGB", (256, 256)), request).tobytes()


@pytest.mark.parametrize("phrase", ["\u043a\u0440\u0430\u0441\u043d\u044b\u0439", "\u72d0\u72f8"])
def test_letters_that_no_font_has_become_a_number(
    phrase: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("gligen.images.FONTS", ())
    with caplog.at_level(logging.INFO, logger="gligen"):
        assert labelled(phrase) == labelled("1")
    assert caplog.messages == [f"no font here has the letters of '{phrase}': its box is labelled 1"]


def test_letters_are_drawn_in_a_font_that_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")  # which brings a font with Cyrillic letters, and none with Chinese
    monkeypatch.setattr("gligen.images.FONTS", (f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf",))
    one, other = labelled("\u043a\u043e\u0442"), labelled("\u0434\u043e\u043c")
    assert len({one, other, labelled("1")}) == 3
    assert labelled("\u72d0") == labelled("1")


def test_a_grid_holds_every_picture() -> None:
    colors = [(i, 0, 0) for i in range(1, 6)]
    images = [Image.new("RGB", (10, 8), color) for color in colors]
    for columns, size in ((None, (34, 18)), (5, (58, 8)), (1, (10, 48)), (9, (58, 8))):
        sheet = grid(images, columns)
        assert sheet.size == size
        found = {color: count for count, color in sheet.getcolors() or []}
        assert all(found[color] == 80 for color in colors)
    with pytest.raises(ValueError, match="at least one"):
        grid([])


REQUEST = {"prompt": 'ein „Fuchs" – 狐 🦊\n', "entities": [{"phrase": "狐", "box": BOX}], "seed": 2**63 - 1}


def test_a_png_gives_its_request_back(tmp_path: Path) -> None:
    request = parse_request(REQUEST)
    image = noise(12, 9)
    save_image(image, tmp_path / "a.png", to_dict(request), {"image": 3})
    assert read_record(tmp_path / "a.png") == {"request": to_dict(request), "image": 3}
    assert read_requests(tmp_path / "a.png") == [request]
    with Image.open(tmp_path / "a.png") as saved:
        assert np.array_equal(np.array(saved), np.array(image))
        assert '"image": 3' in saved.info["gligen"]
        assert "狐" in saved.info["gligen"]  # readable as it stands


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_jpeg_and_webp_carry_their_request_in_exif(tmp_path: Path, suffix: str) -> None:
    request, path = parse_request(REQUEST), tmp_path / f"a.{suffix}"
    image = noise(4, 4).resize((64, 48), Image.Resampling.BICUBIC)
    save_image(image, path, to_dict(request), {"image": 3})
    assert read_record(path) == {"request": to_dict(request), "image": 3}
    assert read_requests(path) == [request]
    with Image.open(path) as saved:
        assert saved.format == {"jpg": "JPEG", "webp": "WEBP"}[suffix]
        assert np.abs(np.array(saved).astype(int) - np.array(image)).mean() < 4
        comment = saved.getexif().get_ifd(0x8769)[0x9286]  # EXIF's UserComment, and the eight bytes of its kind
        assert json.loads(comment.removeprefix(b"ASCII\0\0\0"))["request"]["prompt"] == request.prompt
    noise(4, 4).save(tmp_path / f"b.{suffix}")
    with pytest.raises(ValueError, match="holds no request"):
        read_requests(tmp_path / f"b.{suffix}")


def test_a_request_that_a_jpeg_has_no_room_for_is_refused_beforehand(tmp_path: Path) -> None:
    long = parse_request({"prompt": "x" * 66000})
    with pytest.raises(ValueError, match=r"a JPEG holds 65000: use --format png or webp"):
        OutputFolder(tmp_path, ".jpg").check(long, {})
    OutputFolder(tmp_path, ".webp").check(long, {})
    save_image(noise(8, 8), tmp_path / "a.webp", to_dict(long))
    assert read_requests(tmp_path / "a.webp") == [long]
    save_image(noise(8, 8), tmp_path / "a.jpg", {"prompt": "x" * 64900})  # the most that is let through


def test_a_png_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("mine")
    with pytest.raises(FileExistsError):
        save_image(noise(4, 4), tmp_path / "a.png", {})
    assert (tmp_path / "a.png").read_text() == "mine"


def test_a_failed_write_leaves_no_file(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # a disk with room for 1000 bytes
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            save_image(noise(64, 64), tmp_path / "a.png", {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_a_png_without_a_request_says_so(tmp_path: Path) -> None:
    noise(4, 4).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"^a.png: holds no request[^\n]*$"):
        read_requests(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"^b.png: not a PNG, JPEG or WebP image, or a damaged one$"):
        read_requests(tmp_path / "b.png")
    for text in ("{", "[]", "{}"):
        info = PngImagePlugin.PngInfo()
        info.add_text("gligen", text)
        noise(4, 4).save(tmp_path / "c.png", pnginfo=info)
        with pytest.raises(ValueError, match=r"^c.png: its metadata holds no request of this project$"):
            read_requests(tmp_path / "c.png")
