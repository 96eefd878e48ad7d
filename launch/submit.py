"""`tandem submit`: run a recipe on a Ray cluster from outside it, through Ray Jobs.

Our packages and the resolved recipe travel as the job's working directory; nothing else of the
project's folder does, and no credentials.
"""

import asyncio
import logging
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import requests

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read by Ray when it is imported

from aiohttp import ClientError
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from configs import storage
from configs.load import LoadedRecipe
from configs.locations import absolute_locations
from configs.recipe import Recipe
from configs.redaction import SECRET_NAME, redacted, variable_in
from configs.terminal import say
from launch.address import (
    GUARD_S,
    is_loopback,
    listens_elsewhere,
    protect_token,
    refuse_open,
    refuse_unguarded,
    token_file,
)

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("configs", "models", "data_loaders", "sharding", "trainer", "launch")
RECIPE_FILE = "submitted.yaml"
ADDRESS_VARIABLES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
"""Ray prefers these to the address it is given."""
CHATTY = (
    "ray._private.runtime_env.packaging",
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
)
"""Loggers of Ray that tell each step of an upload and each closed connection."""
AGENT_WAIT_S = 60.0
RECONNECT_S = 2.0
LOST_AFTER_S = 120.0
STOP_WAIT_S = 30.0
STOPPED_CODE = 130
OnInterrupt = Literal["ask", "stop", "leave"]


class Job:
    """A submitted job."""

    def __init__(self, client: JobSubmissionClient, job_id: str) -> None:
        self._client, self.job_id = client, job_id

    def follow(self, on_interrupt: OnInterrupt = "ask") -> int:
        """Print the job's log until it ends.

        Ctrl-C asks whether to stop the job, stops it, or leaves it running; `ask` stops it where
        there is no terminal to ask on.

        Returns:
            the job's exit code (128 + n for signal n); 130 after Ctrl-C or when it was stopped.

        Raises:
            ValueError: the job server was lost for two minutes.
        """
        try:
            asyncio.run(self._print_log())
        except KeyboardInterrupt:
            return self.interrupted(on_interrupt)
        return self.exit_code()

    async def _print_log(self) -> None:
        """A broken connection is made again; the server then starts from the first line."""
        printed = 0
        lost_since: float | None = None
        while True:
            position = 0
            try:
                async for text in self._client.tail_job_logs(self.job_id):
                    say(text[max(0, printed - position) :], end="")
                    position += len(text)
                    printed = max(printed, position)
                if self.status().is_terminal():
                    return
                lost_since = None
            except (RuntimeError, ClientError, OSError) as error:
                lost_since = lost_since or time.monotonic()
                if time.monotonic() - lost_since > LOST_AFTER_S:
                    raise ValueError(
                        f"lost the job server ({' '.join(str(error).split())}); the job may go on: "
                        f"see `ray job logs {self.job_id} --follow`"
                    ) from error
            await asyncio.sleep(RECONNECT_S)

    def status(self) -> JobStatus:
        """What the job server says of the job now."""
        return self._client.get_job_status(self.job_id)

    def exit_code(self) -> int:
        """The ended job's exit code; says on stderr what went wrong."""
        info = self._client.get_job_info(self.job_id)
        if info.status == JobStatus.SUCCEEDED:
            return 0
        reason = (info.message or "no reason given").partition(", last available logs")[0]
        say(f"job {self.job_id} {info.status.value}: {reason}", error=True, style="red")
        if info.status == JobStatus.STOPPED:
            return STOPPED_CODE
        code = info.driver_exit_code or 1  # a job that never got to run has none
        return 128 - code if code < 0 else code

    def interrupted(self, choice: OnInterrupt) -> int:
        """What Ctrl-C does while the log is followed; 130."""
        say("", error=True)
        if choice == "ask":
            choice = "stop" if self._wants_stop() else "leave"
        if choice == "leave":
            say(f"the job goes on; stop it with `ray job stop {self.job_id}`", error=True)
            return STOPPED_CODE
        self._client.stop_job(self.job_id)
        limit = time.monotonic() + STOP_WAIT_S
        while not self.status().is_terminal() and time.monotonic() < limit:
            time.sleep(0.2)
        say(f"job {self.job_id}: {self.status().value}", error=True)
        return STOPPED_CODE

    def _wants_stop(self) -> bool:
        if not sys.stdin.isatty():
            return True
        say(f"stop job {self.job_id}? [Y/n] ", error=True, end="")
        return not sys.stdin.readline().strip().lower().startswith("n")


def start(
    loaded: LoadedRecipe,
    address: str,
    *,
    options: Sequence[str] = (),
    environment: Sequence[str] = (),
    python: str = "python",
) -> Job:
    """Submit a recipe.

    Args:
        loaded: what to run; `cluster.address` becomes `auto`, local paths become absolute.
        address: the cluster's job server, http://host:8265.
        options: further words of `tandem run`, such as `--until prepare`.
        environment: `NAME=VALUE` variables of the job; no secrets, anyone on the cluster sees them.
        python: the interpreter on the cluster's nodes.

    Raises:
        ValueError: open address, bad variable, or no job server there.
    """
    _refuse_credentials(loaded)
    storage.refuse_memory("output", loaded.recipe.output)
    _check_form(address)
    refuse_open(address, "--address")
    variables = _parse_environment(environment)
    protect_token()
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    client = _connect(address)
    # What only this machine's users reach need not ask; a head's own port is never such.
    if not is_loopback(address) or listens_elsewhere(address):
        refuse_unguarded(address, "--address", server_lets_in)
    command = [python, "-m", "launch.cli", "run", RECIPE_FILE, *options]
    with tempfile.TemporaryDirectory(prefix="tandem-submit-") as folder:
        stage(loaded, Path(folder))
        submission = {
            "entrypoint": shlex.join(command),
            "runtime_env": {"working_dir": folder, "env_vars": variables},
            "metadata": {"recipe": loaded.recipe.name},
        }
        return Job(client, _submit(client, submission, address))


def _refuse_credentials(loaded: LoadedRecipe) -> None:
    """Refuse a recipe with credentials, as it travels to where everybody on the cluster reads it.

    Raises:
        ValueError: names the setting and the mend.
    """
    for line in loaded.dump().splitlines():
        setting, _, origin = line.rpartition("  # ")
        if redacted(setting) != setting:
            name = variable_in(setting)
            found = "" if name is None else f" (the value of {name} in this environment)"
            raise ValueError(
                f"{redacted(setting).strip()} ({origin}) holds credentials{found}, which everybody "
                "on the cluster could read: leave them out, and set them in the environment of the "
                "nodes"
            )


def _submit(client: JobSubmissionClient, submission: dict[str, Any], address: str) -> str:
    """The job's id. A cluster that has just started is asked again until its agent is there."""
    limit = time.monotonic() + AGENT_WAIT_S
    while True:
        try:
            return str(client.submit_job(**submission))
        except RuntimeError as error:
            if "No available agent" in str(error) and time.monotonic() < limit:
                time.sleep(RECONNECT_S)
                continue
            reason = " ".join(str(error).split())
            raise ValueError(f"the cluster at {address} refused the job: {reason}") from error


def stage(loaded: LoadedRecipe, folder: Path) -> None:
    """Lay out what travels: our packages and the recipe as it will run on the cluster."""
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
        shutil.copytree(ROOT / package, folder / package, ignore=ignored)
    there = LoadedRecipe(on_cluster(loaded.recipe), loaded.origins)
    (folder / RECIPE_FILE).write_text(there.dump(), encoding="utf-8")


def on_cluster(recipe: Recipe) -> Recipe:
    """The recipe as a job runs it: on the cluster it is in, with paths that do not depend on where.

    A local path becomes absolute as this machine sees it; the run refuses it where nodes do not.
    """
    cluster = recipe.cluster.model_copy(update={"address": "auto"})
    return absolute_locations(recipe).model_copy(update={"cluster": cluster})


def _parse_environment(environment: Sequence[str]) -> dict[str, str]:
    variables = {}
    for text in environment:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--env {text!r} must read NAME=VALUE")
        if SECRET_NAME.search(name) or redacted(value) != value:
            what = "looks like" if SECRET_NAME.search(name) else "holds"
            raise ValueError(
                f"--env {name} {what} a credential, and a job's variables are no secret on the "
                "cluster: set it in the environment of the nodes instead"
            )
        variables[name] = value
    return variables


def _check_form(address: str) -> None:
    try:
        place = urlsplit(address if "://" in address else f"http://{address}")
        if place.scheme in ("http", "https") and place.hostname and place.port != 0:
            return
    except ValueError:  # no port's number, or brackets that do not match
        pass
    raise ValueError(f"--address={address!r} must be the job server's http://HOST:8265")


def _connect(address: str) -> JobSubmissionClient:
    url = address if "://" in address else f"http://{address}"
    try:
        with _without(ADDRESS_VARIABLES):
            return JobSubmissionClient(url)
    except AuthenticationError as error:
        raise ValueError(
            f"the job server at {address} does not take the token it was given, or was given none: "
            f"export RAY_AUTH_MODE=token here, and put the cluster's token into {token_file()} "
            "(mode 0600)"
        ) from error
    except (ConnectionError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"no Ray job server answers at {address} ({reason}); start one with `ray start --head` "
            "and give the address of its dashboard"
        ) from error


def server_lets_in(address: str) -> bool:
    """Whether the job server at `address` answers a caller that shows no token.

    It is asked the way that Ray's own client goes, proxies included.

    Raises:
        ConnectionError: what answers says neither.
        TimeoutError: it says nothing within `GUARD_S`.
    """
    url = address if "://" in address else f"http://{address}"
    try:
        answer = requests.get(f"{url.rstrip('/')}/api/version", timeout=GUARD_S)
        if answer.status_code in (401, 403):
            return False
        if answer.ok and "ray_version" in answer.text:
            return True
    except requests.Timeout as error:
        raise TimeoutError(str(error)) from error
    except requests.RequestException as error:
        raise ConnectionError(" ".join(str(error).split())) from error
    raise ConnectionError(f"it answers with status {answer.status_code}")


@contextmanager
def _without(names: Sequence[str]) -> Iterator[None]:
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)
