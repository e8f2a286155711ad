"""Ports of this machine."""

import socket


def free_port() -> int:
    """One of loopback that nobody uses; it is free again, and may be taken before it is used."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
