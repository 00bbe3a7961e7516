"""Images from the web: what is asked, of whom, for how long, and what is refused before anything is sent."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from prefkit.data import fetching
from prefkit.data.fetching import Fetcher, fetch, is_public
from prefkit.data.messages import RowError

HOST = "pictures.example"
HOSTS = (HOST,)
URL = f"https://{HOST}/a.png"
PUBLIC, OTHER = "93.184.216.34", "2606:2800:220:1::1"
# A certificate of pictures.example, signed by itself, that only these tests know.
CERTIFICATE = """-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgyRElK52PrcPrLFN1
wNHmgwgBAJcotNRMD69FVvQdowOhRANCAATv+z/zzr+QD7RZpP1NYvqCZdkMcSkl
AeYNdNMdg3gcriOruFqoxlzvYbLi6xpgUy+honLajm5Ut4WERO1rTLD+
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBdzCCARygAwIBAgIBATAKBggqhkjOPQQDAjAbMRkwFwYDVQQDDBBwaWN0dXJl
cy5leGFtcGxlMCAXDTIwMDEwMTAwMDAwMFoYDzIxMjAwMTAxMDAwMDAwWjAbMRkw
FwYDVQQDDBBwaWN0dXJlcy5leGFtcGxlMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcD
QgAE7/s/886/kA+0WaT9TWL6gmXZDHEpJQHmDXTTHYN4HK4jq7haqMZc72Gy4usa
YFMvoaJy2o5uVLeFhETta0yw/qNPME0wGwYDVR0RBBQwEoIQcGljdHVyZXMuZXhh
bXBsZTAPBgNVHRMBAf8EBTADAQH/MB0GA1UdDgQWBBQiVLpVXRGqdtrggdD4uE1g
2wX/7zAKBggqhkjOPQQDAgNJADBGAiEA48NyAzp4cBDN8PL3J6jujOxEMsklLnaP
bkgwI2EV828CIQDPT7XHRHmXlJhQF8AVTQVlp4U7ZNr34oS6dnck2pBH7w==
-----END CERTIFICATE-----
"""
Answer = Callable[[socket.socket, bytes], None]


class Server:
    """A server of this machine: `answer` is given each connection and what was asked over it."""

    def __init__(self, answer: Answer, tls: ssl.SSLContext | None = None) -> None:
        self.answer, self.tls = answer, tls
        self.asked: list[bytes] = []
        self.num_answered = 0
        self.heard = threading.Event()  # what was asked, or that nothing was
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.threads: list[threading.Thread] = []

    def run(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self.talk, args=(connection,))
            self.threads.append(thread)
            thread.start()

    def talk(self, connection: socket.socket) -> None:
        try:
            if self.tls:
                connection = self.tls.wrap_socket(connection, server_side=True)
            with connection:
                asked = connection.recv(65536)
                self.asked.append(asked)
                self.heard.set()
                if asked:
                    self.answer(connection, asked)
                    self.num_answered += 1
        except OSError:  # the other side hung up
            connection.close()


@contextmanager
def serving(answer: Answer | bytes, tls: ssl.SSLContext | None = None) -> Iterator[Server]:
    server = Server(answer if callable(answer) else lambda end, asked: end.sendall(answer), tls)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server
    finally:
        server.listener.shutdown(socket.SHUT_RDWR)
        server.listener.close()
        for each in (thread, *server.threads):
            each.join()


class Local(httpx.BaseTransport):
    """Leads connections to this machine, without TLS unless it is given; notes where they were to go."""

    def __init__(self, ports: int | Mapping[str, int], tls: ssl.SSLContext | None = None) -> None:
        limits = httpx.Limits(max_keepalive_connections=0)
        self.inner = httpx.HTTPTransport(verify=tls or False, trust_env=False, limits=limits)
        self.ports, self.scheme = ports, "https" if tls else "http"
        self.asked: list[str] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        host = request.url.host
        self.asked.append(host)
        port = self.ports if isinstance(self.ports, int) else self.ports[host]
        request.url = request.url.copy_with(scheme=self.scheme, host="127.0.0.1", port=port)
        return self.inner.handle_request(request)

    def close(self) -> None:
        self.inner.close()


class Never(httpx.BaseTransport):
    def handle_request(self, request: httpx.Request) -> httpx.Response:
        raise AssertionError(f"{request.url} was asked")


def find_public(host: str) -> list[str]:
    return [PUBLIC]


def allow_local(address: str) -> bool:
    return address == "127.0.0.1" or is_public(address)


def get(
    ports: int | Mapping[str, int],
    url: str = URL,
    hosts: tuple[str, ...] = HOSTS,
    tls: ssl.SSLContext | None = None,
    **options: Any,
) -> bytes:
    with Local(ports, tls) as transport:
        return Fetcher(transport, **{"find": find_public, "allows": allow_local, **options}).fetch(url, hosts)


def answer(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


# What is asked


def test_bytes_are_fetched() -> None:
    with serving(answer(b"picture")) as server:
        assert get(server.port, URL + "?size=1#part") == b"picture"
    head, *lines = server.asked[0].decode().split("\r\n")
    fields = dict(line.lower().split(": ", 1) for line in lines if line)
    assert head == "GET /a.png?size=1 HTTP/1.1"
    assert fields.pop("user-agent").startswith("prefkit/")
    assert fields == {"host": HOST, "accept": "image/*", "accept-encoding": "identity"}


def test_the_next_address_is_tried_where_one_is_not_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with serving(answer(b"picture")) as server:
        ports = {PUBLIC: port, OTHER: server.port}
        assert get(ports, find=lambda host: [PUBLIC, OTHER]) == b"picture"
    with pytest.raises(RowError, match=r"cannot be fetched: .*refused") as caught:
        get({PUBLIC: port})
    assert caught.value.reason == "image not fetched"


def test_fetch_uses_no_proxy_and_keeps_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def make(**options: Any) -> httpx.MockTransport:
        given.update(options)
        return httpx.MockTransport(lambda request: httpx.Response(200, content=b"from nobody known"))

    monkeypatch.setattr(httpx, "HTTPTransport", make)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: [(2, 1, 6, "", (PUBLIC, 443))])
    with pytest.raises(RowError, match="not known whom the connection was made to"):
        fetch(URL, HOSTS)
    assert set(given) == {"verify", "trust_env", "limits"} and given["trust_env"] is False
    assert given["limits"].max_keepalive_connections == 0
    assert given["verify"].verify_mode == ssl.CERT_REQUIRED and given["verify"].check_hostname


# What may be asked


@pytest.mark.parametrize(
    ("url", "text"),
    [
        (f"http://{HOST}/a.png", "images come over https:// alone"),
        (f"HTTP://{HOST}/a.png", "images come over https:// alone"),
        ("ftp://pictures.example/a.png", "https:// alone"),
        ("file:///etc/passwd", "https:// alone"),
        ("https://other.example/a.png", r"set media_hosts: \[other.example\]"),
        (f"https://sub.{HOST}/", r"set media_hosts: \[sub.pictures.example\]"),
        (f"https://{HOST}.evil.example/", "media_hosts"),
        (f"https://{HOST}./", "media_hosts"),
        (f"https://evil.example/?{HOST}", "media_hosts"),
        (f"https://evil.example#{HOST}", "media_hosts"),
        (f"https://{HOST}@evil.example/", "without user"),
        (f"https://{HOST}\\@evil.example/", "without user"),
        (f"https://me:secret@{HOST}/", "without user, password and port"),
        (f"https://{HOST}:8443/", "without user, password and port"),
        ("https:///a.png", "https://host/path"),
        ("https://", "https://host/path"),
        ("https://[::1/", "https://host/path"),
        (f"https://{HOST}:99999999/", "https://host/path"),
        (f"https://{HOST}/\x07", "https://host/path"),
        (f"https://{HOST}/" + "a" * 10**5, "https://host/path"),
        (f"https://{HOST.replace('e', chr(0x435))}/", "media_hosts"),
        ("https://127.0.0.1/", "media_hosts"),
    ],
)
def test_what_is_not_asked(url: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", None)
    with pytest.raises(RowError, match=text) as caught:
        fetch(url, HOSTS)
    assert caught.value.reason == "image by URL"
    assert "secret" not in str(caught.value)


def test_no_host_is_asked_unless_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", None)
    with pytest.raises(RowError, match=r"set media_hosts: \[pictures.example\]"):
        fetch(f"{URL}?token=secret", ())


def test_a_name_may_have_capitals_and_other_letters() -> None:
    with serving(answer(b"picture")) as server:
        for url, hosts in (
            ("HTTPS://PICTURES.example:443/a.png", ("Pictures.Example",)),
            ("https://bücher.example/", ("bücher.example",)),
            ("https://bücher.example/", ("xn--bcher-kva.example",)),
        ):
            assert get(server.port, url, hosts) == b"picture"
    assert b"Host: xn--bcher-kva.example\r\n" in server.asked[2]


PRIVATE = [
    "0.0.0.0", "10.0.0.1", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.1.2.3", "168.63.129.16",
    "169.254.169.254", "172.16.0.1", "192.0.0.8", "192.0.2.1", "192.88.99.1", "192.168.1.1", "198.18.0.1",
    "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255",
    "::", "::1", "::127.0.0.1", "::8.8.8.8", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254",
    "::ffff:0:7f00:1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "100::1", "2001::1",
    "2001:db8::1", "2002:7f00:1::", "2002:808:808::1", "3fff::1", "5f00::1", "fc00::1", "fd00:ec2::254",
    "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1",
]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)
    fetcher = Fetcher(Never(), find=lambda host: [PUBLIC, address])
    with pytest.raises(RowError, match="is no public address") as caught:
        fetcher.fetch(URL, HOSTS)
    assert caught.value.reason == "image by URL" and URL in str(caught.value)


@pytest.mark.parametrize(
    "address", [PUBLIC, OTHER, "1.1.1.1", "::ffff:1.1.1.1", "64:ff9b::101:101", "2a00:1450:4001::1"]
)
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "host",
    ["2130706433", "0x7f000001", "017700000001", "127.1", "127.0.0.1", "[::ffff:127.0.0.1]", "[::1]",
     "169.254.169.254", "2852039166", "[::ffff:a9fe:a9fe]", "[64:ff9b::7f00:1]", "0", "localhost"],
)  # fmt: skip
def test_hosts_that_are_named_must_be_public_too(host: str) -> None:
    with pytest.raises(RowError, match=r"no public address|is written https") as caught:
        Fetcher(Never()).fetch(f"https://{host}/latest/meta-data", (host.strip("[]"),))
    assert caught.value.reason == "image by URL"


def test_a_name_that_is_not_known() -> None:
    def fail(host: str) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    with pytest.raises(RowError, match=rf"the address of {HOST} is not known: .*Name or service") as caught:
        Fetcher(Never(), find=fail).fetch(URL, HOSTS)
    assert caught.value.reason == "image not fetched"
    long = f"{'a' * 80}.example"
    with pytest.raises(RowError, match=r"is not known|is written https"):
        Fetcher(Never()).fetch(f"https://{long}/", (long,))


def test_a_name_that_changes_its_address() -> None:
    """The first answer is checked and connected to by number; no second one is asked for."""
    answers = [[PUBLIC], ["127.0.0.1"]]
    with serving(answer(b"picture")) as server, Local(server.port) as transport:
        fetcher = Fetcher(transport, find=lambda host: answers.pop(0), allows=allow_local)
        assert fetcher.fetch(URL, HOSTS) == b"picture"
    assert transport.asked == [PUBLIC] and answers == [["127.0.0.1"]]


def test_nothing_is_sent_to_another_end_than_was_checked() -> None:
    with serving(answer(b"picture")) as server:
        with pytest.raises(RowError, match=r"127\.0\.0\.1 is no public address") as caught:
            get(server.port, allows=is_public)
        assert server.heard.wait(10)
    assert caught.value.reason == "image by URL"
    assert server.asked == [b""]


# Where it leads


def test_up_to_three_redirects() -> None:
    def count_down(end: socket.socket, asked: bytes) -> None:
        left = int(asked.split(b" ")[1][1:])
        status = f"30{(1, 2, 7)[left % 3]} Moved"
        end.sendall(answer(b"not this", status, f"Location: {left - 1}") if left else answer(b"picture"))

    with serving(count_down) as server:
        assert get(server.port, f"https://{HOST}/3") == b"picture"
        assert len(server.asked) == 4
        with pytest.raises(RowError, match="leads elsewhere more than 3 times") as caught:
            get(server.port, f"https://{HOST}/4")
    assert caught.value.reason == "image not fetched" and len(server.asked) == 8


@pytest.mark.parametrize(
    ("location", "text"),
    [
        ("https://127.0.0.1/", r"a.png: .*set media_hosts: \[127\.0\.0\.1\]"),
        ("http://pictures.example/b.png", r"a.png: http://pictures.example/b.png is not.*https:// alone"),
        ("//evil.example/", r"media_hosts: \[evil.example\]"),
        ("file:///etc/passwd", "https:// alone"),
        ("https://me@pictures.example/", "without user"),
        ("https://[::1/", "leads to what is no address"),
        (
            "https://inside.example/",
            r"a.png, which leads to https://inside.example/: 10\.0\.0\.1 is no public address",
        ),
    ],
)
def test_redirects_are_checked(location: str, text: str) -> None:
    addresses = {HOST: [PUBLIC], "inside.example": ["10.0.0.1"]}
    with (
        serving(answer(b"", "302 Found", f"Location: {location}")) as server,
        pytest.raises(RowError, match=text),
    ):
        get(server.port, hosts=(*HOSTS, "inside.example"), find=addresses.__getitem__)
    assert len(server.asked) == 1


# What comes back


@pytest.mark.parametrize(
    ("sent", "text"),
    [
        (answer(b"no", "404 Not Found"), "the server answers 404"),
        (answer(b"", "302 Found"), "the server answers 302"),
        (answer(b"", "204 No Content"), "the server answers 204"),
        (answer(b"x", "200 OK", "Content-Encoding: gzip"), "packs what it sends"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf", "cannot be fetched"),
        (b"SSH-2.0-OpenSSH\r\n", "cannot be fetched"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"a" * 200_000, "cannot be fetched"),
    ],
)
def test_answers_that_are_refused(sent: bytes, text: str) -> None:
    with serving(sent) as server, pytest.raises(RowError, match=f"^{URL}: .*{text}") as caught:
        get(server.port)
    assert caught.value.reason == "image not fetched"


@pytest.mark.parametrize("head", ["", "Transfer-Encoding: chunked\r\n", "Content-Length: 999999999999\r\n"])
def test_a_body_without_end_is_not_read_to_it(head: str) -> None:
    sent = []

    def pour(end: socket.socket, asked: bytes) -> None:
        end.sendall(f"HTTP/1.1 200 OK\r\n{head}\r\n".encode())
        block = bytes(2**20)
        for _ in range(100):
            end.sendall(b"100000\r\n" + block + b"\r\n" if "chunked" in head else block)
            sent.append(len(block))

    with serving(pour) as server, pytest.raises(RowError, match="has more than 20 MB") as caught:
        get(server.port)
    assert caught.value.reason == "image too large"
    assert sum(sent) < 40 * 2**20


def test_as_much_as_is_allowed() -> None:
    with serving(answer(b"12345")) as server:
        assert get(server.port, max_bytes=5) == b"12345"
        with pytest.raises(RowError, match="has more than"):
            get(server.port, max_bytes=4)


# For how long


def drip(head: bytes, piece: bytes) -> Answer:
    """Sends piece after piece, each within any time limit of its own; it ends before a test would hang."""

    def send(end: socket.socket, asked: bytes) -> None:
        end.sendall(head)
        for _ in range(200):
            end.settimeout(0.02)
            end.sendall(piece)
            with suppress(TimeoutError):
                if not end.recv(1):
                    raise ConnectionError("the other side hung up")

    return send


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (b"HTTP/1.1 200 OK\r\nX: ", b"a"),
        (b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\n\r\n", b"a"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 200\r\n\r\n", b"a"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n"),
        (b"HTTP/1.1 302 Found\r\nLocation: /\r\nX: ", b""),
    ],
)
def test_a_slow_drip_is_ended(head: bytes, piece: bytes) -> None:
    with (
        serving(drip(head, piece)) as server,
        pytest.raises(RowError, match=r"took more than 0\.3 s") as caught,
    ):
        get(server.port, seconds=0.3)
    assert server.num_answered == 0
    assert caught.value.reason == "image not fetched"


def make_tls(folder: Path) -> ssl.SSLContext:
    (folder / "own.pem").write_text(CERTIFICATE)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "own.pem")
    return context


def make_trusting(folder: Path) -> ssl.SSLContext:
    (folder / "own.pem").write_text(CERTIFICATE)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(folder / "own.pem")
    return context


def test_a_slow_drip_under_tls_is_ended(tmp_path: Path) -> None:
    send = drip(b"HTTP/1.1 200 OK\r\n\r\n", b"a")
    with serving(send, make_tls(tmp_path)) as server, pytest.raises(RowError, match=r"took more than 0\.5 s"):
        get(server.port, tls=make_trusting(tmp_path), seconds=0.5)
    assert server.num_answered == 0


def test_a_silent_handshake_is_ended(tmp_path: Path) -> None:
    with serving(drip(b"", b"")) as server, pytest.raises(RowError, match=r"took more than 0\.3 s"):
        get(server.port, tls=make_trusting(tmp_path), seconds=0.3)
    assert server.num_answered == 0


def test_a_connection_that_comes_after_its_time_is_ended() -> None:
    here, there = socket.socketpair()

    class Stream:
        def get_extra_info(self, name: str) -> object:
            return {"server_addr": (PUBLIC, 443), "socket": here}[name]

    with here, there, fetching._Watch(0.0, is_public) as watch:
        watch._timer.join()
        watch.see("connection.connect_tcp.complete", {"return_value": Stream()})
        there.settimeout(5)
        assert there.recv(1) == b""


def test_a_silent_resolver_is_not_waited_for() -> None:
    done = threading.Event()

    def find(host: str) -> list[str]:
        done.wait(5)
        return [PUBLIC]

    with pytest.raises(RowError, match=r"took more than 0\.2 s"):
        Fetcher(Never(), find=find, seconds=0.2).fetch(URL, HOSTS)
    done.set()


# Who answers


def test_certificates_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    tls = make_tls(tmp_path)
    tls.sni_callback = lambda end, name, context: names.append(name)
    with serving(answer(b"picture"), tls) as server:
        assert get(server.port, tls=make_trusting(tmp_path)) == b"picture"
        with pytest.raises(RowError, match=r"[Hh]ostname mismatch") as caught:
            get(server.port, "https://other.example/", ("other.example",), make_trusting(tmp_path))
        assert caught.value.reason == "image not fetched"
        # As `fetch` has it, whatever the environment says.
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "own.pem"))
        fetching._tls.cache_clear()
        with pytest.raises(RowError, match="certificate verify failed"):
            get(server.port, tls=fetching._tls())
    fetching._tls.cache_clear()
    assert names == [HOST, "other.example", HOST]
    assert len(server.asked) == 1
