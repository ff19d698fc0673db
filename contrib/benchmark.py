"""Compare dsmtpd with other SMTP servers on this machine.

Usage::

    python contrib/benchmark.py --install    # once: fetch the peers into build/benchmark/
    python contrib/benchmark.py --quick      # a few minutes; without --quick more, longer runs

The peers are dsmtpd 1.2, aiosmtpd, the smtp-server package of Node.js, and smtp-sink. The last
is part of Postfix; install it with the package manager of the system. A peer that is not
installed is left out. The certificate for TLS is made by the openssl program.

Each run starts a server on the loopback interface and sends messages to it from this process.
In each row of the table the servers alternate, run by run. This needs Linux, which provides
the memory and the CPU time of other processes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import re
import selectors
import shutil
import signal
import smtplib
import socket
import ssl
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
NODE_PACKAGE = CACHE / "node_modules" / "smtp-server"
TMPFS = Path("/dev/shm")
HOST = "127.0.0.1"

TIMEOUT = 20.0  # seconds to wait for a reply, or for a server to start
WARM_UP = 0.3  # seconds of load before a rate is measured
CONNECTIONS = 20  # connections that send 2 KiB messages at the same time
IDLE_CONNECTIONS = 900  # dsmtpd accepts 1000, and a process may often open 1024 files
MAX_MESSAGES = 8000  # of one rate; 32 MB on tmpfs, of which containers often have 64 MB


@dataclass(frozen=True)
class Peer:
    """A server that is measured."""

    name: str
    command: str  # program and arguments, with the fields of run_server()
    file: Path = ROOT  # exists if the peer is installed


@dataclass(frozen=True)
class Sample:
    """The result of one run."""

    figure: float
    cpu: float | None = None  # seconds of the server's CPU time per message


@dataclass(frozen=True)
class Row:
    """A measurement of several servers, the first of which is dsmtpd."""

    title: str
    measure: Callable[[Server, float], Sample]  # called with the seconds for a rate
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
        self.accepted = 0  # number of messages
        self._port = port
        self._single = single
        self._transaction = make_transaction(2048)
        self._selector = selectors.DefaultSelector()
        for _ in range(CONNECTIONS):
            self._open()

    def run(self, seconds: float) -> None:
        """Send messages for that long; the next call continues where this one ends."""
        deadline = time.perf_counter() + seconds
        limit = self.accepted + MAX_MESSAGES
        while time.perf_counter() < deadline and self.accepted < limit:
            ready = self._selector.select(TIMEOUT)
            if not ready:
                raise ConnectionError("sent no reply")
            for key, _ in ready:
                sock, client = key.data
                if next(client, "done"):  # None as long as it waits for replies
                    self._selector.unregister(sock)
                    sock.close()
                    self._open()

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
            self.accepted += 1
            if self._single:
                break
        yield b"QUIT\r\n"


def measure_rate(server: Server, seconds: float, *, single: bool = False) -> Sample:
    """Return the messages per second of 20 clients."""
    with contextlib.closing(Load(server.port, single=single)) as load:
        load.run(WARM_UP)
        accepted, cpu, began = load.accepted, server.cpu(), time.perf_counter()
        load.run(seconds)
        elapsed = time.perf_counter() - began
        count = load.accepted - accepted
    if not count:
        raise ConnectionError("accepted no message")
    return Sample(count / elapsed, (server.cpu() - cpu) / count)


def measure_throughput(server: Server, seconds: float) -> Sample:
    """Return the MB per second of 5 MB messages over one connection."""
    size, count = 5_000_000, 10
    transaction = make_transaction(size)
    with connect(server.port) as sock:
        send(sock, OPENING)
        cpu, began = server.cpu(), time.perf_counter()
        send(sock, transaction * count)
        elapsed = time.perf_counter() - began
    return Sample(count * size / elapsed / 1e6, (server.cpu() - cpu) / count)


def measure_peak_memory(server: Server, seconds: float) -> Sample:
    """Return the MiB that the server takes for a message of 30 MB."""
    idle = server.memory("VmRSS")
    Path(f"/proc/{server.pid}/clear_refs").write_text("5")  # resets VmHWM, see proc(5)
    with connect(server.port) as sock:
        send(sock, OPENING + make_transaction(30_000_000))
    return Sample((server.memory("VmHWM") - idle) / 1024)


def measure_idle_connections(server: Server, seconds: float) -> Sample:
    """Return the KiB that the server takes for each connection that is idle after EHLO."""
    before = server.memory("VmRSS")
    with contextlib.ExitStack() as stack:
        # One after the other: what a burst of new connections takes is another figure.
        for _ in range(IDLE_CONNECTIONS):
            send(stack.enter_context(connect(server.port)), OPENING)
        return Sample((server.memory("VmRSS") - before) / IDLE_CONNECTIONS)


def measure_start(server: Server, seconds: float) -> Sample:
    """Return the milliseconds until the server accepted a connection."""
    return Sample(server.start_seconds * 1000)


def measure_latency(server: Server, seconds: float, *, tls: bool = False) -> Sample:
    """Return the milliseconds per message of one smtplib client."""
    client: smtplib.SMTP
    if tls:
        context = ssl.create_default_context(cafile=CACHE / "cert.pem")
        client = smtplib.SMTP_SSL(HOST, server.port, HOST, timeout=TIMEOUT, context=context)
    else:
        client = smtplib.SMTP(HOST, server.port, HOST, TIMEOUT)
    message, count, elapsed = make_message(2048), 0, 0.0
    with client:
        client.ehlo()
        cpu, began = server.cpu(), time.perf_counter()
        while elapsed < seconds:
            client.sendmail("app@example.com", "user@example.net", message)
            elapsed, count = time.perf_counter() - began, count + 1
        return Sample(elapsed / count * 1000, (server.cpu() - cpu) / count)


# --- Peers and rows -------------------------------------------------------------------

OPENSSL = (
    "openssl req -x509 -nodes -days 2 -newkey rsa:2048 -keyout key.pem -out cert.pem"
    " -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
)
SINK_MODULE = "async def discard(envelope): pass\n"
NODE_PROGRAM = """\
const {SMTPServer} = require("smtp-server");
const onData = (stream, session, done) => { stream.on("end", done); stream.resume(); };
new SMTPServer({authOptional: true, disableReverseLookup: true, onData})
    .listen(Number(process.argv[2]), "127.0.0.1");
"""

DSMTPD = "{python} {root}/dsmtpd.py -q -p {port} "
DISCARD = DSMTPD + "--handler sink:discard "
AIOSMTPD = "{venv}/bin/python -m aiosmtpd -n -l 127.0.0.1:{port} -c aiosmtpd.handlers."
SMTP_SINK = Path(shutil.which("smtp-sink") or "/usr/sbin/smtp-sink")
# As root it needs -u; -m is the limit of connections.
SINK = f"{SMTP_SINK} -m 1000 " + ("-u root " if os.getuid() == 0 else "")

SINKS = (
    Peer("dsmtpd", DISCARD),
    Peer("aiosmtpd", AIOSMTPD + "Sink", VENV),
    Peer("smtp-sink", SINK + "127.0.0.1:{port} 1024", SMTP_SINK),
    Peer("smtp-server", "node sink.js {port}", NODE_PACKAGE),
)
STORES = (
    Peer("dsmtpd", DSMTPD + "-d {mail}"),
    Peer("dsmtpd 1.2", "{venv}/bin/python -m dsmtpd -i 127.0.0.1 -p {port} -d {mail}", VENV),
    Peer("aiosmtpd", AIOSMTPD + "Mailbox {mail}", VENV),
    Peer("smtp-sink", SINK + "-d {mail}/%H. 127.0.0.1:{port} 1024", SMTP_SINK),
)
TLS = (
    Peer("dsmtpd", DISCARD + "--tls implicit --cert cert.pem --key key.pem"),
    Peer("aiosmtpd", AIOSMTPD + "Sink --smtpscert cert.pem --smtpskey key.pem", VENV),
)
ROWS = (
    Row("Not stored, many per connection (messages/s)", measure_rate, SINKS),
    Row("Not stored, one per connection (messages/s)", partial(measure_rate, single=True), SINKS),
    Row("Stored on tmpfs, many per connection (messages/s)", measure_rate, STORES),
    Row("Stored on disk, many per connection (messages/s)", measure_rate, STORES, CACHE),
    Row("5 MB, stored on tmpfs (MB/s)", measure_throughput, STORES),
    Row("30 MB on tmpfs, memory above idle (MiB)", measure_peak_memory, STORES),
    Row("An idle connection, memory (KiB)", measure_idle_connections, SINKS[:3]),
    Row("Start until it accepts (ms)", measure_start, STORES),
    Row("One smtplib client, not stored (ms/message)", measure_latency, SINKS[:2]),
    Row("One smtplib client over TLS (ms/message)", partial(measure_latency, tls=True), TLS),
)


def install() -> None:
    """Fetch the peers into CACHE with pip and, where it is installed, npm."""
    subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
    pip = VENV / "bin" / "pip"
    subprocess.run([pip, "install", "-q", "aiosmtpd", "dsmtpd==1.2"], check=True)
    if shutil.which("npm"):
        subprocess.run(["npm", "install", "--prefix", CACHE, "smtp-server@3"], check=True)


def prepare() -> None:
    """Write the files that the servers need, with a new throw-away certificate."""
    CACHE.mkdir(parents=True, exist_ok=True)
    (CACHE / "sink.py").write_text(SINK_MODULE)
    (CACHE / "sink.js").write_text(NODE_PROGRAM)
    subprocess.run(OPENSSL.split(), cwd=CACHE, capture_output=True, timeout=TIMEOUT, check=True)


# --- Runs and table -------------------------------------------------------------------

LINE = "{:<11}  {:>9}  {:>17}  {:>11}  {:>7}"
BORDER = LINE.format("=" * 11, "=" * 9, "=" * 17, "=" * 11, "=" * 7)
HEADINGS = LINE.format("Server", "Median", "Range", "CPU/message", "Ratio")
NOTE = """
{} cores, Python {}; median and range of {} runs. Messages have 2 KiB and are sent over
20 connections, unless the row says otherwise. CPU/message is the CPU time of the server.
Ratio is the median of dsmtpd divided by that of this server. The load generator limits the
rate of fast servers, such as smtp-sink; compare their CPU/message.
"""


def measure_once(row: Row, peer: Peer, seconds: float) -> Sample:
    """Measure a new server, which stores into a new folder."""
    with (
        tempfile.TemporaryDirectory(prefix="mail-", dir=row.storage) as folder,
        run_server(peer, Path(folder) / "mail") as server,
    ):
        return row.measure(server, seconds)


def print_row(row: Row, runs: int, seconds: float) -> None:
    """Measure the peers of the row, which alternate run by run, and print the results."""
    samples: dict[Peer, list[Sample]] = {peer: [] for peer in row.peers}
    problems = {peer: "not installed" for peer in row.peers if not peer.file.exists()}
    for _ in range(runs):
        for peer in [peer for peer in row.peers if peer not in problems]:
            try:
                samples[peer].append(measure_once(row, peer, seconds))
            except OSError as error:  # smtplib's exceptions are such errors as well
                problems[peer] = f"failed: {error}"
    print(row.title, "-" * len(BORDER), sep="\n")
    for peer in row.peers:
        if peer in problems:
            print(f"{peer.name:<11}  {problems[peer]}")
        else:
            columns = format_samples(samples[peer], samples[row.peers[0]])
            print(LINE.format(peer.name, *columns).rstrip(), flush=True)


def format_samples(samples: list[Sample], ours: list[Sample]) -> tuple[str, ...]:
    """Return the columns of one peer; ours are the samples of dsmtpd."""
    figures = [sample.figure for sample in samples]
    median = statistics.median(figures)
    times = [sample.cpu for sample in samples if sample.cpu is not None]
    compared = samples is not ours and len(ours) > 0 and median > 0
    return (
        format_figure(median),
        f"{format_figure(min(figures))}-{format_figure(max(figures))}",
        f"{statistics.median(times) * 1e6:,.0f} us" if times else "",
        f"{statistics.median(each.figure for each in ours) / median:.2f}" if compared else "",
    )


def format_figure(value: float) -> str:
    """Return a number with three digits, or more before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--install", action="store_true", help="fetch the peers into build/benchmark/ and exit")
    add("--quick", action="store_true", help="3 runs of up to 1 second, not 5 of 3")
    add("--row", metavar="TEXT", default="", help="only the rows with this text in their title")
    args = parser.parse_args()
    # SIGTERM raises KeyboardInterrupt, so that servers are ended and folders are removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if args.install:
        install()
        return
    prepare()
    runs, seconds = (3, 1.0) if args.quick else (5, 3.0)
    print(BORDER, HEADINGS, BORDER, sep="\n")
    for row in ROWS:
        if args.row in row.title:
            print_row(row, runs, seconds)
    print(BORDER, NOTE.format(os.cpu_count(), platform.python_version(), runs), sep="\n")


if __name__ == "__main__":
    main()
