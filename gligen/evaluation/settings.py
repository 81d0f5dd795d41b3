"""What an evaluation asks a model for, and how it is generated. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from gligen.data.scenes import Pairs
from gligen.fields import MAX_SEED
from gligen.modes import Mode, Schedule, get_mode
from gligen.request import SamplerName, parse_request

ASKED, GENERATED = "what is asked for", "how it is generated"
NOISE_STRIDE = 2**20  # so that another seed also starts from other noise
THROUGHOUT: Schedule = (1.0, 0.0, 0.0)
Captions = Literal["full", "detection", "null"]
UNGROUNDED: Schedule = (0.0, 0.0, 1.0)


def option(default: Any, help: str, group: str) -> Any:
    """A field with its default, what --help says, and its group there."""
    return field(default=default, metadata={"help": help, "group": group})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One evaluation. `__post_init__` raises ValueError, one line, for what cannot work."""

    requests: int = option(500, "held-out scenes, each asked for once", ASKED)
    seed: int = option(0, "of the series of scenes, and of the noise", ASKED)
    pairs: Pairs = option(  # noqa: RUF009 (it is a field)
        "all", "colour-shape pairs in the scenes; 'held-out' has in each one that grounding was never taught", ASKED
    )
    captions: Captions = option(  # noqa: RUF009 (it is a field)
        "full", "sentences, class names and commas, or nothing: grounding alone", ASKED
    )
    places: float = option(0.0, "share of full captions that say coarsely where things are", ASKED)
    ungrounded: bool = option(False, "ask with captions alone (β = 0), scored against the same objects", ASKED)

    sampler: SamplerName = option("plms", "dpmpp and unipc need about 20 steps", GENERATED)  # noqa: RUF009 (as above)
    steps: int = option(50, "denoising steps, 1 to 1000", GENERATED)
    guidance: float = option(7.5, "classifier-free guidance scale; 1 turns it off", GENERATED)
    schedule: tuple[float, ...] | None = option(
        None,
        "scheduled sampling: fractions of the steps with grounding full, decaying, off; sum 1 (default: 1 0 0, full "
        "grounding throughout, whatever the mode)",
        GENERATED,
    )
    tau: float | None = option(None, "short for --schedule TAU 0 1-TAU", GENERATED)
    batch_size: int = option(32, "images generated at once", GENERATED)
    sheet: int = option(32, "images on the contact sheet; 0 for none", GENERATED)

    def __post_init__(self) -> None:
        for name, known in (("pairs", get_args(Pairs)), ("captions", get_args(Captions))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}: the known ones are {', '.join(known)}")
        self._require("requests", self.requests >= 1, "1 or more")
        self._require("batch_size", self.batch_size >= 1, "1 or more")
        self._require("sheet", self.sheet >= 0, "0 or more")
        self._require("seed", 0 <= self.seed < MAX_SEED, f"a whole number from 0 to {MAX_SEED - 1}")
        self._require("places", 0 <= self.places <= 1, "a share from 0 to 1")
        if self.ungrounded and (self.schedule is not None or self.tau is not None):
            given = "tau" if self.schedule is None else "schedule"
            raise ValueError(f"ungrounded and {given} are both given: leave one out, nothing grounded has no schedule")
        _ = self.gate_schedule  # and what a request checks by itself

    @property
    def gate_schedule(self) -> Schedule:
        """The schedule that images are generated with. Raises ValueError where a request could not have it."""
        if self.ungrounded:
            given: dict[str, Any] = {"schedule": UNGROUNDED}
        else:
            given = {"schedule": self.schedule, "tau": self.tau}
            if self.schedule is None and self.tau is None:
                given["schedule"] = THROUGHOUT
        sampling = {name: getattr(self, name) for name in ("steps", "sampler", "guidance")}
        request = parse_request({"prompt": "", **sampling, **given})
        assert request.schedule is not None
        return request.schedule

    def check_mode(self, name: str | None) -> Mode:
        """The row of the mode that these settings can measure. Raises ValueError if they cannot."""
        if name is None:
            raise ValueError(
                "the model has no grounding to measure: give what was trained with --adapter (and --ungrounded to "
                "see what its base does alone)"
            )
        mode = get_mode(name)
        if mode.kind == "keypoint":
            for field_name, default in (("pairs", "all"), ("places", 0.0)):
                self._require(
                    field_name, getattr(self, field_name) == default, f"{default}: keypoint asks for people, not shapes"
                )
            self._require("captions", self.captions != "detection", "full or null: people have no class names")
        return mode

    def _require(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise ValueError(f"{name} is {getattr(self, name)}: give {wanted}")
