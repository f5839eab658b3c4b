"""The one exception that a user is meant to see."""


class UserError(Exception):
    """A mistake the user can mend: what is wrong, why it matters, the command that fixes it.

    The command line prints the message on stderr, without a traceback, and exits with 2.
    """
