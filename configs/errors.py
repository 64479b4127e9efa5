"""Errors that a command reports in one line, and its exit codes. This module imports nothing."""

EXIT_BAD_INPUT = 2  # configuration, data or checkpoint; the message says what to change
EXIT_FAILED = 3  # the work itself failed: non-finite loss, out of memory, full disk
EXIT_BUSY = 4  # another process works on the same run; try again when it has ended
EXIT_RESUME = 75  # interrupted with a checkpoint written: the same command resumes (EX_TEMPFAIL)
EXIT_INTERRUPTED = 130  # Ctrl-C, 128 + SIGINT
EXIT_BROKEN_PIPE = 141  # the reader of the output has gone (`| head`), 128 + SIGPIPE


def one_line(text: object) -> str:
    """Return text with line breaks, and characters that hide or move other text, as Python's escapes.

    Names of files may hold any of them: a line break splits a message, and a terminal obeys control characters.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


class _Message:
    """An error whose arguments are the lines of its message."""

    args: tuple[object, ...]

    def __str__(self) -> str:
        return "\n".join(map(one_line, self.args))


class UserError(_Message, ValueError):
    """Input that cannot be used. The message says what is wrong (name = value), why, and how to fix it.

    Commands print it in one line and exit with 2. Every other ValueError is a bug and keeps its traceback.
    """


class ConfigError(UserError):
    """A configuration that cannot be used: an unknown key or option, or an invalid value."""


class BusyError(UserError):
    """Another process works on the same run or file. Commands print it in one line and exit with 4."""


class TrainingError(_Message, RuntimeError):
    """The work failed for a reason that is not a bug. Commands print it in one line and exit with 3.

    The last good checkpoint is kept.
    """


class Interrupted(BaseException):
    """A signal stopped the run after its state was saved. Commands exit with 75.

    Like KeyboardInterrupt it is not an Exception, so that a sweep stops too instead of starting its next run.
    """
