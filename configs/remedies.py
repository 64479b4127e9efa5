"""What to do about errors of the system, in the words of whoever has to do it; needs neither torch nor Hydra."""

from __future__ import annotations

import errno

# Paths that cannot be meant, as against disks that fail.
WRONG_PATH = (FileNotFoundError, NotADirectoryError, FileExistsError, IsADirectoryError)
REMEDIES = {
    errno.ENOSPC: "make room, or choose a folder on another disk",
    errno.EDQUOT: "make room, or choose a folder on another disk",
    errno.EFBIG: "raise the limit (ulimit -f), or choose a folder on another disk",
    errno.EACCES: "choose another folder, or change its rights",
    errno.EPERM: "choose another folder, or change its rights",
    errno.EROFS: "choose a folder that can be written",
    errno.ENOENT: "make its folder first, or mend the path",
    errno.ENOTDIR: "a part of this path is a file; choose another",
    errno.EEXIST: "it is a file; choose another folder",
    errno.EISDIR: "it is a folder; give a file",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "mend the links that lead in a circle",
}


def remedy(error: BaseException) -> str:
    """What the system says about a path, and what to do; of other errors their own text."""
    if not (isinstance(error, OSError) and error.strerror and error.errno in REMEDIES):
        return str(error)
    where = f"{error.filename}: " if error.filename else ""  # a write that fails does not know its file
    return f"{where}{error.strerror}: {REMEDIES[error.errno]}"
