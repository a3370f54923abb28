"""The exception for errors that the user can fix."""


class InputError(Exception):
    """An error in the input. The message says what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with status 2.
    """
