"""The driver's end of what workers tell, where nobody reads it any more."""

import os
import subprocess
import sys
import time

import pytest

from tests.integration.jobs import ROOT

FAILS = """
import sys, time
from configs.cluster import ClusterConfig
from launch import console
from launch.cluster import connect
console.LAST_WORDS_S = 0.5
with connect(ClusterConfig()):
    with console.Console() as lines:
        lines.line()("x" * 1_000_000)
        time.sleep(2)
        raise SystemExit(7)
"""


@pytest.mark.slow
def test_a_run_that_is_given_up_ends_although_its_reader_has_stopped() -> None:
    ours, theirs = os.pipe()
    job = subprocess.Popen(
        [sys.executable, "-c", FAILS],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=theirs,
    )  # fmt: skip
    os.close(theirs)
    try:
        assert os.read(ours, 1) == b"x"
        read = time.monotonic()
        status = job.wait(timeout=60)
        assert status == 7 and time.monotonic() - read < 60
    finally:
        job.kill()
        os.close(ours)
