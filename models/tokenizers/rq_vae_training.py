"""Training of an RQ-VAE: a plain loop over batches, wherever they come from.

Shape legend: B rows of a batch, m rows of the start, D width, K codes.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from configs.tokenizers import RQVAEConfig
from models.ops.hashing import as_signed
from models.ops.keyed_sampling import keyed_integers
from models.tokenizers.kmeans import Progress, check_enough_rows, no_progress
from models.tokenizers.rq_vae import RQVAE
from models.tokenizers.shards import Shard, Shards, gather_rows, keyed_sample, measure

START_ROWS_PER_CODE = 32
ROWS_FETCHED = 1 << 16
"""Rows asked of the shards at once, so that a step does not wait for a round trip."""
PROGRESS_STEPS = 50
BATCH_SALT, REVIVE_SALT = 0x5251, 0x5256


def num_steps(config: RQVAEConfig, rows: int) -> tuple[int, int]:
    """Optimizer steps that warm-up and all of `epochs` over `rows` items take.

    One at least follows the warm-up, however few there are: it is what starts the codebooks.
    """
    batches = rows / config.batch_size
    every = max(round(config.epochs * batches), 1)
    return min(round(config.warmup_epochs * batches), every - 1), every


def train_rq_vae(
    model: RQVAE,
    batches: Iterable[Tensor],
    start: Tensor,
    steps: tuple[int, int],
    *,
    seed: int = 0,
    progress: Progress = no_progress,
) -> None:
    """One AdamW step for each of `batches` [B, D], the rate falling along a cosine.

    `progress` hears the mean loss since its last call, so that the device is read once in
    `PROGRESS_STEPS` steps; the loss changes its meaning at the end of the warm-up.

    Args:
        start: [m, D] rows that give centre, scale and, after the warm-up, the first codebooks.
        steps: of the warm-up, and all, which are more (see `num_steps`).

    Raises:
        ValueError: the loss stopped being finite, or fewer `start` rows than codes.
    """
    config, (warmup, every) = model.config, steps
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, every)
    device = model.center.device
    heard, last = torch.zeros((), device=device), 0
    model.fit_scale(start.to(device))
    model.train()
    for step, batch in enumerate(batches):
        if step == warmup:
            model.start_codebooks(start.to(device), seed)
        rows = batch.to(device)
        terms = model(rows) if step >= warmup else None
        loss = model.plain_loss(rows) if terms is None else terms.total(config.beta)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if terms is not None and config.dead_code_threshold > 0:
            model.track_usage(terms.codes)
            model.revive(terms.residuals, _revival_draws(model, len(rows), seed, step))
        heard += loss.detach()
        done = step + 1
        if done % PROGRESS_STEPS == 0 or done in steps:
            mean = float(heard) / (done - last)
            if not mean < float("inf"):
                raise ValueError(
                    f"the RQ-VAE's loss is not finite by step {done}; lower tokenizer.quantizer.lr"
                )
            progress(done, every, mean)
            heard, last = torch.zeros((), device=device), done
    model.eval()


def _revival_draws(model: RQVAE, rows: int, seed: int, step: int) -> list[Tensor]:
    key = torch.tensor([as_signed(seed * 1_000_003 + step)], device=model.center.device)
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
        keys = torch.arange(first, min(first + ahead, steps)) + as_signed(seed * 1_000_003)
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
    check_enough_rows(extent, max(config.codebook_sizes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = RQVAE(config, width).to(device)
    start_rows = max(*config.codebook_sizes, 64) * START_ROWS_PER_CODE
    start = keyed_sample(shards, start_rows, extent.rows, seed)
    steps = num_steps(config, extent.rows)
    batches = keyed_batches(shards, extent.rows, config.batch_size, steps[1], seed)
    train_rq_vae(model, batches, start, steps, seed=seed, progress=progress)
    model = model.to("cpu")
    shards.map(encode_rows, model)
    return model


def encode_rows(shard: Shard, model: RQVAE) -> None:
    """Task: the frozen model's codes of the shard's rows."""
    shard.codes = model.to(shard.rows.device).encode(shard.rows)
