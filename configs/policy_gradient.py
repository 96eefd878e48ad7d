"""Knobs of online alignment: prompts, advantages, ratios, divergence, reference.

Formulas: algorithms reference §6; the functions are in `trainer/objectives/policy_gradient.py`.
"""

from typing import Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from configs.base import Config
from configs.preferences import PreferenceRule


class PromptConfig(Config):
    """Contexts that candidates are generated for, cut from training sequences."""

    per_step: PositiveInt = 64
    """Users of a global batch; one that has less than two training events gives no prompt."""
    position: Literal["last", "random"] = "random"
    """Where a user's sequence is cut: before its last event, or at a draw of (seed, epoch, user).
    The event behind the cut is what rule rewards compare candidates with."""


class AdvantageConfig(Config):
    """(reward - mean of the group) / (std + ε)."""

    scaling: Literal["group", "batch", "none"] = "group"
    """Std of the group, of the global batch, or no division (Dr. GRPO)."""
    epsilon: PositiveFloat = 1e-4

    @model_validator(mode="after")
    def _options_apply(self) -> "AdvantageConfig":
        default = type(self).model_fields["epsilon"].default
        if self.scaling == "none" and self.epsilon != default:
            raise ValueError(
                "epsilon is added to a std, and scaling=none divides by none; remove it"
            )
        return self


class KLConfig(Config):
    """Pull towards the reference policy, inside the loss: a mean over candidates, all alike.

    So it is the divergence where candidates are samples of the policy. Of beams and of draws
    without replacement it pulls at unlikely candidates as much as at likely ones; what is logged as
    `kl` weighs such draws as the policy does.
    """

    weight: NonNegativeFloat = 0.0
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """All but k2 are unbiased values. As gradients, k2's is that of KL(π‖π_ref); k3's, which varies
    least, that of KL(π_ref‖π); and k1's is noise."""


class ReferenceConfig(Config):
    """What divergence is measured from: the starting policy, held beside the trained one."""

    sync_every_steps: PositiveInt | None = None
    """Batches of prompts after which it moves towards the policy; null never."""
    mixing: float = Field(0.6, gt=0, le=1)
    """α of reference ← α · policy + (1 - α) · reference."""

    @model_validator(mode="after")
    def _options_apply(self) -> "ReferenceConfig":
        default = type(self).model_fields["mixing"].default
        if self.sync_every_steps is None and self.mixing != default:
            raise ValueError(
                f"mixing={self.mixing} is how far the reference moves, which it never does with "
                "sync_every_steps=null; set that or remove it"
            )
        return self


class LoggedConfig(Config):
    """Logged impressions as further candidates (GBPO): what the user took next.

    Their advantage is 1 where the rule says liked, -1 where disliked; π_old is sg π.
    """

    weight: PositiveFloat = 1.0
    """Against the generated group, whose mean counts 1."""
    alone: bool = False
    """Learn from nothing else: nothing is generated, rewarded, or compared with a reference."""
    rule: PreferenceRule


class RolloutActorsConfig(Config):
    """Groups come from Ray actors beside the worker group, which run free of training.

    Each holds the whole policy, with the newest snapshot that training left on the shared storage.
    A group knows which; the ratios of the loss make up for what has changed since. A run of it
    cannot be repeated number by number: which snapshot a group comes from is a matter of time.
    """

    count: PositiveInt = 1
    """Actors, of as many CPUs (or one GPU) as a worker takes."""
    ahead: PositiveInt = 2
    """Batches of prompts that are asked for before they are trained on."""
    snapshot_every: PositiveInt = 1
    """Batches of prompts between snapshots of the policy."""
    max_staleness: PositiveInt = 4
    """Batches of prompts since a group's snapshot, at most; what is older is dropped."""
    max_restarts: NonNegativeInt = 3
    """Times that an actor whose process died is started anew, its groups asked for again."""

    @model_validator(mode="after")
    def _some_groups_are_young(self) -> "RolloutActorsConfig":
        if self.snapshot_every > self.max_staleness:
            raise ValueError(
                f"snapshot_every={self.snapshot_every} is more than max_staleness="
                f"{self.max_staleness}, so that all groups between two snapshots would be dropped: "
                "lower it, or allow for older groups"
            )
        return self


Ratio = Literal["token", "sequence", "item"]
"""Ratios of each code, of their geometric mean (GSPO), or of the whole item."""
Reduction = Literal["grpo", "dr_grpo", "dapo"]
"""Mean over candidates of the mean over codes; over a constant length; or over all codes."""
