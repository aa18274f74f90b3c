"""Cuts the network in every Python process that has this folder on PYTHONPATH: tests, their children, the kernels.

Loopback stays, since Jupyter's kernels and the tests' own servers talk over it.
"""

import os
import socket

BLOCKED = "the tests run without a network: "


def is_local(address: object) -> bool:
    host = address[0] if isinstance(address, tuple) else "localhost"  # a path is a Unix socket
    return host in ("localhost", "") or str(host).startswith("127.") or host == "::1"


def guard(call):
    def guarded(self, address, *rest):
        if not is_local(address):
            raise OSError(BLOCKED + str(address))
        return call(self, address, *rest)

    return guarded


def guarded_lookup(host, *rest, **options):
    if not is_local((host.decode() if isinstance(host, bytes) else host or "",)) and host != "0.0.0.0":
        raise socket.gaierror(BLOCKED + str(host))
    return lookup(host, *rest, **options)


os.environ["HF_HUB_OFFLINE"] = os.environ.get("HF_HUB_OFFLINE", "1")
lookup = socket.getaddrinfo
socket.getaddrinfo = guarded_lookup
socket.socket.connect = guard(socket.socket.connect)
socket.socket.connect_ex = guard(socket.socket.connect_ex)
