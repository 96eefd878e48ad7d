"""Rollouts inside the training workers: groups of candidates from the policy as it is.

Lookups of sharded tables are collective, so ranks generate together, each for its own prompts;
there are no weights to be synced. What is drawn for a prompt is a pure function of (seed, step,
user, cut): neither world size nor micro batching changes it.

Shape legend: N prompts, G candidates of a prompt, L code levels, D width.
"""

from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor

from configs.generation import (
    AncestralConfig,
    BeamConfig,
    GenerationConfig,
    GumbelTopKConfig,
)
from configs.objectives import MultiTaskConfig, NextCodeConfig
from models.base import CodeDecoder, TableModel
from models.generation.candidates import candidate_log_probs
from models.generation.noise import gumbels, request_streams
from models.generation.search import Generated, generate, item_of_each
from sharding.parallelize import ParallelModel
from sharding.retrieval import Catalogue
from trainer.codes import last_requests, with_codes
from trainer.generate import FirstItem
from trainer.objectives.scoring import Candidates
from trainer.policy import Worker
from trainer.prompts import Prompts, request_keys
from trainer.rewards.group import Group
from trainer.scoring import item_log_probs


@dataclass(frozen=True)
class Rollout:
    """The groups of N prompts, on the policy's device."""

    group: Group
    candidates: Candidates
    """Contexts as the model reads them, with the group's items."""
    log_probs: Tensor
    """[N, G, L] float32, log π of each code (L = 1 of items) under the policy that generated;
    anything where there is no candidate."""
    weights: Tensor | None
    """[N, G] float32 of mean 1: what each candidate counts in an expectation under the policy. None
    where all count alike: samples of it, or beams and a nucleus, which are no sample."""

    def to(self, device: torch.device | str) -> "Rollout":
        """Copy on `device`."""
        return Rollout(
            self.group.to(device),
            self.candidates.to(device),
            self.log_probs.to(device),
            None if self.weights is None else self.weights.to(device),
        )


class RolloutEngine:
    """Generates with a policy."""

    def __init__(self, worker: Worker, policy: ParallelModel, generation: GenerationConfig) -> None:
        self._worker = worker
        self._policy = policy
        self._generation = generation
        self._catalogue: Catalogue | None = None

    def refresh(self) -> None:
        """Take over the policy's weights as they are now. Collective.

        Call it before the first rollout after an update.
        """
        if not isinstance(self._policy.model, CodeDecoder):
            chunk = self._worker.recipe.evaluation.catalogue_chunk
            self._catalogue = Catalogue(self._policy, self._worker.num_items, chunk)

    def __call__(self, prompts: Prompts, step: int) -> Rollout:
        """A group for each prompt, which may lie on the CPU. Collective."""
        keys = request_keys(prompts.batch, self._worker.recipe.seed, step)
        keys = keys.to(self._policy.ctx.device)
        if isinstance(self._policy.model, CodeDecoder):
            return self._of_codes(self._policy.model, prompts, keys)
        return self._of_items(prompts, keys)

    def _of_codes(self, model: CodeDecoder, prompts: Prompts, keys: Tensor) -> Rollout:
        catalogue, device = self._worker.catalogue, self._policy.ctx.device
        read = last_requests(model, prompts.batch).to(device)
        batch, trie, config = with_codes(read, catalogue.codes), catalogue.trie, self._generation

        def use(model: TableModel, embeddings: dict[str, Tensor]) -> tuple[Generated, Tensor]:
            assert isinstance(model, CodeDecoder)
            context = model.encode(batch, embeddings, 0, "last")
            generated = generate(
                FirstItem(model, trie.num_levels),
                context,
                batch.num_sequences,
                trie,
                config,
                keys=None if isinstance(config, BeamConfig) else keys,
            )
            # Those of the loss, to the last bit: search adds them up on its way.
            return generated, candidate_log_probs(model, context, generated.codes, trie)

        generated, log_probs = self._policy.infer(batch, use)
        targets = prompts.target_ids.to(device)
        group = Group(
            items=item_of_each(generated, trie),
            codes=generated.codes,
            valid=generated.valid,
            log_probs=generated.log_probs,
            target_ids=targets,
            target_codes=catalogue.codes[targets].long(),
            contexts=prompts.batch.to(device),
        )
        odds = draw_odds(config, generated.sampling_log_probs, generated.scores)
        weights = expectation_weights(group.log_probs, odds)
        return Rollout(group, Candidates(batch, group.items, group.codes), log_probs, weights)

    def _of_items(self, prompts: Prompts, keys: Tensor) -> Rollout:
        objective, catalogue = self._worker.recipe.objective, self._catalogue
        assert not isinstance(objective, NextCodeConfig | MultiTaskConfig), "see a recipe's checks"
        assert catalogue is not None, "refresh comes first"
        device = self._policy.ctx.device
        batch = prompts.batch.to(device)
        queries = self._policy.query(batch)[batch.offsets[1:] - 1]
        temperature = objective.temperature
        items, odds = sample_items(catalogue, queries, keys, self._generation, temperature)
        log_probs = item_log_probs(self._policy, catalogue, queries, items, temperature)
        valid = items > 0
        group = Group(
            items=items,
            codes=None,
            valid=valid,
            log_probs=log_probs.squeeze(-1).masked_fill(~valid, -torch.inf),
            target_ids=prompts.target_ids.to(device),
            target_codes=None,
            contexts=batch,
        )
        weights = expectation_weights(group.log_probs, odds)
        return Rollout(group, Candidates(batch, items), log_probs, weights)


def draw_odds(config: GenerationConfig, shares: Tensor, scores: Tensor) -> Tensor | None:
    """log of how often each candidate is drawn, up to a constant of its group: [N, G] float32.

    None where candidates are samples of the policy, or, as beams and a nucleus, of nothing that is
    positive wherever the policy is. Of draws without replacement the last one's score is the
    threshold κ that the others pass with 1 - exp(-exp(φ - κ)) (arXiv 1903.06059 §4.1); it counts as
    drawn for ever, so that it weighs nothing.

    Args:
        config: the strategy.
        shares: [N, G] φ, log-probabilities under what was drawn from, up to a constant of the
            group.
        scores: [N, G] perturbed φ of draws without replacement, up to the same; -inf where there
            was nothing left to draw.
    """
    match config:
        case GumbelTopKConfig():
            passed = (shares - scores[:, -1:]).clamp(min=-80.0)  # whose exponential is not 0
            odds = (-(-passed.exp()).expm1()).log()
            odds[:, -1] = torch.inf
            return odds
        case AncestralConfig(top_p=1.0, temperature=temperature) if temperature != 1.0:
            return shares
        case _:
            return None


def expectation_weights(log_probs: Tensor, odds: Tensor | None) -> Tensor | None:
    """Importance weights π / q of each group, normalised to mean 1: [N, G] float32; 0 where there
    is no candidate.

    Args:
        log_probs: [N, G] log π; -inf where there is no candidate.
        odds: [N, G] log q, of `draw_odds`; None weighs nothing.
    """
    if odds is None:
        return None
    there = log_probs > -torch.inf
    shares = (log_probs - odds).masked_fill(~there, -torch.inf).softmax(1)
    return shares.masked_fill(~there, 0.0) * there.sum(1, keepdim=True)


def sample_items(
    catalogue: Catalogue,
    queries: Tensor,
    keys: Tensor,
    config: GenerationConfig,
    temperature: float,
) -> tuple[Tensor, Tensor | None]:
    """G items of each query: [N, G] int64, 0 where there are no more; and their `draw_odds`.

    Collective. The same three strategies that write semantic ids, exact over the sharded catalogue.

    Args:
        catalogue: all items.
        queries: [N, D].
        keys: [N] int64, what is drawn for a query is a pure function of its key.
        config: the strategy.
        temperature: of the policy's softmax; that of `config` multiplies it.
    """
    match config:
        case BeamConfig():
            nothing = keys.new_zeros(queries.shape[0] + 1)
            return catalogue.top_k(queries, config.beams, nothing[:0], nothing)[0], None
        case GumbelTopKConfig():
            streams = request_streams(keys)[:, 0]
            scale = temperature * config.temperature
            items, scores = catalogue.sample(queries, config.samples, streams, scale)
            # The noise is a function of stream and item: without it are the scores themselves.
            shares = scores - gumbels(streams[:, None], items)
            return items, draw_odds(config, shares, scores)
        case AncestralConfig():
            streams = request_streams(keys)[:, 0]
            scale = temperature * config.temperature
            items, shares = catalogue.draw(queries, config.samples, streams, scale)
            return items, draw_odds(config, shares, shares)
        case _:
            assert_never(config)
