"""Search against enumeration: legality, cache, restrictions, items, both beam implementations."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from configs.generation import AncestralConfig, BeamConfig, GenerationConfig, GumbelTopKConfig
from models.generation import search as search_module
from models.generation.catalogue_trie import CatalogueTrie
from models.generation.kv_cache import BeamCache
from models.generation.restrictions import AllowList, restrict
from models.generation.search import Generated, generate, item_of_each, items_of, refuse_unsound
from models.generation.strategies import Beams, TrieLevel, best_native, best_reference
from models.ops.native import native_available
from tests.models.generation.plain import Catalogue, TinyDecoder, catalogues, exact_log_probs

STRATEGIES: list[GenerationConfig] = [
    BeamConfig(beams=7),
    GumbelTopKConfig(samples=7, temperature=1.7),
    AncestralConfig(samples=7, temperature=0.6, top_p=0.8),
]
SEEDS = st.integers(0, 2**31)


def search(
    catalogue: Catalogue, config: GenerationConfig, requests: int, seed: int, **restrictions: Any
) -> Generated:
    decoder = TinyDecoder(catalogue.sizes, seed)
    keys = None if isinstance(config, BeamConfig) else torch.arange(requests) + seed
    trie = restrictions.pop("trie", None) or catalogue.trie
    contexts = decoder.contexts(requests, seed)
    return generate(decoder, contexts, requests, trie, config, keys=keys, **restrictions)


@given(catalogues(max_items=10), SEEDS, st.integers(0, 3))
@settings(max_examples=50)
def test_a_wide_beam_is_an_exhaustive_search(catalogue: Catalogue, seed: int, surplus: int) -> None:
    ids = catalogue.ids()
    found = search(catalogue, BeamConfig(beams=len(ids) + surplus), 2, seed)
    decoder = TinyDecoder(catalogue.sizes, seed)
    for request, context in enumerate(decoder.contexts(2, seed)):
        exact = exact_log_probs(decoder, context, ids)
        best = sorted(exact, key=lambda codes: -exact[codes])
        assert found.valid[request].tolist() == [True] * len(ids) + [False] * surplus
        expected = torch.tensor([exact[codes] for codes in best])
        torch.testing.assert_close(found.log_probs[request, : len(ids)], expected)
        for codes, log_prob in zip(
            found.codes[request].tolist(), found.log_probs[request, : len(ids)], strict=False
        ):
            assert exact[tuple(codes)] == pytest.approx(log_prob.item(), abs=1e-4)
        assert sorted(map(tuple, found.codes[request, : len(ids)].tolist())) == ids


@given(catalogues(), SEEDS, st.sampled_from(STRATEGIES))
def test_everything_generated_is_legal(
    catalogue: Catalogue, seed: int, config: GenerationConfig
) -> None:
    found = search(catalogue, config, 3, seed)
    trie = catalogue.trie
    assert found.codes.shape == (3, 7, trie.num_levels)
    assert torch.equal(found.valid, found.states >= 0)
    assert torch.equal(trie.walk(found.codes[found.valid]), found.states[found.valid])
    for values in (found.log_probs, found.sampling_log_probs, found.scores):
        assert torch.equal(values > -torch.inf, found.valid) and not values.isnan().any()
    assert not found.codes[~found.valid].any()
    if isinstance(config, AncestralConfig):
        assert found.valid.all()
        return
    assert (found.scores.diff(dim=1).nan_to_num(0.0) <= 0).all()
    for states, valid in zip(found.states, found.valid, strict=True):
        count = min(7, len(catalogue.ids()))
        assert len(set(states[valid].tolist())) == int(valid.sum()) == count


@given(catalogues(), SEEDS, st.sampled_from(STRATEGIES), st.booleans())
def test_restrictions_equal_a_rebuilt_catalogue(
    catalogue: Catalogue, seed: int, config: GenerationConfig, shared: bool
) -> None:
    """Different lists and exclusions for three requests; then each alone, in its own trie."""
    generator = torch.Generator().manual_seed(seed)
    count, trie = catalogue.codes.shape[0], catalogue.trie
    lists = torch.rand(2, count, generator=generator) < 0.8
    index = torch.tensor([1, 0, 1])
    seen = torch.randint(-1, count + 3, (3, 8), generator=generator).clamp(min=0)
    allow = AllowList.stack([trie.allow(each) for each in lists]).for_requests(index)
    if shared:
        allow, index = trie.allow(lists[0]), torch.zeros_like(index)
    found = search(catalogue, config, 3, seed, allow=allow, exclude=seen)
    items = items_of(found, trie, 5, allow=allow, exclude=seen)
    each = item_of_each(found, trie, allow=allow, exclude=seen)
    for request in range(3):
        left = lists[index[request]].clone()
        left[seen[request][(seen[request] > 0) & (seen[request] <= count)] - 1] = False
        if not left.any():
            assert not found.valid[request].any() and not items[request].any()
            continue
        rebuilt = CatalogueTrie.build(catalogue.codes[left], catalogue.sizes)
        alone = search(catalogue, config, 3, seed, trie=rebuilt)
        assert torch.equal(found.codes[request], alone.codes[request])
        assert torch.equal(found.valid[request], alone.valid[request])
        torch.testing.assert_close(found.log_probs[request], alone.log_probs[request])
        names = torch.cat([torch.zeros(1, dtype=torch.int64), left.nonzero().squeeze(1) + 1])
        assert torch.equal(items[request], names[items_of(alone, rebuilt, 5)[request]])
        assert torch.equal(each[request], names[item_of_each(alone, rebuilt)[request]])


@given(catalogues(), SEEDS, st.booleans(), st.booleans(), st.integers(1, 9))
@pytest.mark.skipif(not native_available(), reason="no C++ compiler")
def test_the_kernel_equals_its_reference(
    catalogue: Catalogue, seed: int, listed: bool, excluded: bool, count: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    trie, requests, items = catalogue.trie, 3, catalogue.codes.shape[0]
    allow = trie.allow(torch.rand(2, items, generator=generator) < 0.8) if listed else None
    allow = allow and allow.for_requests(torch.tensor([0, 1, 0]))
    seen = torch.randint(items + 1, (requests, 6), generator=generator) if excluded else None
    restriction = restrict(trie, requests, allow, seen)
    for level in range(trie.num_levels):
        at = TrieLevel(trie, level, restriction)
        states = torch.randint(-1, trie.num_states(level), (requests, 5), generator=generator)
        scores = torch.randn(requests, 5, generator=generator).masked_fill(states < 0, -torch.inf)
        beams = Beams(states, states, states, scores, scores, scores, None)
        logits = torch.randn(requests, 5, trie.codebook_sizes[level], generator=generator) * 3
        picked = min(count, 5 * trie.max_branch[level])
        expected = best_reference(beams, logits, at, picked)
        got = best_native(beams, logits, at, picked)
        torch.testing.assert_close(got.scores, expected.scores)
        assert torch.equal(got.states, expected.states)
        assert torch.equal(got.tokens, expected.tokens)
        assert torch.equal(got.parents, expected.parents)


def test_cached_steps_equal_whole_prefixes() -> None:
    sizes = (3, 4, 2)
    decoder = TinyDecoder(sizes, seed=5)
    contexts = decoder.contexts(2)
    cache = decoder.new_cache(contexts)
    decoder.step(contexts, cache, 0, None)
    cache.select(torch.zeros(2, 3, dtype=torch.int64))
    first = torch.tensor([[2, 0, 1], [1, 1, 0]])
    decoder.step(contexts, cache, 1, first)
    parents = torch.tensor([[1, 1, 0, 2], [2, 0, 0, 2]])
    cache.select(parents)
    second = torch.tensor([[3, 0, 3, 1], [2, 2, 1, 0]])
    logits = decoder.step(contexts, cache, 2, second)
    for n in range(2):
        for w in range(4):
            prefix = (int(first[n, parents[n, w]]), int(second[n, w]))
            torch.testing.assert_close(logits[n, w], decoder.logits(contexts[n], prefix))


def test_the_cache_holds_one_key_a_beam_and_level() -> None:
    cache = BeamCache(1, 2, "cpu")
    k = torch.arange(2.0).view(2, 1, 1, 1)
    cache.append(0, k, -k)
    cache.select(torch.zeros(2, 3, dtype=torch.int64))
    k = torch.arange(6.0).view(2, 3, 1, 1) + 10
    cache.append(0, k, -k)
    keys, values = cache.gather(0)
    assert keys.flatten(2).tolist() == [[[0, 10], [0, 11], [0, 12]], [[1, 13], [1, 14], [1, 15]]]
    assert torch.equal(values, -keys)
    cache.select(torch.tensor([[2], [0]]))
    cache.append(0, k[:, :1], k[:, :1])
    assert cache.gather(0)[0].flatten(2).tolist() == [[[0, 12, 10]], [[1, 13, 13]]]


def generated_of(states: list[list[int]]) -> Generated:
    leaves = torch.tensor(states)
    scores = torch.zeros(leaves.shape).masked_fill(leaves < 0, -torch.inf)
    codes = torch.zeros(*leaves.shape, 2, dtype=torch.int64)
    return Generated(codes, leaves, scores, scores, scores, leaves >= 0)


def test_items_come_in_order_with_collisions_resolved() -> None:
    codes = torch.tensor([[0, 0], [1, 1], [0, 0], [1, 1], [0, 1], [1, 1]])
    trie = CatalogueTrie.build(codes, (2, 2))  # leaves: (0,0): 1 3; (0,1): 5; (1,1): 2 4 6
    found = generated_of([[2, 0, 1], [1, -1, -1], [0, 0, 2]])
    assert items_of(found, trie, 5).tolist() == [[2, 4, 6, 1, 3], [5, 0, 0, 0, 0], [1, 3, 2, 4, 6]]
    assert items_of(found, trie, 2).tolist() == [[2, 4], [5, 0], [1, 3]]
    exclude = torch.tensor([[2, 6], [0, 0], [3, 3]])
    kept = items_of(found, trie, 3, exclude=exclude)
    assert kept.tolist() == [[4, 1, 3], [5, 0, 0], [1, 2, 4]]
    allow = trie.allow(torch.tensor([0, 0, 0, 0, 1, 1]).bool())
    assert items_of(found, trie, 3, allow=allow).tolist() == [[6, 5, 0], [5, 0, 0], [6, 0, 0]]
    assert item_of_each(found, trie).tolist() == [[2, 1, 5], [5, 0, 0], [1, 1, 2]]
    assert item_of_each(found, trie, exclude=exclude)[0].tolist() == [4, 1, 5]


@pytest.mark.parametrize("config", STRATEGIES)
def test_no_requests_are_an_answer_under_restrictions(config: GenerationConfig) -> None:
    """Of a rank without users, which takes part in the lookups of the others."""
    catalogue = Catalogue(torch.tensor([[0, 0], [0, 1], [1, 1]]), (2, 2))
    lists = catalogue.trie.allow(torch.tensor([[True, False, True], [True, True, True]]))
    more = {
        "allow": lists.for_requests(torch.zeros(0, dtype=torch.int64)),
        "exclude": torch.zeros(0, 2, dtype=torch.int64),
    }
    found = search(catalogue, config, 0, 1, **more)
    assert found.codes.shape == (0, 7, 2)
    assert items_of(found, catalogue.trie, 3, **more).shape == (0, 3)
    assert item_of_each(found, catalogue.trie, **more).shape == (0, 7)


def test_an_interior_state_whose_items_are_all_seen_is_no_dead_end() -> None:
    """Greedy would enter the better branch and find nothing there."""
    codes = torch.tensor([[0, 0], [0, 1], [1, 0]])

    class Prefers(TinyDecoder):
        def step(
            self, context: Tensor, cache: BeamCache, level: int, tokens: Tensor | None
        ) -> Tensor:
            return torch.tensor([[[5.0, 0.0]]]).expand(1, 1, 2)

    decoder, trie = Prefers((2, 2), 0), CatalogueTrie.build(codes, (2, 2))
    contexts = decoder.contexts(1)
    exclude = torch.tensor([[2, 1]])
    found = generate(decoder, contexts, 1, trie, BeamConfig(beams=1), exclude=exclude)
    assert found.codes.tolist() == [[[1, 0]]] and found.log_probs.item() == 0.0


@pytest.mark.parametrize(
    "config",
    [BeamConfig(beams=12), GumbelTopKConfig(samples=12), AncestralConfig(samples=12, top_p=0.9)],
)
@pytest.mark.parametrize("seen", [False, True])
def test_beams_that_can_go_one_way_only_are_not_asked_about(
    config: GenerationConfig, seen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    class Recording(TinyDecoder):
        def step(
            self, context: Tensor, cache: BeamCache, level: int, tokens: Tensor | None
        ) -> Tensor:
            asked.append(1 if tokens is None else tokens.shape[1])
            return super().step(context, cache, level, tokens)

    sizes, requests = (6, 6, 6, 6), 4
    generator = torch.Generator().manual_seed(3)
    triples = torch.cartesian_prod(*[torch.arange(6)] * 3)[torch.randperm(216, generator=generator)]
    codes = torch.cat([triples[:40], torch.randint(6, (40, 1), generator=generator)], dim=1)
    trie, decoder = CatalogueTrie.build(codes, sizes), Recording(sizes, 0)
    contexts = decoder.contexts(requests)
    keys = None if isinstance(config, BeamConfig) else torch.arange(requests)
    exclude = torch.randint(1, 41, (requests, 12), generator=generator) if seen else None

    def run() -> Generated:
        return generate(decoder, contexts, requests, trie, config, keys=keys, exclude=exclude)

    less = run()
    widths = asked.copy()
    monkeypatch.setattr(search_module, "_WORTH_ASKING_LESS", 0.0)
    asked.clear()
    everything = run()
    assert asked[2:] == [12, 12] and widths[:2] == asked[:2]
    assert widths[2] <= 12 and widths[3] == 1  # three codes name every item
    for name in ("codes", "states", "valid"):
        assert torch.equal(getattr(less, name), getattr(everything, name))
    for name in ("scores", "log_probs", "sampling_log_probs"):
        torch.testing.assert_close(getattr(less, name), getattr(everything, name))


def test_what_does_not_fit_is_refused() -> None:
    codes = torch.tensor([[0, 0], [1, 1]])
    trie, decoder = CatalogueTrie.build(codes, (2, 2)), TinyDecoder((2, 2), 0)
    contexts, beam, drawn = decoder.contexts(2), BeamConfig(beams=2), GumbelTopKConfig()

    def run(config: GenerationConfig, **options: Any) -> Generated:
        return generate(decoder, contexts, 2, trie, config, **options)

    with pytest.raises(ValueError, match="takes no keys"):
        run(beam, keys=torch.arange(2))
    with pytest.raises(ValueError, match="gumbel_top_k.*needs keys.*2 requests"):
        run(drawn)
    with pytest.raises(ValueError, match="needs keys"):
        run(AncestralConfig(), keys=torch.arange(3))
    with pytest.raises(ValueError, match="different tokenizers"):
        generate(TinyDecoder((2, 3), 0), contexts, 2, trie, beam)
    two = trie.allow(torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="without saying whose"):
        run(beam, allow=two)
    with pytest.raises(ValueError, match="1 indices for 2 requests"):
        run(beam, allow=two.for_requests(torch.zeros(1, dtype=torch.int64)))
    other = CatalogueTrie.build(torch.tensor([[0, 0], [1, 1], [1, 0]]), (2, 2))
    with pytest.raises(ValueError, match="another trie"):
        run(beam, allow=other.allow(torch.ones(3, dtype=torch.bool)))
    like = CatalogueTrie.build(codes[[1, 0]], (2, 2))  # as many states on every level
    with pytest.raises(ValueError, match="another trie"):
        run(beam, allow=like.allow(torch.ones(2, dtype=torch.bool)))
    assert trie.to("cpu").fingerprint == trie.fingerprint != like.fingerprint
    for wrong in ([-1, 0], [0, 2]):
        with pytest.raises(ValueError, match=r"request \d is dealt allow-list .* there are 2"):
            two.for_requests(torch.tensor(wrong))
    with pytest.raises(ValueError, match="by int64 indices"):
        two.for_requests(torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match="a row a request"):
        run(beam, exclude=torch.ones(3, 1, dtype=torch.int64))


def test_options_of_another_strategy_are_unknown_keys() -> None:
    adapter: TypeAdapter[GenerationConfig] = TypeAdapter(GenerationConfig)
    assert adapter.validate_python({"kind": "beam", "beams": 3}) == BeamConfig(beams=3)
    for wrong in (
        {"kind": "beam", "temperature": 0.5},
        {"kind": "beam", "top_p": 0.5},
        {"kind": "gumbel_top_k", "top_p": 0.5},
        {"kind": "gumbel_top_k", "beams": 5},
        {"kind": "ancestral", "beams": 5},
        {"kind": "ancestral", "top_p": 0.0},
    ):
        with pytest.raises(ValidationError):
            adapter.validate_python(wrong)


@pytest.mark.parametrize("level", [0, 1])
def test_weights_that_diverged_give_no_empty_answer(level: int) -> None:
    catalogue = Catalogue(torch.tensor([[0, 0], [0, 2], [1, 1]]), (3, 3))
    decoder = TinyDecoder(catalogue.sizes, 0)
    decoder.head[level][2, 1] = torch.nan
    with pytest.raises(ValueError, match=f"logits of code {level + 1} are not finite"):
        generate(decoder, decoder.contexts(2), 2, catalogue.trie, BeamConfig(beams=3))


def test_logits_that_leave_no_beam_are_unsound() -> None:
    low = -torch.inf
    refuse_unsound(torch.tensor([[low, 0.0], [1.0, 2.0]]), 0)
    for wrong in ([low, low], [torch.inf, 0.0], [torch.nan, 0.0]):
        with pytest.raises(ValueError, match="logits of code 3 are not finite"):
            refuse_unsound(torch.tensor([[0.0, 1.0], wrong]), 2)
