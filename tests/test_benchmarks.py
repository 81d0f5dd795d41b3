"""The benchmarks' own arithmetic, and their page."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.common import MODELS, ROWS, decoder_flops, unet_flops
from benchmarks.render import page

DOCS = Path(__file__).parents[1] / "docs"


def test_the_floor_is_the_arithmetic_of_the_published_sizes():
    # Counted from the original's layers: 1136.9 and 803.3 GFLOP. Up to 1 % of it are the conditioning, made once a
    # request here, and the grounding tokens' queries, which are not made.
    unet = MODELS["sd"].unet
    assert unet_flops(unet, (64, 64), is_grounded=True) / 1e9 == pytest.approx(1136.9, rel=1e-2)
    assert unet_flops(unet, (64, 64), is_grounded=False) / 1e9 == pytest.approx(803.3, rel=1e-2)
    assert decoder_flops(MODELS["sd"].vae, (64, 64)) / 1e12 == pytest.approx(2.51, rel=1e-2)


def test_the_page_is_made_from_the_committed_rows():
    written = (DOCS / "performance.md").read_text(encoding="utf-8")
    assert written == page(ROWS, "performance.svg" if "(performance.svg)" in written else None)
    assert ("No GPU figure exists yet" in written) == ("NVIDIA" not in written)
