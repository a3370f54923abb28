"""The one exception for what a user can mend."""


class InputError(Exception):
    """Bad input: the message says what is wrong, in which file or key, and what to do.

    The command line prints it without a traceback and exits with status 1.
    """
