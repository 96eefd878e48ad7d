"""Lines of a run for whoever reads them, who may stop reading, or leave.

`tandem train RECIPE | tee log` and Ctrl-C end the reader first; a pager holds its writer up.
Neither may keep a run from saving.
"""

import os
import stat
import sys
import threading

STDOUT, STDERR = 1, 2


def say(line: str, *, error: bool = False) -> None:
    """Print a line to stdout, or stderr; once its reader has left, what is printed vanishes."""
    try:
        print(line, file=sys.stderr if error else sys.stdout, flush=True)
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


def _vanish(stream: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream)
    os.close(nowhere)
