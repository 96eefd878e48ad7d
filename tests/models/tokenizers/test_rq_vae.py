"""RQ-VAE and Sinkhorn against formulas, dead codes, and a loss that falls."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from configs.tokenizers import RQVAEConfig, SinkhornConfig
from models.tokenizers.fit import fit_quantizer
from models.tokenizers.quality import code_counts, level_use
from models.tokenizers.rq_vae import RQVAE
from models.tokenizers.rq_vae_training import keyed_batches, num_steps, train_rq_vae
from models.tokenizers.shards import LocalShards, take_codes
from models.tokenizers.sinkhorn import sinkhorn, spread_codes
from tests.models.tokenizers.clouds import clouds

SMALL = RQVAEConfig(
    codebook_size=16,
    code_width=16,
    hidden=(32,),
    epochs=30,
    warmup_epochs=5,
    batch_size=64,
    lr=3e-3,
)


def started(config: RQVAEConfig, data: Tensor) -> RQVAE:
    torch.manual_seed(0)
    model = RQVAE(config, data.shape[1])
    model.fit_scale(data)
    model.start_codebooks(data, seed=1)
    return model


def test_loss_equals_the_loop() -> None:
    data = clouds(300, 8, 20, seed=1)
    model = started(SMALL, data)
    terms = model(data[:10])
    reconstruction = codebook = commitment = 0.0
    for row, codes in zip(data[:10], terms.codes.tolist(), strict=True):
        target = (row - model.center) / model.scale
        z = model.encoder(target)
        residual, quantized = z, torch.zeros_like(z)
        for level, book in enumerate(model.codebooks):
            distances = [float((residual - e).detach().square().sum()) for e in book]
            assert codes[level] == min(range(16), key=distances.__getitem__)
            codebook += distances[codes[level]] / 10
            commitment += distances[codes[level]] / 10
            quantized = quantized + book[codes[level]]
            residual = residual - book[codes[level]]
        rebuilt = model.decoder(quantized).detach()
        reconstruction += float((target - rebuilt).square().sum()) / 10
    assert float(terms.reconstruction.detach()) == pytest.approx(reconstruction, rel=1e-4)
    assert float(terms.codebook.detach()) == pytest.approx(codebook, rel=1e-4)
    assert float(terms.commitment.detach()) == pytest.approx(commitment, rel=1e-4)
    total = reconstruction + codebook + 0.25 * commitment
    assert float(terms.total(0.25).detach()) == pytest.approx(total, rel=1e-4)
    assert torch.equal(terms.codes, model.encode(data[:10]))


def test_gradients_pass_straight_through() -> None:
    data = clouds(300, 8, 20, seed=2)
    model = started(SMALL, data)
    x = data[:12]
    terms = model(x)
    terms.total(0.25).backward()
    z = model.encoder((x - model.center) / model.scale).detach()
    quantized = sum(book[terms.codes[:, level]] for level, book in enumerate(model.codebooks))
    # By hand: dL/dz = dL_reconstruction/dẑ at ẑ, plus 2β Σ_l (r_l − e_l) / B.
    at = quantized.detach().requires_grad_()
    target = (x - model.center) / model.scale
    (target - model.decoder(at)).square().sum(1).mean().backward()
    by_hand, residual = at.grad.clone(), z
    for level, book in enumerate(model.codebooks):
        chosen = book.detach()[terms.codes[:, level]]
        expected = torch.zeros_like(book).index_add_(
            0, terms.codes[:, level], 2 * (chosen - residual) / 12
        )
        torch.testing.assert_close(book.grad, expected, rtol=1e-4, atol=1e-6)
        by_hand += 0.25 * 2 * (residual - chosen) / 12
        residual = residual - chosen
    torch.testing.assert_close(model.encoder[-1].bias.grad, by_hand.sum(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("warmup", [0.0, 5.0])
def test_the_loss_falls_and_codes_are_used(warmup: float) -> None:
    data = clouds(1000, 16, 60, seed=3)
    losses: dict[int, float] = {}
    where = LocalShards.of(data)
    config = SMALL.model_copy(update={"warmup_epochs": warmup})
    model = fit_quantizer(
        where, 16, config, seed=2, progress=lambda step, total, loss: losses.update({step: loss})
    )
    warm_steps = num_steps(config, 1000)[0]
    coded = [loss for step, loss in losses.items() if step > warm_steps]
    assert coded[-1] < (0.95 if warmup else 0.75) * coded[0]
    codes = where.map(take_codes)[0]
    assert torch.equal(codes, model.encode(data))
    for counts in code_counts(codes, model.codebook_sizes):
        assert level_use(counts).utilisation > 0.9
    variance = (data - data.mean(0)).square().sum()
    assert (model.decode(codes) - data).square().sum() < 0.4 * variance


def test_training_does_not_depend_on_shards() -> None:
    data = clouds(700, 8, 20, seed=4)
    config = SMALL.model_copy(update={"epochs": 2.0, "warmup_epochs": 1.0})
    one, many = LocalShards.of(data), LocalShards.of(data, 3)
    first, second = (fit_quantizer(where, 8, config, seed=5) for where in (one, many))
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert torch.equal(one.map(take_codes)[0], torch.cat(many.map(take_codes)))
    third = fit_quantizer(one, 8, config, seed=6)
    assert not torch.equal(first.codebooks[0], third.codebooks[0])


def test_batches_are_keyed_draws() -> None:
    data = torch.arange(1000.0)[:, None]
    batches = list(keyed_batches(LocalShards.of(data, 4), 1000, 50, steps=40, seed=1))
    assert [batch.shape for batch in batches] == [(50, 1)] * 40
    again = list(keyed_batches(LocalShards.of(data), 1000, 50, steps=20, seed=1))
    assert torch.equal(torch.cat(batches[:20]), torch.cat(again))
    drawn = torch.cat(batches)
    assert 800 < len(drawn.unique()) < 920  # of 1000, by 2000 draws: 865 expected
    assert num_steps(RQVAEConfig(epochs=0.5, warmup_epochs=0.1, batch_size=100), 1000) == (1, 5)
    assert num_steps(RQVAEConfig(epochs=0.5, warmup_epochs=0, batch_size=100), 1) == (0, 1)


@settings(deadline=None, max_examples=15)
@given(st.integers(8, 2500), st.floats(0.01, 3), st.floats(0, 0.999))
def test_codebooks_are_started_however_few_the_steps(
    items: int, epochs: float, warmup: float
) -> None:
    config = RQVAEConfig(
        num_levels=2, codebook_size=8, hidden=(8,), code_width=4, epochs=epochs,
        warmup_epochs=warmup * epochs,
    )  # fmt: skip
    warm_steps, steps = num_steps(config, items)
    assert 0 <= warm_steps < steps
    where = LocalShards.of(torch.randn(items, 4, generator=torch.Generator().manual_seed(1)))
    fit_quantizer(where, 4, config)
    first = code_counts(where.map(take_codes)[0], config.codebook_sizes)[0]
    assert (first > 0).sum() > 1  # of books that were never started every code is the first


def test_any_seed_fits_and_codes_that_are_never_revived_are_kept_in_a_dump() -> None:
    config = RQVAEConfig(
        num_levels=1, codebook_size=4, hidden=(8,), code_width=4, epochs=1, warmup_epochs=0
    )
    where = LocalShards.of(clouds(40, 4, 3, seed=1))
    fit_quantizer(where, 4, config, seed=(1 << 63) - 1)
    never = config.model_copy(update={"dead_code_threshold": 0.0})
    assert RQVAEConfig.model_validate(never.model_dump()) == never


def test_dead_codes_come_back() -> None:
    data = clouds(500, 8, 20, seed=6)
    model = started(SMALL, data)
    with torch.no_grad():
        model.codebooks[1][3:] = 1e3
        model.codebooks[1][3:] += torch.arange(13.0)[:, None]
    used = model.encode(data)[:, 1]
    assert used.max() < 3
    kept = model.codebooks[1][:3].clone()
    for step in range(150):
        terms = model(data)
        model.track_usage(terms.codes)
        draws = [torch.arange(16) * 7 + step for _ in range(3)]
        model.revive(terms.residuals, draws)
    assert torch.equal(model.codebooks[1][:3], kept)
    counts = code_counts(model.encode(data), model.codebook_sizes)[1]
    assert level_use(counts).utilisation > 0.9
    assert all(abs(float(usage.sum()) - 1) < 0.3 for usage in model.usage)


def test_a_loss_that_is_not_finite_is_said() -> None:
    data = clouds(300, 8, 20, seed=7)
    model = started(SMALL, data)
    with pytest.raises(ValueError, match=r"not finite by step 2; lower tokenizer\.quantizer\.lr"):
        train_rq_vae(model, [data, data * float("nan")], data, (1, 2))


def test_sinkhorn_equals_the_plain_iteration_and_has_its_marginals() -> None:
    distances = torch.rand(40, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plan = torch.exp(-distances / (0.1 * distances.mean()))
    for _ in range(200):
        plan = plan / plan.sum(0) / 8
        plan = plan / plan.sum(1, keepdim=True) / 40
    found = sinkhorn(distances, 0.1, 200)
    torch.testing.assert_close(found.double(), plan, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(found.sum(1), torch.full((40,), 1 / 40))
    torch.testing.assert_close(found.sum(0), torch.full((8,), 1 / 8), rtol=1e-3, atol=0)
    crowded = torch.rand(64, 8, generator=torch.Generator().manual_seed(1))
    crowded[:, 0] *= 0.1
    assert int((crowded.argmin(1) == 0).sum()) > 30
    assert int(torch.bincount(spread_codes(crowded, 0.02, 200)).max()) <= 12
    assert torch.isfinite(sinkhorn(torch.zeros(4, 2), 0.1, 3)).all()


def test_sinkhorn_spreads_the_last_level_in_training_only() -> None:
    data = clouds(640, 8, 4, seed=8, noise=0.05)
    config = SMALL.model_copy(update={"sinkhorn": SinkhornConfig()})
    plain, spread = started(SMALL, data)(data).codes, started(config, data)
    codes = spread(data).codes
    assert torch.equal(plain[:, :2], codes[:, :2])
    even = [level_use(code_counts(c, (16,) * 3)[2]).gini for c in (plain, codes)]
    assert even[1] < even[0]
    assert torch.equal(spread.encode(data), plain)
