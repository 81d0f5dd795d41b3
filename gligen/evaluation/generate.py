"""Images of many requests into a folder: each once, by any number of processes, stopped and gone on with at any time.

    OUT/run.json            what is generated and by which model: another run may not use the folder
    OUT/images/000012.png   image 12, which carries its request
    OUT/inputs/             maps, references and photographs that requests name

Process r of p generates the numbers n with n mod p = r whose files are not there, so that processes need not talk to
each other. A file appears whole or not at all.
"""

from __future__ import annotations

import datetime
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gligen.evaluation.asked import Asked
from gligen.evaluation.report import check_origin, make_writable
from gligen.files import write_atomically
from gligen.image_files import image_bytes
from gligen.pipeline import OnStep, Pipeline
from gligen.request import Request, to_dict

RUN, IMAGES, INPUTS = "run.json", "images", "inputs"
BATCHES_AT_ONCE = 8  # requests are read and checked that many batches ahead


def image_file(out: Path, number: int) -> Path:
    return out / IMAGES / f"{number:06d}.png"


def claim_folder(out: str | Path, origin: Mapping[str, Any]) -> Path:
    """Makes the folder of a run, or goes on with one of the same origin. Returns it.

    origin: plain data, what decides the images. Raises ValueError, one line, for a folder of another run, for images
    without one, or where nothing can be written.
    """
    out = make_writable(out)
    path = out / RUN
    had_images = (out / IMAGES).exists()  # asked first: another process makes it after run.json
    if path.exists():
        check_origin(path, origin)
    elif had_images:
        raise ValueError(f"'{out / IMAGES}' exists without {RUN}: choose another --out, nothing is overwritten")
    else:
        write_atomically(path, (json.dumps(origin, indent=2, ensure_ascii=False) + "\n").encode())
    (out / IMAGES).mkdir(exist_ok=True)
    return out


def missing(asked: Asked, out: Path, rank: int = 0, processes: int = 1) -> list[int]:
    """The numbers of this process's share whose images are not there yet."""
    there = {int(match[1]) for name in os.listdir(out / IMAGES) if (match := re.fullmatch(r"(\d{6,})\.png", name))}
    return [n for n in range(rank, asked.size, processes) if n not in there]


def generate(
    pipe: Pipeline,
    asked: Asked,
    out: Path,
    numbers: list[int],
    *,
    batch_size: int,
    extra: Mapping[str, Any] | None = None,
    on_image: Callable[[int], object] | None = None,
    on_step: OnStep | None = None,
) -> int:
    """Generates the images of these numbers and writes each as soon as it is done. Returns how many.

    extra: what else images say about themselves. on_image: called with each number. Examples that cannot be used have
    no image, and count in `asked.left_out`. Raises as Pipeline.generate.
    """
    own = set(numbers)
    for name in os.listdir(out / IMAGES):  # what a killed process left half written
        match = re.fullmatch(r"\.(\d{6,})\.png\.\d+\.tmp", name)
        if match and int(match[1]) in own:
            (out / IMAGES / name).unlink(missing_ok=True)
    done = 0
    for group in _groups(asked, numbers, BATCHES_AT_ONCE * batch_size):
        for sample in pipe.generate([request for _, request in group], batch_size=batch_size, on_step=on_step):
            number = group[sample.index[0]][0]
            path = image_file(out, number)
            record = {"request": to_dict(sample.request, path.parent), **(extra or {}), "number": number}
            write_atomically(path, image_bytes(sample.image, ".png", record))
            done += 1
            if on_image is not None:
                on_image(number)
    return done


def _groups(asked: Asked, numbers: list[int], size: int) -> Iterator[list[tuple[int, Request]]]:
    for i in range(0, len(numbers), size):
        requests = [(n, asked.request(n)) for n in numbers[i : i + size]]
        if group := [(n, request) for n, request in requests if request is not None]:
            yield group


def wait_for_all(processes: int, done: int) -> int:
    """Returns when every process has come here: the sum of what they have done.

    Where one fails, torchrun ends all.
    """
    if processes == 1:
        return done
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=datetime.timedelta(days=30))  # shares may be of very different length
    total = torch.tensor([done])
    dist.all_reduce(total)
    dist.destroy_process_group()
    return int(total)
