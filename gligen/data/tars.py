"""Tar files written and read by position: uncompressed, the same bytes for the same content, one record after another.

A record is a run of files whose names are alike up to the first dot, as in WebDataset: 000012.json, 000012.jpg,
000012.mask.png. Python's tarfile would read and write them too, but ends without a word where a file is damaged, and
does not say where a record lies.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

BLOCK = 512  # a tar is made of such
END = 20 * BLOCK  # zeros to the next multiple of this: an end of two empty blocks, and what tar programs write at once


class TarError(ValueError):
    """A tar that is not one, or is damaged or cut off."""


@dataclass(frozen=True, slots=True)
class Member:
    """One file in a tar. start: of its header (and what belongs to it); offset, size: of its content. Bytes."""

    name: str
    start: int
    offset: int
    size: int

    @property
    def end(self) -> int:
        return self.offset + padded(self.size)

    @property
    def key(self) -> str:
        """The part of the name that the files of one record share: the name up to the first dot of its last part."""
        folder, slash, name = self.name.rpartition("/")
        return folder + slash + name.partition(".")[0]

    @property
    def extension(self) -> str:
        """The extension, which follows that dot, in small letters: 'jpg', 'mask.png'."""
        return self.name.rpartition("/")[2].partition(".")[2].lower()


def padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def entry(name: str, content: bytes) -> bytes:
    """A file as it stands in a tar: header, content, zeros to a whole block. No time, no user: bytes depend on
    nothing else."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(padded(len(content)) - len(content))


def ending(size: int) -> bytes:
    """The bytes that end a tar of so many bytes."""
    return bytes(-(-(size + 2 * BLOCK) // END) * END - size)


def walk(read: Callable[[int, int], bytes], size: int) -> Iterator[Member]:
    """The files of a tar of `size` bytes, in order; folders and links are passed over.

    read: (offset, length) -> bytes. Only headers are read. Raises TarError, one line, where it is damaged; what came
    before was good.
    """
    at = start = 0
    long_name, pax = "", dict[str, str]()
    while at + BLOCK <= size:
        header = read(at, BLOCK)
        if not header.strip(b"\0"):
            return
        name, length, kind = _header(header, at)
        length = int(pax.get("size", length))
        if at + BLOCK + length > size:
            raise TarError(f"it is cut off within '{long_name or pax.get('path') or name}', {size} bytes long")
        after = at + BLOCK + padded(length)
        if kind == tarfile.GNUTYPE_LONGNAME:
            long_name = read(at + BLOCK, length).rstrip(b"\0").decode(errors="replace")
        elif kind == tarfile.XHDTYPE:
            pax = _pax(read(at + BLOCK, length), at)
        elif kind not in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):  # a link's target, what holds for all files
            if kind in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE):
                yield Member(pax.get("path") or long_name or name, start, at + BLOCK, length)
            elif kind == tarfile.GNUTYPE_SPARSE:
                raise TarError(f"'{name}' is stored with holes: pack the files again without --sparse")
            start, long_name, pax = after, "", {}
        at = after
    if at != size:
        raise TarError(f"it is cut off, {size} bytes long")


def members(content: bytes) -> list[Member]:
    """The files of a record, offsets from its first byte. Raises TarError."""
    return list(walk(lambda offset, length: content[offset : offset + length], len(content)))


def _header(block: bytes, at: int) -> tuple[str, int, bytes]:
    """Name, size and kind. Raises TarError for a wrong checksum."""
    try:
        told = int(block[148:156].strip(b" \0") or b"-1", 8)
    except ValueError:
        told = -1
    if told != sum(block) - sum(block[148:156]) + 8 * ord(" "):
        if at == 0:
            raise TarError("not a tar file (compressed ones cannot be read by position: unpack them)")
        raise TarError(f"a header is damaged at byte {at}")
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0":
        prefix = block[345:500].split(b"\0", 1)[0]
        name = prefix + b"/" + name if prefix else name
    digits = block[124:136]
    try:  # more than 8 GiB are written in bytes, not in digits
        size = int.from_bytes(digits[1:], "big") if digits[0] == 0x80 else int(digits.strip(b" \0") or b"0", 8)
    except ValueError:
        raise TarError(f"a header is damaged at byte {at}") from None
    return name.decode(errors="replace"), size, block[156:157]


def _pax(text: bytes, at: int) -> dict[str, str]:
    """'LENGTH key=value' lines."""
    found = {}
    try:
        while text.strip(b"\0"):
            length = int(text.split(b" ", 1)[0])
            if length <= 0:
                raise ValueError
            key, _, value = text[:length].split(b" ", 1)[1].rstrip(b"\n").partition(b"=")
            found[key.decode()] = value.decode(errors="replace")
            text = text[length:]
        int(found.get("size", 0))
    except (ValueError, IndexError):
        raise TarError(f"a header is damaged at byte {at}") from None
    return found
