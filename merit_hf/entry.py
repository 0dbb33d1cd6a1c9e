"""How a command ends: exit 0, or one line that says what is wrong and its exit code."""

from __future__ import annotations

import contextlib
import errno
import sys
import traceback
from collections.abc import Iterator

from merit_hf.config import ConfigError, MeritError


@contextlib.contextmanager
def exit_on_error(debug: bool = False) -> Iterator[None]:
    """Exit 2 on a mistake in the call or CONFIG, 1 on a failure, each with one line on stderr; 130 when interrupted.

    `debug` shows the traceback too.
    """
    try:
        yield
    except MeritError as error:
        if debug:
            traceback.print_exc()
        _say(" ".join(str(error).split()))
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except KeyboardInterrupt:
        _say("interrupted. Run the same command again to go on.")
        sys.exit(130)
    except Exception as error:
        if debug:
            traceback.print_exc()
        said = f"unexpected {type(error).__name__}: {' '.join(str(error).split())}. Run it with --debug and report it."
        _say(_of_a_path(error) or said)
        sys.exit(1)


def _of_a_path(error: Exception) -> str | None:
    """What the system refused to do with a path; None for other errors, a library's own OSError among them."""
    if not isinstance(error, OSError) or error.strerror is None:
        return None
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.filename or 'disk'}: {error.strerror}. Free some, and run the same command again: it goes on."
    if error.filename is None:
        return None
    return f"{error.filename}: {error.strerror}. Give a path that is there and may be read and written."


def _say(text: str) -> None:
    sys.stderr.write(f"merit: error: {text}\n")
