"""Lines of a command or a run for whoever reads them, who may stop reading, or leave.

`tandem train RECIPE | tee log` and Ctrl-C end the reader first; a pager holds its writer up.
Neither may keep a run from saving. What is said may quote a URL or a file's contents, so this is
also where credentials and control sequences end.
"""

import os
import re
import select
import stat
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Literal, TextIO, TypeVar

from configs.redaction import redacted

T = TypeVar("T")
_STYLES = {"red": "\x1b[31m", "bold": "\x1b[1m"}
_PLAIN = "\x1b[0m"
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"  # not tab, newline
)
"""What moves a terminal's cursor, colours it, turns its text around, or is no character."""


def say(
    line: str,
    *,
    error: bool = False,
    end: str = "\n",
    style: Literal["red", "bold"] | None = None,
) -> None:
    """Print a line to stdout, or stderr, fit to be shown.

    Once its reader has left, what is printed vanishes. Where there is no room for it, as on a full
    disk, it is lost: a note stands in its place once there is, and if there never is, Python ends
    with a status of its own (120). An unbuffered Python (`-u`) has no place for the note.

    Args:
        line: with anything in it; credentials are hidden, control characters escaped.
        error: whether it goes to stderr.
        end: follows it.
        style: how a terminal shows it.
    """
    stream = sys.stderr if error else sys.stdout
    number = _number(stream)
    text = _CONTROL.sub(_escaped, redacted(line))
    if number is None:
        print(text, end=end, file=stream, flush=True)
        return
    if style is not None and stream.isatty():
        text = f"{_STYLES[style]}{text}{_PLAIN}"
    try:
        _patiently(number, stream.flush)  # what others printed, or the note of a lost line
        _write(number, f"{text}{end}".encode(stream.encoding, stream.errors or "strict"), stream)
    except OSError as gone:
        if isinstance(gone, ConnectionError) or stat.S_ISCHR(os.fstat(number).st_mode):
            _vanish(number)


def say_aside(line: str, wait_s: float) -> None:
    """As `say`, for a handler of signals: it waits no longer than this for a reader that has
    stopped, or for another thread that prints."""
    thread = threading.Thread(target=say, args=(line,), daemon=True)
    thread.start()
    thread.join(wait_s)


def leave_terminal() -> None:
    """Let what is printed from now on vanish where it went to a terminal, which is gone."""
    for stream in (sys.stdout, sys.stderr):
        number = _number(stream)
        if number is not None and stat.S_ISCHR(os.fstat(number).st_mode):
            _vanish(number)


def _number(stream: TextIO | None) -> int | None:
    """The file below a stream; None if it was closed before this process began, or is in memory."""
    try:
        return None if stream is None else stream.fileno()
    except (OSError, ValueError):
        return None


def _patiently(number: int, attempt: Callable[[], T]) -> T:
    """What it returns, once a reader that shall not be waited for takes more."""
    while True:
        try:
            return attempt()
        except BlockingIOError:
            select.select([], [number], [])


def _write(number: int, rest: bytes, stream: TextIO) -> None:
    try:
        while rest:
            rest = rest[_patiently(number, partial(os.write, number, rest)) :]
    except ConnectionError:
        raise
    except OSError as error:
        stream.write(f"\n(lines were lost here: {error.strerror})\n")
        raise


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape", "surrogatepass").decode()


def _vanish(number: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)
