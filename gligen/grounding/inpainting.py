"""What inpainting keeps and what it repaints: masks, the first convolution's extra channels, the blend of each step,
and the kept pixels at the end.

Two kinds of mask, named so that they are not mixed up: a *mask* is the user's, 1 = repaint, in pixels; a *keep*
mask is the sampler's, 1 = keep, in latent cells.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageFilter
from torch import Tensor

from gligen.fields import is_image
from gligen.grounding.kind import Canvas
from gligen.image_files import ImageSource
from gligen.images import label_tensor, load_mask_image
from gligen.request import Request


def boxes_mask(boxes: Tensor, height: int, width: int) -> Tensor:
    """The keep mask of boxes, (B, 1, height, width) float32: 0 inside any box, 1 elsewhere.

    boxes: (B, N, 4) xyxy in [0, 1]; padding, inverted and empty boxes change nothing.
    Kept for published weights: corners are truncated to whole cells in float32, not rounded.
    """
    scale = boxes.new_tensor([width, height, width, height], dtype=torch.float32)
    x0, y0, x1, y1 = (boxes.float() * scale).int().unsqueeze(-1).unbind(2)  # (B, N, 1) each
    columns = torch.arange(width, device=boxes.device)
    rows = torch.arange(height, device=boxes.device)
    in_columns = (columns >= x0) & (columns < x1)  # (B, N, W)
    in_rows = (rows >= y0) & (rows < y1)  # (B, N, H)
    inside = in_rows[..., :, None] & in_columns[..., None, :]  # (B, N, H, W)
    return 1 - inside.any(dim=1, keepdim=True).float()


def load_mask(source: ImageSource, width: int, height: int) -> Tensor:
    """The user's mask, fitted to the size: (1, height, width) float32, 1 = repaint where it is white.

    Grey and colour count as white from half brightness on; transparent is black.
    Raises ValueError if nothing is white.
    """
    mask = (label_tensor(load_mask_image(source, width, height)) > 0).float()
    if not mask.any():
        subject = "mask" if is_image(source) else f"mask '{source}'"
        raise ValueError(f"{subject} is black at {width} x {height}: nothing to repaint, paint it white there")
    return mask


def mask_to_latent(mask: Tensor, factor: int) -> Tensor:
    """The keep mask (1, H/factor, W/factor) of a user's mask (1, H, W): a cell is repainted if any pixel of it is.

    factor: pixels a latent cell; H and W are multiples of it.
    """
    return 1 - F.max_pool2d(mask, factor)


def keep_mask(request: Request, shape: tuple[int, int], factor: int) -> Tensor:
    """The keep mask (1, h, w) of an inpainting request: its mask's or its boxes'.

    shape: (h, w) latent cells; factor: pixels a cell. Raises ValueError for a request without inpaint image.
    """
    if request.inpaint is None:
        raise ValueError("the request has no inpaint image, so nothing is kept: give one")
    h, w = shape
    if request.inpaint.mask:
        return mask_to_latent(load_mask(request.inpaint.mask, w * factor, h * factor), factor)
    return boxes_mask(torch.tensor([[entity.box for entity in request.entities]]), h, w)[0]


def inpaint_channels(x0: Tensor, keep: Tensor) -> Tensor:
    """The first convolution's extra input (B, 5, h, w): what is kept of the image's latents, then the keep mask.

    GLIGEN §5, inpainting.
    x0: (B, 4, h, w) latents of the image; keep: (B, 1, h, w).
    """
    return torch.cat([x0 * keep, keep], dim=1)


def keep_known(x: Tensor, x0_noised: Tensor, keep: Tensor) -> Tensor:
    """The latents x_t with their known part replaced by the original image's, noised to the same t
    (GLIGEN §5, inpainting).

    x, x0_noised: (B, 4, h, w); keep: (B, 1, h, w).
    """
    return x0_noised * keep + x * (1 - keep)


def put_back(image: Image.Image, original: Image.Image, keep: Tensor) -> Image.Image:
    """The generated image with the original's own pixels wherever a whole latent cell is kept.

    A decoder's GroupNorm sees the whole image, so what is repainted shifts the level of all of it. Where at least
    half is kept, the mean shift there is taken from the generated pixels too, so that their edge shows less (in 25 of
    30 scenes of the miniature, 6 of 255 on average); of less it would be a poor estimate.

    image, original: RGB of one size; keep: (1, h, w), 1 = keep. Returns RGB.
    """
    cells = Image.fromarray((255 * keep[0]).byte().cpu().numpy())
    is_kept = np.asarray(cells.resize(image.size, Image.Resampling.NEAREST)) > 0  # (H, W)
    generated, own = np.asarray(image), np.asarray(original)
    if is_kept.mean() >= 0.5:
        shift = (own.astype(np.float32) - generated)[is_kept].mean(0)
        generated = np.clip(np.rint(generated + shift), 0, 255).astype(np.uint8)
    return Image.fromarray(np.where(is_kept[..., None], own, generated))


def draw(canvas: Canvas, request: Request) -> None:
    """Draws the outline of the mask, where the request has one, in yellow."""
    if request.inpaint and request.inpaint.mask is not None:
        mask = load_mask_image(request.inpaint.mask, *canvas.image.size)
        outline = ImageChops.subtract(mask, mask.filter(ImageFilter.MinFilter(2 * canvas.line + 1)))
        canvas.image.paste("#ffe119", mask=outline)
