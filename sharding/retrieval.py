"""Ranks, top-k, samples and log-sum-exp over a catalogue whose keys are dealt out to the ranks.

Every rank holds the keys of one contiguous range of item ids. Ranks take turns: the one whose turn
it is shows its queries to all, each scores them against its own range chunk by chunk, and the parts
are merged. So the memory of a rank depends neither on the catalogue, beyond its own share of keys,
nor on the world size.

Order is by score, and by lower id where scores are equal, in `ranks` and `top_k` alike.

Shape legend: b queries of a rank, r queries of one turn, c items of one chunk, D width, S seen
items, V items of the catalogue, K results.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from models.generation.noise import gumbels, split_streams
from sharding.draws import best_blocks, best_items, item_streams
from sharding.parallelize import ParallelModel
from sharding.process_group import DistributedContext
from sharding.shared_catalogue import CatalogueShare
from sharding.sort_keys import best_of_chunk, sort_keys, unpack_keys
from sharding.turns import TILE, Turn, received_turn, rounded_up, split_turns

MAX_CHUNK = 1 << 23
"""Items scored at once, at most: what float32 counts exactly."""


class Catalogue:
    """A snapshot of all items' keys; every method is collective."""

    def __init__(self, model: ParallelModel, num_items: int, chunk: int) -> None:
        """Fetch the keys of items 1…num_items from a model, `chunk` at a time.

        Args:
            model: gives keys by collective lookups, whatever the placement of its item table.
            num_items: V.
            chunk: items fetched and scored at once.
        """
        self._fetch(model.ctx, model.item_keys, num_items, chunk)

    @classmethod
    def from_keys(
        cls,
        ctx: DistributedContext,
        keys: Callable[[Tensor], Tensor],
        num_items: int,
        chunk: int = 65536,
    ) -> "Catalogue":
        """A catalogue of any keys: `keys` maps ids [n] (n may be 0) to [n, D]."""
        catalogue = cls.__new__(cls)
        catalogue._fetch(ctx, keys, num_items, chunk)
        return catalogue

    def _fetch(
        self,
        ctx: DistributedContext,
        keys: Callable[[Tensor], Tensor],
        num_items: int,
        chunk: int,
    ) -> None:
        if num_items < 1 or not 1 <= chunk <= MAX_CHUNK:
            raise ValueError(
                f"num_items={num_items} must be positive and chunk={chunk} in 1…{MAX_CHUNK}"
            )
        self._ctx, self._num_items = ctx, num_items
        self._chunk = rounded_up(chunk)
        share = CatalogueShare.of(ctx, num_items, TILE)
        self._first, self._size = share.first, share.size
        held, most = share.ids(ctx.device), CatalogueShare.largest(ctx, num_items, TILE)
        for begin in range(0, most, chunk):  # as many lookups on every rank: they are collective
            found = keys(held[begin : begin + chunk]).detach()
            if begin == 0:
                rows = rounded_up(self._size)
                self._keys = found.new_zeros(rows, found.shape[1], dtype=torch.float32)
            self._keys[begin : begin + found.shape[0]] = found

    @torch.no_grad()
    def ranks(
        self, queries: Tensor, target_ids: Tensor, seen_ids: Tensor, seen_offsets: Tensor
    ) -> Tensor:
        """Exact place of each query's target among all items not seen, 1 being best.

        A target competes although it was seen before. A score that is not a number counts as
        higher, so that a broken model ranks last.

        Args:
            queries: [b, D]; b differs between ranks and may be 0.
            target_ids: [b] int64 in 1…V.
            seen_ids: [S] int64, items out of the competition; repeats are fine.
            seen_offsets: [b+1] int64; query i has seen_ids[seen_offsets[i]:seen_offsets[i+1]].

        Returns:
            [b] int64.

        Raises:
            ValueError: a target lies outside the catalogue, or the shapes disagree; on all ranks.
        """
        outside = bool(((target_ids < 1) | (target_ids > self._num_items)).any())
        problem = f"a target is not in 1…{self._num_items}" if outside else None
        places = []
        turns = self._turns(queries, target_ids, seen_ids, seen_offsets, problem)
        for source, turn in turns:
            target_scores = self._target_scores(turn)
            better = self._ctx.all_reduce_sum(self._count_better(turn, target_scores))
            if source == self._ctx.rank:
                places.append((1 + better).clamp_(max=self._num_items))
        return _joined(places, queries.new_empty(0, dtype=torch.int64))

    @torch.no_grad()
    def top_k(
        self,
        queries: Tensor,
        k: int,
        seen_ids: Tensor,
        seen_offsets: Tensor,
        allowed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The k best items not seen of each query, best first.

        Args:
            queries: [b, D]; b differs between ranks and may be 0.
            k: K, equal on all ranks; may exceed the catalogue.
            seen_ids: [S] int64, items to leave out.
            seen_offsets: [b+1] int64.
            allowed: [V+1] bool, by id, the only items to find; all without it.

        Returns:
            ids [b, K] int64 and scores [b, K] float32; id 0 and -inf where no item is left.

        Raises:
            ValueError: the shapes disagree; on all ranks.
        """
        nobody = seen_offsets.new_zeros(queries.shape[0])
        turns = self._turns(queries, nobody, seen_ids, seen_offsets)
        if allowed is None:
            return self._merged(turns, k, queries, self._scores)
        own = allowed[self._first : self._first + self._size].to(self._keys.device)
        hidden = ~pad(own, (0, self._keys.shape[0] - self._size))

        def scores(turn: Turn) -> Iterator[tuple[int, Tensor]]:
            for first, found in self._scores(turn):
                begin = first - self._first
                yield first, found.masked_fill_(hidden[begin : begin + found.shape[1]], -torch.inf)

        return self._merged(turns, k, queries, scores)

    @torch.no_grad()
    def sample(
        self, queries: Tensor, k: int, streams: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """k items of each query, drawn from softmax(score / temperature) without replacement.

        The k largest of score / temperature + Gumbel noise (Gumbel top-k, arXiv 1903.06059), where
        the noise of an item is a hash of its id and of the query's stream. So a draw is exact over
        the whole catalogue, and depends neither on the world size nor on the other queries.

        Args:
            queries: [b, D]; b differs between ranks and may be 0.
            k: K, equal on all ranks; may exceed the catalogue.
            streams: [b] int64 (see `models.generation.noise`).
            temperature: divides the scores; equal on all ranks.

        Returns:
            ids [b, K] int64 and perturbed scores [b, K] float32, falling; id 0 and -inf where no
            item is left.
        """
        nothing = streams.new_zeros(queries.shape[0] + 1)
        turns = self._turns(
            queries / temperature, nothing[1:], nothing[:0], nothing, streams=streams
        )
        return self._merged(turns, k, queries, self._perturbed)

    @torch.no_grad()
    def draw(
        self, queries: Tensor, samples: int, streams: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """S independent draws of each query from softmax(score / temperature).

        Exact over the whole catalogue (see `sharding.draws`). Draw s of a query is a function of
        its stream, whatever S, the world size and the other queries.

        Args:
            queries: [b, D]; b differs between ranks and may be 0.
            samples: S, equal on all ranks.
            streams: [b] int64 (see `models.generation.noise`).
            temperature: divides the scores; equal on all ranks.

        Returns:
            ids [b, S] int64 and their scores / temperature [b, S] float32; id 0 and -inf where no
            item has a probability.
        """
        nothing = streams.new_zeros(queries.shape[0] + 1)
        turns = self._turns(
            queries / temperature, nothing[1:], nothing[:0], nothing, streams=streams
        )
        ids, scores = [], []
        for source, turn in turns:
            noise = split_streams(turn.streams[:, None], samples)
            keys = self._ctx.all_reduce_max(best_blocks(self._scores(turn), noise))
            blocks, _ = unpack_keys(keys)
            noise = item_streams(noise, blocks)
            keys = self._ctx.all_reduce_max(best_items(self._scores(turn), blocks, noise))
            if source == self._ctx.rank:
                items, perturbed = unpack_keys(keys)
                ids.append(items)
                scores.append(perturbed - gumbels(noise, items))
        empty = streams.new_empty(0, samples)
        return _joined(ids, empty), _joined(scores, empty.float())

    def _merged(
        self,
        turns: Iterator[tuple[int, Turn]],
        k: int,
        queries: Tensor,
        scores: Callable[[Turn], Iterator[tuple[int, Tensor]]],
    ) -> tuple[Tensor, Tensor]:
        """Ids and scores of the best k of all ranks, for this rank's queries. Collective."""
        found = []
        for source, turn in turns:
            best = self._gather(_best_keys(turn, k, scores(turn)), source)
            if source == self._ctx.rank:
                found.append(torch.cat(best, dim=1).topk(k).values)
        return unpack_keys(_joined(found, queries.new_empty(0, k, dtype=torch.int64)))

    @torch.no_grad()
    def log_sum_exp(self, queries: Tensor, temperature: float) -> Tensor:
        """log Σ_v exp(query · key_v / temperature) over the whole catalogue, [b] float32.

        Args:
            queries: [b, D]; b differs between ranks and may be 0.
            temperature: divides the scores; equal on all ranks.
        """
        offsets = torch.zeros(queries.shape[0] + 1, dtype=torch.int64, device=queries.device)
        sums = []
        turns = self._turns(queries, offsets[1:], offsets[:0], offsets)
        for source, turn in turns:
            total = torch.full((turn.size,), -torch.inf, device=queries.device)
            for _, scores in self._scores(replace(turn, queries=turn.queries / temperature)):
                top = scores.amax(1)
                part = scores.sub_(top[:, None]).exp_().sum(1).log_().add_(top)
                total = torch.logaddexp(total, part[: turn.size])
            top = self._ctx.all_reduce_max(total.clone())
            share = self._ctx.all_reduce_sum((total - top).exp_())
            if source == self._ctx.rank:
                sums.append(top + share.log_())
        return _joined(sums, queries.new_empty(0, dtype=torch.float32))

    def _scores(self, turn: Turn) -> Iterator[tuple[int, Tensor]]:
        """First id and scores [≥ r, c] of each chunk; -inf for pairs that do not compete.

        The same memory serves every chunk, so a caller is done with one before it takes the next.
        """
        starts = range(0, self._keys.shape[0], self._chunk)
        edges = torch.tensor([*starts, self._keys.shape[0]], device=turn.queries.device)
        bounds = torch.searchsorted(turn.masked_ids, self._first + edges).tolist()
        scores = turn.queries.new_empty(0)
        for start, low, high in zip(starts, bounds, bounds[1:], strict=False):
            keys = self._keys[start : start + self._chunk]
            if scores.shape[-1] != keys.shape[0]:
                scores = turn.queries.new_empty(turn.queries.shape[0], keys.shape[0])
            torch.mm(turn.queries, keys.T, out=scores)
            scores[:, max(0, self._size - start) :] = -torch.inf
            columns = turn.masked_ids[low:high] - (self._first + start)
            scores[turn.masked_rows[low:high], columns] = -torch.inf
            yield self._first + start, scores

    def _perturbed(self, turn: Turn) -> Iterator[tuple[int, Tensor]]:
        """`_scores` with Gumbel noise of (query, item)."""
        for first, scores in self._scores(turn):
            ids = torch.arange(first, first + scores.shape[1], device=scores.device)
            for begin in range(0, turn.size, TILE):  # the hash needs more memory than its result
                rows = slice(begin, min(begin + TILE, turn.size))
                scores[rows] += gumbels(turn.streams[rows, None], ids)
            yield first, scores

    def _target_scores(self, turn: Turn) -> Tensor:
        """[r] score of each target, from the rank that holds it. Collective.

        Computed as products of TILE × TILE, so that it rounds as it does in `_scores`.
        """
        places = turn.target_ids - self._first
        held = (places >= 0) & (places < self._size)
        scores = turn.queries.new_zeros(turn.queries.shape[0])
        if self._size > 0:
            rows = pad(places.where(held, 0), (0, scores.numel() - turn.size))
            for begin in range(0, scores.numel(), TILE):
                tile = slice(begin, begin + TILE)
                scores[tile] = torch.mm(turn.queries[tile], self._keys[rows[tile]].T).diagonal()
        return self._ctx.all_reduce_sum(scores[: turn.size].where(held, 0.0))

    def _count_better(self, turn: Turn, target_scores: Tensor) -> Tensor:
        """[r] competing items of this rank's range that come before the target."""
        targets = turn.target_ids
        above = target_scores.nextafter(target_scores.new_tensor(torch.inf))
        better = torch.zeros_like(targets)
        for first, scores in self._scores(turn):
            rivals, end = scores[: turn.size], first + scores.shape[1]
            inside = ((targets > first) & (targets < end)).nonzero().squeeze(1)
            ids = torch.arange(first, end, device=targets.device)
            equal = rivals[inside] == target_scores[inside, None]
            better[inside] += (equal & (ids < targets[inside, None])).sum(1)
            # Equals of a lower id come first: all of the chunk's if it lies before the target.
            threshold = torch.where(targets >= end, target_scores, above)
            worse = rivals.lt_(threshold[:, None]).sum(1)
            better += rivals.shape[1] - worse.to(torch.int64)
        return better

    def _turns(
        self,
        queries: Tensor,
        target_ids: Tensor,
        seen_ids: Tensor,
        seen_offsets: Tensor,
        problem: str | None = None,
        streams: Tensor | None = None,
    ) -> Iterator[tuple[int, Turn]]:
        """Every rank's queries, at most TURN at once, with the rank they belong to. Collective."""
        problem = problem or self._misfit(queries, target_ids, seen_ids, seen_offsets)
        streams = torch.zeros_like(target_ids) if streams is None else streams
        mine = [] if problem else split_turns(queries, target_ids, seen_ids, seen_offsets, streams)
        sizes = [(shown.shape[0], numbers.numel()) for shown, numbers in mine]
        agenda = self._ctx.all_gather_object((problem, sizes))
        for source, (sentence, _) in enumerate(agenda):
            if sentence is not None:
                raise ValueError(f"rank {source}: {sentence}")
        for source, (_, turns) in enumerate(agenda):
            for turn, (rows, count) in enumerate(turns):
                if source == self._ctx.rank:
                    shown, numbers = mine[turn]
                else:
                    shown = queries.new_empty(rows, self._keys.shape[1], dtype=torch.float32)
                    numbers = target_ids.new_empty(count)
                if self._ctx.world_size > 1:
                    dist.broadcast(shown, source)
                    dist.broadcast(numbers, source)
                yield source, received_turn(shown, numbers)

    def _misfit(
        self, queries: Tensor, target_ids: Tensor, seen_ids: Tensor, seen_offsets: Tensor
    ) -> str | None:
        """What is wrong with the arguments, if anything is."""
        if queries.dim() != 2 or queries.shape[1] != self._keys.shape[1]:
            return f"queries {list(queries.shape)} do not fit keys of width {self._keys.shape[1]}"
        if target_ids.shape != queries.shape[:1] or seen_offsets.numel() != queries.shape[0] + 1:
            return "queries, targets and seen_offsets disagree on the number of queries"
        if int(seen_offsets[-1]) != seen_ids.numel():
            return "seen_offsets do not end at the number of seen_ids"
        return None

    def _gather(self, tensor: Tensor, target: int) -> list[Tensor]:
        """Every rank's tensor on rank `target`, nothing elsewhere. Collective."""
        if self._ctx.world_size == 1:
            return [tensor]
        parts = []
        if self._ctx.rank == target:
            parts = [torch.empty_like(tensor) for _ in range(self._ctx.world_size)]
        dist.gather(tensor, parts or None, target)
        return parts


def _best_keys(turn: Turn, k: int, chunks: Iterator[tuple[int, Tensor]]) -> Tensor:
    """[r, k] sort keys of the best items of a rank's chunks of scores, best first."""
    nothing = sort_keys(turn.queries.new_tensor(-torch.inf), torch.zeros_like(turn.target_ids))
    best = nothing[:, None].expand(-1, k)
    for first, scores in chunks:
        found = best_of_chunk(scores[: turn.size], first, k)
        best = torch.cat([best, found], dim=1).topk(k).values
    return best.contiguous()


def _joined(parts: list[Tensor], empty: Tensor) -> Tensor:
    return torch.cat(parts) if parts else empty
