"""What is nobody's mistake, and may be otherwise the next time."""

EXIT_STATUS = 75
"""EX_TEMPFAIL of sysexits.h: whoever started the run may start it again."""


class BusyError(Exception):
    """One sentence on what did not come in time; the same command may succeed later."""
