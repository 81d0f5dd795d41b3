"""A folder of numbered images in which nothing is ever overwritten."""

from __future__ import annotations

import re
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gligen import cli
from gligen.image_files import FORMATS, check_record_fits, save_image, write_new_image
from gligen.job import Job
from gligen.pipeline import Sample
from gligen.request import Request, to_dict

_SUFFIXES = "|".join(map(re.escape, FORMATS))


class OutputFolder:
    """`NNNN-K.png`, or another suffix of FORMATS: request NNNN, image K.

    A folder that already holds some is continued after its highest number, and a number that another run takes
    meanwhile moves on to the next free one, so that nothing is overwritten or lost.
    Raises ValueError, one line, where the folder cannot be made or written.
    """

    def __init__(self, path: str | Path, suffix: str = ".png") -> None:
        self.path, self.suffix = Path(path).expanduser(), suffix
        _check_folder(self.path, f"output folder '{path}'")
        self.first = _agreed(self._next_free())
        self.moved: dict[int, int] = {}  # requests whose number was taken -> their new one

    def check(self, request: Request, extra: dict[str, Any]) -> None:
        """Raises ValueError, one line, if an image of the request could not carry what `write` stores."""
        check_record_fits({"request": to_dict(request, self.path), **extra}, self.suffix)

    def write(self, sample: Sample, extra: dict[str, Any]) -> Path:
        """Writes an image with the request that generates it again, and returns its path."""
        request = to_dict(sample.request, self.path)
        return self._write(*sample.index, lambda path: save_image(sample.image, path, request, extra))

    def write_extra(self, image: Image.Image, request: int, name: str) -> Path:
        """Writes `NNNN-name`, an image made for looking at, and returns its path."""
        return self._write(request, name, lambda path: write_new_image(image, path))

    def _write(self, request: int, name: str | int, save: Callable[[Path], None]) -> Path:
        while True:
            path = self.path / f"{self.moved.get(request, self.first + request):04d}-{name}{self.suffix}"
            try:
                save(path)
            except FileExistsError:  # another run's, begun since: opening the file and finding it there is one act
                self.moved[request] = max(self._next_free(), *(number + 1 for number in self.moved.values()), 0)
            else:
                return path

    def _next_free(self) -> int:
        taken = [
            int(m[1]) for file in self.path.iterdir() if (m := re.match(rf"(\d{{4,}})-.*({_SUFFIXES})$", file.name))
        ]
        return max(taken, default=-1) + 1


def _agreed(number: int) -> int:
    """Rank 0's number under torchrun, so that processes that share a folder count alike."""
    if cli.world()[1] == 1:
        return number
    import torch.distributed as dist

    dist.init_process_group("gloo")
    shared = torch.tensor([number])
    dist.broadcast(shared, 0)
    dist.destroy_process_group()
    return int(shared)


def one_size(jobs: Sequence[Job], flag: str) -> None:
    """Raises ValueError unless all images have one size, and none of them is another process's."""
    sizes = {job.size for job in jobs}
    if len(sizes) > 1:
        raise ValueError(f"{flag} holds images of one size, but the requests have {len(sizes)}: run them apart")
    if cli.world()[1] > 1:
        raise ValueError(f"{flag} needs a single process: run without torchrun")


def read_latents(path: str | Path, jobs: Sequence[Job]) -> Tensor:
    """Latents (images, C, h, w) float32 of an .npy file; (C, h, w) counts as one image.

    Raises FileNotFoundError or ValueError, one line, unless there is one for every image that is asked for.
    """
    one_size(jobs, "--init-latents")
    wanted = (sum(len(job.seeds) for job in jobs), *jobs[0].latent_shape)
    try:
        array = np.load(Path(path).expanduser(), allow_pickle=False)
    except FileNotFoundError:
        raise FileNotFoundError(f"--init-latents '{path}': there is no such file") from None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile):
        raise ValueError(f"--init-latents '{path}': not an .npy file of numbers") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or not np.isfinite(array).all():
        raise ValueError(f"--init-latents '{path}': give an .npy file of finite floating-point numbers")
    array = array[None] if array.ndim == 3 else array
    if array.shape != wanted:
        raise ValueError(f"--init-latents '{path}' has shape {array.shape}: these requests need {wanted}")
    return torch.from_numpy(array.astype(np.float32))


def check_new_file(path: str | Path, flag: str) -> None:
    """Raises ValueError if a file is there already or its folder cannot take one."""
    path = Path(path).expanduser()
    if path.exists():
        raise ValueError(f"{flag} '{path}' exists: choose another name, nothing is overwritten")
    _check_folder(path.parent, f"{flag} '{path}'")


def _check_folder(folder: Path, subject: str) -> None:
    """Makes a folder; raises ValueError, beginning with `subject`, where it cannot be made or written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{subject} cannot be written: {error.strerror}") from None


def write_latents(path: str | Path, samples: Sequence[Sample]) -> None:
    """Final latents (images, C, h, w) float32, in the order of the requests."""
    ordered = sorted(samples, key=lambda sample: sample.index)
    with open(Path(path).expanduser(), "xb") as file:
        np.save(file, torch.stack([sample.latents for sample in ordered]).float().numpy())
