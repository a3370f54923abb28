"""The exception for errors that the user can fix, and a sentence for what the machine lacks."""

import contextlib
import errno
import os
import re
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


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
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{error.filename or path} does not exist. {remedy}") from error
    except Exception as error:
        if machine_fault(error):
            raise
        raise InputError(f"{path} is damaged ({str(error) or repr(error)}). {remedy}") from error


def first_invalid(error: "ValidationError") -> tuple[str, str]:
    """Return the first invalid place that pydantic found, such as `deps.0.path`, and what is wrong with it."""
    first = error.errors(include_url=False)[0]
    return ".".join(str(part) for part in first["loc"]), first["msg"]


# Of the system: rights, space, quotas, open files.
LACKS = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG),
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENFILE, errno.EMFILE),
}
# As PyTorch, oneDNN, the loader of libraries and modules in C say it. Python has a type of its own.
_NO_MEMORY = re.compile(
    r"can('t|not) allocate memory|not enough memory|out of memory|bad_alloc|can't start new thread"
    r"|could not create a primitive|failed to map segment|error return without exception set",
    re.IGNORECASE,
)


def machine_fault(error: BaseException) -> str | None:
    """Return what the machine lacks, if that is why a program or a library failed: memory, space, a right; else None.

    A library may wrap the error of the system.
    """
    cause: BaseException | None = error
    while cause is not None:
        # Rust's libraries give the number of the system's error in their text.
        said = re.search(r"\(os error (\d+)\)", str(cause))
        number = cause.errno if isinstance(cause, OSError) else int(said[1]) if said else None
        wide = isinstance(cause, (RuntimeError, ImportError, SystemError)) and _NO_MEMORY.search(str(cause))
        if isinstance(cause, MemoryError) or number == errno.ENOMEM or wide:
            return "not enough memory: end other programs, or use a smaller batch_size in params.yaml"
        if number in LACKS:
            where = f"{cause.filename}: " if isinstance(cause, OSError) and cause.filename else ""
            return where + os.strerror(number)
        cause = cause.__cause__ or cause.__context__
    return None
