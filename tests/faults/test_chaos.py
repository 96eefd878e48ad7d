"""Random faults over one training; the final state is the calm run's, bit for bit.

Twenty faults by default. A longer form, and a course of faults again:

    TANDEM_CHAOS_FAULTS=100 pytest tests/faults/test_chaos.py
    TANDEM_CHAOS_SEED=123 pytest tests/faults/test_chaos.py
"""

import os
import random
from pathlib import Path

import pytest

from configs.layout import RunLayout
from tests.faults.trainings import (
    FINGERPRINT,
    KINDS,
    OF_RANK_0,
    STEPS_PER_EPOCH,
    Fault,
    attempt,
    course,
    saved_steps,
    settings,
    write_data,
)

STEPS_PER_FAULT = 5
FLIPPED_BIT = "kill, and a flipped bit in the newest checkpoint"


def draw_faults(seed: int, count: int) -> list[Fault]:
    """One in each stretch of the training."""
    rng = random.Random(seed)
    faults = []
    for number in range(count):
        kind = rng.choice([*KINDS, FLIPPED_BIT])
        rank = 0 if kind in OF_RANK_0 else rng.randrange(2)
        step = number * STEPS_PER_FAULT + rng.randrange(1, STEPS_PER_FAULT + 1)
        faults.append(Fault(kind, rank, step))
    return faults


def flip_a_bit(root: Path, rng: random.Random) -> str:
    """In any file of the newest checkpoint, if it is not the only one; which."""
    newest = Path(RunLayout(str(root)).checkpoints("train", FINGERPRINT))
    committed = sorted(
        (path.parent for path in newest.glob("*/MANIFEST.json")), key=lambda p: p.name.split("-")[2]
    )
    if len(committed) < 2:
        return "nothing to flip"
    file = rng.choice(sorted(path for path in committed[-1].iterdir() if path.stat().st_size))
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    return f"{committed[-1].name}/{file.name}"


@pytest.mark.slow
def test_random_faults_change_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count = int(os.environ.get("TANDEM_CHAOS_FAULTS", "20"))
    seed = int(os.environ.get("TANDEM_CHAOS_SEED", str(random.SystemRandom().randrange(10**6))))
    rng, faults = random.Random(seed), draw_faults(seed, count)
    epochs = -(-(count * STEPS_PER_FAULT + 2) // STEPS_PER_EPOCH)
    said = [f"\nchaos: TANDEM_CHAOS_SEED={seed} TANDEM_CHAOS_FAULTS={count}, {epochs} epochs"]
    calm, disturbed = tmp_path / "calm", tmp_path / "disturbed"
    for root in (calm, disturbed):
        write_data(root)
    undisturbed = course(calm, attempt(settings(calm, epochs)))
    told = settings(disturbed, epochs)
    for fault in faults:
        kill = Fault("kill", fault.rank, fault.step) if fault.kind == FLIPPED_BIT else fault
        outcomes = attempt(told, kill)
        assert not all(isinstance(outcome, dict) for outcome in outcomes), f"{fault} did not come"
        ends = ", ".join(type(o).__name__ if isinstance(o, Exception) else str(o) for o in outcomes)
        saved = saved_steps(disturbed)
        line = f"  {fault}: ranks ended with {ends}; saved at {saved[-1] if saved else 'no step'}"
        if fault.kind == FLIPPED_BIT:
            line += f"; flipped: {flip_a_bit(disturbed, rng)}"
        said.append(line)
    found = course(disturbed, attempt(told))
    assert found == undisturbed, "\n".join(said)
    said.append(f"  {len(found.losses)} steps, {len(found.state)} tensors: equal to the calm run's")
    with capsys.disabled():
        print("\n".join(said))
