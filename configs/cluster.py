"""Where the job runs."""

from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from configs.base import Config


def split_address(address: str) -> tuple[str, int]:
    """Host and port of a cluster's head.

    Raises:
        ValueError: it does not read HOST:PORT.
    """
    try:
        place = urlsplit(f"//{address}")
        if place.hostname and place.port and place.netloc == address and "@" not in address:
            return place.hostname, place.port
    except ValueError:  # no number, no port's number, or brackets that do not match
        pass
    raise ValueError(
        f"{address!r} must be HOST:PORT of the cluster's head, such as 10.0.0.1:6379 or [::1]:6379"
    )


class ClusterConfig(Config):
    """The Ray cluster and the worker group; the only block that differs between machines."""

    address: str = "local"
    """`local` starts an embedded Ray; `auto` joins the cluster of this node; or host:port."""
    num_workers: PositiveInt = 2
    min_workers: PositiveInt | None = None
    """Elastic: where nodes leave, training goes on with as few workers as this, and with up to
    `num_workers` once nodes join, in sizes that divide the batches; null: always `num_workers`."""
    resize_check_s: PositiveFloat = 60
    """How often an elastic group looks for room to grow, which it does after a checkpoint."""
    device: Literal["cpu", "cuda"] = "cpu"
    cpus_per_worker: PositiveFloat = 1
    threads_per_worker: PositiveInt = 1
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    start_timeout_s: PositiveInt = 120
    data_cpus: PositiveInt = Field(2)
    """CPUs of the embedded Ray (only `local`)."""

    @model_validator(mode="before")
    @classmethod
    def _failures_have_a_block(cls, data: Any) -> Any:
        if isinstance(data, dict) and "max_failures" in data:
            raise ValueError(
                f"max_failures={data['max_failures']} has moved: write failures.worker.max_restarts"
                " and failures.node.max_restarts"
            )
        return data

    @field_validator("address")
    @classmethod
    def _address_is_one(cls, address: str) -> str:
        if address not in ("local", "auto"):
            try:
                split_address(address)
            except ValueError as error:
                raise ValueError(f"{error}; or local, or auto") from None
        return address

    @property
    def least_workers(self) -> int:
        """Workers without which a stage does not run."""
        return self.num_workers if self.min_workers is None else self.min_workers

    @property
    def size_key(self) -> str:
        """The setting that says so."""
        return "num_workers" if self.min_workers is None else "min_workers"

    @model_validator(mode="after")
    def _elastic_range_is_one(self) -> "ClusterConfig":
        if self.least_workers > self.num_workers:
            raise ValueError(
                f"min_workers={self.min_workers} exceeds num_workers={self.num_workers}, which is "
                "the most that an elastic group has; swap them"
            )
        return self

    @model_validator(mode="after")
    def _embedded_ray_holds_the_workers(self) -> "ClusterConfig":
        if self.address == "local" and self.device == "cpu":
            needed = self.num_workers * self.cpus_per_worker
            if needed > self.data_cpus:
                raise ValueError(
                    f"num_workers={self.num_workers} × cpus_per_worker={self.cpus_per_worker} "
                    f"exceed data_cpus={self.data_cpus} of the embedded Ray; raise data_cpus"
                )
        return self
