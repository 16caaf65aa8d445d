"""Errors of a benchmark, in words for its user."""

import sys
from collections.abc import Callable


class BenchmarkError(Exception):
    """The benchmark cannot run. One line that names what to mend; the process exits with 2."""


class NotReady(BenchmarkError):
    """The server does not answer requests; one that is starting may, later."""


class RequestFailed(Exception):
    """One request got no complete answer, and why, in one line."""


def run(main: Callable[[], int]) -> None:
    """Runs a command and exits with its code: without a traceback for a `BenchmarkError`."""
    try:
        sys.exit(main())
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
