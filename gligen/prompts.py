"""Web UIs' syntax of weights in prompts: (more), (much more:1.4), [less], with BREAK to begin another window.

As AUTOMATIC1111's web UI reads it: round brackets times 1.1, square ones divided by 1.1, or times a number after a
colon; brackets nest and multiply; a backslash makes a bracket a letter. Unless it is asked for, brackets are text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

Pieces = list[tuple[str, float]]  # text and its weight, in order
FACTOR = 1.1
MAX_WEIGHT = 100.0  # usual ones are within 2

_TOKEN = re.compile(r"\\[()\[\]\\]|[(\[\])]|:\s*[+-]?\d*\.?\d+\s*\)|\bBREAK\b|[^\\()\[\]:B]+|.", re.DOTALL)
_OF_OTHER_KINDS = (
    (re.compile(r"<(lora|lyco|hypernet):[^<>]*>", re.IGNORECASE), "give a LoRA with --lora FILE:weight"),
    (re.compile(r"\bembedding:\S+"), "textual inversions are not read"),
    (re.compile(r"\{[^{}]*\|[^{}]*\}|\b__[\w/-]+__\b"), "prompts that are drawn at random are not read"),
    (re.compile(r"(?<=[a-z,)] )AND(?= [a-z(])"), "several prompts at once are not read: write 'and'"),
    (re.compile(r"(?<!\\)\[[^\[\]()]*:\s*[\d.]+\s*\]"), "prompts that change between steps are not read"),
    (re.compile(r"(?<!\\)\[[^\[\]()]*\|[^\[\]()]*\]"), "prompts that alternate between steps are not read"),
)


@dataclass(frozen=True)
class Reading:
    """The way in which prompts become caption tokens.

    weights: brackets are weights. clip_skip: the layer of CLIP's text encoder that is read, 1 the last. long: what does
    not fit into one window of 77 tokens goes on in the next.
    """

    weights: bool = False
    clip_skip: int = 1
    long: bool = False


def parse_prompt(text: str, reading: Reading) -> list[Pieces]:
    """The text as pieces of one weight, in segments that each begin a window (where there is no BREAK: one).

    Raises ValueError, one line without the field's name, for brackets that do not close and for what such prompts
    may hold in web UIs but is not read here.
    """
    return _weighted(text, reading.long) if reading.weights else [[(text, 1.0)]]


def _weighted(text: str, long: bool) -> list[Pieces]:
    for pattern, advice in _OF_OTHER_KINDS:
        if found := pattern.search(text):
            raise ValueError(f"holds '{found[0]}': {advice}")
    segments: list[Pieces] = [[]]
    opened: list[tuple[str, int, int]] = []  # bracket, and the segment and piece that come after it

    def close(bracket: str, factor: float) -> None:
        if not opened or opened[-1][0] != bracket:
            shown = {"(": ")", "[": "]"}[bracket]
            raise ValueError(f"has a '{shown}' that closes nothing: write \\{shown} for the letter")
        _, segment, piece = opened.pop()
        for number in range(segment, len(segments)):
            begin = piece if number == segment else 0
            segments[number][begin:] = [(words, weight * factor) for words, weight in segments[number][begin:]]

    for token in _TOKEN.findall(text):
        if token in ("(", "["):
            opened.append((token, len(segments) - 1, len(segments[-1])))
        elif token in (")", "]"):
            close(*{")": ("(", FACTOR), "]": ("[", 1 / FACTOR)}[token])
        elif token == "BREAK":
            if not long:
                raise ValueError("holds BREAK, which begins another window of 77 tokens: allow them with long_prompts")
            segments.append([])
        elif token[0] == ":" and token[-1] == ")" and len(token) > 1:
            weight = float(token[1:-1])
            if abs(weight) > MAX_WEIGHT:
                raise ValueError(f"holds a weight of {weight:g}: give one between -{MAX_WEIGHT:g} and {MAX_WEIGHT:g}")
            close("(", weight)
        else:
            segments[-1].append((token[1:] if token[0] == "\\" and len(token) > 1 else token, 1.0))
    if opened:
        raise ValueError(f"has a '{opened[-1][0]}' that is not closed: write \\{opened[-1][0]} for the letter")
    return [_joined(pieces) for pieces in segments]


def _joined(pieces: Pieces) -> Pieces:
    """Neighbours of one weight as one, so that a word is not cut where a token of the syntax ended."""
    joined: Pieces = []
    for words, weight in pieces:
        if joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + words, weight)
        else:
            joined.append((words, weight))
    return joined or [("", 1.0)]
