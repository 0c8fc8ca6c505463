"""The rule for errors and exit codes of every command.

    data_shards pack: error: --shard-size must be at least 1, not 0

    ended by                              stderr            exit code
    the command's return                  -                 the returned number, 0 for None
    OSError, ValueError                   one line          2
    Ctrl-C                                one line          130
    a closed pipe: ``pack ... | head``    -                 141
    another exception                     its traceback     1

A wrong option ends with the same line and 2 (common/options.py). Each rank of a run prints its own line with the rank
and the host. An exception that torch or DeepSpeed raises keeps its traceback unless it is about a file.
"""

from __future__ import annotations

import os
import select
import socket
import sys
from collections.abc import Callable

from priorclip.common.masking import masked
from priorclip.common.output import say
from priorclip.common.printable import one_line

ERROR, INTERRUPTED, CLOSED_PIPE = 2, 128 + 2, 128 + 13
LIBRARIES = ("torch", "deepspeed")


def run_command(
    prog: str,
    work: Callable[[], int | None],
    errors: tuple[type[Exception], ...] = (OSError, ValueError),
    interrupted: str = "interrupted",
) -> int:
    """Runs ``work`` and returns the exit code of the command.

    Args:
        prog: the command's name in messages, such as ``data_shards pack``
        work: returns the exit code, or None for 0
        errors: exceptions that say what the user has to change
        interrupted: the message after Ctrl-C
    """
    try:
        code = work() or 0
        sys.stdout.flush()  # a closed pipe shows here
        return code
    except KeyboardInterrupt:
        print_error(prog, interrupted)
        return INTERRUPTED
    except errors as error:
        if isinstance(error, BrokenPipeError) and drop_closed_stdout():
            return CLOSED_PIPE
        if raised_by_library(error):
            raise
        print_error(prog, f"{this_rank()}{error}")
        return ERROR


def print_error(prog: str, message: str) -> None:
    """Prints ``PROG: error: MESSAGE`` as one line on stderr, without secrets and control characters."""
    say(f"{prog}: error: {one_line(masked(message))}", sys.stderr)


def this_rank() -> str:
    """Returns ``"rank 3 of 8 on HOST fails: "`` if this process is one of several ranks, otherwise nothing."""
    rank, ranks = os.environ.get("RANK"), os.environ.get("WORLD_SIZE", "1")
    return "" if rank is None or ranks == "1" else f"rank {rank} of {ranks} on {socket.gethostname()} fails: "


def torchrun_ranks() -> int:
    """Returns how many processes torchrun has started of this command; 1 if it is not torchrun that started it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def raised_by_library(error: BaseException) -> bool:
    """Tells whether torch or DeepSpeed raised the error. One with an ``errno`` is about a file of the user."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "") if trace else ""
    return getattr(error, "errno", None) is None and module.split(".")[0] in LIBRARIES


def drop_closed_stdout() -> bool:
    """Tells whether the reader of stdout has gone. Then points stdout to nothing, so that the exit prints no error."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    closed = bool(poll.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return closed
