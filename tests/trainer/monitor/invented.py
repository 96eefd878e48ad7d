"""Invented numbers for tests of what is shown; no model was trained for them."""

import math
import random
from typing import Any

from configs.data import LeaveLastOut
from configs.recipe import Recipe
from data_loaders.manifest import DatasetManifest, EventCounts, build_manifest, write_manifest
from trainer.monitor.results import (
    ModelResult,
    OutcomeCounts,
    PreferenceCounts,
    Recommendations,
    Results,
    protocol,
)
from trainer.monitor.tracker import Tracker

KS = (1, 5, 10, 50, 200)


def recipe(**changes: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "invented",
            "output": "memory://invented",
            "data": {"source": {"kind": "public", "name": "ml-100k"}},
            "model": {"kind": "hstu"},
            "alignment": {"kind": "dpo"},
            **changes,
        }
    )


def metrics(level: float, coverage: float, tail: float) -> dict[str, float]:
    """Plausible shapes: hit rates rise with k, the tail is harder than the head."""
    result: dict[str, float] = {"users": 943, "users/head": 640, "users/tail": 303}
    for k in KS:
        hr = min(level * (k / 10) ** 0.62, 0.98)
        for suffix, factor in (("", 1.0), ("/head", 1.2), ("/tail", tail)):
            result[f"hr@{k}{suffix}"] = hr * factor
            result[f"ndcg@{k}{suffix}"] = hr * factor * (1.0 if k == 1 else 0.55)
        result[f"coverage@{k}"] = min(coverage * (k / 10) ** 0.5, 1.0)
    return result | {"mrr": level * 0.52, "mrr/head": level * 0.6, "mrr/tail": level * 0.3}


def results(**changes: Any) -> Results:
    chosen = recipe()
    content: dict[str, Any] = {
        "name": "invented numbers",
        "seed": 7,
        "protocol": protocol(chosen, "d" * 64),
        "recipe": chosen.model_dump(mode="json"),
        "versions": {"python": "3.11", "torch": "2.13.0", "ray": "2.60.0"},
        "models": {
            "popularity": ModelResult(
                validation=metrics(0.06, 0.03, 0.02), test=metrics(0.055, 0.03, 0.02)
            ),
            "pretrained": ModelResult(
                validation=metrics(0.19, 0.52, 0.5),
                test=metrics(0.181, 0.51, 0.5),
                preference_accuracy=0.583,
                checkpoint="a1" * 32,
            ),
            "aligned": ModelResult(
                validation=metrics(0.196, 0.49, 0.47),
                test=metrics(0.186, 0.48, 0.46),
                preference_accuracy=0.741,
                checkpoint="b2" * 32,
            ),
        },
        "preferences": PreferenceCounts(
            pairs=4210,
            validation_pairs=455,
            candidates=9876,
            users=601,
            liked=5000,
            disliked=1200,
            neither=800,
        ),
        "impressions": OutcomeCounts(liked=3456, disliked=78, neither=9),
    }
    return Results.model_validate(content | changes)


def recommendations(title: str = "Invented film") -> Recommendations:
    places = range(1, 11)
    users = [
        {
            "user": user,
            "history": [f"{title} seen {i}" for i in range(1, 6)],
            "items": [str(i) for i in places],
            "titles": [f"{title} {i}" for i in places],
            "scores": [0.93 - 0.031 * i for i in places],
        }
        for user in ("1", "2", "3")
    ]
    return Recommendations.model_validate({"users": users})


def log_training(url: str, steps: int = 600) -> None:
    noise = random.Random(1)
    with Tracker(url) as tracker:
        for step in range(10, steps + 1, 10):
            loss = 2.4 + 2.6 * math.exp(-step / 150) + noise.gauss(0, 0.06)
            speed = {"speed/tokens_per_s": 40e3 + noise.gauss(0, 2e3), "speed/mfu": 0.21}
            tracker.log(step, {"train/loss": loss, "train/lr": 1e-3, "epoch": step / 60, **speed})
            if step % 60 == 0:
                level = 0.196 * (1 - math.exp(-step / 160))
                row = {f"validation/{k}": v for k, v in metrics(level, 0.5, 0.5).items()}
                tracker.log(step, row)


def log_alignment(url: str, steps: int = 120) -> None:
    noise = random.Random(2)
    with Tracker(url) as tracker:
        for step in range(5, steps + 1, 5):
            grown = 1 - math.exp(-step / 60)
            row = {
                "train/loss": 3.1 - 0.25 * grown + noise.gauss(0, 0.02),
                "train/accuracy": 0.56 + 0.2 * grown + noise.gauss(0, 0.012),
                "train/margin": 1.3 * grown + noise.gauss(0, 0.04),
            }
            tracker.log(step, row)
            if step % 60 == 0:
                kept = {f"validation/{k}": v for k, v in metrics(0.19, 0.5, 0.5).items()}
                tracker.log(step, {**kept, "validation/preference_accuracy": 0.57 + 0.17 * grown})


def manifest(url: str) -> DatasetManifest:
    content = build_manifest(
        name="invented",
        num_users=943,
        num_items=1682,
        num_events=99_000,
        user_features={},
        side_features={},
        actions=0,
        has_ratings=True,
        split=LeaveLastOut(),
        counts=EventCounts(
            read=100_000,
            kept=99_000,
            quarantined={"duplicate": 741, "null_timestamp": 212, "<b>odd</b>": 47},
            below_min_rating=0,
            core_removed=0,
        ),
        length_histogram={16: 209, 32: 231, 64: 214, 128: 177, 256: 91, 512: 21},
        shards=(),
        items=(),
        vocabularies=(),
        quarantine=(),
    )
    write_manifest(url, content)
    return content
