"""Where events come from, how they are cleaned, split, stored and batched."""

from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from configs.base import Config
from configs.locations import Location

PublicName = Literal[
    "ml-100k",
    "ml-1m",
    "ml-latest-small",
    "amazon-beauty",
    "amazon-sports",
    "amazon-toys",
    "kuairand-pure",
]
TimestampUnit = Literal["s", "ms", "us", "iso8601"]
DwellUnit = Literal["s", "ms", "us"]
LabelName = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]


def epoch_seconds(value: str | float) -> float:
    """Seconds since 1970 of an ISO date (UTC unless it says otherwise) or of a number.

    Raises:
        ValueError: the text is not a date.
    """
    if not isinstance(value, str):
        return float(value)
    try:
        date = datetime.fromisoformat(value)
    except ValueError:
        raise ValueError(f"{value!r} is not an ISO date such as 2026-01-31") from None
    return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()


class ColumnMap(Config):
    """Names of the columns of one's own log that carry each part of an event."""

    user: str = "user"
    item: str = "item"
    timestamp: str = "timestamp"
    rating: str | None = None
    """A numeric column: rating, or any graded feedback."""
    dwell: str | None = None
    """A numeric column: how long the user stayed with the item (dwell, watch or play time)."""
    duration: str | None = None
    """A numeric column: how long the item lasts (a video's length); 0 or nothing is unknown."""
    order: str | None = None
    """A numeric column that orders a user's events of equal time (without it, the log's order)."""
    action: str | None = None
    """A column that names the behaviour (click, like, …); becomes a dense action id."""
    labels: dict[LabelName, str] = Field(default_factory=dict, max_length=62)
    """Label → a column that is 0/1 or true/false: what the user did at the event, several at once
    (like, hate, long_view, …). Where it is empty the log does not say so: it counts as 0."""
    side_features: tuple[str, ...] = ()
    """Categorical columns of the event that become `side_<name>` dense ids, one per event."""

    @model_validator(mode="after")
    def _parts_are_apart(self) -> "ColumnMap":
        names = {"user": self.user, "item": self.item, "timestamp": self.timestamp}
        if len(set(names.values())) < len(names):
            raise ValueError(f"user, item and timestamp must be three columns, not {names}")
        return self


class ItemText(Config):
    """A file that says of items what they are called, for printing recommendations, and more."""

    url: Location = Field(pattern=r"\S")
    format: Literal["csv", "jsonl", "parquet"] = "parquet"
    separator: str = ","
    quoted_newlines: bool = False
    """As of `data.source` (CSV)."""
    item: str = "item"
    title: str = "title"
    features: tuple[str, ...] = ()
    """Categorical columns of items (a category, a brand, a creator), which quotas may count by and
    `recommend.allow` may choose by."""


class UserTable(Config):
    """A file of user attributes; each named column becomes a dense categorical feature."""

    url: Location = Field(pattern=r"\S")
    format: Literal["csv", "jsonl", "parquet"] = "parquet"
    separator: str = ","
    quoted_newlines: bool = False
    """As of `data.source` (CSV)."""
    user: str = "user"
    features: tuple[str, ...]


class PublicSource(Config):
    """A named public data set; `url` is where its copy lies or will be put."""

    kind: Literal["public"] = "public"
    name: PublicName
    url: Location | None = None
    """Directory (any fsspec URL) of the downloaded copy; default: <output>/raw/<name>."""


class LogSource(Config):
    """One's own log on any fsspec URL; a glob or a directory names many files."""

    url: Location = Field(pattern=r"\S")
    columns: ColumnMap = ColumnMap()
    timestamp_unit: TimestampUnit = "s"
    dwell_unit: DwellUnit = "s"
    """Of columns.dwell and columns.duration."""
    item_text: ItemText | None = None
    user_table: UserTable | None = None

    @model_validator(mode="after")
    def _unit_of_a_column(self) -> "LogSource":
        if self.dwell_unit != "s" and self.columns.dwell is self.columns.duration is None:
            raise ValueError(
                f"dwell_unit={self.dwell_unit!r} is the unit of columns.dwell and "
                "columns.duration, which map no column: map one or leave out the unit"
            )
        return self


class CsvSource(LogSource):
    """Delimited text."""

    kind: Literal["csv"] = "csv"
    separator: str = Field(",", min_length=1, max_length=1)
    header: tuple[str, ...] | None = None
    """Column names where the files have no header line."""
    quoted_newlines: bool = False
    """Whether a quoted value may hold line ends. Without it one line is one row and a line with a
    quote that it does not close is malformed; with it such a quote takes all up to the next one."""


class JsonlSource(LogSource):
    """One JSON object a line."""

    kind: Literal["jsonl"] = "jsonl"


class ParquetSource(LogSource):
    """Parquet files."""

    kind: Literal["parquet"] = "parquet"


Source = Annotated[
    PublicSource | CsvSource | JsonlSource | ParquetSource, Field(discriminator="kind")
]


class CleaningConfig(Config):
    """What counts as a bad event and how many of them a run tolerates."""

    earliest: str = "1990-01-01"
    """ISO date; an earlier timestamp is impossible and goes to quarantine."""
    latest: str | None = None
    """ISO date; this or a later timestamp is impossible. Default: a day after `prepare` begins, as
    no log tells of the future (the day leaves room for clocks and time zones)."""
    duplicates: Literal["quarantine", "keep"] = "quarantine"
    """Two events are duplicates when user, item and timestamp are equal, and the action where
    `columns.action` maps one."""
    max_bad_share: float = Field(0.01, ge=0, le=1)
    """A larger share of quarantined events fails the stage."""
    min_rating: float | None = None
    """Events rated lower are left out of the sequences (counted, not quarantined)."""
    user_core: PositiveInt = 1
    item_core: PositiveInt = 1
    """k-core: users with fewer events and items with fewer are removed, repeatedly."""

    @model_validator(mode="after")
    def _dates_follow(self) -> "CleaningConfig":
        earliest = epoch_seconds(self.earliest)
        if self.latest is not None and epoch_seconds(self.latest) <= earliest:
            raise ValueError(f"latest={self.latest!r} must lie after earliest={self.earliest!r}")
        return self


class LeaveLastOut(Config):
    """Per user: the last item is the test, the one before it the validation."""

    kind: Literal["leave_last_out"] = "leave_last_out"
    include_validation_in_training: bool = False
    """A final fit with the epoch count that validation chose (validation is then not scored)."""


class GlobalTime(Config):
    """Events before `validation_from` train. Measured is one item a user: in validation the first
    from `validation_from` on and before `test_from`, in the test the first from `test_from` on,
    each with all events before it as history (users without any are left out); a reward model is
    measured on all events of these periods. Bounds are ISO dates or epoch seconds."""

    kind: Literal["global_time"] = "global_time"
    validation_from: str | float
    test_from: str | float

    @model_validator(mode="after")
    def _periods_follow(self) -> "GlobalTime":
        if epoch_seconds(self.test_from) <= epoch_seconds(self.validation_from):
            raise ValueError(
                f"test_from={self.test_from!r} must lie after validation_from="
                f"{self.validation_from!r}"
            )
        return self


Split = Annotated[LeaveLastOut | GlobalTime, Field(discriminator="kind")]


class ShardConfig(Config):
    """Layout of the Parquet shards of user sequences."""

    num_shards: PositiveInt = 8
    rows_per_group: PositiveInt = 256
    compression: Literal["zstd", "snappy", "none"] = "zstd"


class LoaderConfig(Config):
    """Deterministic, elastic batching of user sequences."""

    global_batch: PositiveInt = 128
    """Sequences per optimizer step over all ranks; the order depends on it and the seed alone."""
    tokens_per_micro_batch: PositiveInt | None = None
    """Token budget of one rank's micro batch; a step is cut into as many as needed."""
    accumulation: PositiveInt = 1
    """Least number of micro batches a rank's share of a step is cut into."""
    max_length: PositiveInt = 200
    """Most recent events of a user that are used."""
    shuffle_window: PositiveInt = 64
    """Row groups whose rows are shuffled together (order is random over windows and in them)."""
    drop_last: bool = False
    balance: bool = True
    """Deal the sequences of a step over ranks so that token counts are alike."""
    prefetch: int = Field(2, ge=0)
    """Steps prepared ahead by a background thread; 0 reads in the training thread."""
    cached_row_groups: PositiveInt = 128


class DataConfig(Config):
    """Everything between raw logs and batches."""

    source: Source
    cleaning: CleaningConfig = CleaningConfig()
    split: Split = LeaveLastOut()
    shards: ShardConfig = ShardConfig()
    loader: LoaderConfig = LoaderConfig()

    @model_validator(mode="after")
    def _budget_holds_one_sequence(self) -> "DataConfig":
        budget = self.loader.tokens_per_micro_batch
        if budget is not None and budget < self.loader.max_length:
            raise ValueError(
                f"loader.tokens_per_micro_batch={budget} cannot hold one sequence of "
                f"loader.max_length={self.loader.max_length}; raise the budget or shorten sequences"
            )
        if self.loader.cached_row_groups < self.loader.shuffle_window:
            raise ValueError(
                f"loader.cached_row_groups={self.loader.cached_row_groups} is below "
                f"loader.shuffle_window={self.loader.shuffle_window}, so that row groups would be "
                "read again and again; raise it to the window"
            )
        return self
