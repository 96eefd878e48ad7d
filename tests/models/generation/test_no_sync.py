"""Nothing waits for the device: the plain versions run on the meta device, which has no values.

Whatever asks for a value there raises, as does whatever has a shape that depends on one, or meets
a tensor that was made on another device.
"""

import pytest
import torch

from configs.generation import AncestralConfig, BeamConfig, GenerationConfig, GumbelTopKConfig
from models.generation.log_probs import sequence_log_probs
from models.generation.search import generate, item_of_each, items_of
from tests.models.generation.plain import Catalogue, TinyDecoder

TRIE = Catalogue(torch.tensor([[0, 0], [0, 2], [1, 1], [0, 2]]), (3, 3)).trie.to("meta")


@pytest.mark.parametrize(
    "config",
    [
        BeamConfig(beams=9),
        GumbelTopKConfig(samples=4, temperature=0.5),
        AncestralConfig(samples=4, temperature=0.5, top_p=0.9),
    ],
)
def test_generation_never_asks_for_a_value(config: GenerationConfig) -> None:
    decoder = TinyDecoder((3, 3), 0)
    decoder.embeddings, decoder.qkv, decoder.head = (
        [x.to("meta") for x in weights]
        for weights in (decoder.embeddings, decoder.qkv, decoder.head)
    )
    integers = torch.zeros(2, dtype=torch.int64, device="meta")
    keys = None if isinstance(config, BeamConfig) else integers
    allow = TRIE.allow(torch.zeros(2, 4, dtype=torch.bool, device="meta")).for_requests(integers)
    restrictions = {"allow": allow, "exclude": integers[:, None].expand(2, 3)}
    context = torch.zeros(2, decoder.width, device="meta")
    found = generate(decoder, context, 2, TRIE, config, keys=keys, **restrictions)
    width = 9 if isinstance(config, BeamConfig) else 4
    assert found.codes.shape == (2, width, 2) and found.valid.shape == (2, width)
    assert items_of(found, TRIE, 5, **restrictions).shape == (2, 5)
    assert item_of_each(found, TRIE, **restrictions).shape == (2, width)


def test_log_probs_of_known_ids_never_ask_and_unknown_ones_must() -> None:
    logits = [torch.zeros(5, 3, device="meta") for _ in range(2)]
    codes = torch.zeros(5, 2, dtype=torch.int64, device="meta")
    assert sequence_log_probs(logits, codes, TRIE, known=True).shape == (5, 2)
    with pytest.raises(RuntimeError, match="meta"):
        sequence_log_probs(logits, codes, TRIE)
