"""Preference optimisation."""

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from configs.base import Config
from configs.generation import AncestralConfig, BeamConfig, GenerationConfig
from configs.guardrails import GuardrailsConfig
from configs.policy_gradient import (
    AdvantageConfig,
    KLConfig,
    LoggedConfig,
    PromptConfig,
    Ratio,
    Reduction,
    ReferenceConfig,
    RolloutActorsConfig,
)
from configs.preferences import PreferenceRule, RatingRule
from configs.rewards import DiversityReward, HitReward, LegalityReward, QuotaReward, Reward
from configs.training import CheckpointConfig, OptimizerConfig, ValidationConfig

LOSERS = 3
"""Of a winner under S-DPO, where the recipe does not say how many."""


class AlignmentBase(Config):
    """What every kind of alignment has."""

    rule: PreferenceRule | None = None
    """Pairs that measure preference accuracy, and that offline kinds train on."""
    validation_share: float = Field(0.1, gt=0, lt=1)
    """Share of users whose pairs measure preference accuracy; with a rule, alignment learns nothing
    from them, be it pairs, prompts or impressions."""
    supervised_weight: NonNegativeFloat = 1.0
    """Weight of the supervised loss on contexts and winners; keeps the model from forgetting."""
    epochs: PositiveInt = 2
    sparse_lr_ratio: PositiveFloat = 1.0
    """Learning rate of sharded tables relative to pretraining's."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-4)
    validation: ValidationConfig | None = ValidationConfig()
    guardrails: GuardrailsConfig = GuardrailsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log_every_steps: PositiveInt = 5


class OfflineBase(AlignmentBase):
    """Preference optimisation on pairs of the log."""

    rule: PreferenceRule = RatingRule()
    beta: PositiveFloat = 0.1
    """Strength of the pull towards the reference."""
    pairs_per_step: PositiveInt = 256
    """Pairs of a global batch."""


class DPOConfig(OfflineBase):
    """Direct preference optimisation (arXiv 2305.18290); several losers are averaged."""

    kind: Literal["dpo"] = "dpo"
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Probability that a preference is the wrong way round."""


class IPOConfig(OfflineBase):
    """Identity preference optimisation (arXiv 2310.12036): a margin of 1/(2β), and no more."""

    kind: Literal["ipo"] = "ipo"


class SoftmaxDPOConfig(OfflineBase):
    """S-DPO (arXiv 2406.09215): a winner against several losers at once, the Plackett-Luce way.

    `rule.rejected_per_chosen` says how many; three where a rule does not say it.
    """

    kind: Literal["s_dpo"] = "s_dpo"
    rule: PreferenceRule = RatingRule(rejected_per_chosen=LOSERS)

    @field_validator("rule", mode="before")
    @classmethod
    def _several_by_default(cls, rule: Any) -> Any:
        return {"rejected_per_chosen": LOSERS} | rule if isinstance(rule, dict) else rule

    @field_validator("rule")
    @classmethod
    def _there_are_several(cls, rule: PreferenceRule) -> PreferenceRule:
        if rule.rejected_per_chosen == 1:
            raise ValueError(
                "rejected_per_chosen=1 makes s_dpo what dpo is: raise it, or choose kind: dpo"
            )
        return rule


class OnlineBase(AlignmentBase):
    """Policy gradients on candidates that the policy itself generates, on the training workers."""

    prompts: PromptConfig = PromptConfig()
    generation: GenerationConfig = AncestralConfig()
    """How a prompt's group is generated. Beams are no sample of the policy: they work with rank
    rewards, and make the measured entropy and KL describe likely candidates only, as does top_p.
    Draws without replacement or at another temperature are weighted where these are measured."""
    rewards: tuple[Reward, ...] = Field((HitReward(),), min_length=1)
    advantages: AdvantageConfig = AdvantageConfig()
    ratio: Ratio = "token"
    reduction: Reduction = "grpo"
    kl: KLConfig = KLConfig()
    entropy_weight: NonNegativeFloat = 0.0
    """Of a bonus for the policy's entropy; needs independent samples of the policy itself."""
    reference: ReferenceConfig | None = ReferenceConfig()
    """null holds none: half the memory of weights, and no divergence is measured."""
    inner_epochs: PositiveInt = 1
    """Updates with one rollout; the probabilities that generated it stay those of the ratio."""
    rollout_actors: RolloutActorsConfig | None = None
    """null: the training workers generate themselves, with the policy as it is."""

    @model_validator(mode="after")
    def _divergence_has_a_reference(self) -> "OnlineBase":
        if self.reference is None and self.kl.weight > 0:
            raise ValueError(
                f"kl.weight={self.kl.weight} needs a reference policy: remove reference=null, or "
                "set kl.weight to 0"
            )
        return self

    @model_validator(mode="after")
    def _bonus_is_of_the_entropy(self) -> "OnlineBase":
        drawn = self.generation
        samples = isinstance(drawn, AncestralConfig) and drawn.temperature == drawn.top_p == 1
        if self.entropy_weight > 0 and not samples:
            raise ValueError(
                f"entropy_weight={self.entropy_weight} needs samples of the policy itself, over "
                "which alone the mean of -log π is its entropy: set generation to {kind: "
                "ancestral} with temperature and top_p of 1, or entropy_weight to 0"
            )
        return self

    @model_validator(mode="after")
    def _groups_teach(self) -> "OnlineBase":
        _check_spread(self.generation, self.rewards)
        return self


class GRPOConfig(OnlineBase):
    """GRPO (arXiv 2402.03300), with equal or unequal clips (DAPO)."""

    kind: Literal["grpo"] = "grpo"
    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: PositiveFloat = 0.28


class ECPOConfig(OnlineBase):
    """ECPO (arXiv 2506.13695): GRPO whose ratio is held below 1 + clip_high + delta."""

    kind: Literal["ecpo"] = "ecpo"
    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: PositiveFloat = 0.28
    delta: PositiveFloat = 0.1


class GBPOConfig(OnlineBase):
    """GBPO (arXiv 2508.20900): nothing clipped, gradients bounded as in a binary cross entropy."""

    kind: Literal["gbpo"] = "gbpo"
    logged: LoggedConfig | None = None
    """Learn from logged impressions, too, or from them alone."""

    @property
    def generates(self) -> bool:
        """Whether there are generated groups."""
        return self.logged is None or not self.logged.alone

    @model_validator(mode="after")
    def _groups_have_options(self) -> "GBPOConfig":
        if self.generates:
            return self
        if idle := self.chosen(*_OF_GROUPS):
            raise ValueError(
                f"logged.alone=true generates nothing, which {' and '.join(idle)} would be for: "
                "leave them out, or set logged.alone to false"
            )
        return self


_OF_GROUPS = (
    "generation",
    "rewards",
    "advantages",
    "reduction",
    "kl",
    "entropy_weight",
    "reference",
    "inner_epochs",
    "rollout_actors",
)
"""Options of generated groups and of their reference."""


class GeneratedPairsBase(AlignmentBase):
    """Preference optimisation by DPO on pairs that the policy of the round's start generates.

    It is the reference, too, and held beside the trained policy.
    """

    beta: PositiveFloat = 0.1
    """Strength of the pull towards the round's start."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Probability that a preference is the wrong way round."""
    prompts: PromptConfig = PromptConfig()
    round_steps: PositiveInt = 100
    """Batches of prompts of a round; then the policy becomes the start of the next."""
    preference_weight: PositiveFloat = 1.0
    """λ of the preference loss beside the supervised one."""


class SelfPlayConfig(GeneratedPairsBase):
    """SPRec (arXiv 2412.09243): what the user took next wins over what the policy would offer."""

    kind: Literal["sprec"] = "sprec"
    generation: GenerationConfig = AncestralConfig(samples=4)
    losers: PositiveInt = 1
    """Different generated items that a winner is compared with; of several DPO's softmax form is
    used. Where the draws bring fewer, those."""

    @model_validator(mode="after")
    def _losers_are_generated(self) -> "SelfPlayConfig":
        option, size = _size(self.generation)
        if self.losers >= size:
            raise ValueError(
                f"losers={self.losers} must be below generation.{option}={size}: one of the "
                "generated items may be what the user took"
            )
        if self.losers > 1 and self.label_smoothing > 0:
            raise ValueError(
                f"label_smoothing={self.label_smoothing} is an option of losers=1: the softmax "
                f"form that losers={self.losers} takes has none"
            )
        return self


class IterativePreferenceConfig(GeneratedPairsBase):
    """Iterative preference alignment (OneRec, arXiv 2502.18965): of the generated items the one of
    highest reward wins over the one of lowest."""

    kind: Literal["ipa"] = "ipa"
    generation: GenerationConfig = BeamConfig(beams=32)
    rewards: tuple[Reward, ...] = Field((HitReward(),), min_length=1)

    @model_validator(mode="after")
    def _groups_teach(self) -> "IterativePreferenceConfig":
        _check_spread(self.generation, self.rewards)
        return self


def _size(generation: GenerationConfig) -> tuple[str, int]:
    """Candidates of a prompt, and the option that says so."""
    if isinstance(generation, BeamConfig):
        return "beams", generation.beams
    return "samples", generation.samples


def _check_spread(generation: GenerationConfig, rewards: tuple[Reward, ...]) -> None:
    """Refuse what rates all candidates of a group alike, whatever the policy and the data are."""
    option, size = _size(generation)
    if size < 2:
        raise ValueError(
            f"generation.{option}={size} makes groups of one, which has nothing to be compared "
            "with and teaches nothing: generate at least 2"
        )
    terms = [each for each in rewards if not isinstance(each, QuotaReward) and each.weight != 0]
    if not terms:
        raise ValueError(
            "rewards have no term of a weight other than 0 (a quota only cuts what others give), "
            "so that all candidates are worth the same: add one, such as {kind: hit}"
        )
    # Search is constrained to the catalogue, and only independent samples repeat an item.
    even: tuple[type[Reward], ...] = (LegalityReward,)
    if not isinstance(generation, AncestralConfig):
        even = (LegalityReward, DiversityReward)
    if len(terms) == len(rewards) and all(isinstance(term, even) for term in terms):
        kinds = " and ".join(dict.fromkeys(term.kind for term in terms))
        raise ValueError(
            f"rewards of {kinds} alone are the same for all candidates that "
            f"generation.kind={generation.kind!r} makes, so that nothing is learnt: add another, "
            "such as {kind: hit}"
        )


GeneratedAlignment = SelfPlayConfig | IterativePreferenceConfig
OfflineAlignment = DPOConfig | IPOConfig | SoftmaxDPOConfig
OnlineAlignment = GRPOConfig | ECPOConfig | GBPOConfig
Alignment = Annotated[
    OfflineAlignment | OnlineAlignment | GeneratedAlignment, Field(discriminator="kind")
]


def rewards_of(alignment: Alignment | None) -> tuple[Reward, ...]:
    """What an alignment rates generated items by; none where it generates none or rates none."""
    if isinstance(alignment, GBPOConfig) and not alignment.generates:
        return ()
    if isinstance(alignment, OnlineBase | IterativePreferenceConfig):
        return alignment.rewards
    return ()
