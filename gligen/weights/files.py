"""A model file of any known layout, recognised by what is in it and never by what it is called.

Every layout is reduced to the same *parts* (`unet`, `vae`, `text_encoder`, `image_encoder`, `base_first_conv`), dicts
of lazy tensors under our names, and to one `ModelConfig`. Nothing but headers is read here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from gligen.config import ModelConfig, from_dict, to_dict
from gligen.modes import get_mode
from gligen.weights import folders
from gligen.weights.infer import has_whole_unet, infer_config, is_grounding_name, possible_modes
from gligen.weights.names_clip import image_from_hf, split_open_clip, text_from_hf
from gligen.weights.names_ema import unet_name
from gligen.weights.original import apply_original_config
from gligen.weights.pickles import describe_foreign, plain, read_pickle
from gligen.weights.safetensors_file import looks_like_safetensors, read_safetensors
from gligen.weights.tensors import LazyTensor, reshape

Kind = Literal["sd", "ldm", "gligen", "pruned", "diffusers", "clip", "model", "adapter"]
Tensors = Mapping[str, LazyTensor]
PART_NAMES = ("unet", "vae", "text_encoder", "image_encoder", "base_first_conv")
SCHEDULE_BUFFERS = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A file's contents under our names, tensors still in the file.

    parts: part -> name -> tensor; a part that the file lacks is not there.
    config: as far as the file tells; parts it does not hold have Stable Diffusion v1's sizes.
    modes: what it can be grounded in: empty for a base model, several where the tensors cannot tell (canny and
        depth; a pruned map file). `config.unet.grounding.mode` is the first of them.
    notes: what else there was to see: inert classes, ignored keys.
    """

    path: str
    kind: Kind
    parts: Mapping[str, Tensors]
    config: ModelConfig
    modes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(kw_only=True)
class Contents:
    """What one layout's reader found, before configs are told apart."""

    kind: Kind
    parts: dict[str, Tensors]
    own_config: dict[str, Any] | None = None  # a ModelConfig, perhaps partial, as plain data
    original_config: Mapping[str, Any] | None = None
    notes: list[str] = field(default_factory=list)


def read_weights(path: str | Path, *, mode: str | None = None, ema: bool = False) -> Weights:
    """What a model file or folder holds; see `Weights`.

    mode: which of the possible modes it is, where the file does not say.
    ema: the averaged copy of the UNet instead of the trained one.
    Raises FileNotFoundError, or ValueError in one line for what is damaged, foreign, hostile or contradictory.
    """
    path = Path(path)
    if mode is not None:
        get_mode(mode)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    try:
        contents = _read_folder(path) if path.is_dir() else _read_file(path, ema)
        if ema and contents.kind not in ("sd", "ldm", "gligen"):
            raise ValueError("holds no averaged (EMA) weights")
        contents.parts = {name: contents.parts[name] for name in PART_NAMES if contents.parts.get(name)}
        return _resolve(path, contents, mode)
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from error


def _resolve(path: Path, contents: Contents, mode: str | None) -> Weights:
    """Settles mode and config: tensors first, then the file's own config, then a JSON file beside it."""
    unet = contents.parts.get("unet", {})
    possible = modes = possible_modes(unet)
    is_grounded = any(is_grounding_name(name) for name in unet)
    if is_grounded and not possible and contents.own_config is None:
        raise ValueError("holds grounding tensors that are of no known mode")
    own = contents.own_config
    if own is None and contents.original_config is None:
        own = _config_beside(path)

    config = infer_config(contents.parts, modes[0] if modes else None)
    try:
        if contents.original_config is not None:
            stated, config = apply_original_config(contents.original_config, config, possible)
            modes = (stated,) if stated and possible else modes
        if own is not None:
            config = from_dict(ModelConfig, _overlaid(to_dict(config), own))
    except (TypeError, ArithmeticError, AttributeError) as error:  # words where numbers belong and the like
        raise ValueError(f"its config cannot be used ({error})") from error
    if own is not None:
        stated = config.unet.grounding.mode if config.unet.grounding and _names_mode(own) else None
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
    )


def _names_mode(own: Mapping[str, Any]) -> bool:
    grounding = (own.get("unet") or {}).get("grounding") or {}
    return "mode" in grounding


def _overlaid(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        if isinstance(value, Mapping) and isinstance(merged.get(name), dict):
            value = _overlaid(merged[name], value)
        merged[name] = value
    return merged


def _config_beside(path: Path) -> dict[str, Any] | None:
    """`FILE.json` beside FILE.anything: a ModelConfig, or the fields of it that shapes cannot tell."""
    beside = path.with_suffix(".json")
    if path.is_dir() or not beside.is_file() or beside == path:
        return None
    try:
        data = json.loads(beside.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"the config beside it, {beside.name}, is no JSON ({error})") from error
    if not isinstance(data, dict) or not isinstance(data.get("unet", {}), dict):
        raise ValueError(f"the config beside it, {beside.name}, holds no ModelConfig")
    return data


# --- files -----------------------------------------------------------------------------------------------------------


def read_tensors(path: Path) -> tuple[Any, dict[str, str], list[str]]:
    """What a file holds as it stands: (mapping or other object, safetensors metadata, notes)."""
    with open(path, "rb") as file:
        start = file.read(4)
    if start == b"PK\x03\x04":
        value, inert = read_pickle(path)
        return value, {}, [f"classes in its pickle, not loaded: {', '.join(inert)}"] if inert else []
    if looks_like_safetensors(path):
        tensors, metadata = read_safetensors(path)
        return tensors, metadata, []
    raise ValueError(describe_foreign(path))


def _read_file(path: Path, ema: bool) -> Contents:
    value, metadata, notes = read_tensors(path)
    if metadata.get("format") == "gligen":
        contents = _own(path, value, metadata)
    elif isinstance(value, dict) and has_whole_unet(_tensors(value.get("model"))):
        contents = _gligen(path, value, ema)
    else:
        inner = value.get("state_dict", value) if isinstance(value, dict) else None
        contents = _flat(path, _tensors(inner), ema)
    contents.notes = notes + contents.notes
    return contents


def _tensors(value: Any) -> dict[str, LazyTensor]:
    """The tensors of a state dict. Some trainers' files hold gates as (1,), the published ones as ()."""
    if not isinstance(value, dict):
        return {}
    tensors = {name: t for name, t in value.items() if isinstance(name, str) and isinstance(t, LazyTensor)}
    gates = [n for n, t in tensors.items() if n.endswith((".alpha_attn", ".alpha_dense")) and t.shape == (1,)]
    return tensors | {name: reshape(tensors[name], ()) for name in gates}


def _under(tensors: Tensors, prefix: str) -> dict[str, LazyTensor]:
    return {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}


def _own(path: Path, tensors: Tensors, metadata: Mapping[str, str]) -> Contents:
    kind = metadata.get("kind")
    try:
        config = json.loads(metadata["config"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: its metadata holds no readable config") from error
    if kind not in ("model", "adapter") or not isinstance(config, dict):
        raise ValueError(f"{path}: its kind is {kind!r}: the known ones are model, adapter")
    parts: dict[str, Tensors] = {name: _under(tensors, f"{name}.") for name in PART_NAMES}
    return Contents(
        kind="model" if kind == "model" else "adapter",
        parts=parts,
        own_config=config,
        notes=_ignored(name for name in tensors if not name.startswith(tuple(f"{part}." for part in PART_NAMES))),
    )


def _gligen(path: Path, value: Mapping[str, Any], ema: bool) -> Contents:
    """The original trainer's checkpoint; `image_encoder` and `base_first_conv` are ours."""
    unet = _tensors(value.get("model"))
    if ema:
        if not (averaged := _tensors(value.get("ema"))):
            raise ValueError(f"{path}: holds no averaged (EMA) weights")
        unet = unet | averaged
    vae, notes = _vae(_tensors(value.get("autoencoder")))
    parts: dict[str, Tensors] = {
        "unet": unet,
        "vae": vae,
        "text_encoder": _text(_tensors(value.get("text_encoder"))),
        "image_encoder": _tensors(value.get("image_encoder")),
        "base_first_conv": _tensors(value.get("base_first_conv")),
    }
    stated = None
    if "config_dict" in value:
        stated = plain(value["config_dict"])
        if not isinstance(stated, dict):
            stated, notes = None, [*notes, "its config_dict cannot be read"]
    return Contents(kind="gligen", parts=parts, original_config=stated, notes=notes)


def _flat(path: Path, tensors: Tensors, ema: bool) -> Contents:
    """A single state dict: told apart by the names in it."""
    names = tuple(tensors)
    if any(name.startswith(("model.diffusion_model.", "model_ema.diffusion_model")) for name in names):
        return _stable_diffusion(path, tensors, ema)
    if "time_embed.0.weight" in tensors and "input_blocks.0.0.weight" in tensors:
        is_grounded = any(is_grounding_name(name) for name in names)
        return Contents(kind="gligen" if is_grounded else "sd", parts={"unet": tensors})
    if any(name.startswith("position_net.") or ".fuser." in name for name in names):
        if any(name.startswith("down_blocks.") for name in names):
            raise ValueError(f"{path}: one file of a diffusers folder: give the folder")
        grounding = {name: t for name, t in tensors.items() if is_grounding_name(name)}
        return Contents(
            kind="pruned", parts={"unet": grounding}, notes=_ignored(n for n in names if n not in grounding)
        )
    if any(name.startswith(("vision_model.", "text_model.", "visual.")) for name in names):
        return Contents(kind="clip", parts=clip_parts(tensors))
    if any(name.startswith(("down_blocks.", "decoder.up_blocks.")) for name in names):
        raise ValueError(f"{path}: one file of a diffusers folder: give the folder")
    if not names:
        raise ValueError(f"{path}: holds no tensors, so it is not a model")
    raise ValueError(f"{path}: of no known layout (its first names are {', '.join(names[:3])})")


def _stable_diffusion(path: Path, tensors: Tensors, ema: bool) -> Contents:
    unet = _under(tensors, "model.diffusion_model.")
    averaged = {
        name: t for key, t in tensors.items() if key.startswith("model_ema.") and (name := unet_name(key)) is not None
    }
    notes: list[str] = []
    if ema and not averaged:
        raise ValueError(f"{path}: holds no averaged (EMA) weights")
    if not unet:
        notes.append("holds averaged (EMA) weights only")
    if ema or not unet:
        unet = unet | averaged
    text = _under(tensors, "cond_stage_model.transformer.")
    vae, more = _vae(_under(tensors, "first_stage_model."))
    known = ("model.diffusion_model.", "model_ema.", "first_stage_model.", "cond_stage_model.transformer.",
             "image_encoder.", "base_first_conv.")  # fmt: skip
    ignored = _ignored(
        name for name in tensors if not name.startswith(known) and name not in (*SCHEDULE_BUFFERS, "logvar")
    )
    return Contents(
        kind="ldm" if "token_emb.weight" in text else "sd",
        parts={
            "unet": unet,
            "vae": vae,
            "text_encoder": _text(text),
            "image_encoder": _under(tensors, "image_encoder."),
            "base_first_conv": _under(tensors, "base_first_conv."),
        },
        notes=[*notes, *more, *ignored],
    )


def _vae(tensors: Tensors) -> tuple[dict[str, LazyTensor], list[str]]:
    known = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    part = {name: t for name, t in tensors.items() if name.startswith(known)}
    return part, _ignored(name for name in tensors if name not in part)  # e.g. the loss of its training


def _text(tensors: Tensors) -> dict[str, LazyTensor]:
    """Either text encoder, with or without the module names some savers put in front."""
    bare = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    if "token_emb.weight" in bare:
        return bare
    return text_from_hf({name.removeprefix("text_model."): t for name, t in bare.items()})


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


def _ignored(names: Iterable[str]) -> list[str]:
    names = list(names)
    return [f"ignored {len(names)} keys ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"] if names else []


# --- folders ---------------------------------------------------------------------------------------------------------


def _read_folder(path: Path) -> Contents:
    if (path / "unet").is_dir():
        try:
            parts, config, notes = folders.read_diffusers(path, _folder_tensors)
        except (TypeError, AttributeError, LookupError) as error:
            raise ValueError(f"{path}: not laid out as diffusers does ({error})") from error
        return Contents(kind="diffusers", parts=parts, own_config=config, notes=notes)
    tensors, notes = _folder_tensors(path)
    stated = folders.read_json(path / "config.json")
    if stated.get("_class_name") == "UNet2DConditionModel":
        part, config = folders.unet_part(tensors, stated)
        return Contents(kind="diffusers", parts={"unet": part}, own_config=config, notes=notes)
    contents = _flat(path, tensors, ema=False)
    if contents.kind == "clip":
        contents.own_config = folders.clip_heads(stated)
    contents.notes = notes + contents.notes
    return contents


def _folder_tensors(folder: Path) -> tuple[dict[str, LazyTensor], list[str]]:
    """All tensors of a folder's weight files, whole or in shards."""
    tensors: dict[str, LazyTensor] = {}
    notes: list[str] = []
    for file in folders.weight_files(folder):
        value, _, more = read_tensors(file)
        if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
            value = value["state_dict"]
        tensors |= _tensors(value)
        notes += [note for note in more if note not in notes]
    return tensors, notes
