"""What goes wrong with storage: what is tried again, and what is told in one sentence.

Each driver of fsspec raises its own kinds, few of which can be imported here: they are known by
error number, HTTP status or name, of the error itself or of what caused it.
"""

import errno
import logging
import os
import random
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, TypeVar

from configs.memory_faults import is_of_memory

_log = logging.getLogger(__name__)
T = TypeVar("T")

WAITS_S = (0.2, 0.4, 0.8, 1.6, 3.2, 6.4)
"""Longest pauses before further attempts; each is cut by chance, so that ranks do not march."""
_PASSING_NUMBERS = frozenset(
    {
        errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ESTALE, errno.ETIMEDOUT,
        errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET,
        errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETRESET, errno.ENETUNREACH,
    }
)  # fmt: skip
_PASSING_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_PASSING_NAMES = frozenset(
    {
        "ClientConnectionError", "ClientPayloadError", "ConnectTimeoutError", "IncompleteRead",
        "ConnectionClosedError", "EndpointConnectionError", "ProtocolError", "ReadTimeoutError",
        "ResponseStreamingError",
    }
)  # fmt: skip
_NAMELESS = frozenset(
    {
        "ClientAuthenticationError", "CredentialRetrievalError", "DefaultCredentialsError",
        "NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "RefreshError",
        "TokenRetrievalError",
    }
)  # fmt: skip
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_NO_HANDLES = frozenset({errno.EMFILE, errno.ENFILE})


class StorageError(OSError):
    """There is no room, no right, no credentials or no answer: a sentence with place and mend.

    It says nothing of what lies there: that may be whole, and must not be taken for damaged.
    """


def is_passing(error: BaseException) -> bool:
    """Whether the same call may well succeed a little later."""
    for each in _causes(error):
        if isinstance(each, ConnectionError | TimeoutError):
            return True
        if isinstance(each, OSError) and each.errno in _PASSING_NUMBERS:
            return True
        if _status(each) in _PASSING_STATUS or _names(each) & _PASSING_NAMES:
            return True
    return False


def patiently(call: Callable[[], T]) -> T:
    """What `call` gives, which is tried again with growing pauses while its failure may pass.

    It must be safe to repeat. The last failure is raised as it is; but a file is missing only where
    the storage said so, not where it gave no answer, or no right.
    """
    for wait in (*WAITS_S, None):
        try:
            return call()
        except Exception as error:
            told = _told(error)
            if wait is None or not is_passing(told):
                if told is error:
                    raise
                raise told from None
            _log.warning("storage: %s; it is tried again", first_line(told))
            time.sleep(wait * random.Random().uniform(0.5, 1.0))
    raise AssertionError("the last attempt returns or raises")


def _told(error: Exception) -> Exception:
    """What went wrong behind a driver (that of http) which calls every failure a missing file."""
    if isinstance(error, FileNotFoundError):
        for cause in (each for each in _causes(error) if each is not error):
            if isinstance(cause, Exception) and (is_passing(cause) or _status(cause) in (401, 403)):
                return cause
    return error


@contextmanager
def explained(url: str, done: str) -> Iterator[None]:
    """Turn what a user must mend into a sentence; `done` is what cannot be: `read` or `written`.

    Raises:
        StorageError: in place of a driver's own error; all others pass as they are.
        MemoryError: this machine has no memory for it, which says nothing of the storage.
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and is_of_memory(error):
            raise MemoryError(f"{url} cannot be {done} ({first_line(error)})") from error
        sentence = _sentence(url, done, error)
        if sentence is None:
            raise
        number = error.errno if isinstance(error, OSError) else None
        told = StorageError(sentence)
        told.errno = number
        raise told from error


def _sentence(url: str, done: str, error: BaseException) -> str | None:
    reason = getattr(error, "strerror", None) or first_line(error)
    for each in _causes(error):
        number, status = getattr(each, "errno", None), _status(each)
        if isinstance(each, IsADirectoryError):
            return f"{url} cannot be {done}: it is a directory; name a file"
        if _names(each) & _NAMELESS or status == 401:
            return (
                f"{url} cannot be {done}: its store takes no credentials of this machine "
                f"({reason}); give them where its driver looks, such as AWS_PROFILE or "
                "GOOGLE_APPLICATION_CREDENTIALS in the environment of every node, never in the URL"
            )
        if number in _FULL or status == 507:
            return (
                f"{url} cannot be {done} ({reason}); free space there, or put `output` elsewhere, "
                "and run the same command again"
            )
        if number in _NO_HANDLES:
            return (
                f"{url} cannot be {done} ({reason}); raise the limit of open files (ulimit -n), "
                "and run the same command again"
            )
        if number == errno.ELOOP:
            return f"{url} cannot be {done} ({reason}); put what the link stands for in its place"
        if isinstance(each, PermissionError) or number in _FORBIDDEN or status == 403:
            return (
                f"{url} cannot be {done} ({reason}); grant rights there, or name another place, "
                "and run the same command again"
            )
    if is_passing(error):
        return (
            f"{url} cannot be {done}: its storage did not answer, however often it was asked "
            f"({reason}); run the same command again when it does"
        )
    return None


def open_regular(path: str) -> IO[bytes]:
    """A local file to read: a pipe would wait for ever, and a device may have no end.

    Raises:
        ValueError: it is no regular file.
    """
    stream = open(  # noqa: SIM115 - whoever asked for it closes it
        path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)
    )
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise ValueError(f"{path} is no regular file: put the file itself in its place")
    return stream


def first_line(error: BaseException) -> str:
    """What an error says, without what follows."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and those it was raised from; drivers translate what HTTP told them."""
    each: BaseException | None = error
    for _ in range(8):
        if each is None:
            return
        yield each
        each = each.__cause__


def _status(error: BaseException) -> int | None:
    """HTTP status, wherever a driver's errors keep it."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return found if isinstance(found, int) else None
    for name in ("status", "status_code", "code"):
        found = getattr(error, name, None)
        if isinstance(found, int):
            return found
    return None


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}
