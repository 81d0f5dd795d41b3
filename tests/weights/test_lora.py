"""LoRAs: each tool's names and layouts, written as the tool does, against W + weight·alpha/rank·up·down by hand."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import save_file

from gligen.loading import build_pipeline
from gligen.request import Entity, Request
from gligen.runtime import optimize
from gligen.weights import add_loras, hold
from tests.generated import generated_model

RANK, ALPHA = 4, 2.0
BLOCK = "transformer_blocks.0"
CROSS_KEY = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
# One layer of each kind: (ours, rows of it, diffusers' name, shape). The generated model: 2 levels, 1 residual block.
UNET = {
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": "input_blocks.1.1.transformer_blocks.0.attn1.to_q",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": "input_blocks.3.1.transformer_blocks.0.attn2.to_k",
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0": "middle_block.1.transformer_blocks.0.attn1.to_out.0",
    f"up_blocks.1.attentions.1.{BLOCK}.ff.net.0.proj": f"output_blocks.3.1.{BLOCK}.ff.net.0.proj",
    "up_blocks.0.attentions.0.proj_in": "output_blocks.0.1.proj_in",
}
CONVS = {
    "conv_in": "input_blocks.0.0",
    "down_blocks.0.resnets.0.conv1": "input_blocks.1.0.in_layers.2",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
    "time_embedding.linear_1": "time_embed.0",
}
QKV = ("q_proj", "k_proj", "v_proj")
TEXT = [f"text_model.encoder.layers.1.self_attn.{name}" for name in (*QKV, "out_proj")] + [
    "text_model.encoder.layers.0.mlp.fc1"
]


@pytest.fixture(scope="module")
def model():
    return generated_model()


def text_place(layer: str) -> tuple[str, int]:
    """(our tensor, third of it) of a Hugging Face layer."""
    _, _, _, number, *rest = layer.split(".")
    prefix, word = f"transformer.resblocks.{number}", ".".join(rest)
    if (name := rest[-1]) in QKV:
        return f"{prefix}.attn.in_proj_weight", QKV.index(name)
    return f"{prefix}.{({'self_attn.out_proj': 'attn.out_proj', 'mlp.fc1': 'mlp.c_fc'})[word]}.weight", 0


def shape_of(model, part: str, layer: str) -> tuple[int, ...]:
    if part == "unet":
        shape = model.parts["unet"][f"{({**UNET, **CONVS})[layer]}.weight"].shape
        return (shape[0], 4, *shape[2:]) if layer == "conv_in" else shape
    name, _ = text_place(layer)
    rows, *rest = model.parts["text_encoder"][name].shape
    return (rows // 3 if name.endswith("in_proj_weight") else rows, *rest)


def factors(model, part: str, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
    """down (r, in, …) and up (out, r, …), as kohya lays them out; the same for a layer at every call."""
    out, into, *kernel = shape_of(model, part, layer)
    generator = torch.Generator().manual_seed(len(layer) + 31 * ord(layer[-1]))
    down = torch.randn(RANK, into, *kernel, generator=generator)
    return down, torch.randn(out, RANK, *[1] * len(kernel), generator=generator)


def layers_of(convs: bool, text: bool) -> list[tuple[str, str]]:
    unet = [*UNET, *(CONVS if convs else ())]
    return [("unet", name) for name in unet] + [("text_encoder", name) for name in (TEXT if text else ())]


def expected(model, part: str, layer: str, scale: float) -> tuple[str, torch.Tensor]:
    """Our tensor's name, and what it must be."""
    down, up = factors(model, part, layer)
    delta = torch.einsum("or,ri...->oi...", up.flatten(1).double(), down.double()) * scale
    if part == "unet":
        name, first = f"{({**UNET, **CONVS})[layer]}.weight", 0
    else:
        name, third = text_place(layer)
        first = third * len(delta)
    weight = model.parts[part][name].read(dtype=torch.float64).clone()
    weight[first : first + len(delta), : delta.shape[1]] += delta
    return name, weight[first : first + len(delta)]


def check(model, path, scale: float, layers) -> None:
    merged = add_loras(model.parts, [path])
    touched = {part: set() for part in merged}
    for part, layer in layers:
        name, wanted = expected(model, part, layer, scale)
        first = text_place(layer)[1] * len(wanted) if part == "text_encoder" else 0
        found = merged[part][name].read(dtype=torch.float64)[first : first + len(wanted)]
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5), (part, layer)
        touched[part].add(name)
    for part, tensors in merged.items():  # and nothing else has changed
        for name, tensor in tensors.items():
            if name not in touched[part] and not (part == "base_first_conv" and touched["unet"]):
                assert torch.equal(tensor.read(), model.parts[part][name].read())


def kohya(model, layers) -> dict[str, torch.Tensor]:
    state = {}
    for part, layer in layers:
        down, up = factors(model, part, layer)
        name = ("lora_unet_" if part == "unet" else "lora_te_") + layer.replace(".", "_")
        state |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(ALPHA)}
    return state


def test_kohyas_names_with_alpha_and_convolutions(model, tmp_path):
    layers = layers_of(convs=True, text=True)
    save_file(kohya(model, layers), tmp_path / "a.safetensors")
    check(model, tmp_path / "a.safetensors", ALPHA / RANK, layers)
    check(model, f"{tmp_path / 'a.safetensors'}:0.3", 0.3 * ALPHA / RANK, layers)
    check(model, (tmp_path / "a.safetensors", -2), -2 * ALPHA / RANK, layers)
    torch.save(kohya(model, layers), tmp_path / "a.pt")
    check(model, tmp_path / "a.pt", ALPHA / RANK, layers)


def test_kohyas_names_over_ldms(model, tmp_path):
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    down, up = factors(model, "unet", layer)
    name = "lora_unet_" + UNET[layer].replace(".", "_")
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, tmp_path / "a.safetensors")
    check(model, tmp_path / "a.safetensors", 1.0, [("unet", layer)])


def test_a_mid_kernel_is_between_two_small_ones(model, tmp_path):
    """LoCon's third factor: W = Σ up[o, a] · mid[a, b, y, x] · down[b, i]."""
    torch.manual_seed(0)
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    up, mid, down = torch.randn(32, 4, 1, 1), torch.randn(4, 4, 3, 3), torch.randn(4, 32, 1, 1)
    state = {f"{name}.lora_{word}.weight": t for word, t in (("up", up), ("mid", mid), ("down", down))}
    save_file(state | {f"{name}.alpha": torch.tensor(1.0)}, tmp_path / "a.safetensors")
    ours = "input_blocks.1.0.in_layers.2.weight"
    found = add_loras(model.parts, [tmp_path / "a.safetensors"])["unet"][ours].read() - model.parts["unet"][ours].read()
    x = torch.randn(1, 32, 5, 5)  # as three convolutions in a row, which is how it was trained
    apart = torch.conv2d(torch.conv2d(torch.conv2d(x, down), mid, padding=1), up) / 4
    assert torch.allclose(torch.conv2d(x, found, padding=1), apart, atol=1e-4 * apart.abs().max().item())


def test_factors_that_do_not_go_together_are_refused(model, tmp_path):
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    up, mid, down = torch.randn(32, 3, 1, 1), torch.randn(4, 4, 3, 3), torch.randn(4, 32, 1, 1)
    state = {f"{name}.lora_{word}.weight": t for word, t in (("up", up), ("mid", mid), ("down", down))}
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="do not go together: their inner sides are 3, 4"):
        add_loras(model.parts, [tmp_path / "a.safetensors"])


@pytest.mark.parametrize("style", ["lora_A", "lora.down", "processor", "peft", "linear_layer"])
def test_diffusers_and_pefts_names(model, tmp_path, style):
    layers = [
        item for item in layers_of(convs=False, text=style != "peft") if style != "processor" or ".attn" in item[1]
    ]
    if style == "processor":  # the oldest knew attention alone
        layers += [("text_encoder", name) for name in TEXT if "attn" in name]
    state = {}
    for part, layer in layers:
        down, up = factors(model, part, layer)
        full = f"{part}.{layer}"
        if style == "lora_A":
            state |= {f"{full}.lora_A.weight": down, f"{full}.lora_B.weight": up}
        elif style == "lora.down":
            state |= {f"{full}.lora.down.weight": down, f"{full}.lora.up.weight": up}
        elif style == "linear_layer":
            word = "lora" if part == "unet" else "lora_linear_layer"
            state |= {f"{full}.{word}.down.weight": down, f"{full}.{word}.up.weight": up}
        elif style == "peft":
            state |= {f"base_model.model.{layer}.lora_A.default.weight": down,
                      f"base_model.model.{layer}.lora_B.default.weight": up}  # fmt: skip
        else:
            head, _, tail = full.removesuffix(".0").rpartition(".")
            old = tail if tail.startswith("to_") else "to_" + tail.removesuffix("_proj")
            middle = ".processor" if part == "unet" else ""
            state |= {f"{head}{middle}.{old}_lora.{word}.weight": t for word, t in (("down", down), ("up", up))}
    if style == "peft":
        folder = tmp_path / "adapter"
        folder.mkdir()
        save_file(state, folder / "adapter_model.safetensors")
        check(model, folder, 1.0, layers)  # no word on alpha: the rank
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 12}))
        check(model, folder, 3.0, layers)
        config = {"r": RANK, "lora_alpha": 12, "use_rslora": True}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        check(model, folder, 12 / math.sqrt(RANK), layers)
        return
    save_file(state, tmp_path / "a.safetensors")
    check(model, tmp_path / "a.safetensors", 1.0, layers)
    stated = {"unet.r": RANK, "unet.lora_alpha": 8, "text_encoder.lora_alpha": 8}
    save_file(state, tmp_path / "b.safetensors", {"lora_adapter_metadata": json.dumps(stated)})
    check(model, tmp_path / "b.safetensors", 2.0, layers)


def test_two_add_up_and_half_precision_is_rounded_once(model, tmp_path):
    layers = layers_of(convs=False, text=True)
    save_file(kohya(model, layers), tmp_path / "a.safetensors")
    half = {
        part: hold({n: t.read(dtype=torch.float16) for n, t in tensors.items()})
        for part, tensors in model.parts.items()
    }
    paths = [f"{tmp_path / 'a.safetensors'}:0.001"] * 3
    for part, layer in layers:
        name, _ = expected(model, part, layer, 1.0)
        found = add_loras(half, paths)[part][name]
        base = half[part][name].read(dtype=torch.float32)
        once = add_loras({**half, part: {**half[part], name: hold({"": base})[""]}}, paths)[part][name].read()
        assert found.dtype == torch.float16 == found.read().dtype
        assert torch.equal(found.read(), once.half())
        assert torch.equal(found.read(dtype=torch.float32), once)


def test_the_files_own_weights_stay(model, tmp_path):
    from gligen.weights import read_weights, save_model

    save_model(tmp_path / "m.safetensors", model.parts, model.config)
    layers = layers_of(convs=False, text=False)
    save_file(kohya(model, layers), tmp_path / "a.safetensors")
    parts = read_weights(tmp_path / "m.safetensors", mode="box-text").parts
    merged = add_loras(parts, [tmp_path / "a.safetensors"])
    for tensors in merged.values():
        for tensor in tensors.values():
            tensor.read()
    assert all(torch.equal(t.read(), model.parts["unet"][n].read()) for n, t in parts["unet"].items())


def test_a_widened_first_convolution_and_the_bases_own_are_changed_alike(tmp_path):
    model = generated_model("inpaint-box-text")
    state = kohya(model, [("unet", "conv_in")])
    save_file(state, tmp_path / "a.safetensors")
    merged = add_loras(model.parts, [tmp_path / "a.safetensors"])
    old, new = (parts["unet"]["input_blocks.0.0.weight"].read() for parts in (model.parts, merged))
    assert torch.equal(old[:, 4:], new[:, 4:])
    base = merged["base_first_conv"]["weight"].read() - model.parts["base_first_conv"]["weight"].read()
    assert torch.allclose(new[:, :4] - old[:, :4], base, atol=1e-5)
    assert base.abs().max() > 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(2, 2)}, "sion XL"),
        (
            lambda s: {
                f"{CROSS_KEY}.lora_down.weight": torch.ones(4, 2048),
                f"{CROSS_KEY}.lora_up.weight": torch.ones(64, 4),
            },
            r"layer of 64 × 2048, which is 64 × 64 here: it is made for Stable Diffusion XL",
        ),
        (lambda s: s | {"lora_unet_no_such.lora_up.weight": torch.ones(2, 2)}, r"no layer for 1 of its \d+ \(no_such"),
        (lambda s: s | {"lora_unet_conv_in.hada_w1_a": torch.ones(2, 2)}, "of LoHa, which is not read"),
        (lambda s: s | {"something.else": torch.ones(2, 2)}, r"are no LoRA's \(something.else\)"),
        (lambda s: {n: t for n, t in s.items() if "lora_up" not in n}, "has no 'up': is the file whole"),
        (lambda s: {"a.weight": torch.ones(2)}, r"is no LoRA \(its first names are a.weight"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(model, tmp_path, change, message):
    save_file(change(kohya(model, layers_of(convs=False, text=True))), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message) as caught:
        add_loras(model.parts, [tmp_path / "a.safetensors"])
    assert "\n" not in str(caught.value)
    assert "a.safetensors" in str(caught.value)


def test_weights_that_are_none_are_refused(model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a\.safetensors"):
        add_loras(model.parts, [tmp_path / "a.safetensors"])
    for weight in ("0", "nan", "inf"):
        with pytest.raises(ValueError, match="a number other than 0"):
            add_loras(model.parts, [f"{tmp_path / 'a.safetensors'}:{weight}"])


def test_a_picture_with_a_lora_is_that_of_the_merged_weights_whatever_runs_it(model, tmp_path):
    """Fused projections read the merged weights, and a second LoRA of the opposite weight undoes the first."""
    path = tmp_path / "a.safetensors"
    save_file({n: 0.1 * t if "lora_up" in n else t for n, t in kohya(model, layers_of(True, True)).items()}, path)
    ball = Entity(phrase="a ball", box=(0.1, 0.2, 0.5, 0.7))
    request = Request(prompt="a ball", entities=(ball,), steps=2, schedule=(1.0, 0.0, 0.0))

    def latents(loras, fuse_qkv: bool = False) -> torch.Tensor:
        changed = dataclasses.replace(model, parts=add_loras(model.parts, loras))
        pipe = build_pipeline(changed, device="cpu", dtype="float32")
        if fuse_qkv:
            optimize(pipe, compile=False, fuse_qkv=True, graphs=False)
        return next(iter(pipe.generate([request]))).latents

    plain, changed = latents([]), latents([path])
    assert (changed - plain).abs().max() > 0.05
    assert torch.allclose(latents([path], fuse_qkv=True), changed, atol=1e-4)
    assert torch.allclose(latents([path, f"{path}:-1"]), plain, atol=1e-4)


def test_one_lora_need_not_be_a_list(model, tmp_path):
    layers = layers_of(convs=False, text=False)
    save_file(kohya(model, layers), tmp_path / "a.safetensors")
    one, listed = (
        add_loras(model.parts, loras) for loras in (str(tmp_path / "a.safetensors"), [tmp_path / "a.safetensors"])
    )
    changed = [name for name in one["unet"] if one["unet"][name] is not model.parts["unet"][name]]
    assert changed
    assert all(torch.equal(one["unet"][name].read(), listed["unet"][name].read()) for name in changed)
