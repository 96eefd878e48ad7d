"""Candidates scored along the beam cache: as by teacher forcing, and with its gradients."""

import pytest
import torch
from pydantic import TypeAdapter

from configs.decoders import Decoder
from configs.models import InitConfig
from models.base import CatalogueSizes, CodeDecoder
from models.build import build_decoder
from models.generation.candidates import candidate_log_probs
from models.generation.catalogue_trie import CatalogueTrie
from models.generation.log_probs import sequence_log_probs
from tests.models.code_reference import SIZES, coded, randomized
from tests.models.sequences import make_batch

ITEMS, CANDIDATES = 30, 4
MODELS = {
    "onerec": {"num_encoder_layers": 1, "num_decoder_layers": 2, "num_heads": 2},
    "lazy_decoder": {"num_layers": 2, "num_heads": 2},
    "tiger": {"num_encoder_layers": 1, "num_decoder_layers": 2, "num_heads": 2, "head_width": 4},
    "hstu_decoder": {"qk_width": 4, "v_width": 4, "num_layers": 1},
}


def build(kind: str) -> CodeDecoder:
    config = TypeAdapter(Decoder).validate_python({"kind": kind, "width": 8} | MODELS[kind])
    sizes = CatalogueSizes(ITEMS, 9, {}, {}, SIZES, 0)
    return randomized(build_decoder(config, sizes, InitConfig(), 12)).eval()


@pytest.mark.parametrize("kind", MODELS)
def test_equals_teacher_forcing_of_each_candidate(kind: str) -> None:
    model = build(kind)
    generator = torch.Generator().manual_seed(2)
    table = torch.stack([torch.randint(0, s, (ITEMS,), generator=generator) for s in SIZES], dim=1)
    trie = CatalogueTrie.build(table, SIZES)
    batch = coded(make_batch([5, 2, 7], ITEMS))
    items = torch.randint(0, ITEMS, (3, CANDIDATES), generator=generator)
    weights = torch.randn(3, CANDIDATES, len(SIZES), generator=generator)
    embeddings = {
        name: torch.randn(ids.numel(), 8, generator=generator)
        for name, ids in model.input_ids(batch).items()
    }

    together = candidate_log_probs(
        model, model.encode(batch, embeddings, 0, "last"), table[items], trie
    )
    one_by_one = []
    for place in range(CANDIDATES):
        context, codes = model.encode(batch, embeddings, 0, "last"), table[items[:, place]]
        one_by_one.append(sequence_log_probs(model.teacher_forced(context, codes), codes, trie))
    apart = torch.stack(one_by_one, dim=1)
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-4)

    named = dict(model.named_parameters())
    gradients = [
        torch.autograd.grad((weights * each).sum(), list(named.values()), allow_unused=True)
        for each in (together, apart)
    ]
    for name, mine, theirs in zip(named, *gradients, strict=True):
        zeros = torch.zeros_like(named[name])
        mine, theirs = (zeros if each is None else each for each in (mine, theirs))
        torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=2e-3)
    assert sum(each.abs().sum() for each in gradients[0] if each is not None) > 1


def test_what_the_catalogue_lacks_is_impossible_and_harmless() -> None:
    model, table = build("hstu_decoder"), torch.tensor([[1, 2, 3], [1, 4, 3]])
    trie, batch = CatalogueTrie.build(table, SIZES), coded(make_batch([5], ITEMS))
    embeddings = {n: torch.randn(i.numel(), 8) for n, i in model.input_ids(batch).items()}
    context = model.encode(batch, embeddings, 0, "last")
    codes = torch.tensor([[[1, 2, 3], [1, 3, 3], [0, 0, 0]]])
    log_probs = candidate_log_probs(model, context, codes, trie)
    assert log_probs[0, 0].isfinite().all()
    infinite = log_probs[0, 1:] == -torch.inf
    assert infinite.tolist() == [[False, True, True], [True, True, True]]
    log_probs.sum(-1).where(torch.tensor([[True, False, False]]), 0.0).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
