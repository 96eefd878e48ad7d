"""Session generation against scoring every session of a small catalogue."""

import itertools

import pytest
import torch

from configs.generation import BeamConfig
from models.generation.catalogue_trie import CatalogueTrie
from models.generation.log_probs import sequence_log_probs
from models.generation.session import generate_sessions
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


def test_other_codebooks_are_refused() -> None:
    model, batch = build(session_items=2, lifelong=None).eval(), requests([3])
    context = model.encode(batch, rows_for(model, batch), 0, "last")
    other = CatalogueTrie.build(torch.tensor(IDS), (9, 9, 9))
    with pytest.raises(ValueError, match="different tokenizers"):
        generate_sessions(model, context, 1, other, BeamConfig(beams=2))
