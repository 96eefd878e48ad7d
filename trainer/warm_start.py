"""Training that begins with what another run's training left, over data that may have grown."""

from dataclasses import dataclass
from typing import Any

from configs import storage
from configs.decoders import FeatureInputs
from configs.layout import RunLayout
from data_loaders.continued import continued_rows
from data_loaders.items import action_names
from data_loaders.manifest import DatasetManifest, read_manifest
from sharding.checkpoint import CheckpointInfo
from sharding.checkpoint_recut import KeptRows, same_rows
from sharding.parallelize import ParallelModel
from trainer.policy import Worker, named_checkpoint


@dataclass(frozen=True)
class WarmStart:
    """What a training stage begins with, if its recipe says so."""

    worker: Worker
    reference: dict[str, Any] | None
    """Of the checkpoint; None: the stage begins with a new model."""

    def __call__(self, policy: ParallelModel, afresh: bool) -> None:
        """Load it, unless the stage goes on from a checkpoint of its own. Collective.

        Raises:
            ValueError: it is gone, its data set is, or its model is another.
        """
        start, worker = self.worker.recipe.training.start, self.worker
        if start is None or not afresh:
            return
        assert self.reference is not None, "the driver names the checkpoint"
        store, info = named_checkpoint(worker, self.reference)
        earlier = RunLayout(storage.absolute(start.run)).data
        then = read_manifest(earlier)
        if then.fingerprint != info.fingerprints.get("data"):
            raise ValueError(
                f"training.start.run={start.run!r} was trained on a data set that is not there any "
                "more, and its items are known by it: give grown data an `output` of their own"
            )
        _refuse_other_names(worker, info, then, earlier)
        worker.tell(f"beginning with the training of {start.run} (step {info.step:,})")
        names = [table.spec.name for table in policy.tables.plan.tables]
        kept: dict[str, KeptRows] = dict.fromkeys(names, same_rows)
        if then.fingerprint != worker.dataset.manifest.fingerprint:
            kept = self._grown(earlier, names, policy)
        store.load_warm(policy, info, kept)
        for note in store.notes:
            worker.tell(note)

    def _grown(self, earlier: str, names: list[str], policy: ParallelModel) -> dict[str, KeptRows]:
        """Where the rows of each table lay, told in a sentence a table. Collective."""
        worker, ctx = self.worker, self.worker.ctx
        found = continued_rows(worker.layout.data, earlier, names)
        sizes = {table.spec.name: table.spec.num_rows - 1 for table in policy.tables.plan.tables}
        for name, rows in found.items():
            known = sum(ctx.all_gather_object(rows.count(ctx.rank, ctx.world_size)))
            if name == "item" and not known:
                raise ValueError(
                    f"training.start.run: no item of {earlier} is in this data set; name a run "
                    "over the same catalogue, whose log writes item ids alike"
                )
            new = sizes[name] - known
            worker.tell(f"table {name!r}: {known:,} rows go on, {new:,} are new")
        return dict(found)


def _refuse_other_names(
    worker: Worker, info: CheckpointInfo, then: DatasetManifest, earlier: str
) -> None:
    """Refuse weights whose codes, actions or labels meant something else.

    Raises:
        ValueError: names what differs and the mend.
    """
    model, ids = worker.recipe.model, worker.semantic_ids
    place = f"training.start.run: checkpoint {info.url}"
    if worker.recipe.writes_codes and ids is not None:
        codes = info.fingerprints.get("semantic_ids")
        if codes not in (ids.fingerprint, ids.continues):
            raise ValueError(
                f"{place} was trained on other semantic ids; set tokenizer.frozen to that run, "
                "too, so that known items keep theirs"
            )
    if isinstance(model, FeatureInputs) and model.actions:
        names, now = action_names(earlier), action_names(worker.layout.data)
        if names != now:
            raise ValueError(f"{place} knows the actions {names}, and the data have {now} now")
    labels = worker.dataset.manifest.labels
    if worker.recipe.ranks_candidates and then.labels != labels:
        raise ValueError(
            f"{place} knows the labels {then.labels}, and the data have {labels}: map "
            "data.source.columns.labels as they were"
        )
