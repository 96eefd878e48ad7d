"""What says that memory ran out, of the host or of a device.

Libraries raise it as each their own kind: known by kind, by error number, or by words of torch,
numpy, the C++ library, the kernel and Ray.
"""

import errno

_SIGNS = (
    "allocate memory",
    "unable to allocate",
    "bad_alloc",
    "out of memory",
    "alloc_failed",
    "start new thread",
    "node_out_of_memory",
    "low on memory",
    "memory pressure",
)
_OF_A_DEVICE = ("cuda", "cublas", "cudnn", "nccl")


def is_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out; a ValueError says itself what is wrong."""
    if isinstance(error, ValueError):
        return False
    if isinstance(error, MemoryError) or (
        isinstance(error, OSError) and error.errno == errno.ENOMEM
    ):
        return True
    text = str(error).lower()
    return any(sign in text for sign in _SIGNS)


def is_of_device_memory(error: BaseException) -> bool:
    """Whether it is a device's memory that ran out."""
    text = str(error).lower()
    return is_of_memory(error) and any(sign in text for sign in _OF_A_DEVICE)
