"""The Ray cluster of a run: connect to it, run a stage's worker group on it."""

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from fsspec.implementations.memory import MemoryFileSystem
from pyarrow.fs import FSSpecHandler, PyFileSystem

from configs.cluster import ClusterConfig
from configs.failures import FailuresConfig
from configs.redaction import hide_in_logs
from configs.terminal import say

# Read by Ray when it is imported.
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from ray._private import worker as ray_worker
from ray._private.state import state
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from launch.address import make_token, protect_token, refuse_open_embedded
from launch.console import Console, Line
from launch.elastic import ElasticGroup, GroupTrainer
from launch.embedded import ends_with_its_head, handlers_kept, leave, off_the_network
from launch.failures import (
    Failure,
    Losses,
    Place,
    Restarts,
    diagnose,
    processes_killed_for_memory,
    summary,
)
from launch.joining import check_door, why_not
from launch.nodes import ask
from launch.rendezvous import GroupConfig, loopback_interface
from launch.termination import current_termination, unheard
from launch.user_errors import BusyError
from trainer.stop_notice import heeding, install_notice

PROJECT_ROOT = Path(__file__).resolve().parent.parent
SHIPPED_EXCLUDES = [
    ".git", ".venv", "runs", "tests", ".cache", "**/__pycache__", ".mypy_cache", ".ruff_cache",
]  # fmt: skip
DRAIN_POLL_S = 2.0
"""Between two looks at whether a node of the group is about to be taken away."""
START_ATTEMPTS = 3


def worker_environment(cluster: ClusterConfig) -> dict[str, str]:
    """Environment of every Ray worker of the run. Holds no credentials."""
    threads = str(cluster.threads_per_worker)
    environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    if cluster.device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
    if cluster.address == "local":  # ranks talk to each other without tokens
        environment["GLOO_SOCKET_IFNAME"] = loopback_interface()
    return environment


@contextmanager
def connect(cluster: ClusterConfig) -> Iterator[None]:
    """Join the recipe's cluster, or start an embedded one that ends with this process.

    Raises:
        ValueError: the cluster is not there, or lets anyone in, or does not let this job in.
        BusyError: the embedded one was not there in time.
    """
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(cluster.start_timeout_s)
    os.environ.setdefault("RAY_raylet_start_wait_time_s", str(cluster.start_timeout_s))
    runtime_env: dict[str, Any] = {"env_vars": worker_environment(cluster)}
    embedded = cluster.address == "local"
    in_ray_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    if not embedded and not in_ray_job:  # a submitted job has shipped the code already
        runtime_env["working_dir"] = str(PROJECT_ROOT)
        runtime_env["excludes"] = SHIPPED_EXCLUDES
    options: dict[str, Any] = {}
    if embedded:
        options = {"num_cpus": cluster.data_cpus, "include_dashboard": False}
        refuse_open_embedded()
        make_token()
    protect_token()
    try:
        if not embedded and not in_ray_job:  # a job is there already; `submit` checked the door
            check_door(cluster.address)
        with unheard(), handlers_kept(), off_the_network(embedded):
            ray.init(
                address=cluster.address,
                runtime_env=runtime_env,
                log_to_driver=False,
                logging_level="ERROR",
                **options,
            )
    except ConnectionError as error:
        raise ValueError(why_not(cluster.address, error)) from error
    except Exception as error:
        if isinstance(error, ValueError) or "timed out" not in str(error):
            raise
        raise BusyError(
            f"Ray did not start within cluster.start_timeout_s={cluster.start_timeout_s}: "
            f"{error}; the machine is busy: raise it, or run again later"
        ) from error
    _quiet()
    try:
        with ends_with_its_head():
            yield
    finally:
        leave()


def _quiet() -> None:
    """Leave the terminal to what the run itself prints."""
    # Paragraphs on each lost worker, which come besides the logs; `failures` says it in a line.
    ray_worker._worker_logs_enabled = False
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def run_workers(
    entry: str,
    settings: dict[str, Any],
    cluster: ClusterConfig,
    failures: FailuresConfig,
    place: Place,
    sizes: tuple[int, ...] = (),
    *,
    grows: bool = False,
) -> Any:
    """Run `module:function(settings, say)` on every rank of a worker group; rank 0's answer.

    What fails costs a restart of the group, which resumes from the newest checkpoint, where
    `failures` says so. An error of the user's making is not tried again.

    Args:
        entry: what to run.
        settings: handed to it.
        cluster: how many workers there are, and of what.
        failures: what to do about each.
        place: where it leaves its traces.
        sizes: numbers of workers that may run it, ascending; empty: `cluster.num_workers` alone.
        grows: whether it can be asked to save, and goes on from there with more workers.

    Raises:
        ValueError: the worker's own sentence, when the mistake is the user's; or that the recipe
            says to stop.
        GaveUpError: the group failed more often than allowed.
        SystemExit: the run was asked to end, and is saved where it was.
    """
    _check_group(cluster)
    grows = grows and failures.preemption.action == "restart"
    group = _elastic(cluster, sizes, grows) if len(sizes) > 1 else None
    termination = current_termination()
    restarts = Restarts(failures, place, say)
    with (
        Console() as console,
        termination.asks(console.ask_to_stop, failures.preemption.grace_s),
    ):
        while True:
            started = time.time()
            try:
                return _run_group(entry, settings, cluster, console, group)
            except TrainingFailedError as error:
                failure = _diagnose(error, cluster, place, started, console)
            if termination.asked or (
                failure.kind == "preemption" and failures.preemption.action == "stop"
            ):
                termination.end(failure.sentence)
            restarts.decide(failure)


def _diagnose(
    error: TrainingFailedError, cluster: ClusterConfig, place: Place, since: float, console: Console
) -> Failure:
    """Why a group failed; raises ValueError where that is the user's to mend."""
    if isinstance(error, ControllerError):
        raise ValueError(
            f"the worker group did not start within cluster.start_timeout_s="
            f"{cluster.start_timeout_s} ({summary([error])}); {_needs(cluster)}: "
            + ", or ".join(["see `ray status`", *_smaller(cluster)])
        ) from error
    placed, ranks = console.placed()
    size = ranks or cluster.num_workers
    return diagnose(_causes(error), place, since, size, losses=partial(_losses, placed))


def _losses(placed: Mapping[str, int]) -> Losses:
    """Of a group's nodes, and how many processes the kernel had killed there when it began."""
    asked = ask(placed, processes_killed_for_memory)
    return Losses(
        node=f"node {asked.lost[0]}" if asked.lost else None,
        memory=any(count > placed[node] for node, count in asked.answers.items()),
    )


def check_resources(
    cluster: ClusterConfig, what: str, wanted: dict[str, float], *mends: str
) -> None:
    """Tell when what a stage wants does not fit the cluster as it is; refuse what can never fit.

    Raises:
        ValueError: the embedded Ray, which does not grow, lacks a resource; ends with `mends`.
    """
    has = ray.cluster_resources()
    lacking = [name for name, count in wanted.items() if has.get(name, 0) < count]
    if not lacking:
        return
    needs = [
        f"{wanted[name]:g} {name}, and the cluster has {has.get(name, 0):g}" for name in lacking
    ]
    sentence = f"{what} with cluster.device={cluster.device!r} needs {'; '.join(needs)}"
    if cluster.address == "local":
        of_name = {"GPU": "set cluster.device=cpu", "CPU": "raise cluster.data_cpus"}
        more = [*(of_name[name] for name in lacking), *mends]
        raise ValueError(
            f"{sentence}; join a larger one by cluster.address, or {', or '.join(more)}"
        )
    say(f"{sentence}: waiting for nodes to join")


def _check_group(cluster: ClusterConfig) -> None:
    """`check_resources` of a worker group."""
    workers = cluster.least_workers
    wanted = {name: count * workers for name, count in _resources(cluster).items()}
    what = f"cluster.{cluster.size_key}={workers}"
    check_resources(cluster, what, wanted, *_smaller(cluster))


def _smaller(cluster: ClusterConfig) -> list[str]:
    """How to want less, where that is possible."""
    return [f"lower cluster.{cluster.size_key}"] if cluster.least_workers > 1 else []


def _resources(cluster: ClusterConfig) -> dict[str, float]:
    """What one worker takes."""
    return {"CPU": cluster.cpus_per_worker} | ({"GPU": 1.0} if cluster.device == "cuda" else {})


def _elastic(cluster: ClusterConfig, sizes: tuple[int, ...], grows: bool) -> ElasticGroup:
    return ElasticGroup(
        sizes=sizes,
        needed=_resources(cluster),
        placement=cluster.placement_strategy,
        start_timeout_s=cluster.start_timeout_s,
        grows_every_s=cluster.resize_check_s if grows else None,
    )


def _needs(cluster: ClusterConfig) -> str:
    nodes = [node for node in ray.nodes() if node["Alive"]]
    each = " and ".join(f"{count:g} {name}" for name, count in _resources(cluster).items())
    return (
        f"{cluster.least_workers} workers of {each} each, placed by {cluster.placement_strategy}, "
        f"are wanted of a cluster with {ray.cluster_resources().get('CPU', 0):g} CPUs and "
        f"{ray.cluster_resources().get('GPU', 0):g} GPUs on {len(nodes)} nodes"
    )


def _run_group(
    entry: str,
    settings: dict[str, Any],
    cluster: ClusterConfig,
    console: Console,
    group: ElasticGroup | None,
) -> Any:
    line = console.line()
    line.place({}, 0)  # of an earlier group
    trainer = GroupTrainer(
        _enter,
        group=group,
        train_loop_config={"entry": entry, "settings": settings, "line": line, "group": group},
        torch_config=GroupConfig(
            backend="cpu:gloo,cuda:nccl" if cluster.device == "cuda" else "gloo",
            loopback=cluster.address == "local",
        ),
        scaling_config=ScalingConfig(
            num_workers=cluster.num_workers if group is None else (group.sizes[0], group.sizes[-1]),
            use_gpu=cluster.device == "cuda",
            resources_per_worker=_resources(cluster),
            placement_strategy=cluster.placement_strategy,
        ),
        run_config=RunConfig(
            name=entry.rsplit(".", 1)[-1].replace(":", "-"),
            # Workers report no checkpoint to Ray Train (ours are `sharding.checkpoint`'s), so what
            # it keeps lives in the memory of the group's controller: a kill leaves nothing of it,
            # and nothing half written can block the next start.
            storage_path="ray-train",
            storage_filesystem=PyFileSystem(FSSpecHandler(MemoryFileSystem())),
            # `failures` decides, not Ray Train; it only tries again to bring a group up.
            failure_config=FailureConfig(
                max_failures=0, max_preemption_failures=0, controller_failure_limit=START_ATTEMPTS
            ),
            callbacks=[_AttendSignals()],
        ),
    )
    return trainer.fit().return_value


class _AttendSignals(WorkerGroupCallback):
    """Lets training hear of SIGTERM: it runs in another thread than handlers of signals."""

    def after_execution_group_start(self, execution_group: Any) -> None:
        execution_group.execute(install_notice)


def _enter(config: dict[str, Any]) -> Any:
    """First code of a worker."""
    hide_in_logs()
    return heeding(partial(_run_stage, config))


def _run_stage(config: dict[str, Any]) -> Any:
    """Import the stage here, so that the driver stays light."""
    import torch.distributed as dist

    here = (ray.get_runtime_context().get_node_id(), processes_killed_for_memory())
    places: list[tuple[str, int]] = [here] * dist.get_world_size()
    dist.all_gather_object(places, here)
    line: Line = config["line"]
    if dist.get_rank() == 0:
        nodes = dict(places)
        line.place(nodes, len(places))
        line(f"{len(places)} workers on {len(nodes)} node{'s' if len(nodes) > 1 else ''}")
        held = Counter(node for node, _ in places)
        arguments = (line, held, config["group"])
        listener = threading.Thread(target=_listen, args=arguments, daemon=True)
        listener.start()
    module, function = config["entry"].split(":")
    return getattr(import_module(module), function)(config["settings"], line)


def _listen(line: Line, held: Counter[str], group: ElasticGroup | None) -> None:
    """Have this rank told, as by SIGTERM, that the group shall save and end: the driver asks for
    it, a node that holds ranks is taken away, or there is room for more ranks."""
    asked, looked = line.stop_asked(), time.monotonic()
    while True:
        try:
            ready, _ = ray.wait([asked], timeout=DRAIN_POLL_S)
            taken = set(held) & set(state.get_draining_nodes())
            if group is not None and group.due(looked):
                room, looked = group.room(held), time.monotonic()
                if room > held.total():
                    line(f"there is room for {room} workers instead of {held.total()}")
                    taken = set(held)
        except RayError:  # the driver is gone, and with it this group
            return
        if ready or taken:
            os.kill(os.getpid(), signal.SIGTERM)
            return


def _causes(error: TrainingFailedError) -> list[BaseException]:
    if not isinstance(error, WorkerGroupError):
        return [error]
    causes: list[BaseException] = []
    for failure in error.worker_failures.values():
        inner: BaseException | None = failure
        while inner is not None:
            causes.append(inner)
            inner = getattr(inner, "_base_exc", None) or inner.__cause__
    return causes
