"""log π of candidates with gradients, and the supervised loss beside it, from one encoding.

Two families of policies, one interface. A model that scores items has the softmax of query · key /
τ over the catalogue; a model that writes semantic ids has the constrained log-probabilities of
their codes (`models.generation.log_probs`), the same as in search and rollouts.

Shape legend: N contexts, T tokens of them, G candidates of a context, L parts of log π (levels of a
semantic id; 1 where items are scored), D width, V items of the catalogue.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.objectives import ItemObjective, NextCodeConfig
from models.base import CodeDecoder, SequenceModel, TableModel
from models.batch import JaggedBatch
from models.generation.candidates import candidate_log_probs
from models.generation.catalogue_trie import CatalogueTrie
from models.ops.jagged import segment_ids
from sharding.process_group import DistributedContext
from sharding.shared_catalogue import CatalogueShare, log_partition
from trainer.objectives.full_softmax import full_softmax
from trainer.objectives.next_code import NextCodeInputs, code_losses
from trainer.objectives.next_item import (
    NextItemInputs,
    check_catalogue,
    model_ids,
    model_rows,
    next_item_losses,
    scored_ids,
)

Ids = dict[str, dict[str, Tensor]]
"""Table → feature → ids, or their positions in the table's rows."""
Supervised = NextItemInputs | NextCodeInputs
"""The same contexts with targets, for the supervised loss."""

LOGITS = 1 << 26
"""Held at once where no kernel fuses them, or those of one context."""


@dataclass(frozen=True)
class Candidates:
    """What is scored in N contexts."""

    batch: JaggedBatch
    """The contexts, none empty; with `item_codes` and cut to what the model reads where it writes
    semantic ids."""
    items: Tensor
    """[N, G] int64; 0 = none here."""
    codes: Tensor | None = None
    """[N, G, L] int64, semantic ids of `items`, for models that write them."""

    def to(self, device: torch.device | str) -> "Candidates":
        """Copy on `device`."""
        codes = None if self.codes is None else self.codes.to(device, non_blocking=True)
        items = self.items.to(device, non_blocking=True)
        return replace(self, batch=self.batch.to(device), items=items, codes=codes)


@dataclass(frozen=True)
class Scored:
    """What a policy says of candidates."""

    log_probs: Tensor
    """[N, G, L] float32; sums over L are log π, up to a number per context if not normalised.
    Anything where there is no candidate."""
    supervised: Tensor | None
    """[N] float32, mean supervised loss over each context's positions."""


class Scorer(Protocol):
    """Scores candidates with one of the two families of models."""

    @property
    def model(self) -> TableModel:
        """The policy's model; dropout is as its mode says."""

    @property
    def normalised(self) -> bool:
        """Whether log π is complete, or lacks its context's normaliser."""

    def required_ids(self, candidates: Candidates, supervised: Supervised | None) -> Ids:
        """Ids whose rows the call wants."""

    def __call__(
        self,
        candidates: Candidates,
        supervised: Supervised | None,
        rows: dict[str, Tensor],
        index: Ids,
    ) -> Scored:
        """log π of the candidates, and the supervised loss where asked for."""


class ItemScorer:
    """Candidates of a model that scores items."""

    def __init__(
        self,
        model: SequenceModel,
        objective: ItemObjective,
        num_items: int,
        ctx: DistributedContext,
        *,
        normalised: bool,
    ) -> None:
        """Without `normalised`, log Z is left out: it cancels between candidates of a context.

        With it, calls and their backward are collective: the ranks of `ctx` share the catalogue.

        Raises:
            ValueError: the full softmax would score more items than allowed.
        """
        check_catalogue(objective, num_items)
        self.model = model
        self.normalised = normalised
        self._objective = objective
        self._num_items = num_items
        self._ctx = ctx
        self._share = CatalogueShare.of(ctx, num_items)

    def required_ids(self, candidates: Candidates, supervised: Supervised | None) -> Ids:
        ids = model_ids(self.model, candidates.batch)
        ids["item"]["candidates"] = candidates.items
        if self.normalised:
            ids["item"]["share"] = self._share.ids(candidates.items.device)
        if supervised is not None:
            assert isinstance(supervised, NextItemInputs)
            ids["item"] |= scored_ids(self._objective, supervised, self._num_items)
        return ids

    def __call__(
        self,
        candidates: Candidates,
        supervised: Supervised | None,
        rows: dict[str, Tensor],
        index: Ids,
    ) -> Scored:
        batch, temperature = candidates.batch, self._objective.temperature
        queries = self.model(batch, model_rows(self.model, rows, index), 0)
        keys = self.model.item_keys(rows["item"])
        last = queries.index_select(0, batch.offsets[1:] - 1)
        scored = F.embedding(index["item"]["candidates"], keys)
        log_probs = (last[:, None] * scored).sum(-1) / temperature
        if self.normalised:
            share = F.embedding(index["item"]["share"], keys)
            log_probs = log_probs - self._log_partition(last, share)[:, None]
        loss = None
        if supervised is not None:
            assert isinstance(supervised, NextItemInputs)
            losses = next_item_losses(self._objective, queries, keys, supervised, index["item"])
            loss = mean_per_sequence(losses, batch)
        return Scored(log_probs[..., None].float(), loss)

    def _log_partition(self, queries: Tensor, keys: Tensor) -> Tensor:
        """log Z of each query, [N], from the keys of this rank's share; in float32, as in rollouts,
        whatever the precision of the model is."""
        temperature = self._objective.temperature

        def of_share(queries: Tensor) -> Tensor:
            if self._share.size == 0:  # nothing to add, yet a part of the backward
                return (0.0 * queries).sum(1) - torch.inf
            first = torch.zeros(queries.shape[0], dtype=torch.int64, device=queries.device)
            chunk = max(1, LOGITS // self._share.size)
            losses = full_softmax(queries, keys, first, temperature, chunk)
            return losses + (queries * keys[0]).sum(-1) / temperature

        with torch.autocast(queries.device.type, enabled=False):
            return log_partition(self._ctx, queries, of_share)


class CodeScorer:
    """Candidates of a model that writes semantic ids."""

    normalised = True

    def __init__(self, model: CodeDecoder, objective: NextCodeConfig, trie: CatalogueTrie) -> None:
        """`trie` of the catalogue, on the model's device."""
        self.model = model
        self._objective = objective
        self._trie = trie

    def required_ids(self, candidates: Candidates, supervised: Supervised | None) -> Ids:
        return model_ids(self.model, candidates.batch)

    def __call__(
        self,
        candidates: Candidates,
        supervised: Supervised | None,
        rows: dict[str, Tensor],
        index: Ids,
    ) -> Scored:
        assert candidates.codes is not None, "candidates come with their semantic ids"
        batch, model = candidates.batch, self.model
        embeddings = model_rows(model, rows, index)
        everywhere = supervised is not None and model.supervision == "every_position"
        context = model.encode(batch, embeddings, 0, "every" if everywhere else "last")
        loss = None
        if supervised is not None:
            assert isinstance(supervised, NextCodeInputs)
            losses = self._supervised(context, supervised)
            loss = mean_per_sequence(losses, supervised.batch) if everywhere else losses
        if everywhere:
            context = model.requests_of(context, batch.offsets[1:] - 1)
        return Scored(candidate_log_probs(model, context, candidates.codes, self._trie), loss)

    def _supervised(self, context: object, inputs: NextCodeInputs) -> Tensor:
        """Next-code loss of each request, mean over levels; 0 where there is no target: [n]."""
        levels = self._trie.num_levels
        codes = inputs.target_codes[:, 0]
        missing = len(self.model.codebook_sizes) - levels  # a session's later items
        logits = self.model.teacher_forced(context, F.pad(codes, (0, missing)))[:levels]
        losses = code_losses(logits, codes, self._objective, self._trie).mean(dim=1)
        return losses.where(inputs.target_ids[:, 0] > 0, 0.0)


def mean_per_sequence(losses: Tensor, batch: JaggedBatch) -> Tensor:
    """Mean of per-token losses [T] over the positions of each sequence that predict: [N]."""
    groups = segment_ids(batch.offsets, batch.num_tokens)
    valid = (batch.target_ids > 0).float()
    counts = losses.new_zeros(batch.num_sequences).index_add(0, groups, valid)
    sums = losses.new_zeros(batch.num_sequences).index_add(0, groups, losses)
    return sums / counts.clamp(min=1.0)
