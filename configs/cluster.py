"""Where the job runs."""

from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from configs.base import Config


class ClusterConfig(Config):
    """The Ray cluster and the worker group; the only block that differs between machines."""

    address: str = "local"
    """`local` starts an embedded Ray; `auto` joins the cluster of this node; or host:port."""
    num_workers: PositiveInt = 2
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
