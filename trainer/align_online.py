"""Online alignment: rollouts, rewards, advantages and updates, all on the training workers.

Shape legend: N prompts, G candidates of a prompt, L parts of a candidate's log π.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from configs.alignment import GBPOConfig, GeneratedAlignment, OnlineAlignment
from configs.preferences import PreferenceRule
from configs.rewards import ModelReward, QuotaReward, Reward
from data_loaders.items import item_feature, train_counts
from data_loaders.loader import LoaderState
from data_loaders.prompts import PromptLoader
from sharding.checkpoint import CheckpointStore
from sharding.parallelize import ParallelModel
from sharding.process_group import DistributedContext
from trainer.logged_steps import LoggedSteps
from trainer.objectives import policy_gradient as pg
from trainer.objectives.online import OnlineInputs, OnlineLoss
from trainer.objectives.scoring import Candidates
from trainer.policy import Worker
from trainer.prompts import Prompts, prompts_of_step
from trainer.reference_policy import ReferencePolicy
from trainer.reward_model import open_reward_model
from trainer.rewards import rules
from trainer.rewards.group import Group
from trainer.rewards.total import Rewarded, RewardSum
from trainer.rollout import Rollout, RolloutEngine
from trainer.supervised import SupervisedTargets
from trainer.trainer import TrainerState


def prompt_loader(
    worker: Worker, config: OnlineAlignment | GeneratedAlignment, state: TrainerState
) -> PromptLoader:
    """Training sequences to cut prompts from, at the state's position."""
    return PromptLoader(
        worker.dataset,
        worker.recipe.data.loader,
        _logged_rule(config),
        prompts_per_step=config.prompts.per_step,
        seed=worker.recipe.seed,
        rank=worker.ctx.rank,
        world_size=worker.ctx.world_size,
        held_out=0.0 if config.rule is None else config.validation_share,
        state=LoaderState(**state.loader) if state.loader else None,
    )


def reward_sum(worker: Worker, rewards: Sequence[Reward]) -> RewardSum:
    """The rewards of a recipe, with the reward models they ask. Collective.

    Raises:
        ValueError: one cannot be had.
    """
    counts = train_counts(worker.layout.data).to(worker.ctx.device)
    runs = [reward.run for reward in rewards if isinstance(reward, ModelReward)]
    models = {run: open_reward_model(worker, run) for run in dict.fromkeys(runs)}
    quotas = [reward.feature for reward in rewards if isinstance(reward, QuotaReward)]
    names = dict.fromkeys(name for name in quotas if name is not None)
    features = {name: item_feature(worker.layout.data, name) for name in names}
    return RewardSum(rewards, counts, models, features)


def _logged_rule(config: OnlineAlignment | GeneratedAlignment) -> PreferenceRule | None:
    if isinstance(config, GBPOConfig) and config.logged is not None:
        return config.logged.rule
    return None


class OnlineUpdates:
    """Turns a step's sequences into updates: one rollout, then `inner_epochs` updates with it.

    Its only state besides the policy's is the reference, which is saved beside every checkpoint
    that may be gone back to.
    """

    def __init__(
        self,
        worker: Worker,
        config: OnlineAlignment,
        loss: OnlineLoss,
        reference: ReferencePolicy | None,
    ) -> None:
        """Raises ValueError where a reward cannot be had. Collective."""
        self.rewards = reward_sum(worker, config.rewards)
        self._worker = worker
        self._config = config
        self._check_spread = SpreadCheck(worker.ctx, worker.tell)
        self._reference = reference
        self._supervised = SupervisedTargets(worker, loss.model, config.supervised_weight)
        self._policy: ParallelModel | None = None
        self._engine: RolloutEngine | None = None

    def attach(self, policy: ParallelModel, logged: LoggedSteps) -> None:
        """Generate with `policy`; its loss measures at every step, `logged` or not. Collective."""
        self._policy = policy
        self._engine = RolloutEngine(self._worker, policy, self._config.generation)

    def save(self, beside: CheckpointStore, name: str) -> None:
        """Save what belongs to the policy's next checkpoint in `beside`. Collective."""
        assert self._policy is not None, "attach comes first"
        if self._reference is not None:
            self._reference.save(beside, name, self._policy.step)

    def restore(self, beside: CheckpointStore, name: str | None) -> None:
        """Come back as saved with a checkpoint of `beside`, or begin (None). Collective."""
        if self._reference is not None:
            self._reference.restore(beside, name)

    def __call__(self, step: Any) -> Iterator[Sequence[OnlineInputs]]:
        """Inputs of each update, the same for all inner epochs. Collective."""
        assert self._policy is not None, "attach comes first"
        yield from self.trained(self.prepared(step))

    def trained(self, inputs: Sequence[OnlineInputs]) -> Iterator[Sequence[OnlineInputs]]:
        """The same inputs for each inner epoch; then the reference moves, if it is due."""
        assert self._policy is not None, "attach comes first"
        for _ in range(self._config.inner_epochs):
            yield inputs
        if self._reference is not None:
            batches = self._policy.step // self._config.inner_epochs
            self._reference.after(batches, self._policy)

    def prepared(self, step: Any) -> list[OnlineInputs]:
        """Rollout, rewards and advantages of a step's micro batches. Collective."""
        prompts = self.cut(step)
        rollouts = self.rolled_out(prompts, step.step)
        rewarded = self.rewarded(rollouts)
        return self.inputs(prompts, rollouts, rewarded, step.step)

    def cut(self, step: Any) -> list[Prompts]:
        """Prompts of a step's micro batches, on the CPU."""
        return prompts_of_step(self._worker, self._config.prompts, step)

    def rolled_out(self, prompts: Sequence[Prompts], step: int) -> list[Rollout]:
        """Groups from the policy as it is. Collective."""
        assert self._engine is not None, "attach comes first"
        self._engine.refresh()
        return [self._engine(each, step) for each in prompts]

    def rewarded(self, rollouts: Sequence[Rollout]) -> list[Rewarded]:
        """What the groups are worth. Collective."""
        rewarded = [self.rewards(rollout.group) for rollout in rollouts]
        valid = [rollout.group.valid for rollout in rollouts]
        totals = zip((each.total for each in rewarded), valid, strict=True)
        self._check_spread([pg.zero_std(*pair) for pair in totals])
        return rewarded

    def inputs(
        self,
        prompts: Sequence[Prompts],
        rollouts: Sequence[Rollout],
        rewarded: Sequence[Rewarded],
        step: int,
    ) -> list[OnlineInputs]:
        """Inputs of the loss. Collective."""
        advantages = self._advantages(rollouts, rewarded)
        candidates = [
            self._with_logged(each, rollout)
            for each, rollout in zip(prompts, rollouts, strict=True)
        ]
        supervised = self._supervised(candidates, step)
        return [
            OnlineInputs(
                candidates=candidates[at],
                mask=rollout.group.valid[..., None].expand(rollout.log_probs.shape),
                old=rollout.log_probs,
                reference=self._reference_log_probs(rollout),
                advantages=advantages[at],
                logged_advantages=_moved(prompts[at].outcomes, self._worker.ctx.device),
                measures=measures(rollout.group, rewarded[at]),
                supervised=supervised[at],
                weights=rollout.weights,
            )
            for at, rollout in enumerate(rollouts)
        ]

    def _advantages(
        self, rollouts: Sequence[Rollout], rewarded: Sequence[Rewarded]
    ) -> list[Tensor]:
        """[N, G] of each micro batch."""
        config, std = self._config.advantages, None
        valid = [rollout.group.valid for rollout in rollouts]
        pairs = list(zip((each.total for each in rewarded), valid, strict=True))
        if config.scaling == "batch":
            moments = torch.stack([pg.reward_moments(*pair) for pair in pairs]).sum(0)
            std = pg.std_of_moments(self._worker.ctx.all_reduce_sum(moments))
        return [pg.group_advantages(*pair, config.scaling, config.epsilon, std) for pair in pairs]

    def _with_logged(self, prompts: Prompts, rollout: Rollout) -> Candidates:
        """The group, and what the user took next where impressions are learnt from."""
        candidates, group = rollout.candidates, rollout.group
        if prompts.outcomes is None:
            return candidates
        items = torch.cat([candidates.items, group.target_ids[:, None]], dim=1)
        codes = None
        if candidates.codes is not None and group.target_codes is not None:
            codes = torch.cat([candidates.codes, group.target_codes[:, None]], dim=1)
        return replace(candidates, items=items, codes=codes)

    def _reference_log_probs(self, rollout: Rollout) -> Tensor | None:
        if self._reference is None:
            return None
        return self._reference.likelihood().parts(rollout.candidates)


def measures(group: Group, rewarded: Rewarded) -> dict[str, Tensor]:
    """What is logged of groups: each [N, G] float32, to be averaged over candidates.

    `reward`, its parts, `reward_std` within groups, `zero_std` (groups that teach nothing),
    `unique` (share of a group's candidates that are distinct items) and `legality`.
    """

    parts = {f"reward/{name}": part for name, part in rewarded.parts.items()}
    told = {"reward": rewarded.total, "legality": rules.legality(group)}
    of_groups = spread(group, rewarded.total)
    whole = {name: each[:, None].expand(group.items.shape) for name, each in of_groups.items()}
    return parts | told | whole


def spread(group: Group, rewards: Tensor) -> dict[str, Tensor]:
    """How much the candidates of a group differ: name → [N] float32.

    `reward_std`, `zero_std` (whether the rewards are all equal, so that the group teaches nothing)
    and `unique` (share of the candidates that are distinct items).
    """
    return {
        "reward_std": pg.group_std(rewards, group.valid),
        "zero_std": pg.zero_std(rewards, group.valid).float(),
        "unique": rules.diversity(group).sum(1) / group.valid.sum(1).clamp(min=1),
    }


class SpreadCheck:
    """Says, of the first groups alone, that no reward tells their candidates apart."""

    def __init__(self, ctx: DistributedContext, tell: Callable[[str], None]) -> None:
        self._ctx, self._tell, self._done = ctx, tell, False

    def __call__(self, even: Sequence[Tensor]) -> None:
        """Look at a step's groups: bool [N] of each micro batch, no spread. Collective."""
        if self._done:  # later steps shall not wait for the device
            return
        equal = torch.cat(list(even)).double()
        counts = torch.stack([equal.sum(), torch.ones_like(equal).sum()])
        without, groups = (int(count) for count in self._ctx.all_reduce_sum(counts).tolist())
        self._done = groups > 0
        if groups and without == groups:
            self._tell(
                f"all candidates of each of the first {groups:,} groups are worth the same: "
                "nothing is learnt from such groups (see train/zero_std); if it stays so, mend "
                "alignment.rewards, or have more candidates generated"
            )


def _moved(values: Tensor | None, device: torch.device) -> Tensor | None:
    return None if values is None else values.to(device)
