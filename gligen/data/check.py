"""`python -m gligen.data check`: reads every record of a set, and counts what is wrong with the first offenders."""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gligen.data.encodings import ArrayFile, part_files, shard_file
from gligen.data.example import BadExample, Source
from gligen.data.shards import MANIFEST, ShardSource, index_shard

log = logging.getLogger("gligen")

OFFENDERS = 3  # named for each reason


@dataclass
class Report:
    """A check's outcome. read: examples that were decoded whole. wrong, offenders: by reason, how many and the first of
    them."""

    read: int = 0
    wrong: dict[str, int] = field(default_factory=dict)
    offenders: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, what: str, count: int = 1) -> None:
        self.wrong[reason] = self.wrong.get(reason, 0) + count
        first = self.offenders.setdefault(reason, [])
        if len(first) < OFFENDERS:
            first.append(" ".join(what.split()))

    def lines(self) -> list[str]:
        found = [f"{self.read} examples read, {sum(self.wrong.values())} faults"]
        for reason, count in sorted(self.wrong.items(), key=lambda item: -item[1]):
            found.append(f"{count} × {reason}")
            found += [f"    {what}" for what in self.offenders[reason]]
        return found


def main(args: argparse.Namespace) -> int:
    """Prints what was found; returns the exit status, 1 where something is wrong. Raises as `open_source`."""
    from gligen.data.open import open_given

    source: Source
    if (Path(args.data) / MANIFEST).is_file():  # which open_source would refuse where a shard is cut off
        source = ShardSource(args.data, None, is_whole=False)
        findings = source.findings
    else:
        source, findings = open_given(args, max_bad=1.0)  # to be told, not refused
    if source.size is None:
        raise ValueError(f"{args.data} has no end: it cannot be checked whole")
    report = check(source)
    if args.json:
        facts = {"found": findings.lines(), "read": report.read, "wrong": report.wrong, "offenders": report.offenders}
        print(json.dumps(facts, ensure_ascii=False))
    else:
        print("\n".join([*findings.lines(), *report.lines()]))
    return 1 if report.wrong or findings.lost else 0


def check(source: Source) -> Report:
    """Reads every example of a finite source, its pictures decoded; of tar shards also their index and encodings."""
    assert source.size is not None
    report = Report()
    for n in tqdm(range(source.size), unit=" examples", disable=None, leave=False):
        try:
            example = source.example(n)
        except BadExample as error:
            report.add(error.reason, str(error))
            continue
        except OSError as error:
            report.add("file that cannot be read", f"example {n}: {error}")
            continue
        report.read += 1
        for fault in example.faults:
            report.add(fault.reason, fault.message)
        if isinstance(source, ShardSource) and source.is_built:
            said, shape = source.words(n).size, example.image.shape
            if said != (shape[1], shape[0]):
                report.add(
                    "picture of another size than its record says", f"{example.key}: {shape[1]} x {shape[0]}, {said}"
                )
    if isinstance(source, ShardSource):
        _check_index(source, report)
        _check_encodings(source, report)
    return report


def _check_index(source: ShardSource, report: Report) -> None:
    """Whether the index is what the tars themselves say."""
    for k, shard in enumerate(source.shards):
        path = source.storage.path(shard.name)
        try:
            size = source.storage.stamp(shard.name)[0]
            rows, tally = index_shard(source.storage, shard.name, k, size)
        except (OSError, ValueError) as error:
            report.add("tar that cannot be read", str(error))
            continue
        for reason, first in tally.first.items():
            report.add(reason, first, tally.left_out[reason])
        if rows != source.rows(k):
            report.add("tar that is not as its index says", f"{path}: {len(rows)} records instead of {shard.records}")
        elif size != shard.size:
            report.add("tar of another length", f"{path}: {size} bytes instead of {shard.size}")


def _check_encodings(source: ShardSource, report: Report) -> None:
    found = source.encodings
    if found is None:
        return
    for what in found.missing:
        report.add("unfinished encodings", what)
    shards = [shard.name for shard in source.shards]
    wanted = {shard_file(shard.name, "latents"): shard.records for shard in source.shards}
    wanted |= {shard_file(shard.name, "entities"): shard.records + 1 for shard in source.shards}
    for part in found.facts:
        for name in part_files(part, shards):
            try:
                file = ArrayFile(source.storage, name)
                rows = file.header[1][0]
                if rows != wanted.get(name, rows):
                    report.add("encodings of another number", f"{name}: {rows} rows instead of {wanted[name]}")
                if not all(np.isfinite(file.rows(at, min(at + 256, rows))).all() for at in range(0, rows, 256)):
                    report.add("encodings with numbers that are none", name)
            except (OSError, ValueError) as error:
                report.add("damaged encodings", str(error))
