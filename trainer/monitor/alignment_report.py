"""What the report shows of an alignment's steps: its numbers, and the reward against the metric."""

from collections.abc import Sequence

from trainer.monitor.figures import metric_label, shown
from trainer.monitor.plots import Curve, curve
from trainer.monitor.tracker import MetricRow

PART = "train/"
BY_THE_WAY = ("loss", "lr", "sparse_lr", "dense_grad_norm")
"""Of every training stage; the loss has a figure of its own where it says something."""
LABELS = {
    "reward": "Reward, mean",
    "reward_std": "Reward, standard deviation in a group",
    "reward_best": "Reward of the winner",
    "reward_worst": "Reward of the loser",
    "zero_std": "Groups whose rewards are all equal, share",
    "tied": "Prompts without a pair, share",
    "unique": "Distinct items in a group, share",
    "legality": "Items of the catalogue, share",
    "kl": "KL divergence from the reference",
    "entropy": "Entropy (-log π of candidates)",
    "ratio": "Ratio to the policy that generated",
    "clip_low": "Ratios clipped from below, share",
    "clip_high": "Ratios clipped from above, share",
    "bounded": "Ratios bounded, share",
    "accuracy": "Pairs ranked right, share",
    "margin": "Preference margin",
    "rewards/chosen": "Implicit reward of winners",
    "rewards/rejected": "Implicit reward of losers",
}


def training_numbers(rows: Sequence[MetricRow]) -> list[dict[str, str]]:
    """A table: what each logged step measured, at first, at last, and between which bounds."""
    tags = dict.fromkeys(tag for row in rows for tag in row.values if tag.startswith(PART))
    names = [tag.removeprefix(PART) for tag in tags]
    order = list(LABELS)
    names.sort(key=lambda name: order.index(name) if name in LABELS else len(order))
    table = []
    for name in names:
        found = curve(rows, PART + name)
        if found is None or name in BY_THE_WAY:
            continue
        first, last = _thirds(found)
        table.append(
            {
                "Measured": _label(name),
                "first third": shown(first),
                "last third": shown(last),
                "lowest": shown(float(found.values.min())),
                "highest": shown(float(found.values.max())),
            }
        )
    return table


def reward_sentence(rows: Sequence[MetricRow], metric: str) -> str | None:
    """Where the reward went, and where the metric on validation; None where one is not logged."""
    reward, judged = curve(rows, "train/reward"), curve(rows, f"validation/{metric}")
    if reward is None or judged is None or len(judged.steps) < 2:
        return None
    (first, last), start, end = _thirds(reward), float(judged.values[0]), judged.last
    told = (
        f"The mean reward went from {shown(first)} in the first third of the steps to "
        f"{shown(last)} in the last, {metric_label(metric)} on validation from {shown(start)} to "
        f"{shown(end)}"
    )
    if last > first and end < start:
        told += ": a reward that rises while the metric falls may be hacked"
    return f"{told}."


def _label(name: str) -> str:
    if name in LABELS:
        return LABELS[name]
    kind, _, part = name.partition("/")
    words = f"{kind}, part {part}" if part else kind
    return words.replace("_", " ").capitalize()


def _thirds(found: Curve) -> tuple[float, float]:
    """Means over the first and the last third of what was logged."""
    share = max(1, len(found.values) // 3)
    return float(found.values[:share].mean()), float(found.values[-share:].mean())
