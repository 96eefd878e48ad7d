"""Which errors of an update are its samples' fault."""

import pytest
import torch

from data_loaders.poison import PoisonedSampleError
from trainer.left_out import blame

PEER = "[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:41"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(PEER),
        RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:2"),
        RuntimeError("CUDA error: device-side assert triggered"),
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
        RuntimeError("std::bad_alloc"),
        RuntimeError("can't start new thread"),
        RuntimeError("CUDA out of memory. Tried to allocate 2 MiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("unable to mmap 64 bytes from file <x>: Cannot allocate memory (12)"),
        OSError(28, "No space left on device"),
        ValueError("table 'item' has rows 0 to 5, but ids 0 to 9 were looked up"),
        AssertionError("one of ours"),
    ],
)
def test_others_are_not_blamed_on_samples(error: Exception) -> None:
    assert blame(error, [1, 2], "user") is error


def test_what_is_left_names_samples_place_and_reason() -> None:
    try:
        {}["a side feature"]
    except KeyError as error:
        blamed = blame(error, [5, 6], "user")
    assert isinstance(blamed, PoisonedSampleError) and blamed.sample_ids == [5, 6]
    assert "test_left_out.py" in blamed.where and blamed.reason == "KeyError: 'a side feature'"
    assert str(blamed).startswith("one of the samples 5, 6 cannot be used: the update (")
