"""Means of a step, and what it could not measure."""

import torch

from sharding.step_result import StepResult


def test_a_metric_without_a_term_is_not_measured() -> None:
    def result(weight: float, pairs: float) -> StepResult:
        totals = torch.tensor([weight, 4.0, 9.0, 8.0, 3.0, 6.0, pairs], dtype=torch.float64)
        return StepResult(1, False, 0.1, 0.2, ("accuracy", "entropy"), ("accuracy",), totals)

    whole, tied, nothing = result(4.0, 5.0), result(4.0, 0.0), result(0.0, 0.0)
    assert (whole.loss, whole.metrics) == (2.0, {"accuracy": 0.6, "entropy": 1.5})
    assert (whole.dense_grad_norm, whole.sparse_grad_norm) == (2.0, 3.0) and not whole.unmeasured
    assert tied.metrics == {"entropy": 1.5} and tied.unmeasured == {"accuracy"}
    assert nothing.metrics == {} and nothing.unmeasured == {"accuracy", "entropy"}
