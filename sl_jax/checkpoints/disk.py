"""What can go wrong with files and folders, found early and said in one line."""

import contextlib
import errno
import hashlib
import os
import re
import uuid

from etils import epath

from sl_jax.checkpoints.byte_ranges import is_remote, reachable

_FULL = "please free some space, or choose a place on another disk"
_CLOSED = "please allow access to it, or choose another place"
_TAKEN = "something else is in its way; please choose another place"
_MISSING = "please check the path, or choose another place"
_ADVICE = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EACCES: _CLOSED,
    errno.EPERM: _CLOSED,
    errno.EROFS: _CLOSED,
    errno.ENOTDIR: _TAKEN,
    errno.EEXIST: _TAKEN,
    errno.EISDIR: _TAKEN,
    errno.ENOENT: _MISSING,
    errno.ENAMETOOLONG: _MISSING,
    errno.ELOOP: _MISSING,
}

# TensorStore raises ValueErrors, which name the system's number, or begin with a store's status.
_NUMBER = re.compile(r"os_error_code='(\d+)'")
_STATUSES = {
    "UNAVAILABLE": errno.EHOSTUNREACH,
    "DEADLINE_EXCEEDED": errno.ETIMEDOUT,
    "PERMISSION_DENIED": errno.EACCES,
    "UNAUTHENTICATED": errno.EACCES,
    "RESOURCE_EXHAUSTED": errno.EDQUOT,
}
# Of a path that leads nowhere, which others cannot read either, or that nobody can have meant.
_OF_THE_PATH = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR),
    *(errno.EINVAL, errno.EILSEQ, errno.ENAMETOOLONG),
}

# File systems take 255 bytes, and endings come behind it.
_LONGEST_NAME = 200


def inside_name(name: str) -> str:
    """A name of others, of a picture or a design, as that of a folder: it leads nowhere else.

    Names that could leave the folder that they stand in, or that file systems refuse, get others,
    with a digest of their own; all others stay. A slash stands for a folder inside.
    """
    return "/".join(map(_inside, name.split("/")))


def _inside(part: str) -> str:
    raw = os.fsencode(part)
    if part not in ("", ".", "..") and b"\0" not in raw and len(raw) <= _LONGEST_NAME:
        return part
    told = re.sub(r"[^\w .-]", "_", raw[: _LONGEST_NAME - 9].decode("utf-8", "ignore")).strip(".")
    return f"{told or 'name'}-{hashlib.sha256(raw).hexdigest()[:8]}"


def disk_problem(error: OSError, place: epath.PathLike) -> str:
    """One line that names the path and what to do about it.

    Args:
        error: raised by reading or writing.
        place: what was being written, for errors that name no file, as those of full disks.
    """
    known = error.errno in errno.errorcode  # network libraries use other numbers, too
    reason = os.strerror(error.errno) if known else str(error) or type(error).__name__
    advice = _ADVICE.get(error.errno or 0, _MISSING)
    return f"{error.filename or os.fspath(place)}: {' '.join(reason.split())}; {advice}"


def error_number(error: BaseException | None) -> int | None:
    """The system's number of what an error, or what caused it, tells of; None if of no such."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        if isinstance(error, ValueError):
            told = str(error)
            if number := _NUMBER.search(told):
                return int(number[1])
            if (status := told.partition(":")[0]) in _STATUSES:
                return _STATUSES[status]
        error = error.__cause__
    return None


def storage_failed(error: BaseException | None) -> bool:
    """Whether an error of reading is one of the storage, and tells nothing of what lies there."""
    number = error_number(error)
    return number is not None and number not in _OF_THE_PATH


def may_pass(error: BaseException | None) -> bool:
    """Whether it is one of a network or of storage that fails, and may do so no more.

    Others are the user's to put right, such as a full disk, or tell of no storage at all.
    """
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    # What an error of the system was caused by, such as one of a hub, is not looked into.
    number = error.errno if isinstance(error, OSError) else error_number(error)
    return number is not None and number not in _ADVICE.keys() | _OF_THE_PATH


def require_writable(folder: epath.PathLike) -> None:
    """Makes sure that files can be written to a folder, or that it can be made; leaves nothing.

    Raises:
        OSError: they cannot.
        CheckpointError: its store cannot be reached.
    """
    folder = reachable(folder)
    try:
        place = folder
        while not is_remote(place) and not place.exists():
            place = place.parent
        probe = place / f".{uuid.uuid4().hex}.partial"
        try:
            probe.write_bytes(b"may this be written?")
        finally:
            probe.unlink(missing_ok=True)  # a full disk takes the name, but not the content
    except OSError as error:
        raise OSError(error.errno, str(error.strerror or error), os.fspath(folder)) from error


# What a kill leaves of files that several may write at once, see `write_whole`.
REMAINS = re.compile(r"\.[0-9a-f]{32}\.partial")


def write_whole(path: epath.Path, content: str | bytes, *, shared: bool = False) -> None:
    """Writes a file of which nobody ever reads half; what a kill leaves, the next writing takes.

    Text is written as UTF-8, with its own line ends.

    Args:
        shared: several may write the path at once; what a kill leaves of theirs, `REMAINS`, stays.

    Raises:
        OSError: it cannot be written; what was there before is there still, and nothing else.
    """
    partial = path.with_name(f".{uuid.uuid4().hex if shared else path.name}.partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # what failed first is what is to be told
            partial.unlink(missing_ok=True)
        raise
