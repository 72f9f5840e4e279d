"""The errors a user can meet. Each message is one line: what, where, what to do.

The command line turns them into `error: ...` on stderr and the class's exit code; a library user catches them.
"""


class WanError(Exception):
    """Something failed (exit code 1)."""

    exit_code = 1


class UserError(WanError, ValueError):
    """The request cannot be met as asked: a bad option, a path that does not exist, ... (exit code 2)."""

    exit_code = 2


class CheckpointError(WanError):
    """A model file exists but is damaged, incomplete, or not what it claims to be (exit code 1)."""
