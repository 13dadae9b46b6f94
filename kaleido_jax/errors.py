"""The errors that end a command in one line, and the statuses with which training ends early."""

from __future__ import annotations

FAILED = 1
PREEMPTED = 75  # sysexits' EX_TEMPFAIL: the same command again goes on
HUNG = 124  # as of timeout(1)


class UserError(Exception):
    """A mistake of the user: one line that names the file, key or record and what would be right.

    The command line prints it without a traceback and exits with status 2.
    """


class StopRun(Exception):
    """A run that cannot or shall not go on: one line for people, an exit status for scripts.

    Args:
      message: what happened, and what is kept.
      status: FAILED, or PREEMPTED where the same command goes on.
    """

    def __init__(self, message: str, status: int = FAILED):
        super().__init__(message)
        self.status = status
