"""The one error of the data layer, and how errors of the operating system become one line."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class DataError(ValueError):
    """Data that cannot be written or read. The message is one line: which file or sample, what is wrong, what helps.

    A loader's worker process hands an error over as its whole traceback; here it is the one line again.
    """

    def __init__(self, message: str) -> None:
        if message.startswith("Caught DataError in DataLoader worker"):
            message = message.rstrip().splitlines()[-1].partition("DataError: ")[2]
        super().__init__(message)


@contextmanager
def readable_errors(doing: str, path: Path) -> Iterator[None]:
    """Turn an `OSError` inside the block into a `DataError` of one line.

    Args:
        doing: what the block does, such as "write data".
        path: the file or folder that the line names where the error itself names none.

    Raises:
        DataError: full disk, missing permission, missing file, anything else that the system refused.
    """
    try:
        yield
    except OSError as error:
        raise DataError(_one_line(error, doing, path)) from error


def _one_line(error: OSError, doing: str, path: Path) -> str:
    where = error.filename or path
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"cannot {doing} in {path}: the disk is full; free some space or choose another folder"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"cannot {doing}: no permission for {where}"
    return f"cannot {doing}: {where}: {error.strerror or error}"
