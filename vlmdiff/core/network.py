"""Requests to servers of this machine."""

import os

LOOPBACK = ("127.0.0.1", "localhost")


def ask_loopback_directly() -> None:
    """Make this process and its children ask servers of this machine without the proxy of HTTP_PROXY."""
    for name in ("NO_PROXY", "no_proxy"):
        present = [host for host in os.environ.get(name, "").split(",") if host.strip()]
        os.environ[name] = ",".join([*present, *(host for host in LOOPBACK if host not in present)])
