"""The one exception for what a user can mend: commands turn it into one line and exit code 2."""

import errno


class InputError(ValueError):
    """Bad input, said in one sentence: what, for which file/row/option, what was expected, what to do."""


_OF_THE_DISK = {
    errno.ENOSPC: "a full disk. Free some space, then give the same command again",
    errno.EDQUOT: "a full quota. Free some space, then give the same command again",
    errno.EROFS: "a read-only file system. Choose another path",
    errno.ENOENT: "nothing there. Check the path",
    errno.ENOTDIR: "a file where a directory should be. Choose another path",
    errno.EISDIR: "a directory. Choose another path",
    errno.EACCES: "no permission. Choose another path, or change who may use it",
    errno.EPERM: "no permission. Choose another path, or change who may use it",
    errno.ENAMETOOLONG: "a name that is too long. Choose a shorter path",
}


def describe_os_error(error: OSError) -> str:
    """What the operating system refused, as one sentence with the path; the error's own text where it is no such case.

    Args:
        error: raised while reading or writing; `filename` names the path, which the sentence leaves out where unknown.
    """
    got = _OF_THE_DISK.get(error.errno or 0)
    if got is None:
        return str(error)
    return f"access{'' if error.filename is None else f' for {error.filename}'}: expected to be granted, got {got}."
