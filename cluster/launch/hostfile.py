"""The hostfile that deepspeed and mpirun read: one host a line with its number of ranks.

    worker-0 slots=8
    worker-1 slots=8      # comments and blank lines are skipped

    read_hostfile("hosts")  ->  {"worker-0": 8, "worker-1": 8}

Host names go into the command lines of ssh and pdsh, so only characters of names and addresses are allowed.
"""

from __future__ import annotations

import re
from pathlib import Path

HOST = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9_][A-Za-z0-9_.-]*")
LINE = re.compile(r"(?P<host>\S+)\s+slots=(?P<slots>\d+)")


def read_hostfile(path: str | Path) -> dict[str, int]:
    """Returns the slots of each host in the order of the file, which is the order of the ranks.

    Raises:
        ValueError: the file is missing, empty, or has a line that is not ``HOST slots=N``; the message names the line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # without the byte order mark of Windows
    except UnicodeDecodeError as error:
        raise ValueError(f"hostfile {path} is no UTF-8 text: {error}") from error
    except OSError as error:
        raise ValueError(f"hostfile {path} cannot be read: {error.strerror}") from error
    hosts: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        found = LINE.fullmatch(line)
        if not found or not HOST.fullmatch(found["host"]):
            raise ValueError(
                f"{path}, line {number}: '{line}' is not 'HOST slots=N' with a plain host name or IPv4 address"
            )
        if int(found["slots"]) < 1:
            raise ValueError(
                f"{path}, line {number}: {found['host']} has no slots; remove the line or write slots=1 or more"
            )
        if found["host"] in hosts:
            raise ValueError(
                f"{path}, line {number}: {found['host']} is there twice; write one line with the sum of its slots"
            )
        hosts[found["host"]] = int(found["slots"])
    if not hosts:
        raise ValueError(f"{path} names no host: write one 'HOST slots=N' a line")
    return hosts
