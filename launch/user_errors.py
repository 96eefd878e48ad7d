"""What ends a command with a sentence instead of a traceback."""

from configs.storage_faults import StorageError

USER_ERRORS = (ValueError, FileNotFoundError, PermissionError, StorageError)
"""Their message names the place and the mend."""

BUSY_STATUS = 75
"""EX_TEMPFAIL of sysexits.h: whoever started the run may start it again."""


class GaveUpError(Exception):
    """What failed was tried as often as the recipe allows; what is committed stands."""


class BusyError(Exception):
    """One sentence on what did not come in time; the same command may succeed later."""
