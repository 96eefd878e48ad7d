"""How well probabilities order and foretell what users did; merges over ranks through sums.

The AUC is that of scores in bins, of 1/1600 of a logit at zero, 1/200 at one, 1/20 at ten, so that
they tell timid scores and confident ones apart: a histogram of events with the label and one of
those without, whose ties count half. Its confidence interval is a bootstrap over *users*, since
events of a user are not independent: in replicate r each user counts Poisson(1) times, a hash of
(user, r), so that one pass and one histogram a replicate do, on any number of ranks.

Shape legend: E events of a call, L labels, R replicates (the first is the data itself), H bins.
"""

import math
from typing import Any

import torch
from torch import Tensor

from models.ops.hashing import GOLDEN_64, as_signed, mix64

REPLICATES = 100
BINS, LIMIT = 4000, 8e3
"""Bins of asinh(8 logit) for 8 logit in ±LIMIT; what lies beyond is in the outermost."""
CALIBRATION_BINS = 15
_POISSON = torch.tensor(
    [sum(math.exp(-1) / math.factorial(i) for i in range(k + 1)) for k in range(8)]
)


class LabelMetrics:
    """AUC with its interval, calibration and cross entropy of L labels.

    Each rank updates its own; `sums()` of all ranks are added up and given to `result`.
    """

    def __init__(self, names: tuple[str, ...], device: torch.device | str) -> None:
        self.names = names
        shape = (len(names), 2, REPLICATES + 1, BINS)
        self._counts = torch.zeros(shape, dtype=torch.float64, device=device)
        self._sums = torch.zeros(len(names), 2, BINS, dtype=torch.float64, device=device)

    def update(self, logits: Tensor, truth: Tensor, user_ids: Tensor) -> None:
        """Add events: logits [E, L], truth [E, L] of 0 and 1, user ids [E] int64."""
        logits = logits.float()
        weights = _bootstrap_weights(user_ids)  # [R + 1, E]
        place = (8 * logits).asinh() / math.asinh(LIMIT)
        bins = ((place + 1) * (BINS / 2)).long().clamp(0, BINS - 1)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            logits, truth.to(logits.dtype), reduction="none"
        )
        for at in range(len(self.names)):
            own, right = bins[:, at], truth[:, at].bool()
            for side, chosen in enumerate((~right, right)):
                places = own[chosen].expand(len(weights), -1)
                self._counts[at, side].scatter_add_(1, places, weights[:, chosen])
            self._sums[at, 0].index_add_(0, own, torch.sigmoid(logits[:, at]).double())
            self._sums[at, 1].index_add_(0, own, loss[:, at].double())

    def sums(self) -> tuple[Tensor, Tensor]:
        """This rank's sums; add over ranks."""
        return self._counts.clone(), self._sums.clone()

    def result(self, counts: Tensor, sums: Tensor) -> tuple[dict[str, float], dict[str, Any]]:
        """Metrics, and the calibration curve of each label.

        `auc/<label>` and its 95% interval `auc_low/`, `auc_high/`; `ece/`; `ne/`, cross entropy
        over that of the base rate; `rate/`, the share of events with the label; `auc`, the mean.
        Labels that all events have, or none, have no AUC. A curve is a list of (mean probability,
        share with the label, events) over bins of about equal size.

        Raises:
            ValueError: a score is not a number; no order of such events says anything.
        """
        metrics: dict[str, float] = {"events": float(counts[0, :, 0].sum()) if self.names else 0.0}
        curves: dict[str, Any] = {}
        aucs = []
        for at, name in enumerate(self.names):
            if sums[at].isnan().any():
                raise ValueError(
                    f"the model's scores of {name!r} are not numbers for some events: its weights "
                    "are broken; go back to an earlier checkpoint, or train with a lower "
                    "training.optimizer.lr"
                )
            absent, there = counts[at]
            values = _auc(absent, there)
            total, positives = float(counts[at, :, 0].sum()), float(there[0].sum())
            rate = positives / max(total, 1.0)
            metrics[f"rate/{name}"] = rate
            if values[0].isfinite():
                spread = values[1:][values[1:].isfinite()].std().item() if REPLICATES > 1 else 0.0
                auc = values[0].item()
                aucs.append(auc)
                metrics |= {
                    f"auc/{name}": auc,
                    f"auc_low/{name}": max(auc - 1.96 * spread, 0.0),
                    f"auc_high/{name}": min(auc + 1.96 * spread, 1.0),
                }
                entropy = -(rate * math.log(rate) + (1 - rate) * math.log1p(-rate))
                metrics[f"ne/{name}"] = float(sums[at, 1].sum()) / total / entropy
            curve = _curve(counts[at, :, 0].sum(0), there[0], sums[at, 0])
            curves[name] = curve
            error = sum(abs(p - share) * n for p, share, n in curve) / max(total, 1.0)
            metrics[f"ece/{name}"] = error
        if aucs:
            metrics["auc"] = sum(aucs) / len(aucs)
        return metrics, curves


def _bootstrap_weights(user_ids: Tensor) -> Tensor:
    """[R + 1, E] float64: ones, then Poisson(1) draws that events of a user share."""
    replicate = torch.arange(1, REPLICATES + 1, device=user_ids.device)[:, None]
    bits = mix64(mix64(user_ids)[None, :] + replicate * as_signed(GOLDEN_64))
    uniform = ((bits >> 11) & ((1 << 52) - 1)).double() / 2.0**52
    drawn = torch.bucketize(uniform, _POISSON.to(uniform), right=True).double()
    return torch.cat([torch.ones_like(drawn[:1]), drawn])


def _auc(absent: Tensor, there: Tensor) -> Tensor:
    """Probability [R + 1] that an event with the label scores above one without; NaN without both.

    Arguments are histograms [R + 1, H].
    """
    below = absent.cumsum(1) - absent
    return (there * (below + 0.5 * absent)).sum(1) / (there.sum(1) * absent.sum(1))


def _curve(events: Tensor, there: Tensor, probability: Tensor) -> list[tuple[float, float, float]]:
    """(mean probability, share with the label, events) of bins of about equal size, by score."""
    total = events.sum()
    group = (events.cumsum(0) - events / 2) * CALIBRATION_BINS / total.clamp(min=1.0)
    group = group.long().clamp(0, CALIBRATION_BINS - 1)
    sums = torch.zeros(3, CALIBRATION_BINS, dtype=torch.float64, device=events.device)
    for row, values in zip(sums, (probability, there, events), strict=True):
        row.index_add_(0, group, values.double())
    kept = sums[:, sums[2] > 0]
    return [(p / n, y / n, n) for p, y, n in kept.T.tolist()]
