"""Makes the encodings of a built set (encodings.py) with the frozen encoders of a base, as training would.

A shard's file is made whole and renamed, so that a run that was killed goes on and ends in the same bytes. Batches are
a shard's records in their order, and all phrases in theirs, whoever computes them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from gligen.config import ModelConfig
from gligen.data.encodings import ENCODINGS, PHRASES, array_bytes, other_encoder, part_files, shard_file
from gligen.data.example import Example
from gligen.data.geometry import check_size, crop_pixels, crop_window
from gligen.data.prepare import cut_out
from gligen.data.shards import ShardSource
from gligen.device import pick_device, pick_training_dtype
from gligen.files import finished_stays, write_atomically
from gligen.images import fit, to_pixels
from gligen.loading import embedded_base, with_clip
from gligen.modules.autoencoder import AutoencoderKL
from gligen.modules.clip import CLIPImageEncoder, CLIPTextEncoder
from gligen.weights import LazyTensor, load_part, read_weights, replace_vae, without_weights

log = logging.getLogger("gligen")

NOTES = ".encoding"  # folder in a set for what is not yet whole; not the shards', which their processes remove
BATCH, PHRASE_BATCH = 8, 64  # what the last bits of the results depend on
LATENT_WEIGHTS = ("encoder.", "quant_conv.")  # a base with another decoder has the same latents


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """The frozen encoders of a base, on their device; dtype: of the computation, as `Objective`'s."""

    name: str
    config: ModelConfig
    vae: AutoencoderKL | None = None
    text: CLIPTextEncoder | None = None
    image: CLIPImageEncoder | None = None
    dtype: torch.dtype = torch.float32

    def fingerprints(self) -> dict[str, str]:
        """Fingerprints of the encoder of each part that these can make."""
        found: dict[str, nn.Module | None] = {"latents": self.vae, "phrases": self.text, "references": self.image}
        return {part: fingerprint(part, module) for part, module in found.items() if module is not None}


def fingerprint(part: str, module: nn.Module) -> str:
    """SHA-256 over the weights that make a part of the encodings: their names, shapes and values as float32."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if part != "latents" or name.startswith(LATENT_WEIGHTS):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def open_encoders(
    base: str | None,
    clip: str | None,
    vae: str | None = None,
    *,
    latents: bool,
    features: bool,
    references: bool,
    device: str,
    dtype: str,
) -> Encoders:
    """Those that are needed. Raises FileNotFoundError or ValueError, one line, for a file that lacks one."""
    place = pick_device(device)
    path = base or str(embedded_base())
    weights = read_weights(path)
    parts: dict[str, Mapping[str, LazyTensor]] = dict(weights.parts)
    config = weights.config
    if latents and vae is not None:
        parts["vae"], config = replace_vae(config, vae)
    if clip is not None and (references or (features and "text_encoder" not in parts)):
        parts, config = with_clip(parts, config, clip)

    def build(part: str, make: Callable[[], nn.Module], is_wanted: bool) -> Any:
        if not is_wanted:
            return None
        if part not in parts:
            raise ValueError(
                f"--base '{path}' holds no {part.replace('_', ' ')}: give a whole checkpoint, or "
                + ("one by --vae" if part == "vae" else "CLIP by --clip")
            )
        with without_weights():
            module = make()
        load_part(module, parts[part], device=place, dtype=torch.float32, what=f"{path}: {part}")
        return module.eval().requires_grad_(False)

    if features and config.text_encoder.kind != "clip":
        raise ValueError(f"--base '{path}' reads captions with LDM's own encoder: phrases need CLIP's")
    return Encoders(
        name=Path(path).name,
        config=config,
        vae=build("vae", lambda: AutoencoderKL(config.vae), latents),
        text=build("text_encoder", lambda: CLIPTextEncoder(config.text_encoder), features),
        image=build("image_encoder", lambda: CLIPImageEncoder(config.image_encoder), references),  # type: ignore[arg-type]
        dtype=pick_training_dtype(dtype, place),
    )


def main(args: argparse.Namespace, part: tuple[int, int]) -> bool:
    """Runs `python -m gligen.data build --latents --features`, for a set whose shards are built."""
    source = ShardSource(args.out, args.mode)
    encoders = open_encoders(
        args.base,
        args.clip,
        args.vae,
        latents=args.latents,
        features=args.features,
        references=args.features and source.mode.takes_images,
        device=args.device,
        dtype=args.dtype,
    )
    size = tuple(args.size) if args.size else (encoders.config.image_size,) * 2
    return encode(source, args.out, encoders, size=(size[0], size[1]), part=part)


def encode(
    source: ShardSource, out: Path, encoders: Encoders, *, size: tuple[int, int], part: tuple[int, int] = (0, 1)
) -> bool:
    """Makes what is not there yet of one part's shards; the last part makes that of the phrases.

    Returns whether everything is there. size: width and height of the pictures whose latents are made, multiples of 64.
    Raises ValueError, one line, where the set holds encodings of another encoder.
    """
    if encoders.vae is not None:
        check_size(size)
    names = [shard.name for shard in source.shards]
    with finished_stays(out, lambda: "{} of {} files".format(*_made(out, encoders, names))):
        (out / NOTES).mkdir(exist_ok=True)
        _claim(out, encoders, size)
        for k in range(part[0], len(names), part[1]):
            if encoders.vae is not None and not (out / shard_file(names[k], "latents")).exists():
                latents = _latents(_examples(source, k), encoders.vae, encoders.dtype, size)
                _write(out, shard_file(names[k], "latents"), latents)
                log.info("%s: latents (shard %d of %d)", names[k], k + 1, len(names))
            if encoders.image is not None and not (out / shard_file(names[k], "entities")).exists():
                features, starts = _references(_examples(source, k), encoders.image, encoders.dtype)
                _write(out, shard_file(names[k], "references"), features)
                _write(out, shard_file(names[k], "entities"), starts)  # last: it tells that both are there
                log.info("%s: features of references (shard %d of %d)", names[k], k + 1, len(names))
        if encoders.text is not None and part[0] == part[1] - 1 and not (out / "phrases.npy").exists():
            _write(out, "phrases.npy", _phrases(out, encoders.text))
    made, whole = _made(out, encoders, names)
    if made == whole:
        shutil.rmtree(out / NOTES, ignore_errors=True)
    return made == whole


def _made(out: Path, encoders: Encoders, shards: list[str]) -> tuple[int, int]:
    files = [name for part in encoders.fingerprints() for name in part_files(part, shards)]
    return sum((out / name).exists() for name in files), len(files)


def _claim(out: Path, encoders: Encoders, size: tuple[int, int]) -> None:
    """Notes whose encodings these are; refuses another encoder's."""
    path = out / ENCODINGS
    known: dict[str, Any] = json.loads(path.read_bytes()) if path.exists() else {}
    facts = dict(known)
    for part, mark in encoders.fingerprints().items():
        dtype = torch.float32 if part == "phrases" else encoders.dtype
        facts[part] = {"encoder": encoders.name, "fingerprint": mark, "computed_in": str(dtype).split(".")[-1]}
        if part == "latents":
            facts[part]["size"] = list(size)
        if part in known:
            if known[part]["fingerprint"] != mark:
                raise ValueError(other_encoder(str(out), part, known[part], mark, encoders.name))
            facts[part]["encoder"] = known[part]["encoder"]  # the same weights under another name
            if facts[part] != known[part]:
                raise ValueError(
                    f"'{out}' holds {part} made otherwise ({known[part]}, now {facts[part]}): give another --out"
                )
    if facts != known:
        write_atomically(path, json.dumps(facts, indent=1, sort_keys=True).encode(), by=out / NOTES)


def _write(out: Path, name: str, rows: NDArray[Any]) -> None:
    if not np.isfinite(rows).all():
        raise ValueError(f"{name}: the encoder makes numbers that are none of some of it; try --dtype float32")
    write_atomically(out / name, array_bytes(rows), by=out / NOTES)


def _examples(source: ShardSource, k: int) -> Iterator[Example]:
    return (source.example(n) for n in range(int(source.first[k]), int(source.first[k + 1])))


@torch.no_grad()
def _latents(
    shard: Iterator[Example], vae: AutoencoderKL, dtype: torch.dtype, size: tuple[int, int]
) -> NDArray[np.float16]:
    """(records, 2, C, h, w) of a shard."""
    factor = vae.config.downsample_factor
    made = [np.zeros((0, 2, vae.config.latent_channels, size[1] // factor, size[0] // factor), np.float16)]
    for examples in _batches(shard, BATCH):
        pixels = [crop_pixels(e.image, crop_window((e.image.shape[1], e.image.shape[0]), size)) for e in examples]
        with _autocast(vae, dtype):
            posterior = vae.posterior(_images(np.stack(pixels), vae))
        made.append(torch.stack([posterior.mean, posterior.logvar], 1).float().cpu().numpy().astype(np.float16))
    return np.concatenate(made)


@torch.no_grad()
def _references(
    shard: Iterator[Example], encoder: CLIPImageEncoder, dtype: torch.dtype
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """(entities, F) of a shard, and where each record's begin, with the end."""
    side, starts = encoder.config.image_size, [0]

    def pictures() -> Iterator[NDArray[np.uint8]]:
        for example in shard:
            own = example.references or (None,) * len(example.entities)
            for entity, picture in zip(example.entities, own, strict=True):
                shown = cut_out(example.image, entity.box) if picture is None else picture
                yield np.asarray(fit(Image.fromarray(shown), side, side))
            starts.append(starts[-1] + len(example.entities))

    made = [np.zeros((0, encoder.config.text_width), np.float32)]
    for batch in _batches(pictures(), BATCH):
        with _autocast(encoder, dtype):
            features = encoder.image_features(encoder.preprocess(_images(np.stack(batch), encoder)))
        made.append(features.float().cpu().numpy())
    return np.concatenate(made), np.array(starts, np.int64)


@torch.no_grad()
def _phrases(out: Path, encoder: CLIPTextEncoder) -> NDArray[np.float32]:
    """(phrases, F) of the lines of phrases.jsonl."""
    phrases = [json.loads(line) for line in (out / PHRASES).read_bytes().splitlines()]
    made = [np.zeros((0, encoder.config.width), np.float32)]
    for batch in _batches(iter(phrases), PHRASE_BATCH):
        ids = encoder.tokenize(batch)[0].to(next(encoder.parameters()).device)
        made.append(encoder.phrase_features(ids).float().cpu().numpy())  # not autocast, as training computes them
    log.info("features of %d phrases", len(phrases))
    return np.concatenate(made)


def _batches(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while batch := list(islice(items, size)):
        yield batch


def _images(pixels: NDArray[np.uint8], module: nn.Module) -> Tensor:
    device = next(module.parameters()).device
    return to_pixels(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(device))


def _autocast(module: nn.Module, dtype: torch.dtype) -> torch.autocast:
    device = next(module.parameters()).device
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
