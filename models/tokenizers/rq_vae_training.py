"""Training of an RQ-VAE: a plain loop over batches, wherever they come from.

Shape legend: B rows of a batch, m rows of the start, D width, K codes.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from configs.tokenizers import RQVAEConfig
from models.ops.keyed_sampling import keyed_integers
from models.tokenizers.kmeans import Progress, no_progress
from models.tokenizers.rq_vae import RQVAE
from models.tokenizers.shards import Shard, Shards, gather_rows, keyed_sample, measure

START_ROWS_PER_CODE = 32
ROWS_FETCHED = 1 << 16
"""Rows asked of the shards at once, so that a step does not wait for a round trip."""
BATCH_SALT, REVIVE_SALT = 0x5251, 0x5256


def num_steps(config: RQVAEConfig, rows: int) -> int:
    """Optimizer steps that `epochs` over `rows` items take; at least one."""
    return max(round(config.epochs * rows / config.batch_size), 1)


def train_rq_vae(
    model: RQVAE,
    batches: Iterable[Tensor],
    total_steps: int,
    *,
    seed: int = 0,
    progress: Progress = no_progress,
    progress_every: int = 50,
) -> None:
    """One AdamW step for each of `batches` [B, D], the rate falling along a cosine.

    `model.start` must have been called. `progress` hears the mean loss since its last call, so
    that the device is read once in `progress_every` steps.

    Raises:
        ValueError: the loss stopped being finite.
    """
    config = model.config
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total_steps)
    device = model.center.device
    heard = torch.zeros((), device=device)
    last = 0
    model.train()
    for step, batch in enumerate(batches, start=1):
        rows = batch.to(device)
        terms = model(rows)
        loss = terms.total(config.beta)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if config.dead_code_threshold > 0:
            model.track_usage(terms.codes)
            model.revive(terms.residuals, _revival_draws(model, len(rows), seed, step))
        heard += loss.detach()
        if step % progress_every == 0 or step == total_steps:
            mean = float(heard) / (step - last)
            if not mean < float("inf"):
                raise ValueError(
                    f"the RQ-VAE's loss is not finite by step {step}; lower tokenizer.lr"
                )
            progress(step, total_steps, mean)
            heard.zero_()
            last = step
    model.eval()


def _revival_draws(model: RQVAE, rows: int, seed: int, step: int) -> list[Tensor]:
    key = torch.tensor([seed * 1_000_003 + step], device=model.center.device)
    salts = range(REVIVE_SALT, REVIVE_SALT + len(model.codebook_sizes))
    return [
        keyed_integers(key, size, rows, salt)[0]
        for size, salt in zip(model.codebook_sizes, salts, strict=True)
    ]


def keyed_batches(
    shards: Shards, rows: int, batch_size: int, steps: int, seed: int
) -> Iterator[Tensor]:
    """`steps` batches [batch_size, D] drawn uniformly, with replacement, from all shards.

    Batch s is a pure function of (seed, s): it depends on no split over shards, and needs no
    permutation of the catalogue in memory.
    """
    ahead = max(ROWS_FETCHED // batch_size, 1)
    for first in range(0, steps, ahead):
        keys = torch.arange(first, min(first + ahead, steps)) + seed * 1_000_003
        ids = keyed_integers(keys, batch_size, rows, BATCH_SALT)
        yield from gather_rows(shards, ids.view(-1)).split(batch_size)


def fit_rq_vae(
    shards: Shards,
    width: int,
    config: RQVAEConfig,
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    progress: Progress = no_progress,
) -> RQVAE:
    """Train on batches drawn from all shards, then give every shard its rows' `codes`.

    The model trains in this process on `device`; shards deliver rows and encode their own.

    Raises:
        ValueError: fewer rows than codes, numbers that are not finite, or a loss that is not.
    """
    extent = measure(shards)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = RQVAE(config, width).to(device)
    start_rows = max(*config.codebook_sizes, 64) * START_ROWS_PER_CODE
    model.start(keyed_sample(shards, start_rows, extent.rows, seed).to(device), seed)
    steps = num_steps(config, extent.rows)
    batches = keyed_batches(shards, extent.rows, config.batch_size, steps, seed)
    train_rq_vae(model, batches, steps, seed=seed, progress=progress)
    model = model.to("cpu")
    shards.map(encode_rows, model)
    return model


def encode_rows(shard: Shard, model: RQVAE) -> None:
    """Task: the frozen model's codes of the shard's rows."""
    shard.codes = model.to(shard.rows.device).encode(shard.rows)
