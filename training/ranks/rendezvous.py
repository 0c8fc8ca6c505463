"""Where the ranks meet: a socket on MASTER_ADDR alone, and the network interface that leads there.

torch's store listens on every interface of rank 0's host and asks nobody who they are. Here rank 0 opens the port on
MASTER_ADDR only, and gloo's sockets are bound to the interface that packets to MASTER_ADDR leave by:

    MASTER_ADDR=10.0.0.2     # the cluster's network, not the office's
    with bound_store("10.0.0.2", 29500):      # LISTEN 10.0.0.2:29500, where torch would LISTEN *:29500
        deepspeed.init_distributed(...)       # takes the server that is there

Under torchrun the agent has opened the store, on every interface, before any rank starts.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import ipaddress
import logging
import os
import socket
from collections.abc import Iterator

import psutil
import torch.distributed as dist

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def bound_store(address: str, port: int, timeout: datetime.timedelta) -> Iterator[None]:
    """On rank 0, while the process group is made: its store's server, listening on ``address`` only.

    torch keeps one server a port and process, so that the group made within takes this one and keeps it.

    Raises:
        RuntimeError: something else has the port; the message names the host and what to do.
    """
    family, bind_to = listening_place(address, port)
    if bind_to is None:
        logger.warning("the rendezvous listens on all interfaces: MASTER_ADDR %s is no address of this host", address)
        yield
        return
    listener = socket.socket(family)
    # A run that is started again finds the last one's port in TIME_WAIT.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((bind_to, port))
    except OSError as error:
        listener.close()
        if error.errno != errno.EADDRINUSE:
            raise
        raise RuntimeError(
            f"port {port} of {address} ({socket.gethostname()}) is taken, perhaps by another run: choose another with"
            " --master-port, or MASTER_PORT under srun"
        ) from error
    listener.listen(2048)
    store = dist.TCPStore(
        address, port, is_master=True, timeout=timeout, wait_for_workers=False, multi_tenant=True,
        master_listen_fd=listener.detach(),
    )  # fmt: skip
    yield
    del store


def listening_place(address: str, port: int) -> tuple[socket.AddressFamily, str | None]:
    """Family and own address to listen on for those who connect to ``address``; None where there is none to name."""
    family, _, _, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    own = str(place[0])
    # Debian's /etc/hosts gives a host's own name as 127.0.1.1, where no other host can reach it.
    named = not is_address(address) and address != "localhost"
    if named and ipaddress.ip_address(own).is_loopback:
        return family, None
    return family, own if own in addresses_of_interfaces() or ipaddress.ip_address(own).is_loopback else None


def interface_to(address: str, port: int) -> str | None:
    """Name of the interface by which packets to ``address`` leave this host; None where that cannot be told."""
    try:
        family, kind, _, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)  # of a datagram socket: looks up the route, sends nothing
            source = probe.getsockname()[0]
    except OSError:
        return None
    name = addresses_of_interfaces().get(source)
    if ipaddress.ip_address(source).is_loopback and not is_address(address) and address != "localhost":
        return None
    return name


def addresses_of_interfaces() -> dict[str, str]:
    """Interface of each address of this host."""
    return {
        entry.address.partition("%")[0]: name for name, entries in psutil.net_if_addrs().items() for entry in entries
    }


def is_address(text: str) -> bool:
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(text)
        return True
    return False


def agent_has_store() -> bool:
    """Whether torchrun's agent serves the store that the ranks meet at."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
