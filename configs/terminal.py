"""Lines of a command or a run for whoever reads them, who may stop reading, or leave.

`tandem train RECIPE | tee log` and Ctrl-C end the reader first; a pager holds its writer up.
Neither may keep a run from saving. What is said may quote a URL or a file's contents, so this is
also where credentials and control sequences end.
"""

import os
import re
import stat
import sys
import threading
from typing import Literal

from configs.redaction import redacted

STDOUT, STDERR = 1, 2
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

    Once its reader has left, what is printed vanishes.

    Args:
        line: with anything in it; credentials are hidden, control characters escaped.
        error: whether it goes to stderr.
        end: follows it.
        style: how a terminal shows it.
    """
    stream = sys.stderr if error else sys.stdout
    text = _CONTROL.sub(_escaped, redacted(line))
    try:
        if style is not None and stream is not None and stream.isatty():
            text = f"{_STYLES[style]}{text}{_PLAIN}"
        print(text, end=end, file=stream, flush=True)
    except OSError:
        _vanish(STDERR if error else STDOUT)


def say_aside(line: str, wait_s: float) -> None:
    """As `say`, for a handler of signals: it waits no longer than this for a reader that has
    stopped, or for another thread that prints."""
    thread = threading.Thread(target=say, args=(line,), daemon=True)
    thread.start()
    thread.join(wait_s)


def leave_terminal() -> None:
    """Let what is printed from now on vanish where it went to a terminal, which is gone."""
    for stream in (STDOUT, STDERR):
        if stat.S_ISCHR(os.fstat(stream).st_mode):
            _vanish(stream)


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape", "surrogatepass").decode()


def _vanish(stream: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream)
    os.close(nowhere)
