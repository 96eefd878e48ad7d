"""What of a model goes into a checkpoint, under which name, and how it comes back.

Names: `tables/<table>.<part>` sharded as the plan says, `dense/<parameter>/<part>` whole, so that
neither depends on the world size; `step` and `adam_step`; `rng/<device>` [world size, bytes].
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from sharding.parallelize import ParallelModel
from sharding.process_group import DistributedContext

State = dict[str, Tensor]
_TABLES, _DENSE, _BUFFERS, _RANDOM = "tables/", "dense/", "buffers/", "rng/"


def weights(model: ParallelModel) -> State:
    """The weights of both halves, and the dense half's buffers. Collective."""
    tables = {k: v for k, v in model.tables.state_dict().items() if k.endswith(".weight")}
    dense = {f"{name}/weight": value for name, value in model.engine.full_weights().items()}
    return _prefixed(_TABLES, tables) | _prefixed(_DENSE, dense) | _copied_buffers(model)


def training_state(model: ParallelModel) -> State:
    """Weights, optimizer state and counters of both halves. Collective.

    The tables' tensors are the model's own, which training changes; all others are copies.
    """
    dense = {
        f"{name}/{part}": value
        for name, parts in model.engine.full_state().items()
        for part, value in parts.items()
    }
    counters = {"step": model.step, "adam_step": model.engine.adam_step}
    return (
        _prefixed(_TABLES, model.tables.state_dict())
        | _prefixed(_DENSE, dense)
        | _copied_buffers(model)
        | {name: torch.tensor(value) for name, value in counters.items()}
    )


def restore_weights(model: ParallelModel, state: Mapping[str, Tensor]) -> None:
    """Put what `weights` named into a model. Collective."""
    model.before_change()
    model.tables.load_state_dict(_sharded(state))
    model.engine.load_full_state(_by_parameter(state), 0)
    _restore_buffers(model, state)


def restore_training_state(model: ParallelModel, state: Mapping[str, Tensor]) -> None:
    """Put what `training_state` named into a model. Collective."""
    model.before_change()
    model.tables.load_state_dict(_sharded(state))
    model.engine.load_full_state(_by_parameter(state), int(state["adam_step"]))
    _restore_buffers(model, state)
    model.step = int(state["step"])


def random_state(ctx: DistributedContext) -> State:
    """The state of torch's generators on every rank, [world size, bytes] uint8. Collective."""
    own = {"cpu": torch.get_rng_state()}
    if ctx.device.type == "cuda":
        own["cuda"] = torch.cuda.get_rng_state(ctx.device)
    ranks = ctx.all_gather_object(own)
    return _prefixed(_RANDOM, {name: torch.stack([rank[name] for rank in ranks]) for name in own})


def empty_random_state(metadata: Metadata, ctx: DistributedContext) -> State:
    """Tensors to load `random_state` into; none where another number of ranks wrote it."""
    return {
        key: torch.empty(saved.size, dtype=torch.uint8)
        for key, saved in tensors(metadata).items()
        if key in (f"{_RANDOM}cpu", f"{_RANDOM}{ctx.device.type}")
        and saved.size[0] == ctx.world_size
    }


def restore_random_state(state: Mapping[str, Tensor], ctx: DistributedContext) -> None:
    """Set this rank's generators from what was loaded into `empty_random_state`."""
    own = {name: ranks[ctx.rank].clone() for name, ranks in _below(_RANDOM, state).items()}
    if "cpu" in own:
        torch.set_rng_state(own["cpu"])
    if "cuda" in own:
        torch.cuda.set_rng_state(own["cuda"], ctx.device)


def refuse_other_model(
    target: Mapping[str, Tensor], saved: Mapping[str, TensorStorageMetadata], *, whole: bool
) -> None:
    """Compare what a model needs with what a checkpoint has, by name, shape and dtype.

    Args:
        target: `training_state` or `weights` of the model.
        saved: the checkpoint's tensors.
        whole: compare everything; otherwise only weights.

    Raises:
        ValueError: they differ; one sentence with the first difference and the mend.
    """
    needed = {
        key: _shape(*size_and_dtype(value))
        for key, value in target.items()
        if _is_of_a_model(key) and (whole or _is_weight(key))
    }
    found = {
        key: _shape(value.size, value.properties.dtype)
        for key, value in saved.items()
        if _is_of_a_model(key) and (whole or _is_weight(key))
    }
    differing = [key for key in needed | found if needed.get(key) != found.get(key)]
    if differing:
        key = min(
            differing, key=lambda key: (not key.startswith(_TABLES), not _is_weight(key), key)
        )
        raise ValueError(
            f"it has {found.get(key, 'no')} {key}, and this model has {needed.get(key, 'none')}; "
            + _mend(key)
        )


def _mend(key: str) -> str:
    if not key.startswith(_TABLES):
        return "it is of another architecture: use the recipe it was trained with"
    if _is_weight(key):
        return (
            "it is of another catalogue, table width or set of tables: use the data and the recipe "
            "it was trained with, or begin with its weights by training.start"
        )
    return "it is of another fused optimizer: keep sharding.optimizer.kind"


def _is_of_a_model(key: str) -> bool:
    """Whether a tensor says which model it is of."""
    return not key.startswith(_RANDOM) and key != "step"


def _is_weight(key: str) -> bool:
    return key.startswith(_BUFFERS) or key.endswith(
        ".weight" if key.startswith(_TABLES) else "/weight"
    )


def size_and_dtype(value: Tensor) -> tuple[torch.Size, torch.dtype]:
    """Of a tensor, or of all of a sharded one."""
    if isinstance(value, ShardedTensor):  # its attributes warn that the class is deprecated
        return value.metadata().size, value.metadata().tensor_properties.dtype
    return value.size(), value.dtype


def _shape(size: torch.Size, dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(size)}"


def tensors(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    """A checkpoint's tensors by name."""
    entries = metadata.state_dict_metadata.items()
    return {key: value for key, value in entries if isinstance(value, TensorStorageMetadata)}


def _prefixed(prefix: str, state: Mapping[str, Tensor]) -> State:
    return {prefix + key: value for key, value in state.items()}


def _below(prefix: str, state: Mapping[str, Tensor]) -> State:
    return {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}


def _sharded(state: Mapping[str, Tensor]) -> dict[str, ShardedTensor]:
    """The tables' part."""
    tables = _below(_TABLES, state).items()
    return {key: value for key, value in tables if isinstance(value, ShardedTensor)}


def _buffers(model: ParallelModel) -> State:
    """Persistent buffers of the dense half, which ZeRO leaves whole on every rank."""
    module = model.engine.module
    persistent = module.state_dict().keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in persistent}


def _copied_buffers(model: ParallelModel) -> State:
    copies = {name: buffer.detach().cpu().clone() for name, buffer in _buffers(model).items()}
    return _prefixed(_BUFFERS, copies)


def _restore_buffers(model: ParallelModel, state: Mapping[str, Tensor]) -> None:
    saved = _below(_BUFFERS, state)
    for name, buffer in _buffers(model).items():
        buffer.copy_(saved[name])


def _by_parameter(state: Mapping[str, Tensor]) -> dict[str, State]:
    """Parameter name → part → tensor, of the dense half."""
    parameters: dict[str, State] = {}
    for key, value in _below(_DENSE, state).items():
        name, _, part = key.rpartition("/")
        parameters.setdefault(name, {})[part] = value
    return parameters
