"""The exception for errors that the user can fix."""

import contextlib
from collections.abc import Generator
from pathlib import Path


class InputError(Exception):
    """An error in the input. The message says what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with status 2.
    """


class ModelError(InputError):
    """An error in a model: it gives a value that is not finite. A server of the model answers with status 500."""


@contextlib.contextmanager
def explained(path: Path | str, remedy: str) -> Generator[None]:
    """Raise InputError that names `path`, the reason and the remedy for whatever a library raises while reading it."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise InputError(f"{error.filename or path} does not exist. {remedy}") from error
    except Exception as error:
        raise InputError(f"{path} is damaged ({str(error) or repr(error)}). {remedy}") from error
