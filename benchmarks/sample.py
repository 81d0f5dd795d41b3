"""Sampling: what each speed-up gives, one after the other, and how far the machine's limit still is.

    python -m benchmarks.sample [--device cuda] [--model sd] [--batch-size 8] [--steps 50]

The first rung computes as the original does: float32, attention written out, grounding tokens' queries too, everything
redone at every step. A row: seconds an image (the fastest of the repeats, after a warm-up told apart), share of the
floor (the arithmetic of the networks at the matrix-product ceiling measured in the same run), peak memory, and how far
the latents are from the first rung's. Where diffusers is installed its GLIGEN pipeline makes the same request with the
same weights in the same run, eager and compiled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import common
from gligen.config import ModelConfig
from gligen.device import pick_dtype
from gligen.diffusion.guidance import gate_schedule
from gligen.kernels.backends import available_backends
from gligen.modules import fusers
from gligen.modules.clip import bpe_tokenizer
from gligen.modules.fusers import GatedSelfAttention, GateScale, Projected
from gligen.modules.unet import Conditioning
from gligen.pipeline import Pipeline
from gligen.quantize import QUANTIZATIONS, check_quantization
from gligen.request import Request, parse_request
from gligen.runtime import attention_backend, optimize, warm_up
from gligen.weights import hold, read_weights, save_model
from gligen.weights.write import write_weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rung:
    """The switches that are on. Each rung adds to the one before it; those in 8 bits, not exact, are alternatives."""

    name: str
    is_written_out: bool = False
    is_low: bool = True  # the device's own precision instead of float32
    has_channels_last: bool = True
    is_cached: bool = True  # what does not change between steps is made once, and grounding tokens do not ask
    skips: bool = True  # fusers are left out where β is 0
    shares: bool = True  # what comes before the first look at a caption is computed once for both branches of guidance
    is_fused: bool = True
    is_compiled: bool = True
    has_graphs: bool = True
    backend: str | None = None
    quantize: str | None = None


def ladder(device: torch.device, is_compiled: bool) -> Iterator[Rung]:
    """The rungs from the original's way to the fastest; rungs that the device does not have are left out."""
    is_cuda = device.type == "cuda"
    at = Rung(
        name="as the original: float32, attention written out",
        is_written_out=True,
        is_low=False,
        has_channels_last=False,
        is_cached=False,
        skips=False,
        shares=False,
        is_fused=False,
        is_compiled=False,
        has_graphs=False,
    )
    yield at
    steps: list[tuple[str, bool, dict[str, Any]]] = [
        ("+ scaled_dot_product_attention", True, {"is_written_out": False}),
        (f"+ {pick_dtype('auto', device)}".replace("torch.", ""), is_cuda, {"is_low": True}),
        ("+ channels last", True, {"has_channels_last": True}),
        ("+ conditioning once a request", True, {"is_cached": True}),
        ("+ fusers left out at β = 0", True, {"skips": True}),
        ("+ branches of guidance share their start", True, {"shares": True}),
        ("+ fused QKV", True, {"is_fused": True}),
        ("+ compiled blocks", is_compiled, {"is_compiled": True}),
        ("+ CUDA graphs", is_cuda, {"has_graphs": True}),
    ]
    available = available_backends(device)
    steps += [(f"+ {name} attention", is_cuda, {"backend": name}) for name in ("triton",) if name in available]
    for name, is_there, change in steps:
        if is_there:
            at = dataclasses.replace(at, name=name, **change)
            yield at
    for kind in QUANTIZATIONS:
        with contextlib.suppress(ValueError):  # what the device does not have
            check_quantization(kind, device)
            yield dataclasses.replace(at, name=f"+ {kind}, QKV apart", quantize=kind, is_fused=False)


def build(config: ModelConfig, device: torch.device, rung: Rung) -> Pipeline:
    pipe = Pipeline(config, *common.networks(config, device))
    dtype = pick_dtype("auto", device) if rung.is_low else torch.float32
    for network in (pipe.unet, pipe.vae, pipe.text_encoder):
        network.to(dtype)
    optimize(
        pipe,
        compile=rung.is_compiled,
        channels_last=rung.has_channels_last,
        fuse_qkv=rung.is_fused,
        graphs=rung.has_graphs and device.type == "cuda",
        quantize=rung.quantize,
    )
    return pipe


@contextlib.contextmanager
def as_in(rung: Rung, pipe: Pipeline) -> Iterator[None]:
    """The original's way of what the rung has not yet, while inside."""
    with contextlib.ExitStack() as stack:
        if rung.is_written_out:
            stack.enter_context(common.written_out())
        if rung.backend:
            stack.enter_context(attention_backend(rung.backend, pipe.device))
        if not rung.shares:
            stack.enter_context(mock.patch.object(pipe, "recorded", apart(pipe.recorded or pipe.unet.denoise)))
        if not rung.is_cached:
            stack.enter_context(mock.patch.object(fusers.GatedSelfAttention, "project", keep_tokens))
            stack.enter_context(mock.patch.object(fusers.GatedSelfAttention, "attend", attend_over_all))
            stack.enter_context(redone_every_step(pipe))
        if not rung.skips:
            denoise = pipe.recorded or pipe.unet.denoise
            stack.enter_context(mock.patch.object(pipe, "recorded", always_open(denoise)))
        yield


def keep_tokens(self: GatedSelfAttention, tokens: Tensor) -> Projected:
    """Nothing made ahead: the tokens themselves."""
    return (self.linear(tokens),)


def attend_over_all(self: GatedSelfAttention, v: Tensor, projected: Projected) -> Tensor:
    """The paper's formula as it stands: every token asks, then TS drops the grounding tokens' answers."""
    x = self.norm1(torch.cat([v, projected[0]], dim=1))
    return self.attn.attend(*self.attn.queries_keys_values(x))[:, : v.shape[1]]


@contextlib.contextmanager
def redone_every_step(pipe: Pipeline) -> Iterator[None]:
    """Tokens, keys and values are made at every step from what the request said."""
    condition, denoise = pipe.unet.condition, pipe.recorded or pipe.unet.denoise
    said: dict[str, Any] = {}

    def remember(*args: Any) -> Conditioning:
        said["args"] = args
        return condition(*args)

    def redo(x: Tensor, timesteps: Tensor, cond: Conditioning, gate_scale: GateScale) -> Tensor:
        return denoise(x, timesteps, condition(*said["args"]), gate_scale)

    with mock.patch.object(pipe.unet, "condition", remember), mock.patch.object(pipe, "recorded", redo):
        yield


def apart(denoise: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The latent twice, once for each branch of guidance, from the first layer on."""

    def run(x: Tensor, timesteps: Tensor, cond: Conditioning, gate_scale: GateScale) -> Tensor:
        return denoise(torch.cat([x, x]), torch.cat([timesteps, timesteps]), cond, gate_scale)

    return run


def always_open(denoise: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Gives β = 0 as a tensor: the fusers are computed and multiplied by it."""

    def run(x: Tensor, timesteps: Tensor, cond: Conditioning, gate_scale: GateScale) -> Tensor:
        return denoise(x, timesteps, cond, torch.as_tensor(gate_scale, dtype=torch.float32, device=x.device))

    return run


def request_of(steps: int, batch_size: int, schedule: tuple[float, float, float]) -> Request:
    names = ("a red ball", "a blue cube", "a cat", "a green tree")
    entities = [{"phrase": name, "box": [0.2 * i, 0.1, 0.2 * i + 0.3, 0.8]} for i, name in enumerate(names)]
    fields = {"prompt": "things on a table", "entities": entities, "steps": steps, "schedule": list(schedule)}
    return parse_request(fields | {"num_images": batch_size, "sampler": "plms", "guidance": 7.5})


def floor_seconds(config: ModelConfig, steps: int, schedule: tuple[float, float, float], tflops: float) -> float:
    """Floor of one guided image: UNet and decoder at the ceiling. Text encoding, a thousandth of it, is left out."""
    side = config.image_size // config.vae.downsample_factor
    gates = gate_schedule(schedule, steps)
    opened = sum(gate > 0 for gate in gates) + (gates[0] > 0)  # PLMS evaluates its first step twice
    grounded, plain = (common.unet_flops(config.unet, (side, side), is_grounded=on, branches=2) for on in (True, False))
    unet = opened * grounded + (steps + 1 - opened) * plain
    return (unet + common.decoder_flops(config.vae, (side, side))) / tflops / 1e12


def main() -> None:
    parser = common.parser(__doc__, steps=10, repeats=2, batch_size=1)
    parser.add_argument("--schedule", nargs=3, type=float, default=(0.3, 0.0, 0.7), metavar=("A", "B", "C"))
    parser.add_argument("--only", action="append", metavar="TEXT", help="rungs whose name holds it; may be repeated")
    args = parser.parse_args()
    device, model, is_compiled = common.choose(args)
    config, schedule = common.MODELS[model], tuple(args.schedule)
    tops = {dtype: common.ceilings(device, dtype) for dtype in {torch.float32, pick_dtype("auto", device)}}
    facts = {"model": model, "batch": args.batch_size, "steps": args.steps, "schedule": schedule}
    rows = common.Rows("sample", args, device, **facts, ceiling=tops[pick_dtype("auto", device)])
    floor = floor_seconds(config, args.steps, schedule, tops[pick_dtype("auto", device)]["tflops"])
    request, reference = request_of(args.steps, args.batch_size, schedule), None

    def is_asked(name: str) -> bool:
        return not args.only or any(text in name for text in args.only)

    for rung in ladder(device, is_compiled):
        if not is_asked(rung.name):
            continue
        pipe = build(config, device, rung)

        def generate(pipe: Pipeline = pipe) -> Tensor:
            return torch.stack([s.latents for s in pipe.generate([request], batch_size=args.batch_size)])

        with as_in(rung, pipe), common.peak_memory(device) as peak:
            warm = warm_up(pipe, request, args.batch_size)
            latents = generate()
            reference = latents if reference is None else reference
            times = common.seconds(generate, device, args.repeats)
            rows.write(
                rung=rung.name,
                dtype=str(pipe.dtype).removeprefix("torch."),
                seconds_per_image=times["own"] / args.batch_size,
                wall_seconds_per_image=times["wall"] / args.batch_size,
                floor_share=floor * args.batch_size / times["own"],
                warm_up_seconds=warm,
                peak_gib=peak(),
                difference=float((latents - reference).abs().max() / reference.abs().max()),
            )
        del pipe, generate
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if importlib.util.find_spec("diffusers") and importlib.util.find_spec("transformers"):
        for name in ("diffusers, eager", "diffusers, compiled") if is_compiled else ("diffusers, eager",):
            if is_asked(name):
                time_diffusers(config, device, request, args, rows, floor, is_compiled=name.endswith("compiled"))
    else:
        print("diffusers is not installed: its pipeline is not compared")


def time_diffusers(
    config: ModelConfig, device: torch.device, request: Request, args: Any, rows: common.Rows, floor: float, *,
    is_compiled: bool,
) -> None:  # fmt: skip
    """Times diffusers' GLIGEN pipeline on the same weights and request: its scheduled sampling is a hard cut at τ."""
    from diffusers import PNDMScheduler, StableDiffusionGLIGENPipeline
    from transformers import CLIPTokenizer

    dtype = pick_dtype("auto", device)
    with TemporaryDirectory() as folder:
        names, made = ("unet", "vae", "text_encoder"), common.networks(config, torch.device("cpu"))
        parts = {name: hold(network.state_dict()) for name, network in zip(names, made, strict=True)}
        save_model(f"{folder}/model.safetensors", parts, config)
        write_weights(read_weights(f"{folder}/model.safetensors"), f"{folder}/diffusers", "diffusers")
        pipe = StableDiffusionGLIGENPipeline.from_pretrained(
            f"{folder}/diffusers",
            torch_dtype=dtype,
            tokenizer=CLIPTokenizer(**tokenizer_files(Path(folder)), model_max_length=77),
            scheduler=PNDMScheduler.from_pretrained(f"{folder}/diffusers", subfolder="scheduler"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).to(device)
    pipe.set_progress_bar_config(disable=True)
    if is_compiled:
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.unet = torch.compile(pipe.unet, mode="reduce-overhead", fullgraph=True)
        pipe.vae.decode = torch.compile(pipe.vae.decode, fullgraph=True)

    def generate() -> object:
        return pipe(
            request.prompt,
            gligen_phrases=[entity.phrase for entity in request.entities],
            gligen_boxes=[list(entity.box) for entity in request.entities],
            gligen_scheduled_sampling_beta=request.schedule[0] if request.schedule else 1.0,
            num_inference_steps=args.steps,
            num_images_per_prompt=args.batch_size,
            guidance_scale=request.guidance,
            height=config.image_size,
            width=config.image_size,
        )

    with common.peak_memory(device) as peak:
        start = time.perf_counter()
        generate()
        generate()
        warm = time.perf_counter() - start
        times = common.seconds(generate, device, args.repeats)
        rows.write(
            rung="diffusers, compiled" if is_compiled else "diffusers, eager",
            dtype=str(dtype).removeprefix("torch."),
            seconds_per_image=times["own"] / args.batch_size,
            wall_seconds_per_image=times["wall"] / args.batch_size,
            floor_share=floor * args.batch_size / times["own"],
            warm_up_seconds=warm,
            peak_gib=peak(),
            diffusers=importlib.metadata.version("diffusers"),
        )


def tokenizer_files(folder: Path) -> dict[str, str]:
    """CLIP's vocabulary, which comes with open_clip, as transformers reads it."""
    bpe = bpe_tokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(piece, piece): i for piece, i in bpe.encoder.items()}
    merges = [" ".join(pair) for pair, _ in sorted(bpe.bpe_ranks.items(), key=lambda item: item[1])]
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    return {"vocab_file": str(folder / "vocab.json"), "merges_file": str(folder / "merges.txt")}


if __name__ == "__main__":
    main()
