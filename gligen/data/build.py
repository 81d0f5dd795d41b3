"""Any source as a set of tar shards: what `python -m gligen.data build` does.

A shard is the unit of all work: it is written under another name, renamed when whole, and then noted in `.building`.
Which examples are in it depends on the source and --shard-size alone, so that one process or many, killed at any time
and started again, end in the same bytes. Whoever sees that all shards are there joins their notes into the index.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import re
import shutil
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from gligen import cli
from gligen.data.encodings import PHRASES, array_bytes, phrase_line
from gligen.data.example import BadExample, Fault, Findings, Pictured, Source, counted
from gligen.data.faults import too_many
from gligen.data.flags import MAX_BAD, SHARD_SIZE
from gligen.data.geometry import check_size
from gligen.data.order import path_hashes, picture_path
from gligen.data.records import Labelled, Words, pack
from gligen.data.shards import INDEX, MANIFEST, NAMES, Shard, Tally, index_row, manifest
from gligen.data.tars import BLOCK, ending, members
from gligen.files import finished_stays, write_atomically

log = logging.getLogger("gligen")

NOTES = ".building"  # folder in a set that is being made, for what is not yet whole
SAMPLE = 64  # examples whose size tells how many make a shard


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of a build: what, and into which shards. Two commands that build one set have the same."""

    source: str  # what the source says it is
    first: str  # keys of the first and last example
    last: str
    mode: str
    examples: int
    shard_size: float  # MB, about
    per_shard: int

    @property
    def shards(self) -> int:
        return -(-self.examples // self.per_shard)


def main(args: argparse.Namespace) -> None:
    """Runs `python -m gligen.data build`. Raises ValueError or OSError, one line."""
    from gligen.data.open import open_given

    source, findings = open_given(args)
    print("\n".join(findings.lines()))
    part = read_part(args.shard)
    if args.size:
        check_size(tuple(args.size))
    is_whole = build(
        source,
        findings,
        args.out,
        mode=args.mode,
        part=part,
        shard_size=args.shard_size,
        count=args.count,
        max_bad=args.max_bad,
    )
    if args.latents or args.features:
        from gligen.data.encode import main as encode

        if not is_whole and args.shard is not None:
            log.info("encodings need all parts: give this command again when the others are done")
            return
        while not (args.out / MANIFEST).exists():  # torchrun's other processes are at it, and it ends all if one fails
            time.sleep(1)
        is_whole = encode(args, part)
    if is_whole:
        print(args.out)


def read_part(text: str | None) -> tuple[int, int]:
    """Reads 'I/N' as (I, N); None is this process's part under torchrun, and the whole alone. Raises ValueError."""
    if text is None:
        return cli.world()
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not int(found[1]) < int(found[2]):
        raise ValueError(f"--shard is '{text}': of N parts, give 0/N to N-1/N, such as 0/4, 1/4, 2/4 and 3/4")
    return int(found[1]), int(found[2])


def build(
    source: Source,
    findings: Findings,
    out: Path,
    *,
    mode: str = "box-text",
    part: tuple[int, int] = (0, 1),
    shard_size: float = SHARD_SIZE,
    count: int | None = None,
    max_bad: float = MAX_BAD,
) -> bool:
    """Writes the shards of one part that are not there yet, and the index when all parts' are there.

    part: (i, n). shard_size: MB, about. count: the first examples only. max_bad: share of them that may be lost.
    Returns whether the set is whole. Raises ValueError, one line, for a folder that holds something else and for too
    many bad examples, and OSError for a full disk; what was finished stays, and the same command goes on from there.
    """
    plan = _plan(source, findings, out, mode, shard_size, count)
    if (out / MANIFEST).exists():
        shutil.rmtree(out / NOTES, ignore_errors=True)  # of one killed at the very end
        log.info("'%s' is built: %s", out, counted(plan.shards, "shard"))
        return True
    sofar = Tally()
    for k in range(part[0], plan.shards, part[1]):
        note = _note(out, k)
        if note is None:
            with finished_stays(out, lambda: f"{_finished(out)} of {plan.shards} shards"):
                _write_shard(source, out, plan, k, max_bad, sofar)
            note = _note(out, k)
            assert note is not None
            log.info("%s: %d examples (%d of %d shards)", _name(k), note["records"], _finished(out), plan.shards)
        sofar.join(_tally(note))
    if _finished(out) < plan.shards:
        log.info("part %d/%d is done; %d of %d shards are there", *part, _finished(out), plan.shards)
        return False
    with finished_stays(out, lambda: f"{_finished(out)} of {plan.shards} shards"):
        _join(out, plan, max_bad)
    return True


def _plan(source: Source, findings: Findings, out: Path, mode: str, shard_size: float, count: int | None) -> Plan:
    size = source.size
    if size is None and count is None:
        raise ValueError("the source has no end: say how many examples with --count")
    if count is not None and count < 1:
        raise ValueError(f"--count is {count}: give 1 or more")
    if not 0 < shard_size < math.inf:
        raise ValueError(f"--shard-size is {shard_size}: give MB above 0")
    examples = min(count, size) if count is not None and size is not None else (count or size or 0)
    if not examples:
        raise ValueError("nothing to build: the source has no examples")
    wanted: dict[str, Any] = {
        "source": findings.format,
        "first": source.key(0),
        "last": source.key(examples - 1),
        "mode": mode,
        "examples": examples,
        "shard_size": shard_size,
    }
    known = _known_plan(out)
    if known is None:
        if out.exists() and (
            not out.is_dir() or any(path.name != NOTES and path.name[0] != "." for path in out.iterdir())
        ):
            raise ValueError(f"'{out}' holds something else: give --out an empty or new folder")
        plan = Plan(**wanted, per_shard=_per_shard(source, examples, shard_size))
        with finished_stays(out, lambda: f"{_finished(out)} of {plan.shards} shards"):
            (out / NOTES).mkdir(parents=True, exist_ok=True)
            write_atomically(out / NOTES / "plan.json", json.dumps(asdict(plan), ensure_ascii=False).encode())
        return plan
    differs = next((name for name in wanted if wanted[name] != getattr(known, name)), None)
    if differs:
        raise ValueError(
            f"'{out}' was begun with {differs} {getattr(known, differs)!r}, now it is {wanted[differs]!r}: go on as it "
            "was begun, or give another --out"
        )
    return known


def _known_plan(out: Path) -> Plan | None:
    for path in (out / MANIFEST, out / NOTES / "plan.json"):
        try:
            facts = json.loads(path.read_bytes())
            return Plan(**{field.name: facts[field.name] for field in fields(Plan)})
        except FileNotFoundError:
            continue
        except NotADirectoryError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"'{path}' was not written by this command ({error}): give another --out") from None
    return None


def _per_shard(source: Source, examples: int, shard_size: float) -> int:
    """How many examples make a shard of about that size: told by some from all over the set, the same for all parts."""
    sizes = []
    for n in sorted({examples * i // SAMPLE for i in range(SAMPLE)}):
        try:
            sizes.append(len(_record(source, n, "box-text")[0]))
        except BadExample:
            continue
    mean = sum(sizes) / len(sizes) if sizes else 2**20
    return max(1, min(round(shard_size * 1e6 / mean), 1_000_000))


def _record(source: Source, n: int, mode: str) -> tuple[bytes, Words, tuple[Fault, ...]]:
    """Example n's bytes in a tar, what it says, and what of it was left out. Raises BadExample."""
    example = source.example(n)
    picture = source.picture(n) if isinstance(source, Pictured) else None
    labelled = tuple(Labelled(entity.phrase, entity.box) for entity in example.entities)
    words = Words(caption=example.caption, entities=labelled, keypoints=example.keypoints)
    return pack(example, f"{n:09d}", mode, picture), words, example.faults


def _write_shard(source: Source, out: Path, plan: Plan, k: int, max_bad: float, sofar: Tally) -> None:
    """sofar: what this process knows of other shards."""
    for stale in (out / NOTES).glob(f".{_name(k)}*.tmp"):  # of a process that was killed
        stale.unlink(missing_ok=True)
    temporary = out / NOTES / f".{_name(k)}.{os.getpid()}.tmp"
    rows, names, tally, at = [], [], Tally(), 0
    path = picture_path(source)
    try:
        with open(temporary, "wb") as file:
            for n in range(k * plan.per_shard, min((k + 1) * plan.per_shard, plan.examples)):
                try:
                    content, words, faults = _record(source, n, plan.mode)
                except BadExample as error:
                    tally.lose(error.reason, str(error))
                    if too_many(sofar.lost + tally.lost, plan.examples, max_bad):
                        sofar.join(tally)
                        raise _too_many(plan, max_bad, sofar) from None
                    continue
                for fault in faults:
                    tally.leave_out(fault.reason, fault.message)
                files = members(content)
                _, _, blocks, head = index_row(k, files)
                rows.append((at // BLOCK, blocks, head))
                names.append(path_hashes(path(n)))
                tally.add(words, [file.extension for file in files])
                file.write(content)
                at += len(content)
            file.write(ending(at))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, out / _name(k))
    finally:
        temporary.unlink(missing_ok=True)
    note = vars(tally) | {"phrases": sorted(tally.phrases), "rows": rows, "names": names}
    write_atomically(_note_path(out, k), json.dumps(note, ensure_ascii=False).encode())


def _too_many(plan: Plan, max_bad: float, tally: Tally) -> ValueError:
    reasons = "; ".join(
        f"{count} × {reason}, the first: {tally.first[reason]}" for reason, count in tally.left_out.items()
    )
    return ValueError(
        f"{tally.lost} of {plan.examples} examples cannot be read, more than --max-bad {max_bad:.2%} allows ({reasons})"
    )


def _name(k: int) -> str:
    return f"{k:05d}.tar"


def _note_path(out: Path, k: int) -> Path:
    return out / NOTES / f"{k:05d}.json"


def _note(out: Path, k: int) -> dict[str, Any] | None:
    """What is known of a finished shard."""
    try:
        return json.loads(_note_path(out, k).read_bytes())
    except FileNotFoundError:
        return None


def _finished(out: Path) -> int:
    return sum(1 for _ in (out / NOTES).glob("[0-9]*.json"))


def _join(out: Path, plan: Plan, max_bad: float) -> None:
    """The index of all shards. Several processes may do it at once: they write the same."""
    parts, names, shards, whole = [], [], [], Tally()
    try:
        for k in range(plan.shards):
            note = json.loads(_note_path(out, k).read_bytes())
            rows = np.asarray(note.pop("rows"), "<u4").reshape(-1, 3)
            names.append(np.array(note.pop("names"), np.uint64).reshape(-1, 2))
            parts.append(np.concatenate([np.full((len(rows), 1), k, "<u4"), rows], 1))
            shards.append(Shard(name=_name(k), records=len(rows), size=(out / _name(k)).stat().st_size))
            whole.join(_tally(note))
        if too_many(whole.lost, plan.examples, max_bad):
            raise _too_many(plan, max_bad, whole)
        for name, content in (
            (INDEX, array_bytes(np.concatenate(parts), "<u4")),
            (NAMES, array_bytes(np.concatenate(names), "<u8")),
            (PHRASES, b"".join(sorted(map(phrase_line, whole.phrases)))),
            (MANIFEST, manifest(shards, whole, **asdict(plan))),
        ):
            write_atomically(out / name, content, by=out / NOTES)
    except FileNotFoundError:
        if not (out / MANIFEST).exists():  # else another process has joined them meanwhile, and removed the notes
            raise
    shutil.rmtree(out / NOTES, ignore_errors=True)
    for reason, count in whole.left_out.items():
        log.info("left out: %d × %s, the first: %s", count, reason, whole.first[reason])
    counts = len(shards), whole.records, whole.entities, len(whole.phrases)
    told = map(counted, counts, ("shard", "image", "box", "phrase"))
    log.info("'%s': %s", out, ", ".join(told))


def _tally(note: dict[str, Any]) -> Tally:
    tally = Tally(**{name: note[name] for name in ("records", "lost", "entities", "persons", "first")})
    tally.phrases.update(note["phrases"])
    tally.maps.update(note["maps"])
    tally.left_out.update(note["left_out"])
    return tally
