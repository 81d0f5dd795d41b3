"""Checked values out of plain data, as JSON or YAML give it.

Each reader takes a value and the name it goes by in errors, and gives the checked value or raises ValueError with one
line: what was found, and what to give instead. Arrays, tensors and their numbers count as the lists and numbers that
their `tolist` gives, without any of those libraries being imported here.
"""

from __future__ import annotations

import difflib
import functools
import json
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger("gligen")

Reader = Callable[..., Any]  # (value, name) -> the checked value

OTHER_NAMES = {  # of other programs' requests, and what they are called here
    **dict.fromkeys(("cfg_scale", "cfg", "guidance_scale", "scale"), "guidance"),
    **dict.fromkeys(("num_inference_steps", "ddim_steps", "plms_steps"), "steps"),
    **dict.fromkeys(("sampler_name", "scheduler"), "sampler"),
    **dict.fromkeys(("width", "height", "resolution"), "size"),
    **dict.fromkeys(("boxes", "phrases", "gligen_boxes", "gligen_phrases", "locations", "objects"), "entities"),
    **dict.fromkeys(("n_iter", "n_samples", "num_images_per_prompt", "batch_size"), "num_images"),
    **dict.fromkeys(("gligen_scheduled_sampling_beta", "alpha_type"), "schedule"),
    **dict.fromkeys(("denoising_strength",), "strength"),
    **dict.fromkeys(("bbox", "location"), "box"),
    **dict.fromkeys(("text", "caption", "label"), "phrase"),
    **dict.fromkeys(("clipskip",), "clip_skip"),
    **dict.fromkeys(("generator",), "seed"),
}

MAX_SEED = 10**9  # of training and evaluation: each purpose's scenes are series that begin that far from the last one's


def given_fields(
    data: Any,
    name: str,
    fields: Collection[str],
    *,
    required: str,
    example: str,
    nullable: Collection[str] = (),
) -> dict[str, Any]:
    """The fields that an object gives, as they are; `name` is the object's own ('' for the outermost).

    fields: those it may have. required: the one that must be there, `example` what to give for it. nullable: those for
    which null means not given.
    """
    known = ", ".join(fields)
    if not isinstance(data, Mapping):
        raise ValueError(f"{name or 'the request'} is {show(data)}: give an object with fields among {known}")
    prefix = f"{name}." if name else ""
    for key in data:
        if key not in fields:
            other = OTHER_NAMES.get(str(key).lower())
            near = [other] if other in fields else difflib.get_close_matches(str(key), fields, n=1, cutoff=0.6)
            hint = f"did you mean '{prefix}{near[0]}'? " if near else ""
            raise ValueError(f"unknown field {show(prefix + str(key))}: {hint}The known ones are {known}")
    if required not in data:
        raise ValueError(f"{prefix}{required} is missing: give {example}")
    return {key: value for key, value in data.items() if value is not None or key not in nullable}


def plain(value: Any) -> Any:
    """An array, a tensor or a number of theirs (whatever has `tolist`) as Python's own; others as they are."""
    convert = getattr(value, "tolist", None)
    return convert() if callable(convert) else value


def read_fractions(value: Any, name: str, count: int, wanted: str) -> list[float]:
    """`count` fractions in [0, 1], of a list, array or tensor. Raises ValueError, which ends with `wanted`."""
    value = plain(value)
    value = [plain(part) for part in value] if is_list(value) else value
    if not is_list(value) or len(value) != count or not all(is_number(part) for part in value):
        raise ValueError(f"{name} is {show(value)}: {wanted}")
    if not all(math.isfinite(part) for part in value):
        raise ValueError(f"{name} is {show(value)}: every number must be finite")
    if any(part > 1.5 for part in value):
        raise ValueError(f"{name} is {show(value)}: in pixels? divide by width and height")
    if any(not 0 <= part <= 1 for part in value):
        raise ValueError(f"{name} is {show(value)}: outside [0, 1], {wanted}")
    return [float(part) for part in value]


def read_text(value: Any, name: str) -> str:
    """Text that can be encoded. Raises ValueError for anything else."""
    value = plain(value)  # numpy's text
    if not isinstance(value, str):
        raise ValueError(f"{name} is {show(value)}: give text, in quotes")
    try:
        value.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which neither tokenizer nor PNG can hold
        raise ValueError(f"{name} is {show(value)}: give valid Unicode text") from None
    return value


def read_image(value: Any, name: str, *, folder: Path | None = None) -> str | Image.Image:
    """An image: a PIL image as it is, or the absolute path of a file.

    folder: what a relative path starts from; None is the working folder. `~` is the home folder.
    """
    if is_image(value):
        return value
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError(f"{name} is {show(value)}: give the path of an image file, or a PIL image")
    if value.startswith(("http://", "https://", "data:")):
        raise ValueError(f"{name} is {show(value)}: give a file on this machine, or a PIL image")
    path = os.path.expanduser(read_text(value, name))
    return str((folder or Path()).joinpath(path).absolute())


def read_path(value: Any, name: str) -> str:
    """The path of a file or folder, str or os.PathLike; `~` is the home folder. Raises ValueError for anything else."""
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(path, str) or not path or "\0" in path:
        raise ValueError(f"{name} is {show(value)}: give the path of one file or folder")
    return os.path.expanduser(path)


def read_truth(value: Any, name: str) -> bool:
    """True or false. Raises ValueError for anything else, numbers included."""
    value = plain(value)
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {show(value)}: give true or false")
    return value


def read_whole(value: Any, name: str, *, low: int, high: int | None = None) -> int:
    """A whole number from low to high, both included. Raises ValueError for anything else."""
    value = plain(value)
    if not is_whole(value) or value < low or (high is not None and value > high):
        accepted = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} is {show(value)}: give a whole number {accepted}")
    return value


def read_number(value: Any, name: str, *, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number from low to high, both included. Raises ValueError for anything else."""
    value = plain(value)
    if not is_number(value) or not math.isfinite(value) or not low <= value <= high:
        accepted = f"from {low:g} to {high:g}" if math.isfinite(low) else "that is finite"
        if math.isfinite(low) and is_number(value) and not math.isfinite(value):
            accepted = f"that is finite, {accepted}"
        raise ValueError(f"{name} is {show(value)}: give a number {accepted}")
    return float(value)


def read_list(value: Any, name: str, items: str) -> Sequence[Any]:
    """A list or tuple, also of an array or tensor. Raises ValueError, which asks for a list of `items`."""
    value = plain(value)
    if not is_list(value):
        raise ValueError(f"{name} is {show(value)}: give a list of {items}")
    return value


def is_image(value: Any) -> bool:
    """Whether it is a PIL image. Where PIL was never imported, nothing is."""
    pil = sys.modules.get("PIL.Image")
    return pil is not None and isinstance(value, pil.Image)


def is_list(value: Any) -> bool:
    """Whether it is a list or tuple."""
    return isinstance(value, (list, tuple))


def is_whole(value: Any) -> bool:
    """Whether it is a whole number; a bool, which Python counts among them, is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is a float or a whole number that a float can hold."""
    # Python's whole numbers have no limit, but those beyond 2^63 are no float anyone means.
    return isinstance(value, float) or (is_whole(value) and abs(value) < 2**63)


def show(value: Any) -> str:
    """A value as error messages quote it: one line of at most 100 characters."""
    text = " ".join(repr(value).split()) if not isinstance(value, str) else repr(value)  # an array's has many lines
    return text if len(text) <= 100 else f"{text[:97]}..."


def decode_file(content: bytes, path: Path) -> Any:
    """The data of a JSON or YAML file, in UTF-8, UTF-16, UTF-32 or, failing those, Windows-1252 (Latin-1).

    Raises ValueError, one line with the place, for what is neither, and for an object that has a key twice.
    """
    text = _decode(content, path)
    if path.suffix.lower() == ".json":
        return _json(text, path.name)
    import yaml

    try:
        return yaml.load(text, _yaml_loader())
    except _DuplicateKeyError as error:
        raise ValueError(f"{path.name}{error}") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        if _is_json_lines(text):
            raise ValueError(_rename(path.name)) from None
        if error.context == "expected a single document in the stream":
            raise ValueError(f"{path.name}{line}: a second document: put them in one list") from None
        raise ValueError(f"{path.name}{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # control characters; an impossible date
        raise ValueError(f"{path.name}: not valid YAML: {' '.join(str(error).split())}") from None


def decode_lines(content: bytes, path: Path) -> list[tuple[int, Any]]:
    """The data of each line of a JSON Lines file (.jsonl), with its number, from 1; empty lines hold none.

    Encodings and errors as `decode_file`.
    """
    lines = enumerate(re.split(r"\r\n|\r|\n", _decode(content, path)), 1)  # other ends may stand in JSON's texts
    return [(n, _json(line, path.name, line=n)) for n, line in lines if line.strip()]


def _json(text: str, name: str, *, line: int | None = None) -> Any:
    """The data of a JSON text: a whole file, or one line of it. Raises ValueError as `decode_file`."""
    place = name if line is None else f"{name}, line {line}"
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and line is None and _is_json_lines(text):
            raise ValueError(_rename(name)) from None
        at = f"{name}, line {line or error.lineno}, column {error.colno}"
        raise ValueError(f"{at}: not valid JSON: {error.msg}") from None
    except _DuplicateKeyError as error:
        raise ValueError(f"{place}: {error}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; endless nesting
        raise ValueError(f"{place}: not valid JSON: {error}") from None


def _rename(name: str) -> str:
    return f"{name}: JSON on each line by itself: call it {Path(name).stem}.jsonl, or put all in one list"


def _is_json_lines(text: str) -> bool:
    try:
        return all(isinstance(json.loads(line), dict) for line in text.splitlines() if line.strip())
    except (ValueError, RecursionError):
        return False


class _DuplicateKeyError(ValueError):
    """A key that an object has twice: which of the two is meant, nobody can tell."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen = dict(pairs)
    if len(seen) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _DuplicateKeyError(f"{show(twice)} is given twice in one object: leave one out")
    return seen


@functools.cache
def _yaml_loader() -> Any:
    """YAML's safe loader, which refuses keys given twice, and reads numbers as YAML 1.2 and JSON do: 1e-1 is one,
    010 is ten, 1:30 is text."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
            if twice := next((key for key in keys if keys.count(key) > 1), None):
                raise _DuplicateKeyError(
                    f", line {node.start_mark.line + 1}: {show(twice)} is given twice in one object: leave one out"
                )
            return super().construct_mapping(node, deep=deep)

        def construct_decimal(self, node: Any) -> int:
            return int(node.value, 0 if node.value[:2] in ("0x", "0o") else 10)

    whole, real = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
    Loader.yaml_implicit_resolvers = {
        first: [pair for pair in pairs if pair[0] not in (whole, real)]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    digits = r"(?:\.\d+|\d+(?:\.\d*)?)(?:[eE][-+]?\d+)?"
    numbers = {
        whole: r"[-+]?\d+$|0o[0-7]+$|0x[0-9a-fA-F]+$",
        real: rf"[-+]?(?:{digits}|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$",
    }
    for tag, pattern in numbers.items():  # YAML 1.2, section 10.3.2; the first that fits counts
        Loader.add_implicit_resolver(tag, re.compile(pattern), list("-+.0123456789"))
    Loader.add_constructor(whole, Loader.construct_decimal)
    return Loader


def _decode(content: bytes, path: Path) -> str:
    try:
        # told by byte order marks, or by where the zeros of ASCII are
        return content.decode(json.detect_encoding(content))
    except UnicodeDecodeError:
        pass
    try:
        text = content.decode("cp1252")
    except UnicodeDecodeError:
        text = "\0"
    if any(ord(character) < 32 and character not in "\t\n\r" for character in text):
        raise ValueError(f"{path.name}: not a JSON or YAML file, nor an image that holds a request")
    log.info("%s: read as Windows-1252 (Latin-1), since it is no UTF-8", path.name)
    return text
