"""Properties of the networks that hold for any weights."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gligen.config import GroundingConfig, UNetConfig, VAEConfig
from gligen.kernels.backends import attention
from gligen.modes import MAP_MODES, MODES
from gligen.modules.autoencoder import AutoencoderKL, DiagonalGaussian
from gligen.modules.fusers import FUSERS
from gligen.modules.position_net import convolve_labels
from gligen.modules.unet import UNetModel
from gligen.modules.wordpiece import WordPiece, split_words
from tests.conftest import SMALL, error, small_unet_config


def tiny_map_config(mode: str, fuser_type: str = "gatedSA") -> UNetConfig:
    grounding = GroundingConfig(
        mode=mode,
        fuser_type=fuser_type,
        token_dim=48,
        feature_dim=48,
        map_depths=(1, 1, 1, 1),
        map_dims=(8, 8, 16, 16),
    )
    return UNetConfig(**SMALL, grounding=grounding)


def random_unet(config: UNetConfig, gates: float | None = 0.5, seed: int = 0) -> UNetModel:
    torch.manual_seed(seed)
    unet = UNetModel(config).eval().requires_grad_(False)
    for parameter in unet.parameters():  # no zeros, so that every null feature counts
        if parameter.ndim > 0:
            parameter.add_(0.05 * torch.randn_like(parameter))
    if config.grounding and gates is not None:
        for fuser in unet.fusers.values():
            fuser.alpha_attn.fill_(gates)
            fuser.alpha_dense.fill_(gates)
    return unet


def random_inputs(unet: UNetModel, height: int = 16, width: int = 16, batch: int = 2) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        "x": torch.randn(batch, 4, height, width),
        "timesteps": torch.tensor([7, 500])[:batch],
        "context": torch.randn(batch, 77, unet.config.context_dim),
    }


def random_grounding(unet: UNetModel, batch: int = 2) -> dict[str, Tensor]:
    """Random inputs of the mode's tokenizer, half of the slots filled."""
    torch.manual_seed(2)
    inputs = {name: torch.rand_like(value) for name, value in unet.position_net.null_inputs(batch).items()}
    filled = (torch.arange(inputs["masks"].shape[1]) < 5).float() if "masks" in inputs else None
    for name, value in inputs.items():
        if "mask" in name:
            inputs[name] = torch.ones_like(value) if filled is None else filled.expand_as(value).clone()
        elif name == "map" and unet.config.grounding.mode == "sem":
            inputs[name] = (value * 151).round()
    return inputs


def extra_of(unet: UNetModel, grounding: dict[str, Tensor], height: int = 16, width: int = 16) -> Tensor | None:
    spec = unet.config.grounding.spec
    if spec.is_map:
        return unet.map_channels(grounding["map"], height, width)
    return torch.rand(2, 5, height, width) if spec.is_inpainting else None


def config_of(mode: str) -> UNetConfig:
    return tiny_map_config(mode) if mode in MAP_MODES else small_unet_config(mode)


def base_of(unet: UNetModel) -> UNetModel:
    """The base model inside: the same weights without what GLIGEN added."""
    base = UNetModel(UNetConfig(**SMALL)).eval().requires_grad_(False)
    weights = unet.state_dict()
    base.load_state_dict({name: weights[name] for name in base.state_dict()})
    return base


def test_attention_equals_the_written_out_formula():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 24, dtype=torch.float64) for n in (5, 9, 9))
    expected = torch.empty_like(q)
    for head in range(3):
        part = slice(8 * head, 8 * head + 8)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / 8**0.5
        expected[..., part] = torch.exp(scores) / torch.exp(scores).sum(-1, keepdim=True) @ v[..., part]
    assert error(attention(q, k, v, num_heads=3), expected) < 1e-14


@pytest.mark.parametrize("fuser_type", FUSERS)
def test_closed_gates_reproduce_the_base_model_bit_for_bit(fuser_type):
    if fuser_type == "gatedSA2":  # its tokens must make a square
        unet = random_unet(tiny_map_config("hed", fuser_type), gates=0.0)
        unet.first_conv.weight[:, 4:] = 0
    else:
        unet = random_unet(small_unet_config("keypoint", fuser_type), gates=0.0)
    inputs, grounding = random_inputs(unet), random_grounding(unet)
    eps = unet(**inputs, grounding=grounding, extra=extra_of(unet, grounding))
    if fuser_type == "gatedSA2":
        base = UNetModel(UNetConfig(**SMALL)).eval().requires_grad_(False)
        weights = unet.state_dict() | {"input_blocks.0.0.weight": unet.first_conv.weight[:, :4]}
        base.load_state_dict({name: weights[name] for name in base.state_dict()})
        assert error(eps, base(**inputs)) < 1e-6  # a convolution over more channels adds in another order
    else:
        assert torch.equal(eps, base_of(unet)(**inputs))


@pytest.mark.parametrize("fuser_type", ["gatedSA", "gatedCA"])
def test_gate_scale_zero_is_the_base_model_and_computes_no_fuser(fuser_type):
    unet = random_unet(small_unet_config("box-text", fuser_type))
    inputs, grounding = random_inputs(unet), random_grounding(unet)
    calls = []
    for fuser in unet.fusers.values():
        fuser.register_forward_hook(lambda *args: calls.append(1))
    assert torch.equal(unet(**inputs, grounding=grounding, gate_scale=0.0), base_of(unet)(**inputs))
    assert not calls
    unet(**inputs, grounding=grounding, gate_scale=0.5)
    assert len(calls) == len(unet.transformers)


def test_gated_sa2_obeys_the_gate_scale():
    unet = random_unet(tiny_map_config("hed", "gatedSA2"))
    inputs, grounding = random_inputs(unet), random_grounding(unet)
    base = base_of_map(unet)
    cond = unet.condition(inputs["context"], grounding, extra_of(unet, grounding))
    assert torch.equal(unet.denoise(inputs["x"], inputs["timesteps"], cond, 0.0), base(**inputs))
    half, full = (unet.denoise(inputs["x"], inputs["timesteps"], cond, scale) for scale in (0.5, 1.0))
    assert error(half, full) > 1e-3


def base_of_map(unet: UNetModel) -> UNetModel:
    """A map model's base, whose own first convolution is given to the map model too."""
    base = UNetModel(UNetConfig(**SMALL)).eval().requires_grad_(False)
    weights = {name: value for name, value in unet.state_dict().items() if name in base.state_dict()}
    weights["input_blocks.0.0.weight"] = torch.randn(32, 4, 3, 3, generator=torch.Generator().manual_seed(3))
    base.load_state_dict(weights)
    unet.set_base_conv(base.first_conv.weight, base.first_conv.bias)
    return base


@pytest.mark.parametrize("mode", MAP_MODES)
def test_first_convolution_is_the_bases_only_while_the_gates_are_shut(mode):
    unet = random_unet(tiny_map_config(mode))
    inputs, grounding = random_inputs(unet), random_grounding(unet)
    extra = extra_of(unet, grounding)
    cond = unet.condition(inputs["context"], grounding, extra)
    with pytest.raises(ValueError, match="base model's first convolution"):
        unet.denoise(inputs["x"], inputs["timesteps"], cond, 0.0)
    before = unet.denoise(inputs["x"], inputs["timesteps"], cond, 1.0)
    names = list(unet.state_dict())
    base = base_of_map(unet)
    assert torch.equal(unet.denoise(inputs["x"], inputs["timesteps"], cond, 0.0), base(**inputs))
    assert torch.equal(unet.denoise(inputs["x"], inputs["timesteps"], cond, 1.0), before)
    assert list(unet.state_dict()) == names


@pytest.mark.parametrize("gate_scale", [1.0, 0.0])
@pytest.mark.parametrize(
    ("mode", "fuser_type"),
    [("box-text", "gatedSA"), ("box-text", "gatedCA"), ("inpaint-box-text", "gatedSA"), ("hed", "gatedSA2")],
)
def test_branches_of_guidance_that_share_a_latent_are_each_as_by_itself(mode, fuser_type, gate_scale):
    """What comes before the first look at a caption is computed once for both branches of the two samples."""
    config = tiny_map_config(mode, fuser_type) if mode in MAP_MODES else small_unet_config(mode, fuser_type)
    unet = random_unet(config)
    if mode in MAP_MODES:
        base_of_map(unet)
    unet = unet.double()
    inputs = {
        name: value.double() if value.is_floating_point() else value for name, value in random_inputs(unet).items()
    }
    x, timesteps, context = inputs.values()
    grounding = {name: value.double() for name, value in random_grounding(unet).items()}
    extra = extra_of(unet, grounding)
    extra = None if extra is None else extra.double()
    branches = [(-context, {name: torch.zeros_like(value) for name, value in grounding.items()}), (context, grounding)]
    both = {name: torch.cat([branch[name] for _, branch in branches]) for name in grounding}
    cond = unet.condition(torch.cat([caption for caption, _ in branches]), both, extra)

    eps = unet.denoise(x, timesteps, cond, gate_scale)

    apart = torch.cat([unet(x, timesteps, caption, branch, extra, gate_scale) for caption, branch in branches])
    assert error(eps, apart) < 1e-12


@pytest.mark.parametrize("attention_downsamples", [(), (2,)])
def test_branches_share_what_comes_before_a_first_look_anywhere(attention_downsamples):
    torch.manual_seed(0)
    config = UNetConfig(**SMALL | {"attention_downsamples": attention_downsamples})
    unet = UNetModel(config).double().eval().requires_grad_(False)
    x, timesteps = torch.randn(2, 4, 16, 16).double(), torch.tensor([7, 500])
    captions = [torch.randn(2, 77, config.context_dim).double() for _ in range(2)]
    apart = torch.cat([unet(x, timesteps, caption) for caption in captions])
    assert error(unet.denoise(x, timesteps, unet.condition(torch.cat(captions))), apart) < 1e-12


def test_one_caption_serves_several_latents_and_others_have_to_be_a_multiple():
    unet = random_unet(small_unet_config()).double()
    x, timesteps = torch.randn(3, 4, 16, 16).double(), torch.tensor([7, 500, 900])
    one = torch.randn(1, 77, unet.config.context_dim).double()
    eps = unet.denoise(x, timesteps, unet.condition(one))
    assert error(eps, unet(x, timesteps, one.expand(3, -1, -1))) < 1e-12
    with pytest.raises(ValueError, match="of 4 samples, the latents are 3"):
        unet.denoise(x, timesteps, unet.condition(one.expand(4, -1, -1)))


@pytest.mark.parametrize("mode", MODES)
def test_padding_content_does_not_matter(mode):
    unet = random_unet(config_of(mode))
    grounding = random_grounding(unet)
    masks = [name for name in grounding if "mask" in name]
    changed = {name: value.clone() for name, value in grounding.items()}
    if unet.config.grounding.spec.is_map:
        grounding["mask"][1] = changed["mask"][1] = 0
        changed["map"][1] = 0
    else:
        for name in changed.keys() - set(masks):
            changed[name][:, 5:] = 0.123
    assert torch.equal(unet.ground(grounding), unet.ground(changed))


@pytest.mark.parametrize("mode", MODES)
def test_null_grounding_is_all_masks_zero(mode):
    unet = random_unet(config_of(mode))
    masked = {k: torch.zeros_like(v) if "mask" in k else v for k, v in random_grounding(unet).items()}
    tokens = unet.ground(unet.position_net.null_inputs(2))
    assert torch.equal(unet.ground(masked), tokens)
    assert tokens.shape[1] == {"keypoint": 136, "box-text-image": 60, "inpaint-box-text-image": 60}.get(
        mode, 64 if mode in MAP_MODES else 30
    )


@pytest.mark.parametrize("fuser_type", ["gatedSA", "gatedCA"])
def test_order_of_boxes_does_not_matter(fuser_type):
    unet = random_unet(small_unet_config("box-text", fuser_type)).double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in random_inputs(unet).items()}
    grounding = {name: value.double() for name, value in random_grounding(unet).items()}
    order = torch.randperm(30, generator=torch.Generator().manual_seed(4))
    shuffled = {name: value[:, order] for name, value in grounding.items()}
    assert error(unet(**inputs, grounding=shuffled), unet(**inputs, grounding=grounding)) < 1e-12
    moved = {name: value.clone() for name, value in grounding.items()}
    moved["boxes"][:, 0] = moved["boxes"][:, 1]
    assert error(unet(**inputs, grounding=moved), unet(**inputs, grounding=grounding)) > 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_any_latent_size_works(mode):
    unet = random_unet(config_of(mode))
    for height, width in ((8, 16), (24, 8)):
        inputs, grounding = random_inputs(unet, height, width), random_grounding(unet)
        extra = extra_of(unet, grounding, height, width)
        assert unet(**inputs, grounding=grounding, extra=extra).shape == inputs["x"].shape


def test_gated_sa2_names_grids_that_are_not_square():
    unet = random_unet(tiny_map_config("hed", "gatedSA2"))
    grounding = random_grounding(unet)
    with pytest.raises(ValueError, match="square"):
        unet(**random_inputs(unet, 8, 16), grounding=grounding, extra=extra_of(unet, grounding, 8, 16))


@pytest.mark.parametrize("mode", ["box-text", "box-text-image", "keypoint", "sem", "inpaint-box-text"])
def test_bfloat16_stays_near_float32(mode):
    """bfloat16 has 8 bits: one rounding is 0.4 %; over the whole network ε stays within 5 % of its largest value."""
    unet = random_unet(config_of(mode))
    inputs, grounding = random_inputs(unet), random_grounding(unet)
    extra = extra_of(unet, grounding)
    exact = unet(**inputs, grounding=grounding, extra=extra)
    rough = copy.deepcopy(unet).bfloat16()(
        inputs["x"].bfloat16(),
        inputs["timesteps"],
        inputs["context"].bfloat16(),
        grounding,
        None if extra is None else extra.bfloat16(),
    )
    assert error(rough, exact) < 0.05


def test_gradients_reach_everything_gligen_added():
    unet = random_unet(small_unet_config("box-text-image")).requires_grad_(True)
    grounding = random_grounding(unet)
    unet(**random_inputs(unet), grounding=grounding).square().mean().backward()
    added = {n: p.grad for n, p in unet.named_parameters() if ".fuser." in n or n.startswith("position_net.")}
    assert len(added) > 100
    assert not [name for name, grad in added.items() if grad is None or grad.abs().max() == 0]


def test_vae_pads_right_and_bottom_only():
    """Moving a picture by 2 px moves the features of the first downsampling by exactly 1: no half-pixel shift."""
    vae = AutoencoderKL(VAEConfig(base_channels=32, channel_mult=(1, 2), num_res_blocks=1)).eval()
    down = vae.encoder.down[0].get_submodule("downsample")
    x = torch.randn(1, 32, 8, 8)
    kernel, bias = down.conv.weight, down.conv.bias
    expected = (x[0, :, 2:5, 4:7] * kernel[0]).sum() + bias[0]
    assert torch.allclose(down(x)[0, 0, 1, 2], expected, atol=1e-5)


def test_posterior_kl_equals_the_closed_form():
    """KL(N(m, s²) ‖ N(0, 1)) = (m² + s² - 1 - ln s²) / 2 for each number."""
    m, s = np.array([0.3, -1.2]), np.array([0.5, 2.0])
    expected = 0.5 * (m**2 + s**2 - 1 - np.log(s**2)).sum()
    mean, logvar = (torch.tensor(a).view(1, 2, 1, 1) for a in (m, np.log(s**2)))
    assert DiagonalGaussian(mean, logvar).kl().item() == pytest.approx(expected)


def test_wordpiece_cuts_greedily_from_the_left(tmp_path):
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "un", "##aff", "##able", "##a", "a", "cafe", ",", "!", "猫"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces), encoding="utf-8")
    vocabulary = WordPiece(tmp_path / "vocab.txt")
    assert vocabulary.encode("Unaffable, a CAFÉ!", 12) == ([2, 4, 5, 6, 10, 8, 9, 11, 3, 0, 0, 0], "")
    assert vocabulary.encode("a zebra 猫猫", 8) == ([2, 8, 1, 12, 12, 3, 0, 0], "")
    assert vocabulary.encode("a a a cafe", 5) == ([2, 8, 8, 8, 3], "cafe")
    assert split_words("it's 3.5") == ["it", "'", "s", "3", ".", "5"]


def test_a_file_that_is_no_vocabulary_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("hello\nworld\n")
    with pytest.raises(ValueError, match="not a WordPiece vocabulary"):
        WordPiece(tmp_path / "notes.txt")


def test_names_of_identity_layers_keep_no_parameters():
    unet = UNetModel(UNetConfig(**SMALL))
    assert not [m for m in unet.modules() if isinstance(m, nn.Dropout)]


@pytest.mark.parametrize(("size", "stride"), [(3, 1), (4, 2)])
def test_a_convolution_of_labels_is_that_of_152_one_hot_channels(size: int, stride: int) -> None:
    generator = torch.Generator().manual_seed(0)
    conv = torch.nn.Conv2d(152, 5, size, stride, padding=1, dtype=torch.float64)
    labels = torch.tensor([0, 7, 8, 151])[torch.randint(0, 4, (2, 1, 16, 12), generator=generator)]
    one_hot = torch.zeros(2, 152, 16, 12, dtype=torch.float64).scatter_(1, labels, 1.0)
    weights = torch.randn(conv(one_hot).shape, generator=generator, dtype=torch.float64)
    found = []
    for output in (conv(one_hot), convolve_labels(conv, labels.double())):
        gradients = torch.autograd.grad((output * weights).sum(), [conv.weight, conv.bias])
        found.append((output, *gradients))
    for written_out, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, written_out, rtol=0, atol=1e-12)
