"""Candidates and their log-probabilities under a policy, for both families of models.

Shape legend: N contexts, G candidates of a context, K losers of a pair, L code levels, V items.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from configs.objectives import FullSoftmaxConfig, MultiTaskConfig, NextCodeConfig
from models.base import CodeDecoder, TableModel
from models.batch import JaggedBatch, PreferenceBatch
from models.generation.candidates import candidate_log_probs
from models.generation.catalogue_trie import CatalogueTrie
from sharding.parallelize import ParallelModel
from sharding.retrieval import Catalogue
from trainer.codes import last_requests, with_codes
from trainer.objectives.next_code import NextCodeInputs
from trainer.objectives.scoring import Candidates, CodeScorer, ItemScorer, Scorer
from trainer.policy import Worker, build_code_decoder, build_sequence_model


def build_scorer(worker: Worker, *, normalised: bool) -> Scorer:
    """The recipe's model, new, with what scores candidates by it.

    Without `normalised` a model that scores items leaves log Z out, unless its objective computes
    it anyway.
    """
    objective = worker.recipe.objective
    assert not isinstance(objective, MultiTaskConfig), "a recipe's checks tell ranking models apart"
    if isinstance(objective, NextCodeConfig):
        return CodeScorer(build_code_decoder(worker), objective, catalogue_trie(worker))
    normalised = normalised or isinstance(objective, FullSoftmaxConfig)
    model = build_sequence_model(worker)
    return ItemScorer(model, objective, worker.num_items, worker.ctx, normalised=normalised)


def catalogue_trie(worker: Worker) -> CatalogueTrie:
    """The trie of the run's semantic ids, on the worker's device; popular items first."""
    return worker.catalogue.trie


def candidates_of(
    worker: Worker, model: TableModel, batch: JaggedBatch, items: Tensor
) -> Candidates:
    """Candidates `items` [N, G] in the contexts of `batch`, both on the CPU."""
    if worker.semantic_ids is None or not isinstance(model, CodeDecoder):
        return Candidates(batch, items)
    table = worker.semantic_ids.codes
    return Candidates(with_codes(last_requests(model, batch), table), items, table[items].long())


def pair_candidates(worker: Worker, model: TableModel, pairs: PreferenceBatch) -> Candidates:
    """Winners and their losers [N, 1 + K]."""
    items = torch.cat([pairs.chosen_ids[:, None], pairs.rejected_ids], dim=1)
    return candidates_of(worker, model, pairs.batch, items)


def next_code_targets(worker: Worker, model: CodeDecoder, batch: JaggedBatch) -> NextCodeInputs:
    """The supervised loss's inputs: targets of every position, or of the last, as the model learns.

    `batch` is one of contexts as `candidates_of` leaves them.
    """
    assert worker.semantic_ids is not None
    targets = batch.target_ids
    if model.supervision == "last_position":
        targets = targets[batch.offsets[1:] - 1]
    table = worker.semantic_ids.codes
    if targets.device != table.device:
        table = worker.catalogue.codes
    codes = table[targets].long()
    return NextCodeInputs(batch, targets[:, None], codes[:, None], step_seed=0)


@dataclass(frozen=True)
class Likelihood:
    """log π of candidates under a policy as it was when this was made. Collective, no gradient."""

    policy: ParallelModel
    _catalogue: Catalogue | None
    _temperature: float
    _trie: CatalogueTrie | None

    @classmethod
    def of(cls, worker: Worker, policy: ParallelModel, *, normalised: bool = True) -> "Likelihood":
        """Fetches the catalogue's keys where the model scores items.

        Without `normalised` it does not, and leaves out log Z, which candidates of a context share.
        """
        objective = worker.recipe.objective
        assert not isinstance(objective, MultiTaskConfig), "see a recipe's checks"
        if isinstance(objective, NextCodeConfig):
            return cls(policy, None, 1.0, catalogue_trie(worker))
        catalogue = None
        if normalised:
            chunk = worker.recipe.evaluation.catalogue_chunk
            catalogue = Catalogue(policy, worker.num_items, chunk)
        return cls(policy, catalogue, objective.temperature, None)

    def __call__(self, candidates: Candidates) -> Tensor:
        """log π(candidate | context), [N, G] float32; anything where there is no candidate."""
        return self.parts(candidates).sum(-1)

    def parts(self, candidates: Candidates) -> Tensor:
        """log π of each code given those before it, [N, G, L] float32; of items L = 1."""
        candidates = candidates.to(self.policy.ctx.device)
        if self._trie is not None:
            return self._of_codes(candidates)
        batch, items = candidates.batch, candidates.items
        queries = self.policy.query(batch)[batch.offsets[1:] - 1]
        return item_log_probs(self.policy, self._catalogue, queries, items, self._temperature)

    def _of_codes(self, candidates: Candidates) -> Tensor:
        codes, trie = candidates.codes, self._trie
        assert codes is not None and trie is not None

        def use(model: TableModel, embeddings: dict[str, Tensor]) -> Tensor:
            assert isinstance(model, CodeDecoder)
            context = model.encode(candidates.batch, embeddings, 0, "last")
            return candidate_log_probs(model, context, codes, trie)

        log_probs: Tensor = self.policy.infer(candidates.batch, use)
        return log_probs


def item_log_probs(
    policy: ParallelModel,
    catalogue: Catalogue | None,
    queries: Tensor,
    items: Tensor,
    temperature: float,
) -> Tensor:
    """log π of items [N, G] under the softmax over the catalogue: [N, G, 1] float32. Collective.

    `queries` [N, D] and `catalogue` are of `policy` as it is now; without it log Z is left out.
    """
    keys = policy.item_keys(items.flatten()).unflatten(0, items.shape)  # there may be none
    scores = (queries[:, None] * keys).sum(-1) / temperature
    if catalogue is not None:
        scores = scores - catalogue.log_sum_exp(queries, temperature)[:, None]
    return scores[..., None]
