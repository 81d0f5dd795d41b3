"""`evaluate.py pictures`, from its flags to the report: what is asked, images that are missing, metrics of all."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Mapping
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from gligen import cli
from gligen.data.open import open_given
from gligen.data.order import split
from gligen.data.prepare import Prepared
from gligen.data.streams import Series
from gligen.device import keep_freed_memory, pick_device, pick_dtype
from gligen.evaluation.asked import Asked, AskedExamples, AskedRequests, How, read_request_set
from gligen.evaluation.generate import INPUTS, claim_folder, generate, missing, wait_for_all
from gligen.evaluation.pictures import Tools, measure, table, write_report
from gligen.evaluation.protocols import Protocol
from gligen.image_files import ImageFiles
from gligen.job import complete
from gligen.loading import OpenModel, build_pipeline, open_model
from gligen.modes import get_mode
from gligen.provenance import record

log = logging.getLogger("gligen")


def run_pictures(args: argparse.Namespace, fields: Mapping[str, Any], protocol: Protocol | None) -> None:
    """Generates this process's share of what is missing; the first process then measures all and prints metrics.

    fields: of requests, as the flags give them. Raises ValueError, FileNotFoundError or MemoryError, one line, before
    long work where that can be.
    """
    rank, processes = cli.world()
    tools = Tools(**{each.name: getattr(args, each.name) for each in fields_of(Tools)})  # its flags are called alike
    tools.check()
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    how = gather(args, fields, protocol)
    count = args.count if args.count is not None else protocol.count if protocol else None
    out = Path(args.out)
    model, asked = open_all(args, how, count, out)
    if rank == 0:
        log.info("%d images are asked for: %s", asked.size, asked.description)
    made_by = _made_by(args, model, dtype)
    origin = {"settings": _settings(args, how, asked), "model": {"name": model.name, **made_by}}
    claim_folder(out, origin)
    start = time.perf_counter()
    numbers = missing(asked, out, rank, processes)
    made = 0
    if numbers:
        if device.type == "cpu":
            keep_freed_memory()
        pipe = build_pipeline(model, device=device, dtype=dtype)
        with tqdm(total=len(numbers), unit="image", desc="generating", disable=None if rank == 0 else True) as bar:
            made = generate(
                pipe,
                asked,
                out,
                numbers,
                batch_size=args.batch_size,
                extra={"model": made_by},
                on_image=lambda number: bar.update(),
            )
        del pipe
    made = wait_for_all(processes, made)
    if rank != 0:
        return
    seconds = time.perf_counter() - start
    measured = measure(out, asked, model, tools, device)
    about = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "generated": {"images": made, "seconds": round(seconds, 1), "processes": processes},
        "measured with": {name: value for name, value in vars(tools).items() if value not in (None, False)},
    }
    for reason, times in asked.left_out.items():
        log.warning("left out: %d × %s", times, reason)
    if measured.detections and measured.detections.unknown:
        names = ", ".join(f"'{name}' ({n})" for name, n in measured.detections.unknown.most_common(5))
        log.warning("detections of classes that were not asked for count for nothing: %s", names)
    written = write_report(out, measured, asked, origin, about, sheet=args.sheet, protocol=protocol)
    print(table(measured, protocol))
    print(*written, sep="\n")


def _made_by(args: argparse.Namespace, model: OpenModel, dtype: torch.dtype) -> dict[str, Any]:
    """The files that make the images, by fingerprint, as every image stores them."""
    mode = model.facts.mode
    files = {**model.files, "vae": args.vae, "lora": args.lora}
    is_part = "text_encoder" in model.from_clip or (mode and get_mode(mode).takes_images)
    if args.clip and is_part:
        files["clip"] = args.clip  # of other modes it only measures
    return record(files, {"mode": mode, "dtype": str(dtype).removeprefix("torch.")})


def _settings(args: argparse.Namespace, how: How, asked: Asked) -> dict[str, Any]:
    """What decides which images are made: a folder is of one such."""
    return {
        "data" if args.data else "requests": str(args.data or args.requests),
        "images": asked.size,
        **{name: value for name, value in vars(how).items() if name != "fields"},
        **how.fields,
        "content": asked.fingerprint(),
    }


def gather(args: argparse.Namespace, fields: Mapping[str, Any], protocol: Protocol | None) -> How:
    """Gathers how requests are made: the flags, then the protocol's, then the defaults."""
    given = {name: value for name, value in fields.items() if name != "seed"}
    if fields.get("seed", 0) < 0:
        raise ValueError(f"--seed is {fields['seed']}: give 0 or more, so that a run can go on where it was stopped")
    from_protocol = dict(protocol.fields) if protocol else {}
    return How(
        captions=args.captions or (protocol.captions if protocol else "full"),
        ungrounded=args.ungrounded,
        repaint=args.repaint or (protocol.repaint if protocol else "all"),
        seed=fields.get("seed"),
        fields=from_protocol | given,
    )


def open_all(args: argparse.Namespace, how: How, count: int | None, out: Path) -> tuple[OpenModel, Asked]:
    """The model and what it is asked, checked against each other as far as files' heads allow."""
    files = {"mode": args.mode, "clip": args.clip, "vocab": args.vocab, "vae": args.vae, "loras": args.lora}
    if args.requests is not None:
        given = read_request_set(args.requests, how, count)
        model = open_model(args.checkpoint, args.adapter, requests=given.requests, **files)
        images = ImageFiles()
        checked = [
            complete(request, model.facts, images=images, where=f"image {n}: ").request
            for n, request in enumerate(given.requests)
        ]
        return model, AskedRequests(given.description, checked, given.keys)
    model = open_model(args.checkpoint, args.adapter, **files)
    grounding = model.config.unet.grounding
    mode = grounding.mode if grounding else args.mode or "box-text"
    width, height = how.fields.get("size") or (model.config.image_size, model.config.image_size)
    source, findings = open_given(args, mode)
    if cli.world()[0] == 0:
        for line in findings.lines():
            log.info("%s", line)
    description = findings.lines()[0]
    if args.held_out:
        source = split(source, args.held_out)[1]
        description = f"the {source.size} held out (--held-out {args.held_out:g}) of {description}"
    prepared = Prepared(
        source=source,
        mode=get_mode(mode),
        image_size=(width, height),
        series=Series.EVALUATION,
        maps=findings.made_maps,
    )
    asked = AskedExamples(
        prepared,
        mode=mode,
        how=how,
        folder=out / INPUTS,
        description=description,
        count=count,
        federation=findings.federation,
    )
    first = next((request for n in range(asked.size) if (request := asked.request(n)) is not None), None)
    if first is None:
        raise ValueError(f"'{args.data}': none of its {asked.size} examples can be asked for: {dict(asked.left_out)}")
    complete(first, model.facts)
    return model, asked
