"""Where the ranks meet: a socket on MASTER_ADDR alone, and the network interface that leads there.

torch's store listens on every interface of rank 0's host and has no authentication. Here rank 0 opens the port on
MASTER_ADDR only, and gloo binds its sockets to the interface through which packets to MASTER_ADDR leave:

    MASTER_ADDR=10.0.0.2     # the cluster's network, not the office's
    with bound_store("10.0.0.2", 29500):      # LISTEN 10.0.0.2:29500; torch alone would LISTEN *:29500
        deepspeed.init_distributed(...)       # uses the server that exists

Under torchrun, the agent opens the store on every interface before any rank starts.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import ipaddress
import os
import socket
from collections.abc import Iterator

import psutil
import torch.distributed as dist

from priorclip.common.output import get_logger

logger = get_logger(__name__)


@contextlib.contextmanager
def bound_store(address: str, port: int, timeout: datetime.timedelta) -> Iterator[None]:
    """On rank 0: opens the server of the process group's store, which listens on ``address`` only.

    Create the process group inside. torch has one server for each port and process, so that the group uses and keeps
    this one.

    Raises:
        RuntimeError: another process uses the port; the message names the host and what to do
    """
    family, bind_to = listening_address(address, port)
    if bind_to is None:
        logger.warning(
            "the rendezvous listens on all interfaces, because MASTER_ADDR %s is no address of this host", address
        )
        yield
        return
    listener = socket.socket(family)
    # If a run is started again, the port of the last one may be in TIME_WAIT.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((bind_to, port))
    except OSError as error:
        listener.close()
        if error.errno != errno.EADDRINUSE:
            raise
        raise RuntimeError(
            f"port {port} of {address} ({socket.gethostname()}) is in use, perhaps by another run: choose another with"
            " --master-port, or MASTER_PORT under srun"
        ) from error
    listener.listen(2048)
    store = dist.TCPStore(
        address, port, is_master=True, timeout=timeout, wait_for_workers=False, multi_tenant=True,
        master_listen_fd=listener.detach(),
    )  # fmt: skip
    yield
    del store


def listening_address(address: str, port: int) -> tuple[socket.AddressFamily, str | None]:
    """Family and own address to listen on, if others connect to ``address``; None for all interfaces."""
    family, _, _, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    own = str(place[0])
    # Debian's /etc/hosts maps a host's own name to 127.0.1.1, which other hosts cannot reach.
    is_name = not is_address(address) and address != "localhost"
    if is_name and ipaddress.ip_address(own).is_loopback:
        return family, None
    return family, own if own in addresses_of_interfaces() or ipaddress.ip_address(own).is_loopback else None


def interface_to(address: str, port: int) -> str | None:
    """Name of the interface through which packets to ``address`` leave this host; None if it is not known."""
    try:
        family, kind, _, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)  # a datagram socket only looks up the route; it sends nothing
            source = probe.getsockname()[0]
    except OSError:
        return None
    name = addresses_of_interfaces().get(source)
    if ipaddress.ip_address(source).is_loopback and not is_address(address) and address != "localhost":
        return None
    return name


def addresses_of_interfaces() -> dict[str, str]:
    """Address -> interface, of this host."""
    return {
        entry.address.partition("%")[0]: name for name, entries in psutil.net_if_addrs().items() for entry in entries
    }


def is_address(text: str) -> bool:
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(text)
        return True
    return False


def torchrun_has_store() -> bool:
    """Whether torchrun's agent serves the store of the process group."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
