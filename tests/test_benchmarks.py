"""The benchmarks' own arithmetic, and their page."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.common import MODELS, ROWS, decoder_flops, unet_flops
from benchmarks.gpu import PARTS, Part, pending, run
from benchmarks.profile import by_class, kernel_class
from benchmarks.render import page

DOCS = Path(__file__).parents[1] / "docs"


def test_the_floor_is_the_arithmetic_of_the_published_sizes():
    # Counted from the original's layers: 1136.9 and 803.3 GFLOP. Up to 1 % of it are the conditioning, made once a
    # request here, and the grounding tokens' queries, which are not made.
    unet = MODELS["sd"].unet
    assert unet_flops(unet, (64, 64), is_grounded=True) / 1e9 == pytest.approx(1136.9, rel=1e-2)
    assert unet_flops(unet, (64, 64), is_grounded=False) / 1e9 == pytest.approx(803.3, rel=1e-2)
    # Both branches of guidance have in common, of two additions or multiplications each: the timestep's embedding, the
    # first convolution, a residual block of 320 channels, a transformer's first projection and its self-attention.
    time, tokens, channels = 320 * 1280 + 1280 * 1280, 64 * 64, 320
    convolutions = 9 * (4 + 2 * channels) * channels * tokens + 1280 * channels
    common = 2 * (time + convolutions + 5 * channels**2 * tokens + 2 * channels * tokens**2)
    for on in (True, False):
        one, two = (unet_flops(unet, (64, 64), is_grounded=on, branches=n) for n in (1, 2))
        assert 2 * one - two == common
    assert decoder_flops(MODELS["sd"].vae, (64, 64)) / 1e12 == pytest.approx(2.51, rel=1e-2)


def test_the_page_is_made_from_the_committed_rows():
    written = (DOCS / "performance.md").read_text(encoding="utf-8")
    assert written == page(ROWS, "performance.svg" if "(performance.svg)" in written else None)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_4x1x1_kernel0_0", "attention"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize256x64x32_cudnn", "convolutions"),
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_bias_TNT", "linear layers"),
        ("triton_poi_fused_gelu_mul_split_view_7", "GEGLU"),
        ("triton_red_fused_clone_native_group_norm_0", "normalisation"),
        ("void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>", "copies, additions"),
        ("something_else", "other"),
    ],
)
def test_kernels_have_the_class_of_what_they_compute(name, kind):
    assert kernel_class(name) == kind


def test_a_profiles_classes_add_up_to_its_total():
    text = (ROWS / "profiles" / "sample-sd-b8-blocks.txt").read_text(encoding="utf-8")
    times = by_class(text)
    assert times.pop("total") == pytest.approx(406.87)
    assert sum(times.values()) == pytest.approx(406.87)
    with pytest.raises(ValueError, match="no profile"):
        by_class("nothing")


def test_parts_that_failed_or_ran_out_of_time_are_run_again_and_others_not(tmp_path):
    parts = [Part(name=name, command=(), seconds=9) for name in ("good", "bad", "endless")]
    commands = ("print('hello')", "raise SystemExit(3)", "import time; time.sleep(60)")
    statuses = [
        run(part, tmp_path, 2, (sys.executable, "-c", command)) for part, command in zip(parts, commands, strict=True)
    ]
    assert statuses == [0, 3, 124]
    assert (tmp_path / "good.txt").read_text() == "hello\n"
    assert json.loads((tmp_path / "endless.json").read_text())["status"] == 124
    assert [part.name for part in pending(parts, tmp_path, [])] == ["bad", "endless"]
    assert [part.name for part in pending(parts, tmp_path, ["good"])] == ["good", "bad", "endless"]
    assert len({part.name for part in PARTS}) == len(PARTS)
