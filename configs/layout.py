"""Where the files of a run lie below its output directory."""

from dataclasses import dataclass
from typing import Any

from configs import storage


def read_record(url: str) -> dict[str, Any]:
    """What a stage that finished says of itself (`RunLayout.stage_record`).

    Of a run that was moved or copied since, URLs below its output name what lies there now.

    Raises:
        ValueError: it is damaged, or something else lies there; the sentence names the mend.
    """
    record = storage.read_sealed(url)
    if not isinstance(record.get("outputs"), dict):
        raise ValueError(f"{url} is no record of a stage; delete it, and the stage runs again")
    then, now = record.get("root"), url.rpartition("/stages/")[0]
    if isinstance(then, str) and now and then != now:
        record["outputs"] = _moved(record["outputs"], then, now)
    return record


def _moved(value: Any, then: str, now: str) -> Any:
    """A JSON value whose URLs of `then`, and below it, are those of `now`."""
    if isinstance(value, dict):
        return {key: _moved(entry, then, now) for key, entry in value.items()}
    if isinstance(value, list):
        return [_moved(entry, then, now) for entry in value]
    if isinstance(value, str) and (value == then or value.startswith(f"{then}/")):
        return now + value[len(then) :]
    return value


def read_checkpoint_reference(url: str) -> dict[str, Any]:
    """URL and hashes of the checkpoint that the record of a training stage names.

    Raises:
        ValueError: as `read_record`, or it names none.
    """
    checkpoint = read_record(url)["outputs"].get("checkpoint")
    known = isinstance(checkpoint, dict) and all(
        isinstance(checkpoint.get(key), str) for key in ("url", "hash")
    )
    if not known:
        raise ValueError(
            f"{url} names no checkpoint, so it is no record of a training; delete it, and run the "
            "stage again"
        )
    return dict(checkpoint)


def weights_hash(reference: dict[str, Any]) -> str:
    """Keys what is computed from the weights of a checkpoint, whichever whole copy of them it is;
    the hash of the copy where the reference is of before, and does not tell."""
    return str(reference.get("weights", reference["hash"]))


@dataclass(frozen=True)
class RunLayout:
    """URLs of a run. What depends on settings is keyed by a stage's fingerprint, never mixed."""

    root: str

    @property
    def data(self) -> str:
        """The prepared data set."""
        return storage.join(self.root, "data")

    def raw(self, name: str) -> str:
        """Downloaded copy of a public data set."""
        return storage.join(self.root, "raw", name)

    def semantic_ids(self, fingerprint: str) -> str:
        """The tokenizer and the item → semantic id table."""
        return storage.join(self.root, "semantic_ids", f"tokenize-{fingerprint[:12]}")

    def stage_record(self, stage: str) -> str:
        """What a finished stage did: fingerprint, outputs, time."""
        return storage.join(self.root, "stages", f"{stage}.json")

    def start_record(self, run: str) -> str:
        """What trainings of this output that began with another run's (`run`) began with."""
        name = storage.fingerprint(storage.absolute(run))[:12]
        return storage.join(self.root, "stages", f"start-{name}.json")

    def goes_on_record(self, stage: str, fingerprint: str) -> str:
        """Which training of this output a stage goes on with, where that is not its own."""
        return storage.join(self.root, "stages", f"goes-on-{stage}-{fingerprint[:12]}.json")

    def checkpoints(self, stage: str, fingerprint: str) -> str:
        """The newest checkpoints of a training stage."""
        return storage.join(self.root, "checkpoints", f"{stage}-{fingerprint[:12]}", "newest")

    def best(self, stage: str, fingerprint: str) -> str:
        """The checkpoint that validation chose, kept apart."""
        return storage.join(self.root, "checkpoints", f"{stage}-{fingerprint[:12]}", "best")

    @staticmethod
    def stage_of(checkpoint: str) -> str:
        """The stage that wrote a checkpoint, from a URL below `checkpoints` or `best`."""
        return checkpoint.rpartition("/checkpoints/")[2].partition("-")[0]

    def good(self, stage: str, fingerprint: str) -> str:
        """The last checkpoint that kept the guardrails, for stages that have some."""
        return storage.join(self.root, "checkpoints", f"{stage}-{fingerprint[:12]}", "good")

    def metrics(self, stage: str, fingerprint: str) -> str:
        """Directory of a stage's metrics.jsonl and TensorBoard events."""
        return storage.join(self.root, "metrics", f"{stage}-{fingerprint[:12]}")

    @property
    def failures(self) -> str:
        """Reports of what went wrong: hangs, steps and samples that were left out."""
        return storage.join(self.root, "failures")

    def quarantined(self, fingerprint: str) -> str:
        """Samples that a training stage leaves out."""
        return storage.join(self.failures, f"samples-{fingerprint[:12]}.json")

    def pairs(self, fingerprint: str) -> str:
        """Preference pairs."""
        return storage.join(self.root, "preferences", f"pairs-{fingerprint[:12]}")

    def reference(self, pairs_fingerprint: str, weights: str) -> str:
        """Reference log-probabilities of the pairs under one checkpoint."""
        name = f"reference-{pairs_fingerprint[:12]}-{weights[:12]}"
        return storage.join(self.root, "preferences", name)

    @property
    def results(self) -> str:
        """All metrics with their protocol."""
        return storage.join(self.root, "results.json")

    @property
    def recommendations(self) -> str:
        """Ten recommendations for a few users."""
        return storage.join(self.root, "recommendations.json")
