"""A log that has grown: its run begins with what the run before it learned."""

import os
import re
from pathlib import Path

from tests.integration.jobs import ROOT, finish, losses, start, write_recipe


def test_a_run_over_a_grown_log_begins_with_the_run_before(
    calm: tuple[Path, str], tmp_path: Path
) -> None:
    earlier = calm[0] / "run"
    recipe = write_recipe(tmp_path)
    log = tmp_path / "events.csv"
    old = log.read_text().splitlines()
    # New users, who take items that nobody took before, besides known ones.
    new = [line.replace("u", "v", 1) for line in old[1:200]]
    new += [line.replace("u", "w", 1).replace(",i", ",new", 1) for line in old[1:200]]
    log.write_text("\n".join([*old, *new]) + "\n")
    overrides = [
        "training.epochs=1",
        f"training.start.run={os.path.relpath(earlier, ROOT)}",
        "training.precision=bf16",
    ]
    overrides += ["training.zero_stage=3", "alignment=null"]
    output = finish(start("run", str(recipe), *overrides, "--until", "train"))
    assert f"beginning with the training of {earlier}" in output
    told = re.search(r"table 'item': (\d+) rows go on, (\d+) are new", output)
    assert told is not None and int(told[1]) > 30 and int(told[2]) > 0, output
    then, now = losses(earlier, "train"), losses(tmp_path / "run", "train")
    assert now[1] < then[1] - 0.5 * (then[1] - then[max(then)]), "it does not begin anew"
    own = [f"training.start.run={tmp_path / 'run'}", *overrides[2:]]
    assert "own output" in start("run", str(recipe), *own).communicate(timeout=600)[0]
