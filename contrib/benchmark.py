"""Measure dsmtpd against other SMTP servers on this machine, and print the ratios.

Usage::

    python contrib/benchmark.py --install    # once: fetch the peers into build/benchmark/
    python contrib/benchmark.py --quick      # some minutes; everything, without --quick

Each server is started on the loopback interface and gets its messages from a load generator
of its own: one thread, prepared requests, and, but for one row, no pipelining. The servers
of a row take turns, run by run; what is printed is the median and the range of the runs. A
server that is not installed is left out. For Linux, whose /proc has the figures of a process.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import importlib.util
import json
import os
import platform
import resource
import select
import selectors
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "build" / "benchmark"
VENV = CACHE / f"venv-{sys.version_info.major}.{sys.version_info.minor}"
HOST = "127.0.0.1"

# Seconds without any reply until a server counts as hanging.
STALLED = 20.0

# Messages of one run; what the messages of a row take on tmpfs stays below 1 GB.
MAX_MESSAGES = 10_000

# Connections that are opened together where they are not measured.
BATCH = 50

# Connections of one run that wait for their greeting at the beginning: fewer than the backlog
# of any server, where one more would wait a second for its next try.
RAMP = 4

Sample = dict[str, float]
Results = dict[str, dict[str, list[Sample]]]


class BenchmarkError(Exception):
    """A server cannot be measured; the text says why."""


# --- The servers ----------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """A server: its command, with {port} and {dir} for the port and the directory."""

    name: str
    command: tuple[str, ...]
    missing: str = ""
    """Why it cannot be measured here."""
    processes: int = 1
    """How many of them share the port."""
    messages: int = 0
    """How many messages the Maildir holds already."""
    serves: bool = True
    """False for a program that is only run to its end, for its time."""


# As few lines as a server can have that throws every message away.
OURS_NOT_STORED = """
import asyncio, sys, dsmtpd
async def deliver(envelope): pass
async def main():
    async with dsmtpd.Server(port=int(sys.argv[1]), deliver=deliver) as server:
        await server.serve_forever()
dsmtpd.MAX_CONNECTIONS = 10_000
asyncio.run(main())
"""
SMTPD_MODULE = """
import asyncore, smtpd, sys
class Sink(smtpd.SMTPServer):
    def process_message(self, *message, **options): pass
server = Sink(("127.0.0.1", int(sys.argv[1])), None)
server.listen(1024)  # with the 5 of its own, twenty clients block it
asyncore.loop(use_poll=True)
"""
SMTP_SERVER = """
const {SMTPServer} = require("smtp-server");
const onData = (stream, session, done) => { stream.on("end", done); stream.resume(); };
new SMTPServer({authOptional: true, disableReverseLookup: true, onData})
    .listen(Number(process.argv[1]), "127.0.0.1");
"""
REFERENCE = "import asyncio, mailbox, argparse, logging"

OURS = Peer("dsmtpd", (sys.executable, "dsmtpd.py", "-q", "-p", "{port}", "-d", "{dir}"))
OURS_SINK = Peer("dsmtpd", (sys.executable, "-c", OURS_NOT_STORED, "{port}"))
OURS_LOGGING = Peer("dsmtpd, not -q", tuple(word for word in OURS.command if word != "-q"))
OURS_MODULE = Peer("dsmtpd, as -m", (sys.executable, "-m", "dsmtpd", *OURS.command[2:]))
OURS_FULL = replace(OURS, name="dsmtpd, 100,000 there", messages=100_000)


def _need(path: str | Path | None, what: str) -> str:
    return "" if path and Path(path).exists() else f"{what} is not installed"


def _python_peer(name: str, module: str, *options: str) -> Peer:
    python = VENV / "bin" / "python"
    return Peer(name, (str(python), "-m", module, *options), _need(python, name))


def _old_dsmtpd() -> Peer:
    return _python_peer("dsmtpd 1.2", "dsmtpd", "-i", HOST, "-p", "{port}", "-d", "{dir}")


def _aiosmtpd(handler: str, *arguments: str) -> Peer:
    options = ("-n", "-l", f"{HOST}:{{port}}", "-c", f"aiosmtpd.handlers.{handler}", *arguments)
    return _python_peer(f"aiosmtpd {handler}", "aiosmtpd", *options)


def _smtp_sink(name: str, *options: str) -> Peer:
    program = _find("smtp-sink")
    # It does not run as root without a word.
    user = ("-u", "root") if os.getuid() == 0 else ()
    limits = ("-m", "10000", f"{HOST}:{{port}}", "1024")
    return Peer(name, (program or name, *user, *options, *limits), _need(program, name))


def _node_peer(name: str, package: str, *arguments: str) -> Peer:
    node = shutil.which("node")
    missing = _need(node, "node") or _need(CACHE / "node_modules" / package, name)
    return Peer(name, (node or "node", *arguments), missing)


def _maildev() -> Peer:
    script = str(CACHE / "node_modules" / ".bin" / "maildev")
    options = ("--ip", HOST, "-s", "{port}", "--mail-directory", "{dir}")
    return _node_peer("maildev", "maildev", script, "--silent", "--disable-web", *options)


def _smtpd_module() -> Peer:
    missing = "" if importlib.util.find_spec("smtpd") else "smtpd is not in this Python"
    command = (sys.executable, "-W", "ignore", "-c", SMTPD_MODULE, "{port}")
    return Peer("smtpd of CPython", command, missing)


def _two_of_ours() -> Peer:
    command = [sys.executable, "dsmtpd.py", "--help"]
    described = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    missing = "" if "--reuse-port" in described.stdout else "this dsmtpd has no --reuse-port"
    return Peer("two of dsmtpd", (*OURS.command, "--reuse-port"), missing, processes=2)


def _find(program: str) -> str | None:
    """A program of the administrator, which may not be in a user's PATH."""
    return shutil.which(program, path=os.environ.get("PATH", "") + os.pathsep + "/usr/sbin")


def install() -> None:
    """Fetch the peers into CACHE: from PyPI and, where there is npm, from there."""
    CACHE.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    pip = [str(VENV / "bin" / "python"), "-m", "pip", "install", "-q"]
    subprocess.run([*pip, "aiosmtpd", "dsmtpd==1.2"], check=True)
    npm = shutil.which("npm")
    if npm is None:
        return
    # maildev 2, not 3: the same server with fewer packages around it.
    for package in ("smtp-server@3", "maildev@2"):
        command = [npm, "install", "--no-audit", "--no-fund", "--prefix", str(CACHE), package]
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
            print(f"npm cannot install {package}", file=sys.stderr)


# --- A running server -----------------------------------------------------------------


@dataclass(frozen=True)
class Running:
    """A server that runs."""

    port: int
    pids: list[int]
    start_seconds: float
    """From its start until it greeted the first client."""

    def cpu(self) -> float:
        """Seconds of CPU time, user plus system, that it used."""
        return sum(_cpu(pid) for top in self.pids for pid in _family(top))

    def memory(self, name: str) -> int:
        """KiB of memory; name is VmRSS or, for the peak, VmHWM."""
        return sum(_memory(pid, name) for top in self.pids for pid in _family(top))


@contextlib.contextmanager
def running(peer: Peer, directory: Path) -> Iterator[Running]:
    """Start the server, wait until it greets, and end it."""
    with socket.create_server((HOST, 0)) as sock:
        port = sock.getsockname()[1]
    words = {"{port}": str(port), "{dir}": str(directory)}
    command = [_filled(word, words) for word in peer.command]
    with contextlib.ExitStack() as stack:
        began = time.perf_counter()
        processes = [_spawn(command, stack) for _ in range(peer.processes)]
        _wait_until_ready(peer, processes[0], port)
        seconds = time.perf_counter() - began
        if peer.processes > 1:
            time.sleep(0.5)  # the first one has greeted; nothing tells of the others
        yield Running(port, [process.pid for process in processes], seconds)


def _filled(word: str, words: dict[str, str]) -> str:
    for name, value in words.items():
        word = word.replace(name, value)
    return word


def _spawn(command: list[str], stack: contextlib.ExitStack) -> subprocess.Popen[bytes]:
    # A module is looked up in the current directory first: ours is in the one, none in the other.
    cwd = ROOT if command[0] == sys.executable else CACHE
    null = subprocess.DEVNULL
    process = subprocess.Popen(command, cwd=cwd, stdin=null, stdout=null, stderr=null)
    stack.callback(_end, process)
    return process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait_until_ready(peer: Peer, process: subprocess.Popen[bytes], port: int) -> None:
    if not peer.serves:
        # Not wait(STALLED), which looks only now and then.
        with os.fdopen(os.pidfd_open(process.pid)) as ended:
            select.select([ended], [], [], STALLED)
        return
    deadline = time.perf_counter() + STALLED
    while time.perf_counter() < deadline:
        if process.poll() is not None:
            raise BenchmarkError(f"ended at once, with status {process.returncode}")
        with contextlib.suppress(ConnectionRefusedError), open_session(port) as sock:
            sock.sendall(b"QUIT\r\n")
            return
        time.sleep(0.0005)
    raise BenchmarkError("does not listen")


def _family(pid: int) -> list[int]:
    """The process and those that it started."""
    children: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        children += [int(child) for child in file.read_text().split()]
    return [pid] + [member for child in children for member in _family(child)]


def _cpu(pid: int) -> float:
    # The clock that clock_getcpuclockid(3) names: nanoseconds, where /proc has 10 ms.
    return time.clock_gettime(~pid << 3 | 2)


def _memory(pid: int, name: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)[name].split()[0])


class Peak:
    """The most memory that a server has while this context lasts, in KiB over its idle."""

    def __init__(self, server: Running) -> None:
        self.value = 0
        self._server = server

    def __enter__(self) -> Peak:
        self._idle = self._server.memory("VmRSS")
        for pid in self._server.pids:  # begins VmHWM anew, see proc(5)
            Path(f"/proc/{pid}/clear_refs").write_text("5")
        return self

    def __exit__(self, *error: object) -> None:
        self.value = self._server.memory("VmHWM") - self._idle


# --- The load generator ---------------------------------------------------------------

EHLO = b"EHLO client.example.com\r\n"
ENVELOPE = (b"MAIL FROM:<app@example.com>\r\n", b"RCPT TO:<user@example.net>\r\n", b"DATA\r\n")
PIPELINED = b"".join(ENVELOPE)
HEADER = b"""\
From: Application <app@example.com>\r
To: user@example.net\r
Subject: Welcome to the benchmark\r
Date: Mon, 06 Jan 2025 10:00:00 +0000\r
Message-ID: <benchmark@example.com>\r
\r
"""


def make_content(size: int) -> bytes:
    """A message of that many octets, in lines as base64 has them, with the end of content."""
    line = b"VGhlIHF1aWNrIGJyb3duIGZveCBqdW1wcyBvdmVyIHRoZSBsYXp5IGRvZyBhbmQgYmFjay4gMTIz\r\n"
    content = HEADER + line * (size // len(line) + 1)
    return content[: size - 2] + b"\r\n.\r\n"


def is_complete(replies: bytes, count: int = 1) -> bool:
    """Whether so many last lines of replies are there: those with a blank behind the code."""
    if count > 1:
        return sum(line[3:4] == b" " for line in replies.split(b"\n")[:-1]) >= count
    start = replies.rfind(b"\n", 0, -1) + 1
    return replies.endswith(b"\n") and replies[start + 3 : start + 4] == b" "


def open_session(port: int) -> socket.socket:
    """A connection that was greeted."""
    sock = socket.create_connection((HOST, port), timeout=STALLED)
    try:
        _ask(sock, b"")
    except BaseException:
        sock.close()
        raise
    return sock


def open_sessions(port: int, count: int, stack: contextlib.ExitStack) -> list[socket.socket]:
    """Connections that were greeted and have said EHLO; the stack closes them."""
    sockets: list[socket.socket] = []
    while len(sockets) < count:
        # Some at a time: there are servers that think for a tenth of a second before they greet.
        batch = min(BATCH, count - len(sockets))
        opened = [socket.create_connection((HOST, port), STALLED) for _ in range(batch)]
        for sock in opened:
            stack.callback(sock.close)
        for sock in opened:
            _ask(sock, b"")
            _ask(sock, EHLO)
        sockets += opened
    return sockets


def _ask(sock: socket.socket, request: bytes) -> None:
    sock.sendall(request)
    reply = b""
    while not is_complete(reply):
        data = sock.recv(4096)
        if not data:
            raise BenchmarkError("closes the connection")
        reply += data


class Connection:
    """One client: sends a request when the reply to the one before is complete."""

    def __init__(self, sock: socket.socket, talk: Iterator[bytes]) -> None:
        self.sock = sock
        self._talk = talk
        self._reply = b""
        self._replies = 1
        self._unsent = memoryview(b"")

    @property
    def events(self) -> int:
        """What to wait for."""
        return selectors.EVENT_WRITE if self._unsent else selectors.EVENT_READ

    def advance(self) -> bool:
        """Go on, now that the socket is ready; returns whether the session does."""
        if self._unsent:
            self._send(self._unsent)
            return True
        data = self.sock.recv(4096)
        reply = self._reply + data
        if data and not is_complete(reply, self._replies):
            self._reply = reply
            return True
        if reply[:1] not in (b"2", b"3"):
            raise BenchmarkError(f"answers {reply[:80]!r}")
        self._reply = b""
        request = next(self._talk, b"")
        if request:
            self.send(request)
        return bool(request)

    def send(self, request: bytes) -> None:
        """Send a request: one or several commands, or a message."""
        self._replies = 3 if request is PIPELINED else 1
        self._send(memoryview(request))

    def _send(self, data: memoryview) -> None:
        self._unsent = data[self.sock.send(data) :]


class Load:
    """What the connections of one run have in common, and the loop that drives them."""

    def __init__(self, port: int, message: tuple[bytes, ...], single: bool, limit: int) -> None:
        self.done = 0
        self.seconds = 0.0
        self._port = port
        self._message = message
        self._single = single
        self._limit = limit
        self._to_open = 0
        self._deadline = 0.0
        self._selector = selectors.DefaultSelector()

    def run(self, connections: int, seconds: float) -> None:
        """Send messages for that long; those that have begun are sent to their end."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._close)
            count = 0 if self._single else connections
            opened = open_sessions(self._port, count, stack)
            began = time.perf_counter()
            self._deadline = began + seconds
            for sock in opened:
                self._add(sock, self._many()).send(self._message[0])
            self._to_open = connections - len(opened)
            for _ in range(min(RAMP, self._to_open)):
                self._open_next()
            self._loop()
            self.seconds = time.perf_counter() - began

    def _close(self) -> None:
        for key in list(self._selector.get_map().values()):
            key.data.sock.close()
        self._selector.close()

    def _loop(self) -> None:
        selector = self._selector
        while selector.get_map():
            ready = selector.select(STALLED)
            if not ready:
                raise BenchmarkError("does not answer")
            for key, _ in ready:
                connection: Connection = key.data
                if not connection.advance():
                    self._finish(connection.sock)
                elif connection.events != key.events:
                    selector.modify(connection.sock, connection.events, connection)

    def _finish(self, sock: socket.socket) -> None:
        self._selector.unregister(sock)
        sock.close()
        if self._single and not self._over():
            self._to_open += 1
            self._open_next()

    def _over(self) -> bool:
        return self.done >= self._limit or time.perf_counter() >= self._deadline

    def _open_next(self) -> None:
        if self._to_open:
            self._to_open -= 1
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex((HOST, self._port))
            self._add(sock, self._one())

    def _add(self, sock: socket.socket, talk: Iterator[bytes]) -> Connection:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = Connection(sock, talk)
        self._selector.register(sock, selectors.EVENT_READ, connection)
        return connection

    def _one(self) -> Iterator[bytes]:
        """The requests of a session with one message, each after the reply to the last."""
        self._open_next()
        yield EHLO
        yield from self._message
        self.done += 1
        yield b"QUIT\r\n"

    def _many(self) -> Iterator[bytes]:
        """The requests of a session that goes on until the time is over, after its first."""
        yield from self._message[1:]
        self.done += 1
        while not self._over():
            yield from self._message
            self.done += 1
        yield b"QUIT\r\n"


# --- What is measured -----------------------------------------------------------------


@dataclass(frozen=True)
class Traffic:
    """What small messages arrive in."""

    connections: int
    single: bool = False
    """One message per connection, not many."""
    pipelined: bool = False
    """MAIL, RCPT and DATA in one go (RFC 2920), not each after the reply to the last."""
    size: int = 2048

    def __str__(self) -> str:
        mode = "one" if self.single else "many"
        pipelined = ", pipelined" if self.pipelined else ""
        return f"{mode} per connection, {self.connections} connections{pipelined}"


def measure_messages(server: Running, seconds: float, *, traffic: Traffic) -> Sample:
    """The rate of messages, and the CPU time that each takes."""
    envelope = (PIPELINED,) if traffic.pipelined else ENVELOPE
    message = (*envelope, make_content(traffic.size))
    load = Load(server.port, message, traffic.single, MAX_MESSAGES)
    cpu, own = server.cpu(), time.process_time()
    load.run(traffic.connections, seconds)
    return {
        "rate": load.done / load.seconds,
        "cpu": (server.cpu() - cpu) / load.done * 1e6,
        "generator": (time.process_time() - own) / load.done * 1e6,
    }


def measure_large(server: Running, seconds: float, *, size: int, count: int) -> Sample:
    """Megabytes a second, CPU time, and the peak of memory, of some messages in a row."""
    load = Load(server.port, (*ENVELOPE, make_content(size)), False, count)
    cpu = server.cpu()
    with Peak(server) as peak:
        load.run(1, STALLED)
    return {
        "throughput": load.done * size / load.seconds / 1e6,
        "cpu": (server.cpu() - cpu) / load.done * 1e6,
        "memory": peak.value / 1024,
    }


def measure_smtp_source(server: Running, seconds: float, *, traffic: Traffic) -> Sample:
    """The same as measure_messages, with another load generator."""
    program = _find("smtp-source")
    if program is None:
        raise BenchmarkError("smtp-source is not installed")
    many = [] if traffic.single else ["-d"]
    options = ["-4", "-l", "1800", "-m", "500", "-s", str(traffic.connections), *many]
    command = [program, *options, f"{HOST}:{server.port}"]
    cpu, began, done = server.cpu(), time.perf_counter(), 0
    while not done or (time.perf_counter() - began < seconds and done < MAX_MESSAGES):
        result = subprocess.run(command, capture_output=True, text=True, timeout=STALLED)
        if result.returncode:
            raise BenchmarkError(result.stderr.strip())
        done += 500
    return {
        "rate": done / (time.perf_counter() - began),
        "cpu": (server.cpu() - cpu) / done * 1e6,
    }


def measure_idle(server: Running, seconds: float, *, connections: int) -> Sample:
    """The memory of each of many sessions that do nothing."""
    _allow_open_files(connections + 100)
    before = server.memory("VmRSS")
    with contextlib.ExitStack() as stack:
        open_sessions(server.port, connections, stack)
        return {"idle": (server.memory("VmRSS") - before) / connections}


def measure_start(server: Running, seconds: float) -> Sample:
    """The time until it greeted."""
    return {"start": server.start_seconds * 1000}


def _allow_open_files(count: int) -> None:
    """As many open files as are needed; the servers started from here inherit that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        raise BenchmarkError(f"only {hard} open files are allowed here")
    if soft != resource.RLIM_INFINITY and soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


# --- The rows -------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One measurement of several servers, the first of which is compared with the others."""

    name: str
    measure: Callable[[Running, float], Sample]
    peers: list[Peer]
    storage: str = "tmpfs"
    fresh: bool = False
    """Whether each run needs a server that was just started."""


def make_rows() -> list[Row]:
    """All rows, in the order of the table."""
    sinks = [OURS_SINK, _aiosmtpd("Sink"), _smtp_sink("smtp-sink")]
    sinks += [_node_peer("smtp-server", "smtp-server", "-e", SMTP_SERVER, "{port}")]
    stores = [OURS, _old_dsmtpd(), _aiosmtpd("Mailbox", "{dir}")]
    stores += [_smtp_sink("smtp-sink -d", "-d", "{dir}/%H."), _maildev()]
    rows = _small("not stored", "tmpfs", [*sinks, _smtpd_module()])
    for storage in ("tmpfs", "disk"):
        rows += _small(f"stored on {storage}", storage, stores)
        rows += _large(storage, stores)
        rows += _special(storage, stores)
    for count in (1000, 5000):
        # smtpd of CPython looks at every connection again and again: minutes for 5,000.
        peers = [*sinks, _smtpd_module()] if count == 1000 else sinks
        measure = partial(measure_idle, connections=count)
        rows.append(Row(f"{count:,} idle connections", measure, peers, fresh=True))
    reference = Peer("python -c 'import ...'", (sys.executable, "-c", REFERENCE), serves=False)
    starts = [OURS, reference, OURS_MODULE, *stores[1:], *sinks[3:]]
    rows.append(Row("start until it accepts", measure_start, starts, fresh=True))
    return rows


def _small(what: str, storage: str, peers: list[Peer]) -> list[Row]:
    """2 KiB messages, in every way."""
    kinds = [Traffic(count, single) for single in (True, False) for count in (1, 20, 200)]
    kinds.append(Traffic(20, pipelined=True))
    rows = [
        Row(f"2 KiB, {what}, {kind}", partial(measure_messages, traffic=kind), peers, storage)
        for kind in kinds
    ]
    if storage == "tmpfs" and _find("smtp-source"):
        for kind in (Traffic(20, True), Traffic(20)):
            source = partial(measure_smtp_source, traffic=kind)
            rows.append(Row(f"2 KiB, {what}, {kind}, smtp-source", source, peers, storage))
    return rows


def _large(storage: str, peers: list[Peer]) -> list[Row]:
    rows = []
    for megabytes, count in ((5, 10), (30, 1)):
        measure = partial(measure_large, size=megabytes * 1_000_000, count=count)
        rows.append(Row(f"{megabytes} MB, stored on {storage}", measure, peers, storage, True))
    return rows


def _special(storage: str, stores: list[Peer]) -> list[Row]:
    """What changes when dsmtpd runs in another way."""
    measure = partial(measure_messages, traffic=Traffic(20))
    old_full = replace(stores[1], messages=100_000, name="dsmtpd 1.2, 100,000 there")
    rows = [Row(f"100,000 there, {storage}", measure, [OURS_FULL, OURS, old_full], storage)]
    if storage == "tmpfs":
        rows.append(Row(f"its log, {storage}", measure, [OURS, OURS_LOGGING], storage))
    rows.append(Row(f"two processes, {storage}", measure, [_two_of_ours(), OURS], storage))
    return rows


@dataclass(frozen=True)
class Target:
    """A ratio that dsmtpd wants to reach: how many times better it is than the peer.

    Where at_most is true: its figure in parts of the peer's.
    """

    row: str
    metric: str
    peer: str
    bound: float
    at_most: bool = False


def make_targets() -> list[Target]:
    """The ratios to reach."""
    targets = []
    for mode, bound in (("many", 5.0), ("one", 3.5)):
        for count in (1, 20, 200):
            name = f"2 KiB, not stored, {mode} per connection, {count} connections"
            targets.append(Target(name, "rate", "aiosmtpd Sink", bound))
            targets.append(Target(name, "cpu", "aiosmtpd Sink", bound))
    many = "many per connection, 20 connections"
    for storage, bound in (("tmpfs", 3.0), ("disk", 1.5)):
        name = f"2 KiB, stored on {storage}, {many}"
        targets += [Target(name, metric, "dsmtpd 1.2", bound) for metric in ("rate", "cpu")]
    targets.append(Target(f"2 KiB, stored on tmpfs, {many}", "rate", "smtp-sink -d", 0.5))
    for storage in ("tmpfs", "disk"):
        name = f"5 MB, stored on {storage}"
        targets += [Target(name, metric, "dsmtpd 1.2", 7.0) for metric in ("throughput", "cpu")]
        targets.append(Target(name, "throughput", "smtp-sink -d", 0.9))
        name = f"30 MB, stored on {storage}"
        targets.append(Target(name, "memory", "dsmtpd 1.2", 1 / 3, at_most=True))
    start = "start until it accepts"
    targets.append(Target(start, "start", "python -c 'import ...'", 1.25, at_most=True))
    for storage in ("tmpfs", "disk"):
        targets.append(Target(f"100,000 there, {storage}", "rate", "dsmtpd", 0.9))
    return targets


# --- Running it -----------------------------------------------------------------------


class Benchmark:
    """Measures rows and keeps what came out."""

    def __init__(self, arguments: argparse.Namespace, storages: dict[str, Path]) -> None:
        self.results: Results = {}
        self.notes: list[str] = []
        self._runs: int = arguments.runs or (3 if arguments.quick else 5)
        self._seconds = 0.4 if arguments.quick else 2.0
        self._peers: list[str] = arguments.peer
        self._storages = storages

    def measure(self, row: Row) -> None:
        """Run the servers of the row in turns."""
        ours = row.peers[0]
        missing = ours.missing or ("" if row.storage in self._storages else "there is no tmpfs")
        if missing:
            self._note(f"{row.name}: {missing}")
            return
        found: dict[str, list[Sample]] = {}
        with contextlib.ExitStack() as stack:
            turns = {peer.name: self._turns(row, peer) for peer in self._chosen(row)}
            for turn in turns.values():
                stack.callback(turn.close)
            for _ in range(self._runs):
                for name, turn in turns.items():
                    found.setdefault(name, []).extend(self._take(f"{row.name}: {name}", turn))
        if found[ours.name]:
            self.results[row.name] = {name: taken for name, taken in found.items() if taken}

    def _take(self, name: str, turn: Generator[Sample, None, None]) -> list[Sample]:
        """The next sample; none of a server that has failed, now or in a turn before."""
        try:
            return [next(turn)]
        except StopIteration:
            return []
        except (BenchmarkError, OSError, subprocess.SubprocessError) as error:
            self._note(f"{name}: {error}")
            return []

    def _chosen(self, row: Row) -> list[Peer]:
        chosen = [row.peers[0]]
        chosen += [peer for peer in row.peers[1:] if _matches(peer.name, self._peers)]
        for peer in chosen:
            if peer.missing and peer.missing not in self.notes:
                self._note(peer.missing)
        return [peer for peer in chosen if not peer.missing]

    def _turns(self, row: Row, peer: Peer) -> Generator[Sample, None, None]:
        """One sample after the other, of one server or of a new one each time."""
        while True:
            with tempfile.TemporaryDirectory(dir=self._storages[row.storage]) as root:
                directory = Path(root) / "mail"
                if peer.messages:
                    _fill(directory, peer.messages)
                with running(peer, directory) as server:
                    if not row.fresh:
                        row.measure(server, self._seconds / 2)  # to warm up
                    yield row.measure(server, self._seconds)
                    while not row.fresh:
                        yield row.measure(server, self._seconds)

    def _note(self, text: str) -> None:
        self.notes.append(text)
        print(text, file=sys.stderr)


def _fill(directory: Path, count: int) -> None:
    for name in ("tmp", "new", "cur"):
        (directory / name).mkdir(parents=True)
    for number in range(count):
        (directory / "new" / f"1736157600.M{number:06}P1Q{number}.localhost").write_bytes(HEADER)


def _matches(name: str, patterns: list[str]) -> bool:
    """Whether one of the patterns is in the name, or there are none."""
    found = (fnmatch.fnmatch(name.lower(), f"*{pattern.lower()}*") for pattern in patterns)
    return not patterns or any(found)


# --- The report -----------------------------------------------------------------------


@dataclass(frozen=True)
class Metric:
    """How a figure is shown."""

    unit: str
    digits: int
    more_is_better: bool = False


METRICS = {
    "rate": Metric("messages/s", 0, more_is_better=True),
    "throughput": Metric("MB/s", 0, more_is_better=True),
    "cpu": Metric("us CPU/message", 0),
    "memory": Metric("MiB over idle", 1),
    "idle": Metric("KiB each", 1),
    "start": Metric("ms", 0),
}


def compare(ours: list[Sample], theirs: list[Sample], metric: str) -> list[float]:
    """How many times better ours was, run by run."""
    pairs = [
        (one[metric], other[metric])
        for one, other in zip(ours, theirs, strict=False)
        if one[metric] > 0 and other[metric] > 0
    ]
    if METRICS[metric].more_is_better:
        return [one / other for one, other in pairs]
    return [other / one for one, other in pairs]


def spread(values: list[float], digits: int) -> str:
    """The median and the range, as text."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:,.{digits}f} ({low:,.{digits}f}-{high:,.{digits}f})"


def format_row(name: str, found: dict[str, list[Sample]]) -> str:
    """The table of one row: a line for each server, a pair of columns for each figure."""
    ours = next(iter(found.values()))
    metrics = [metric for metric in METRICS if metric in ours[0]]
    table = [[""] + [head for metric in metrics for head in (METRICS[metric].unit, "times")]]
    for peer, samples in found.items():
        cells = [peer]
        for metric in metrics:
            cells.append(spread([each[metric] for each in samples], METRICS[metric].digits))
            ratios = [] if samples is ours else compare(ours, samples, metric)
            cells.append(f"{statistics.median(ratios):.2f}" if ratios else "")
        table.append(cells)
    return f"{name}\n{align(table)}"


def align(table: list[list[str]]) -> str:
    """The table with columns as wide as they need to be: names first, then figures."""
    widths = [max(len(cells[column]) for cells in table) for column in range(len(table[0]))]
    lines = []
    for first, *rest in table:
        figures = [f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join(["", f"{first:{widths[0]}}", *figures]).rstrip())
    return "\n".join(lines)


def check_targets(results: Results) -> list[dict[str, object]]:
    """The ratios to reach, as they came out; those that were not measured are left out."""
    checked: list[dict[str, object]] = []
    for target in make_targets():
        found = results.get(target.row, {})
        if target.peer not in found:
            continue
        ours = next(iter(found.values()))
        ratios = compare(ours, found[target.peer], target.metric)
        if target.at_most:
            ratios = [1 / ratio for ratio in ratios]
        sign = "at most" if target.at_most else "at least"
        checked.append(
            {
                "row": target.row,
                "figure": METRICS[target.metric].unit,
                "peer": target.peer,
                "wanted": f"{sign} {target.bound:.2f}",
                "ratio": statistics.median(ratios),
                "ratios": ratios,
            }
        )
    return checked


def format_targets(checked: list[dict[str, object]]) -> str:
    """The table of targets."""
    table = [["", "figure", "against", "wanted", "ratio"]]
    for each in checked:
        row, ratio = str(each["row"]), f"{each['ratio']:.2f}"
        row = row.replace(" per connection", "").replace("connections", "at once")
        table.append([row, f"{each['figure']}", f"{each['peer']}", f"{each['wanted']}", ratio])
    return f"Ratios to reach\n{align(table)}"


def describe_machine() -> dict[str, object]:
    """What the figures depend on."""
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }


EXPLANATION = """\
Each figure is the median of the runs with their range; "times" is how many times better the
first server of a row was, run by run (below 1: worse). "not stored": dsmtpd as a Python server
whose delivery does nothing, with MAX_CONNECTIONS at 10,000 and enough open files for the idle
connections. CPU time is the server's, user plus system. Load generator and server share the
machine: the generator took {generator:.0f} us CPU/message, and where a server takes less, the
rate is the generator's.
"""


def format_explanation(results: Results) -> str:
    """What the tables mean."""
    samples = [each for row in results.values() for found in row.values() for each in found]
    own = [each["generator"] for each in samples if "generator" in each]
    return EXPLANATION.format(generator=statistics.median(own or [0.0]))


def report(benchmark: Benchmark) -> dict[str, object]:
    """Everything, for machines."""
    return {
        "machine": describe_machine(),
        "rows": benchmark.results,
        "targets": check_targets(benchmark.results),
        "notes": benchmark.notes,
    }


# --- Command line ---------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--install", action="store_true", help="fetch the peers into build/benchmark/ and end")
    add("--quick", action="store_true", help="fewer and shorter runs")
    add("--runs", metavar="N", type=int, help="runs of each row (5; 3 with --quick)")
    text = "only the rows with this in their name, as 'stored on disk' or '2 KiB*many*20'"
    add("--row", metavar="PATTERN", action="append", default=[], help=text)
    text = "compare with the peers with this in their name only"
    add("--peer", metavar="PATTERN", action="append", default=[], help=text)
    add("--list", action="store_true", help="print the names of the rows and end")
    add(
        "--json",
        action="store_true",
        help="print one JSON object with every run, and the tables to standard error",
    )
    return parser.parse_args()


@contextlib.contextmanager
def make_storages() -> Iterator[dict[str, Path]]:
    """A directory on each kind of storage, removed at the end."""
    CACHE.mkdir(parents=True, exist_ok=True)
    places = {"tmpfs": Path("/dev/shm"), "disk": CACHE}
    with contextlib.ExitStack() as stack:
        yield {
            name: Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="run-", dir=place)))
            for name, place in places.items()
            if place.is_dir()
        }


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Measure what is asked for."""
    arguments = parse_args()
    signal.signal(signal.SIGTERM, _on_sigterm)
    rows = [row for row in make_rows() if _matches(row.name, arguments.row)]
    if arguments.install:
        install()
    elif arguments.list:
        print("\n".join(row.name for row in rows))
    else:
        run(arguments, rows)


def run(arguments: argparse.Namespace, rows: list[Row]) -> None:
    """Measure the rows, and print each when it is done."""
    with make_storages() as storages:
        benchmark = Benchmark(arguments, storages)
        try:
            for row in rows:
                benchmark.measure(row)
                found = benchmark.results.get(row.name)
                if found:
                    out = sys.stderr if arguments.json else sys.stdout
                    print(format_row(row.name, found) + "\n", file=out, flush=True)
        except KeyboardInterrupt:
            print("Interrupted; what follows is what there is", file=sys.stderr)
    if arguments.json:
        print(json.dumps(report(benchmark), indent=2))
    else:
        print(format_targets(check_targets(benchmark.results)) + "\n")
        print(format_explanation(benchmark.results))


if __name__ == "__main__":
    main()
