"""A model file of any known layout, recognised by what is in it and never by what it is called.

Every layout is reduced to the same *parts* (`unet`, `vae`, `text_encoder`, `image_encoder`, `base_first_conv`), dicts
of lazy tensors under our names, and to one `ModelConfig`. Nothing but headers is read here.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from gligen.config import ModelConfig, ScheduleConfig, TextEncoderConfig, from_dict, to_dict
from gligen.modes import get_mode
from gligen.weights import folders
from gligen.weights.diffusers_configs import clip_config
from gligen.weights.hub import elsewhere, local
from gligen.weights.infer import (
    fitting_modes,
    has_whole_unet,
    infer_config,
    infer_schedule,
    is_grounding_name,
    possible_modes,
    schedule_buffers,
)
from gligen.weights.kinds import HYPERNETWORK, foreign, relative
from gligen.weights.names_clip import image_from_hf, split_open_clip, text_from_hf
from gligen.weights.names_ema import unet_name
from gligen.weights.original import apply_original_config
from gligen.weights.pickles import Inert, describe_foreign, is_legacy, plain, read_legacy, read_pickle
from gligen.weights.safetensors_file import looks_like_safetensors, read_safetensors
from gligen.weights.tensors import LazyTensor, reshape, rows, transpose

Kind = Literal["sd", "ldm", "gligen", "pruned", "diffusers", "clip", "model", "adapter"]
Tensors = Mapping[str, LazyTensor]
PART_NAMES = ("unet", "vae", "text_encoder", "image_encoder", "base_first_conv")
# Where write.py stores, in a published layout, what that layout has no place for: the fields of a ModelConfig that
# reading it would get wrong, as JSON. In a safetensors file's metadata, or beside the state dict in a pickle.
CONFIG_KEY = "gligen_config"


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A file's contents under our names, tensors still in the file.

    parts: part -> name -> tensor; a part that the file lacks is not there.
    config: as far as the file shows it; parts it does not hold have Stable Diffusion v1's sizes.
    modes: what it can be grounded in: empty for a base model, several where the tensors cannot tell (canny and
        depth; a pruned map file). `config.unet.grounding.mode` is the first of them.
    notes: what else there was to see: inert classes, ignored keys.
    warnings: what an image made from it may lack, logged by whatever opens it.
    """

    path: str
    kind: Kind
    parts: Mapping[str, Tensors]
    config: ModelConfig
    modes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def unused(self) -> tuple[str, ...]:
        """The notes on tensors that no part of the model takes, for whoever uses the others to log."""
        return tuple(note for note in self.notes if note.startswith(_IGNORED))


@dataclass(kw_only=True)
class Contents:
    """The finds of one layout's reader, before it is settled which config holds."""

    kind: Kind
    parts: dict[str, Tensors]
    own_config: dict[str, Any] | None = None  # a ModelConfig, perhaps partial, as plain data
    original_config: Mapping[str, Any] | None = None
    stored: dict[str, Any] = field(default_factory=dict)  # likewise, what the file's buffers tell
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def read_weights(path: str | Path, *, mode: str | None = None, ema: bool = False) -> Weights:
    """Reads what a model file or folder holds; see `Weights`.

    path: also 'hf:OWNER/NAME/FILE' and 'hf:OWNER/NAME', of the Hugging Face Hub.
    mode: which of the possible modes it is, where the file does not say.
    ema: the averaged copy of the UNet instead of the trained one.
    Raises FileNotFoundError, or ValueError in one line for what is damaged, foreign, hostile or contradictory.
    """
    given, path = path, Path(local(path)).expanduser()
    if mode is not None:
        get_mode(mode)
    if not path.exists():
        raise FileNotFoundError(f"{given}: no such file or folder{elsewhere(given)}")
    if path.is_dir():
        path = folders.lone_file(path) or path
    try:
        contents = _read_folder(path) if path.is_dir() else _read_file(path, ema)
        if ema and contents.kind not in ("sd", "ldm", "gligen"):
            raise ValueError("holds no averaged (EMA) weights")
        contents.parts = {name: contents.parts[name] for name in PART_NAMES if contents.parts.get(name)}
        _leave_out_added_tokens(contents)
        return _resolve(path, contents, mode)
    except ValueError as error:
        is_told = str(error).startswith((f"{path}:", f"{path}{os.sep}"))  # with the path in front
        raise ValueError(str(error) if is_told else f"{path}: {error}") from error


def _resolve(path: Path, contents: Contents, mode: str | None) -> Weights:
    """Settles mode and config: tensors first, then the file's own config, then a JSON file beside it."""
    unet = contents.parts.get("unet", {})
    possible, modes = fitting_modes(unet), possible_modes(unet)
    is_grounded = any(is_grounding_name(name) for name in unet)
    if is_grounded and not possible and contents.own_config is None:
        raise ValueError("holds grounding tensors that are of no known mode")
    beside = _config_beside(path, contents)
    is_told_inside = contents.own_config is not None or contents.original_config is not None
    own = contents.own_config if is_told_inside else beside
    source = "" if is_told_inside else f"{_beside(path).name} beside it: "

    config = infer_config(contents.parts, modes[0] if modes else None)
    try:
        config = _with(config, contents.stored)
        if contents.original_config is not None:
            stated, config = apply_original_config(contents.original_config, config, possible)
            modes = (stated,) if stated and possible else modes
        if own is not None:
            config = _with(config, own)
    except (ValueError, TypeError, ArithmeticError, AttributeError) as error:  # words where numbers belong and the like
        raise ValueError(f"its config cannot be used ({source}{error})") from error
    if is_told_inside and beside is not None:
        inferred = json.loads(json.dumps(to_dict(config)))
        if folders.overlaid(inferred, beside) != inferred:
            contents.warnings.append(f"{_beside(path).name} beside it says otherwise than the file itself: not used")
    if own is not None:
        names_mode = "mode" in ((own.get("unet") or {}).get("grounding") or {})
        stated = config.unet.grounding.mode if config.unet.grounding and names_mode else None
        if stated and possible and stated not in possible:
            raise ValueError(f"its config says mode {stated!r}, but its tensors are of {' or '.join(possible)}")
        modes = (stated,) if stated else modes
    if mode is not None:
        allowed = possible or modes
        if mode not in allowed:
            holds = f"its tensors are of {' or '.join(allowed)}" if allowed else "it holds no grounding"
            raise ValueError(f"is not of mode {mode!r}: {holds}")
        modes = (mode,)
    if modes and config.unet.grounding is not None and config.unet.grounding.mode != modes[0]:
        grounding = replace(config.unet.grounding, mode=modes[0])
        config = replace(config, unet=replace(config.unet, grounding=grounding))
    return Weights(
        path=str(path),
        kind=contents.kind,
        parts=contents.parts,
        config=config,
        modes=modes,
        notes=tuple(contents.notes),
        warnings=tuple(contents.warnings),
    )


def _with(config: ModelConfig, stated: Mapping[str, Any]) -> ModelConfig:
    """The config with the fields that plain data states."""
    changed: ModelConfig = from_dict(ModelConfig, folders.overlaid(to_dict(config), stated))
    return changed


def _leave_out_added_tokens(contents: Contents) -> None:
    """Tokens behind CLIP's own, which a textual inversion added: no caption can name them here, so they are cut off.

    Start- and end-of-text keep their ids, which stand before them.
    """
    text = contents.parts.get("text_encoder", {})
    embedding, own = text.get("token_embedding.weight"), TextEncoderConfig.vocab_size
    if embedding is None or embedding.shape[0] <= own:
        return
    contents.parts["text_encoder"] = {**text, "token_embedding.weight": rows(embedding, 0, own)}
    contents.warnings.append(
        f"its vocabulary has {embedding.shape[0] - own} more tokens than CLIP's {own} (textual inversion): a caption "
        "cannot name them here"
    )


def _beside(path: Path) -> Path:
    return path.with_suffix(".json")


def _config_beside(path: Path, contents: Contents) -> dict[str, Any] | None:
    """`FILE.json` beside FILE.anything: a ModelConfig, or the fields of it that shapes cannot tell.

    Other programs write files of that name too: ours is known by its fields, any other is left alone, with a note.
    """
    beside = _beside(path)
    if path.is_dir() or not beside.is_file() or beside == path:
        return None
    text = beside.read_bytes()
    try:
        data = json.loads(text) if text.strip() else None
    except UnicodeDecodeError:
        data = None  # ours is ASCII
    except ValueError as error:
        raise ValueError(
            f"the config beside it, {beside.name}, is no JSON ({error}): mend it, or move it away if it is another "
            "program's"
        ) from error
    if not _is_ours(data):
        contents.notes.append(f"{beside.name} beside it is another program's and was not read")
        return None
    return data


def _is_ours(data: Any) -> bool:
    """True for fields of a ModelConfig and no others, or for others beside a part with fields of ours."""
    if not isinstance(data, dict) or not data:
        return False
    fields = {f.name for f in dataclasses.fields(ModelConfig)}
    defaults = to_dict(ModelConfig())
    parts = {name: value for name, value in data.items() if isinstance(defaults.get(name), dict)}
    if any(not isinstance(value, dict) for value in parts.values()) or not parts:
        return False
    return set(data) <= fields or any(value.keys() & defaults[name].keys() for name, value in parts.items())


# --- files -----------------------------------------------------------------------------------------------------------


_PREDICTS = "predicts {}; only models that predict epsilon are known"
_UNFINISHED = (".aria2", ".st")  # what download managers (aria2, axel) keep beside a file until it is whole


def read_tensors(path: Path) -> tuple[Any, dict[str, str], list[str]]:
    """Reads a file as it stands: (mapping or other object, safetensors metadata, notes)."""
    for suffix in _UNFINISHED:  # the file has its full size by then, and zeros where nothing has come
        if (beside := path.with_name(path.name + suffix)).exists():
            raise ValueError(f"{path}: its download is not finished: {beside.name} is beside it")
    with open(path, "rb") as file:
        start = file.read(4)
    if start == b"PK\x03\x04":
        value, inert = read_pickle(path)
    elif looks_like_safetensors(path):
        return *read_safetensors(path), []
    elif is_legacy(path):
        value, inert = read_legacy(path)
    else:
        raise ValueError(describe_foreign(path))
    return value, {}, [f"classes in its pickle, not loaded: {', '.join(inert)}"] if inert else []


def _read_file(path: Path, ema: bool) -> Contents:
    folders.check_no_shard(path)
    value, metadata, notes = read_tensors(path)
    if metadata.get("format") == "gligen":
        contents = _own(value, metadata)
    else:
        contents = _recognised(value, ema)
        stated = metadata.get(CONFIG_KEY) or (value.get(CONFIG_KEY) if isinstance(value, dict) else None)
        if isinstance(stated, str):
            try:
                contents.own_config = json.loads(stated)
            except ValueError as error:
                raise ValueError(f"its {CONFIG_KEY} cannot be read ({error})") from error
        if (predicted := metadata.get("modelspec.prediction_type", "epsilon")) != "epsilon":
            raise ValueError(_PREDICTS.format(predicted))
    contents.notes = notes + contents.notes
    return contents


def _recognised(value: Any, ema: bool) -> Contents:
    """The contents of another program's file. Trainers nest their state dicts: the nearest that is a model is taken."""
    names: list[str] = []
    few: dict[str, LazyTensor] = {}
    for where, mapping in mappings(value):
        contents = _layout(mapping, ema)
        if contents is not None:
            if where not in ("", "state_dict"):
                contents.notes.append(f"its weights stand under {where!r}")
            return contents
        tensors = named_tensors(mapping)
        names += [*tensors, *(f"{where}.{name}" for name in tensors if where)]
        few = few or tensors
        if any(isinstance(key, int) and key in (320, 640, 768, 1024, 1280, 2048) for key in mapping):
            raise ValueError(HYPERNETWORK)  # by the widths of the layers that it changes
    if kind := foreign(names):
        raise ValueError(kind)
    # One to four vectors as wide as a text encoder, under the name of the word they stand for.
    is_few = 1 <= len(few) <= 4
    if is_few and all(t.shape[-1:] in ((768,), (1024,), (1280,)) and len(t.shape) <= 2 for t in few.values()):
        raise ValueError("looks like a textual inversion: words for a prompt, not a model")
    if any(name.startswith(("down_blocks.", "decoder.up_blocks.")) for name in names):
        raise ValueError("one file of a diffusers folder: give the folder")
    if names:
        raise ValueError(_no_layout(names))
    if holder := _holder_of_tensors(value):
        raise ValueError(holder)
    raise ValueError("holds no tensors, so it is not a model")


def _no_layout(names: list[str]) -> str:
    return f"of no known layout (its first names are {', '.join(names[:3])})"


def _mapping(value: Any) -> dict[Any, Any] | None:
    """A dict, or what stands for an object of a class that behaves like one."""
    if isinstance(value, dict):
        return value
    items = value.items if isinstance(value, Inert) else []
    if items and all(isinstance(item, tuple) and len(item) == 2 for item in items):
        return {key: item for key, item in items if isinstance(key, (str, int))}
    return None


def mappings(value: Any) -> Iterator[tuple[str, dict[Any, Any]]]:
    """Every dict down to four levels, nearest first, with its place as dotted keys."""
    level, seen = [("", value)], set()
    for _ in range(4):
        below = []
        for where, item in level:
            if isinstance(item, (list, tuple)):
                below += [(f"{where}.{i}".lstrip("."), inner) for i, inner in enumerate(item)]
            mapping = _mapping(item)
            if mapping is None or id(item) in seen:
                continue
            seen.add(id(item))
            yield where, mapping
            below += [(f"{where}.{key}".lstrip("."), inner) for key, inner in mapping.items() if isinstance(key, str)]
        level = below


def _holder_of_tensors(value: Any) -> str | None:
    """The place where a file that is no state dict holds its numbers, and what to do; None where there are none."""
    pending: list[tuple[Any, str | None]] = [(value, None)]
    seen: set[int] = set()
    arrays = None
    while pending:
        item, owner = pending.pop()
        if isinstance(item, LazyTensor):
            if owner is None:
                return "holds tensors, but not under names: store a state dict"
            return (
                f"holds its tensors inside an object of class {owner}, which is not loaded: store that object's "
                "state_dict() instead"
            )
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Inert):
            if item.global_name.startswith("numpy.") and item.global_name.endswith("._reconstruct"):
                arrays = "holds NumPy arrays, which are not read: store them as tensors (torch.from_numpy)"
            pending += [(inner, owner or item.global_name) for inner in (item.args, item.state, item.items)]
        elif isinstance(item, dict):
            pending += [(inner, owner) for inner in item.values()]
        elif isinstance(item, (list, tuple, set, frozenset)):
            pending += [(inner, owner) for inner in item]
    return arrays


# What wrappers put into the names of a module's tensors: torch.compile, FSDP, activation checkpointing.
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def named_tensors(value: Any) -> dict[str, LazyTensor]:
    """The tensors of a state dict, under the names they had before a trainer wrapped their module (DDP: `module.`).

    Some trainers' files hold gates as (1,), the published ones as (). Raises ValueError for tensors of a kind that
    only their own class can read.
    """
    mapping = _mapping(value) or {}
    tensors = {name: t for name, t in mapping.items() if isinstance(name, str) and isinstance(t, LazyTensor)}
    for name, item in mapping.items():
        if isinstance(item, Inert) and ("._rebuild_" in item.global_name or "torchao" in item.global_name):
            raise ValueError(f"tensor {name!r} is stored by {item.global_name}: give the weights as plain tensors")
    for wrapper in _WRAPPERS:
        if any(wrapper in name for name in tensors):
            tensors = {name.replace(wrapper, ""): t for name, t in tensors.items()}
    if tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): t for name, t in tensors.items()}
    gates = [n for n, t in tensors.items() if n.endswith((".alpha_attn", ".alpha_dense")) and t.shape == (1,)]
    return tensors | {name: reshape(tensors[name], ()) for name in gates}


def _under(tensors: Tensors, prefix: str) -> dict[str, LazyTensor]:
    return {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}


def _own(tensors: Tensors, metadata: Mapping[str, str]) -> Contents:
    kind = metadata.get("kind")
    try:
        config = json.loads(metadata["config"])
    except (KeyError, ValueError) as error:
        raise ValueError("its metadata holds no readable config") from error
    if kind not in ("model", "adapter") or not isinstance(config, dict):
        raise ValueError(f"its kind is {kind!r}: the known ones are model, adapter")
    parts: dict[str, Tensors] = {name: _under(tensors, f"{name}.") for name in PART_NAMES}
    return Contents(
        kind="model" if kind == "model" else "adapter",
        parts=parts,
        own_config=config,
        notes=ignored(name for name in tensors if not name.startswith(tuple(f"{part}." for part in PART_NAMES))),
    )


def _gligen(value: Mapping[str, Any], ema: bool) -> Contents:
    """The original trainer's checkpoint; `image_encoder` and `base_first_conv` are ours."""
    unet = named_tensors(value.get("model"))
    if ema:
        if not (averaged := named_tensors(value.get("ema"))):
            raise ValueError("holds no averaged (EMA) weights")
        unet = unet | averaged
    names = ("autoencoder", "text_encoder", "image_encoder", "base_first_conv")
    parts, notes = _parts(unet, *(named_tensors(value.get(name)) for name in names))
    stated = plain(value["config_dict"]) if "config_dict" in value else None
    if "config_dict" in value and not isinstance(stated, dict):
        stated = None
        notes.append("its config_dict cannot be read")
    stored = {"schedule": infer_schedule(named_tensors(value.get("diffusion")))}
    return Contents(kind="gligen", parts=parts, original_config=stated, stored=stored, notes=notes)


def _layout(mapping: Mapping[Any, Any], ema: bool) -> Contents | None:
    """A dict of parts as GLIGEN's trainer writes it, or a single state dict; None if it is neither."""
    unet = named_tensors(mapping.get("model"))
    if has_whole_unet(unet):
        _refuse_relatives(unet)
        return _gligen(mapping, ema)
    tensors = named_tensors(mapping)
    # Where all names begin with one word that no layout has, it is the attribute that a trainer kept its network in.
    for _ in range(3):
        if (contents := _flat(tensors, ema)) is not None or not tensors:
            return contents
        first = next(iter(tensors)).partition(".")[0] + "."
        if not all(name.startswith(first) for name in tensors):
            return None
        tensors = _under(tensors, first)
    return None


_BLOCKS = ("input_blocks.", "middle_block.", "output_blocks.")


def _refuse_relatives(names: Iterable[str]) -> None:
    if kind := relative(names):
        raise ValueError(kind)


def _flat(tensors: Tensors, ema: bool) -> Contents | None:
    """A single state dict: told apart by the names in it; None if it is none of ours."""
    names = tuple(tensors)
    _refuse_relatives(names)
    if any(name.startswith(("model.diffusion_model.", "model_ema.diffusion_model")) for name in names):
        return _stable_diffusion(tensors, ema)
    if "time_embed.0.weight" in tensors and "input_blocks.0.0.weight" in tensors:
        is_grounded = any(is_grounding_name(name) for name in names)
        return Contents(kind="gligen" if is_grounded else "sd", parts={"unet": tensors})
    if any(name.startswith("down_blocks.") and ".fuser." in name for name in names):
        raise ValueError("one file of a diffusers folder: give the folder")
    if any(name.startswith(("position_net.", *_BLOCKS)) and is_grounding_name(name) for name in names):
        grounding = {name: t for name, t in tensors.items() if is_grounding_name(name)}
        return Contents(kind="pruned", parts={"unet": grounding}, notes=ignored(n for n in names if n not in grounding))
    if any(name.startswith(("vision_model.", "text_model.", "visual.")) for name in names):
        return Contents(kind="clip", parts=clip_parts(tensors), notes=ignored(n for n in names if not is_clip_name(n)))
    return None


def _stable_diffusion(tensors: Tensors, ema: bool) -> Contents:
    unet = _under(tensors, "model.diffusion_model.")
    if unet and all(is_grounding_name(name) for name in unet):  # a pruned file under a checkpoint's names
        others = ignored(name for name in tensors if not name.startswith("model.diffusion_model."))
        return Contents(kind="pruned", parts={"unet": unet}, notes=others)
    if unet and not has_whole_unet(unet):
        raise ValueError("its UNet has no time_embed.0.weight: it is not whole, or of another kind of model")
    averaged = {
        name: t for key, t in tensors.items() if key.startswith("model_ema.") and (name := unet_name(key)) is not None
    }
    notes: list[str] = []
    if ema and not averaged:
        raise ValueError("holds no averaged (EMA) weights")
    if not unet:
        notes.append("holds averaged (EMA) weights only")
    if ema or not unet:
        unet = unet | averaged
    elif averaged:
        notes.append("holds averaged (EMA) weights too: --ema takes them")
    if "v_pred" in tensors:  # an empty tensor by which fine-tuners mark it
        raise ValueError(_PREDICTS.format("v"))
    text = _under(tensors, "cond_stage_model.transformer.")
    bare = {} if text else {name: t for name, t in tensors.items() if name.startswith("text_model.")}
    text = text or bare  # some mergers lose what stands before it
    vae, image, conv = (
        _under(tensors, f"{name}.") for name in ("first_stage_model", "image_encoder", "base_first_conv")
    )
    parts, more = _parts(unet, vae, text, image, conv)
    known = ("model.diffusion_model.", "model_ema.", "first_stage_model.", "cond_stage_model.transformer.",
             "image_encoder.", "base_first_conv.")  # fmt: skip
    unnoted = {*schedule_buffers(ScheduleConfig()), "logvar", "scale_factor", *bare}
    unused = ignored(name for name in tensors if not name.startswith(known) and name not in unnoted)
    return Contents(
        kind="ldm" if "token_emb.weight" in text else "sd",
        parts=parts,
        stored={"schedule": infer_schedule(tensors), "vae": _stored_scale(tensors)},
        notes=[*notes, *more, *unused],
    )


def _stored_scale(tensors: Tensors) -> dict[str, float]:
    """The factor of latents as LDM's trainer stores one that it measured (`scale_by_std`); empty where it did not."""
    if "scale_factor" not in tensors or tensors["scale_factor"].numel() != 1:
        return {}
    return {"scale_factor": float(f"{tensors['scale_factor'].read(dtype=torch.float64).item():.6g}")}


def _parts(
    unet: Tensors, vae: Tensors, text: Tensors, image: Tensors, first_conv: Tensors
) -> tuple[dict[str, Tensors], list[str]]:
    """The parts of a checkpoint that holds all under LDM's names, the text encoder under Hugging Face's; notes."""
    text, image, notes = _text(text, image)
    vae, more = vae_part(vae)
    return dict(zip(PART_NAMES, (unet, vae, text, image, first_conv), strict=True)), notes + more


VAE_PREFIXES = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")


def vae_part(tensors: Tensors) -> tuple[dict[str, LazyTensor], list[str]]:
    """An autoencoder's tensors, and notes on those that are none of its."""
    part = {name: t for name, t in tensors.items() if name.startswith(VAE_PREFIXES)}
    return part, ignored(name for name in tensors if name not in part)


def _text(tensors: Tensors, image: Tensors) -> tuple[Tensors, Tensors, list[str]]:
    """Either text encoder, with or without the module names some savers put in front; the image encoder; notes.

    A text encoder's own projection is not used for captions: reference images are carried back through it.
    """
    bare = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    if "token_emb.weight" in bare:
        return bare, image, []
    bare = {name.removeprefix("text_model."): t for name, t in bare.items()}
    projection = bare.pop("text_projection.weight", None)
    bare.pop("logit_scale", None)  # of CLIP's training
    notes = []
    if projection is not None and image and "text_projection" not in image:
        image = {**image, "text_projection": transpose(projection)}
    elif projection is not None:
        notes = ["its text encoder's text_projection.weight takes no part in captions"]
    return text_from_hf(bare), image, notes


def clip_parts(tensors: Tensors) -> dict[str, Tensors]:
    """The parts of a CLIP state dict, Hugging Face's or open_clip's."""
    if any(name.startswith("visual.") for name in tensors):
        text, image = split_open_clip(tensors)
    else:
        text = text_from_hf(_under(tensors, "text_model."))
        image = image_from_hf(tensors)
    if "visual.conv1.weight" not in image:  # a text tower alone, perhaps with its projection
        image = {}
    return {"text_encoder": text, "image_encoder": image}


def is_clip_name(name: str) -> bool:
    """Whether CLIP's own networks, of Hugging Face's names or open_clip's, hold a tensor of this name."""
    name = name.removeprefix("text.")
    return name in ("text_projection", "positional_embedding") or name.startswith(_CLIP)


_CLIP = (
    *("text_model.", "vision_model.", "text_projection.", "visual_projection."),
    *("visual.", "token_embedding.", "transformer.", "ln_final."),
)
_IGNORED = "ignored "
# What trainers leave beside a model: averages, losses and their networks, optimizers, counters, what is computed anew.
_LEFTOVERS = re.compile(
    r"(^|\.)(model_ema|ema|loss|optimizers?|lr_scheduler|safety_checker)\.|(^|\.)(exp_avg(_sq)?|logit_(scale|bias))\b"
    r"|(^|\.)(position_ids|attn_mask|logvar|lvlb_weights|global_step|epoch|num_updates|num_batches_tracked)$"
    r"|^(input_resolution|context_length|vocab_size)$|^ddim_"
)


def ignored(names: Iterable[str]) -> list[str]:
    """Notes on tensors that no part of the model takes: what training left behind apart from what may be missed."""
    names = list(names)
    unknown = [name for name in names if not _LEFTOVERS.search(name)]
    left = [name for name in names if _LEFTOVERS.search(name)]
    return [
        f"{what}{len(some)} keys ({', '.join(some[:3])}{', …' if len(some) > 3 else ''})"
        for what, some in ((_IGNORED, unknown), ("left over from training: ", left)) if some
    ]  # fmt: skip


# --- folders ---------------------------------------------------------------------------------------------------------


def _read_folder(path: Path) -> Contents:
    if (path / "unet").is_dir():
        try:
            parts, found, notes = folders.read_diffusers(path, _folder_tensors)
        except (TypeError, AttributeError, LookupError) as error:
            raise ValueError(f"not laid out as diffusers does ({error})") from error
        _refuse_relatives(parts["unet"])
        text, image, more = _text(parts.pop("text_encoder", {}), parts.get("image_encoder", {}))
        parts |= {"text_encoder": text, "image_encoder": image}
        notes += more
        return Contents(kind="diffusers", parts=parts, own_config=found.config, notes=notes, warnings=found.warnings)
    if kind := folders.read_json(path / "model_index.json").get("_class_name"):
        raise ValueError(f"a {kind} of diffusers without unet/: another kind of model, or not fully downloaded")
    tensors, notes = _folder_tensors(path)
    stated = folders.read_json(path / "config.json")
    if stated.get("_class_name") == "UNet2DConditionModel":
        _refuse_relatives(tensors)
        part, found = folders.unet_part(tensors, stated, "config.json")
        return Contents(
            kind="diffusers", parts={"unet": part}, own_config=found.config, notes=notes, warnings=found.warnings
        )
    contents = _layout(tensors, ema=False)
    if contents is None:
        raise ValueError(foreign(tensors) or _no_layout(list(tensors)))
    if contents.kind == "clip":
        found = clip_config(stated)
        contents.own_config = found.config or None
        contents.warnings += found.warnings
    contents.notes = notes + contents.notes
    return contents


def _folder_tensors(folder: Path) -> tuple[dict[str, LazyTensor], list[str]]:
    """All tensors of a folder's weight files, whole or in shards."""
    tensors: dict[str, LazyTensor] = {}
    files, notes = folders.choose_weights(folder)
    for file in files:
        value, _, more = read_tensors(file)
        if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
            value = value["state_dict"]
        tensors |= named_tensors(value)
        notes += [note for note in more if note not in notes]
    if not tensors:
        raise ValueError(f"{files[0]}: holds no tensors, so it is not a model")
    return tensors, notes
