"""Images from the web: https alone, from hosts that were named, at public addresses, within limits.

A name is resolved once, its addresses are checked, and the connection goes to one of them by number; whom it
was made to is checked once more before a byte is sent.
"""

from __future__ import annotations

import ipaddress
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import httpx2 as httpx

from prefkit import __version__
from prefkit.data.messages import RowError

_HEADERS = {"User-Agent": f"prefkit/{__version__}", "Accept": "image/*", "Accept-Encoding": "identity"}
_MOVED = (301, 302, 303, 307, 308)
_MOST_MOVES = 3
_MOST_TRIED = 4  # addresses of a name
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_UNICAST = ipaddress.IPv6Network("2000::/3")
# Not public, and not known as such to `ipaddress` of every Python.
_RESERVED = tuple(
    ipaddress.ip_network(text)
    for text in (
        "192.0.0.0/24",  # protocol assignments
        "192.88.99.0/24",  # relays of 6to4
        "168.63.129.16/32",  # the platform, in a machine of Azure
        "2001::/23",  # Teredo and other assignments
        "2002::/16",  # 6to4, which holds any IPv4 address
        "3fff::/20",  # documentation
    )
)


def fetch(url: str, hosts: Sequence[str]) -> bytes:
    """The bytes at an https address, of at most 20 MB, within 10 s. `hosts` may be asked, no other.

    Raises `RowError` for an address that may not be fetched ("image by URL"), for one that could not
    ("image not fetched"), and for too many bytes ("image too large").
    """
    never_kept = httpx.Limits(max_keepalive_connections=0)
    with httpx.HTTPTransport(verify=_tls(), trust_env=False, limits=never_kept) as transport:
        return Fetcher(transport).fetch(url, hosts)


@cache
def _tls() -> ssl.SSLContext:
    return httpx.create_ssl_context(trust_env=False)


def is_public(address: str) -> bool:
    """Whether an address is one of the public internet, also where IPv6 holds one of IPv4.

    >>> is_public("1.1.1.1"), is_public("10.0.0.1"), is_public("::ffff:127.0.0.1")
    (True, False, False)
    """
    found = ipaddress.ip_address(address)
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped:
            found = found.ipv4_mapped
        elif found in _NAT64:
            found = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        elif found not in _UNICAST:
            return False
    is_odd = found.is_multicast or found.is_reserved or any(found in network for network in _RESERVED)
    return found.is_global and not is_odd


def find_addresses(host: str) -> list[str]:
    """The addresses of a name, the preferred first. Raises OSError and UnicodeError."""
    found = socket.getaddrinfo(host, 443, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


@dataclass(frozen=True)
class Fetcher:
    """What `fetch` does, over any transport; `allows` says which addresses may be connected to.

    The transport may keep no connection for another request: each is checked anew.
    """

    transport: httpx.BaseTransport
    find: Callable[[str], list[str]] = find_addresses
    allows: Callable[[str], bool] = is_public
    seconds: float = 10.0
    max_bytes: int = 20 * 2**20

    def fetch(self, url: str, hosts: Sequence[str]) -> bytes:
        """The bytes at an address. Raises `RowError` as `fetch` does."""
        place = _read_url(url, hosts)
        shown = subject = _show(place)
        with _Watch(self.seconds, self.allows) as watch:
            for _ in range(_MOST_MOVES + 1):
                try:
                    content = self._get(place, watch)
                    if isinstance(content, bytes):
                        return content
                    place = _read_url(place.join(content), hosts)
                except httpx.InvalidURL:
                    raise RowError(f"{subject} leads to what is no address", "image not fetched") from None
                except RowError as error:
                    raise RowError(f"{subject}: {error}", error.reason) from None
                subject = f"{shown}, which leads to {_show(place)}"
        raise RowError(f"{shown} leads elsewhere more than {_MOST_MOVES} times", "image not fetched")

    def _get(self, place: httpx.URL, watch: _Watch) -> bytes | str:
        """The bytes, or where the server says that they are."""
        host = place.raw_host.decode()
        addresses = self._find_allowed(host, watch)
        problem = ""
        for number, address in enumerate(addresses):
            share = watch.left() / (len(addresses) - number)
            timeout = httpx.Timeout(watch.left(), connect=share).as_dict()
            request = httpx.Request(
                "GET",
                place.copy_with(host=address, fragment=None),
                headers={"Host": place.netloc.decode(), **_HEADERS},
                extensions={"timeout": timeout, "sni_hostname": host, "trace": watch.see},
            )
            try:
                return self._read(self.transport.handle_request(request), watch)
            except httpx.HTTPError as error:
                problem = str(error) or type(error).__name__
                if not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
                    break
        watch.left()
        raise RowError(f"cannot be fetched: {problem}", "image not fetched")

    def _find_allowed(self, host: str, watch: _Watch) -> list[str]:
        try:
            addresses = _find_within(watch.left, lambda: self.find(host))
        except (OSError, UnicodeError) as error:
            raise RowError(f"the address of {host} is not known: {error}", "image not fetched") from None
        for address in addresses:
            _check_address(address, self.allows)
        return addresses[:_MOST_TRIED]

    def _read(self, response: httpx.Response, watch: _Watch) -> bytes | str:
        try:
            watch.check_seen()
            if response.status_code in _MOVED and "location" in response.headers:
                return response.headers["location"]
            if response.status_code != 200:
                raise RowError(f"the server answers {response.status_code}", "image not fetched")
            if response.headers.get("content-encoding", "identity") != "identity":
                raise RowError("the server packs what it sends, which was not asked", "image not fetched")
            content = bytearray()
            for part in response.iter_raw():
                content += part
                watch.left()
                if len(content) > self.max_bytes:
                    raise RowError(f"has more than {self.max_bytes >> 20} MB", "image too large")
            watch.left()  # what was ended by the watch may look whole
            return bytes(content)
        finally:
            response.close()


class _Watch:
    """Ends the connection of a fetch when time is up, and looks at whom it was made to."""

    def __init__(self, seconds: float, allows: Callable[[str], bool]) -> None:
        self.seconds, self.allows = seconds, allows
        self._end = time.monotonic() + seconds
        self._lock = threading.Lock()
        self._connection: socket.socket | None = None
        self._timer = threading.Timer(seconds, self._expire)
        self._timer.daemon = True

    def __enter__(self) -> _Watch:
        self._timer.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._timer.cancel()
        self._forget()

    def left(self) -> float:
        """Seconds that are left. Raises `RowError` when none are."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise RowError(f"took more than {self.seconds:g} s", "image not fetched")
        return left

    def see(self, event: str, info: dict[str, Any]) -> None:
        """The `trace` of a request. Raises `RowError` for a connection to what may not be connected to.

        It holds the connection by a descriptor of its own, which stays good when TLS takes over the first.
        """
        if event == "connection.connect_tcp.started":
            self._forget()
        elif event == "connection.connect_tcp.complete":
            stream = info["return_value"]
            try:
                _check_address(stream.get_extra_info("server_addr")[0], self.allows)
            except RowError:
                stream.close()
                raise
            with self._lock:
                self._connection = stream.get_extra_info("socket").dup()
            if time.monotonic() >= self._end:
                self._expire()

    def check_seen(self) -> None:
        """Raises `RowError` where no connection was looked at."""
        if self._connection is None:
            raise RowError("it is not known whom the connection was made to", "image not fetched")

    def _expire(self) -> None:
        with self._lock:
            if self._connection:
                with suppress(OSError):  # it ended by itself
                    self._connection.shutdown(socket.SHUT_RDWR)

    def _forget(self) -> None:
        with self._lock:
            if self._connection:
                self._connection.close()
            self._connection = None


def _find_within(left: Callable[[], float], find: Callable[[], list[str]]) -> list[str]:
    """What `find` returns, or its error; `left` raises when that takes too long, and `find` ends unheard."""
    results: queue.SimpleQueue[list[str] | Exception] = queue.SimpleQueue()

    def work() -> None:
        try:
            results.put(find())
        except (OSError, UnicodeError) as error:
            results.put(error)

    threading.Thread(target=work, daemon=True).start()
    while True:
        try:
            result = results.get(timeout=left())
        except queue.Empty:
            continue
        if isinstance(result, Exception):
            raise result
        return result


def _check_address(address: str, allows: Callable[[str], bool]) -> None:
    if not allows(address):
        raise RowError(f"{address} is no public address, and images come from those alone", "image by URL")


def _read_url(url: str | httpx.URL, hosts: Sequence[str]) -> httpx.URL:
    """An address that may be fetched. Raises `RowError` for any other."""
    try:
        place = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise RowError(f"an image by URL is written https://host/path: {error}", "image by URL") from None
    if place.scheme != "https":
        raise RowError(f"{_show(place)} is not fetched: images come over https:// alone", "image by URL")
    if not place.host or place.userinfo or place.port not in (None, 443):
        raise RowError(
            f"{_show(place)} is not fetched: write https://host/path, without user, password and port",
            "image by URL",
        )
    if not {place.host.lower(), place.raw_host.decode()} & {name.lower() for name in hosts}:
        raise RowError(
            f"{_show(place)} is not fetched: to fetch images from there, set media_hosts: [{place.host}]",
            "image by URL",
        )
    return place


def _show(place: httpx.URL) -> str:
    """An address for a message, without what may be secret in it."""
    path = place.raw_path.decode().partition("?")[0]
    return f"{place.scheme}://{place.host}{path if len(path) <= 80 else path[:77] + '...'}"
