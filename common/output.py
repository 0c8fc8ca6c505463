"""The only way of our text to a terminal or a log: without secrets, and printable.

log = get_logger(__name__)          records are safe for every handler, also in a program that imports us
set_up_logging("%(message)s")       records of other libraries and tracebacks are safe too
say("a line")                       standard output of a command
"""

from __future__ import annotations

import logging
import sys
import traceback
import warnings
from types import TracebackType
from typing import TextIO

from priorclip.common.masking import masked
from priorclip.common.printable import indented, printable


def say(text: object = "", file: TextIO | None = None) -> None:
    """Prints the text to standard output, or to ``file``, and flushes it."""
    print(safe_text(text), file=file, flush=True)


def safe_text(text: object) -> str:
    """Returns the text without secrets and control characters."""
    return printable(masked(str(text)))


def get_logger(name: str) -> logging.Logger:
    """Returns the logger of a module. Its records hold no secrets and no control characters."""
    logger = logging.getLogger(name)
    if not any(isinstance(each, SafeRecords) for each in logger.filters):
        logger.addFilter(SafeRecords())
    return logger


class SafeRecords(logging.Filter):
    """Makes the message and the traceback of a record safe before any handler sees them."""

    def filter(self, record: logging.LogRecord) -> bool:
        try:
            record.msg, record.args = indented(safe_text(record.getMessage())), ()
        except (TypeError, ValueError):
            return True  # the arguments do not fit the message: the handler reports it
        if record.exc_info and record.exc_info[0]:
            record.exc_text = safe_text("".join(traceback.format_exception(*record.exc_info)).rstrip())
        return True


class SafeFormatter(logging.Formatter):
    """Formats log records, also of other libraries, and their tracebacks without secrets and control characters."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return indented(super().formatMessage(record))

    def format(self, record: logging.LogRecord) -> str:
        return safe_text(super().format(record))


def set_up_logging(
    form: str,
    level: int = logging.INFO,
    handler: logging.Handler | None = None,
    *,
    datefmt: str | None = None,
    force: bool = False,
) -> None:
    """Sends log records to standard error, or to the handler; they, warnings and uncaught errors are safe to print."""
    handler = handler or logging.StreamHandler(sys.stderr)
    handler.setFormatter(SafeFormatter(form, datefmt=datefmt))
    logging.basicConfig(level=level, handlers=[handler], force=force)
    sys.excepthook = print_failure
    warnings.showwarning = print_warning


def quiet(*libraries: str) -> None:
    """Lets these libraries log warnings and errors only."""
    for name in libraries:
        logging.getLogger(name).setLevel(logging.WARNING)


def print_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Prints a warning of Python, whose text can come out of a file: matplotlib names letters that a font lacks."""
    say(warnings.formatwarning(message, category, filename, lineno, line).rstrip(), file or sys.stderr)


def print_failure(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Prints the traceback of an uncaught error."""
    say("".join(traceback.format_exception(kind, error, trace)).rstrip(), sys.stderr)
