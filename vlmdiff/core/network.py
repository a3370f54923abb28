"""Servers of this machine: who may call them, and how to call them."""

import ipaddress
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Iterable
from functools import cache
from typing import Any
from urllib.parse import urlsplit

LOOPBACK = ("127.0.0.1", "localhost")
NOBODY = -1
# Of linux/sock_diag.h and inet_diag.h: a kind of netlink socket and of message, a state, a wildcard.
SOCK_DIAG, SOCK_DIAG_BY_FAMILY, ESTABLISHED, ANY = 4, 20, 1, 0xFFFFFFFF
Message = dict[str, Any]
# An address and a port.
End = tuple[str, int]


def ask_loopback_directly() -> None:
    """Make this process and its children ask servers of this machine without the proxy of HTTP_PROXY."""
    for name in ("NO_PROXY", "no_proxy"):
        present = [host for host in os.environ.get(name, "").split(",") if host.strip()]
        os.environ[name] = ",".join([*present, *(host for host in LOOPBACK if host not in present)])


class Guard:
    """ASGI middleware that answers 403 to other web sites, other host names and other users of this machine."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Callable, send: Callable[[Message], Awaitable[None]]) -> None:
        why = None
        if scope["type"] != "lifespan":
            why = refusal(scope.get("method", ""), decoded(scope), scope["client"], scope["server"])
        if why is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            # The server answers 403 to a connection that is closed before it is accepted.
            await send({"type": "websocket.close"})
        else:
            kind = [(b"content-type", b"text/plain; charset=utf-8")]
            await send({"type": "http.response.start", "status": 403, "headers": kind})
            await send({"type": "http.response.body", "body": why.encode()})


def decoded(scope: Message) -> list[tuple[str, str]]:
    """Return the headers of an ASGI request as text."""
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]


def refusal(method: str, headers: Iterable[tuple[str, str]], client: tuple[str, int], server: End) -> str | None:
    """Return why a server may not answer a request, None if it may.

    A browser says in `Origin` and `Sec-Fetch-Site` which page asks; no page can change them. A page whose name leads
    to this address (DNS rebinding) is known by its `Host`.

    Args:
        method: The request's method, empty for a WebSocket.
        headers: All its headers, with repeated ones.
        client: Address and port of the other end.
        server: Address and port that the request came to.
    """
    sent: dict[str, list[str]] = {}
    for name, value in headers:
        sent.setdefault(name.lower(), []).append(value)
    host = sent.get("host", [])
    if len(host) != 1 or not _is_ours(host[0], server):
        return "403: this server does not answer to this host name"
    site, mode, destination = (sent.get(f"sec-fetch-{name}", []) for name in ("site", "mode", "dest"))
    followed = method in ("GET", "HEAD") and mode == ["navigate"] and destination == ["document"]
    if any(origin != f"http://{host[0]}" for origin in sent.get("origin", [])) or not (
        followed or set(site) <= {"same-origin", "none"}
    ):
        return "403: this server does not answer pages of other sites"
    if _is_loopback(server) and owner(client, server) not in (None, os.getuid()):
        return "403: this server answers only the user who started it"
    return None


def _is_loopback(end: End) -> bool:
    return ipaddress.ip_address(end[0]).is_loopback


def _is_ours(host: str, server: End) -> bool:
    """Return whether a `Host` can name this server, and no page of another site can have that name."""
    if _is_loopback(server):
        return host in [f"{name}:{server[1]}" for name in LOOPBACK]
    try:
        name = urlsplit(f"//{host}").hostname or ""
        # Nobody can register a number, or a name without a dot.
        return bool(name) and (
            "." not in name or name in (socket.gethostname(), socket.getfqdn()) or bool(ipaddress.ip_address(name))
        )
    except ValueError:
        return False


def owner(client: End, server: End) -> int | None:
    """Return the id of the user at the other end of a connection within this machine.

    NOBODY if no such connection is open, None if the system does not tell.
    """
    return _ask_kernel(client, server) if _kernel_tells() else None


@cache
def _kernel_tells() -> bool:
    """Return whether the kernel knows a connection of this process: only Linux can be asked, and not every one."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        try:
            return _ask_kernel(client.getsockname(), server.getsockname()) == os.getuid()
        except (OSError, AttributeError):
            return False


def _ask_kernel(near: End, far: End) -> int:
    """Return the user of the end `near` of an open connection, NOBODY if there is none: sock_diag(7)."""
    addresses = [ipaddress.ip_address(end[0]) for end in (near, far)]
    family = socket.AF_INET if addresses[0].version == 4 else socket.AF_INET6
    request = struct.pack("=4BI2H", family, socket.IPPROTO_TCP, 0, 0, ANY, socket.htons(near[1]), socket.htons(far[1]))
    request += b"".join(address.packed.ljust(16, b"\0") for address in addresses) + struct.pack("=3I", 0, ANY, ANY)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, SOCK_DIAG) as kernel:
        kernel.settimeout(1)
        kernel.send(struct.pack("=I2H2I", 16 + len(request), SOCK_DIAG_BY_FAMILY, 1, 0, 0) + request)
        answer = kernel.recv(4096)
    kind, state = struct.unpack_from("=H", answer, 4)[0], answer[17]
    # The user of a connection that its program has closed is no longer known.
    is_open = kind == SOCK_DIAG_BY_FAMILY and state == ESTABLISHED
    return struct.unpack_from("=I", answer, 80)[0] if is_open else NOBODY
