"""WordPiece tokens (Wu et al., 2016) of lower-cased text, as bert-base-uncased cuts it."""

from __future__ import annotations

import unicodedata
from pathlib import Path

MAX_WORD = 100  # longer words become one [UNK], as in BERT


class WordPiece:
    """Greedy longest-match pieces over a vocabulary file with one piece a line.

    Raises FileNotFoundError for a missing file, ValueError for one without BERT's special pieces.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            pieces = Path(path).read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise ValueError(f"{path}: not a WordPiece vocabulary, or cut off: it is no UTF-8 text") from None
        self.ids = {piece: i for i, piece in enumerate(pieces)}
        missing = [piece for piece in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if piece not in self.ids]
        if missing:
            raise ValueError(f"{path}: not a WordPiece vocabulary (no {missing[0]} in it)")

    def encode(self, text: str, length: int) -> tuple[list[int], str]:
        """[CLS] pieces [SEP], padded with [PAD] to `length`; and the words that were cut off."""
        ids: list[int] = []
        words = split_words(text)
        cut = ""
        for i, word in enumerate(words):
            pieces = self._pieces(word)
            if len(ids) + len(pieces) > length - 2 and not cut:
                cut = " ".join(words[i:])
            ids += pieces
        ids = [self.ids["[CLS]"], *ids[: length - 2], self.ids["[SEP]"]]
        return ids + [self.ids["[PAD]"]] * (length - len(ids)), cut

    def _pieces(self, word: str) -> list[int]:
        found: list[int] = []
        start = 0
        while start < len(word):
            for end in range(len(word), start, -1):
                piece = ("##" if start else "") + word[start:end]
                if piece in self.ids:
                    found.append(self.ids[piece])
                    start = end
                    break
            else:
                return [self.ids["[UNK]"]]
        return found if len(word) <= MAX_WORD else [self.ids["[UNK]"]]


def split_words(text: str) -> list[str]:
    """Lower-cased words without accents; punctuation marks and CJK characters stand alone."""
    out = []
    for char in unicodedata.normalize("NFD", text.lower()):
        category = unicodedata.category(char)
        if category == "Mn" or (category.startswith("C") and char not in "\t\n\r"):
            continue
        if _is_punctuation(char) or _is_cjk(char):
            out.append(f" {char} ")
        else:
            out.append(char)
    return "".join(out).split()


def _is_punctuation(char: str) -> bool:
    # BERT counts every ASCII character that is no letter, digit or space
    code = ord(char)
    is_ascii_mark = 33 <= code <= 47 or 58 <= code <= 64 or 91 <= code <= 96 or 123 <= code <= 126
    return is_ascii_mark or unicodedata.category(char).startswith("P")


def _is_cjk(char: str) -> bool:
    code = ord(char)
    return (
        0x4E00 <= code <= 0x9FFF or 0x3400 <= code <= 0x4DBF or 0xF900 <= code <= 0xFAFF or 0x20000 <= code <= 0x2FA1F
    )
