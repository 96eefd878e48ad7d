"""Recommendation by generation: a policy writes semantic ids, the trie names their items.

Protocol: algorithms reference §8; search: §5. Shape legend: b users of a batch, W beams, k items,
L levels, V items of the catalogue.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data_loaders.loader import EvaluationBatch
from models.base import CodeDecoder, TableModel
from models.generation.catalogue_trie import CatalogueTrie
from models.generation.kv_cache import BeamCache
from models.generation.search import Generated, generate, items_of
from models.ops.jagged import jagged_to_padded
from sharding.parallelize import ParallelModel
from trainer.codes import last_requests, with_codes
from trainer.metrics import Popularity, RankingMetrics
from trainer.policy import Worker

NOT_FOUND = 1 << 40
"""Rank of a target that the search did not find: beyond every cut-off, and next to 0 in MRR."""


@dataclass(frozen=True)
class Offer:
    """What users are offered."""

    items: Tensor
    """[b, k] int64, best first; 0 where there are no more."""
    scores: Tensor
    """[b, k] float32, log π of each item's id; -inf where there are no more."""
    generated: Generated


@dataclass(frozen=True)
class FirstItem:
    """A decoder of whole sessions as it writes the next item alone; other decoders as they are."""

    model: CodeDecoder
    num_levels: int

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """K_1…K_L of one item."""
        return self.model.codebook_sizes[: self.num_levels]

    def new_cache(self, context: Any) -> BeamCache:
        """Of the model."""
        cache: BeamCache = self.model.new_cache(context)
        return cache

    def step(self, context: Any, cache: BeamCache, level: int, tokens: Tensor | None) -> Tensor:
        """Of the model; levels of the first item are its first ones."""
        return self.model.step(context, cache, level, tokens)


class ItemGenerator:
    """Generates items for users from a policy as it is when called."""

    def __init__(self, worker: Worker, policy: ParallelModel, counts: Tensor) -> None:
        """`counts` [V] train occurrences: of items that share an id the popular one comes first."""
        codes = worker.semantic_ids
        assert codes is not None and isinstance(policy.model, CodeDecoder)
        self._worker = worker
        self._policy = policy
        self._model = policy.model
        self._codes = codes.codes.to(worker.ctx.device)
        self.trie = CatalogueTrie.build(codes.codes[1:], codes.codebook_sizes, priority=counts).to(
            worker.ctx.device
        )

    def offer(self, users: EvaluationBatch, k: int, *, filter_seen: bool) -> Offer:
        """The k best items of each user after their last event. Collective."""
        batch = with_codes(last_requests(self._model, users.batch), self._codes)
        exclude = _seen(users) if filter_seen else None
        requests, beams = batch.num_sequences, self._worker.recipe.generation

        def use(model: TableModel, embeddings: dict[str, Tensor]) -> Generated:
            assert isinstance(model, CodeDecoder)
            context = model.encode(batch, embeddings, 0, "last")
            writer = FirstItem(model, self.trie.num_levels)
            return generate(writer, context, requests, self.trie, beams, exclude=exclude)

        generated: Generated = self._policy.infer(batch, use)
        items = items_of(generated, self.trie, k, exclude=exclude)
        return Offer(items, self._scores(generated, items), generated)

    def codes_of(self, items: Tensor) -> Tensor:
        """Semantic ids [..., L] int64 of items."""
        return self._codes[items].long()

    def _scores(self, generated: Generated, items: Tensor) -> Tensor:
        """log π of the id of each item [b, k]."""
        leaves, _ = self.trie.probe(self.codes_of(items).flatten(0, 1))
        same = leaves.view(*items.shape, 1) == generated.states.unsqueeze(1)  # [b, k, W]
        found = torch.where(same, generated.log_probs.unsqueeze(1), -torch.inf).amax(-1)
        return found.masked_fill(items == 0, -torch.inf)


def _seen(users: EvaluationBatch) -> Tensor:
    """[b, E] items that a user has seen, 0 behind them; the target itself stays a candidate."""
    lengths = users.seen_offsets.diff()
    longest = int(lengths.max()) if lengths.numel() else 0
    seen = jagged_to_padded(users.seen_ids, users.seen_offsets, max(longest, 1))
    return seen.masked_fill(seen == users.target_ids.unsqueeze(1), 0)


@dataclass
class GenerationMetrics:
    """Item-level and id-level ranking metrics side by side, and the share of legal ids."""

    items: RankingMetrics
    ids: RankingMetrics
    legal: Tensor
    """[2] float64: legal ids, ids."""

    @staticmethod
    def of(ks: tuple[int, ...], popularity: Popularity) -> "GenerationMetrics":
        """Empty metrics on the popularity's device."""
        device = popularity.is_head.device
        legal = torch.zeros(2, dtype=torch.float64, device=device)
        return GenerationMetrics(
            RankingMetrics(ks, popularity), RankingMetrics(ks, popularity), legal
        )

    def update(self, generator: ItemGenerator, offer: Offer, targets: Tensor) -> None:
        """Add users with targets [b]."""
        generated = offer.generated
        leaves, _ = generator.trie.probe(generator.codes_of(targets))
        wanted = leaves.unsqueeze(1) == generated.states
        self.items.update(_rank(offer.items == targets.unsqueeze(1)), targets, offer.items)
        self.ids.update(_rank(wanted & generated.valid), targets, offer.items[:, :0])
        written = generated.codes[generated.valid]
        _, legal = generator.trie.probe(written)
        self.legal += torch.stack([legal.sum(), torch.tensor(len(written), device=legal.device)])

    def result(self, worker: Worker) -> dict[str, float]:
        """Metrics over all ranks; those of ids end with `/id`. Collective."""
        ctx = worker.ctx
        covered = ctx.all_reduce_max(self.items.covered())
        result = self.items.result(ctx.all_reduce_sum(self.items.sums()), covered)
        by_id = self.ids.result(ctx.all_reduce_sum(self.ids.sums()), covered)
        plain = [name for name in by_id if "/" not in name and name.startswith(("hr", "ndcg"))]
        legal, written = ctx.all_reduce_sum(self.legal).tolist()
        return (
            result
            | {f"{name}/id": by_id[name] for name in plain}
            | {"legality": legal / max(written, 1.0)}
        )


def _rank(hits: Tensor) -> Tensor:
    """Place of the first hit [b], 1 = first; NOT_FOUND where there is none. `hits` [b, k] bool."""
    first = hits.to(torch.uint8).argmax(-1)
    return torch.where(hits.any(-1), first + 1, NOT_FOUND)
