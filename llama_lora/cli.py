"""What every script shares: bad input ends with one line on stderr, never with a traceback."""

import functools
import os
import sys
from collections.abc import Callable


class InputError(Exception):
    """Something the user gave cannot be used; the message is the one line they read.

    It names the file, where in it (index, byte, conversation id), what was expected and found.
    """


def one_line_errors(main: Callable) -> Callable:
    """Make `main` end as a command should.

    `InputError` prints one line and exits 1, Ctrl-C exits 130, a closed pipe (`| head`) exits 141.
    Any other exception is a fault of ours and keeps its traceback.
    """

    @functools.wraps(main)
    def run(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except InputError as error:
            sys.exit(fail(str(error)))
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's, not imported for data scripts
                raise
            sys.exit(fail(f"out of memory on the card: {error}"))
        except KeyboardInterrupt:
            fail("interrupted")
            sys.exit(130)
        except BrokenPipeError:
            # Python flushes stdout at exit; pointing it elsewhere keeps that flush from failing.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)

    return run


def fail(message: str) -> int:
    """Print `message` as a single line on stderr and return the exit code 1.

    Of several processes on a machine only the first prints: all of them read the same input.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    return 1
