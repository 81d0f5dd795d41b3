"""`hf:` paths: files of the Hugging Face Hub, fetched by huggingface_hub where it is installed.

`hf:OWNER/NAME/FILE` is one file of a repository, `hf:OWNER/NAME` the whole repository as a diffusers folder.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

PREFIX = "hf:"
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")  # of files of weights, as repositories are hardly called
# of a whole repository: what a pipeline is read from, and not the same weights in every format
FOLDER_FILES = ["*.json", "*.safetensors", "*.txt"]


def local(path: str | Path) -> str | Path:
    """The place on this machine of a path's file: `hf:` paths are fetched once and kept in the Hub's own cache.

    A LoRA's ':weight' stays at the end. Others come back as they are. Raises ValueError, one line, where
    huggingface_hub is not installed or cannot fetch it.
    """
    text = os.fspath(path)
    if not text.startswith(PREFIX) or os.path.exists(text):
        return path
    name, colon, weight = text.removeprefix(PREFIX).partition(":")
    owner, _, rest = name.strip("/").partition("/")
    repository, _, file = rest.partition("/")
    if not owner or not repository:
        raise ValueError(f"'{text}' names no file of the Hugging Face Hub: give {PREFIX}OWNER/NAME/FILE")
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError(
            f"'{text}' needs huggingface_hub, which is not installed: pip install huggingface_hub"
        ) from None
    try:
        if file:
            found = huggingface_hub.hf_hub_download(f"{owner}/{repository}", file)
        else:
            found = huggingface_hub.snapshot_download(f"{owner}/{repository}", allow_patterns=FOLDER_FILES)
    except (OSError, ValueError) as error:  # the Hub's own errors are of these kinds
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"'{text}' cannot be fetched from the Hugging Face Hub: {reason}") from error
    return str(found) + colon + weight


def elsewhere(path: str | os.PathLike[str]) -> str:
    """Advice, behind 'no such file', on a path that names something of another place: an address, or a repository of
    the Hub as diffusers calls them; '' for any other."""
    text = os.fspath(path)
    page = re.fullmatch(
        r"https?://(?:www\.)?huggingface\.co/([\w.-]+/[\w.-]+)(?:/(?:resolve|blob)/[^/]+/([^?]+))?.*", text
    )
    if page:
        return f": give {PREFIX}{page[1]}" + (f"/{page[2]}" if page[2] else "")
    if re.match(r"\w+://", text):
        return ": it is an address; download the file, and give its path"
    is_named = re.fullmatch(r"\w[\w.-]*/[\w.-]+", text) and Path(text).suffix not in SUFFIXES
    if is_named and not Path(text).parent.is_dir():
        return f": if it is a repository of the Hugging Face Hub, give {PREFIX}{text}"
    return ""
