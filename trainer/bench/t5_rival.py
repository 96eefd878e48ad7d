"""The T5 of `transformers` with our TIGER's weights: what whole generation is compared with.

Both are the same function. T5 does not scale logits of attention (the scale goes into its query
weights) nor embeddings (into its rows), and has one vocabulary where we have a codebook a level:
code c of level l is token l·K + c, the start is the token behind them.

Shape legend: N requests, S events of each history, L code levels, K codes of a level, W beams.
"""

import importlib.util
import math
from typing import Any

import torch
from torch import Tensor, nn

from models.layers.decoder_attention import KeyValueProjection
from models.layers.t5_block import DecoderBlock, EncoderBlock, FeedForward
from models.tiger import TIGER

NEVER_WRITTEN = 0.0
"""Weights of the start token's logit; no catalogue allows it."""
MISSING = (
    "whole generation is compared with transformers, which is not installed: "
    "run `.venv/bin/pip install '.[bench]'`"
)


def is_installed() -> bool:
    """Whether the extra `bench` is there."""
    return importlib.util.find_spec("transformers") is not None


class CachedDictTrie:
    """A dict from each prefix to the list of tokens that may follow it: no work but a lookup."""

    def __init__(self, codes: Tensor, size: int) -> None:
        """`codes` [V, L] of a catalogue whose levels have `size` codes each."""
        levels = codes.shape[1]
        following: dict[tuple[int, ...], dict[int, None]] = {}
        for row in (codes + size * torch.arange(levels)).unique(dim=0).tolist():
            for level, token in enumerate(row):
                following.setdefault(tuple(row[:level]), {})[token] = None
        self._following = {prefix: list(tokens) for prefix, tokens in following.items()}

    def __call__(self, request: int, written: Tensor) -> list[int]:
        """Tokens that may follow `written`, which begins with the start token."""
        return self._following[tuple(written.tolist()[1:])]


class T5Rival:
    """T5ForConditionalGeneration that computes what a TIGER without features does."""

    def __init__(self, ours: TIGER) -> None:
        """Copies all weights. `transformers` must be installed."""
        from transformers import T5Config, T5ForConditionalGeneration

        config = ours.config
        sizes = ours.codebook_sizes
        assert len(set(sizes)) == 1 and not ours.specs, "one size of codebook, no features"
        self._size, self._levels = sizes[0], len(sizes)
        self._start = sum(sizes)
        self.model: Any = T5ForConditionalGeneration(
            T5Config(
                vocab_size=self._start + 1,
                d_model=config.width,
                d_kv=config.head_width,
                d_ff=config.feedforward_width,
                num_layers=config.num_encoder_layers,
                num_decoder_layers=config.num_decoder_layers,
                num_heads=config.num_heads,
                relative_attention_num_buckets=config.relative_buckets,
                relative_attention_max_distance=config.relative_distance,
                dropout_rate=0.0,
                tie_word_embeddings=False,
                pad_token_id=self._start,
                decoder_start_token_id=self._start,
                eos_token_id=None,
            )
        ).eval()
        # This T5 ties its head to the embedding whatever it is told; a parameter of its own does.
        self.model.lm_head.weight = nn.Parameter(torch.empty_like(self.model.shared.weight))
        with torch.no_grad():
            self._copy(ours)

    @property
    def num_parameters(self) -> int:
        """Shared ones counted once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @torch.inference_mode()
    def generate(
        self, item_codes: Tensor, beams: int, trie: CachedDictTrie | None, *, scored: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Ids of histories: codes [N, W, L] and, if `scored`, their log-probabilities [N, W].

        Args:
            item_codes: [N, S, L] histories of equal length.
            beams: W.
            trie: the catalogue; None generates without a constraint.
            scored: keeps the scores, which costs time.
        """
        tokens = (item_codes + self._size * torch.arange(self._levels)).flatten(1)
        found = self.model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            num_beams=beams,
            num_return_sequences=beams,
            max_new_tokens=self._levels,
            do_sample=False,
            length_penalty=0.0,
            use_cache=True,
            prefix_allowed_tokens_fn=trie,
            renormalize_logits=trie is not None,
            return_dict_in_generate=scored,
            output_scores=scored,
        )
        ids = found.sequences if scored else found
        codes = ids[:, 1:].unflatten(0, (-1, beams)) % self._size
        return codes, found.sequences_scores.unflatten(0, (-1, beams)) if scored else None

    def _copy(self, ours: TIGER) -> None:
        scale = math.sqrt(ours.config.width)
        shared, head = self.model.shared.weight, self.model.lm_head.weight
        (rows,) = ours.codes.parameters()
        shared[: self._start] = rows * scale
        shared[self._start] = ours.begin.weight[0] * scale
        head[: self._start] = torch.cat(list(ours.heads.parameters()))
        head[self._start] = NEVER_WRITTEN
        encoder, decoder = self.model.encoder, self.model.decoder
        for stack, bias in ((encoder, ours.encoder_bias), (decoder, ours.decoder_bias)):
            table = stack.block[0].layer[0].SelfAttention.relative_attention_bias
            (ours_table,) = bias.parameters()
            table.weight.copy_(ours_table)
        encoder.final_layer_norm.weight.copy_(ours.encoder_norm.weight)
        decoder.final_layer_norm.weight.copy_(ours.decoder_norm.weight)
        for block, theirs in zip(ours.encoder, encoder.block, strict=True):
            assert isinstance(block, EncoderBlock)
            self._copy_encoder_block(block, theirs.layer)
        for block, memory, theirs in zip(
            ours.decoder, ours.projections, decoder.block, strict=True
        ):
            assert isinstance(block, DecoderBlock) and isinstance(memory, KeyValueProjection)
            self._copy_decoder_block(block, memory.projection.weight, theirs.layer)

    def _copy_encoder_block(self, block: EncoderBlock, layers: Any) -> None:
        attention, feedforward = layers
        _copy_attention(block.qkv.weight, block.output.weight, attention.SelfAttention)
        attention.layer_norm.weight.copy_(block.attention_norm.weight)
        _copy_feedforward(block.feedforward, block.feedforward_norm.weight, feedforward)

    def _copy_decoder_block(self, block: DecoderBlock, memory: Tensor, layers: Any) -> None:
        own, cross, feedforward = layers
        ours = block.self_attention
        _copy_attention(ours.qkv.weight, ours.output.weight, own.SelfAttention)
        own.layer_norm.weight.copy_(block.self_norm.weight)
        reading = block.context_attention
        qkv = torch.cat([reading.query.weight, memory])
        _copy_attention(qkv, reading.output.weight, cross.EncDecAttention)
        cross.layer_norm.weight.copy_(block.context_norm.weight)
        _copy_feedforward(block.feedforward, block.feedforward_norm.weight, feedforward)


def _copy_attention(qkv: Tensor, output: Tensor, theirs: Any) -> None:
    q, k, v = qkv.chunk(3)
    theirs.q.weight.copy_(q / math.sqrt(theirs.key_value_proj_dim))
    theirs.k.weight.copy_(k)
    theirs.v.weight.copy_(v)
    theirs.o.weight.copy_(output)


def _copy_feedforward(block: FeedForward, norm: Tensor, theirs: Any) -> None:
    theirs.layer_norm.weight.copy_(norm)
    theirs.DenseReluDense.wi.weight.copy_(block.expand.weight)
    theirs.DenseReluDense.wo.weight.copy_(block.contract.weight)
