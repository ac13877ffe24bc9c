"""Whether a tracker's server can be reached, asked before a run waits for it."""

import socket
import time
import urllib.request
from urllib.parse import urlsplit

SILENT_SECONDS = 60
"""How long a server that took no connection is not asked again: the jobs of a sweep do not each wait for it."""

_silent: dict[tuple[str | None, int], float] = {}
"""Addresses that took no connection, and when."""


def takes_connection(server: str, proxy: str | None = None, timeout: float = 3.0) -> bool:
    """Whether the server, or the proxy before it (`proxy`, else the environment's), takes a connection."""
    url = urlsplit(server)
    proxy = proxy or urllib.request.getproxies().get(url.scheme)
    if proxy and not urllib.request.proxy_bypass(url.hostname):
        url = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    address = url.hostname, url.port or (443 if url.scheme == "https" else 80)
    if time.monotonic() - _silent.get(address, -SILENT_SECONDS) < SILENT_SECONDS:
        return False
    try:
        with socket.create_connection(address, timeout):
            return True
    except OSError:
        _silent[address] = time.monotonic()
        return False
