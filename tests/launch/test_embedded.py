"""The embedded Ray and its run do not outlive each other."""

import re
import subprocess
import sys
import time

import psutil
import pytest

from launch.user_errors import BUSY_STATUS
from tests.integration.jobs import ROOT

LOSES_ITS_HEAD = """
import os, signal, time, psutil, ray
from configs.cluster import ClusterConfig
from launch.cluster import connect
with connect(ClusterConfig()):
    below = psutil.Process().children(recursive=True)
    [head] = [p.pid for p in below if p.name() == PROCESS]
    print("others", *(p.pid for p in below if not p.name().endswith("Agent")), flush=True)
    print("killed at", time.time(), flush=True)
    os.kill(head, signal.SIGKILL)
    time.sleep(1)
    ray.cluster_resources()  # waits for it
    print("went on")
"""


@pytest.mark.slow
@pytest.mark.parametrize("process", ["gcs_server", "raylet"])
def test_a_run_whose_head_dies_says_so_and_ends(process: str) -> None:
    code = LOSES_ITS_HEAD.replace("PROCESS", repr(process))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    ended, told = time.time(), done.stdout + done.stderr
    assert done.returncode == BUSY_STATUS and "went on" not in told, told
    assert f"the head of the embedded Ray died ({process}, signal 9)" in done.stdout
    assert "the same command goes on" in done.stdout and "Failed to connect to GCS" not in told
    [killed] = re.findall(r"killed at (\S+)", told)
    assert ended - float(killed) < 30
    [others] = re.findall(r"others (.*)", told)
    _, alive = psutil.wait_procs(
        [psutil.Process(int(pid)) for pid in others.split() if psutil.pid_exists(int(pid))], 20
    )
    assert not alive
