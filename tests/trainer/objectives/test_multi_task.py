"""The multi-task loss against a loop over candidates, and what its outputs mean."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from configs.models import HSTURankingConfig
from configs.objectives import DwellTask, LabelTask, MultiTaskConfig, PScoreConfig
from models.base import TableSpec
from models.hstu_ranking import HSTURanking
from tests.models.sequences import make_batch
from trainer.objectives.multi_task import MultiTaskLoss, RankingInputs

LABELS = ("like", "hate", "view")
OBJECTIVE = MultiTaskConfig(
    tasks=(LabelTask(label="view"), DwellTask(weight=0.5), LabelTask(label="like", weight=3.0)),
    p_score=PScoreConfig(weights={"like": 2.0, "hate": -1.0}, loss_weight=0.25),
)


def build(objective: MultiTaskConfig = OBJECTIVE) -> MultiTaskLoss:
    torch.manual_seed(0)
    config = HSTURankingConfig(
        width=4, num_layers=1, num_heads=1, qk_width=4, v_width=4, mlp_width=5
    )
    specs = (TableSpec("item", 21, 4, 0.02),)
    p_score = objective.p_score is not None
    model = HSTURanking(config, specs, 6, len(LABELS), len(objective.tasks), p_score)
    return MultiTaskLoss(model, objective, LABELS).eval()


def inputs_of(seed: int = 0) -> RankingInputs:
    draw = torch.Generator().manual_seed(seed)
    batch = make_batch([3, 0, 6], 20, seed)
    labels = torch.randint(0, 8, (batch.num_tokens,), generator=draw)
    ids = torch.tensor([[1, 2], [3, 0], [4, 5]])
    dwell = torch.tensor([[2.0, math.nan], [0.0, 5.0], [60.0, math.nan]])
    masks = torch.randint(0, 8, (3, 2), generator=draw)
    counts = torch.tensor([9.0, 4.0, 9.0, 9.0, 9.0])
    return RankingInputs(replace(batch, labels=labels), ids, masks, dwell, counts, 6, 0)


def run(loss: MultiTaskLoss, inputs: RankingInputs) -> tuple[Any, Tensor]:
    table = torch.randn(21, 4, generator=torch.Generator().manual_seed(7))
    table[0] = 0
    wanted = loss.required_ids(inputs)
    assert {name: set(ids) for name, ids in wanted.items()} == {"item": {"history", "candidates"}}
    output = loss(inputs, {"item": table}, wanted)
    rows = table[inputs.candidate_ids]
    embeddings = {"item": table[inputs.batch.item_ids]}
    return output, loss.model(inputs.batch, embeddings, rows, inputs.longest, 0)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_the_loss_is_that_of_a_loop() -> None:
    loss, inputs = build(), inputs_of()
    output, logits = run(loss, inputs)
    sums = dict.fromkeys(("view", "dwell", "like", "p_score"), 0.0)
    for n in range(3):
        for m in range(2):
            if not inputs.candidate_ids[n, m]:
                continue
            view, dwell, like, score = logits[n, m].tolist()
            bits = [int(inputs.labels[n, m]) >> bit & 1 for bit in range(3)]
            sums["view"] += softplus(-view if bits[2] else view)
            sums["like"] += softplus(-like if bits[0] else like)
            seconds = inputs.dwell_times[n, m].item()
            if not math.isnan(seconds):
                sums["dwell"] += (dwell - math.log(1 + seconds)) ** 2
            liked = softplus(-score if bits[0] else score)
            not_hated = softplus(score if bits[1] else -score)
            sums["p_score"] += (2 * liked + not_hated) / 3
    # Over the global batch: 9 candidates, of which 4 say how long they were watched.
    means = {name: sums[name] / (4 if name == "dwell" else 9) for name in sums}
    total = means["view"] + 0.5 * means["dwell"] + 3 * means["like"] + 0.25 * means["p_score"]
    assert (output.loss_sum / 9).item() == pytest.approx(total, rel=1e-5)
    assert loss.weight(inputs).item() == 5
    for name, value in sums.items():
        assert output.metrics[f"loss_{name}"].item() == pytest.approx(value, rel=1e-5)
        assert output.terms[f"loss_{name}"] == (3 if name == "dwell" else 5)


def test_nothing_is_measured_of_what_nobody_says() -> None:
    inputs = inputs_of()
    unknown = torch.full_like(inputs.dwell_times, math.nan)
    output, _ = run(build(), replace(inputs, dwell_times=unknown))
    assert [name for name, number in output.terms.items() if not number] == ["loss_dwell"]
    assert output.terms.keys() == output.metrics.keys() and output.loss_sum.isfinite()


def test_what_is_not_there_changes_nothing() -> None:
    loss, inputs = build(), inputs_of()
    before, _ = run(loss, inputs)
    labels, dwell = inputs.labels.clone(), inputs.dwell_times.clone()
    labels[1, 1] ^= 7
    dwell[1, 1] = 1e6
    after, _ = run(loss, replace(inputs, labels=labels, dwell_times=dwell))
    assert after.loss_sum == before.loss_sum


def test_outputs_read_as_probabilities_and_seconds() -> None:
    targets = build().targets
    assert targets.names == ("view", "dwell", "like", "p_score")
    assert targets.label_outputs == {"view": (0, 2), "like": (2, 0)} and targets.dwell_output == 1
    assert targets.score_labels == {"like": (0, False), "no_hate": (1, True)}
    read = targets.readable(torch.tensor([[0.0, math.log(11.0), 2.0, -1.0], [9.0, -3.0, 0.0, 0.0]]))
    assert read["view"].tolist() == pytest.approx([0.5, 1 / (1 + math.exp(-9))])
    assert read["dwell"].tolist() == pytest.approx([10.0, 0.0], abs=1e-5)
    assert read["p_score"][0].item() == pytest.approx(1 / (1 + math.e))


def test_tasks_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValidationError, match="names of their own"):
        MultiTaskConfig(tasks=(LabelTask(label="a"), LabelTask(label="a")))
    with pytest.raises(ValidationError, match="names of their own"):
        MultiTaskConfig(tasks=(LabelTask(label="p_score"),))
    with pytest.raises(ValidationError, match="names of their own"):
        MultiTaskConfig(tasks=(LabelTask(label="dwell"),))
    with pytest.raises(ValidationError, match=r"\['a'\] are 0"):
        PScoreConfig(weights={"a": 0.0, "b": 1.0})
    with pytest.raises(ValueError, match="names the label 'follow'"):
        build(MultiTaskConfig(tasks=(LabelTask(label="follow"),)))
