"""The dense half under every ZeRO stage: alike in training, exact in state."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from configs.training import OptimizerConfig, TrainingConfig
from sharding.deepspeed_engine import DenseEngine, FullState
from sharding.process_group import current_context
from tests.harness import run_ranks

STAGES = [0, 1, 2, 3]
BATCH = 12  # rows of a global batch


class Tower(nn.Module):
    """Odd sizes: no parameter's element count divides by two."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first = nn.Linear(5, 7)
        self.norm = nn.LayerNorm(7)
        self.second = nn.Linear(7, 3)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = self.norm(torch.tanh(self.first(x)))
        return ((self.second(hidden) * self.scale - y) ** 2).sum()


def data(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, 5, generator=generator), torch.randn(BATCH, 3, generator=generator)


def make_engine(stage: int) -> DenseEngine:
    return DenseEngine(
        Tower(),
        OptimizerConfig(lr=0.05, weight_decay=0.01),
        TrainingConfig(zero_stage=stage),
        current_context("cpu"),
    )


def share(values: Tensor, rank: int, world_size: int, one_rank_only: bool) -> Tensor:
    """This rank's rows of a global batch."""
    if one_rank_only:
        return values if rank == 0 else values[:0]
    return values[rank::world_size]


def train(
    engine: DenseEngine,
    steps: range,
    micro: int = 1,
    one_rank_only: bool = False,
    clip: float | None = None,
) -> list:
    """Gradient norm of each step."""
    ctx = engine._ctx
    norms = []
    for step in steps:
        x, y = (share(v, ctx.rank, ctx.world_size, one_rank_only) for v in data(step))
        with engine.accumulate(deferred=one_rank_only):
            pieces = list(zip(x.tensor_split(micro), y.tensor_split(micro), strict=True))
            for at, piece in enumerate(pieces):
                loss = engine(*piece) * ctx.world_size / BATCH
                engine.backward(loss, last=at == micro - 1)
        norm = ctx.all_reduce_sum(engine.grad_square()).sqrt()
        norms.append(float(norm))
        if clip is not None:
            engine.scale_grads((clip / norm).clamp(max=1.0))
        engine.step(0.05 / (step + 1))
    return norms


@dataclass(frozen=True)
class Case:
    """A way to train that must not matter."""

    stage: int
    world_size: int
    micro: int = 1
    clip: float | None = None
    one_rank_only: bool = False


CASES = [
    Case(stage, *options)
    for stage in STAGES
    for options in [(1,), (2,), (2, 3, 0.5), (2, 2, None, True)]
]


def trained_all(cases: list[Case]) -> list[tuple]:
    return [trained(case) for case in cases]


def trained(case: Case) -> tuple:
    engine = make_engine(case.stage)
    norms = train(engine, range(3), case.micro, case.one_rank_only, case.clip)
    return norms, engine.full_state(), engine.adam_step


@pytest.fixture(scope="module")
def outcomes() -> dict[Case, list[tuple]]:
    """What every rank found in every case; one start of processes for each world size."""
    found: dict[Case, list[tuple]] = {}
    for world_size in (1, 2):
        cases = [case for case in CASES if case.world_size == world_size]
        ranks = run_ranks(world_size, trained_all, cases)
        found |= {case: [rank[at] for rank in ranks] for at, case in enumerate(cases)}
    return found


def reference(clip: float | None) -> tuple[list, dict[str, Tensor]]:
    tower = Tower()
    adam = torch.optim.AdamW(
        tower.parameters(), lr=0.05, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.01
    )
    norms = []
    for step in range(3):
        adam.param_groups[0]["lr"] = 0.05 / (step + 1)
        adam.zero_grad()
        (tower(*data(step)) / BATCH).backward()
        limit = float("inf") if clip is None else clip
        norms.append(float(nn.utils.clip_grad_norm_(tower.parameters(), limit)))
        adam.step()
    return norms, {name: p.detach() for name, p in tower.named_parameters()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_stage_equals_plain_adamw(case: Case, outcomes: dict[Case, list[tuple]]) -> None:
    want_norms, want = reference(case.clip)
    for norms, state, adam_step in outcomes[case]:
        assert adam_step == 3
        assert norms == pytest.approx(want_norms, rel=1e-5)
        for name, weight in want.items():
            torch.testing.assert_close(state[name]["weight"], weight, rtol=1e-5, atol=1e-6)


def uninterrupted_all(stages: list[int]) -> list[tuple[FullState, FullState, Tensor]]:
    return [uninterrupted(stage) for stage in stages]


def uninterrupted(stage: int) -> tuple[FullState, FullState, Tensor]:
    """State after three steps, after five, and a forward between."""
    engine = make_engine(stage)
    train(engine, range(3))
    middle = engine.full_state()
    with torch.no_grad():
        loss = engine(*data(9))
    train(engine, range(3, 5))
    return middle, engine.full_state(), loss


def continued_all(
    states: list[tuple[int, FullState]],
) -> list[tuple[FullState, FullState, Tensor]]:
    return [continued(stage, saved) for stage, saved in states]


def continued(stage: int, saved: FullState) -> tuple[FullState, FullState, Tensor]:
    """The same from a fresh engine that loads the state after three steps."""
    engine = make_engine(stage)
    engine.load_full_state(saved, adam_step=3)
    loaded = engine.full_state()
    with torch.no_grad():
        loss = engine(*data(9))
    train(engine, range(3, 5))
    return loaded, engine.full_state(), loss


@pytest.fixture(scope="module")
def complete() -> list[tuple[FullState, FullState, Tensor]]:
    """What two ranks do uninterrupted, by stage."""
    return run_ranks(2, uninterrupted_all, STAGES)[0]


def test_state_round_trip_continues_bit_for_bit(complete: list) -> None:
    states = [(stage, complete[stage][0]) for stage in STAGES]
    for rank in run_ranks(2, continued_all, states):
        for (middle, end, loss), (loaded, finished, loss_after) in zip(complete, rank, strict=True):
            assert torch.equal(loss, loss_after)
            for name, parts in middle.items():
                for key, value in parts.items():
                    assert torch.equal(value, loaded[name][key]), (name, key)
                    assert torch.equal(end[name][key], finished[name][key]), (name, key)


@pytest.mark.parametrize("world_size", [1, 3])
def test_state_moves_between_stages_and_world_sizes(world_size: int, complete: list) -> None:
    moves = [(1, 3), (3, 2), (2, 0), (0, 1)]
    states = [(read, complete[written][0]) for written, read in moves]
    for rank in run_ranks(world_size, continued_all, states):
        for (written, _), (loaded, finished, _) in zip(moves, rank, strict=True):
            middle, end, _ = complete[written]
            for name, parts in middle.items():
                for key, value in parts.items():
                    assert torch.equal(value, loaded[name][key]), (name, key)
                    torch.testing.assert_close(
                        end[name][key], finished[name][key], rtol=1e-5, atol=1e-6
                    )


def weights_only(stage: int) -> tuple[FullState, Tensor, int]:
    engine = make_engine(stage)
    train(engine, range(1))
    other = {name: {"weight": torch.full_like(v, 0.1)} for name, v in engine.full_weights().items()}
    engine.load_full_state(other, 0)
    with torch.no_grad():
        return engine.full_state(), engine(*data(9)), engine.adam_step


def weights_only_all() -> list[tuple[FullState, Tensor, int]]:
    return [weights_only(stage) for stage in STAGES]


def test_weights_alone_reset_the_optimizer() -> None:
    tower = Tower()
    for parameter in tower.parameters():
        nn.init.constant_(parameter, 0.1)
    for state, loss, adam_step in run_ranks(2, weights_only_all)[0]:
        assert adam_step == 0
        torch.testing.assert_close(loss, tower(*data(9)).detach())
        for parts in state.values():
            assert not parts["exp_avg"].any()
            assert (parts["weight"] == 0.1).all()


def wrong_state() -> str:
    engine = make_engine(1)
    state = engine.full_state()
    state["first.weight"]["weight"] = torch.zeros(2, 2)
    with pytest.raises(ValueError) as wrong_shape:
        engine.load_full_state(state, 0)
    del state["norm.bias"]
    with pytest.raises(ValueError) as missing:
        engine.load_full_state(state, 0)
    return str(wrong_shape.value) + str(missing.value)


def test_a_state_of_another_model_is_refused() -> None:
    message = run_ranks(1, wrong_state)[0]
    assert "'first.weight' is (2, 2) there and (7, 5) here" in message
    assert "norm.bias" in message


def quiet_start() -> dict[str, bool]:
    import sys

    make_engine(1)
    from torch.utils import cpp_extension

    return {
        "built": "deepspeed.ops.op_builder.cpu.comm" in sys.modules
        and hasattr(torch.ops.deepspeed, "inference_all_reduce_"),
        "extensions": bool(cpp_extension.JIT_EXTENSION_VERSIONER.entries),
    }


def test_nothing_is_compiled_at_start() -> None:
    assert not any(run_ranks(1, quiet_start)[0].values())
