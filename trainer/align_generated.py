"""Preference optimisation on generated pairs: self-play (SPRec), iterative preference alignment.

In a round, candidates come from the policy as it was at the round's start, which is the reference
as well: self-play lets what the user took next win over them, iterative alignment lets the one of
highest reward win over the one of lowest. Formulas: algorithms reference §6.

Shape legend: N prompts, G candidates of a prompt, K losers, L code levels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from configs.alignment import GeneratedAlignment, IterativePreferenceConfig, SelfPlayConfig
from sharding.checkpoint import CheckpointStore
from sharding.parallelize import ParallelModel
from trainer.align_online import SpreadCheck, reward_sum, spread
from trainer.logged_steps import LoggedSteps
from trainer.objectives.dpo import PreferenceInputs, PreferenceLoss
from trainer.objectives.scoring import Candidates
from trainer.policy import Worker
from trainer.probe import PolicyProbe
from trainer.prompts import prompts_of_step
from trainer.reference_policy import ReferencePolicy
from trainer.rewards import rules
from trainer.rewards.group import Group
from trainer.rewards.total import RewardSum
from trainer.rollout import Rollout, RolloutEngine
from trainer.supervised import SupervisedTargets


class GeneratedPairs:
    """Turns a step's sequences into one update on pairs that the round's start generates.

    Its only state besides the policy's is that start, which is saved beside every checkpoint that
    may be gone back to.
    """

    def __init__(
        self,
        worker: Worker,
        config: GeneratedAlignment,
        loss: PreferenceLoss,
        start: ReferencePolicy,
    ) -> None:
        """`start` holds the round's start and follows the policy; `loss` is the trained one's."""
        self._worker = worker
        self._config = config
        self._start = start
        self._probe = PolicyProbe(worker)
        self._supervised = SupervisedTargets(worker, loss.model, config.supervised_weight)
        self._policy: ParallelModel | None = None
        self._engine = RolloutEngine(worker, start.policy, config.generation)
        self._check_spread = SpreadCheck(worker.ctx, worker.tell)
        self._rewards: RewardSum | None = None
        if isinstance(config, IterativePreferenceConfig):
            self._rewards = reward_sum(worker, config.rewards)

    def attach(self, policy: ParallelModel, logged: LoggedSteps) -> None:
        """Train `policy`, and measure it where a step is logged. Collective."""
        self._policy = policy
        self._probe.attach(policy, logged)

    def save(self, beside: CheckpointStore, name: str) -> None:
        """Save the round's start with the policy's next checkpoint in `beside`. Collective."""
        assert self._policy is not None, "attach comes first"
        self._start.save(beside, name, self._policy.step)

    def restore(self, beside: CheckpointStore, name: str | None) -> None:
        """Come back as saved with a checkpoint of `beside`, or begin (None). Collective."""
        self._start.restore(beside, name)
        self._engine.refresh()

    def __call__(self, step: Any) -> Iterator[Sequence[PreferenceInputs]]:
        """Inputs of the step's update. Collective."""
        assert self._policy is not None, "attach comes first"
        yield self._inputs(step)
        if self._start.after(self._policy.step, self._policy):
            self._engine.refresh()

    def _inputs(self, step: Any) -> list[PreferenceInputs]:
        prompts = prompts_of_step(self._worker, self._config.prompts, step)
        rollouts = [self._engine(each, step.step) for each in prompts]
        chosen = [self._pairs(rollout) for rollout in rollouts]
        if self._rewards is not None:
            self._check_spread([measures["tied"] > 0 for _, measures in chosen])
        supervised = self._supervised([candidates for candidates, _ in chosen], step.step)
        per_pair = self._per_pair([candidates for candidates, _ in chosen])
        reference = self._start.likelihood()
        inputs = [
            PreferenceInputs(
                candidates,
                reference(candidates),
                supervised[at],
                measures=measures,
                per_pair=per_pair,
            )
            for at, (candidates, measures) in enumerate(chosen)
        ]
        contexts = [each.batch for each in prompts]
        return self._probe(inputs, contexts, step.step, reference)

    def _per_pair(self, candidates: Sequence[Candidates]) -> Tensor:
        """Prompts of the global batch for each that has a pair; 0 if none has. Collective."""
        there = torch.cat([(each.items[:, 1:] > 0).any(1) for each in candidates])
        counts = torch.stack([there.sum(), torch.ones_like(there).sum()]).double()
        pairs, total = self._worker.ctx.all_reduce_sum(counts).unbind()
        return (total / pairs.clamp(min=1) * (pairs > 0)).float()

    def _pairs(self, rollout: Rollout) -> tuple[Candidates, dict[str, Tensor]]:
        """Winners and losers [N, 1 + K], and what is measured of the groups, [N] each."""
        match self._config:
            case SelfPlayConfig(losers=losers):
                return self_play_pairs(rollout.candidates, rollout.group, losers)
            case IterativePreferenceConfig():
                assert self._rewards is not None
                worth = self._rewards(rollout.group).total
                return extreme_pairs(rollout.candidates, rollout.group, worth)


def extreme_pairs(
    candidates: Candidates, group: Group, rewards: Tensor
) -> tuple[Candidates, dict[str, Tensor]]:
    """The candidate of highest reward against the one of lowest among those that are something
    else; nobody loses where all are equal.

    Args:
        candidates: [N, G].
        group: the same, as rewards see it.
        rewards: [N, G] float32.
    """
    best = rewards.masked_fill(~group.legal, -torch.inf)
    worst = rewards.masked_fill(~group.legal, torch.inf)
    high, winner = best.max(dim=1)
    # A reward may depend on more than the item, which may have been drawn twice.
    same = group.alike[torch.arange(len(winner), device=winner.device), winner]
    low, loser = worst.masked_fill(same, torch.inf).min(dim=1)
    places = torch.stack([winner, loser], dim=1)
    there = (high > low)[:, None]
    pairs = _taken(candidates, places, there.expand_as(places))
    told = high.isfinite()
    measures = _measures(group, rewards) | {
        "reward_best": high.where(told, 0.0),
        "reward_worst": worst.amin(dim=1).where(told, 0.0),
        "tied": 1.0 - there.squeeze(1).float(),
    }
    return pairs, measures


def self_play_pairs(
    candidates: Candidates, group: Group, losers: int
) -> tuple[Candidates, dict[str, Tensor]]:
    """What the user took next against the first `losers` candidates that are something else, each
    once however often it was drawn.

    An item that shares the target's semantic id is not: a policy that writes ids writes the same.

    Args:
        candidates: [N, G].
        group: the same, and the targets.
        losers: K.
    """
    worth = rules.hit(group, "id")
    other = group.legal & (worth == 0) & ~group.alike.tril(-1).any(2)
    # Those that are others move to the front, in order.
    order = (~other).to(torch.uint8).argsort(dim=1, stable=True)[:, :losers]
    wrong = _taken(candidates, order, other.gather(1, order))
    items = torch.cat([group.target_ids[:, None], wrong.items], dim=1)
    codes = None
    if wrong.codes is not None and group.target_codes is not None:
        codes = torch.cat([group.target_codes[:, None], wrong.codes], dim=1)
    return replace(candidates, items=items, codes=codes), _measures(group, worth)


def _taken(candidates: Candidates, places: Tensor, there: Tensor) -> Candidates:
    """Candidates [N, n] at `places`, no item where not `there`."""
    items = candidates.items.gather(1, places).where(there, 0)
    codes = candidates.codes
    if codes is not None:
        codes = codes.gather(1, places[..., None].expand(-1, -1, codes.shape[2]))
    return replace(candidates, items=items, codes=codes)


def _measures(group: Group, rewards: Tensor) -> dict[str, Tensor]:
    """What is measured of all groups: name → [N] float32."""
    means = {
        "reward": _mean_of(rewards, group.legal),
        "legality": _mean_of(rules.legality(group), group.valid),
    }
    return means | spread(group, rewards)


def _mean_of(values: Tensor, there: Tensor) -> Tensor:
    return (values * there).sum(1) / there.sum(1).clamp(min=1)
