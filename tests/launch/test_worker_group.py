"""A dead worker is replaced, a mistake of the user's is not, and there is an end to replacing."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch.distributed as dist

from configs.cluster import ClusterConfig
from configs.failures import FailuresConfig, HangConfig, RestartConfig
from configs.layout import RunLayout
from configs.load import load_recipe
from data_loaders.poison import PoisonedSampleError
from launch.cluster import connect, run_workers
from launch.failures import Place
from launch.stages import GRAPH, StageContext
from launch.termination import Termination
from launch.user_errors import GaveUpError
from tests.integration.jobs import wait_for
from trainer.stop_notice import StoppedError
from trainer.watchdog import Watchdog

CLUSTER = ClusterConfig(num_workers=1, data_cpus=2)
RANK: Any = {"stage": "train", "rank": 0}
FAILURES = FailuresConfig(worker=RestartConfig(max_restarts=1))


def run(
    settings: dict[str, Any],
    cluster: ClusterConfig = CLUSTER,
    failures: FailuresConfig = FAILURES,
) -> Any:
    """`work` on a group, whose traces would lie beside its attempts."""
    return run_workers(f"{__name__}:work", settings, cluster, failures, place_of(settings))


def place_of(settings: dict[str, Any]) -> Place:
    return Place.of(RunLayout(settings["attempts"] + "-run"), "train", "0" * 12)


@pytest.fixture(scope="module")
def embedded() -> Iterator[None]:
    with connect(CLUSTER):
        yield


@pytest.mark.usefixtures("embedded")
def test_what_the_embedded_ray_lacks_is_refused_with_a_mend_that_can_be_done(
    tmp_path: Path,
) -> None:
    if ray.cluster_resources().get("GPU", 0):
        pytest.skip("there is a GPU")
    cuda = ClusterConfig(device="cuda", num_workers=1)
    lacks = r"cluster.device='cuda' needs {} GPU, and the cluster has 0; join a larger one by "
    lacks += r"cluster.address, or set cluster.device=cpu"
    settings = {"attempts": str(tmp_path / "attempts"), "then": []}
    with pytest.raises(ValueError, match=f"cluster.num_workers=1 with {lacks.format(1)}$"):
        run(settings, cuda)
    two = cuda.model_copy(update={"num_workers": 2, "cpus_per_worker": 1})
    with pytest.raises(ValueError, match=f"{lacks.format(2)}, or lower cluster.num_workers$"):
        run(settings, two)
    recipe = load_recipe("beauty/tiger", ["cluster.device=cuda"]).recipe
    context = StageContext("tokenize", recipe, RunLayout(str(tmp_path)), "0" * 12, {})
    with pytest.raises(ValueError, match=f"tokenize with {lacks.format(1)}$"):
        GRAPH["tokenize"].run(context)


def work(settings: dict[str, Any], say: Callable[[str], None]) -> str:
    """Note the attempt, then do what the attempt is told."""
    attempts = Path(settings["attempts"])
    with attempts.open("a") as stream:
        stream.write("x")
    match settings["then"][len(attempts.read_text()) - 1]:
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "mistake":
            raise ValueError("the recipe asks for the moon; ask for less")
        case "hang":
            with Watchdog(HangConfig(step_timeout_s=0.5), place_of(settings).failures, **RANK):
                time.sleep(600)
        case "asked":  # as `evaluate` or the loading of data are
            if dist.get_rank() == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            dist.barrier()
            time.sleep(600)
        case "wait":
            dist.barrier()
            if dist.get_rank() == 0:
                attempts.with_suffix(".ready").touch()
            time.sleep(600)
        case "saved":
            raise StoppedError("train", 8)
        case "poison":
            raise PoisonedSampleError([7], "collating it", "KeyError: 'x'")
        case "listen":
            return json.dumps(listening(psutil.Process()))
    return "done"


def listening(*processes: psutil.Process) -> list[str]:
    """Addresses, each once, where processes listen for others."""
    found = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # a worker that idled has ended meanwhile
            found += process.net_connections("tcp")
    places = [place.laddr.ip for place in found if place.status == psutil.CONN_LISTEN]
    return sorted({place.removeprefix("::ffff:") for place in places})


def test_ranks_of_one_machine_listen_on_its_loopback_alone(embedded: None, tmp_path: Path) -> None:
    pair = CLUSTER.model_copy(update={"num_workers": 2})
    settings = {"attempts": str(tmp_path / "attempts"), "then": ("listen", "listen")}
    assert json.loads(run(settings, pair)) == ["127.0.0.1"]  # the store, gloo's, and Ray's


@pytest.mark.usefixtures("embedded")
def test_nothing_of_the_embedded_ray_is_reached_from_another_machine() -> None:
    """Neither what asks for its token, nor what serves metrics to everyone."""
    below = psutil.Process().children(recursive=True)
    assert len(below) > 4 and listening(psutil.Process(), *below) == ["127.0.0.1"]


def test_a_dead_worker_is_replaced_and_a_mistake_is_not(
    embedded: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    attempts = tmp_path / "attempts"

    def run_anew(*then: str) -> Any:
        attempts.unlink(missing_ok=True)
        return run({"attempts": str(attempts), "then": then})

    before = signal.getsignal(signal.SIGINT)
    assert run_anew("die", "done") == "done"
    assert signal.getsignal(signal.SIGINT) == before  # Ctrl-C is not Ray Train's to handle
    assert attempts.read_text() == "xx"
    said = capfd.readouterr()
    assert "restarting from the newest checkpoint, attempt 2 of 2" in said.out
    assert "A worker died" not in said.out + said.err  # Ray's paragraph on it
    with pytest.raises(ValueError, match=r"^the recipe asks for the moon; ask for less$"):
        run_anew("mistake", "done")
    assert attempts.read_text() == "x"
    assert list(tmp_path.iterdir()) == [attempts]  # Ray Train leaves nothing beside the run


def test_what_the_recipe_says_to_hangs_preemption_and_poison(
    embedded: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    then = ("saved", "asked", "hang", "poison", "done")
    settings = {"attempts": str(tmp_path / "attempts"), "then": then}
    lenient = FailuresConfig.model_validate({"poisoned_sample": {"action": "skip"}})
    assert run(settings, failures=lenient) == "done"
    told = capfd.readouterr().out
    assert "saved at step 8" in told and "attempt 2 of 101" in told
    assert "while it did not train" in told and "attempt 3 of 101" in told
    assert "a rank hung (rank 0 (host" in told and "at `time.sleep(600)`" in told
    assert "attempt 2 of 3" in told
    assert "sample 7 cannot be used" in told and "1 of 100 that may be left out" in told
    (tmp_path / "attempts").unlink()
    strict = FailuresConfig.model_validate({"preemption": {"action": "stop"}})
    with pytest.raises(SystemExit) as ended:
        run(settings, failures=strict)
    assert ended.value.code == 143 and "saved at step 8" in capfd.readouterr().out


def test_a_driver_that_is_asked_to_end_while_nothing_trains_ends(
    embedded: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pair = CLUSTER.model_copy(update={"num_workers": 2})
    settings = {"attempts": str(tmp_path / "attempts"), "then": ("wait", "wait")}

    def ask() -> None:
        wait_for(lambda: (tmp_path / "attempts.ready").exists(), timeout=60)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=ask)
    thread.start()
    started = time.monotonic()
    with Termination(), pytest.raises(SystemExit) as ended:
        run(settings, pair)
    thread.join()
    assert ended.value.code == 143 and time.monotonic() - started < FAILURES.preemption.grace_s / 2
    assert "did not train; what is committed stands" in capfd.readouterr().out


def test_a_group_that_can_never_fit_is_refused_at_once(embedded: None, tmp_path: Path) -> None:
    attempts = tmp_path / "attempts"
    settings = {"attempts": str(attempts), "then": ("done",)}
    for more, lacking in (
        ({"device": "cuda"}, "needs 1 GPU, and the cluster has 0; join a larger one"),
        ({"num_workers": 3, "data_cpus": 3}, "needs 3 CPU, and the cluster has 2"),
    ):
        cluster = CLUSTER.model_copy(update=more)
        with pytest.raises(ValueError, match=f"cluster.num_workers=.* {lacking}"):
            run(settings, cluster)
    assert not attempts.exists()


@pytest.mark.slow
def test_a_group_that_keeps_dying_ends_the_stage(embedded: None, tmp_path: Path) -> None:
    settings = {"attempts": str(tmp_path / "attempts"), "then": ("die", "die", "done")}
    count_and_cause = (
        r"(?s)failed 2 times in a row .*\(failures.worker.max_restarts=1\).*; last error:.*died"
    )
    with pytest.raises(GaveUpError, match=count_and_cause):
        run(settings)
    assert (tmp_path / "attempts").read_text() == "xx"
