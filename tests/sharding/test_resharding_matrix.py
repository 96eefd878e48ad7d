"""Any checkpoint into any policy: every world size of 1 to 4 into every other, every placement and
every ZeRO stage into every other, against the same training on one process.

One start of processes writes for a world size, and one reads: starting costs more than training.
"""

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from configs.sharding import Placement, SparseOptimizerConfig
from configs.training import OptimizerConfig
from sharding.checkpoint import CheckpointInfo, CheckpointStore
from sharding.parallelize import ParallelModel
from sharding.process_group import current_context
from tests.harness import run_ranks
from tests.sharding.policies import differing, whole_state
from tests.sharding.toy import ToyReference, toy_inputs, toy_policy, toy_recipe

WIDTH = 18  # 4 ranks hold 5, 5, 5 and 3 columns, which the kernels store as 8
WORLDS = (1, 2, 3, 4)
PLACEMENTS: tuple[Placement, ...] = ("row_wise", "table_wise", "column_wise", "replicated")
SAMPLES = list(range(12))
BEFORE, AFTER = 2, 2
ADAM = OptimizerConfig(lr=0.02, betas=(0.9, 0.98), weight_decay=0.01)
SPARSE = SparseOptimizerConfig(lr=0.3, eps=1e-4)


@dataclass(frozen=True)
class Cell:
    """How a policy lies on its ranks; `item` and `user_age` are placed alike."""

    world: int
    placement: Placement
    stage: int

    @property
    def blocks(self) -> int:
        """Blocks of columns of a sharded table."""
        if self.placement != "column_wise":
            return 1
        return len(range(0, WIDTH, -(-WIDTH // min(self.world, WIDTH // 4))))


def sources(world: int) -> list[Cell]:
    """What is saved: every placement, each under its own stage, another one in every world."""
    return [Cell(world, p, (at + world) % 4) for at, p in enumerate(PLACEMENTS)]


def targets(world: int, source: Cell) -> list[Cell]:
    """What a checkpoint is loaded into: half of the placements, each under another stage."""
    first = PLACEMENTS.index(source.placement)
    return [
        Cell(world, placement, (at // 2 + at + first + source.world + world) % 4)
        for at, placement in enumerate(PLACEMENTS)
        if (at + first + source.world + world // 2) % 2 == 0
    ]


def pairs() -> list[tuple[Cell, Cell]]:
    return [(a, b) for n in WORLDS for a in sources(n) for m in WORLDS for b in targets(m, a)]


def test_the_cells_cover_all_pairs() -> None:
    cells = pairs()
    assert len(cells) == 128
    assert len({(a.world, b.world, a.placement) for a, b in cells}) == 4**3
    assert len({(a.world, b.world, b.placement) for a, b in cells}) == 4**3
    assert len({(a.placement, b.placement) for a, b in cells}) == 4**2
    assert len({(a.stage, b.stage) for a, b in cells}) == 4**2
    for one, other in itertools.product(PLACEMENTS, repeat=2):
        worlds = {
            (a.world, b.world) for a, b in cells if (a.placement, b.placement) == (one, other)
        }
        assert any(n < m for n, m in worlds) and any(n > m for n, m in worlds)


def name_of(cell: Cell) -> str:
    return f"{cell.world}-{cell.placement}-{cell.stage}"


def policy_of(cell: Cell) -> ParallelModel:
    recipe = toy_recipe(cell.placement, cell.stage, optimizer=SPARSE)
    return toy_policy(recipe, ADAM, total_steps=10, width=WIDTH)


def train(policy: ParallelModel, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        mine = SAMPLES[policy.ctx.rank :: policy.ctx.world_size]
        losses.append(policy.train_step([toy_inputs(mine, policy.step)]).loss)
    return losses


def newest(root: str, cell: Cell) -> tuple[CheckpointStore, CheckpointInfo]:
    store = CheckpointStore(f"{root}/{name_of(cell)}", 2, current_context("cpu"))
    info = store.newest()
    assert info is not None
    return store, info


def save_all(root: str, world: int) -> dict[Cell, dict[str, Tensor]]:
    """Train and save every source; their states, whole."""
    states = {}
    for cell in sources(world):
        policy = policy_of(cell)
        train(policy, BEFORE)
        store = CheckpointStore(f"{root}/{name_of(cell)}", 2, policy.ctx)
        store.save(policy, policy.step, {"at": policy.step}, {}, {})
        states[cell] = whole_state(policy)
    return states


Outcome = tuple[dict[str, Tensor], tuple[str, ...], list[float], dict[str, Tensor]]
"""The state after loading, what the store noted, the next losses, and the state after them."""


def load_all(root: str, world: int) -> dict[tuple[Cell, Cell], Outcome]:
    """Load every source into its targets of this world; a policy takes one after another."""
    policies: dict[Cell, ParallelModel] = {}
    outcomes = {}
    for source in [cell for n in WORLDS for cell in sources(n)]:
        store, info = newest(root, source)
        for cell in targets(world, source):
            if cell not in policies:
                policies[cell] = policy_of(cell)
            policy = policies[cell]
            assert store.load(policy, info) == {"at": BEFORE}
            loaded, notes = whole_state(policy), store.notes
            outcomes[source, cell] = (loaded, notes, train(policy, AFTER), whole_state(policy))
    return outcomes if current_context("cpu").rank == 0 else {}


@pytest.fixture(scope="module")
def matrix(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[Cell, dict[str, Tensor]], dict[tuple[Cell, Cell], Outcome]]:
    """The state of every source, and what became of it in each of its targets."""
    root = str(tmp_path_factory.mktemp("matrix"))
    saved: dict[Cell, dict[str, Tensor]] = {}
    loaded: dict[tuple[Cell, Cell], Outcome] = {}
    for world in WORLDS:
        saved |= run_ranks(world, save_all, root, world)[0]
    for world in WORLDS:
        loaded |= run_ranks(world, load_all, root, world)[0]
    assert set(loaded) == set(pairs())
    return saved, loaded


class Twin(ToyReference):
    """The training on one process whose optimizer state can be brought into another cut."""

    def __init__(self, cell: Cell) -> None:
        replicated = ("item", "user_age") if cell.placement == "replicated" else ()
        super().__init__(ADAM, SPARSE, replicated, column_blocks=cell.blocks, width=WIDTH)
        self.cell, self.steps = cell, 0

    def train(self, steps: int) -> list[float]:
        """The next losses."""
        losses = []
        for _ in range(steps):
            losses.append(self.step(SAMPLES, self.steps, SPARSE.lr))
            self.steps += 1
        return losses

    def recut(self, cell: Cell) -> "Twin":
        """A twin that goes on from here as `cell` would."""
        other = Twin(cell)
        other.steps = self.steps
        for mine, theirs in zip(self.loss.parameters(), other.loss.parameters(), strict=True):
            theirs.data.copy_(mine.data)
            other.adam.state[theirs] = {k: v.clone() for k, v in self.adam.state[mine].items()}
        decay = 1 - ADAM.betas[1] ** self.steps
        for name, table in other.tables.items():
            table.weight.copy_(self.table(name))
            held, theirs = self.dense_tables.get(name), other.dense_tables.get(name)
            if theirs is not None:
                theirs.data.copy_(table.weight)
            if held is None and theirs is None:
                table.squares.copy_(self.tables[name].squares)
            elif held is not None and theirs is not None:
                state = {k: v.clone() for k, v in self.adam.state[held].items()}
                other.adam.state[theirs] = state
            elif held is not None:  # Adam's running mean of squares over all steps is a sum
                table.squares.copy_(self.adam.state[held]["exp_avg_sq"] * self.steps / decay)
            else:
                assert theirs is not None
                other.adam.state[theirs] = {
                    "step": torch.tensor(float(self.steps)),
                    "exp_avg": torch.zeros_like(theirs.data),
                    "exp_avg_sq": self.tables[name].squares / self.steps * decay,
                }
            for block in table.blocks:
                table.squares[:, block] = table.squares[:, block].mean(1, keepdim=True)
        return other

    def state(self) -> dict[str, Tensor]:
        """As a checkpoint names it; the accumulators as columns' true means."""
        count = torch.tensor(self.steps)
        state = {"step": count, "adam_step": count}
        dense = {f"loss_module.{name}": p for name, p in self.loss.named_parameters()}
        dense |= {f"tables.{name}.weight": p for name, p in self.dense_tables.items()}
        for name, parameter in dense.items():
            state[f"dense/{name}/weight"] = parameter.detach()
            for part in ("exp_avg", "exp_avg_sq"):
                state[f"dense/{name}/{part}"] = self.adam.state[parameter][part]
        for name, table in self.tables.items():
            if name not in self.dense_tables:
                state[f"tables/{name}.weight"] = table.weight
                # The kernels store rows padded to a multiple of 4, and divide by that width.
                stored = -(-(table.blocks[0].stop) // 4) * 4
                widths = torch.tensor([len(range(WIDTH)[block]) for block in table.blocks])
                means = torch.stack([table.squares[:, block.start] for block in table.blocks], 1)
                state[f"tables/{name}.momentum1"] = means * widths / stored
        return state


def assert_alike(state: dict[str, Tensor], twin: dict[str, Tensor], where: object) -> None:
    assert state.keys() == twin.keys(), where
    for name, value in state.items():
        assert value.shape == twin[name].shape, (where, name)
        torch.testing.assert_close(
            value, twin[name].to(value.dtype), rtol=1e-3, atol=1e-6, msg=f"{where} {name}"
        )


def test_every_cell_goes_on_as_the_same_state_on_one_process(matrix) -> None:
    saved, loaded = matrix
    for source, targets_of in itertools.groupby(loaded.items(), key=lambda item: item[0][0]):
        twin = Twin(source)
        twin.train(BEFORE)
        assert_alike(saved[source], twin.state(), source)
        for (_, target), (state, _, losses, final) in targets_of:
            there = twin.recut(target)
            assert_alike(state, there.state(), (source, target))
            assert losses == pytest.approx(there.train(AFTER), rel=1e-4), (source, target)
            assert_alike(final, there.state(), (source, target))


def weight_of(table: str, state: dict[str, Tensor]) -> Tensor:
    """A table's weights in either half."""
    held = state.get(f"tables/{table}.weight")
    return state[f"dense/tables.{table}.weight/weight"] if held is None else held


def test_what_both_cuts_keep_is_kept_bit_for_bit(matrix) -> None:
    saved, loaded = matrix
    for (source, target), (state, notes, _, _) in loaded.items():
        before = saved[source]
        dense = [key for key in before if "tables" not in key]
        assert all(torch.equal(state[key], before[key]) for key in dense)
        for name in ("item", "user_age"):
            assert torch.equal(weight_of(name, state), weight_of(name, before)), (source, target)
        moved = (source.placement == "replicated") != (target.placement == "replicated")
        if not moved and source.blocks == target.blocks:
            assert differing(state, before) == [] and notes == (), (source, target)
        else:
            assert len(notes) == 2 and all("table '" in note for note in notes), (source, target)
