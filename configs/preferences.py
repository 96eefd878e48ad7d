"""Rules that tell liked from disliked events, and deal them into preference pairs."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from configs.base import Config
from configs.data import LabelName


class PairRule(Config):
    """How pairs are dealt, whatever tells liked from disliked.

    The context of a pair is the user's training history before the earliest of its events.
    """

    window: PositiveInt = 20
    """Consecutive events of the user that a winner and a loser lie within. The losers of a list may
    be on both sides of their winner: it lies within 2 · window - 1."""
    pairs_per_user: PositiveInt = 8
    """Pairs, or lists where a winner is compared with several losers."""
    rejected_per_chosen: PositiveInt = 1
    """Losers of one winner that are compared with it at once (S-DPO, which has three unless told);
    what lacks is left open."""
    min_context: PositiveInt = 3


class RatingRule(PairRule):
    """Explicit grades: rated `liked_from` or higher, and `disliked_to` or lower."""

    kind: Literal["rating"] = "rating"
    liked_from: float = 4.0
    disliked_to: float = 2.0

    @model_validator(mode="after")
    def _thresholds_are_apart(self) -> "RatingRule":
        if self.disliked_to >= self.liked_from:
            raise ValueError(
                f"disliked_to={self.disliked_to} must be below liked_from={self.liked_from}"
            )
        return self


class LabelRule(PairRule):
    """What the user did: explicit (like against hate) or implicit (long view against skip).

    An event that is both is disliked.
    """

    kind: Literal["labels"] = "labels"
    liked: tuple[LabelName, ...] = Field(min_length=1)
    """An event with one of these labels is liked."""
    disliked: tuple[LabelName, ...] = ()
    """An event with one of these labels is disliked."""
    skip_is_disliked: bool = False
    """An event without any label but those of `disliked` was skipped, and is disliked too."""

    @model_validator(mode="after")
    def _sides_are_apart(self) -> "LabelRule":
        both = [name for name in self.liked if name in self.disliked]
        if both:
            raise ValueError(f"{both} cannot be both in liked and in disliked")
        if not self.disliked and not self.skip_is_disliked:
            raise ValueError(
                "nothing is disliked: name labels in disliked, or set skip_is_disliked=true"
            )
        return self


class WatchTimeRule(PairRule):
    """Watch time against the user's own events of alike duration (OneRec-V2, arXiv 2508.20900).

    Events of a user fall into buckets ⌊log_b(duration + ε)⌋. Liked are those of the top share of
    their bucket by dwell time, disliked those of the bottom share; ties at the edge count as
    within, and where that puts an event into both shares it is neither: a tie from the longest to
    the shortest, such as a bucket of which hardly anything was watched. Buckets of fewer events
    than make one of each share say nothing, nor do events without duration or dwell time.
    """

    kind: Literal["watch_time"] = "watch_time"
    liked_share: float = Field(0.25, gt=0, lt=1)
    disliked_share: float = Field(0.25, ge=0, lt=1)
    """0: short views are no dislike, only negative feedback is (the rule of GBPO). What is in the
    bottom `liked_share`, too, is still not liked."""
    negative: tuple[LabelName, ...] = ()
    """Negative feedback: an event with one of these labels is disliked, however long it was."""
    duration_base: float = Field(2.0, gt=1)
    """b."""
    duration_epsilon: PositiveFloat = 1.0
    """ε, seconds."""

    @model_validator(mode="after")
    def _shares_are_apart(self) -> "WatchTimeRule":
        if self.liked_share + self.disliked_share > 1:
            raise ValueError(
                f"liked_share={self.liked_share} and disliked_share={self.disliked_share} overlap: "
                "they must add up to 1 at most"
            )
        return self


PreferenceRule = Annotated[RatingRule | LabelRule | WatchTimeRule, Field(discriminator="kind")]
