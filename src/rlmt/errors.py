"""The one exception for mistakes that a user can mend."""


class UserError(Exception):
    """Bad input, told in one line: what is wrong, where, and the cure.

    The command line prints the message alone, without a traceback, and exits with status 2. Raise it before any
    model is loaded wherever the mistake can be seen by then.
    """
