"""What to do when something fails during a training stage: one block, one answer a kind.

None of it changes a number that a run without failures gives, so a stage goes on from its
checkpoints when the answers are changed.
"""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from configs.base import Config

Restarts = Annotated[int, Field(ge=0)]
"""Restarts in a row: a new checkpoint of the stage sets the count back to none."""


class RestartConfig(Config):
    """The worker group is started again from the newest checkpoint."""

    max_restarts: Restarts = 3


class DriverConfig(Config):
    """The process that runs the stages dies; its workers end with it."""

    max_restarts: Restarts = 0
    """By a small process above it. 0: whoever started the run starts it again."""


class HeadConfig(Config):
    """The cluster's head is lost (`cluster.address`, or RAY_ADDRESS), and with it the driver."""

    max_restarts: Restarts = 0
    wait_s: PositiveFloat = 600.0
    """How long a head is waited for at the same address."""


class PreemptionConfig(Config):
    """A rank gets SIGTERM, or Ray is about to take a node away: all ranks save at the same step.

    A validation is left for it, and made first when the run goes on. Where they do not train (they
    load, or evaluate) they end at once.

    SIGTERM, Ctrl-C or a hang-up to the driver, alone or with all its processes, does that too, and
    always ends the run.
    """

    action: Literal["restart", "stop"] = "restart"
    """Go on with a new worker group (where there is room), or end the run with status 143."""
    max_restarts: Restarts = 100
    grace_s: PositiveFloat = 120.0
    """How long a driver that was asked to end waits for its workers to save."""


class HangConfig(Config):
    """A rank that stops making steps is named, with its stack; then every rank ends."""

    step_timeout_s: PositiveFloat | None = 1800.0
    """For a step: its data, its update, its checkpoint. Null: wait for ever."""
    validation_timeout_s: PositiveFloat | None = 21600.0
    """For a validation."""
    action: Literal["restart", "stop"] = "restart"
    max_restarts: Restarts = 2


class NonFiniteConfig(Config):
    """The loss or its gradient is not finite. Nothing has been updated by then."""

    action: Literal["stop", "skip"] = "stop"
    """End with a sentence that names the samples; or leave the step out, and write which samples
    it had to `<output>/failures/`. To skip, every step waits for the device."""
    max_skipped: PositiveInt = 10
    """Steps of a stage that may be left out."""


class OutOfMemoryConfig(Config):
    """A rank was killed for memory, or its device or host had none left."""

    action: Literal["stop", "restart"] = "stop"
    """The same steps need the same memory again; restart where other jobs share the machines."""
    max_restarts: Restarts = 1


class PoisonedSampleConfig(Config):
    """Samples that cannot be collated, or whose forward pass raises.

    What is left out of a stage's steps is left out of its validation, too; evaluation and
    recommendation have lists of their own, and results tell how many users are missing. Tokenizers
    and preference pairs are made of everything that the data hold: there it is mended or removed.
    """

    action: Literal["stop", "skip"] = "stop"
    """End with a sentence that names them; or write them to `<output>/failures/`, and go on from
    the newest checkpoint without them."""
    max_samples: PositiveInt = 100
    """Samples of a stage that may be left out: users, and as many pairs."""


class FailuresConfig(Config):
    """The failure policy of a run."""

    worker: RestartConfig = RestartConfig()
    """A rank dies or raises what is no mistake of the recipe's."""
    node: RestartConfig = RestartConfig()
    """A node is lost, with its ranks."""
    driver: DriverConfig = DriverConfig()
    head: HeadConfig = HeadConfig()
    preemption: PreemptionConfig = PreemptionConfig()
    hang: HangConfig = HangConfig()
    non_finite: NonFiniteConfig = NonFiniteConfig()
    out_of_memory: OutOfMemoryConfig = OutOfMemoryConfig()
    poisoned_sample: PoisonedSampleConfig = PoisonedSampleConfig()
