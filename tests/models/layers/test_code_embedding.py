"""Embeddings of codes and of what events carry, against plain look-ups."""

from math import nan

import pytest
import torch

from configs.decoders import FeatureInputs
from models.base import CatalogueSizes, TableSpec
from models.layers.code_embedding import (
    CodeEmbedding,
    EventFeatures,
    dwell_buckets,
    last_request_times,
    time_buckets,
)
from tests.models.decoders import CODEBOOKS, coded_batch, dwell_row, spans

WIDTH = 4
SIZES = CatalogueSizes(50, 30, {"age": 5}, {"device": 7}, CODEBOOKS, 3, (), True)
SPECS = tuple(TableSpec(name, 9, WIDTH, 0.02) for name in ("item", "user_age", "side_device"))
ALL = FeatureInputs(
    item_table=True,
    user_features=("age",),
    side_features=("device",),
    actions=True,
    times=True,
    dwell_times=True,
)


def test_levels_have_rows_of_their_own() -> None:
    layer = CodeEmbedding(CODEBOOKS, WIDTH, 1.0)
    assert layer.rows.shape == (5 + 7 + 4, WIDTH)
    codes = torch.tensor([[4, 6, 3], [0, 0, 0]])
    for row, expected in enumerate(([4, 11, 15], [0, 5, 12])):
        assert torch.equal(layer(codes)[row], layer.rows[expected])
        assert torch.equal(layer(codes[:, :2])[row], layer.rows[expected[:2]])
        for level in range(3):
            one = layer.level(level, codes[:, level])
            assert torch.equal(one[row], layer.rows[expected[level]])


def test_an_unknown_item_has_no_codes() -> None:
    layer, batch = CodeEmbedding(CODEBOOKS, WIDTH, 1.0), coded_batch([3, 2])
    rows = layer.items(batch)
    assert batch.item_codes is not None
    assert (batch.item_ids == 0).tolist() == [False, True, False, False, False]
    assert not rows[1].any()
    assert torch.equal(rows[2:], layer(batch.item_codes)[2:])


def test_sums_of_codes_are_those_of_their_rows() -> None:
    layer, batch = CodeEmbedding(CODEBOOKS, WIDTH, 1.0), coded_batch([3, 0, 4])
    summed, plain = layer.item_sums(batch), layer.items(batch).sum(1)
    assert not summed[1].any()
    torch.testing.assert_close(summed, plain)
    weights = torch.randn_like(plain)
    [grad] = torch.autograd.grad((summed * weights).sum(), layer.rows)
    [expected] = torch.autograd.grad((plain * weights).sum(), layer.rows)
    torch.testing.assert_close(grad, expected)


def test_features_are_summed() -> None:
    layer, batch = EventFeatures(ALL, SPECS, SIZES, WIDTH), coded_batch([3, 0, 4])
    rows = {
        "item": torch.randn(7, WIDTH),
        "user_age": torch.randn(3, WIDTH),
        "side_device": torch.randn(7, WIDTH),
    }
    times = last_request_times(batch)
    total, events = layer(batch, rows, times), layer.events(batch, rows, times)
    assert total is not None and events is not None
    assert layer.dwell_times is not None and batch.dwell_times is not None
    assert layer.actions is not None and layer.times is not None and batch.action_ids is not None
    for b, (start, end) in enumerate(spans(batch)):
        for t in range(start, end):
            assert times[t] == batch.next_timestamps[end - 1]
            elapsed = int(times[t] - batch.timestamps[t])
            expected = rows["item"][t] + rows["side_device"][t]
            expected = expected + layer.actions.weight[batch.action_ids[t]]
            expected = expected + layer.times.weight[min(elapsed.bit_length(), 40)]
            expected = expected + dwell_row(layer.dwell_times.weight, float(batch.dwell_times[t]))
            torch.testing.assert_close(events[t], expected)
            torch.testing.assert_close(total[t], expected + rows["user_age"][b])
    assert layer.users(batch, rows) is rows["user_age"]


def test_without_features_there_is_nothing() -> None:
    layer, batch = EventFeatures(FeatureInputs(), (), SIZES, WIDTH), coded_batch([3])
    assert layer(batch, {}, batch.next_timestamps) is None
    assert not list(layer.parameters())


def test_time_buckets_are_powers_of_two() -> None:
    elapsed = [-5, 0, 1, 2, 3, 4, 2**20 - 1, 2**20, 2**39 - 1, 2**39, 2**60]
    expected = [0, 0, 1, 2, 2, 3, 20, 21, 39, 40, 40]
    assert time_buckets(torch.tensor(elapsed)).tolist() == expected


def test_dwell_buckets_are_powers_of_two_and_one_for_unknown() -> None:
    below = torch.nextafter(torch.tensor(8.0), torch.tensor(0.0))
    seconds = [nan, 0.0, 0.0624, 0.0625, 0.124, 0.125, 1.0, 1.99, float(below), 8.0, 2.0**14, 1e9]
    expected = [0, 1, 1, 2, 2, 3, 6, 6, 8, 9, 20, 20]
    assert dwell_buckets(torch.tensor(seconds)).tolist() == expected


def test_what_the_data_set_lacks_is_named() -> None:
    nothing = CatalogueSizes(50, 30, {}, {}, CODEBOOKS)
    for switch in ("actions", "dwell_times"):
        with pytest.raises(ValueError, match=rf"model\.{switch}.*prepare again"):
            EventFeatures(FeatureInputs.model_validate({switch: True}), SPECS, nothing, WIDTH)
