"""The weighted sum of a recipe's rewards, and each part of it.

Shape legend: N prompts, G candidates of a prompt, V items.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, assert_never

import torch
from torch import Tensor

from configs import rewards as kinds
from data_loaders.items import ItemFeature
from models.batch import JaggedBatch
from trainer.rewards import rules
from trainer.rewards.group import Group
from trainer.rewards.user_function import load_function


class RewardModel(Protocol):
    """A trained model that predicts what users do with items."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """What it predicts."""

    def score(self, contexts: JaggedBatch, candidates: Tensor) -> Mapping[str, Tensor]:
        """Output → prediction, float32 [N, G], of items [N, G] after N histories. Collective.

        Item 0 is no item: what is predicted for it is not read.
        """


@dataclass(frozen=True)
class Rewarded:
    """What a group was worth."""

    total: Tensor
    """[N, G] float32; 0 where not valid."""
    parts: dict[str, Tensor]
    """Reward → what it added to the total, [N, G] float32."""


Part = Callable[[Group], Tensor]


class RewardSum:
    """Rewards of a recipe, ready to be called. Not a module: nothing in it is trained."""

    def __init__(
        self,
        configs: Sequence[kinds.Reward],
        train_counts: Tensor,
        models: Mapping[str, RewardModel] | None = None,
        features: Mapping[str, ItemFeature] | None = None,
    ) -> None:
        """Prepare the rewards.

        Args:
            configs: of the recipe; a kind may stand there more than once.
            train_counts: [V] int64 occurrences of items 1 … V, on the rollouts' device.
            models: reward models by their run.
            features: those of items that quotas name.

        Raises:
            ValueError: a function of the user's cannot be called, or a quota's category is none.
        """
        self._counts = train_counts
        self._features = features or {}
        self._models = models or {}
        self._terms: list[tuple[str, float, Part]] = []
        self._quotas: list[tuple[str, kinds.QuotaReward, Tensor]] = []
        for name, config in zip(kinds.reward_names(configs), configs, strict=True):
            if isinstance(config, kinds.QuotaReward):
                self._quotas.append((name, config, self._classes(config)))
            else:
                self._terms.append((name, config.weight, self._part(config)))

    @torch.no_grad()
    def __call__(self, group: Group) -> Rewarded:
        """Rewards of a group. Collective if a reward model is among them."""
        parts = {name: weight * part(group) for name, weight, part in self._terms}
        total = torch.zeros_like(group.log_probs)
        for part in parts.values():
            total = total + part
        for name, quota, classes in self._quotas:
            over = rules.over_represented(group, classes, quota.largest_share)
            change = (quota.alpha - 1.0) * total.clamp(min=0.0) * over
            parts[name], total = change, total + change
        return Rewarded(total, parts)

    def _classes(self, config: kinds.QuotaReward) -> Tensor:
        """[V + 1] class of each item, by id; below 0 without a quota."""
        device = self._counts.device
        if config.feature is None:
            classes = rules.popularity_classes(self._counts, config.classes)
            limited = [int(number) for number in config.limited or (0,)]
            return rules.with_quota(classes, torch.tensor(limited, device=device))
        feature = self._features[config.feature]
        ids = feature.ids.to(device)
        if config.limited is None:
            return torch.where(ids > 0, ids, -1)
        names = [str(name) for name in config.limited]
        limited = feature.numbers(names, f"a quota limits {config.feature}")
        return rules.with_quota(ids, torch.tensor(limited, device=device))

    def _part(
        self,
        config: kinds.HitReward
        | kinds.PrefixReward
        | kinds.RankReward
        | kinds.LegalityReward
        | kinds.DiversityReward
        | kinds.NoveltyReward
        | kinds.ModelReward
        | kinds.FunctionReward,
    ) -> Part:
        match config:
            case kinds.HitReward():
                return lambda group: rules.hit(group, config.by)
            case kinds.PrefixReward():
                return rules.prefix
            case kinds.RankReward():
                return lambda group: rules.rank(group, config.by)
            case kinds.LegalityReward():
                return rules.legality
            case kinds.DiversityReward():
                return rules.diversity
            case kinds.NoveltyReward():
                return lambda group: rules.novelty(group, self._counts)
            case kinds.ModelReward():
                return _scored_by(self._models[config.run], config)
            case kinds.FunctionReward():
                return load_function(config.path)
            case _:
                assert_never(config)


def _scored_by(model: RewardModel, config: kinds.ModelReward) -> Part:
    """Σ weight · prediction over outputs; 0 for what is no item."""
    for task in config.tasks:
        if task not in model.outputs:
            raise ValueError(
                f"reward model {config.run} has the tasks {sorted(model.outputs)}, not {task!r}: "
                "name one of them in the `tasks` of the reward"
            )

    def score(group: Group) -> Tensor:
        scores = model.score(group.contexts, group.items)
        weighted = [weight * scores[task] for task, weight in config.tasks.items()]
        return torch.where(group.legal, torch.stack(weighted).sum(0), 0.0)

    return score
