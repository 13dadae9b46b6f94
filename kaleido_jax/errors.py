"""The one error that is the user's to mend."""

from __future__ import annotations


class UserError(Exception):
    """A mistake of the user: one line that names the file, key or record and what would be right.

    The command line prints it without a traceback and exits with status 2.
    """
