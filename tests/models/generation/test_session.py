"""Session generation against scoring every session of a small catalogue."""

import itertools
from typing import Any

import pytest
import torch

from configs.generation import BeamConfig
from models.generation.catalogue_trie import CatalogueTrie
from models.generation.log_probs import sequence_log_probs
from models.generation.session import distinct_ids, generate_sessions
from tests.models.code_reference import SIZES
from tests.models.test_onerec import build, requests, rows_for

IDS = [[0, 1, 2], [0, 1, 3], [2, 0, 0], [2, 4, 5], [6, 3, 1]]
TRIE = CatalogueTrie.build(torch.tensor(IDS), SIZES)


def test_enough_beams_find_every_session_in_order() -> None:
    model = build(session_items=2, lifelong=None).eval()
    batch = requests([3, 4])
    context = model.encode(batch, rows_for(model, batch), 0, "last")
    found = generate_sessions(model, context, 2, TRIE, BeamConfig(beams=25))
    assert found.codes.shape == (2, 25, 2, 3)
    for request in range(2):
        scores = {}
        for first, second in itertools.product(range(5), repeat=2):
            codes = torch.tensor(IDS[first] + IDS[second]).repeat(2, 1)
            with torch.no_grad():
                logits = model.teacher_forced(context, codes)
            parts = [
                sequence_log_probs(logits[at : at + 3], codes[:, at : at + 3], TRIE)[request].sum()
                for at in (0, 3)
            ]
            scores[tuple(codes[0].tolist())] = float(parts[0] + parts[1])
        expected = sorted(scores, key=lambda key: -scores[key])
        assert [tuple(row) for row in found.codes[request].flatten(1).tolist()] == expected
        actual = found.log_probs[request]
        torch.testing.assert_close(actual, torch.tensor([scores[key] for key in expected]))
        assert float(actual.logsumexp(0)) == pytest.approx(0.0, abs=1e-5)
        for at, row in enumerate(found.codes[request]):
            assert torch.equal(TRIE.walk(row), found.states[request, at])


@pytest.mark.parametrize("place", range(6))
def test_weights_that_diverged_give_no_empty_session(
    place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(session_items=2, lifelong=None).eval()
    batch = requests([3, 4])
    context, step = model.encode(batch, rows_for(model, batch), 0, "last"), model.step

    def diverged(context: Any, cache: Any, at: int, tokens: Any) -> torch.Tensor:
        logits = step(context, cache, at, tokens)
        return logits.index_fill(-1, torch.tensor(1), torch.nan) if at == place else logits

    monkeypatch.setattr(model, "step", diverged)
    with pytest.raises(ValueError, match=f"logits of code {place + 1} are not finite"):
        generate_sessions(model, context, 2, TRIE, BeamConfig(beams=3))


def test_few_beams_write_legal_items_and_fewer_sessions_than_beams_are_fine() -> None:
    model = build(session_items=2, lifelong=None).eval()
    batch = requests([3, 4, 1])
    context = model.encode(batch, rows_for(model, batch), 0, "last")
    few = generate_sessions(model, context, 3, TRIE, BeamConfig(beams=3))
    assert TRIE.probe(few.codes.flatten(0, 2))[1].all()
    assert (few.log_probs.diff(dim=1) <= 0).all()
    many = generate_sessions(model, context, 3, TRIE, BeamConfig(beams=60))
    assert ((many.states >= 0).all(2).sum(1) == 25).all()
    assert (many.log_probs > -torch.inf).sum(1).tolist() == [25] * 3


def test_excluded_items_are_as_if_they_were_not_there() -> None:
    model = build(session_items=2, lifelong=None).eval()
    batch = requests([3, 4])
    context = model.encode(batch, rows_for(model, batch), 0, "last")
    exclude = torch.tensor([[2, 5], [1, 0]])
    beams = BeamConfig(beams=25)
    found = generate_sessions(model, context, 2, TRIE, beams, exclude=exclude)
    for request in range(2):
        left = [ids for item, ids in enumerate(IDS, 1) if item not in exclude[request].tolist()]
        rest = CatalogueTrie.build(torch.tensor(left), SIZES)
        alone = generate_sessions(model, context, 2, rest, beams)
        count = len(left) ** 2
        assert torch.equal(found.codes[request, :count], alone.codes[request, :count])
        torch.testing.assert_close(
            found.log_probs[request, :count], alone.log_probs[request, :count]
        )
        assert (found.states[request, count:] == -1).all()


def test_distinct_ids_are_those_of_sessions_each_once_in_order() -> None:
    model = build(session_items=2, lifelong=None).eval()
    batch = requests([3, 4, 1])
    context = model.encode(batch, rows_for(model, batch), 0, "last")
    for beams in (1, 4, 60):
        sessions = generate_sessions(model, context, 3, TRIE, BeamConfig(beams=beams))
        flat = distinct_ids(sessions)
        for request in range(3):
            expected: dict[tuple[int, ...], float] = {}
            for written, log_prob in zip(
                sessions.codes[request], sessions.log_probs[request].tolist(), strict=True
            ):
                for code in written.tolist() if log_prob > -torch.inf else []:
                    expected.setdefault(tuple(code), log_prob)
            count = int(flat.valid[request].sum())
            assert flat.valid[request].tolist() == [True] * count + [False] * (
                flat.valid.shape[1] - count
            )
            rows = [tuple(code) for code in flat.codes[request, :count].tolist()]
            assert rows == list(expected)
            assert flat.log_probs[request, :count].tolist() == list(expected.values())
            assert torch.equal(TRIE.walk(flat.codes[request, :count]), flat.states[request, :count])
            assert (flat.states[request, count:] == -1).all()
            assert (flat.log_probs[request, count:] == -torch.inf).all()


def test_other_codebooks_are_refused() -> None:
    model, batch = build(session_items=2, lifelong=None).eval(), requests([3])
    context = model.encode(batch, rows_for(model, batch), 0, "last")
    other = CatalogueTrie.build(torch.tensor(IDS), (9, 9, 9))
    with pytest.raises(ValueError, match="different tokenizers"):
        generate_sessions(model, context, 1, other, BeamConfig(beams=2))
