"""A local SMTP server that stores every message in a Maildir and never delivers it.

Usage::

    python dsmtpd.py -p 1025 -d mail

It is meant for development and CI: each message that an application sends becomes a file in
mail/new/. Copyright the dsmtpd authors. SPDX-License-Identifier: BSD-3-Clause

It implements RFC 5321 (SMTP), RFC 1870 (SIZE), RFC 6152 (8BITMIME), RFC 6531 (SMTPUTF8),
RFC 2920 (PIPELINING), RFC 2034 and RFC 3463 (ENHANCEDSTATUSCODES), RFC 3461 (DSN),
RFC 3030 (CHUNKING), RFC 3207 (STARTTLS), RFC 4954 (AUTH: PLAIN, LOGIN, XOAUTH2).

The sections of this file:

Configuration        the options of a server
Replies and actions  what a session tells its connection to do
Session              the SMTP dialogue, without I/O
Grammar              addresses, parameters and arguments of commands
Failure rules        commands that fail on purpose
Messages             an envelope, and what is decoded from its content: then Header fields,
                     Charsets, HTML and URLs
Pages                a message as an HTML page
Lint                 what other servers object to
Storage              the Maildir
Connection           one client
Server               listening sockets, all clients, deliveries
Testing              capture() and the pytest plug-in
Command line         the program

The bytes of a client go from its Connection to its Session, which returns replies and, at the end
of a message, the action Deliver with an Envelope. The Server stores it in the Maildir and calls
the handler; then the session replies.

PYTEST_DONT_REWRITE: pytest would warn of a plug-in that conftest.py has already imported.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import binascii
import codecs
import concurrent.futures
import contextlib
import email.header
import errno
import html
import inspect
import io
import logging
import mailbox
import os
import pkgutil
import queue
import re
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import unicodedata
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timezone
from email.utils import format_datetime
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache, partial
from html.entities import html5
from itertools import count, groupby, islice
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar
from urllib.parse import quote, unquote, unquote_to_bytes

if TYPE_CHECKING:
    import email.message
    import email.policy

    from typing_extensions import TypedDict, Unpack  # never imported at run time

# Python 3.7 cannot parse the next line. Its SyntaxError shows that line, with the comment.
if (python := sys.version_info) < (3, 10):  # dsmtpd requires Python 3.10 or newer
    sys.exit("dsmtpd requires Python 3.10 or newer, not {}.{}".format(*python))

__version__ = "2.0.0"
__all__ = [
    "Attachment",
    "Config",
    "Envelope",
    "Inbox",
    "Refusal",
    "Reply",
    "SMTPError",
    "Server",
    "capture",
]

log = logging.getLogger("dsmtpd")
# Without a handler, logging prints warnings to standard error, also in tests with capture().
log.addHandler(logging.NullHandler())


# --- Configuration --------------------------------------------------------------------

TLS_MODES = ("starttls", "required", "implicit")

# The keywords of the EHLO reply, in its order
EXTENSIONS = (
    "SIZE 8BITMIME SMTPUTF8 PIPELINING ENHANCEDSTATUSCODES CHUNKING DSN HELP STARTTLS AUTH".split()
)


@dataclass(frozen=True)
class Config:
    """The options of a server, named as on the command line.

    Raises TypeError or ValueError for an invalid value; the text names the option and what
    it accepts.

    interface: address or host name to listen on; a name means all of its addresses.
    port: TCP port; 0 selects a free one.
    directory: Maildir to store messages in. None means the current directory, or that messages
        are not stored if the server has a handler.
    max_size: maximum size of a message in octets (RFC 1870); 0 means no limit.
    smtputf8: whether the SMTPUTF8 extension (RFC 6531) is offered.
    without: keywords of the EHLO reply that are not offered, such as "CHUNKING".
    tls: None for no TLS, "starttls" (RFC 3207), "required" for STARTTLS before anything else,
        or "implicit" (RFC 8314).
    cert: PEM file of the certificate; None creates a temporary one for localhost.
    key: PEM file of the private key; None if the file of the certificate contains it.
    auth: {user: password} of the users who may log in. Sending then requires a login (RFC 4954
        section 6). If it is empty, every login succeeds and none is required.
    fail: failure rules in the syntax of parse_rule(), such as "RCPT * x1 451"; the first rule
        that matches applies.
    strict: whether to reject messages with warnings.
    ignore: names of warnings that are not given.
    reuse_port: whether several servers may listen on the same port and share its clients.
    """

    interface: str = "127.0.0.1"
    port: int = 1025
    directory: str | os.PathLike[str] | None = None
    max_size: int = 33_554_432
    smtputf8: bool = True
    without: Sequence[str] = ()
    tls: str | None = None
    cert: str | os.PathLike[str] | None = None
    key: str | os.PathLike[str] | None = None
    auth: Mapping[str, str] = field(default_factory=dict, repr=False, hash=False)
    fail: Sequence[str] = ()
    strict: bool = False
    ignore: Sequence[str] = ()
    reuse_port: bool = False

    def __post_init__(self) -> None:
        for name, value in (
            ("fail", self.fail),
            ("ignore", self.ignore),
            ("without", self.without),
        ):
            if isinstance(value, str):  # it would be a sequence of letters
                raise TypeError(f"{name}: must be a list of strings, not {value!r}")
        if not isinstance(self.auth, Mapping):
            raise TypeError("auth: must be a dictionary {user: password}")
        object.__setattr__(self, "fail", tuple(self.fail))  # a Config is hashable
        object.__setattr__(self, "ignore", tuple(self.ignore))
        object.__setattr__(self, "without", tuple(word.upper() for word in self.without))
        _check_choices("without", self.without, EXTENSIONS)
        _check_choices("ignore", self.ignore, WARNINGS)
        _check_choices("tls", [] if self.tls is None else [self.tls], TLS_MODES)
        Rules(self.fail)  # raises ValueError for an invalid one
        self._check_values()
        self._check_combinations()

    def _check_values(self) -> None:
        if not self.interface.strip():
            raise ValueError("interface: must be an address or a host name, such as 127.0.0.1")
        if not isinstance(self.port, int) or not 0 <= self.port <= 65_535:
            raise ValueError(f"port: must be from 0 (any free one) to 65535, not {self.port!r}")
        if not isinstance(self.max_size, int) or self.max_size < 0:
            text = "must be a number of bytes, such as 33554432, or 0 for no limit"
            raise ValueError(f"max-size: {text}, not {self.max_size!r}")
        if self.reuse_port and not hasattr(socket, "SO_REUSEPORT"):
            raise ValueError("reuse-port: this system cannot share a port")

    def _check_combinations(self) -> None:
        if self.tls == "required" and "STARTTLS" in self.without:
            raise ValueError("without: tls=required needs STARTTLS")
        if self.auth and "AUTH" in self.without:
            raise ValueError("without: auth needs AUTH")
        if self.cert and not self.tls:
            raise ValueError("cert: requires tls (--tls), such as starttls")
        if self.key and not self.cert:
            raise ValueError("key: requires cert (--cert)")

    @cached_property
    def extensions(self) -> list[str]:
        """The keywords of EXTENSIONS that are not disabled."""
        disabled = {*self.without} if self.smtputf8 else {*self.without, "SMTPUTF8"}
        return [word for word in EXTENSIONS if word not in disabled]


def _check_choices(name: str, words: Iterable[str], choices: Iterable[str]) -> None:
    for word in words:
        if word not in choices:
            raise ValueError(f"{name}: must be one of {', '.join(choices)}, not {word}")


if TYPE_CHECKING:

    class Options(TypedDict, total=False):
        """The fields of Config as keyword arguments; type checkers cannot derive them."""

        interface: str
        port: int
        directory: str | os.PathLike[str] | None
        max_size: int
        smtputf8: bool
        without: Sequence[str]
        tls: str | None
        cert: str | os.PathLike[str] | None
        key: str | os.PathLike[str] | None
        auth: Mapping[str, str]
        fail: Sequence[str]
        strict: bool
        ignore: Sequence[str]
        reuse_port: bool


def with_options(config: Config, options: Options) -> Config:
    """Return the config with these fields replaced. Raises TypeError for an unknown field."""
    names = [item.name for item in fields(Config)]
    for name in options:
        if name not in names:
            raise TypeError(f"unknown option {name!r}; the options are {', '.join(names)}")
    return replace(config, **options)


# --- Replies and actions --------------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    """A reply of the server (RFC 5321 section 4.2).

    code is the three-digit reply code. status is the enhanced status code, such as "2.1.0"
    (RFC 3463), or "" for replies that have none. Each line of text is a line of the reply.
    """

    code: int
    status: str
    text: str

    @cached_property
    def encoded(self) -> bytes:
        """The reply as it is sent."""
        # RFC 2034 section 4: the status code is on every line.
        status = f"{self.status} " if self.status else ""
        text = re.sub("[^ -~\n]", "?", self.text)  # RFC 5321 section 4.2
        lines = [f"{self.code}-{status}{line}\r\n" for line in text.split("\n")]
        lines[-1] = lines[-1].replace("-", " ", 1)  # after the code
        return "".join(lines).encode("ascii")

    def __str__(self) -> str:
        words = [str(self.code), self.status, *self.text.split("\n")]
        return " ".join(filter(None, words))


DELIVERY_FAILED = Reply(451, "4.3.0", "Cannot accept the message, try again later")


class SMTPError(Exception):
    """Raised to refuse a command or a message; `reply` is the Reply to send.

    code is from 400 to 599. status is an enhanced status code of the same class (RFC 3463).
    Raises ValueError if one of them is invalid.
    """

    def __init__(self, code: int, status: str, text: str) -> None:
        status_pattern = rf"{code // 100}(\.[0-9]{{1,3}}){{2}}"
        if code // 100 not in (4, 5) or not re.fullmatch(status_pattern, status):
            raise ValueError(f"not an error code with its enhanced status code: {code} {status}")
        super().__init__(code, status, text)
        self.reply = Reply(code, status, " ".join(text.split()))


# The name of this machine for replies and file names, without a DNS lookup
HOSTNAME = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname()) or "localhost"

GREETING = Reply(220, "", f"{HOSTNAME} ESMTP dsmtpd {__version__}")
OK = Reply(250, "2.0.0", "OK")
BYE = Reply(221, "2.0.0", "Bye")
SENDER_OK = Reply(250, "2.1.0", "Sender OK")
RECIPIENT_OK = Reply(250, "2.1.5", "Recipient OK")
START_CONTENT = Reply(354, "", "End data with <CR><LF>.<CR><LF>")
MESSAGE_ACCEPTED = Reply(250, "2.0.0", "Message accepted")
READY_FOR_TLS = Reply(220, "2.0.0", "Ready to start TLS")
LOGIN_SUCCEEDED = Reply(235, "2.7.0", "Authentication successful")
CANNOT_VERIFY = Reply(252, "2.5.0", "Cannot VRFY the address, but will accept messages for it")
TOO_MANY_CONNECTIONS = Reply(421, "4.3.2", "Too many connections")
SHUTTING_DOWN = Reply(421, "4.3.2", "Shutting down")
TIMED_OUT = Reply(421, "4.4.2", "Idle timeout")
TOO_MANY_ERRORS = Reply(421, "4.7.0", "Too many errors")


@dataclass(frozen=True)
class Refusal:
    """A command or a message that was refused: its reply has a 4xx or 5xx code.

    time: when it was refused, with a time zone.
    peer: address and port of the client.
    verb: CONNECT, a command in upper case, "." for a message, as in failure rules, or "" for a
        line that does not begin with a word.
    argument: the argument of the command, without secrets; sender, recipients and subject for
        ".".
    """

    time: datetime
    peer: str
    verb: str
    argument: str
    reply: Reply


# What a session asks its connection to do, apart from sending a Reply.


@dataclass
class Deliver:
    """Action: store the envelope, call the handler, and set `reply` to the result."""

    envelope: Envelope
    reply: Reply = DELIVERY_FAILED


@dataclass(frozen=True)
class StartTLS:
    """Action: start TLS, and discard what arrived in plain text (RFC 3207 section 4.2)."""


@dataclass(frozen=True)
class Delay:
    """Action: wait before the next action of this session."""

    seconds: float


@dataclass(frozen=True)
class Close:
    """Action: close the connection without a reply."""


Action = Reply | Deliver | StartTLS | Delay | Close


# --- Session --------------------------------------------------------------------------

# Length of a command line in octets, CRLF included. RFC 5321 section 4.5.3.1.4 requires 512;
# RFC 4954 section 4 recommends 12,288 for AUTH. One limit for all commands is simpler.
MAX_COMMAND_LENGTH = 12_288

# Recipients of one message. RFC 5321 section 4.5.3.1.8 requires 100; Postfix accepts 1000.
MAX_RECIPIENTS = 1000

# 5xx replies to commands in a row before the connection is closed; those of failure rules and
# handlers do not count. The value is the default of smtpd_hard_error_limit in Postfix.
MAX_ERRORS = 20

# The content type and the version of a TLS record with a ClientHello (RFC 8446 section 5.1)
_TLS_HANDSHAKE = b"\x16\x03"

# The first words of HTTP requests: a web page can make a browser send one to any port.
_HTTP_VERBS = "GET POST PUT HEAD OPTIONS CONNECT DELETE PATCH PRI HOST:".split()

T = TypeVar("T")

# A part of the dialogue: a generator that yields actions, or None to wait for more input, and
# returns a T.
Dialogue = Generator[Action | None, None, T]


@dataclass
class Transaction:
    """A mail transaction (RFC 5321 section 3.3): MAIL begins it, and RSET discards it."""

    mail_from: str
    mail_options: dict[str, str]
    rcpt_tos: list[str] = field(default_factory=list)
    rcpt_options: list[dict[str, str]] = field(default_factory=list)
    chunks: bytearray | None = None
    """The content so far; None before the first BDAT."""


@dataclass(eq=False)  # an exception is hashable
class ScriptedError(Exception):
    """Raised where a failure rule refuses a command or a message."""

    rule: Rule


class Session:
    """The server side of an SMTP session, without I/O: bytes in, actions out.

    The dialogue is a generator: `yield reply` sends a reply, and `yield from self._input.line()`
    reads a line. peer is the address of the client, for envelopes and the log. rules may be shared
    with other sessions; None means those of the config. on_refusal is called with each Refusal.
    """

    def __init__(
        self,
        config: Config,
        peer: str = "",
        rules: Rules | None = None,
        on_refusal: Callable[[Refusal], object] | None = None,
    ) -> None:
        self.config = config
        self.peer = peer
        self.ended = False
        """Whether the dialogue is over, so that the connection is to be closed."""
        self.tls = config.tls == "implicit"
        self.helo: str | None = None
        self.extended = False  # whether the client sent EHLO
        self.user: str | None = None
        self.transaction: Transaction | None = None
        self._rules = Rules(config.fail) if rules is None else rules
        self._log = SessionLog(peer, on_refusal)
        self._input = Input()
        self._max_size = config.max_size or float("inf")
        self._line_end = b"\r\n"  # the line end of the last command
        self._is_greeted = False  # False after a rule has refused the client
        self._errors = 0  # 5xx replies in a row
        self._protocol_warnings: list[str] = []
        self._now = 0.0  # the time of the last call of receive()
        self._dialogue = self._converse()

    def receive(self, data: bytes, now: float) -> Iterator[Action]:
        """Continue the dialogue with bytes from the client; yield the actions they cause.

        The caller performs each action before it asks for the next one. The first call, with
        no data, yields the greeting. now is the time for the envelopes, as from time.time().
        """
        self._input += data
        self._now = now
        for action in self._dialogue:
            if action is None:
                return
            if isinstance(action, Reply):
                action = self._send(action)
            elif isinstance(action, Close):
                self.ended = True
            yield action

    def end(self, reply: Reply | None = None) -> bytes:
        """Log the end of the connection, and return the last bytes to send.

        reply is the last one, unless the dialogue or the client has ended the connection.
        """
        if reply is not None:
            reply = self._as_sent(reply)
            self._log.sent(reply)
            return reply.encoded
        if self.config.tls is None:
            self._log.hint_at_tls()
        return b""

    def _send(self, reply: Reply) -> Reply:
        """Log a reply, and return it as it is sent."""
        reply = self._as_sent(reply)
        self._log.answer(reply, self._now)
        if reply.code < 400:
            self._errors = 0
        self.ended = reply.code in (221, 421)  # RFC 5321 section 3.8
        return reply

    def _as_sent(self, reply: Reply) -> Reply:
        if "ENHANCEDSTATUSCODES" in self.config.extensions:
            return reply
        return replace(reply, status="")

    # The dialogue, from the greeting to the last reply

    def _converse(self) -> Dialogue[None]:
        yield from self._reply_with(self._greet())
        while not self._input:
            yield None
        if self._input.startswith(_TLS_HANDSHAKE):
            hint = "use --tls implicit, or STARTTLS in the client"
            log.warning("%s: TLS on a plain connection; %s", self.peer, hint)
            yield Close()
        while not self.ended:
            line = yield from self._input.line()
            yield from self._reply_with(self._answer(line))

    def _reply_with(self, answer: Dialogue[Reply | None]) -> Dialogue[None]:
        """Reply with what a part of the dialogue returns or raises, if it has not replied."""
        try:
            reply = yield from answer
            if reply is not None:
                yield reply
        except ScriptedError as refusal:  # not an error of the client
            if refusal.rule.reply is not None:
                yield refusal.rule.reply
            if refusal.rule.drop:
                yield Close()
        except SMTPError as error:
            if error.reply.code >= 500:
                self._errors += 1
            # RFC 5321 section 4.3.2
            yield error.reply if self._errors <= MAX_ERRORS else TOO_MANY_ERRORS

    def _greet(self) -> Dialogue[Reply]:
        yield from self._apply_rules("CONNECT", lambda: client_address(self.peer))
        self._is_greeted = True
        return GREETING

    def _answer(self, line: bytearray) -> Dialogue[Reply | None]:
        """Execute a command line, and return the reply; None if the command has replied."""
        verb, argument = self._parse_command(line)
        if verb in _HTTP_VERBS:
            raise SMTPError(421, "4.7.0", "HTTP request refused")
        command = COMMANDS.get(verb)
        if command is None:
            raise SMTPError(500, "5.5.2", "Command not recognized")
        is_disabled = command.extension and command.extension not in self.config.extensions
        if command.method is None or is_disabled:
            raise SMTPError(502, "5.5.1", "Command not implemented")
        if verb != "BDAT":  # octets follow it, which it discards if it is refused
            if "PIPELINING" not in self.config.extensions:
                self._warn_if_pipelined(f"the reply to {verb}")
            yield from self._apply_rules(verb, lambda: rule_text(argument))
            self._require_permission(command, argument)
        reply = command.method(self, argument)
        return reply if isinstance(reply, Reply) else (yield from reply)

    def _parse_command(self, line: bytearray) -> tuple[str, str]:
        """Return the verb in upper case and the argument."""
        self._check_length(line)
        self._line_end = b"\r\n" if line.endswith(b"\r\n") else b"\n"
        text = line[: -len(self._line_end)].decode("utf-8", "surrogateescape").rstrip(" \t")
        verb, _, argument = text.partition(" ")
        # str.upper() converts some letters outside ASCII to ASCII letters.
        verb = verb.upper() if verb.isascii() else ""
        self._log.command(text, verb)
        if self._line_end == b"\n":
            self._warn(warning("bare-lf", "after a command"))
        if not self._is_greeted and text.upper() != "QUIT":  # RFC 5321 section 3.1
            raise SMTPError(503, "5.5.1", "Only QUIT is allowed after a refused greeting")
        return verb, argument.lstrip(" ")

    def _check_length(self, line: bytearray) -> None:
        if len(line) > MAX_COMMAND_LENGTH:
            self._log.command(f"(line of over {MAX_COMMAND_LENGTH} octets)")
            raise SMTPError(500, "5.5.2", "Line too long")

    def _require_permission(self, command: Command, argument: str) -> None:
        """Check what the table of commands says."""
        if self.config.tls == "required" and not self.tls and not command.before_tls:
            raise SMTPError(530, "5.7.0", "Must issue a STARTTLS command first")
        # RFC 4954 section 6
        if self.config.auth and self.user is None and command.needs_login:
            raise SMTPError(530, "5.7.0", "Authentication required")
        if argument and not command.argument:
            raise SMTPError(501, "5.5.4", "No argument allowed")

    def _apply_rules(self, verb: str, get_text: Callable[[], str]) -> Dialogue[None]:
        for rule in self._rules.apply(verb, get_text, self.peer):
            if rule.delay is not None:
                yield Delay(rule.delay)
            if rule.reply is not None or rule.drop:
                raise ScriptedError(rule)

    def _warn(self, text: str) -> None:
        """Add a warning about the dialogue to those of the next message."""
        if text not in self._protocol_warnings:
            self._protocol_warnings.append(text)

    def _warn_if_pipelined(self, reply: str) -> None:
        """Warn if data arrived before a reply that the client must wait for."""
        if self._input:
            self._warn(warning("early-talker", reply))

    # Commands: one method for each verb, which returns the reply or raises SMTPError. Those that
    # send or read more are parts of the dialogue.

    def _ehlo(self, argument: str) -> Reply:
        self._begin_session("EHLO", argument)
        lines = [HOSTNAME, *filter(None, map(self._extension_line, self.config.extensions))]
        return Reply(250, "", "\n".join(lines))

    def _extension_line(self, keyword: str) -> str:
        """Return the line of the EHLO reply for an extension, or "" if it is not available."""
        if keyword == "SIZE":
            return f"SIZE {self.config.max_size}"
        if keyword == "STARTTLS" and (self.tls or self.config.tls is None):
            return ""
        if keyword == "AUTH":
            available = self.user is None and (self.tls or self.config.tls != "required")
            return " ".join(["AUTH", *SASL_MECHANISMS]) if available else ""
        return keyword

    def _helo(self, argument: str) -> Reply:
        self._begin_session("HELO", argument)
        return Reply(250, "", HOSTNAME)

    def _begin_session(self, verb: str, argument: str) -> None:
        self._warn_if_pipelined(f"the reply to {verb}")
        if not _HELO_ARGUMENT.fullmatch(argument):
            raise SMTPError(501, "5.5.4", f"Syntax: {verb} hostname")
        self.transaction = None  # RFC 5321 section 4.1.4
        self.helo = argument
        self.extended = verb == "EHLO"

    def _mail(self, argument: str) -> Reply:
        if self.helo is None:
            raise SMTPError(503, "5.5.1", "Send EHLO or HELO first")
        if self.transaction is not None:
            raise SMTPError(503, "5.5.1", "Nested MAIL command")
        match = _MAIL_ARGUMENT.fullmatch(argument)
        if match is None:
            raise SMTPError(501, "5.5.4", "Syntax: MAIL FROM:<address>")
        mail_options = self._parse_parameters(match["parameters"], MAIL_PARAMETERS)
        mail_from = ""  # the null reverse-path (RFC 5321 section 4.5.5)
        if match["path"]:
            mail_from = parse_mailbox(match["path"], "5.1.7")
            _require_smtputf8(mail_from, mail_options)
        if int(mail_options.get("SIZE", 0)) > self._max_size:
            raise SMTPError(552, "5.3.4", "Message exceeds the maximum size")
        self.transaction = Transaction(mail_from, mail_options)
        return SENDER_OK

    def _rcpt(self, argument: str) -> Reply:
        transaction = self.transaction
        if transaction is None:
            raise SMTPError(503, "5.5.1", "Send MAIL first")
        if transaction.chunks is not None:
            raise SMTPError(503, "5.5.1", "RCPT is not allowed after BDAT")
        if len(transaction.rcpt_tos) >= MAX_RECIPIENTS:  # RFC 5321 section 4.5.3.1.10
            raise SMTPError(452, "4.5.3", "Too many recipients")
        match = _RCPT_ARGUMENT.fullmatch(argument)
        if match is None:
            raise SMTPError(501, "5.5.4", "Syntax: RCPT TO:<address>")
        rcpt_options = self._parse_parameters(match["parameters"], RCPT_PARAMETERS)
        rcpt_to = parse_mailbox(match["path"], "5.1.3")
        _require_smtputf8(rcpt_to, transaction.mail_options)
        _require_smtputf8(rcpt_options.get("ORCPT", ""), transaction.mail_options)
        transaction.rcpt_tos.append(rcpt_to)
        transaction.rcpt_options.append(rcpt_options)
        return RECIPIENT_OK

    def _parse_parameters(self, text: str | None, known: Parameters) -> dict[str, str]:
        if not text:
            return {}
        if not self.extended:
            raise SMTPError(555, "5.5.4", "Parameters require EHLO")
        return parse_parameters(text, known, self.config.extensions)

    def _data(self, argument: str) -> Dialogue[Reply]:
        transaction = self._require_recipients()
        if transaction.chunks is not None:  # RFC 3030 section 2
            raise SMTPError(503, "5.5.1", "DATA is not allowed after BDAT")
        self._warn_if_pipelined("the reply to DATA")
        yield START_CONTENT
        content = yield from self._input.content(self._line_end, self._max_size)
        return (yield from self._deliver(transaction, content))

    def _bdat(self, argument: str) -> Dialogue[Reply]:
        match = _BDAT_ARGUMENT.fullmatch(argument)
        if match is None:
            raise SMTPError(501, "5.5.4", "Syntax: BDAT size [LAST]")
        size = int(match["size"])
        try:
            yield from self._apply_rules("BDAT", lambda: argument)
            self._require_permission(COMMANDS["BDAT"], argument)
            transaction, content = self._begin_chunk(size, match["rest"])
        except (SMTPError, ScriptedError):
            yield from self._input.discard(size)  # RFC 3030 section 2: they are not commands
            # Without this chunk, the message is incomplete. Without recipients there is none.
            if self.transaction is not None and self.transaction.rcpt_tos:
                self.transaction = None
            raise
        content += yield from self._input.octets(size)
        if not match["rest"]:
            return OK
        return (yield from self._deliver(transaction, bytes(content)))

    def _begin_chunk(self, size: int, rest: str) -> tuple[Transaction, bytearray]:
        """Return the transaction and its content, to which a chunk of this size is added."""
        if rest and not re.fullmatch(" +LAST", rest, re.IGNORECASE | re.ASCII):
            raise SMTPError(501, "5.5.4", "Syntax: BDAT size [LAST]")
        transaction = self._require_recipients()
        if transaction.chunks is None:
            transaction.chunks = bytearray()
        if len(transaction.chunks) + size > self._max_size:
            raise SMTPError(552, "5.3.4", "Message exceeds the maximum size")
        return transaction, transaction.chunks

    def _require_recipients(self) -> Transaction:
        if self.transaction is None or not self.transaction.rcpt_tos:
            raise SMTPError(503, "5.5.1", "Send MAIL and RCPT first")
        return self.transaction

    def _rset(self, argument: str) -> Reply:
        self.transaction = None
        return OK

    def _noop(self, argument: str) -> Reply:
        return OK

    def _quit(self, argument: str) -> Reply:
        return BYE

    def _vrfy(self, argument: str) -> Reply:
        if not argument:
            raise SMTPError(501, "5.5.4", "Syntax: VRFY address")
        return CANNOT_VERIFY  # RFC 5321 section 3.5.3

    def _help(self, argument: str) -> Reply:
        return Reply(214, "2.0.0", "Commands:\n" + " ".join(IMPLEMENTED_VERBS))

    def _starttls(self, argument: str) -> Dialogue[None]:
        if self.tls:
            raise SMTPError(503, "5.5.1", "TLS is already active")
        if self.config.tls is None:
            self._log.detail = " (see --tls)"
            raise SMTPError(502, "5.5.1", "TLS is not available")
        yield READY_FOR_TLS
        self._input.clear()  # what arrived in plain text (RFC 3207 section 4.2)
        yield StartTLS()
        self.tls = True
        self.helo = self.user = self.transaction = None  # the client must send EHLO again

    def _auth(self, argument: str) -> Dialogue[Reply]:
        """AUTH mechanism [initial-response] (RFC 4954 section 4)"""
        if self.helo is None:
            raise SMTPError(503, "5.5.1", "Send EHLO or HELO first")
        if self.transaction is not None:
            raise SMTPError(503, "5.5.1", "AUTH is not allowed during a mail transaction")
        if self.user is not None:
            raise SMTPError(503, "5.5.1", "Already authenticated")
        name, _, initial_response = argument.partition(" ")
        if not name:
            raise SMTPError(501, "5.5.4", "Syntax: AUTH mechanism [initial-response]")
        if name.upper() not in SASL_MECHANISMS:
            raise SMTPError(504, "5.5.4", "Unknown authentication mechanism")
        exchange = SASL_MECHANISMS[name.upper()]()
        user, password = yield from self._authenticate(exchange, initial_response.strip())
        return self._log_in(user, password)

    def _authenticate(self, exchange: SASLExchange, initial: str) -> Dialogue[tuple[bytes, bytes]]:
        """Return user name and password; initial is the initial response in base64, or ""."""
        challenge = next(exchange)
        response = initial.encode("utf-8", "replace")
        if initial == "=":  # an empty initial response
            response = b""
        elif not initial:
            response = yield from self._challenge(challenge)
        try:
            while True:
                challenge = exchange.send(base64.b64decode(response, validate=True))
                response = yield from self._challenge(challenge)
        except StopIteration as end:
            user, password = end.value
            return user, password
        except ValueError as error:
            raise SMTPError(501, "5.5.2", "Malformed authentication response") from error

    def _challenge(self, text: str) -> Dialogue[bytes]:
        """Send a challenge, and return the response in base64."""
        yield Reply(334, "", base64.b64encode(text.encode()).decode())
        response = yield from self._input.line()
        self._check_length(response)
        self._log.response()
        if response.strip() == b"*":
            raise SMTPError(501, "5.7.0", "Authentication cancelled")
        return bytes(response.strip())

    def _log_in(self, user: bytes, password: bytes) -> Reply:
        name = user.decode("utf-8", "surrogateescape")
        expected = self.config.auth.get(name)
        if not self.config.auth or password.decode("utf-8", "surrogateescape") == expected:
            self.user = user.decode("utf-8", "replace")
            return LOGIN_SUCCEEDED
        problem = "unknown user" if expected is None else "wrong password"
        self._log.detail = f" (user '{escape_unprintable(name)}': {problem})"
        raise SMTPError(535, "5.7.8", "Authentication failed")

    # The end of the content

    def _deliver(self, transaction: Transaction, content: bytes | None) -> Dialogue[Reply]:
        """Have a message delivered, and return the reply; None is content that is too large."""
        self.transaction = None
        if content is None:
            raise SMTPError(552, "5.3.4", "Message exceeds the maximum size")
        envelope = Envelope(
            peer=self.peer,
            helo=self.helo or "",
            protocol=self._protocol(transaction),
            tls=self.tls,
            user=self.user,
            mail_from=transaction.mail_from,
            mail_options=transaction.mail_options,
            rcpt_tos=transaction.rcpt_tos,
            rcpt_options=transaction.rcpt_options,
            content=content,
            received=datetime.fromtimestamp(self._now, timezone.utc),
            warnings=self._message_warnings(transaction, content),
        )
        self._log.message = envelope
        yield from self._apply_rules(".", lambda: envelope.subject)
        self._require_acceptable(envelope)
        delivery = Deliver(envelope)
        yield delivery
        return delivery.reply

    def _protocol(self, transaction: Transaction) -> str:
        """Return the protocol for the Received field (RFC 3848, RFC 6531 section 4.3)."""
        if "SMTPUTF8" in transaction.mail_options:
            name = "UTF8SMTP"
        elif self.extended or self.tls or self.user is not None:
            name = "ESMTP"
        else:
            name = "SMTP"
        return name + ("S" if self.tls else "") + ("A" if self.user is not None else "")

    def _message_warnings(self, transaction: Transaction, content: bytes) -> list[str]:
        """Return the warnings about the message and the dialogue before it."""
        warnings = self._protocol_warnings
        self._protocol_warnings = []
        addresses = [transaction.mail_from, *transaction.rcpt_tos]
        domains = [address.rpartition("@")[2] for address in addresses if "@" in address]
        if "_" in " ".join(domains):
            warnings.append(warning("address-syntax"))
        warnings += lint(content, transaction.mail_options)
        if self.user is not None and self.config.tls is not None and not self.tls:
            warnings.append(warning("plaintext-auth"))
        return [text for text in warnings if text.partition(":")[0] not in self.config.ignore]

    def _require_acceptable(self, envelope: Envelope) -> None:
        smtputf8 = "SMTPUTF8" in self.config.extensions
        if not smtputf8 and not header_section(envelope.content).isascii():
            raise SMTPError(554, "5.6.7", "Non-ASCII header fields require SMTPUTF8")
        for text in envelope.warnings:
            log.warning("%s: %s", self.peer, text)
        if self.config.strict and envelope.warnings:
            raise SMTPError(554, "5.6.0", envelope.warnings[0])


def _require_smtputf8(address: str, mail_options: dict[str, str]) -> None:
    """RFC 6531 section 3.5: an address outside ASCII requires the SMTPUTF8 parameter."""
    if not address.isascii() and "SMTPUTF8" not in mail_options:
        raise SMTPError(553, "5.6.7", "Non-ASCII address requires SMTPUTF8")


@dataclass(frozen=True)
class Command:
    """What is known of a command: a row of COMMANDS."""

    method: Callable[[Session, str], Reply | Dialogue[Reply] | Dialogue[None]] | None = None
    """Takes the argument, and returns the reply. None means that it is not implemented."""
    argument: bool = False
    """Whether it may have an argument."""
    extension: str = ""
    """The keyword of the extension that it belongs to."""
    before_tls: bool = False
    """Whether it is allowed before TLS if TLS is required."""
    needs_login: bool = False
    """Whether it needs a login if there are accounts."""


COMMANDS = {
    "EHLO": Command(Session._ehlo, argument=True, before_tls=True),
    "HELO": Command(Session._helo, argument=True, before_tls=True),
    "MAIL": Command(Session._mail, argument=True, needs_login=True),
    "RCPT": Command(Session._rcpt, argument=True, needs_login=True),
    "DATA": Command(Session._data, needs_login=True),
    "BDAT": Command(Session._bdat, argument=True, extension="CHUNKING", needs_login=True),
    "RSET": Command(Session._rset, before_tls=True),
    "NOOP": Command(Session._noop, argument=True, before_tls=True),
    "QUIT": Command(Session._quit, before_tls=True),
    "VRFY": Command(Session._vrfy, argument=True, needs_login=True),
    "HELP": Command(Session._help, argument=True, extension="HELP", before_tls=True),
    "STARTTLS": Command(Session._starttls, extension="STARTTLS", before_tls=True),
    "AUTH": Command(Session._auth, argument=True, extension="AUTH"),
    # RFC 5321 section 4.2.4: 502 is for commands that the server knows but does not implement.
    **dict.fromkeys("EXPN TURN ETRN ATRN SEND SOML SAML".split(), Command()),
}
IMPLEMENTED_VERBS = [verb for verb, command in COMMANDS.items() if command.method is not None]


class Input(bytearray):
    """The bytes of the client that are not read yet: lines, octets, content.

    The methods are parts of a dialogue: they yield None to wait for more bytes.
    """

    def line(self) -> Dialogue[bytearray]:
        """Read a line with its line end; a bare LF is one, so that a person can use netcat.

        A longer line than MAX_COMMAND_LENGTH is returned without its middle; the result is still
        longer than that.
        """
        end = self.find(b"\n")
        while end < 0:
            del self[MAX_COMMAND_LENGTH:]
            searched = len(self)
            yield None
            end = self.find(b"\n", searched)
        return self._take(end + 1)

    def octets(self, count: int) -> Dialogue[bytearray]:
        """Read this many octets."""
        while len(self) < count:
            yield None
        return self._take(count)

    def discard(self, count: int) -> Dialogue[None]:
        """Read this many octets, and discard them."""
        while len(self) < count:
            count -= len(self)
            self.clear()
            yield None
        del self[:count]

    def content(self, line_end: bytes, max_size: float) -> Dialogue[bytes | None]:
        """Read up to the line with a single dot, and undo dot-stuffing (RFC 5321 section 4.5.2).

        line_end is that of the DATA command. Only this one is recognized: no other combination
        of CR, LF and dots can end the message (SMTP smuggling). Returns None for content of over
        max_size octets, which is not kept.
        """
        self[:0] = line_end  # so that each line follows a line end, the first that of DATA
        terminator = line_end + b"." + line_end
        searched = 0
        is_too_large = False
        while (end := self.find(terminator, searched)) < 0:
            searched = max(len(self) - len(terminator) + 1, 0)
            # The shortest line that is stuffed has two octets, so stuffing adds at most a half.
            is_too_large = is_too_large or searched > 1.5 * max_size + len(line_end)
            if is_too_large:
                del self[:searched]
                searched = 0
            yield None
        content = self._take(end + len(line_end))
        del self[: len(b"." + line_end)]
        if b"." in content:  # base64 has none
            content = content.replace(line_end + b".", line_end)
        del content[: len(line_end)]
        return None if is_too_large or len(content) > max_size else bytes(content)

    def _take(self, count: int) -> bytearray:
        taken = self[:count]
        del self[:count]
        return taken


class SessionLog:
    """The log of a session, without secrets: the dialogue, what is refused, how it ends."""

    def __init__(self, peer: str, on_refusal: Callable[[Refusal], object] | None) -> None:
        self.detail = ""
        """Text that the log adds to the refusal of the last command."""
        self._peer = peer
        self._on_refusal = on_refusal
        self.message: Envelope | None = None
        """The message that waits for its reply."""
        self._command = f"CONNECT {client_address(peer)}"  # the last command line
        self._verbs: set[str] = set()  # of all commands; "" for an unknown one
        self._auth_seen = False  # whether the client sent AUTH: unknown commands may be secrets

    def command(self, line: str, verb: str = "") -> None:
        """Log a command line; verb is its first word in upper case."""
        self._command = line
        self.detail = ""
        self._verbs.add(verb if verb in COMMANDS else "")
        if "AUTH" in verb:  # "AUTHPLAIN" is a typing error that may have a secret as its argument
            self._auth_seen = True
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s C: %s", self._peer, self._masked(line))

    def response(self) -> None:
        """Log a line of an authentication exchange."""
        log.debug("%s C: ***", self._peer)

    def sent(self, reply: Reply) -> None:
        """Log a reply."""
        if log.isEnabledFor(logging.DEBUG):
            for line in reply.encoded.decode().splitlines():
                log.debug("%s S: %s", self._peer, line)

    def answer(self, reply: Reply, now: float) -> None:
        """Log the reply to the last command or message, and report it if it is a refusal."""
        self.sent(reply)
        if reply.code >= 400:
            self._refuse(reply, datetime.fromtimestamp(now, timezone.utc))
        self.message = None

    def _refuse(self, reply: Reply, time: datetime) -> None:
        if self.message is not None:
            verb, argument = ".", self.message.summary()
        else:
            line = self._masked(self._command)
            verb, _, argument = line.partition(" ")
            verb = verb.upper()
            if not (verb.isascii() and verb.isalpha()):
                verb, argument = "", line
        command = f"{'message' if verb == '.' else verb} {argument}".strip() or "empty line"
        text = escape_unprintable(str(reply)) + self.detail
        log.warning("%s: %s refused: %s", self._peer, command, text)
        if self._on_refusal is not None:
            try:
                self._on_refusal(Refusal(time, self._peer, verb, argument, reply))
            except Exception:  # the client gets its reply all the same
                log.exception("%s: on_refusal failed", self._peer)

    def _masked(self, line: str) -> str:
        """Return the line without secrets, such as the arguments of AUTH."""
        words = line.split()
        if words and "AUTH" in words[0].upper():
            mechanisms = [word.upper() for word in words[1:2] if word.upper() in SASL_MECHANISMS]
            secrets = ["***"] if len(words) > 1 + len(mechanisms) else []
            return " ".join(["AUTH", *mechanisms, *secrets])
        # A client may send a response after the exchange has failed.
        if self._auth_seen and words and words[0].upper() not in COMMANDS:
            return "***"
        return escape_unprintable(line)

    def hint_at_tls(self) -> None:
        """Log a hint if the client left after EHLO: it may require TLS."""
        verbs = self._verbs - {"QUIT"}
        if verbs and verbs <= {"EHLO", "HELO", "STARTTLS"}:
            text = "Closed without a message; if the client requires TLS, use --tls"
            log.info("%s: %s", self._peer, text)


# --- Grammar --------------------------------------------------------------------------
#
# Each regular expression takes time linear in the length of the text.

# The control characters C0 and C1, which terminals interpret, and the Unicode line separators.
# All other characters outside ASCII are UTF8-non-ascii (RFC 6531 section 3.3).
_CONTROL = r"\x00-\x1f\x7f-\x9f\u2028\u2029"

# The sets below are negated, so that they include everything outside ASCII.

# atext = ALPHA / DIGIT / "!" / "#" / "$" / ... (RFC 5322 section 3.2.3)
_ATEXT = rf'[^{_CONTROL} "(),.:;<>@\[\\\]]'
# Dot-string = Atom *("." Atom)
_DOT_STRING = rf"{_ATEXT}+(?:\.{_ATEXT}+)*"
# Quoted-string = DQUOTE *(qtextSMTP / quoted-pairSMTP) DQUOTE
_QUOTED_STRING = rf'"(?:[^{_CONTROL}"\\]|\\[ -~])*"'
# Let-dig = ALPHA / DIGIT, and the underscore, which containers have in their names
_LET_DIG = rf"[^{_CONTROL} -/:-@\[-^`{{-~]"
# sub-domain = Let-dig [Ldh-str]
_SUB_DOMAIN = rf"{_LET_DIG}+(?:-+{_LET_DIG}+)*"
# Domain = sub-domain *("." sub-domain)
_DOMAIN = rf"{_SUB_DOMAIN}(?:\.{_SUB_DOMAIN})*"
# Snum = 1*3DIGIT, from 0 to 255
_SNUM = r"(?:25[0-5]|2[0-4][0-9]|[01]?[0-9]{1,2})"
# address-literal = "[" ( IPv4 / IPv6 / General ) "]" (RFC 5321 section 4.1.3)
_ADDRESS_LITERAL = (
    rf"\[(?:{_SNUM}(?:\.{_SNUM}){{3}}|(?i:IPv6):(?P<ipv6>[0-9A-Fa-f:.]+)"
    r"|(?!(?i:IPv6):)(?:[A-Za-z0-9]|-+[A-Za-z0-9])+:[!-Z^-~]+)\]"
)
# A-d-l = At-domain *( "," At-domain )
_SOURCE_ROUTE = rf"@{_DOMAIN}(?:,@{_DOMAIN})*:"
# Mailbox = Local-part "@" ( Domain / address-literal ), or a Local-part alone
_MAILBOX = rf"(?:{_DOT_STRING}|{_QUOTED_STRING})(?:@(?:{_DOMAIN}|{_ADDRESS_LITERAL}))?"
_PATH = re.compile(rf"(?:{_SOURCE_ROUTE})?(?P<mailbox>{_MAILBOX})")

# The argument of MAIL or RCPT: a path in angle brackets and the parameters. A quoted string
# in the path may contain brackets; an unbalanced quote is left for parse_mailbox() to reject.
# RFC 5321 section 3.3 forbids a space after the colon, but every server accepts it.
_PATH_AND_PARAMETERS = (
    r':[ ]*<(?P<path>[^">]*(?:"(?:[^"\\]|\\.)*"[^">]*)*|[^>]*)>(?: +(?P<parameters>.*))?'
)
_MAIL_ARGUMENT = re.compile("FROM" + _PATH_AND_PARAMETERS, re.IGNORECASE | re.ASCII)
_RCPT_ARGUMENT = re.compile("TO" + _PATH_AND_PARAMETERS, re.IGNORECASE | re.ASCII)

# The argument of EHLO or HELO. RFC 5321 section 4.1.1.1 requires a domain or an address
# literal, but applications send the name of their machine, which may be neither. Surrogates
# stand for bytes that are not UTF-8.
_HELO_ARGUMENT = re.compile(rf"[^{_CONTROL}\ud800-\udfff ]+")

# bdat-cmd = "BDAT" SP chunk-size [ SP "LAST" ] (RFC 3030 section 2). Any rest is accepted here,
# because the octets of a refused chunk can be discarded only if its size is known.
_BDAT_ARGUMENT = re.compile("0*(?P<size>[0-9]{1,20})(?P<rest>(?![0-9]).*)")

# xtext = *( xchar / hexchar ) (RFC 3461 section 4)
_XTEXT = r"(?:[!-*,-<>-~]|\+[0-9A-F]{2})+"

# RFC 3461 sections 4.2 and 4.4: the decoded text is printable
_PRINTABLE_XTEXT = r"(?:[!-*,-<>-~]|\+(?:[2-6][0-9A-F]|7[0-9A-E]))+"

# RFC 6533 section 3: utf-8-addr-xtext / utf-8-addr-unitext
_UTF8_ADDRESS = r"(?:[!-*,-<>-\[\]-~]|\\x\{[0-9A-F]{2,6}\}|[^\x00-\x9f\u2028\u2029\ud800-\udfff])+"

# {keyword: (extension, regular expression for what follows the keyword)}
Parameters = Mapping[str, tuple[str, str]]

MAIL_PARAMETERS: Parameters = {
    "SIZE": ("SIZE", "=[0-9]{1,20}"),  # RFC 1870 section 3
    "BODY": ("8BITMIME", "=(?:7BIT|8BITMIME)"),  # RFC 6152
    "SMTPUTF8": ("SMTPUTF8", ""),  # RFC 6531 section 3.4
    "AUTH": ("AUTH", f"={_XTEXT}"),  # RFC 4954 section 5; "<>" is valid xtext
    "RET": ("DSN", "=(?:FULL|HDRS)"),  # RFC 3461 section 4.3
    "ENVID": ("DSN", f"={_PRINTABLE_XTEXT}"),  # RFC 3461 section 4.4
}
RCPT_PARAMETERS: Parameters = {
    # RFC 3461 section 4.1
    "NOTIFY": ("DSN", "=(?:NEVER|(?:SUCCESS|FAILURE|DELAY)(?:,(?:SUCCESS|FAILURE|DELAY))*)"),
    # RFC 3461 section 4.2
    "ORCPT": ("DSN", f"=(?:utf-8;{_UTF8_ADDRESS}|(?!utf-8;)[a-z0-9-]+;{_PRINTABLE_XTEXT})"),
}


def parse_parameters(text: str, known: Parameters, extensions: Sequence[str]) -> dict[str, str]:
    """Mail-parameters / Rcpt-parameters = esmtp-param *(SP esmtp-param)

    known is MAIL_PARAMETERS or RCPT_PARAMETERS, and extensions are those that the server
    offers. Returns {keyword in upper case: value}; the value is "" for a keyword without one.
    Raises SMTPError 555 for an unknown keyword (RFC 5321 section 4.1.1.11) and 501 for an
    invalid value or a duplicate keyword.
    """
    parameters: dict[str, str] = {}
    for parameter in filter(None, text.split(" ")):
        keyword, equals, value = parameter.partition("=")
        # str.upper() converts some letters outside ASCII to ASCII letters.
        keyword = keyword.upper() if keyword.isascii() else ""
        extension, pattern = known.get(keyword, ("", ""))
        if extension not in extensions:
            raise SMTPError(555, "5.5.4", "Unknown parameter")
        if keyword in parameters:
            raise SMTPError(501, "5.5.4", f"Duplicate parameter {keyword}")
        if not re.fullmatch(pattern, equals + value, re.IGNORECASE | re.ASCII):
            raise SMTPError(501, "5.5.4", f"Invalid value for parameter {keyword}")
        parameters[keyword] = value
    return parameters


def parse_mailbox(text: str, status: str) -> str:
    """[ A-d-l ":" ] Mailbox, or a Local-part alone, such as Postmaster

    Returns the address without the source route (RFC 5321 appendix C). Raises SMTPError
    501 with the given enhanced status code, or with 5.5.2 if the text is not valid UTF-8.
    """
    if not text.isascii() and re.search("[\udc80-\udcff]", text):
        raise SMTPError(501, "5.5.2", "Address is not valid UTF-8")
    match = _PATH.fullmatch(text)
    if match is None or (match["ipv6"] and not _is_ipv6_address(match["ipv6"])):
        raise SMTPError(501, status, "Bad address syntax")
    return match["mailbox"]


def _is_ipv6_address(text: str) -> bool:
    try:
        socket.inet_pton(socket.AF_INET6, text)
    except OSError:
        return False
    return True


# A SASL mechanism (RFC 4422): yields challenges, receives the decoded responses, and returns
# user name and password. Raises ValueError for a malformed response.
SASLExchange = Generator[str, bytes, tuple[bytes, bytes]]


def _sasl_plain() -> SASLExchange:
    """RFC 4616 section 2: message = [authzid] NUL authcid NUL passwd"""
    response = yield ""
    _, user, password = response.split(b"\0")
    return user, password


def _sasl_login() -> SASLExchange:
    """The LOGIN mechanism, which no RFC specifies; the challenges are those of Postfix."""
    user = yield "Username:"
    password = yield "Password:"
    return user, password


def _sasl_xoauth2() -> SASLExchange:
    """The XOAUTH2 mechanism of Gmail and Microsoft 365; the token takes the place of a password.

    response = "user=" user %x01 "auth=Bearer " token %x01 %x01
    """
    response = yield ""
    match = re.fullmatch(rb"user=([^\x01]*)\x01auth=Bearer ([^\x01]*)\x01\x01", response)
    if match is None:
        raise ValueError("not a response of XOAUTH2")
    return match[1], match[2]


SASL_MECHANISMS = {"PLAIN": _sasl_plain, "LOGIN": _sasl_login, "XOAUTH2": _sasl_xoauth2}


# C0 but tabs, C1, line separators, bidirectional embeddings, overrides and isolates, and
# surrogates. All others are text, such as the spaces, direction marks and joiners of any script.
_CONTROLS = re.compile("[\x00-\x08\n-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def escape_unprintable(text: str) -> str:
    """Return the text as one line, with what a terminal would interpret escaped."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


# --- Failure rules --------------------------------------------------------------------

# What a rule can apply to: the greeting, the commands, and "." for the end of the content.
RULE_VERBS = ["CONNECT", *IMPLEMENTED_VERBS, "."]


@dataclass
class Rule:
    """A scripted failure; parse_rule() creates it. Without an action, the command proceeds."""

    text: str
    """The rule as it was written."""
    verb: str
    """One of RULE_VERBS."""
    pattern: str
    """A pattern of fnmatch in lower case, for the address of the client (CONNECT), the path
    (MAIL, RCPT), the decoded subject (.), or the argument of other commands."""
    remaining: float = float("inf")
    """How many more times the rule applies."""
    delay: float | None = None
    """Action: wait this many seconds; then the next rule applies."""
    reply: Reply | None = None
    """Action: reply with an error."""
    drop: bool = False
    """Action: close the connection, after the reply if there is one."""


def parse_rule(text: str) -> Rule:
    """VERB GLOB [ "x" N ] ( CODE [ x.y.z ] [ text ] [ "drop" ] / "delay" SECONDS / "drop" / "ok" )

    Raises ValueError; its text says what is wrong and what is possible.
    """
    words = text.split()
    verb = words[0].upper() if words else ""
    if verb not in RULE_VERBS:
        raise ValueError(f"rule '{text}': it must begin with one of {' '.join(RULE_VERBS)}")
    if len(words) == 1:
        example = f"'{verb} * 550'"
        raise ValueError(f"rule '{text}': incomplete; write it in quotes, such as {example}")
    rule = Rule(text, verb, words[1].lower())
    if reason := _why_it_never_matches(rule):
        raise ValueError(f"rule '{text}': the pattern {words[1]} can never match: {reason}")
    action = words[2:]
    if action and re.fullmatch("x[1-9][0-9]{0,8}", action[0], re.IGNORECASE):
        rule.remaining = int(action.pop(0)[1:])
    try:
        _set_action(rule, action)
    except ValueError as error:
        hint = ""
        if re.fullmatch("[45][0-9]{2}|x[0-9]+|delay|drop|ok", rule.pattern):
            hint = f"; the pattern is missing, as in '{verb} * {' '.join(words[1:])}'"
        raise ValueError(f"rule '{text}': {error}{hint}") from error
    return rule


def _why_it_never_matches(rule: Rule) -> str:
    """Return why the pattern cannot match any command, or "" if it can."""
    verb, pattern = rule.verb, rule.pattern
    if verb in COMMANDS and not COMMANDS[verb].argument and not fnmatchcase("", pattern):
        return f"{verb} has no argument (use *); for the subject of a message, use ."
    if verb == "CONNECT" and re.search("[g-z@]", pattern):
        return "CONNECT has the address of the client, such as 127.0.0.1"
    if verb in ("MAIL", "RCPT") and re.match("<|from:|to:", pattern):
        return f"{verb} has an address without angle brackets"
    return ""


def _set_action(rule: Rule, words: list[str]) -> None:
    """Set the action of a rule. Raises ValueError if the words are not an action."""
    action, *rest = [word.lower() for word in words] or [""]
    if action == "delay" and len(rest) == 1 and re.fullmatch("[0-9]{1,6}([.][0-9]{1,6})?", rest[0]):
        rule.delay = float(rest[0])
    elif re.fullmatch("[45][0-9]{2}", action):
        rule.drop = rest[-1:] == ["drop"]
        rule.reply = _parse_reply(action, words[1:-1] if rule.drop else words[1:])
    elif action in ("drop", "ok") and not rest:
        rule.drop = action == "drop"
    else:
        found = " ".join(words) or "nothing"
        expected = "a code from 400 to 599 [x.y.z] [text] [drop], delay SECONDS, drop or ok"
        raise ValueError(f"expected {expected}, not {found}")


def _parse_reply(code: str, words: list[str]) -> Reply:
    status = f"{code[0]}.0.0"
    if words and re.match("[0-9][.][0-9]", words[0]):
        status = words.pop(0)
    return SMTPError(int(code), status, " ".join(words) or "Scripted failure").reply


def rule_text(argument: str) -> str:
    """Return the text of a command to match: the path of MAIL and RCPT, or the argument."""
    match = _MAIL_ARGUMENT.fullmatch(argument) or _RCPT_ARGUMENT.fullmatch(argument)
    return match["path"] if match else argument


class Rules:
    """The failure rules of a server. Raises ValueError for a rule that does not parse."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.replace(texts)

    def replace(self, texts: Sequence[str]) -> None:
        """Replace the rules; thread-safe. Raises ValueError as __init__() does."""
        self._rules = [parse_rule(text) for text in texts]

    def apply(self, verb: str, get_text: Callable[[], str], peer: str) -> list[Rule]:
        """Count and return the rules that apply now: those with a delay, then at most one other.

        get_text() returns the text to match with the patterns; it is called only if there is a
        rule for the verb. peer is for the log.
        """
        applied: list[Rule] = []
        for rule in self._rules:
            if rule.verb != verb or not rule.remaining:
                continue
            if not fnmatchcase(get_text().lower(), rule.pattern):
                continue
            rule.remaining -= 1
            log.info("%s: rule %s", peer, rule.text)
            applied.append(rule)
            if rule.delay is None:
                break
        return applied


# --- Messages -------------------------------------------------------------------------

# Octets of a header field that are decoded; most servers accept fewer in a whole header.
MAX_FIELD_SIZE = 65_536

# Parts of a message that are decoded; those after them are only in the content.
MAX_PARTS = 10_000


@dataclass(frozen=True)
class Attachment:
    """A part of a message that is neither its text nor its HTML, such as a file.

    name: the file name, or "".
    type: the media type in lower case, such as "application/pdf".
    content: the content as sent; only its transfer encoding is undone.
    content_id: the Content-ID without angle brackets, to which "cid:" URLs refer; or "".
    """

    name: str
    type: str
    content: bytes
    content_id: str = ""


@dataclass(frozen=True)
class Envelope:
    """A message with the data of its SMTP session.

    peer: address and port of the client, such as "127.0.0.1:54321" or "[::1]:54321".
    helo: the argument of EHLO or HELO.
    protocol: SMTP, ESMTP, UTF8SMTP and so on (RFC 3848, RFC 6531 section 4.3).
    tls: whether the message was sent over TLS.
    user: the user name of the login, or None.
    mail_from: the reverse-path without angle brackets; "" is the null reverse-path.
    mail_options: the parameters of MAIL: {keyword in upper case: value, or ""}.
    rcpt_tos: the forward-paths without angle brackets, in the order of the RCPT commands.
    rcpt_options: the parameters of RCPT: one dictionary for each of rcpt_tos.
    content: the content as sent: line ends are CRLF, and dot-stuffing is undone.
    received: when the end of the content arrived, with a time zone.
    warnings: what real servers object to, each as "name: description (RFC section)".
    path: the file in the Maildir, if the message is stored.
    """

    peer: str
    helo: str
    protocol: str
    tls: bool
    user: str | None
    mail_from: str
    mail_options: dict[str, str]
    rcpt_tos: list[str]
    rcpt_options: list[dict[str, str]]
    content: bytes
    received: datetime
    warnings: list[str] = field(default_factory=list)
    path: Path | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: the fields, without what has been decoded."""
        return {item.name: vars(self)[item.name] for item in fields(self)}

    @cached_property
    def email(self) -> email.message.EmailMessage:
        """What email.message_from_bytes() returns for the content with email.policy.default."""
        import email.policy  # only for this, because it imports most of the email package

        return email.message_from_bytes(self.content, policy=email.policy.default)

    def header(self, name: str) -> str:
        """Return the text of the first header field with this name; "" if there is none.

        It is the text as sent, except that folding is undone (RFC 5322 section 2.2.3) and
        encoded-words are decoded (RFC 2047).
        """
        return decode_words(first_field(header_section(self.content), name))

    @cached_property
    def subject(self) -> str:
        """The text of the Subject field; "" if there is none. See header()."""
        return self.header("Subject")

    @cached_property
    def text(self) -> str:
        """The first text/plain part that is not a file, decoded; "" if there is none."""
        return "".join(part.text for part in self._inline_parts("text/plain")[:1])

    @cached_property
    def html(self) -> str:
        """The first text/html part that is not a file, decoded; "" if there is none."""
        return "".join(part.text for part in self._inline_parts("text/html")[:1])

    @cached_property
    def links(self) -> list[str]:
        """The URLs in the text and the targets of links in the HTML, without repeats.

        They are as sent, such as "/confirm" or "{{ url }}". Those that begin with "#", "mailto:",
        "tel:" or "javascript:" are left out. Texts after the first count as well.
        """
        urls = [url for part in self._inline_parts("text/plain") for url in find_urls(part.text)]
        urls += [url for part in self._inline_parts("text/html") for url in part.html_as_text[1]]
        return list(dict.fromkeys(urls))

    def link(self, part: str) -> str:
        """Return the one link that contains part.

        Raises LookupError, with the links in its text, if none or several do.
        """
        found = [link for link in self.links if part in link]
        if len(found) == 1:
            return found[0]
        links = "".join(f"\n  {link}" for link in self.links) or " none"
        raise LookupError(f"{len(found)} links contain {part!r}; the links of the message:{links}")

    @cached_property
    def attachments(self) -> list[Attachment]:
        """The parts other than text and html, in the order of the message."""
        shown = self._inline_parts("text/plain")[:1] + self._inline_parts("text/html")[:1]
        return [
            Attachment(part.name, part.type, part.content, part.content_id)
            for part in self._parts
            if part not in shown
        ]

    @cached_property
    def _parts(self) -> list[_Part]:
        return list(islice(split_parts(self.content), MAX_PARTS))

    def _inline_parts(self, media_type: str) -> list[_Part]:
        """Return the parts of a media type that are not files."""
        return [part for part in self._parts if part.type == media_type and not part.is_file]

    def summary(self) -> str:
        """Return sender, recipients and subject as one line for the log."""
        rcpt_tos = ", ".join(self.rcpt_tos)
        return escape_unprintable(f"{self.mail_from} -> {rcpt_tos} [{self.subject}]")

    def as_html(self) -> str:
        """Return the message as one HTML page that needs no other file.

        It is safe to open: the scripts and forms of the message do not work in it.
        """
        return render_page(self)


class _Part:
    """A part of a message: what its header says, and its body as sent."""

    body = b""

    def __init__(self, content: bytes, start: int, default_type: str) -> None:
        header_end, self.body_start = find_body(content, start)
        header = content[start:header_end]
        content_type = first_field(header, "Content-Type")
        disposition = first_field(header, "Content-Disposition")
        media_type = _first_token(content_type)
        self.type = media_type if re.fullmatch("[^/]+/[^/]+", media_type) else default_type
        self.charset = mime_parameter(content_type, "charset")
        boundary = mime_parameter(content_type, "boundary").rstrip().encode()
        self.boundary = boundary if self.type.startswith("multipart/") else b""
        is_digest = self.type == "multipart/digest"
        self.default_type = "message/rfc822" if is_digest else "text/plain"  # of its parts
        name = mime_parameter(disposition, "filename") or mime_parameter(content_type, "name")
        self.name = decode_words(name)  # RFC 2047 section 5 forbids them here
        self.is_file = self.name != "" or _first_token(disposition) == "attachment"
        self.content_id = first_field(header, "Content-ID").strip("<> \t")
        self.encoding = _first_token(first_field(header, "Content-Transfer-Encoding"))

    @cached_property
    def content(self) -> bytes:
        """The body with its transfer encoding undone (RFC 2045 section 6)."""
        if self.encoding == "base64":
            return _decode_base64(self.body)
        return binascii.a2b_qp(self.body) if self.encoding == "quoted-printable" else self.body

    @cached_property
    def text(self) -> str:
        """The content as text; line ends are LF."""
        text = decode_text(self.content, self.charset)
        return text.replace("\r\r\n", "\n").replace("\r\n", "\n")

    @cached_property
    def html_as_text(self) -> tuple[str, list[str]]:
        """What parse_html() makes of the content."""
        return parse_html(self.text)


# A line that may be a delimiter (RFC 2046 section 5.1.1). One search finds those of all multiparts,
# so the time does not grow with nesting.
_DELIMITER = re.compile(rb"\n--([^\n]*)")


def split_parts(content: bytes) -> Iterator[_Part]:
    """Yield the parts that have no parts themselves, in their order (RFC 2046 section 5.1)."""
    # {boundary of an open multipart: default type of its parts}, the innermost last
    types: dict[bytes, str] = {}
    part: _Part | None = _Part(content, 0, "text/plain")
    for line in _DELIMITER.finditer(content):
        if part and part.boundary:
            types.setdefault(part.boundary, part.default_type)
        text = line[1].rstrip()
        boundary = text if text in types else text.removesuffix(b"--")
        if boundary not in types:
            continue
        # What precedes the first delimiter of a multipart is not a part, unless there is no other.
        if part and (part.boundary != boundary or text != boundary):
            part.body = content[part.body_start : line.start()].rstrip(b"\r")
            yield part
        while next(reversed(types)) != boundary:  # multiparts that are not closed
            types.popitem()
        if text == boundary:
            part = _Part(content, line.end() + 1, types[boundary])
        else:
            part = None
            types.popitem()
    if part:
        part.body = content[part.body_start :]
        yield part


def readable_text(envelope: Envelope) -> str:
    """Return all texts of a message; if they are blank, the text of its HTML."""
    texts = [part.text.strip("\n") for part in envelope._inline_parts("text/plain")]
    if not any(map(str.strip, texts)):
        texts = [part.html_as_text[0] for part in envelope._inline_parts("text/html")]
    return "\n\n".join(filter(str.strip, texts))


# --- Header fields --------------------------------------------------------------------

# The name of a field (RFC 5322 section 4.5), or the first line of an mbox file. A line that begins
# with "--" is not a field: it may be a delimiter.
_FIELD_START = rb"(?!--)[!-9;-~]+[ \t]*:|>?From "
# The end of a header: the start of the first line that is neither a field nor its continuation, and
# that line if it is empty. Programs that convert line ends twice send CR CR LF.
_HEADER_END = re.compile(rb"(?m)^(?!%b|(?<=\n)[ \t])(?:\r*\n)?" % _FIELD_START)


def header_section(content: bytes) -> bytes:
    """Return the header fields at the start of the content."""
    return content[: find_body(content, 0)[0]]


def find_body(content: bytes, start: int) -> tuple[int, int]:
    """Return where the header that begins at start ends, and where its body begins."""
    end = _HEADER_END.search(content, start)
    return end.span() if end else (len(content), len(content))


def find_fields(header: bytes, name: str) -> Iterator[str]:
    """Yield the value of each header field with this name, unfolded, but not decoded."""
    field = rb"(?im)^%b[ \t]*:([^\n]*(?:\n[ \t][^\n]*)*)" % re.escape(name.encode())
    for match in re.finditer(field, header):
        lines = match[1][:MAX_FIELD_SIZE].split(b"\n")
        value = b"".join(line.rstrip(b"\r") for line in lines)
        yield value.decode("utf-8", "replace").lstrip(" \t")


def first_field(header: bytes, name: str) -> str:
    """Return the value of the first header field with this name; "" if there is none."""
    return next(find_fields(header, name), "")


# encoded-word = "=?" charset ["*" language] "?" encoding "?" encoded-text "?="
# (RFC 2047 section 2, RFC 2231 section 5). Spaces in the text are a common error.
_ENCODED_WORD = r"=\?([^?*\s]+)(?:\*[^?\s]*)?\?([bq])\?([^?]*)\?="
# White space between adjacent encoded-words is not part of the text (RFC 2047 section 6.2).
_ADJACENT_WORDS = re.compile(rf"{_ENCODED_WORD}(?:[ \t]*{_ENCODED_WORD})*", re.IGNORECASE)


def decode_words(text: str) -> str:
    """Decode the encoded-words in the value of a header field (RFC 2047)."""
    return _ADJACENT_WORDS.sub(_decode_adjacent, text)


def _decode_adjacent(run: re.Match[str]) -> str:
    """Decode adjacent encoded-words; two of one charset may have parts of one character."""
    words = re.finditer(_ENCODED_WORD, run[0], re.IGNORECASE)
    return "".join(
        decode_text(b"".join(map(_decode_word, group)), charset)
        for charset, group in groupby(words, key=lambda word: word[1].lower())
    )


def _decode_word(word: re.Match[str]) -> bytes:
    octets = word[3].encode()
    return _decode_base64(octets) if word[2] in "Bb" else binascii.a2b_qp(octets, header=True)


def _decode_base64(octets: bytes) -> bytes:
    """Decode base64, also without padding, and also padded pieces one after the other."""
    decoded = []
    for digits in re.sub(rb"[^A-Za-z0-9+/=]+", b"", octets).split(b"="):
        if len(digits) % 4 == 1:
            digits = digits[:-1]  # six bits are no octet
        decoded.append(binascii.a2b_base64(digits + b"=="))
    return b"".join(decoded)


# The first token of a structured field, after white space, quotes and comments
_TOKEN = re.compile(r"""(?:[\s"';]|\([^()]*\))*([^\s"',:;()]+)""")

# parameter = attribute "=" value; value = token / quoted-string (RFC 2045 section 5.1). A value
# without quotes goes on to the next semicolon, because many programs forget the quotes.
_PARAMETER = re.compile(
    r""";\s*([^\s=;"]+)\s*=\s*(?:"([^"\\]*(?:\\.[^"\\]*)*)"?|([^;]*))""", re.DOTALL
)


def _first_token(value: str) -> str:
    """Return a media type, a mechanism, a disposition or a charset, in lower case; or ""."""
    match = _TOKEN.match(value)
    return match[1].lower() if match else ""


def mime_parameter(value: str, name: str) -> str:
    """Return a decoded parameter of a structured field; "" if there is none.

    Its pieces name*0, name*1* and so on (RFC 2231 sections 3 and 4) go before a plain value.
    """
    parameters: dict[str, str] = {}
    for attribute, quoted, unquoted in _PARAMETER.findall(value):
        key = attribute.lower()
        if key == f"{name}*":
            key = f"{name}*0*"  # the only piece
        parameters.setdefault(key, re.sub(r'\\([\\"])', r"\1", quoted) or unquoted.strip())
    octets, charset = b"", ""
    for number in count():
        piece = f"{name}*{number}"
        if f"{piece}*" in parameters:
            encoded = parameters[f"{piece}*"]
            if number == 0 and encoded.count("'") >= 2:
                charset, _language, encoded = encoded.split("'", 2)
            octets += unquote_to_bytes(encoded)
        elif piece in parameters:
            octets += parameters[piece].encode()
        else:
            break
    return decode_text(octets, charset) or parameters.get(name, "")


# --- Charsets -------------------------------------------------------------------------

# {codec: the labels for which it is used, as Python names their codecs, or as sent where Python
# knows none}. Most stand for supersets of Windows (WHATWG Encoding Standard section 4.2).
_LABELS = {
    "big5hkscs": "big5 cn-big5 x-big5",
    "cp1252": "ascii iso8859-1 iso88591",
    "cp1254": "iso8859-9",
    "cp874": "iso8859-11 tis-620 windows-874 dos-874",
    "cp932": "shift_jis windows-31j",
    "cp949": "euc_kr cseuckr windows-949 ksc_5601 ks_c_5601-1989 csksc56011987 iso-ir-149",
    "euc_jp": "cseucpkdfmtjapanese",
    "gb18030": "gb2312 csgb2312 gb_2312 gb_2312-80 gbk",
    "iso8859-6": "iso-8859-6-e iso-8859-6-i",
    "iso8859-8": "iso-8859-8-e iso-8859-8-i logical visual",
    "koi8-r": "koi koi8",
    "koi8-u": "koi8-ru",
    "mac-roman": "mac csmacintosh",
    "utf-16": "unicode ucs-2",
    "utf-8-sig": "utf-8",
    "": "punycode unicode-escape raw-unicode-escape",  # no charsets
}
_CODECS = {label: codec for codec, labels in _LABELS.items() for label in labels.split()}


@lru_cache
def find_codec(label: str) -> str:
    """Return the codec for the label of a charset, or for UTF-8 if there is no such charset."""
    label = re.sub("^iso8859(?=[0-9])", "iso8859-", _first_token(label).removeprefix("x-"))
    with contextlib.suppress(LookupError, ValueError):
        name = codecs.lookup(_CODECS.get(label, label)).name
        codec = _CODECS.get(name, name)
        b"x".decode(codec, "replace")  # fails for codecs that are not for text
        return codec
    return "utf-8-sig"


def decode_text(octets: bytes, label: str) -> str:
    """Decode text in the charset with this label; what cannot be decoded becomes U+FFFD."""
    codec = find_codec(label)
    if codec == "iso2022_jp":
        octets, codec = _ISO_2022_JP.sub(_segment_to_shift_jis, octets), "cp932"
    elif codec == "euc_jp":
        octets, codec = _EUC_JP.sub(_character_to_shift_jis, octets), "cp932"
    text = octets.decode(codec, "replace")
    if codec == "cp932":
        text = re.sub("[\uf8f0-\uf8f3]", "\ufffd", text)  # octets that Shift_JIS does not use
    return text.encode("utf-8", "replace").decode()  # UTF-7 can express surrogates


# Python's codecs for ISO-2022-JP and EUC-JP lack characters of Windows, such as those of NEC. Its
# codec for Shift_JIS has them, and the three encode the same table of 94 rows with 94 cells.
_ISO_2022_JP = re.compile(rb"\x1b(\([BIJ]|\$[@B])([^\x1b]*)")
_EUC_JP = re.compile(rb"([\xa1-\xfe])([\xa1-\xfe])|\x8e([\xa1-\xdf])|[\x80-\xff]")
_SET_HIGH_BIT = bytes(octet | 0x80 if octet > 0x20 else octet for octet in range(256))


def _segment_to_shift_jis(segment: re.Match[bytes]) -> bytes:
    """Return a segment of ISO-2022-JP, which begins with an escape sequence, as Shift_JIS."""
    escape, octets = segment.groups()
    if escape in (b"(B", b"(J"):
        return octets
    octets = octets.translate(_SET_HIGH_BIT)  # katakana, or the pairs of EUC-JP
    return octets if escape == b"(I" else _EUC_JP.sub(_character_to_shift_jis, octets)


def _character_to_shift_jis(character: re.Match[bytes]) -> bytes:
    """Return a character of EUC-JP as Shift_JIS."""
    first, second, katakana = character.groups()
    if not first:
        return katakana or b"\xff"
    lead, trail = divmod((first[0] - 0xA1) * 94 + second[0] - 0xA1, 188)
    return bytes([lead + (0x81 if lead < 0x1F else 0xC1), trail + (0x40 if trail < 0x3F else 0x41)])


# --- HTML and URLs --------------------------------------------------------------------

# A URL, in which brackets are balanced
_URL_CHAR = r"[^\x00-\x20<>\"`()\[\]{}\x7f]"
_URL = re.compile(r"https?://(?:C+|\(C*\)|\[C*\]|\{+C*\}+)+".replace("C", _URL_CHAR), re.IGNORECASE)
# Categories of Unicode that end a URL in any script, because often no space follows it: spaces,
# invisible characters, and all punctuation but dashes and connectors
_ENDING_CATEGORIES = ("Cc", "Cf", "Pe", "Pf", "Pi", "Po", "Ps", "Zl", "Zp", "Zs")


def find_urls(text: str) -> list[str]:
    """Return the http and https URLs in a text, without the punctuation after them."""
    text = re.sub(r"[^\x00-\x7f\w]", _separate, text)
    urls = [url.rstrip(".,:;!?*'") for url in _URL.findall(text)]
    return [url for url in urls if not url.endswith("://")]


def _separate(char: re.Match[str]) -> str:
    return " " if unicodedata.category(char[0]) in _ENDING_CATEGORIES else char[0]


# A comment, an element whose content is not shown, a tag, or text. Quotes count only after "="
# (HTML standard section 13.2.5).
_MARKUP = re.compile(
    r"<!--(?:-?>|.*?(?:--!?>|\Z))"
    r"|<[!?][^>]*>?"
    r"|<(script|style|title)(?=[\s/>]).*?(?:</\1[^<>]*>|\Z)"
    r"""|<(/?[a-z][^\s/>]*)((?:[^=>]+|=+\s*(?:"[^"]*"|'[^']*')?){,9999})>?"""
    r"|(<?[^<]+|<+(?=<|\Z))",
    re.IGNORECASE | re.DOTALL,
)
_ATTRIBUTE = re.compile(r"""([^\s/=]+)(?:\s*=\s*(?:"([^"]*)"|'([^']*)'|(\S+)))?""")
# Elements that begin and end a line
_BLOCKS = set(
    """address article aside blockquote body br button caption center dd details dialog div dl dt
    fieldset figcaption figure footer form h1 h2 h3 h4 h5 h6 header hgroup hr legend li main menu
    nav ol option p pre section summary table tbody tfoot thead tr ul""".split()
)


def parse_html(document: str) -> tuple[str, list[str]]:
    """Return the text of an HTML document, roughly as a browser shows it, and the links in it."""
    links: list[str] = []
    fragments = ["\n"]  # each has a last character
    is_preformatted = False
    for markup in _MARKUP.finditer(document):
        _hidden, name, attributes, source = markup.groups("")
        tag = name.lower()
        if source:
            text = _REFERENCE.sub(_decode_reference, source)
            links += find_urls(text)
            if not is_preformatted:
                text = _collapse_spaces(text, fragments[-1])
            if text:
                fragments.append(text)
        elif tag in ("a", "area"):
            links += _find_target(attributes)
        elif tag in ("td", "th") and not fragments[-1].endswith("\n"):
            fragments.append("  ")
        elif tag.removeprefix("/") in _BLOCKS:
            fragments.append("\n")
        if tag in ("pre", "/pre"):
            is_preformatted = tag == "pre"
    lines = [line.rstrip() for line in "".join(fragments).split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n"), links


def _collapse_spaces(text: str, before: str) -> str:
    text = re.sub(r"[ \t\n\f\r]+", " ", text)
    return text.removeprefix(" ") if before.endswith((" ", "\n")) else text


def _find_target(attributes: str) -> list[str]:
    """Return the target of a link with these attributes, or nothing if it is left out."""
    found = _ATTRIBUTE.findall(attributes)
    href = next(("".join(values) for name, *values in found if name.lower() == "href"), "")
    target = _REFERENCE.sub(_decode_reference, href)
    target = re.sub(r"[\t\n\r]", "", target).strip()  # URL standard section 4.4
    is_left_out = re.match("#|mailto:|tel:|javascript:|$", target, re.IGNORECASE)
    return [] if is_left_out else [target]


# A character reference. A name without a semicolon before "=" or a letter or digit is text (HTML
# standard section 13.2.5.73), such as "&currency=" in a URL. int() raises for thousands of digits.
_REFERENCE = re.compile(
    r"&(#[0-9]{1,50};?|#[xX][0-9a-fA-F]+;?|[a-zA-Z][a-zA-Z0-9]*(?:;|(?![=a-zA-Z0-9])))"
)


def _decode_reference(reference: re.Match[str]) -> str:
    if reference[1].startswith("#"):
        return html.unescape(reference[0])
    return html5.get(reference[1], reference[0])


# --- Pages ----------------------------------------------------------------------------

# Bytes of content that a page shows, and of all images together that are put into its HTML.
MAX_PAGE_CONTENT = 33_554_432

# The frame of a message inherits the policy: templates need styles, and images and fonts from
# the web, and nothing else.
_HEAD = """\
<!doctype html>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta name="referrer" content="no-referrer">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; form-action 'none';
  base-uri 'none'; img-src data: http: https:; font-src data: http: https:;
  style-src 'unsafe-inline' data: http: https:">
<style>
  :root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif }
  body { margin: 0; display: flex; flex-direction: column; overflow-wrap: anywhere }
"""

_PAGE = Template(
    _HEAD
    + """\
  body { min-height: 100vh }
  header { padding: 1rem 1.25rem .75rem }
  h1, dd { margin: 0; max-height: 6rem; overflow: auto }
  h1 { font-size: 1.3rem; line-height: 1.3 }
  dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: .5rem 0 0 }
  dt { opacity: .65 }
  dd { white-space: pre-wrap }
  dd span { display: inline-block; margin-right: 1rem }
  main { flex: 1; display: grid; grid-template: auto 1fr / auto auto auto 1fr }
  input { position: absolute; opacity: 0 }
  label { padding: .3rem 1.25rem; cursor: pointer; border-bottom: 3px solid transparent }
  :checked + label { border-color: LinkText }
  :focus-visible + label { outline: auto }
  iframe { width: 100%; height: 100%; min-height: 24rem; box-sizing: border-box; border: 0;
           background: white; color-scheme: light }
  pre { margin: 0; padding: 1rem 1.25rem; white-space: pre-wrap; font: 13px/1.5 monospace }
  label + * { display: none; grid-area: 2 / 1 / auto / -1; border-top: 1px solid #8885 }
  :checked + label + * { display: block }
  @media (max-width: 30rem) { header { font-size: .8rem } dd { max-height: 3.6rem } }
  @media print { label { display: none } iframe { min-height: 90vh } }
</style>
<base target="_blank">
<title>$subject</title>
<header>
<h1>$subject</h1>
<dl>
$fields
</dl>
</header>
<main>
$views
</main>
"""
)
_VIEW = Template(
    '<input type="radio" name="view" id="$name" $checked><label for="$name">$name</label>$markup'
)
_FRAME = Template(
    '<iframe title="HTML" sandbox="allow-popups allow-popups-to-escape-sandbox"'
    ' srcdoc="$document"></iframe>'
)

# The list grows at its end, and shows its end first; a new message does not scroll it.
_LIST = (
    _HEAD
    + """\
  :root { overflow-anchor: none }
  body { flex-direction: column-reverse }
  p, a { padding: .6rem 1rem; margin: 0; border-bottom: 1px solid #8885 }
  p:not(:only-child) { display: none }
  a { color: CanvasText; text-decoration: none; line-height: 1.4 }
  a:hover, a:focus { background: #8882 }
  time, span { display: block; opacity: .7; font-size: .85rem }
  time { float: right; margin-left: 1rem }
  mark { padding: 0 .4rem; border-radius: 1rem; background: #8884; color: inherit;
         white-space: nowrap }
</style>
<meta http-equiv="refresh" content="2">
<base target="message">
<title>Messages</title>
<p>No messages yet. Let your application send one to the SMTP server, by default at
127.0.0.1 port 1025. It appears here within two seconds.</p>
"""
)
_ENTRY = Template(
    '<a href="$name"><time>$time</time><b>$subject</b><span>$envelope$marks</span></a>\n'
)

_INDEX = """\
<!doctype html>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>dsmtpd</title>
<style>
  :root { color-scheme: light dark }
  body { margin: 0; height: 100vh; display: grid; grid-template: 1fr / minmax(18rem, 25%) 1fr }
  iframe { width: 100%; height: 100%; border: 0; outline: 1px solid #8885 }
  @media (max-width: 50rem) { body { grid-template: 1fr 2fr / 1fr } }
</style>
<iframe src="list.html" title="Messages"></iframe>
<iframe name="message" title="Message"></iframe>
"""

# cid-url = "cid" ":" content-id (RFC 2392 section 2), where it begins an attribute or an argument
# in CSS, or follows a comma in srcset
_CID_URL = re.compile(r"""(["'(=,]\s*)cid:([^\s"'<>(),]+)""", re.IGNORECASE)
_TARGET_ATTRIBUTE = re.compile(r"(<[^<>]*\s)target(?=\s*=)", re.IGNORECASE)


def render_page(envelope: Envelope) -> str:
    """Return a message as one HTML page that needs no other file, and no script."""
    fields = {name: envelope.header(name) for name in "From To Cc Reply-To Date".split()}
    fields["Envelope"] = f"{envelope.mail_from} → {', '.join(envelope.rcpt_tos)}"
    fields["Warnings"] = "\n".join(envelope.warnings)
    fields = {name: html.escape(text) for name, text in fields.items()}
    views = {"Text": f"<pre>The content of {len(envelope.content):,} bytes is not shown.</pre>"}
    if len(envelope.content) <= MAX_PAGE_CONTENT:
        fields["Attachments"] = "".join(map(_download_link, envelope.attachments))
        views = _views(envelope)
    page = _PAGE.substitute(
        subject=html.escape(envelope.subject or "(no subject)"),
        fields="\n".join(f"<dt>{name}<dd>{text}" for name, text in fields.items() if text),
        views="\n".join(
            _VIEW.substitute(name=name, markup=markup, checked="" if number else "checked")
            for number, (name, markup) in enumerate(views.items())
        ),
    )
    return page.encode("utf-8", "replace").decode()  # surrogates cannot be written


def _views(envelope: Envelope) -> dict[str, str]:
    """Return {name: markup} of the views of a message, beginning with the one to show."""
    source = html.escape(envelope.content.decode("utf-8", "replace"))
    views = {
        "Text": f"<pre>{_with_links(readable_text(envelope))}</pre>",
        "Source": f"<pre>{source}</pre>",
    }
    if envelope.html:
        document = html.escape(_frame_document(envelope.html, envelope.attachments))
        views = {"HTML": _FRAME.substitute(document=document), **views}
    return views


def _frame_document(document: str, attachments: Iterable[Attachment]) -> str:
    """Return the HTML of a message with its attached images in it.

    Links open a new tab, because the sandbox allows no other target.
    """
    images = (item for item in attachments if item.content_id)
    urls = {item.content_id: _data_url(item.type, item.content) for item in images}
    size = 0

    def embed(match: re.Match[str]) -> str:
        nonlocal size
        before, content_id = match.groups()
        url = urls.get(unquote(content_id), "")
        size += len(url)
        return before + url if url and size <= MAX_PAGE_CONTENT else match[0]

    document = _TARGET_ATTRIBUTE.sub(r"\1data-target", document)
    return "<base target=_blank>" + _CID_URL.sub(embed, document)


def _data_url(media_type: str, content: bytes) -> str:
    return f"data:{quote(media_type, '/+')};base64,{base64.b64encode(content).decode()}"


def _download_link(attachment: Attachment) -> str:
    url = _data_url("application/octet-stream", attachment.content)  # no browser shows this type
    name = html.escape(attachment.name)
    description = html.escape(f"{attachment.type}, {len(attachment.content):,} bytes")
    return f'<span><a download="{name}" href="{url}">{name or "unnamed"}</a> ({description})</span>'


def _with_links(text: str) -> str:
    """Return a text as HTML, with its URLs as links."""
    parts = []
    position = 0
    for url in find_urls(text):
        start = text.index(url, position)
        link = html.escape(url)
        parts += [html.escape(text[position:start]), f'<a href="{link}">{link}</a>']
        position = start + len(url)
    return "".join([*parts, html.escape(text[position:])])


class PageDirectory:
    """A directory with a page for each message, and a list of them to open in a browser.

    Several servers may share it. Raises OSError if it cannot be created or written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        self._create()
        if not os.access(self.path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self.path))

    @property
    def url(self) -> str:
        """The file: URL of the list."""
        return (self.path / "index.html").as_uri()

    def add(self, envelope: Envelope) -> None:
        """Write the page of a message, and append a line to the list. Raises OSError."""
        self._create()  # someone may have deleted its files
        name = f"{envelope.received:%Y%m%d-%H%M%S}-{os.urandom(4).hex()}.html"
        (self.path / name).write_bytes(envelope.as_html().encode())
        with open(self.path / "list.html", "ab", buffering=0) as file:
            file.write(_list_entry(name, envelope).encode("utf-8", "replace"))  # one write

    def _create(self) -> None:
        with contextlib.suppress(FileExistsError):
            os.makedirs(self.path)
        for name, text in {"index.html": _INDEX, "list.html": _LIST}.items():
            with contextlib.suppress(FileExistsError):
                # Appended as well: another server may add its first entry at this moment.
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
                with open(os.open(self.path / name, flags, 0o666), "wb", buffering=0) as file:
                    file.write(text.encode())


def _list_entry(name: str, envelope: Envelope) -> str:
    counts = {"Attachments": len(envelope.attachments), "Warnings": len(envelope.warnings)}
    return _ENTRY.substitute(
        name=name,
        time=f"{envelope.received.astimezone():%d %b %H:%M}",
        subject=html.escape(envelope.subject[:200] or "(no subject)"),
        envelope=html.escape(f"{envelope.mail_from} → {', '.join(envelope.rcpt_tos)}"[:200]),
        marks="".join(f" <mark>{noun}: {count}</mark>" for noun, count in counts.items() if count),
    )


# --- Lint -----------------------------------------------------------------------------

# {name of a warning: its text}
WARNINGS = {
    "bare-lf": "LF without CR {} (RFC 5321 section 2.3.8)",
    "bare-cr": "CR without LF in the content (RFC 5321 section 2.3.8)",
    "long-line": "a line of over 998 octets (RFC 5322 section 2.1.1)",
    "utf8-header": "the header needs SMTPUTF8 (RFC 6531 section 3.4)",
    "bcc-header": "a Bcc field is visible to all recipients (RFC 5322 section 3.6.3)",
    "missing-date": "no Date field (RFC 5322 section 3.6.1)",
    "missing-from": "no From field (RFC 5322 section 3.6.2)",
    "missing-message-id": "no Message-ID field (RFC 5322 section 3.6.4)",
    "duplicate-field": "more than one {} field (RFC 5322 section 3.6)",
    "address-syntax": "an underscore in a domain (RFC 5321 section 4.1.2)",
    "plaintext-auth": "a login without TLS (RFC 4954 section 4)",
    "early-talker": "data was sent before {} (RFC 2920 section 3.1)",
}

# RFC 5322 section 3.6
_REQUIRED_FIELDS = "date from message-id".split()
_UNIQUE_FIELDS = (
    "Date From Sender Reply-To To Cc Bcc Message-ID In-Reply-To References Subject".split()
)
# ".*" skips the rest of the line, which would otherwise be searched as well.
_FIELD_NAME = re.compile(rb"^([!-9;-~]+)[ \t]*:.*", re.MULTILINE)

# RFC 5322 section 2.1.1, with the line end
_MAX_LINE_LENGTH = 998 + len("\r\n")


def warning(name: str, detail: str = "") -> str:
    """Return the text of a warning: "name: description (RFC section)"."""
    return f"{name}: {WARNINGS[name].format(detail)}"


def lint(content: bytes, mail_options: Mapping[str, str]) -> list[str]:
    """Return what real servers object to in a message, each as the text of a warning."""
    warnings = _lint_lines(content)
    header = header_section(content)
    if "SMTPUTF8" not in mail_options and not header.isascii():
        warnings.append(warning("utf8-header"))
    return warnings + _lint_fields(header)


def _lint_lines(content: bytes) -> list[str]:
    warnings = []
    line_ends = content.count(b"\r\n")
    if content.count(b"\n") > line_ends:
        warnings.append(warning("bare-lf", "in the content"))
    if content.count(b"\r") > line_ends:
        warnings.append(warning("bare-cr"))
    if max(map(len, io.BytesIO(content)), default=0) > _MAX_LINE_LENGTH:
        warnings.append(warning("long-line"))
    return warnings


def _lint_fields(header: bytes) -> list[str]:
    """Return the warnings about the names of the header fields."""
    names = _FIELD_NAME.findall(header.lower())
    distinct = set(names)
    missing = [name for name in _REQUIRED_FIELDS if name.encode() not in distinct]
    warnings = [warning(f"missing-{name}") for name in missing]
    if len(names) > len(distinct):
        warnings += [
            warning("duplicate-field", name)
            for name in _UNIQUE_FIELDS
            if names.count(name.lower().encode()) > 1
        ]
    if b"bcc" in distinct:
        warnings.append(warning("bcc-header"))
    return warnings


# --- Storage --------------------------------------------------------------------------

# Characters of a folded header line. Each has up to four octets in UTF-8, so that a line has
# fewer than the 998 octets of RFC 5322 section 2.1.1.
_FOLD_WIDTH = 240

# Replaced in the argument of HELO: spaces, parentheses and semicolons are syntax in Received.
_UNSAFE_IN_RECEIVED = re.compile(r"[^A-Za-z0-9.:_\[\]-]")


def trace_header(envelope: Envelope, key: str) -> bytes:
    """Return the header fields that are prepended to the stored content.

    key is the name of the message in the Maildir. Lines end with LF.
    """
    helo = _UNSAFE_IN_RECEIVED.sub("?", envelope.helo[:255])
    address = envelope.peer.rpartition(":")[0]
    date = format_datetime(envelope.received)
    header = [
        f"Return-Path: <{envelope.mail_from}>",  # RFC 5321 section 4.4
        f"X-Peer: {envelope.peer}",
        f"X-MailFrom: {_encode_words(envelope.mail_from)}",
        f"X-RcptTo: {_encode_words(', '.join(envelope.rcpt_tos))}",
        f"Received: from {helo} ({address}) by {HOSTNAME} (dsmtpd {__version__})"
        f" with {envelope.protocol} id {key}; {date}",
    ]
    return "".join(f"{_fold(line)}\n" for line in header).encode()


def _fold(line: str) -> str:
    """Fold a header line at spaces, or inside a long word (RFC 5322 section 2.2.3)."""
    if len(line) <= _FOLD_WIDTH:
        return line
    return textwrap.fill(line, _FOLD_WIDTH, subsequent_indent=" ", break_on_hyphens=False)


def _encode_words(text: str) -> str:
    """Return the text as RFC 2047 encoded-words if folding would change it."""
    has_long_word = re.search(rf"[^ ]{{{_FOLD_WIDTH - 20}}}", text)
    if text.isascii() and "=?" not in text and "  " not in text and not has_long_word:
        return text
    return email.header.Header(text, "utf-8").encode()


def stored_content(envelope: Envelope, key: str) -> bytes:
    """Return what is stored of a message: the trace header, and the content with LF line ends.

    An empty line ends the header section, also where the content has none, because many mail
    readers require it.
    """
    header, content = trace_header(envelope, key), envelope.content
    if re.search(rb"\r(?!\n)", content):
        content = content.replace(b"\r\n", b"\n")
    else:
        content = content.translate(None, b"\r")  # faster, for large messages
    end, body = find_body(content, 0)
    if end < body:
        return header + content
    if end > 0 and content[end - 1 : end] != b"\n":
        content += b"\n"
        end += 1
    return header + content[:end] + b"\n" + content[end:]


def unique_name() -> str:
    """Return a name for a file in a Maildir, as maildir(5) suggests."""
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    unique = f"M{nanoseconds // 1000:06}P{os.getpid()}R{os.urandom(8).hex()}"
    return f"{seconds}.{unique}.{HOSTNAME}"


class Maildir(mailbox.Maildir):
    """A mailbox.Maildir whose add() is durable. Several processes may use the same one.

    directory must be absent, empty, or a Maildir: contain cur or new. Missing folders are created.
    None is the current directory, without this check. Raises mailbox.Error for any other
    directory, which is left unchanged, and for one that cannot be read or written to.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None) -> None:
        self.path = Path(directory or ".").absolute()
        try:
            if directory is not None:
                _require_maildir(self.path)
            self._create_folders()
        except OSError as error:
            raise mailbox.Error(f"cannot write to {self.path}: {error.strerror}") from error
        for name in ("tmp", "new", "cur"):
            if not os.access(self.path / name, os.R_OK | os.W_OK | os.X_OK):
                raise mailbox.Error(f"cannot write to {self.path / name}: no permission")
        super().__init__(self.path, create=False)

    def _create_folders(self) -> None:
        for name in ("tmp", "new", "cur"):
            (self.path / name).mkdir(mode=0o700, parents=True, exist_ok=True)

    def add(self, message: Any, key: str | None = None) -> str:
        """Store a message, and return its key, which may be given: a unique_name().

        Bytes are stored unchanged; other types are stored as mailbox.Maildir does it. When this
        returns, the file is complete and flushed to disk. Raises OSError if it cannot be
        written; nothing is left of it then.
        """
        if not isinstance(message, bytes):
            return super().add(message)
        key = key or unique_name()
        try:
            self._write(key, message)
        except FileNotFoundError:  # the directory was removed
            self._create_folders()
            self._write(key, message)
        return key

    def _write(self, key: str, message: bytes) -> None:
        # Operations on Path objects take longer than the system calls.
        tmp, new = os.path.join(self.path, "tmp", key), os.path.join(self.path, "new", key)
        try:
            with open(tmp, "xb") as file:
                file.write(message)
                file.flush()
                os.fsync(file.fileno())
            os.rename(tmp, new)
        except BaseException:
            with contextlib.suppress(OSError):  # it may not have been created
                os.unlink(tmp)
            raise


def _require_maildir(path: Path) -> None:
    """Raise mailbox.Error if the directory exists and is neither empty nor a Maildir."""
    if not path.exists():
        return
    if not path.is_dir():
        raise mailbox.Error(f"{path} is not a directory")
    names = {entry.name for entry in path.iterdir() if not entry.name.startswith(".")}
    if names and not names & {"cur", "new"}:
        missing = ", ".join(sorted({"cur", "new", "tmp"} - names))
        raise mailbox.Error(f"{path} is not a Maildir: it has no {missing}")


class StorageThread:
    """A thread that stores messages in a Maildir one after another.

    More threads would contend for the interpreter lock at every system call.
    """

    def __init__(self, maildir: Maildir) -> None:
        self._maildir = maildir
        self._queue: queue.SimpleQueue[tuple[asyncio.Future[Any], Envelope] | None]
        self._queue = queue.SimpleQueue()
        threading.Thread(target=self._run, name="dsmtpd storage", daemon=True).start()

    async def store(self, envelope: Envelope) -> Path:
        """Store a message, and return its path. Raises SMTPError 451 if it cannot be written."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._queue.put((future, envelope))
        path: Path = await result_of(future)
        return path

    def close(self) -> None:
        """End the thread after the messages that wait."""
        self._queue.put(None)

    def _run(self) -> None:
        for future, envelope in iter(self._queue.get, None):
            call_in_thread(future, self._store, envelope)

    def _store(self, envelope: Envelope) -> Path:
        key = unique_name()
        try:
            self._maildir.add(stored_content(envelope, key), key)
        except OSError as error:
            log.error("Cannot store a message from %s: %s", envelope.peer, error)
            text = "Cannot store the message, try again later"
            raise SMTPError(451, "4.3.0", text) from error
        return self._maildir.path / "new" / key


def call_in_thread(
    future: asyncio.Future[Any], function: Callable[[Envelope], object], envelope: Envelope
) -> None:
    """Run in a thread: call the function, and set what it returns or raises as the result.

    asyncio refuses StopIteration as the exception of a future.
    """
    result: object
    try:
        result = function(envelope)
    except BaseException as error:  # SystemExit too: it ends only this call
        result = error

    def set_result() -> None:
        if not future.done():  # it is cancelled when the event loop ends
            future.set_result(result)

    with contextlib.suppress(RuntimeError):  # the event loop is closed
        future.get_loop().call_soon_threadsafe(set_result)


async def result_of(future: asyncio.Future[Any]) -> Any:
    """Return or raise what the function of call_in_thread() has returned or raised."""
    result = await future
    if isinstance(result, BaseException):
        raise result
    return result


# --- Connection -----------------------------------------------------------------------

# Seconds without a byte from the client. RFC 5321 section 4.5.3.2.7 requires five minutes.
IDLE_TIMEOUT = 300.0

# Maximum bytes of one read from a client.
READ_SIZE = 65_536

# Bytes of the replies to pipelined commands that are written together; after that, the other
# sessions have their turn.
WRITE_SIZE = 4096


class Connection:
    """One client: reads its bytes, feeds its session, and performs the session's actions.

    deliver(envelope) returns the reply to the end of the content. tls_context is for the
    action StartTLS, and for a session that starts with TLS.
    """

    def __init__(
        self,
        session: Session,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        deliver: Callable[[Envelope], Awaitable[Reply]],
        tls_context: ssl.SSLContext | None = None,
    ) -> None:
        self._session = session
        self._reader = reader
        self._writer = writer
        self._deliver = deliver
        self._tls_context = tls_context
        self._unsent = bytearray()  # replies that are not written yet
        self._action: Action | None = None  # the action in progress
        self._is_closing = False
        self._last_reply: Reply | None = None  # if the server ends the session
        self._task = asyncio.current_task()
        self._loop = asyncio.get_running_loop()
        self.last_activity = self._loop.time()
        """When the client last sent something or an action ended, in the time of the event loop."""
        self._idle_timer = self._loop.call_later(IDLE_TIMEOUT, self._check_idle)

    async def run(self) -> None:
        """Serve the client until one side closes the connection."""
        try:
            await self._run_session()
        except asyncio.CancelledError:
            # It is not raised again: the task ends here in any case.
            if self._last_reply is None:  # the event loop ends
                self._writer.transport.abort()
        except OSError as error:
            log.debug("%s: %s", self._session.peer, error)
        except Exception:
            log.exception("%s: Session failed", self._session.peer)
        finally:
            await self._close()

    def interrupt(self, reply: Reply) -> None:
        """Cancel the task, which then sends this reply; a delivery is finished first."""
        self._last_reply = reply
        if isinstance(self._action, Deliver):
            summary = self._action.envelope.summary()
            log.info("%s: Waiting for the delivery of %s", self._session.peer, summary)
        elif self._task is not None and not self._is_closing:
            self._task.cancel()

    def abort(self) -> None:
        """Close the connection at once, unless a delivery is in progress."""
        if not isinstance(self._action, Deliver):
            self._writer.transport.abort()

    async def _run_session(self) -> None:
        if self._session.tls and self._writer.get_extra_info("ssl_object") is None:
            # Before any other await: the plain reader must not get the ClientHello.
            await self._perform(StartTLS())
        data = b""  # the first call of receive() yields the greeting
        while True:
            await self._process(data)
            if self._session.ended or self._last_reply is not None:
                return
            data = await self._reader.read(READ_SIZE)
            if not data:
                return
            self.last_activity = self._loop.time()

    async def _process(self, data: bytes) -> None:
        """Feed the session, and perform its actions."""
        for action in self._session.receive(data, time.time()):
            if not isinstance(action, Reply):
                await self._flush()
                await self._perform(action)
                continue
            self._unsent += action.encoded
            if self._last_reply is not None:  # interrupted during a delivery
                return
            if len(self._unsent) >= WRITE_SIZE:
                await self._flush()
                await asyncio.sleep(0)
        if self._unsent:
            await self._flush()
        else:
            self._acknowledge_quickly()

    def _acknowledge_quickly(self) -> None:
        """Have the system acknowledge at once what the client has sent.

        A client that sends small writes waits for that, and Linux delays it by 40 ms where no
        reply follows.
        """
        sock = self._writer.get_extra_info("socket")
        if sys.platform == "linux" and sock is not None:
            with contextlib.suppress(OSError):  # the client has disconnected
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    async def _flush(self) -> None:
        """Write the replies, and wait while the client does not read them.

        Raises OSError if the client has disconnected. The rest of its input is not processed,
        because it could not learn whether a message was accepted.
        """
        if self._unsent:
            self._writer.write(bytes(self._unsent))
            self._unsent.clear()
        try:
            await self._writer.drain()
        except asyncio.CancelledError:
            self._writer.transport.abort()  # the client would not read the last reply either
            raise

    async def _perform(self, action: Action) -> None:
        """Perform an action. Close needs nothing: the session has ended."""
        self._action = action
        try:
            if isinstance(action, Deliver):
                action.reply = await self._deliver(action.envelope)
            elif isinstance(action, StartTLS):
                await self._start_tls()
            elif isinstance(action, Delay):
                await asyncio.sleep(action.seconds)
        finally:
            self._action = None
            self.last_activity = self._loop.time()

    async def _start_tls(self) -> None:
        """Replace the streams; bytes that arrived in plain text stay in the old reader.

        Raises OSError if the handshake fails.
        """
        # Python 3.10 has no StreamWriter.start_tls().
        plain = self._writer.transport
        plain_protocol = plain.get_protocol()
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        assert self._tls_context is not None
        try:
            if plain.is_closing():  # start_tls() would wait for the handshake timeout
                raise ConnectionResetError
            transport = await self._loop.start_tls(
                plain, protocol, self._tls_context, server_side=True
            )
            if transport is None:
                raise ConnectionResetError
        except (OSError, asyncio.CancelledError) as error:
            if isinstance(error, OSError):
                reason = _handshake_failure(error)
                log.warning("%s: TLS handshake failed: %s", self._session.peer, reason)
            plain.abort()
            # asyncio reports the loss only to the protocol of TLS; wait_closed() would hang.
            plain_protocol.connection_lost(None)
            raise
        protocol.connection_made(transport)
        self._reader = reader
        self._writer = asyncio.StreamWriter(transport, protocol, reader, self._loop)
        self._acknowledge_quickly()

    async def _close(self) -> None:
        """Send the last replies, and close the connection."""
        self._is_closing = True
        try:
            self._unsent += self._session.end(self._last_reply)
            if self._unsent:
                self._writer.write(bytes(self._unsent))
        finally:
            self._writer.close()
            with contextlib.suppress(Exception):  # wait_closed() raises what closed it
                await self._writer.wait_closed()
            self._idle_timer.cancel()

    def _check_idle(self) -> None:
        """Interrupt the session if the client is idle, and check again later."""
        now = self._loop.time()
        if self._action is not None:
            self.last_activity = now
        deadline = self.last_activity + IDLE_TIMEOUT
        if deadline <= now:
            if self._is_closing:
                self.abort()  # the client does not read the last reply
            else:
                self.interrupt(TIMED_OUT)
            deadline = now + IDLE_TIMEOUT
        self._idle_timer = self._loop.call_at(deadline, self._check_idle)


def _handshake_failure(error: OSError) -> str:
    """Return why a TLS handshake failed, with the likely cause."""
    reason = str(error)  # such as the handshake timeout
    if isinstance(error, ssl.SSLError):
        reason = (error.reason or "").replace("_", " ").lower()
    if reason in ("wrong version number", "http request", "unknown protocol"):
        return f"{reason}; the client sent plain text instead of TLS"
    if "alert" in reason:
        return f"{reason}; the client may not trust the certificate"
    if isinstance(error, ConnectionResetError) or not reason or "eof" in reason:
        return (
            "the client closed the connection; it may not trust the certificate, or it does not"
            " use TLS and waits for the greeting"
        )
    return reason


def client_address(peer: str) -> str:
    """Return the address in what format_address() returns, without brackets."""
    return peer.rpartition(":")[0].strip("[]")


def format_address(sockname: Any) -> str:
    """Return the name of a socket as ADDRESS:PORT, with brackets around an IPv6 address.

    sockname is None or empty for a client that has disconnected already.
    """
    if not sockname:
        return "unknown:0"
    host, port = sockname[:2]
    if "." in host:  # an IPv4 client of an IPv6 socket (RFC 4291 section 2.5.5.2)
        host = host.removeprefix("::ffff:")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


# --- Server ---------------------------------------------------------------------------

# Sessions at the same time, so that a loop in a client cannot exhaust the machine.
MAX_CONNECTIONS = 1000

# Seconds that clients have to read the last reply when the server stops.
STOP_TIMEOUT = 0.5

# Iterations of the event loop in which asyncio passes accepted connections to the server; it needs
# fewer. A connection that it has not passed on when the listening socket is closed stays open.
ACCEPT_ITERATIONS = 10

# Called with each message: a plain function, or one that returns an awaitable.
Handler = Callable[[Envelope], object]


class Server:
    """An SMTP server in the running event loop; `async with` starts and closes it.

    config sets the options; keyword options, named as the fields of Config, take precedence.
    handler(envelope) is called with each message: in a thread if it is a plain function, in
    the event loop if it is async. The reply is 250 when it returns, the reply of the exception
    if it raises SMTPError, and 451 for any other exception. A message is stored in
    config.directory before that. Without a directory, it is stored in the current directory
    if there is no handler, and not at all if there is one.
    on_message(envelope) is called in the event loop with each accepted message, before the reply,
    and on_refusal(refusal) with each Refusal. Raises TypeError or ValueError for an invalid
    option.

    These attributes are set once the server has started: host and port are the first address
    that it listens on, and addresses are all of them. maildir is the Maildir where messages are
    stored, or None. cafile is the file of the temporary certificate, for clients that verify it,
    or None; it exists while the server runs. clients is how many have connected so far.
    """

    def __init__(
        self,
        config: Config | None = None,
        /,
        *,
        handler: Handler | None = None,
        on_message: Callable[[Envelope], object] | None = None,
        on_refusal: Callable[[Refusal], object] | None = None,
        **options: Unpack[Options],
    ) -> None:
        if handler is not None and not callable(handler):
            raise TypeError(f"handler: must be callable, not {handler!r}")
        self.config = with_options(config or Config(), options)
        self.handler = handler
        self.host, self.port = self.config.interface, self.config.port
        self.addresses: list[tuple[str, int]] = []
        self.maildir: Maildir | None = None
        self.cafile: str | None = None
        self.clients = 0
        self._on_message = on_message
        self._on_refusal = on_refusal
        self._rules = Rules(self.config.fail)
        self._storage: StorageThread | None = None
        self._tls_context: ssl.SSLContext | None = None
        self._sockets: list[socket.socket] = []
        self._listening = contextlib.ExitStack()  # closes the listening sockets
        self._cleanup = contextlib.ExitStack()  # removes the certificate, ends the thread
        self._connections: dict[asyncio.Task[None], Connection] = {}
        self._is_closing = False
        self._closed = asyncio.Event()

    async def start(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen on the addresses of the config, or on sockets that listen already.

        Raises OSError if it cannot listen, ValueError for a host name or a certificate that cannot
        be used, mailbox.Error for a directory that cannot be used, and RuntimeError if no thread
        can be started or the server was started before.
        """
        if self._sockets:
            raise RuntimeError("a Server can be started only once; create another one")
        with contextlib.ExitStack() as cleanup:
            opened_here = not sockets
            sockets = sockets or listen(self.config)
            for sock in sockets:
                cleanup.callback(sock.close)
                # Accepted sockets inherit it. asyncio sets it only where sock.proto is IPPROTO_TCP.
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.config.tls is not None:
                self._tls_context = self._make_tls_context(cleanup)
            if self.handler is None or self.config.directory is not None:
                self.maildir = Maildir(self.config.directory)
                self._storage = StorageThread(self.maildir)
                cleanup.callback(self._storage.close)
            self._listening = cleanup.enter_context(contextlib.ExitStack())
            for sock in sockets:
                await self._accept_clients(sock)
                if opened_here:  # others, such as systemd, may go on listening on their sockets
                    self._listening.callback(_free_port, sock)
            self._cleanup = cleanup.pop_all()
        self._sockets = sockets
        self.addresses = [sock.getsockname()[:2] for sock in sockets]
        self.host, self.port = self.addresses[0]

    def _make_tls_context(self, cleanup: contextlib.ExitStack) -> ssl.SSLContext:
        if self.config.cert is not None:
            return make_tls_context(self.config.cert, self.config.key)
        folder = cleanup.enter_context(tempfile.TemporaryDirectory(prefix="dsmtpd-"))
        self.cafile, key = make_certificate(folder)
        return make_tls_context(self.cafile, key)

    async def _accept_clients(self, sock: socket.socket) -> None:
        context = None
        # uvloop reads from a client before it calls _serve_client(), which cannot start TLS
        # then. Where asyncio starts it, a failed handshake is not reported.
        is_uvloop = type(asyncio.get_running_loop()).__module__.startswith("uvloop")
        if self.config.tls == "implicit" and is_uvloop:
            context = self._tls_context
        # asyncio accepts as many connections at a time as the backlog has.
        backlog = max(1, _max_connections() // 2)
        listener = await asyncio.start_server(
            self._serve_client, sock=sock, ssl=context, backlog=backlog
        )
        self._listening.callback(listener.close)

    async def serve_forever(self) -> None:
        """Wait until the server is closed."""
        await self._closed.wait()

    def fail(self, *rules: str) -> None:
        """Replace the failure rules; from any thread. Raises ValueError as parse_rule() does."""
        self._rules.replace(rules)

    async def close(self, quit_timeout: float = 0.0) -> None:
        """Stop listening, send 421 to the clients, and wait for deliveries in progress.

        Before that, the clients that were active in the last quit_timeout seconds have that long
        to send QUIT. An async handler must not wait for it.
        """
        if self._is_closing:
            await self._closed.wait()
            return
        self._is_closing = True
        loop = asyncio.get_running_loop()
        recently = loop.time() - quit_timeout
        await _wait(
            [task for task, client in self._connections.items() if client.last_activity > recently],
            quit_timeout,
        )
        await self._stop_listening()
        for connection in self._connections.values():
            connection.interrupt(SHUTTING_DOWN)
        await _wait(self._connections, STOP_TIMEOUT)
        while self._connections:  # abort() does not end a delivery
            for connection in self._connections.values():
                connection.abort()
            await _wait(self._connections, STOP_TIMEOUT)
        self._cleanup.close()
        self._closed.set()

    async def _stop_listening(self) -> None:
        """Close the listening sockets, after all clients that asyncio has accepted are served."""
        for sock in self._sockets:
            with contextlib.suppress(NotImplementedError):  # on Windows
                asyncio.get_running_loop().remove_reader(sock)  # asyncio accepts no more
        for _ in range(ACCEPT_ITERATIONS):
            await asyncio.sleep(0)
        self._listening.close()

    async def __aenter__(self) -> Server:
        await self.start()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def _serve_client(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.clients += 1
        peer = format_address(writer.get_extra_info("peername"))
        session = Session(self.config, peer, self._rules, self._on_refusal)
        if len(self._connections) >= _max_connections():
            log.warning("%s: Too many connections", peer)
            if self.config.tls != "implicit":
                writer.write(session.end(TOO_MANY_CONNECTIONS))
            writer.close()
            return
        connection = Connection(session, reader, writer, self._deliver, self._tls_context)
        task = asyncio.current_task()
        assert task is not None
        self._connections[task] = connection
        try:
            await connection.run()
        finally:
            del self._connections[task]

    async def _deliver(self, envelope: Envelope) -> Reply:
        """Store the message, call the handler, and return the reply to the end of the content."""
        try:
            if self._storage is not None:
                envelope = replace(envelope, path=await self._storage.store(envelope))
            if self.handler is not None:
                await self._call_handler(self.handler, envelope)
        except SMTPError as error:
            return error.reply
        except (asyncio.CancelledError, KeyboardInterrupt):  # the event loop ends
            log.warning("%s: The delivery was cancelled", envelope.peer)
            raise
        except BaseException:  # such as SystemExit, or that of pytest.fail()
            log.exception("%s: Cannot deliver the message", envelope.peer)
            return DELIVERY_FAILED
        if self._on_message is not None:
            try:
                self._on_message(envelope)
            except Exception:  # the message is delivered: the client must not send it again
                log.exception("%s: on_message failed", envelope.peer)
        if log.isEnabledFor(logging.INFO):
            log.info("%s: %s", envelope.peer, envelope.summary())
        return MESSAGE_ACCEPTED

    async def _call_handler(self, handler: Handler, envelope: Envelope) -> None:
        """Call an async handler in this task, and a plain one in a thread of its own.

        The thread is a daemon, so that a handler that never returns does not keep the program
        from ending.
        """
        if inspect.iscoroutinefunction(handler):
            result = handler(envelope)
        else:
            future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            arguments = (future, handler, envelope)
            threading.Thread(target=call_in_thread, args=arguments, daemon=True).start()
            result = await result_of(future)
        if inspect.isawaitable(result):
            await result


async def _wait(futures: Iterable[asyncio.Future[Any]], timeout: float) -> None:
    """Wait until the futures are done, at most timeout seconds.

    A timer of the event loop would never expire in a test that has stopped the clock.
    """
    futures = list(futures)
    if not futures or not timeout:
        return
    waiting = asyncio.ensure_future(asyncio.wait(futures))
    loop = asyncio.get_running_loop()
    timer = threading.Timer(timeout, loop.call_soon_threadsafe, [waiting.cancel])
    timer.start()
    try:
        await asyncio.wait([waiting])
    finally:
        timer.cancel()


def _max_connections() -> int:
    """Return half of the limit of open files, at most MAX_CONNECTIONS.

    Windows has no such limit.
    """
    try:
        import resource
    except ImportError:
        return MAX_CONNECTIONS
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if limit == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, limit // 2)


def client_host(host: str) -> str:
    """Return the address for clients on this machine of a server that listens on host."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def listen(config: Config) -> list[socket.socket]:
    """Return a listening socket for each address of config.interface, all on one port.

    Raises OSError if it cannot listen there, and ValueError for an invalid host name.
    """
    found = socket.getaddrinfo(config.interface, config.port, type=socket.SOCK_STREAM)
    addresses = dict.fromkeys((family, name) for family, _, _, _, name in found)  # each one once
    attempts = 1 if config.port else 20
    while True:
        try:
            return _bind(addresses, config.reuse_port)
        except OSError as error:
            # The free port of the first address may be in use on the second one.
            attempts -= 1
            if not attempts or error.errno != errno.EADDRINUSE:
                raise


def _bind(addresses: Iterable[tuple[int, Any]], reuse_port: bool) -> list[socket.socket]:
    """Return a listening socket for each of the addresses that is available."""
    sockets: list[socket.socket] = []
    errors: list[OSError] = []
    for family, (host, port, *scope) in addresses:
        if sockets:
            port = sockets[0].getsockname()[1]
        address = (host, port, *scope)
        # The address of all interfaces stands for those of IPv4 as well.
        dualstack = host == "::" and socket.has_dualstack_ipv6()
        try:
            sock = socket.create_server(
                address, family=family, reuse_port=reuse_port, dualstack_ipv6=dualstack
            )
            sockets.append(sock)
        except OSError as error:
            errors.append(error)
    unavailable = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
    errors.sort(key=lambda error: error.errno in unavailable)
    if errors and (not sockets or errors[0].errno not in unavailable):
        for sock in sockets:
            sock.close()
        raise errors[0]
    return sockets


def _free_port(sock: socket.socket) -> None:
    """Free the port, even if a forked process has a copy of the socket."""
    with contextlib.suppress(OSError):  # only Linux can do it
        sock.shutdown(socket.SHUT_RDWR)


def make_tls_context(
    cert: str | os.PathLike[str], key: str | os.PathLike[str] | None = None
) -> ssl.SSLContext:
    """Return a TLS context with this certificate.

    Raises ValueError; its text names the file and what is wrong with it.
    """

    def refuse_passphrase() -> str:  # without it, OpenSSL asks for one on the terminal
        raise ValueError("the key is encrypted; use a key without a passphrase")

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.num_tickets = 0  # libesmtp 1.1 hangs after session tickets of TLS 1.3
    try:
        for path in (cert, key or cert):  # the errors of load_cert_chain() do not name the file
            with open(path, "rb"):
                pass
        context.load_cert_chain(cert, key, refuse_passphrase)
    except (OSError, ValueError) as error:
        reason = str(error)
        if isinstance(error, ssl.SSLError):
            reason = (error.reason or "PEM").replace("_", " ").lower()
            if "pem" in reason:
                reason = "not a certificate and its private key in PEM format"
            if key is None:
                reason += "; --key names the file of the key"
        files = f"{os.fspath(cert)} with key {os.fspath(key or cert)}"
        raise ValueError(f"cannot use certificate {files}: {reason}") from error
    return context


# Works with OpenSSL 1.1.1 and LibreSSL 3.1 or newer.
OPENSSL_COMMAND = (
    "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 30"
    " -subj /CN=localhost -addext subjectAltName=DNS:localhost,IP:127.0.0.1,IP:::1"
    " -keyout key.pem -out cert.pem"
)


def make_certificate(directory: str) -> tuple[str, str]:
    """Create a self-signed certificate for localhost; return its file and that of its key.

    Raises ValueError if the openssl program fails or is missing.
    """
    try:
        subprocess.run(OPENSSL_COMMAND.split(), cwd=directory, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(
            f"cannot create a certificate ({error}); create one on a machine with OpenSSL,"
            f" by '{OPENSSL_COMMAND}', and use --cert cert.pem --key key.pem"
        ) from error
    return f"{directory}/cert.pem", f"{directory}/key.pem"


# --- Testing --------------------------------------------------------------------------

# Seconds after its last message that a client has to send QUIT when the block of capture() ends.
QUIT_GRACE = 0.1

# Seconds that a handler has to return when the block of capture() ends, or when the program stops
# because of --expect, --timeout or the end of the command.
HANDLER_TIMEOUT = 10.0


class Inbox:
    """What a server of capture() has accepted and refused; all methods are thread-safe.

    host and port are the address to send to. url is both, such as "smtp://127.0.0.1:1025", with
    smtps:// for implicit TLS. cafile is the file of the temporary certificate, for clients that
    verify it, or None.
    """

    def __init__(self) -> None:
        self.host = ""
        self.port = 0
        self.url = ""
        self.cafile: str | None = None
        self._server: Server
        self._messages: list[Envelope] = []
        self._refused: list[Refusal] = []
        self._changed = threading.Condition()

    @property
    def messages(self) -> list[Envelope]:
        """The accepted messages, oldest first."""
        return list(self._messages)

    @property
    def refused(self) -> list[Refusal]:
        """The refused commands and messages, oldest first."""
        return list(self._refused)

    def fail(self, *rules: str) -> None:
        """Replace the failure rules of the server; without arguments, remove them.

        Raises ValueError for a rule that does not parse.
        """
        self._server.fail(*rules)

    def clear(self) -> None:
        """Forget all messages and refusals."""
        with self._changed:
            self._messages.clear()
            self._refused.clear()

    def _add_message(self, envelope: Envelope) -> None:
        with self._changed:
            self._messages.append(envelope)
            self._changed.notify_all()

    def wait(
        self,
        *,
        to: str | None = None,
        mail_from: str | None = None,
        subject: str | None = None,
        timeout: float = 5.0,
    ) -> Envelope:
        """Return the first message that matches, as soon as it has arrived.

        to is one of the recipients, mail_from is the sender, and subject is a part of the
        decoded subject. Raises TimeoutError after timeout seconds; its text lists what the
        server received and refused instead.
        """
        __tracebackhide__ = True  # pytest shows the call in the test
        (message,) = self.wait_for(1, to=to, mail_from=mail_from, subject=subject, timeout=timeout)
        return message

    def wait_for(
        self,
        count: int,
        *,
        to: str | None = None,
        mail_from: str | None = None,
        subject: str | None = None,
        timeout: float = 5.0,
    ) -> list[Envelope]:
        """Return the first count messages that match, as wait() does for one."""
        __tracebackhide__ = True
        criteria = {"to": to, "mail_from": mail_from, "subject": subject}

        def matching() -> list[Envelope]:
            return [message for message in self._messages if _matches(message, **criteria)]

        with self._changed:
            self._changed.wait_for(lambda: len(matching()) >= count, timeout)
            found = matching()
        if len(found) >= count:
            return found[:count]
        given = [f"{name} {text!r}" for name, text in criteria.items() if text is not None]
        raise TimeoutError(
            f"{len(found)} of {count} messages{' with ' if given else ''}{', '.join(given)}"
            f" within {timeout:g} seconds; {self.report()}"
        )

    async def wait_async(
        self,
        *,
        to: str | None = None,
        mail_from: str | None = None,
        subject: str | None = None,
        timeout: float = 5.0,
    ) -> Envelope:
        """Do the same as wait() in a test whose event loop sends the message."""
        __tracebackhide__ = True
        return await asyncio.to_thread(
            self.wait, to=to, mail_from=mail_from, subject=subject, timeout=timeout
        )

    def report(self) -> str:
        """Return what the server has received and refused, as lines of text."""
        lines = []
        for message in self.messages:
            lines += [f"received {message.summary()}", *(f"  {text}" for text in message.warnings)]
        for refusal in self.refused:
            command = f"{refusal.verb} {refusal.argument}".strip()
            lines.append(f"refused {command}: {refusal.reply}")
        if not lines:
            clients = self._server.clients
            if clients:
                return f"nothing arrived from the clients that connected: {clients}"
            return "nothing arrived, and no client connected"
        return "\n".join(["the server:", *lines])


def _matches(message: Envelope, to: str | None, mail_from: str | None, subject: str | None) -> bool:
    return (
        (to is None or to in message.rcpt_tos)
        and (mail_from is None or mail_from == message.mail_from)
        and (subject is None or subject in message.subject)
    )


@contextlib.contextmanager
def capture(*, handler: Handler | None = None, **options: Unpack[Options]) -> Iterator[Inbox]:
    """Run a server in a background thread for the block of a with statement; yield an Inbox.

    Example::

        with dsmtpd.capture() as inbox:  # send to inbox.host and inbox.port
            message = inbox.wait(to="you@example.com")

    options are the fields of Config. By default, the port is a free one, and messages are
    kept in memory only; with `directory` they are stored there. handler is the same as for
    Server. Raises what Server and Server.start() raise, and RuntimeError at the end of the
    block if the handler does not return.
    """
    config = with_options(Config(port=0), options)
    if handler is None and config.directory is None:
        handler = _discard_message  # the inbox keeps it
    inbox = Inbox()
    inbox._server = server = Server(
        config, handler=handler, on_message=inbox._add_message, on_refusal=inbox._refused.append
    )
    with _run_in_thread(server):
        inbox.host, inbox.port = client_host(server.host), server.port
        scheme = "smtps" if config.tls == "implicit" else "smtp"
        inbox.url = f"{scheme}://{format_address((inbox.host, inbox.port))}"
        inbox.cafile = server.cafile
        yield inbox


@contextlib.contextmanager
def _run_in_thread(server: Server) -> Iterator[None]:
    """Run a server in a background thread for the block of a with statement."""
    started: concurrent.futures.Future[None] = concurrent.futures.Future()
    stopped: concurrent.futures.Future[None] = concurrent.futures.Future()

    async def serve() -> None:
        await server.start()
        started.set_result(None)
        await asyncio.wrap_future(stopped)
        # The block may end before the client has got the reply, which follows on_message.
        await server.close(QUIT_GRACE)

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)

    thread = threading.Thread(target=run, name="dsmtpd", daemon=True)
    try:
        thread.start()
        started.result()
        yield
    finally:
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            stopped.set_result(None)  # unless a handler has ended the event loop
        # While the interpreter ends, a daemon thread is alive but does not run.
        if thread.is_alive() and not sys.is_finalizing():
            thread.join(HANDLER_TIMEOUT)
    if thread.is_alive() and not sys.is_finalizing():
        cause = "a message is still being stored"
        if server.handler not in (None, _discard_message):
            cause = f"the handler {server.handler!r} has not returned"
        raise RuntimeError(f"the server did not stop within {HANDLER_TIMEOUT:g} s: {cause}")


async def _discard_message(envelope: Envelope) -> None:
    """Handler that does nothing."""


def pytest_configure(config: Any) -> None:
    """Register the fixture `smtpd` and its marker; pytest calls this for a plug-in."""
    import pytest

    config.addinivalue_line(
        "markers", "smtpd(**options): options of dsmtpd.capture() for the fixture smtpd"
    )
    if "smtpdfix.fixture" in sys.modules:  # another plug-in with a fixture of this name
        return

    class Fixtures:
        @pytest.fixture
        def smtpd(self, request: pytest.FixtureRequest) -> Iterator[Inbox]:
            """The Inbox of a server that runs during the test."""
            options: dict[str, Any] = {}
            for marker in reversed(list(request.node.iter_markers("smtpd"))):
                if marker.args:
                    raise TypeError("the options of the marker smtpd are keyword arguments")
                options.update(marker.kwargs)
            with capture(**options) as inbox:
                yield inbox

        @pytest.hookimpl(tryfirst=True)
        def pytest_runtest_makereport(self, item: pytest.Item, call: Any) -> None:
            """Add a section to the report of a failed test: what its server has received."""
            inbox = item.funcargs.get("smtpd") if isinstance(item, pytest.Function) else None
            if call.excinfo is not None and isinstance(inbox, Inbox):
                item.add_report_section(call.when, "smtpd", inbox.report())

    config.pluginmanager.register(Fixtures(), "dsmtpd fixtures")


# --- Command line ---------------------------------------------------------------------

# Characters of each part of a message that --print shows.
MAX_PRINTED_LENGTH = 100_000


_HELP = f"""\
A local SMTP server that stores every message in a Maildir and never delivers
it. With a COMMAND, it runs until the command ends.

listening and storing:
  -p, --port PORT          Listen on this port ({Config.port}); 0 selects a free one.
  -i, --interface ADDRESS  Listen on this address ({Config.interface}), or on all
                           addresses of a host name.
  -d, --directory DIR      Store messages in this Maildir (the current
                           directory, or a temporary one with a COMMAND).

looking at messages:
  --print                  Print each message.
  --html DIR               Write each message as a page for a browser into DIR.
  --json                   Print each event as one line of JSON.
  -o, --output FILE        Append the output of --print or --json to this file.
  -v, --verbose            Log each session as C: and S: lines.
  -q, --quiet              Log only warnings and errors.

testing:
  --expect N               Exit with status 1 if fewer than N messages arrive,
                           or, with 0, if any does. Without a COMMAND, stop
                           after N messages.
  --timeout SECONDS        Stop after this time.
  --fail RULE              Make a command or a message fail; repeatable. RULE
                           is 'VERB GLOB [xN] ACTION'. VERB is CONNECT, a
                           command, or . for a message. ACTION is CODE [x.y.z]
                           [text] [drop], delay SECONDS, drop or ok.
  --strict                 Reject messages with warnings.
  --ignore NAME            Do not give warnings of this name; repeatable.

SMTP:
  --tls MODE               Use TLS 1.2 or newer. MODE is starttls to offer
                           STARTTLS, required to reject clients without it, or
                           implicit to start with TLS.
  --cert PEM               Use this certificate (a temporary one for localhost).
  --key PEM                Use this private key (the one in the --cert file).
  --auth USER:PASSWORD     Require this login; repeatable. Without it, any
                           login succeeds.
  -s, --max-size BYTES     Reject larger messages ({Config.max_size}); 0 means no limit.
  --without KEYWORD        Do not offer this extension; repeatable.
  --disable-smtputf8       The same as --without SMTPUTF8.

other:
  --handler MODULE:CALLABLE
                           Call this with each message instead of storing it;
                           with -d, after storing it.
  --reuse-port             Share the port with other servers.
  --version                Print the version.
  -h, --help               Print the options.

Examples:
  Store and print each message:
      dsmtpd -d mail --print

  Run tests that send to SMTP_HOST and SMTP_PORT; fail if they send nothing:
      dsmtpd -p 0 --expect 1 -- make test

  Refuse messages to one address:
      dsmtpd --fail 'RCPT full@* 452 4.2.2 Mailbox full'

Exit status: 0 normal end, 1 an expectation was not met, 2 wrong usage, or a
directory, file, certificate or handler that cannot be used, 3 cannot listen.
With a COMMAND that ran, it is that of the command, unless the command succeeded
and an expectation was not met.
"""


class _Parser(argparse.ArgumentParser):
    def format_help(self) -> str:
        """Return the text of --help."""
        return f"{self.format_usage()}\n{_HELP}"


def _make_parser() -> argparse.ArgumentParser:
    usage = "dsmtpd [options] [-- COMMAND [ARG ...]]"
    parser = _Parser(prog="dsmtpd", usage=usage, allow_abbrev=False)
    add = parser.add_argument
    add("-p", "--port", type=int, default=Config.port)
    add("-i", "--interface", default=Config.interface)
    add("-d", "--directory")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--print", action="store_true")
    output.add_argument("--json", action="store_true")
    add("--html")
    add("-o", "--output")
    add("-v", "--verbose", action="store_true")
    add("-q", "--quiet", action="store_true")
    add("--expect", type=int)
    add("--timeout", type=float)
    add("--fail", action="append", default=[])
    add("--strict", action="store_true")
    add("--ignore", action="append", default=[])
    add("--tls")
    add("--cert")
    add("--key")
    add("--auth", type=_credentials, action="append", default=[])
    add("-s", "--max-size", type=_size, default=Config.max_size)
    add("--without", action="append", default=[])
    add("--disable-smtputf8", dest="smtputf8", action="store_false")
    add("--handler")
    add("--reuse-port", action="store_true")
    add("--version", action="version", version=f"dsmtpd {__version__}")
    return parser


def _size(text: str) -> int:
    if not re.fullmatch("[0-9]{1,18}", text):
        raise argparse.ArgumentTypeError(
            f"must be a number of bytes, such as {Config.max_size}, not {text}"
        )
    return int(text)


def _credentials(text: str) -> tuple[str, str]:
    user, colon, password = text.partition(":")
    if not user or not colon:
        raise argparse.ArgumentTypeError("must be USER:PASSWORD")
    return user, password


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, by default sys.argv.

    Returns the options, with the Config as `config` and the command after "--" as `command`.
    Wrong usage ends the program with status 2.
    """
    if argv is None:
        argv = sys.argv[1:]
    end_of_options = argv.index("--") if "--" in argv else len(argv)
    parser = _make_parser()
    args, unknown = parser.parse_known_args(argv[:end_of_options])
    args.auth = dict(args.auth)
    args.command = argv[end_of_options + 1 :]
    if "--" in argv and not args.command:
        parser.error("expected a command after --, such as: dsmtpd -p 0 -- pytest")
    options = vars(args)  # each field of Config is the name of an option
    try:
        args.config = Config(**{item.name: options[item.name] for item in fields(Config)})
        _check_options(args)
    except ValueError as error:
        parser.error(str(error))
    if unknown:  # checked last: the error about a rule without quotes says more
        parser.error(f"unrecognized arguments: {' '.join(unknown)}; a command goes after --")
    return args


def _check_options(args: argparse.Namespace) -> None:
    """Raise ValueError for a value that cannot be used; Config checks its own."""
    for name in ("directory", "html", "output", "handler"):
        if vars(args)[name] == "":  # such as of a variable that is not set
            raise ValueError(f"{name}: must not be empty")
    if args.output and not (args.print or args.json):
        raise ValueError("output: requires --print or --json")
    if args.expect is not None and args.expect < 0:
        raise ValueError("expect: must be a number of messages, such as 1, or 0 for none")
    if args.timeout is not None and not args.timeout > 0:
        raise ValueError("timeout: must be a number of seconds above 0")


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the program; raises SystemExit with the exit status."""
    # A handler that imports dsmtpd gets this module, even when it runs as a script.
    sys.modules.setdefault("dsmtpd", sys.modules[__name__])
    args = parse_args(argv)
    logging.basicConfig(format="%(asctime)s %(levelname)s: %(message)s")
    # asyncio warns of each write to a client that has disconnected.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    level = logging.WARNING if args.quiet else logging.INFO
    log.setLevel(logging.DEBUG if args.verbose else level)
    # A zipapp ignores what main() returns.
    sys.exit(asyncio.run(_Program(args).run()))


# Seconds between SIGTERM and SIGKILL for a command that exceeds --timeout.
KILL_TIMEOUT = 5.0


class _Program:
    """One run of the program: the server, its outputs, the command and the signals."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._cleanup = contextlib.ExitStack()  # the output file and the temporary Maildir
        self._text: _Output | None = None  # --print or --json
        self._pages: _Output | None = None  # --html
        self._page_url = ""
        self._command: subprocess.Popen[bytes] | None = None  # while it runs
        self._stop = asyncio.Event()
        self._signal = 0  # the one that stops the program
        self._received = 0  # messages
        self._refused = 0  # commands and messages
        self._rejected = 0  # messages, by --strict

    async def run(self) -> int:
        """Run until the program is stopped; return the exit status."""
        _handle_signals(self._on_signal)
        _tick(asyncio.get_running_loop())
        with self._cleanup:
            try:
                server = self._make_server()
                await self._start(server)
            except (OSError, RuntimeError, ValueError, mailbox.Error) as error:
                if self._signal:  # it may be the reason: the terminal interrupts openssl as well
                    return self._interrupted_status
                log.error("Cannot start: %s", error)
                return 2
            await self._log_start(server)
            status = 0
            if self._args.command:
                status = await self._run_command(server)
            else:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._stop.wait(), self._args.timeout)
            log.info("Cleaning up")
            await self._close(server)
        expectation_status = self._check_expectation()
        return status or expectation_status

    def _on_signal(self, number: int, frame: object) -> None:
        if self._command is None:
            _handle_signals(signal.SIG_DFL)  # the next one ends the program
            self._signal = number
            with contextlib.suppress(RuntimeError):  # the event loop has ended
                asyncio.get_running_loop().call_soon_threadsafe(self._stop.set)
        elif signal.Signals(number).name in ("SIGTERM", "SIGHUP"):
            _send_signal(self._command, number)  # Ctrl-C comes from the terminal

    @property
    def _interrupted_status(self) -> int:
        """The exit status after a signal if the command has not run."""
        return 128 + self._signal if self._args.command else 0

    def _make_server(self) -> Server:
        handler = _load_handler(self._args.handler) if self._args.handler else None
        config = self._args.config
        if self._args.command and not config.directory and not handler:
            directory = tempfile.TemporaryDirectory(prefix="dsmtpd-", ignore_cleanup_errors=True)
            config = replace(config, directory=self._cleanup.enter_context(directory))
        return Server(
            config, handler=handler, on_message=self._on_message, on_refusal=self._on_refusal
        )

    async def _start(self, server: Server) -> None:
        await server.start(_systemd_sockets() or _listen(server.config))
        try:
            self._open_outputs()
        except OSError:
            await server.close()
            raise

    def _open_outputs(self) -> None:
        if self._args.print or self._args.json:
            path = self._args.output
            if path is None and sys.stdout is None:
                raise OSError("standard output is closed")
            # It has no buffer, and so no lock: at its end, Python would wait for a thread that
            # is writing to sys.stdout.
            file = io.FileIO(path or sys.stdout.fileno(), "a", closefd=bool(path))
            self._cleanup.enter_context(file)
            encoding = "utf-8" if path else sys.stdout.encoding
            self._text = _Output(path or "standard output", partial(_write_text, file, encoding))
        if self._args.html:
            pages = PageDirectory(self._args.html)
            self._pages, self._page_url = _Output(self._args.html, pages.add), pages.url

    async def _log_start(self, server: Server) -> None:
        """Log where the server listens and what it does with messages."""
        for host, port in server.addresses:
            log.info("Starting dsmtpd %s at %s", __version__, format_address((host, port)))
            self._put_event("listening", host=host, port=port, version=__version__)
        if self._args.handler:
            log.info("Handing the incoming emails to %s", self._args.handler)
        if self._args.html:
            log.info("Open %s", self._page_url)
        if server.maildir is not None:
            path = server.maildir.path
            log.info("Storing the incoming emails into %s", path)
            # The server listens already, and counting may take a second.
            count = await asyncio.to_thread(len, server.maildir)
            log.info("Found a Maildir storage with %s mails", count)
            names = {entry.name for entry in path.glob("[!.]*")}
            if server.config.directory is None and names - {"cur", "new", "tmp"}:
                log.warning("%s has other files too; -d DIR selects another directory", path)

    async def _run_command(self, server: Server) -> int:
        """Run the command; return its exit status as a shell does."""
        if self._signal:
            return self._interrupted_status
        if hasattr(signal, "SIGCHLD"):
            # If the parent process ignores it, the exit status of the command would be lost.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        try:
            self._command = command = self._start_command(server)
        except OSError as error:
            log.error("Cannot run %s: %s", self._args.command[0], error.strerror)
            return 127
        if self._signal:  # it came while the command was started
            _send_signal(command, self._signal)
        status = await self._wait_for_command(command)
        self._command = None
        return status if status >= 0 else 128 - status

    def _start_command(self, server: Server) -> subprocess.Popen[bytes]:
        env = {**os.environ, "SMTP_HOST": client_host(server.host), "SMTP_PORT": str(server.port)}
        if server.maildir is not None:
            env["DSMTPD_MAILDIR"] = str(server.maildir.path)
        if server.cafile is not None:
            env["DSMTPD_CAFILE"] = server.cafile
        return subprocess.Popen(self._args.command, env=env)

    async def _wait_for_command(self, command: subprocess.Popen[bytes]) -> int:
        """Wait until the command ends, or end it after --timeout; return its exit status."""
        name = self._args.command[0]
        try:
            return await asyncio.to_thread(command.wait, self._args.timeout)
        except subprocess.TimeoutExpired:
            log.warning("Timeout: sending SIGTERM to %s", name)
            _send_signal(command, signal.SIGTERM)
        try:
            await asyncio.to_thread(command.wait, KILL_TIMEOUT)
        except subprocess.TimeoutExpired:
            log.warning("Timeout: sending SIGKILL to %s", name)
            with contextlib.suppress(PermissionError):  # it runs as another user
                command.kill()
        return await asyncio.to_thread(command.wait) or -signal.SIGTERM  # servers end with 0

    async def _close(self, server: Server) -> None:
        quit_timeout = 0.0 if self._signal else STOP_TIMEOUT  # for the client of the last message
        # After a signal, a second one ends the program if the handler does not return.
        timeout = HANDLER_TIMEOUT if self._args.handler and not self._signal else None
        closing = asyncio.ensure_future(server.close(quit_timeout))
        await asyncio.wait([closing], timeout=timeout)
        for output in (self._text, self._pages):
            if output is not None:
                output.close()
        if not closing.done():
            text = "The handler %s did not return within %g s"
            log.error(text, self._args.handler, HANDLER_TIMEOUT)
            os._exit(1)  # asyncio.run() would wait for it
        if self._args.html and self._args.command and self._received:
            log.info("Open %s", self._page_url)

    def _check_expectation(self) -> int:
        """Return the exit status, and log why it is not 0."""
        expected = self._args.expect
        if expected is None:
            return 0
        is_met = self._received == 0 if expected == 0 else self._received >= expected
        if is_met and not self._rejected:
            return 0
        text = "Expected messages: %d, arrived: %d, rejected by --strict: %d, refused commands: %d"
        if not self._received and not self._refused:
            text += "; the fixture smtpd and Django's test backend do not send to this server"
        log.error(text, expected, self._received, self._rejected, self._refused)
        return 1

    def _on_message(self, envelope: Envelope) -> None:
        self._received += 1
        expected = self._args.expect
        if expected is not None and self._received >= expected and not self._args.command:
            self._stop.set()
        size = len(envelope.content) + 1000 * len(envelope.rcpt_tos)  # an estimate
        if self._text is not None:
            get_text = _message_event if self._args.json else _as_text
            self._text.put(partial(get_text, envelope), size)
        if self._pages is not None:
            self._pages.put(envelope, size)

    def _on_refusal(self, refusal: Refusal) -> None:
        self._refused += 1
        if refusal.verb == "." and refusal.reply.text.partition(":")[0] in WARNINGS:
            self._rejected += 1
        self._put_event(
            "refused",
            time=refusal.time.isoformat(),
            peer=refusal.peer,
            verb=refusal.verb,
            argument=refusal.argument,
            code=refusal.reply.code,
            status=refusal.reply.status,
            text=refusal.reply.text,
        )

    def _put_event(self, event: str, **values: object) -> None:
        if self._text is not None and self._args.json:
            self._text.put(partial(_json_line, event, **values), 1000)  # an estimate


def _handle_signals(handler: Callable[[int, object], object] | signal.Handlers) -> None:
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
        number = signal.Signals.__members__.get(name)
        # What the parent process ignores stays ignored; nohup does that for SIGHUP.
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def _tick(loop: asyncio.AbstractEventLoop) -> None:
    """Wake the event loop regularly: it handles a signal that came just before it waited."""
    loop.call_later(0.5, _tick, loop)


def _send_signal(command: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(PermissionError):  # it runs as another user
        command.send_signal(number)


_LISTEN_ERRORS = {
    errno.EADDRINUSE: "the port is in use; use another one, or -p 0 for any free port",
    errno.EADDRNOTAVAIL: "this machine does not have that address",
    errno.EACCES: "ports below 1024 are reserved for root; use -p 1025 or contrib/dsmtpd.socket",
}


def _listen(config: Config) -> list[socket.socket]:
    """Return listening sockets, or end the program."""
    try:
        return listen(config)
    except (OSError, UnicodeError) as error:
        address = format_address((config.interface, config.port))
        reason: str | None = "not a valid host name"
        if isinstance(error, OSError):
            reason = _LISTEN_ERRORS.get(error.errno or 0, error.strerror)
        log.error("Cannot listen on %s: %s", address, reason)
        sys.exit(3)


def _systemd_sockets() -> list[socket.socket]:
    """Return the listening sockets that systemd passes to this process (sd_listen_fds(3))."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = int(os.environ.get("LISTEN_FDS") or 0)
    return [socket.socket(fileno=3 + number) for number in range(count)]


def _load_handler(name: str) -> Handler:
    """Return the callable MODULE:CALLABLE. Raises ValueError if there is none."""
    sys.path.append(os.getcwd())  # last: a json.py there does not replace the standard one
    try:
        handler: object = pkgutil.resolve_name(name)
    except (Exception, SystemExit) as error:  # the module may raise anything
        raise ValueError(f"--handler {name}: {type(error).__name__}: {error}") from error
    if not callable(handler):
        raise ValueError(f"--handler {name}: must be MODULE:CALLABLE, such as my_file:my_function")
    return handler


# Seconds that the end of the program waits for an output that nobody reads.
OUTPUT_TIMEOUT = 2.0

# Octets of messages that may wait for an output.
MAX_WAITING_OUTPUT = 64 * 1024 * 1024


class _Output:
    """A thread that writes items one after another, so that nothing else waits for them.

    write(item) is called in the thread; name is what it writes to, for the log.
    """

    def __init__(self, name: str, write: Callable[[Any], object]) -> None:
        self._name = name
        self._write = write
        self._queue: queue.SimpleQueue[tuple[Any, int] | None] = queue.SimpleQueue()
        self._added = 0  # octets, counted by the event loop
        self._finished = 0  # octets, counted by the thread
        self._has_warned = False
        # A daemon does not keep the program from ending.
        self._thread = threading.Thread(target=self._run, name="dsmtpd output", daemon=True)
        self._thread.start()

    def put(self, item: object, size: int) -> None:
        """Have the thread write an item of about size octets."""
        waiting = self._added - self._finished
        if waiting and waiting + size > MAX_WAITING_OUTPUT:
            self._warn("too much is waiting")
        else:
            self._added += size
            self._queue.put((item, size))

    def close(self) -> None:
        """Wait until everything is written, as long as there is progress."""
        self._queue.put(None)
        finished = -1
        while self._thread.is_alive() and self._finished > finished:
            finished = self._finished
            self._thread.join(OUTPUT_TIMEOUT)
        if self._thread.is_alive():
            log.error("Cannot write to %s in time: the rest is lost", self._name)

    def _run(self) -> None:
        while (entry := self._queue.get()) is not None:
            item, size = entry
            try:
                self._write(item)
            except OSError as error:
                self._warn(str(error))
            except Exception:
                log.exception("Cannot write to %s", self._name)
            self._finished += size

    def _warn(self, reason: str) -> None:
        """Log the first reason why something is lost."""
        if not self._has_warned:
            log.warning("Cannot write to %s: %s", self._name, reason)
        self._has_warned = True


def _write_text(file: io.FileIO, encoding: str, get_text: Callable[[], str]) -> None:
    rest = memoryview(get_text().encode(encoding, "backslashreplace"))
    while rest:
        rest = rest[file.write(rest) :]


def _json_line(event: str, **values: object) -> str:
    import json

    return json.dumps({"event": event, **values}) + "\n"


def _message_event(envelope: Envelope) -> str:
    """Return a message as a line of JSON."""
    names = (
        "peer helo tls user mail_from mail_options rcpt_tos rcpt_options subject text html links"
    )
    return _json_line(
        "message",
        time=envelope.received.isoformat(),
        **{name: getattr(envelope, name) for name in names.split()},
        attachments=[
            {"name": item.name, "type": item.type, "size": len(item.content)}
            for item in envelope.attachments
        ],
        size=len(envelope.content),
        warnings=envelope.warnings,
        path=envelope.path and os.fsencode(envelope.path).decode("utf-8", "replace"),
    )


_MESSAGE_START = "---------- MESSAGE FOLLOWS ----------"


def _as_text(envelope: Envelope) -> str:
    """Return a message for a person, with what a terminal would interpret escaped."""
    header = header_section(envelope.content)
    lines = [
        f"{name}: {decode_words(value)}"
        for name in ("From", "To", "Cc", "Reply-To", "Date")
        for value in find_fields(header, name)
    ]
    lines.append(f"Subject: {envelope.subject}")
    lines.append(f"Envelope: {envelope.mail_from} -> {', '.join(envelope.rcpt_tos)}")
    if envelope.path is not None:
        lines.append(f"File: {envelope.path}")
    links = [f"  {url}" for url in envelope.links]
    attachments = [
        f"  {item.name or 'unnamed'} ({item.type}, {len(item.content)} bytes)"
        for item in envelope.attachments
    ]
    parts = [_shorten(_escape_lines(lines)), _print_text(envelope)]
    if envelope.html:
        parts.append(f"HTML: {len(envelope.html)} characters")
    if links:
        parts.append(_shorten(_escape_lines(["Links:", *links])))
    if attachments:
        parts.append(_shorten(_escape_lines(["Attachments:", *attachments])))
    text = "\n\n".join(parts)
    return f"{_MESSAGE_START}\n{text}\n------------ END MESSAGE ------------\n"


def _escape_lines(lines: list[str]) -> str:
    return "\n".join(map(escape_unprintable, lines))


def _print_text(envelope: Envelope) -> str:
    """Return the readable text of a message, or the size of binary content."""
    text = readable_text(envelope)
    if "\0" in text:
        return f"({len(text.encode())} bytes of binary content)"
    return _escape_lines(_shorten(text.rstrip()).split("\n"))


def _shorten(text: str) -> str:
    rest = len(text) - MAX_PRINTED_LENGTH
    return f"{text[:MAX_PRINTED_LENGTH]}\n({rest} more characters)" if rest > 0 else text


if __name__ == "__main__":
    main()
