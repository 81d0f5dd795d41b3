"""Inpainting masks: boxes as the original cuts them, users' masks without losing thin strokes, the exact blend."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gligen.grounding.inpainting import boxes_mask, inpaint_channels, keep_known, load_mask, mask_to_latent, put_back

GOLDEN = Path(__file__).parents[1] / "golden" / "cases" / "inpaint_mask.npz"


@pytest.mark.parametrize("side", [64, 16])
def test_box_masks_equal_the_originals(side: int) -> None:
    with np.load(GOLDEN) as golden:
        boxes, expected = torch.from_numpy(golden["boxes"]), torch.from_numpy(golden[f"mask{side}"])
    mask = boxes_mask(boxes, side, side)
    assert mask.dtype == torch.float32
    assert torch.equal(mask, expected)


def test_box_masks_equal_slices_on_grids_that_are_not_square() -> None:
    corners = torch.rand(4, 5, 4, generator=torch.Generator().manual_seed(0))  # about 3 in 4 inverted
    mask = boxes_mask(corners, 12, 20)
    for b in range(4):
        expected = torch.ones(12, 20)
        for box in corners[b]:
            x0, y0, x1, y1 = (int(v) for v in box * torch.tensor([20.0, 12.0, 20.0, 12.0]))
            expected[y0:y1, x0:x1] = 0
        assert torch.equal(mask[b, 0], expected)


def test_no_box_keeps_everything() -> None:
    assert boxes_mask(torch.zeros(2, 0, 4), 4, 4).eq(1).all()
    assert boxes_mask(torch.tensor([[[0.0, 1.0, 0.0, 1.0]]]), 4, 4).eq(1).all()  # a style reference


def test_a_latent_cell_is_repainted_if_any_of_its_pixels_is() -> None:
    mask = torch.zeros(1, 16, 24)
    mask[0, 7, 8] = 1
    keep = mask_to_latent(mask, 8)
    expected = torch.ones(1, 2, 3)
    expected[0, 0, 1] = 0
    assert torch.equal(keep, expected)


def test_white_is_repainted_in_every_kind_of_picture(tmp_path: Path) -> None:
    white = Image.new("L", (16, 8), 0)
    white.paste(255, (0, 0, 8, 8))
    alpha = Image.new("RGBA", (16, 8), (255, 255, 255, 0))  # transparent white is not painted
    alpha.paste((255, 255, 255, 255), (0, 0, 8, 8))
    kinds = {"1": white.convert("1"), "L": white, "RGB": white.convert("RGB"), "P": white.convert("P"), "RGBA": alpha}
    for mode, image in kinds.items():
        assert image.mode == mode
        image.save(tmp_path / "m.png")
        mask = load_mask(tmp_path / "m.png", 32, 16)
        assert mask.shape == (1, 16, 32)
        assert mask.dtype == torch.float32
        assert mask[0, :, :16].eq(1).all()
        assert mask[0, :, 16:].eq(0).all()


def test_the_threshold_is_half_brightness(tmp_path: Path) -> None:
    for level, painted in ((127, False), (128, True)):
        image = Image.new("L", (8, 8), level)
        image.paste(255, (0, 0, 1, 8))
        image.save(tmp_path / "m.png")
        assert bool(load_mask(tmp_path / "m.png", 8, 8)[0, 4, 4]) is painted


def test_a_black_mask_has_nothing_to_repaint(tmp_path: Path) -> None:
    Image.new("L", (8, 8), 0).save(tmp_path / "m.png")
    with pytest.raises(ValueError, match=r"^mask '.*m.png' is black.*nothing to repaint[^\n]*$"):
        load_mask(tmp_path / "m.png", 8, 8)


def test_the_extra_channels_are_the_kept_latents_and_the_mask() -> None:
    x0, keep = torch.randn(2, 4, 3, 5), torch.randint(0, 2, (2, 1, 3, 5)).float()
    channels = inpaint_channels(x0, keep)
    assert channels.shape == (2, 5, 3, 5)
    assert torch.equal(channels[:, :4], torch.where(keep.bool(), x0, 0 * x0))
    assert torch.equal(channels[:, 4:], keep)


def test_known_latents_are_kept_exactly_and_the_inputs_unchanged() -> None:
    x, noised = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5)
    keep = torch.randint(0, 2, (2, 1, 3, 5)).float()
    before = x.clone(), noised.clone(), keep.clone()
    assert torch.equal(keep_known(x, noised, keep), torch.where(keep.bool(), noised, x))
    assert all(torch.equal(a, b) for a, b in zip((x, noised, keep), before, strict=True))


def test_kept_pixels_are_the_pictures_own_and_the_painted_ones_lose_their_shift() -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(40, 200, (16, 24, 3), dtype=np.uint8)
    shift = np.array([7, -5, 0], np.int64)
    decoded = picture + shift
    decoded[4:12, 8:16] = rng.integers(60, 190, (8, 8, 3))
    keep = torch.ones(1, 4, 6)
    keep[:, 1:3, 2:4] = 0
    back = np.asarray(put_back(Image.fromarray(decoded.astype(np.uint8)), Image.fromarray(picture), keep))
    expected = picture.astype(np.int64)
    expected[4:12, 8:16] = decoded[4:12, 8:16] - shift
    assert np.array_equal(back, expected)
    keep = torch.zeros(1, 4, 6)
    keep[:, 0, 0] = 1  # too little to tell a shift from
    back = np.asarray(put_back(Image.fromarray(picture), Image.fromarray(255 - picture), keep))
    expected = picture.copy()
    expected[:4, :4] = 255 - picture[:4, :4]
    assert np.array_equal(back, expected)
