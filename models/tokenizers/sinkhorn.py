"""Even assignment of a batch to codes by entropic optimal transport.

Shape legend: n rows, K codes.
"""

import math

import torch
from torch import Tensor


def sinkhorn(distances: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Transport plan between rows and codes: float32 [n, K].

    Rows sum to 1/n and, once the iteration has converged, columns to 1/K.

    Args:
        distances: [n, K], at least 0.
        epsilon: temperature in units of the mean distance.
        iterations: alternations, in the log domain, rows last.
    """
    n, size = distances.shape
    scores = -distances.float() / (epsilon * distances.float().mean()).clamp(min=1e-30)
    for _ in range(iterations):
        scores = scores - scores.logsumexp(0, keepdim=True) - math.log(size)
        scores = scores - scores.logsumexp(1, keepdim=True) - math.log(n)
    return scores.exp()


def spread_codes(distances: Tensor, epsilon: float, iterations: int) -> Tensor:
    """The code of most mass in each row of the plan: int64 [n]."""
    return torch.argmax(sinkhorn(distances, epsilon, iterations), dim=1)
