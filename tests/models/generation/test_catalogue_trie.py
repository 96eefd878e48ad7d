"""The trie against nested dicts; what is unknown raises; collisions keep their order."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.generation.catalogue_trie import CatalogueTrie
from tests.models.generation.plain import Catalogue, catalogues, dict_trie


@given(catalogues())
def test_children_are_those_of_a_dict_trie(catalogue: Catalogue) -> None:
    trie = catalogue.trie
    level_nodes = [((), dict_trie(catalogue.ids()))]
    for level in range(trie.num_levels):
        assert trie.num_states(level) == len(level_nodes)
        states = torch.arange(len(level_nodes))
        tokens, following, legal = trie.children(level, states)
        assert tokens.shape == (len(level_nodes), trie.max_branch[level])
        below = []
        for state, (prefix, node) in enumerate(level_nodes):
            assert tokens[state][legal[state]].tolist() == sorted(node)
            start = len(below)
            below += [((*prefix, code), node[code]) for code in sorted(node)]
            assert following[state][legal[state]].tolist() == list(range(start, len(below)))
        level_nodes = below
    assert trie.max_branch == tuple(
        int(trie.children(level, torch.arange(trie.num_states(level)))[2].sum(-1).max())
        for level in range(trie.num_levels)
    )


@given(catalogues(), st.integers(0, 2**31))
def test_walk_finds_every_prefix_and_no_other(catalogue: Catalogue, seed: int) -> None:
    trie = catalogue.trie
    generator = torch.Generator().manual_seed(seed)
    for length in range(trie.num_levels + 1):
        known = sorted({tuple(row) for row in catalogue.codes[:, :length].tolist()})
        columns = [
            torch.randint(-1, size + 1, (30,), generator=generator)
            for size in catalogue.sizes[:length]
        ]
        asked = torch.stack(columns, dim=1) if columns else torch.zeros(30, 0, dtype=torch.int64)
        states, legal = trie.probe(asked)
        for row, state, is_known in zip(asked.tolist(), states.tolist(), legal, strict=True):
            assert is_known == (tuple(row) in known)
            assert state == (known.index(tuple(row)) if is_known else -1)
        states = trie.walk(catalogue.codes[:, :length])
        expected = [known.index(tuple(row)) for row in catalogue.codes[:, :length].tolist()]
        assert states.tolist() == expected


@given(catalogues())
def test_leaves_hold_their_items_in_order(catalogue: Catalogue) -> None:
    trie = catalogue.trie
    first, last = trie.slot_range(trie.num_levels, trie.walk(catalogue.codes))
    for item, (begin, end) in enumerate(zip(first.tolist(), last.tolist(), strict=True), 1):
        codes = catalogue.codes[item - 1]
        sharing = (catalogue.codes == codes).all(1).nonzero().squeeze(1) + 1
        assert trie.items[begin:end].tolist() == sharing.tolist()
        assert begin <= int(trie.slots[item - 1]) < end
        assert int(trie.items[trie.slots[item - 1]]) == item


@given(catalogues(), st.data())
def test_states_and_slots_name_each_other(catalogue: Catalogue, data: st.DataObject) -> None:
    trie = catalogue.trie
    slots = torch.arange(trie.num_items)
    for level, states in enumerate(trie.states_of_slots(slots), 1):
        assert torch.equal(states, trie.walk(catalogue.codes[trie.items.long() - 1, :level]))
        first, last = trie.slot_range(level, states)
        assert ((first <= slots) & (slots < last)).all()
        every_first, every_last = trie.slot_range(level, torch.arange(trie.num_states(level)))
        assert torch.equal(every_first[1:], every_last[:-1]) and every_last[-1] == trie.num_items


@given(catalogues())
def test_ids_below_are_the_distinct_ids_with_a_prefix(catalogue: Catalogue) -> None:
    trie, ids = catalogue.trie, catalogue.codes.unique(dim=0)
    for level in range(trie.num_levels + 1):
        prefixes = ids[:, :level].unique(dim=0) if level else ids[:1, :0]
        expected = [int((ids[:, :level] == prefix).all(1).sum()) for prefix in prefixes]
        assert trie.ids_below(level, trie.walk(prefixes)).tolist() == expected
        assert trie.ids_below(level, torch.tensor([[-1]])).tolist() == [[0]]


def test_priority_orders_items_that_share_an_id() -> None:
    codes = torch.tensor([[1, 0], [0, 2], [1, 0], [1, 0], [0, 2]])
    counts = torch.tensor([3, 1, 9, 3, 1])
    assert CatalogueTrie.build(codes, (2, 3)).items.tolist() == [2, 5, 1, 3, 4]
    assert CatalogueTrie.build(codes, (2, 3), counts).items.tolist() == [2, 5, 3, 1, 4]


def test_codes_too_wide_for_one_key_are_sorted_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = (2**40, 2**20, 2**40, 3)
    codes = torch.stack([torch.randint(size, (64,), generator=generator) for size in sizes], 1)
    codes = codes[torch.randint(64, (200,), generator=generator)]
    codes[:100, 0] = codes[0, 0]
    narrow = codes % 2**31  # tokens are int32: a codebook never has more
    trie = CatalogueTrie.build(narrow, (2**31, 2**20, 2**31, 3))
    expected = sorted(range(200), key=lambda row: (narrow[row].tolist(), row))
    assert trie.items.tolist() == [row + 1 for row in expected]


def test_an_unknown_prefix_raises_and_is_named() -> None:
    trie = CatalogueTrie.build(torch.tensor([[0, 1], [2, 2]]), (3, 3))
    with pytest.raises(ValueError, match=r"\(2, 1\) \(row 1\).*another catalogue or tokenizer"):
        trie.walk(torch.tensor([[0, 1], [2, 1]]))
    with pytest.raises(ValueError, match=r"\(-1,\)"):
        trie.walk(torch.tensor([[-1]]))


@pytest.mark.parametrize(
    ("codes", "sizes", "message"),
    [
        (torch.zeros(0, 2, dtype=torch.int64), (2, 2), "codes must be integers"),
        (torch.zeros(3, 2), (2, 2), "codes must be integers"),
        (torch.zeros(3, 2, dtype=torch.int64), (2, 2, 2), "one positive size"),
        (torch.tensor([[0, 1], [0, 2]]), (2, 2), "item 2 has code 2 on level 1"),
        (torch.tensor([[0, 1], [-1, 1]]), (2, 2), "item 2 has code -1 on level 0"),
    ],
)
def test_wrong_codes_are_refused(codes: torch.Tensor, sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CatalogueTrie.build(codes, sizes)


def test_priority_of_another_catalogue_is_refused() -> None:
    with pytest.raises(ValueError, match="one number an item"):
        CatalogueTrie.build(torch.tensor([[0], [1]]), (2,), torch.ones(3))


def test_memory_is_linear_in_the_catalogue() -> None:
    """Five int32 a state or item at most, whatever the codebooks: 100k items in 4 levels."""
    codes = torch.randint(8192, (100_000, 4), generator=torch.Generator().manual_seed(1))
    trie = CatalogueTrie.build(codes, (8192,) * 4)
    tensors = [*trie.indptr, *trie.tokens, trie.leaf_indptr, trie.items, trie.slots]
    states = sum(trie.num_states(level) for level in range(5))
    assert sum(x.numel() * x.element_size() for x in tensors) < 4 * (2 * states + 2 * 100_000 + 20)
    assert trie.to("cpu").items.equal(trie.items)
