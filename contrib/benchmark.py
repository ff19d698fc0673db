"""Compare dsmtpd with other SMTP servers on this machine.

Usage::

    python contrib/benchmark.py --install    # once: fetch the peers into build/benchmark/
    python contrib/benchmark.py --quick      # a few minutes; without --quick more, longer runs

The peers are dsmtpd 1.2, aiosmtpd, standard-smtpd (the smtpd module of Python up to 3.11), and a
server on plain asyncio streams that sends fixed replies and parses nothing, which shows what
asyncio itself costs. A peer that is not installed is left out.

Each run starts a server on the loopback interface and sends messages to it from this process.
In each row of the table the servers alternate, run by run. This needs Linux, which provides
the memory and the CPU time of other processes.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import platform
import re
import selectors
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "build" / "benchmark"
VENV = CACHE / "venv-{}.{}".format(*sys.version_info)
TMPFS = Path("/dev/shm")
HOST = "127.0.0.1"

TIMEOUT = 20.0  # seconds to wait for a reply, or for a server to start
WARM_UP = 0.3  # seconds of load before a rate is measured
CONNECTIONS = 20  # connections that send 2 KiB messages at the same time
IDLE_CONNECTIONS = 500  # dsmtpd accepts half as many as it may open files, which is often 1024
MAX_MESSAGES = 8000  # of one rate; 32 MB on tmpfs, of which containers often have 64 MB


@dataclass(frozen=True)
class Peer:
    """A server that is measured."""

    name: str
    command: str  # program and arguments, with the fields of run_server()
    package: str = ""  # the package from PyPI that it needs, as its folder's name

    def is_installed(self) -> bool:
        """Return whether its package is installed."""
        return not self.package or any(VENV.glob(f"lib/*/site-packages/{self.package}"))


@dataclass(frozen=True)
class Row:
    """A measurement of several servers, the first of which is dsmtpd."""

    title: str
    measure: Callable[[Server, float], float]  # called with the seconds for a rate
    peers: tuple[Peer, ...]
    storage: Path = TMPFS


@dataclass(frozen=True)
class Server:
    """A server that is running."""

    pid: int
    port: int
    start_seconds: float  # from its start until it accepted a connection

    def cpu(self) -> float:
        """Return the CPU time that it has used, in seconds."""
        # The number of the clock is computed as by clock_getcpuclockid(3). The clock counts
        # nanoseconds; the figures in /proc count hundredths of a second.
        return time.clock_gettime(~self.pid << 3 | 2)

    def memory(self, field: str) -> int:
        """Return a field of /proc/PID/status in KiB, such as VmRSS."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.partition(f"{field}:")[2].split()[0])


@contextlib.contextmanager
def run_server(peer: Peer, mail: Path) -> Iterator[Server]:
    """Start a server, wait until it accepts connections, and end it."""
    with socket.create_server((HOST, 0)) as sock:
        port = sock.getsockname()[1]
    fields = {"python": sys.executable, "venv": VENV, "root": ROOT, "port": port, "mail": mail}
    command = [word.format_map(fields) for word in peer.command.split()]
    null = subprocess.DEVNULL
    began = time.perf_counter()
    with subprocess.Popen(command, cwd=CACHE, stdin=null, stdout=null, stderr=null) as process:
        try:
            wait_until_accepting(process, port)
            yield Server(process.pid, port, time.perf_counter() - began)
        finally:
            process.kill()


def wait_until_accepting(process: subprocess.Popen[bytes], port: int) -> None:
    """Wait until a server that has been started accepts a connection."""
    deadline = time.perf_counter() + TIMEOUT
    while process.poll() is None and time.perf_counter() < deadline:
        with contextlib.suppress(ConnectionRefusedError):
            connect(port).close()
            return
        time.sleep(0.001)
    raise ConnectionError(f"no connection, exit status {process.returncode}")


# --- Load generator and measurements --------------------------------------------------

OPENING = (b"", b"EHLO client.example.com\r\n")  # the server sends the first reply unasked
# The last line of a reply: RFC 5321 section 4.2 allows the code without a text.
END_OF_REPLY = re.compile(rb"^[0-9]{3}( [^\n]*)?\r\n\Z", re.MULTILINE)
HEADER = (
    b"From: app@example.com\r\nTo: user@example.net\r\nSubject: Benchmark\r\n"
    b"Date: Mon, 06 Jan 2025 10:00:00 +0000\r\nMessage-ID: <benchmark@example.com>\r\n\r\n"
)


def make_message(size: int) -> bytes:
    """Return a message of that many bytes, in lines as long as those of base64."""
    line = b"A" * 76 + b"\r\n"
    content = HEADER + line * (size // len(line) + 1)
    return content[: size - 2] + b"\r\n"


def make_transaction(size: int) -> tuple[bytes, ...]:
    """Return the requests that send one message of that many bytes."""
    envelope = (b"MAIL FROM:<app@example.com>\r\n", b"RCPT TO:<user@example.net>\r\n")
    return (*envelope, b"DATA\r\n", make_message(size) + b".\r\n")


def connect(port: int) -> socket.socket:
    """Return a connection; socket.create_connection() would call getaddrinfo each time."""
    sock = socket.socket()
    sock.settimeout(TIMEOUT)
    sock.connect((HOST, port))
    return sock


def converse(sock: socket.socket, requests: Iterable[bytes]) -> Iterator[None]:
    """Send requests, each after the reply to the one before; yields before each recv()."""
    for request in requests:
        sock.sendall(request)
        reply = b""
        while not END_OF_REPLY.search(reply):
            yield
            data = sock.recv(4096)
            if not data:
                raise ConnectionError("closed the connection")
            reply += data
        if reply[:1] not in (b"2", b"3"):
            raise ConnectionError(f"replied {reply[:80]!r}")


def send(sock: socket.socket, requests: Iterable[bytes]) -> None:
    """Send requests over a blocking socket, each after the reply to the one before."""
    for _ in converse(sock, requests):
        pass


class Load:
    """Clients that send 2 KiB messages at the same time, one per connection if single is set."""

    def __init__(self, port: int, *, single: bool) -> None:
        self._accepted = 0  # number of messages
        self._port = port
        self._single = single
        self._transaction = make_transaction(2048)
        self._selector = selectors.DefaultSelector()
        for _ in range(CONNECTIONS):
            self._open()

    def run(self, seconds: float, limit: float = math.inf) -> int:
        """Send messages for that long, at most limit; return the number of accepted ones."""
        deadline, before = time.perf_counter() + seconds, self._accepted
        while time.perf_counter() < deadline and self._accepted < before + limit:
            ready = self._selector.select(TIMEOUT)
            if not ready:
                raise ConnectionError("sent no reply")
            for key, _ in ready:
                sock, client = key.data
                if next(client, "done"):  # None as long as it waits for replies
                    self._selector.unregister(sock)
                    sock.close()
                    self._open()
        if self._accepted == before:
            raise ConnectionError("accepted no message")
        return self._accepted - before

    def close(self) -> None:
        """Close the connections."""
        for key in self._selector.get_map().values():
            key.data[0].close()
        self._selector.close()

    def _open(self) -> None:
        sock = connect(self._port)
        sock.setblocking(False)  # a request fits the socket's buffer, so sendall() never blocks
        client = converse(sock, self._requests())
        next(client)
        self._selector.register(sock, selectors.EVENT_READ, (sock, client))

    def _requests(self) -> Iterator[bytes]:
        yield from OPENING
        while True:
            yield from self._transaction
            self._accepted += 1
            if self._single:
                break
        yield b"QUIT\r\n"


def measure_cpu(server: Server, seconds: float, *, single: bool = False) -> float:
    """Return the microseconds of CPU time that the server takes per message of 20 clients."""
    with contextlib.closing(Load(server.port, single=single)) as load:
        load.run(WARM_UP)
        before = server.cpu()
        count = load.run(seconds)
        return (server.cpu() - before) / count * 1e6


def measure_rate(server: Server, seconds: float) -> float:
    """Return the messages per second of 20 clients."""
    with contextlib.closing(Load(server.port, single=False)) as load:
        load.run(WARM_UP)
        began = time.perf_counter()
        count = load.run(seconds, MAX_MESSAGES)
        return count / (time.perf_counter() - began)


def measure_throughput(server: Server, seconds: float) -> float:
    """Return the MB per second of 5 MB messages over one connection."""
    size, count = 5_000_000, 4
    transaction = make_transaction(size)
    with connect(server.port) as sock:
        send(sock, OPENING)
        began = time.perf_counter()
        send(sock, transaction * count)
        return count * size / (time.perf_counter() - began) / 1e6


def measure_peak_memory(server: Server, seconds: float) -> float:
    """Return the MiB that the server takes for a message of 30 MB."""
    idle = server.memory("VmRSS")
    Path(f"/proc/{server.pid}/clear_refs").write_text("5")  # resets VmHWM, see proc(5)
    with connect(server.port) as sock:
        send(sock, OPENING + make_transaction(30_000_000))
    return (server.memory("VmHWM") - idle) / 1024


def measure_idle_connections(server: Server, seconds: float) -> float:
    """Return the KiB that the server takes for each connection that is idle after EHLO."""
    before = server.memory("VmRSS")
    with contextlib.ExitStack() as stack:
        # One after the other: what a burst of new connections takes is another figure.
        for _ in range(IDLE_CONNECTIONS):
            send(stack.enter_context(connect(server.port)), OPENING)
        return (server.memory("VmRSS") - before) / IDLE_CONNECTIONS


def measure_start(server: Server, seconds: float) -> float:
    """Return the milliseconds until the server accepted a connection."""
    return server.start_seconds * 1000


# --- Peers and rows -------------------------------------------------------------------

# The handler and the small servers, by file name.
MODULES = {
    "sink.py": """\
async def discard(envelope):
    pass
""",
    # It compares lines only to find the content and the end of the session.
    "plain_server.py": r"""
import asyncio, sys

async def serve(reader, writer):
    writer.write(b"220 localhost ESMTP\r\n")
    while (line := await reader.readline()) and line != b"QUIT\r\n":
        if line == b"DATA\r\n":
            writer.write(b"354 End data with <CR><LF>.<CR><LF>\r\n")
            await reader.readuntil(b"\r\n.\r\n")
        writer.write(b"250 OK\r\n")
    writer.write(b"221 Bye\r\n")
    writer.close()

async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", int(sys.argv[1]))
    await server.serve_forever()

asyncio.run(main())
""",
    # With the module's backlog of 5, some of 20 clients connect only after a second.
    "smtpd_server.py": """\
import asyncore, smtpd, sys

class Sink(smtpd.SMTPServer):
    def process_message(self, *args, **kwargs):
        pass

Sink(("127.0.0.1", int(sys.argv[1])), None).listen(100)
asyncore.loop()
""",
}

DSMTPD = "{python} {root}/dsmtpd.py -q -p {port} "
AIOSMTPD = "{venv}/bin/python -m aiosmtpd -n -l 127.0.0.1:{port} -c aiosmtpd.handlers."

SINKS = (
    Peer("dsmtpd", DSMTPD + "--handler sink:discard"),
    Peer("plain asyncio", "{python} plain_server.py {port}"),
    Peer("standard-smtpd", "{venv}/bin/python smtpd_server.py {port}", "smtpd"),
    Peer("aiosmtpd", AIOSMTPD + "Sink", "aiosmtpd"),
)
STORES = (
    Peer("dsmtpd", DSMTPD + "-d {mail}"),
    Peer("dsmtpd 1.2", "{venv}/bin/python -m dsmtpd -i 127.0.0.1 -p {port} -d {mail}", "dsmtpd"),
    Peer("aiosmtpd", AIOSMTPD + "Mailbox {mail}", "aiosmtpd"),
)
ROWS = (
    Row("Not stored, many per connection (CPU us)", measure_cpu, SINKS),
    Row("Not stored, one per connection (CPU us)", partial(measure_cpu, single=True), SINKS),
    Row("Stored on tmpfs, many per connection (messages/s)", measure_rate, STORES),
    Row("Stored on disk, many per connection (messages/s)", measure_rate, STORES, CACHE),
    Row("5 MB, stored on tmpfs (MB/s)", measure_throughput, STORES),
    Row("30 MB on tmpfs, memory above idle (MiB)", measure_peak_memory, STORES),
    Row("An idle connection, memory (KiB)", measure_idle_connections, STORES),
    Row("Start until it accepts (ms)", measure_start, STORES),
)


def install() -> None:
    """Fetch the peers into CACHE with pip."""
    subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
    packages = ["aiosmtpd", "dsmtpd==1.2", "standard-smtpd"]
    subprocess.run([VENV / "bin" / "pip", "install", "-q", *packages], check=True)


def prepare() -> None:
    """Write MODULES into CACHE."""
    CACHE.mkdir(parents=True, exist_ok=True)
    for name, text in MODULES.items():
        (CACHE / name).write_text(text)


# --- Runs and table -------------------------------------------------------------------

LINE = "{:<14}  {:>9}  {:>17}  {:>7}"
BORDER = LINE.format("=" * 14, "=" * 9, "=" * 17, "=" * 7)
HEADINGS = LINE.format("Server", "Median", "Range", "Ratio")
NOTE = """
{} cores, Python {}; {} runs. Messages have 2 KiB and are sent over 20 connections, unless
the row says otherwise. CPU is the user and system time of the server per message. Ratio is
the figure of dsmtpd divided by that of this server in the same run, the median of all runs.
"""


def measure_once(row: Row, peer: Peer, seconds: float) -> float:
    """Measure a new server, which stores into a new folder."""
    with (
        tempfile.TemporaryDirectory(prefix="mail-", dir=row.storage) as folder,
        run_server(peer, Path(folder) / "mail") as server,
    ):
        return row.measure(server, seconds)


def print_row(row: Row, runs: int, seconds: float) -> None:
    """Measure the peers of the row, which alternate run by run, and print the results."""
    samples: dict[Peer, list[float]] = {peer: [] for peer in row.peers}
    problems = {peer: "not installed" for peer in row.peers if not peer.is_installed()}
    for _ in range(runs):
        for peer in [peer for peer in row.peers if peer not in problems]:
            try:
                samples[peer].append(measure_once(row, peer, seconds))
            except OSError as error:
                problems[peer] = f"failed: {error}"
    print(row.title, "-" * len(BORDER), sep="\n")
    for peer in row.peers:
        if peer in problems:
            print(f"{peer.name:<14}  {problems[peer]}")
        else:
            columns = format_samples(samples[peer], samples[row.peers[0]])
            print(LINE.format(peer.name, *columns).rstrip(), flush=True)


def format_samples(samples: list[float], ours: list[float]) -> tuple[str, str, str]:
    """Return the columns of one peer; ours are the samples of dsmtpd."""
    pairs = zip(ours, samples, strict=False)  # ours are fewer if dsmtpd failed
    ratios = [our / sample for our, sample in pairs]
    return (
        format_figure(statistics.median(samples)),
        f"{format_figure(min(samples))}-{format_figure(max(samples))}",
        f"{statistics.median(ratios):.2f}" if ratios and samples is not ours else "",
    )


def format_figure(value: float) -> str:
    """Return a number with three digits, or more before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--install", action="store_true", help="fetch the peers into build/benchmark/ and exit")
    add("--quick", action="store_true", help="9 runs of 0.5 seconds, not 15 of 2")
    add("--row", metavar="TEXT", default="", help="only the rows with this text in their title")
    args = parser.parse_args()
    # SIGTERM raises KeyboardInterrupt, so that servers are ended and folders are removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if args.install:
        install()
        return
    prepare()
    runs, seconds = (9, 0.5) if args.quick else (15, 2.0)
    print(BORDER, HEADINGS, BORDER, sep="\n")
    for row in ROWS:
        if args.row in row.title:
            print_row(row, runs, seconds)
    print(BORDER, NOTE.format(os.cpu_count(), platform.python_version(), runs), sep="\n")


if __name__ == "__main__":
    main()
