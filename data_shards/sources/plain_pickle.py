"""Reads a pickle of plain values, which somebody else may have written, and executes nothing of it.

    plain_pickle(pickle.dumps({"box": (7.4, 46.9, 7.5, 47.0), "time": (2019, 7, 1, 10, 30)}))
    {"box": (7.4, 46.9, 7.5, 47.0), "time": (2019, 7, 1, 10, 30)}

A pickle is a program. Its opcodes are checked before it is run: only those pass that make numbers, texts, lists, tuples
and dictionaries. None of them names a class or a function, or calls one. The values may share parts, so a reader must
not print or copy them before it knows their kinds: a small pickle can be a list of lists of ... with 2 to the power of
100 items.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from typing import Any

NUMBERS = (
    "NONE",
    "NEWTRUE",
    "NEWFALSE",
    "INT",
    "BININT",
    "BININT1",
    "BININT2",
    "LONG",
    "LONG1",
    "LONG4",
    "FLOAT",
    "BINFLOAT",
)
TEXTS = ("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
LISTS = ("EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")
OBJECTS = ("EMPTY_DICT", "DICT", "SETITEM", "SETITEMS")
NUMBERED = ("PUT", "BINPUT", "LONG_BINPUT")  # the unpickler makes room for as many values as the number says
FRAME = ("PROTO", "FRAME", "MARK", "STOP", "MEMOIZE", "GET", "BINGET", "LONG_BINGET")
PLAIN = frozenset((*NUMBERS, *TEXTS, *LISTS, *OBJECTS, *NUMBERED, *FRAME))
FAILURES = (
    pickle.UnpicklingError, ValueError, TypeError, LookupError, AttributeError, EOFError, OverflowError, RecursionError,
    MemoryError,
)  # fmt: skip


class PlainUnpickler(pickle.Unpickler):
    """A second lock: it finds no class, even if an opcode were missed."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def plain_pickle(data: bytes) -> Any:
    """Returns the value in a pickle. Raises ValueError if it is damaged, or holds more than plain values."""
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name not in PLAIN:
                raise ValueError(f"it has the opcode {opcode.name}, which plain values do not need")
            if opcode.name in NUMBERED and (argument is None or not 0 <= int(argument) <= len(data)):
                raise ValueError("it numbers more values than it can hold")
        return PlainUnpickler(io.BytesIO(data)).load()
    except FAILURES as error:
        raise ValueError(f"no pickle of plain values: {error}") from error
