"""Grounded text-to-image generation: requests in, images out.

    python sample.py --checkpoint gligen.pth --prompt "a teddy bear and a bird" \\
        --box "a teddy bear" 0 .09 .33 .76 --box "a bird" .55 .4 .8 .8 --out outputs

Writes OUT/NNNN-K.png (request number, image number), each carrying the request that generates it again, and prints
their paths. Several processes (torchrun) share the images of a request file.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gligen import cli
from gligen.files import shipped
from gligen.image_files import FORMATS, ImageFiles, is_image_file, read_record
from gligen.provenance import compare, record
from gligen.request import Request, check_files, merge, parse_request, read_requests

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from gligen.job import Job
    from gligen.loading import OpenModel
    from gligen.output import OutputFolder
    from gligen.pipeline import Pipeline

log = logging.getLogger("gligen")

LEGIBLE = 384  # pixels a side to which small images are enlarged for --annotate, so that labels can be read
MODEL_FILES = ("vae", "lora", "clip", "vocab")  # flags that are stored with an image, besides checkpoint and adapter
MODEL_OPTIONS = ("ema", "quantize")
EXAMPLE = shipped("examples/box-text.json")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command's flags."""
    description, epilog = (__doc__ or "").split("\n\n", 1)
    parser = cli.Parser(
        "sample.py", description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="GLIGEN or Stable Diffusion checkpoint, diffusers folder, or hf:OWNER/NAME/FILE (default: the embedded "
        "miniature, with the adapter that the request needs)",
    )
    model.add_argument("--adapter", metavar="FILE", help="GLIGEN weights to put on the checkpoint")
    cli.add_change_flags(model)
    model.add_argument("--mode", metavar="MODE", help="what a checkpoint is grounded in, where its tensors cannot tell")
    model.add_argument(
        "--clip",
        metavar="FILE",
        help="CLIP ViT-L/14, for reference images (its image tower) or a checkpoint without text encoder",
    )
    model.add_argument("--vocab", metavar="FILE", help="WordPiece vocabulary, for LDM text2img-large")
    model.add_argument("--ema", action="store_true", help="use the averaged weights, where the file has both")
    model.add_argument("--device", default="auto", help="auto, cuda, cuda:N, mps or cpu (default: auto)")
    model.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: auto)")
    speed = parser.add_argument_group("speed and memory")
    speed.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile and, on CUDA, a graph of the whole step: warms up first, tens of seconds, then kept",
    )
    speed.add_argument(
        "--low-memory",
        action="store_true",
        help="offload: text encoder, UNet and autoencoder one at a time on the device",
    )
    speed.add_argument("--attention", metavar="NAME", help="how attention is computed (default: torch's own choice)")
    speed.add_argument(
        "--quantize",
        metavar="KIND",
        help="the UNet's linear layers in 8 bits, not exact: int8-weights, int8, fp8-weights or fp8 (needs torchao)",
    )
    parser.add_argument(
        "--request",
        metavar="FILE",
        help="JSON or YAML with one request or a list, JSON Lines, or an image written by this command",
    )
    cli.add_request_flags(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--out", default="outputs", metavar="DIR", help="folder for the images (default: outputs)")
    output.add_argument(
        "--format",
        default="png",
        choices=[suffix.lstrip(".") for suffix in FORMATS],
        help="of the images; jpg and webp, of quality 95, carry their request as well (default: png)",
    )
    output.add_argument("--batch-size", type=int, default=4, metavar="N", help="images generated at once (default: 4)")
    output.add_argument("--annotate", action="store_true", help="also write NNNN-K-annotated.png with boxes drawn")
    output.add_argument("--grid", action="store_true", help="also write NNNN-grid.png with all images of the run")
    output.add_argument(
        "--init-latents", metavar="FILE.npy", help="start from these (images, C, h, w) instead of seeds"
    )
    output.add_argument("--save-latents", metavar="FILE.npy", help="write the final latents (images, C, h, w), float32")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def gather_requests(args: argparse.Namespace) -> list[Request]:
    """Requests of the file and the flags; the example if neither says anything."""
    fields = cli.request_fields(args)
    if args.request is None and not fields.keys().isdisjoint(cli.CONTENT_FIELDS):
        return [parse_request(fields)]
    requests = read_requests(args.request or EXAMPLE)
    return [merge(request, fields) for request in requests] if fields else requests


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command. argv: its arguments, by default the process's own. Raises as `gligen.cli.run` reports it."""
    args = build_parser().parse_args(argv)
    requests = gather_requests(args)
    images = ImageFiles()
    for i, request in enumerate(requests):
        check_files(request, images, where=f"request {i}: " if len(requests) > 1 else "")
    if args.batch_size < 1:
        raise ValueError(f"--batch-size is {args.batch_size}: give at least 1")

    # From here on torch is needed. What a user can get wrong is looked at before any weight is read.
    from gligen.device import keep_freed_memory, pick_device, pick_dtype
    from gligen.job import complete_all
    from gligen.loading import build_pipeline, open_model
    from gligen.output import OutputFolder, check_new_file, one_size, read_latents
    from gligen.pipeline import check_sizes
    from gligen.quantize import check_quantization
    from gligen.runtime import attention_backend

    device = pick_device(args.device)
    attention = attention_backend(args.attention, device)
    if args.quantize:
        check_quantization(args.quantize, device)
        if args.low_memory:
            raise ValueError("--quantize and --low-memory do not go together: leave one out")
    fetch(args)
    model = open_model(
        args.checkpoint,
        args.adapter,
        mode=args.mode,
        clip=args.clip,
        vocab=args.vocab,
        ema=args.ema,
        vae=args.vae,
        loras=args.lora,
        requests=requests,
    )
    jobs = complete_all(requests, model.facts, images)
    latents = read_latents(args.init_latents, jobs) if args.init_latents else None
    log_without_effect(args, jobs, model)
    if args.save_latents:
        one_size(jobs, "--save-latents")
        check_new_file(args.save_latents, "--save-latents")
    if args.grid and cli.world()[1] > 1:
        raise ValueError("--grid needs a single process: run without torchrun")
    dtype = pick_dtype(args.dtype, device)
    check_sizes(jobs, model.config, device, dtype, low_memory=args.low_memory)
    files = {role: value for role in MODEL_FILES if (value := getattr(args, role, None))}
    options = {"mode": model.facts.mode, "dtype": str(dtype).removeprefix("torch.")}
    options |= {name: getattr(args, name) for name in MODEL_OPTIONS}
    origin: dict[str, Any] = {"model": record({**files, **model.files}, options)}
    origin |= record({"init_latents": args.init_latents}, {})
    log_differences(args.request, origin, jobs[0])
    out = OutputFolder(args.out, f".{args.format}")
    for job in jobs:
        out.check(job.alone(0), origin | {"images": job.fingerprints()})
    if device.type == "cpu":
        keep_freed_memory()
    pipe = build_pipeline(model, device="cpu" if args.low_memory else device, dtype=dtype)
    with attention:
        make_fast(pipe, jobs, args, device)
        generate(pipe, jobs, out, args, origin, latents)


def fetch(args: argparse.Namespace) -> None:
    """Puts files of the Hugging Face Hub ('hf:OWNER/NAME/FILE') where they are on this machine into the flags."""
    from gligen.weights.hub import local

    for name in ("checkpoint", "adapter", *MODEL_FILES):
        value = getattr(args, name)
        if value:
            setattr(args, name, [local(each) for each in value] if isinstance(value, list) else local(value))


def log_without_effect(args: argparse.Namespace, jobs: list[Job], model: OpenModel) -> None:
    """Logs a line for each given flag that changes nothing of this run."""
    has_references = any("entities" in name for job in jobs for name, _ in job.request.images)
    if args.clip and not has_references and "text_encoder" not in model.from_clip:
        log.warning("no request has a reference image: --clip has no effect")
    if args.init_latents and hasattr(args, "seed") and not any(job.draws_noise for job in jobs):
        log.warning(
            "--init-latents takes the place of the seeds' noise, and the sampler draws none: --seed has no effect"
        )


def log_differences(request: str | None, origin: dict[str, Any], job: Job) -> None:
    """Logs a line where an image of ours is generated again with something else than it was generated with."""
    if request is None or not is_image_file(Path(request).expanduser().read_bytes()[:12]):
        return
    stored = read_record(request)
    if found := compare(stored, origin["model"], origin | {"images": job.fingerprints()}):
        log.warning("%s was generated with %s: what comes out will differ", Path(request).name, found)


def make_fast(pipe: Pipeline, jobs: list[Job], args: argparse.Namespace, device: torch.device) -> None:
    """Applies what the device gains from, and what the flags ask for."""
    from gligen.files import compile_cache
    from gligen.low_memory import offload
    from gligen.runtime import optimize, warm_up

    if args.low_memory:
        offload(pipe, device)
    chosen = None if args.compile else False  # off until a GPU has measured them, see docs/performance.md
    steps = optimize(pipe, compile=args.compile, fuse_qkv=chosen, graphs=chosen, quantize=args.quantize)
    if steps["compile"] or steps["graphs"]:
        seconds = warm_up(pipe, jobs[0], args.batch_size)
        log.info("warmed up in %.0f s; compiled code is kept in '%s'", seconds, compile_cache())


def generate(
    pipe: Pipeline,
    jobs: list[Job],
    out: OutputFolder,
    args: argparse.Namespace,
    origin: dict[str, Any],
    latents: Tensor | None,
) -> None:
    """Generates this process's share of the images, writing each as soon as it is done."""
    from tqdm import tqdm

    from gligen.grounding import draw_request
    from gligen.images import NEAREST, grid
    from gligen.output import write_latents

    rank, processes = cli.world()
    steps = [len(job.gates) for job in jobs for _ in job.seeds]
    total = sum(steps[rank::processes])
    kept = []
    with tqdm(total=total, unit="step", desc="sampling", disable=None if rank == 0 else True) as bar:
        for sample in pipe.generate(
            jobs,
            batch_size=args.batch_size,
            init_latents=latents,
            on_step=lambda progress: bar.update(len(progress.indices)),
            only=lambda n: n % processes == rank,
        ):
            number, image = sample.index
            print(out.write(sample, origin | {"images": jobs[number].fingerprints()}), flush=True)
            if args.annotate:
                scale = max(1, LEGIBLE // min(sample.image.size))
                large = sample.image.resize((scale * sample.image.width, scale * sample.image.height), NEAREST)
                print(out.write_extra(draw_request(large, jobs[number].opened()), number, f"{image}-annotated"))
            if args.grid or args.save_latents:
                kept.append(sample)
    kept.sort(key=lambda sample: sample.index)
    if args.grid:
        print(out.write_extra(grid([sample.image for sample in kept]), 0, "grid"))
    if args.save_latents:
        write_latents(args.save_latents, kept)
        print(args.save_latents)


def entry() -> int:
    """The command `gligen-sample`, and sample.py of a checkout."""
    return cli.run(main)
