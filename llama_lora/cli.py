"""What every script shares: bad input ends with one line on stderr, never with a traceback."""

import errno
import functools
import logging
import os
import sys
from collections.abc import Callable

logger = logging.getLogger(__name__)


class InputError(Exception):
    """Something the user gave cannot be used; the message is the one line they read.

    It names the file, the place in it (index, byte, conversation id), what was expected, and what
    was found.
    """


class UsageError(InputError):
    """Flags cannot be used as they are given; each argument is the line of one fault."""


class LocalError(InputError):
    """An `InputError` that one of several processes has met alone, and so has to report itself."""


class Terminated(BaseException):
    """SIGTERM asked the run to end."""


# What errors say for lack of memory besides `torch.OutOfMemoryError`, which is for tensors alone.
LACKING = (
    "CUDA error: out of memory",  # the runtime: for a kernel, a stream, pinned memory
    "CUDA driver error: out of memory",  # while a segment of the allocator grows
    "_STATUS_ALLOC_FAILED",  # cuBLAS, cuBLASLt and their kin
    # Each thread makes handles of its own, the backward pass's when memory is fullest. A device
    # that is broken cannot make one either, but fails at the next call with the cause.
    "CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate",
    "CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasLtCreate",
)


def out_of_memory(error: Exception) -> bool:
    """Whether a computation failed because memory ran out: in torch, in CUDA or in its libraries.

    Failures that may have other causes do not count, such as `CUBLAS_STATUS_EXECUTION_FAILED`.
    """
    if type(error).__name__ == "OutOfMemoryError":  # torch's; it takes a second to import
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in LACKING)


def one_line_errors(main: Callable) -> Callable:
    """Make `main` end as a command should.

    `InputError` and a full disk print one line and exit 1; `UsageError` prints one for each fault
    and exits 2, as argparse does. Ctrl-C exits 130, SIGTERM 143, a closed pipe (`| head`) 141. Any
    other exception is a fault of ours and keeps its traceback.
    """

    @functools.wraps(main)
    def run(*args, **kwargs):
        try:
            result = main(*args, **kwargs)
            sys.stdout.flush()
            return result
        except UsageError as error:
            fail(*error.args, hint=f"{os.path.basename(sys.argv[0])} --help lists the flags")
            sys.exit(2)
        except InputError as error:
            sys.exit(fail(str(error), alone=isinstance(error, LocalError)))
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            sys.exit(fail(f"out of memory on the card: {error}", alone=True))
        except KeyboardInterrupt:
            fail("interrupted")
            sys.exit(130)
        except Terminated:
            fail("terminated")
            sys.exit(143)
        except BrokenPipeError:
            drop_output()
            sys.exit(141)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            drop_output()
            sys.exit(fail(f"{error.filename or 'standard output'}: {error.strerror}"))

    return run


def drop_output() -> None:
    """Point stdout elsewhere: Python flushes it at exit, which would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(*messages: str, hint: str = "", alone: bool = False) -> int:
    """Print each of `messages` as a single line on stderr, then `hint`; return the exit code 1.

    Of several processes on a machine only the first prints, since all of them read the same input.
    A process that has met the fault `alone` prints too.
    """
    if alone or os.environ.get("LOCAL_RANK", "0") == "0":
        lines = ["error: " + " ".join(message.split()) for message in messages]
        print(*lines, *filter(None, [hint]), sep="\n", file=sys.stderr, flush=True)
    return 1


@functools.cache
def warn_once(message: str) -> None:
    """Warn of something the user may want to change; of several processes, only the first warns."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        logger.warning(message)
