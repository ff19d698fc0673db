"""A local SMTP server that stores every message in a Maildir and never delivers it.

Usage::

    python dsmtpd.py -p 1025 -d mail

It is meant for development and CI: each message that an application sends becomes a file in
mail/new/.

It implements RFC 5321 (SMTP), RFC 1870 (SIZE), RFC 6152 (8BITMIME), RFC 6531 (SMTPUTF8),
RFC 2920 (PIPELINING), RFC 2034 and RFC 3463 (ENHANCEDSTATUSCODES), RFC 3461 (DSN),
RFC 3030 (CHUNKING, BINARYMIME), RFC 3207 (STARTTLS), RFC 4954 (AUTH: PLAIN, LOGIN, XOAUTH2).
Where these leave a choice, it does what Postfix does.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import binascii
import codecs
import concurrent.futures
import contextlib
import email
import errno
import html
import importlib
import inspect
import io
import logging
import mailbox
import operator
import os
import queue
import re
import signal
import socket
import sys
import threading
import time
import unicodedata
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timezone
from email.utils import format_datetime
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache, partial
from html.entities import html5
from itertools import count, groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO
from urllib.parse import unquote_to_bytes

if TYPE_CHECKING:
    import email.message
    import email.policy
    import ssl

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
    "SIZE 8BITMIME SMTPUTF8 PIPELINING ENHANCEDSTATUSCODES CHUNKING BINARYMIME DSN HELP"
    " STARTTLS AUTH".split()
)


@dataclass(frozen=True)
class Config:
    """The options of a server, named as on the command line.

    Raises TypeError or ValueError for an invalid value; the text names the option and what
    it accepts.
    """

    interface: str = "127.0.0.1"
    """Address or host name to listen on; a name means all of its addresses."""
    port: int = 1025
    """TCP port; 0 selects a free one."""
    directory: str | os.PathLike[str] | None = None
    """Maildir to store messages in. None means the current directory, or that messages are not
    stored if the server has a handler."""
    max_size: int = 33_554_432
    """Maximum size of a message in octets (RFC 1870); 0 means no limit."""
    smtputf8: bool = True
    """Whether the SMTPUTF8 extension (RFC 6531) is offered."""
    without: Sequence[str] = ()
    """Keywords of the EHLO reply that are not offered, such as "CHUNKING"."""
    tls: str | None = None
    """None for no TLS, "starttls" (RFC 3207), "required" for STARTTLS before anything else, or
    "implicit" (RFC 8314)."""
    cert: str | os.PathLike[str] | None = None
    """PEM file of the certificate; None creates a temporary one for localhost."""
    key: str | os.PathLike[str] | None = None
    """PEM file of the private key; None if the file of the certificate contains it."""
    auth: Mapping[str, str] = field(default_factory=dict, repr=False, hash=False)
    """{user: password} of the users who may log in. Sending then requires a login (RFC 4954
    section 6). If it is empty, every login succeeds and none is required."""
    fail: Sequence[str] = ()
    """Failure rules in the syntax of parse_rule(); the first rule that matches applies."""
    strict: bool = False
    """Whether to reject messages that lint() warns about."""
    ignore: Sequence[str] = ()
    """Names of warnings that are not given."""
    reuse_port: bool = False
    """Whether several servers may listen on the same port and share its clients."""

    def __post_init__(self) -> None:
        self._check_types()
        object.__setattr__(self, "fail", tuple(self.fail))  # a Config is hashable
        object.__setattr__(self, "ignore", tuple(self.ignore))
        object.__setattr__(self, "without", tuple(word.upper() for word in self.without))
        if not self.interface.strip():
            raise ValueError("interface: must be an address or a host name, such as 127.0.0.1")
        if not 0 <= self.port <= 65_535:
            raise ValueError(f"port: must be from 0 (any free one) to 65535, not {self.port}")
        if self.max_size < 0:
            raise ValueError(
                f"max-size: must be a number of bytes, or 0 for no limit, not {self.max_size}"
            )
        if self.reuse_port and not hasattr(socket, "SO_REUSEPORT"):
            raise ValueError("reuse-port: this system cannot share a port")
        for word in self.without:
            if word not in EXTENSIONS:
                raise ValueError(f"without: must be one of {', '.join(EXTENSIONS)}, not {word}")
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.tls == "required" and "STARTTLS" in self.without:
            raise ValueError("without: tls=required needs STARTTLS")
        if self.auth and "AUTH" in self.without:
            raise ValueError("without: auth needs AUTH")
        if self.tls not in (None, *TLS_MODES):
            raise ValueError(f"tls: must be one of {', '.join(TLS_MODES)}, not {self.tls}")
        if self.cert and not self.tls:
            raise ValueError("cert: requires tls")
        if self.key and not self.cert:
            raise ValueError("key: requires cert")

    @cached_property
    def extensions(self) -> list[str]:
        """The keywords of EXTENSIONS that are not disabled."""
        disabled = set(self.without)
        if not self.smtputf8:
            disabled.add("SMTPUTF8")
        if disabled & {"8BITMIME", "CHUNKING"}:  # RFC 3030 section 3
            disabled.add("BINARYMIME")
        return [word for word in EXTENSIONS if word not in disabled]

    def _check_types(self) -> None:
        path = (str, os.PathLike, type(None))
        _require_type("interface", self.interface, (str,), "a string")
        _require_type("port", self.port, (int,), "an integer")
        _require_type("directory", self.directory, path, "a path or None")
        _require_type("max_size", self.max_size, (int,), "an integer")
        _require_type("smtputf8", self.smtputf8, (bool,), "True or False")
        _require_type("tls", self.tls, (str, type(None)), f"one of {', '.join(TLS_MODES)}, or None")
        _require_type("cert", self.cert, path, "a path or None")
        _require_type("key", self.key, path, "a path or None")
        _require_type("strict", self.strict, (bool,), "True or False")
        _require_type("reuse_port", self.reuse_port, (bool,), "True or False")
        _require_strings("fail", self.fail)
        _require_strings("ignore", self.ignore)
        _require_strings("without", self.without)
        if not isinstance(self.auth, Mapping) or not all(
            isinstance(text, str) for item in self.auth.items() for text in item
        ):
            raise TypeError("auth: must be a dictionary {user: password} of strings")


def _require_type(name: str, value: object, types: tuple[type, ...], expected: str) -> None:
    # bool is a subclass of int
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise TypeError(f"{name}: must be {expected}, not {value!r}")


def _require_strings(name: str, texts: Any) -> None:
    is_list = isinstance(texts, Iterable) and not isinstance(texts, str)
    if not is_list or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name}: must be a list of strings, not {texts!r}")


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

    @property
    def closes_connection(self) -> bool:
        """Whether the server closes the connection after it (RFC 5321 section 3.8)."""
        return self.code in (221, 421)


DELIVERY_FAILED = Reply(451, "4.3.0", "Cannot accept the message, try again later")


class SMTPError(Exception):
    """Raised to refuse a command or a message; `reply` is the Reply to send.

    code is from 400 to 599. status is an enhanced status code of the same class (RFC 3463).
    Raises ValueError if one of them is invalid.
    """

    reply = DELIVERY_FAILED  # for a subclass that does not call __init__()

    def __init__(self, code: int, status: str, text: str) -> None:
        status_pattern = rf"{code // 100}(\.\d{{1,3}}){{2}}"
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


# What a session asks its connection to do, apart from sending a Reply.


@dataclass
class Deliver:
    """Action: store the envelope, call the handler, and set `reply`, the next of the session."""

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

# Octets of the arguments of all RCPT commands of one message: over 512 for each recipient.
MAX_RCPT_ARGUMENTS = 512 * 1024

# 5xx replies in a row before the connection is closed; those of failure rules do not count. The
# value is the default of smtpd_hard_error_limit in Postfix.
MAX_ERRORS = 20

# Octets of content that all sessions may hold in memory together, or twice the maximum size of
# a message if that is larger. If messages have no maximum size, neither has this.
MAX_CONTENT_IN_MEMORY = 256 * 1024 * 1024


@dataclass
class Transaction:
    """A mail transaction (RFC 5321 section 3.3): MAIL begins it, and RSET discards it."""

    mail_from: str
    mail_options: dict[str, str]
    rcpt_tos: list[str] = field(default_factory=list)
    rcpt_options: list[dict[str, str]] = field(default_factory=list)
    rcpt_arguments: int = 0
    """Octets of the arguments of all RCPT commands."""
    content: bytearray = field(default_factory=bytearray)
    chunks: int = 0
    """How many BDAT commands were accepted."""
    error: SMTPError | None = None
    """Why the content is discarded. The client gets it at the end of the content."""


@dataclass(frozen=True)
class Refusal:
    """A command or a message that was refused: its reply has a 4xx or 5xx code."""

    time: datetime
    """When it was refused, with a time zone."""
    peer: str
    """Address and port of the client."""
    verb: str
    """CONNECT, a command in upper case, or "." for a message, as in failure rules."""
    argument: str
    """The argument of the command, without secrets; sender, recipients and subject for "."."""
    reply: Reply


class SharedState:
    """What the sessions of a server share: the failure rules, and memory for content.

    on_refusal is called with each Refusal. Raises ValueError for a rule that does not parse
    and for an unknown name of a warning.
    """

    def __init__(
        self, config: Config, on_refusal: Callable[[Refusal], object] | None = None
    ) -> None:
        for name in config.ignore:
            if name not in WARNINGS:
                raise ValueError(f"ignore: unknown name {name}; one of {', '.join(WARNINGS)}")
        self.rules = Rules(config.fail)
        self.on_refusal = on_refusal
        self.content_limit = float("inf")
        if config.max_size > 0:
            self.content_limit = max(MAX_CONTENT_IN_MEMORY, 2 * config.max_size)
        self.reserved = 0
        """Octets of content that all sessions hold."""
        self.rejected_messages = 0
        """How many messages were rejected because of config.strict."""

    def report_refusal(self, refusal: Refusal, detail: str) -> None:
        """Log a refusal, and pass it on."""
        name = "message" if refusal.verb == "." else refusal.verb
        command = f"{name} {refusal.argument}".strip() or "empty line"
        reply = escape_unprintable(str(refusal.reply))
        log.warning("%s: %s refused: %s%s", refusal.peer, command, reply, detail)
        if self.on_refusal is None:
            return
        try:
            self.on_refusal(refusal)
        except Exception:  # the client gets its reply all the same
            log.exception("%s: on_refusal failed", refusal.peer)


# The state of a session: the method that consumes the next input. It takes one unit off the
# buffer and returns its action, raises SMTPError, or returns None if the unit is incomplete.
State = Callable[[], Action | None]

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


def _is_mechanism(word: str) -> bool:
    """Return whether the word after AUTH is the name of a mechanism, not a secret in base64."""
    if word.upper() in SASL_MECHANISMS:
        return True
    # Base64 has both cases and a length that is a multiple of 4.
    is_name = re.fullmatch("[A-Z0-9_-]{3,20}", word) is not None
    return is_name and ("-" in word or len(word) % 4 > 0)


class Session:
    """The server side of an SMTP session, without I/O: bytes in, actions out.

    peer is the address of the client, for envelopes and the log. shared is what the session
    shares with others; None makes it independent.
    """

    def __init__(self, config: Config, peer: str = "", shared: SharedState | None = None) -> None:
        self.config = config
        self.peer = peer
        self.tls = config.tls == "implicit"
        self.helo: str | None = None
        self.extended = False  # whether the client sent EHLO
        self.user: str | None = None
        self.transaction: Transaction | None = None
        self._shared = SharedState(config) if shared is None else shared
        self._reserved = 0  # the part of shared.reserved that belongs to this session
        self.ended = False
        """Whether the dialogue is over, so that the connection is to be closed."""
        self._buffer = bytearray()
        self._searched = 0  # octets at the start of the buffer without a line end
        self._line_end = b"\r\n"  # the line end of the last command
        self._chunk_remaining = 0  # octets of the current BDAT chunk that have not arrived
        self._command = ""  # the last command line, or CONNECT and the address of the client
        self._last_verb = ""  # of the last command but QUIT
        self._envelope: Envelope | None = None  # the message that waits for its reply
        self._refusal_detail = ""  # what the log says about the refusal of the last command
        self._has_accepted_message = False
        self._auth_seen = False  # whether the client sent AUTH: unknown commands may be secrets
        self._protocol_warnings: list[str] = []
        self._errors = 0
        self._now = 0.0  # the time of the last call of receive()
        self._state: State = self._connect

    def receive(self, data: bytes, now: float) -> Iterator[Action]:
        """Process bytes from the client and yield the actions they cause.

        The caller performs each action before it asks for the next one. The first call, with
        no data, yields the greeting. now is the time for the envelopes, as from time.time().
        """
        self.feed(data)
        self._now = now
        while not self.ended and (action := self._next_action()) is not None:
            yield action

    def feed(self, data: bytes) -> None:
        """Add bytes that arrive while an action is performed; receive() processes them next."""
        self._buffer += data

    @property
    def has_input(self) -> bool:
        """Whether the client has sent something that is not processed yet."""
        return len(self._buffer) > 0

    def close(self, reply: Reply | None = None) -> None:
        """Log how the connection ends, and discard the transaction.

        reply is the last reply if the connection sends it itself.
        """
        if reply is not None:
            self._log_reply(reply)
        elif self._envelope is not None and not self.ended:
            summary = self._envelope.summary()
            log.warning("%s: Disconnected before the reply to %s", self.peer, summary)
        if not self._has_accepted_message:
            last = self._masked(self._last_verb) or "the greeting"
            hint = ""
            if self.config.tls is None and last in ("EHLO", "STARTTLS"):
                hint = " (the client may require TLS: see --tls)"
            log.debug("%s: Closed without a message after %s%s", self.peer, last, hint)
        self._drop_transaction()

    def _next_action(self) -> Action | None:
        try:
            action = self._state()
        except SMTPError as error:
            action = error.reply
            if action.code >= 500:
                self._errors += 1
            if self._errors > MAX_ERRORS:  # RFC 5321 section 4.3.2
                action = TOO_MANY_ERRORS
        if isinstance(action, Reply):
            return self._finish_reply(action)
        self.ended = isinstance(action, Close)
        return action

    def _finish_reply(self, reply: Reply) -> Reply:
        """Update the state for a reply, log it, and return it as it is sent."""
        if "ENHANCEDSTATUSCODES" not in self.config.extensions:
            reply = Reply(reply.code, "", reply.text)
        self._log_reply(reply)
        if reply.code < 400:
            self._errors = 0
        else:
            self._report_refusal(reply)
        if self._envelope is not None:  # the reply to a message: nothing needs its content now
            self._envelope = None
            self._reserve(0)
        self.ended = reply.closes_connection
        return reply

    def _drop_transaction(self) -> None:
        self.transaction = None
        self._reserve(0)

    def _reserve(self, octets: int) -> None:
        """Set how much content this session holds in memory."""
        self._shared.reserved += octets - self._reserved
        self._reserved = octets

    # Log

    def _log_reply(self, reply: Reply) -> None:
        if log.isEnabledFor(logging.DEBUG):
            for line in reply.encoded.decode().splitlines():
                log.debug("%s S: %s", self.peer, line)

    def _begin_command(self, line: str, verb: str = "") -> None:
        self._command = line
        self._refusal_detail = ""
        if verb and verb != "QUIT":
            self._last_verb = verb
        if "AUTH" in verb:  # "AUTHPLAIN" is a typing error that may have a secret as its argument
            self._auth_seen = True
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s C: %s", self.peer, self._masked(line))

    def _report_refusal(self, reply: Reply) -> None:
        verb, _, argument = self._masked(self._command).partition(" ")
        if verb.isalpha() and verb.isascii():
            verb = verb.upper()
        if self._envelope is not None:
            verb, argument = ".", self._envelope.summary()
        now = datetime.fromtimestamp(self._now, timezone.utc)
        refusal = Refusal(now, self.peer, verb, argument, reply)
        self._shared.report_refusal(refusal, self._refusal_detail)

    def _masked(self, line: str) -> str:
        """Return the line without secrets, such as the arguments of AUTH."""
        words = line.split()
        if words and "AUTH" in words[0].upper():
            shown = ["AUTH"]
            if len(words) > 1 and _is_mechanism(words[1]):
                shown.append(words[1].upper())
            if len(words) > len(shown):
                shown.append("***")
            return " ".join(shown)
        # A client may send a response after the exchange has failed.
        if self._auth_seen and words and words[0].upper() not in _COMMANDS:
            return "***"
        return escape_unprintable(line)

    # Failure rules

    def _apply_rules(self, verb: str, get_text: Callable[[], str], proceed: State) -> Action | None:
        """Return the first action of the matching rules, or proceed() if none matches.

        If a rule replies, proceed() is not called, and the session stays in its current state.
        """
        actions = self._shared.rules.matching_actions(verb, get_text, self.peer)
        return self._next_rule_action(actions, self._state, proceed)

    def _next_rule_action(
        self, actions: list[RuleAction], resume: State, proceed: State
    ) -> Action | None:
        """State: return the actions one by one, then proceed() if all of them were delays."""
        self._state = resume
        if not actions:
            return proceed()
        if len(actions) > 1 or isinstance(actions[0], Delay):
            self._state = partial(self._next_rule_action, actions[1:], resume, proceed)
        return actions[0]

    # The greeting

    def _connect(self) -> Action | None:
        self._state = self._reject_command  # for a rule that refuses the client
        address = self.peer.rpartition(":")[0].strip("[]")
        self._command = f"CONNECT {address}"
        return self._apply_rules("CONNECT", lambda: address, self._send_greeting)

    def _send_greeting(self) -> Reply:
        self._warn_if_pipelined("the greeting")
        self._state = self._read_first_command
        return GREETING

    def _reject_command(self) -> Reply | None:
        """State: allow only QUIT, because the greeting was a refusal (RFC 5321 section 3.1)."""
        line = self._read_line()
        if line is None:
            return None
        self._begin_command(line.decode("utf-8", "replace").rstrip())
        if line.strip().upper() != b"QUIT":
            raise SMTPError(503, "5.5.1", "Only QUIT is allowed after a refused greeting")
        return BYE

    # Command lines

    def _read_first_command(self) -> Action | None:
        """State: recognize a client that expects TLS."""
        start = bytes(self._buffer[: len(_TLS_HANDSHAKE)])
        if start == _TLS_HANDSHAKE:
            hint = "use --tls implicit, or STARTTLS in the client"
            log.warning("%s: TLS on a plain connection; %s", self.peer, hint)
            return Close()
        if _TLS_HANDSHAKE.startswith(start):  # too few octets to tell
            return None
        self._state = self._read_command
        return self._read_command()

    def _read_command(self) -> Action | None:
        """State: read a command line, and execute the command."""
        line = self._read_line()
        if line is None:
            return None
        self._line_end = b"\r\n" if line.endswith(b"\r\n") else b"\n"
        if self._line_end == b"\n":
            self._warn(warning("bare-lf", "after a command"))
        text = line[: -len(self._line_end)].decode("utf-8", "surrogateescape").rstrip(" \t")
        verb, _, argument = text.partition(" ")
        # str.upper() converts some letters outside ASCII to ASCII letters.
        verb = verb.upper() if verb.isascii() else ""
        self._begin_command(text, verb)
        return self._execute(verb, argument.lstrip(" "))

    def _execute(self, verb: str, argument: str) -> Action | None:
        extension = _COMMAND_EXTENSIONS.get(verb)
        is_disabled = extension is not None and extension not in self.config.extensions
        if is_disabled or verb in _UNIMPLEMENTED_VERBS:
            raise SMTPError(502, "5.5.1", "Command not implemented")
        if verb == "BDAT":  # applies the rules when it knows the size of the chunk
            return self._bdat(argument)
        if verb in _COMMANDS:
            command = partial(self._run_command, verb, argument)
            return self._apply_rules(verb, lambda: rule_text(argument), command)
        if verb in _HTTP_VERBS:
            raise SMTPError(421, "4.7.0", "HTTP request refused")
        raise SMTPError(500, "5.5.2", "Command not recognized")

    def _run_command(self, verb: str, argument: str) -> Action | None:
        if "PIPELINING" not in self.config.extensions:
            self._warn_if_pipelined(f"the reply to {verb}")
        self._require_permission(verb)
        if argument and verb in _NO_ARGUMENT:
            raise SMTPError(501, "5.5.4", "No argument allowed")
        return _COMMANDS[verb](self, argument)

    def _require_permission(self, verb: str) -> None:
        if self.config.tls == "required" and not self.tls and verb not in _ALLOWED_BEFORE_TLS:
            raise SMTPError(530, "5.7.0", "Must issue a STARTTLS command first")
        # RFC 4954 section 6
        if self.config.auth and self.user is None and verb in _REQUIRE_AUTH:
            raise SMTPError(530, "5.7.0", "Authentication required")

    def _read_line(self) -> bytes | None:
        """Return the next line with its line end, or None if it is incomplete.

        A bare LF ends a line, so that a person can type a session with netcat. Raises
        SMTPError at the end of a line that is too long.
        """
        end = self._buffer.find(b"\n", self._searched) + 1
        if end == 0:
            # The line is already too long without the octets that are discarded here.
            del self._buffer[MAX_COMMAND_LENGTH:]
            self._searched = len(self._buffer)
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[:end]
        self._searched = 0
        if end > MAX_COMMAND_LENGTH:
            self._begin_command(f"(line of over {MAX_COMMAND_LENGTH} octets)")
            raise SMTPError(500, "5.5.2", "Line too long")
        return line

    def _warn(self, text: str) -> None:
        """Add a warning about the dialogue to those of the next message."""
        if text not in self._protocol_warnings:
            self._protocol_warnings.append(text)

    def _warn_if_pipelined(self, reply: str) -> None:
        """Warn if data arrived before a reply that the client must wait for."""
        if self._buffer:
            self._warn(warning("early-talker", reply))

    # Content

    def _read_content(self, transaction: Transaction) -> Action | None:
        """State: read content up to the line with a single dot (RFC 5321 section 4.5.2).

        _data() puts the line end of the DATA command back in front of the content, so that
        each line follows a line end. Only the line end that DATA had is recognized: no other
        combination of CR, LF and dots can end the message (SMTP smuggling).
        """
        buffer, line_end = self._buffer, self._line_end
        terminator = line_end + b"." + line_end
        if len(buffer) < len(terminator):
            return None
        end = buffer.find(terminator)
        if end >= 0:
            self._append_unstuffed(transaction, end + len(line_end))
            del buffer[: len(b"." + line_end)]
            del transaction.content[: len(line_end)]
            self._state = self._read_command
            return self._end_content(transaction)
        # A line end in the last octets may be the start of the terminator or of a stuffed dot.
        possible_start = buffer.find(line_end[:1], len(buffer) - len(terminator) + 1)
        self._append_unstuffed(transaction, possible_start if possible_start >= 0 else len(buffer))
        return None

    def _append_unstuffed(self, transaction: Transaction, count: int) -> None:
        """Move octets from the buffer to the content, and undo dot-stuffing."""
        octets = self._buffer[:count]
        del self._buffer[:count]
        if b"." in octets:  # base64 has none
            octets = octets.replace(self._line_end + b".", self._line_end)
        self._append(transaction, octets, overhead=len(self._line_end))

    def _append(self, transaction: Transaction, octets: bytearray, overhead: int = 0) -> None:
        """Add octets to the content, unless it is too large.

        overhead is how many octets of the content do not belong to the message.
        """
        if transaction.error is None:
            transaction.content += octets
            transaction.error = self._size_error(len(transaction.content) - overhead)
            if transaction.error is not None:
                transaction.content.clear()
            self._reserve(len(transaction.content))

    def _size_error(self, size: int) -> SMTPError | None:
        """Return the error for a message of this size, if it is too large."""
        if 0 < self.config.max_size < size:
            return SMTPError(552, "5.3.4", "Message exceeds the maximum size")
        others = self._shared.reserved - self._reserved
        if others + size > self._shared.content_limit:
            return SMTPError(452, "4.3.1", "Insufficient storage, try again later")
        return None

    def _read_chunk(self, transaction: Transaction, last: bool) -> Action | None:
        """State: read the octets that BDAT announced (RFC 3030 section 2)."""
        octets = self._buffer[: self._chunk_remaining]
        del self._buffer[: self._chunk_remaining]
        self._chunk_remaining -= len(octets)
        self._append(transaction, octets)
        if transaction.error is not None:
            self._state = self._skip_chunk
            raise transaction.error
        if self._chunk_remaining:
            return None
        self._state = self._read_command
        return self._end_content(transaction) if last else OK

    def _skip_chunk(self) -> Action | None:
        """State: discard the octets of a refused chunk; they are not commands."""
        # Without this chunk, the message is incomplete. Before RCPT there is no message.
        if self.transaction is not None and self.transaction.rcpt_tos:
            self._drop_transaction()
        skipped = min(self._chunk_remaining, len(self._buffer))
        del self._buffer[:skipped]
        self._chunk_remaining -= skipped
        if self._chunk_remaining:
            return None
        self._state = self._read_command
        return self._read_command()

    def _end_content(self, transaction: Transaction) -> Action | None:
        self.transaction = None
        if transaction.error is not None:
            raise transaction.error
        content = bytes(transaction.content)
        transaction.content.clear()  # do not hold a large message twice
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
        self._envelope = envelope
        return self._apply_rules(".", lambda: envelope.subject, partial(self._accept, envelope))

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

    def _protocol(self, transaction: Transaction) -> str:
        """Return the protocol for the Received field (RFC 3848, RFC 6531 section 4.3)."""
        if "SMTPUTF8" in transaction.mail_options:
            name = "UTF8SMTP"
        elif self.extended or self.tls or self.user is not None:
            name = "ESMTP"
        else:
            name = "SMTP"
        return name + ("S" if self.tls else "") + ("A" if self.user is not None else "")

    def _accept(self, envelope: Envelope) -> Deliver:
        smtputf8 = "SMTPUTF8" in self.config.extensions
        if not smtputf8 and not header_section(envelope.content).isascii():
            raise SMTPError(554, "5.6.7", "Non-ASCII header fields require SMTPUTF8")
        for text in envelope.warnings:
            log.warning("%s: %s", self.peer, text)
        if self.config.strict and envelope.warnings:
            self._shared.rejected_messages += 1
            raise SMTPError(554, "5.6.0", envelope.warnings[0])
        delivery = Deliver(envelope)
        self._state = partial(self._end_delivery, delivery)
        return delivery

    def _end_delivery(self, delivery: Deliver) -> Reply:
        """State: the connection has performed the delivery."""
        self._state = self._read_command
        if delivery.reply.code < 400:
            self._has_accepted_message = True
        return delivery.reply

    # Commands: one method for each verb. Each returns its reply or raises SMTPError, except that
    # _bdat() returns the first action of its chunk, or None if the octets have not arrived.

    def _ehlo(self, argument: str) -> Reply:
        self._set_helo("EHLO", argument)
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
        self._set_helo("HELO", argument)
        return Reply(250, "", HOSTNAME)

    def _set_helo(self, verb: str, argument: str) -> None:
        self._warn_if_pipelined(f"the reply to {verb}")
        if not _HELO_ARGUMENT.fullmatch(argument):
            raise SMTPError(501, "5.5.4", f"Syntax: {verb} hostname")
        self._drop_transaction()  # RFC 5321 section 4.1.4
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
        if is_binary(mail_options) and "BINARYMIME" not in self.config.extensions:
            raise SMTPError(501, "5.5.4", "Invalid value for parameter BODY")
        mail_from = ""  # the null reverse-path (RFC 5321 section 4.5.5)
        if match["path"]:
            mail_from = parse_mailbox(match["path"], "5.1.7")
            _require_smtputf8(mail_from, mail_options)
        if 0 < self.config.max_size < int(mail_options.get("SIZE", 0)):
            raise SMTPError(552, "5.3.4", "Message exceeds the maximum size")
        self.transaction = Transaction(mail_from, mail_options)
        return SENDER_OK

    def _rcpt(self, argument: str) -> Reply:
        transaction = self.transaction
        if transaction is None:
            raise SMTPError(503, "5.5.1", "Send MAIL first")
        if transaction.chunks:
            raise SMTPError(503, "5.5.1", "RCPT is not allowed after BDAT")
        rcpt_arguments = transaction.rcpt_arguments
        rcpt_arguments += len(argument.encode("utf-8", "surrogateescape"))
        if len(transaction.rcpt_tos) >= MAX_RECIPIENTS or rcpt_arguments > MAX_RCPT_ARGUMENTS:
            # RFC 5321 section 4.5.3.1.10
            raise SMTPError(452, "4.5.3", "Too many recipients")
        match = _RCPT_ARGUMENT.fullmatch(argument)
        if match is None:
            raise SMTPError(501, "5.5.4", "Syntax: RCPT TO:<address>")
        rcpt_options = self._parse_parameters(match["parameters"], RCPT_PARAMETERS)
        rcpt_to = parse_mailbox(match["path"], "5.1.3")
        _require_smtputf8(rcpt_to, transaction.mail_options)
        _require_smtputf8(rcpt_options.get("ORCPT", ""), transaction.mail_options)
        transaction.rcpt_arguments = rcpt_arguments
        transaction.rcpt_tos.append(rcpt_to)
        transaction.rcpt_options.append(rcpt_options)
        return RECIPIENT_OK

    def _parse_parameters(self, text: str | None, known: Parameters) -> dict[str, str]:
        if not text:
            return {}
        if not self.extended:
            raise SMTPError(555, "5.5.4", "Parameters require EHLO")
        return parse_parameters(text, known, self.config.extensions)

    def _data(self, argument: str) -> Reply:
        transaction = self._require_recipients()
        # RFC 3030 sections 2 and 3
        if transaction.chunks:
            raise SMTPError(503, "5.5.1", "DATA is not allowed after BDAT")
        if is_binary(transaction.mail_options):
            raise SMTPError(503, "5.5.1", "BODY=BINARYMIME requires BDAT")
        self._warn_if_pipelined("the reply to DATA")
        self._buffer[:0] = self._line_end  # see _read_content()
        self._state = partial(self._read_content, transaction)
        return START_CONTENT

    def _bdat(self, argument: str) -> Action | None:
        match = _BDAT_ARGUMENT.fullmatch(argument)
        if match is None:
            raise SMTPError(501, "5.5.4", "Syntax: BDAT size [LAST]")
        # If the command is refused, its octets must be discarded: they are not commands.
        self._chunk_remaining = int(match["size"])
        self._state = self._skip_chunk
        begin_chunk = partial(self._begin_chunk, match["rest"])
        return self._apply_rules("BDAT", lambda: argument, begin_chunk)

    def _begin_chunk(self, rest: str) -> Action | None:
        if rest and not re.fullmatch(" +LAST", rest, re.IGNORECASE | re.ASCII):
            raise SMTPError(501, "5.5.4", "Syntax: BDAT size [LAST]")
        self._require_permission("BDAT")
        transaction = self._require_recipients()
        error = self._size_error(len(transaction.content) + self._chunk_remaining)
        if error is not None:
            raise error
        transaction.chunks += 1
        self._state = partial(self._read_chunk, transaction, last=bool(rest))
        return self._state()

    def _require_recipients(self) -> Transaction:
        if self.transaction is None or not self.transaction.rcpt_tos:
            raise SMTPError(503, "5.5.1", "Send MAIL and RCPT first")
        return self.transaction

    def _rset(self, argument: str) -> Reply:
        self._drop_transaction()
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
        return Reply(214, "2.0.0", "Commands:\n" + " ".join(_COMMANDS))

    def _starttls(self, argument: str) -> Reply:
        if self.tls:
            raise SMTPError(503, "5.5.1", "TLS is already active")
        if self.config.tls is None:
            self._refusal_detail = " (see --tls)"
            raise SMTPError(502, "5.5.1", "TLS is not available")
        self._state = self._begin_tls
        return READY_FOR_TLS

    def _begin_tls(self) -> StartTLS:
        """State: start again; the client must send EHLO again (RFC 3207 section 4.2)."""
        self._buffer.clear()
        self.tls = True
        self._drop_transaction()
        self.helo = self.user = None
        self._state = self._read_command
        return StartTLS()

    def _auth(self, argument: str) -> Reply:
        """AUTH mechanism [initial-response] (RFC 4954 section 4)"""
        if self.helo is None:
            raise SMTPError(503, "5.5.1", "Send EHLO or HELO first")
        if self.transaction is not None:
            raise SMTPError(503, "5.5.1", "AUTH is not allowed during a mail transaction")
        if self.user is not None:
            raise SMTPError(503, "5.5.1", "Already authenticated")
        name, _, initial_response = argument.partition(" ")
        initial_response = initial_response.strip()
        if not name:
            raise SMTPError(501, "5.5.4", "Syntax: AUTH mechanism [initial-response]")
        if name.upper() not in SASL_MECHANISMS:
            raise SMTPError(504, "5.5.4", "Unknown authentication mechanism")
        exchange = SASL_MECHANISMS[name.upper()]()
        challenge = next(exchange)
        if not initial_response:
            return self._challenge(exchange, challenge)
        if initial_response == "=":  # an empty initial response
            initial_response = ""
        return self._sasl_step(exchange, initial_response.encode("utf-8", "replace"))

    def _challenge(self, exchange: SASLExchange, text: str) -> Reply:
        self._state = partial(self._read_response, exchange)
        return Reply(334, "", base64.b64encode(text.encode()).decode())

    def _read_response(self, exchange: SASLExchange) -> Reply | None:
        """State: read a line of base64, or "*", which cancels (RFC 4954 section 4)."""
        self._state = self._read_command  # also after a line that is too long
        line = self._read_line()
        if line is None:
            self._state = partial(self._read_response, exchange)
            return None
        log.debug("%s C: ***", self.peer)
        if line.strip() == b"*":
            raise SMTPError(501, "5.7.0", "Authentication cancelled")
        return self._sasl_step(exchange, line.strip())

    def _sasl_step(self, exchange: SASLExchange, response: bytes) -> Reply:
        try:
            challenge = exchange.send(base64.b64decode(response, validate=True))
        except StopIteration as end:
            return self._log_in(*end.value)
        except ValueError as error:
            raise SMTPError(501, "5.5.2", "Malformed authentication response") from error
        return self._challenge(exchange, challenge)

    def _log_in(self, user: bytes, password: bytes) -> Reply:
        name = user.decode("utf-8", "surrogateescape")
        expected = self.config.auth.get(name)
        if not user:  # RFC 4616 section 2: the user name is not empty
            problem = "empty user name"
        elif self.config.auth and expected is None:
            problem = "unknown user"
        elif self.config.auth and password.decode("utf-8", "surrogateescape") != expected:
            problem = "wrong password"
        else:
            self.user = user.decode("utf-8", "replace")
            return LOGIN_SUCCEEDED
        self._refusal_detail = f" (user '{escape_unprintable(name)}': {problem})"
        raise SMTPError(535, "5.7.8", "Authentication failed")


# A new command also belongs in RULE_VERBS; in _NO_ARGUMENT if it has no argument; in EXTENSIONS
# and _COMMAND_EXTENSIONS if it is part of an extension; and it may belong in _ALLOWED_BEFORE_TLS
# and _REQUIRE_AUTH.
_COMMANDS: dict[str, Callable[[Session, str], Action | None]] = {
    "EHLO": Session._ehlo,
    "HELO": Session._helo,
    "MAIL": Session._mail,
    "RCPT": Session._rcpt,
    "DATA": Session._data,
    "BDAT": Session._bdat,
    "RSET": Session._rset,
    "NOOP": Session._noop,
    "QUIT": Session._quit,
    "VRFY": Session._vrfy,
    "HELP": Session._help,
    "STARTTLS": Session._starttls,
    "AUTH": Session._auth,
}
# {command: the extension that it belongs to}
_COMMAND_EXTENSIONS = {"BDAT": "CHUNKING", "HELP": "HELP", "STARTTLS": "STARTTLS", "AUTH": "AUTH"}
_ALLOWED_BEFORE_TLS = {"EHLO", "HELO", "NOOP", "RSET", "QUIT", "HELP", "STARTTLS"}
_REQUIRE_AUTH = {"MAIL", "RCPT", "DATA", "BDAT", "VRFY"}
# RFC 5321 section 4.2.4: 502 is for commands that the server knows but does not implement.
_UNIMPLEMENTED_VERBS = {"EXPN", "TURN", "ETRN", "ATRN", "SEND", "SOML", "SAML"}
# The content type and the version of a TLS record with a ClientHello (RFC 8446 section 5.1)
_TLS_HANDSHAKE = b"\x16\x03"
# The first words of HTTP requests: a web page can make a browser send one to any port.
_HTTP_VERBS = "GET POST PUT HEAD OPTIONS CONNECT DELETE PATCH PRI HOST:".split()


def _require_smtputf8(address: str, mail_options: dict[str, str]) -> None:
    """RFC 6531 section 3.5: an address outside ASCII requires the SMTPUTF8 parameter."""
    if not address.isascii() and "SMTPUTF8" not in mail_options:
        raise SMTPError(553, "5.6.7", "Non-ASCII address requires SMTPUTF8")


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
_UTF8_ADDRESS = r"(?:[!-*,-<>-\[\]-~]|\\x\{[0-9A-F]{2,6}\}|[^\x00-\x9f\u2028\u2029])+"

# {keyword: (extension, regular expression for what follows the keyword)}
Parameters = Mapping[str, tuple[str, str]]

MAIL_PARAMETERS: Parameters = {
    "SIZE": ("SIZE", "=[0-9]{1,20}"),  # RFC 1870 section 3
    "BODY": ("8BITMIME", "=(?:7BIT|8BITMIME|BINARYMIME)"),  # RFC 6152, RFC 3030 section 3
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
        if not re.fullmatch(pattern, equals + value, re.IGNORECASE):
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


# --- Text for the log ------------------------------------------------------------------


# C0 but tabs, C1, bidirectional embeddings, overrides and isolates, and surrogates. All others are
# text, such as the spaces, direction marks and joiners of any script.
_CONTROLS = re.compile("[\x00-\x08\n-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def escape_unprintable(text: str) -> str:
    """Return the text as one line, with what a terminal would interpret escaped."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def format_address(sockname: Any) -> str:
    """Return the name of a socket as ADDRESS:PORT, with brackets around an IPv6 address.

    sockname is None or empty for a client that has disconnected already.
    """
    if not sockname:
        return "unknown:0"
    host, port = sockname[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


# --- Failure rules --------------------------------------------------------------------

# What a rule can apply to: the greeting, the commands, and "." for the end of the content.
RULE_VERBS = (
    "CONNECT EHLO HELO STARTTLS AUTH MAIL RCPT DATA BDAT . RSET NOOP QUIT VRFY HELP".split()
)

# What a rule can do
RuleAction = Reply | Delay | Close


@dataclass
class Rule:
    """A scripted failure; parse_rule() creates it."""

    text: str
    """The rule as it was written."""
    verb: str
    """One of RULE_VERBS."""
    pattern: str
    """A pattern of fnmatch in lower case, for the address of the client (CONNECT), the path
    (MAIL, RCPT), the decoded subject (.), or the argument of other commands."""
    remaining: float
    """How many more times the rule applies."""
    actions: list[RuleAction]
    """What to do; [] lets the command proceed. The next rules apply only after a Delay."""


# Commands that allow no argument
_NO_ARGUMENT = {"STARTTLS", "DATA", "RSET", "QUIT"}

_VERB_PATTERN = rf"\s*({'|'.join(map(re.escape, RULE_VERBS))})(?=\s|$)"
_GLOB_PATTERN = r"\s+(\S+)"
_COUNT_PATTERN = r"(?:\s+x([1-9][0-9]{0,8})(?=\s|$))?"
_DELAY_PATTERN = r"delay\s+(?P<delay>[0-9]{1,6}(?:\.[0-9]{1,6})?)"
_CODE_PATTERN = r"(?P<code>(?P<class>[45])[0-9]{2})"
_STATUS_PATTERN = r"(?:\s+(?P<status>(?P=class)(?:\.[0-9]{1,3}){2}))?"
# Not a status code of another class than the code, and not the word drop alone
_TEXT_PATTERN = r"(?:\s+(?![0-9]\.[0-9])(?!drop\s*$)(?P<text>\S.*?))?"
_REPLY_PATTERN = rf"{_CODE_PATTERN}{_STATUS_PATTERN}{_TEXT_PATTERN}(?P<drop>\s+drop)?"
_ACTION_PATTERN = rf"\s+(?:(?P<word>drop|ok)|{_DELAY_PATTERN}|{_REPLY_PATTERN})\s*$"


def parse_rule(text: str) -> Rule:
    """VERB GLOB [ "x" N ] ( CODE [ x.y.z ] [ text ] [ "drop" ] / "delay" SECONDS / "drop" / "ok" )

    Raises ValueError; its text marks the place that does not parse with >>> and <<<.
    """
    position = 0

    def error(expected: str) -> ValueError:
        rest = text[position:].strip() or "nothing"
        return ValueError(f"rule {text[:position]} >>>{rest}<<< expected {expected}")

    def match_next(pattern: str, expected: str) -> re.Match[str]:
        nonlocal position
        match = re.compile(pattern, re.IGNORECASE | re.ASCII).match(text, position)
        if match is None:
            raise error(expected)
        position = match.end()
        return match

    verb = match_next(_VERB_PATTERN, f"one of {' '.join(RULE_VERBS)}")[1].upper()
    argument = match_next(_GLOB_PATTERN, "a pattern such as * or *@example.com")
    pattern = argument[1].lower()
    if reason := _why_it_never_matches(verb, pattern):
        position = argument.start()
        raise error(f"a pattern that can match: {reason}")
    count = match_next(_COUNT_PATTERN, "a count such as x1")[1]
    action = match_next(
        _ACTION_PATTERN,
        "a code from 400 to 599 [x.y.z of its class] [text], delay SECONDS, drop, or ok",
    )
    remaining = int(count) if count else float("inf")
    return Rule(text, verb, pattern, remaining, _rule_actions(action))


def _why_it_never_matches(verb: str, pattern: str) -> str:
    """Return why the pattern cannot match any command, or "" if it can."""
    if verb in _NO_ARGUMENT and not fnmatchcase("", pattern):
        return f"{verb} has no argument (use *); for the subject of a message, use ."
    if verb == "CONNECT" and re.search("[g-z@]", pattern):
        return "CONNECT has the address of the client, such as 127.0.0.1"
    if verb in ("MAIL", "RCPT") and re.match("<|from:|to:", pattern):
        return f"{verb} has an address without angle brackets"
    return ""


def _rule_actions(match: re.Match[str]) -> list[RuleAction]:
    if match["delay"]:
        return [Delay(float(match["delay"]))]
    if match["word"]:
        return [Close()] if match["word"].lower() == "drop" else []
    status = match["status"] or f"{match['class']}.0.0"
    error = SMTPError(int(match["code"]), status, match["text"] or "Scripted failure")
    return [error.reply, Close()] if match["drop"] else [error.reply]


def rule_text(argument: str) -> str:
    """Return the text of a command to match: the path of MAIL and RCPT, or the argument."""
    match = _MAIL_ARGUMENT.fullmatch(argument) or _RCPT_ARGUMENT.fullmatch(argument)
    return match["path"] if match else argument


# The program limits how often it logs this, as it does for warnings.
RULE_APPLIES = "%s: rule %s"


class Rules:
    """The failure rules of a server. Raises ValueError for a rule that does not parse."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._rules = [parse_rule(text) for text in texts]

    def matching_actions(
        self, verb: str, get_text: Callable[[], str], peer: str
    ) -> list[RuleAction]:
        """Return the actions of the rules that match: delays, then a Reply, Close, or both.

        get_text() returns the text to match with the patterns; it is called only if there is a
        rule for the verb, because decoding a subject is slow. peer is for the log.
        """
        actions: list[RuleAction] = []
        for rule in self._rules:
            if rule.verb != verb or not rule.remaining:
                continue
            if not fnmatchcase(get_text().lower(), rule.pattern):
                continue
            rule.remaining -= 1
            log.info(RULE_APPLIES, peer, rule.text)
            actions += rule.actions
            if not any(isinstance(action, Delay) for action in rule.actions):
                break
        return actions


# --- Messages -------------------------------------------------------------------------

# Octets of a header field that are decoded; most servers accept fewer in a whole header.
MAX_FIELD_SIZE = 65_536

# Parts of a message that are decoded; those after them are only in the content.
MAX_PARTS = 10_000


@dataclass(frozen=True)
class Attachment:
    """A part of a message that is neither its text nor its HTML, such as a file."""

    name: str
    """The file name, or ""."""
    type: str
    """The media type in lower case, such as "application/pdf"."""
    content: bytes
    """The content as sent; only its transfer encoding is undone."""
    content_id: str = ""
    """The Content-ID without angle brackets, to which "cid:" URLs refer; or ""."""


@dataclass(frozen=True)
class Envelope:
    """A message with the data of its SMTP session."""

    peer: str
    """Address and port of the client, such as "127.0.0.1:54321" or "[::1]:54321"."""
    helo: str
    """The argument of EHLO or HELO."""
    protocol: str
    """SMTP, ESMTP, UTF8SMTP and so on (RFC 3848, RFC 6531 section 4.3)."""
    tls: bool
    """Whether the message was sent over TLS."""
    user: str | None
    """The user name of the login, or None."""
    mail_from: str
    """The reverse-path without angle brackets; "" is the null reverse-path."""
    mail_options: dict[str, str]
    """The parameters of MAIL: {keyword in upper case: value, or ""}."""
    rcpt_tos: list[str]
    """The forward-paths without angle brackets, in the order of the RCPT commands."""
    rcpt_options: list[dict[str, str]]
    """The parameters of RCPT: one dictionary for each of rcpt_tos."""
    content: bytes
    """The content as sent: line ends are CRLF, and dot-stuffing is undone."""
    received: datetime
    """When the end of the content arrived, with a time zone."""
    warnings: list[str] = field(default_factory=list)
    """What real servers object to, each as "name: description (RFC section)"."""
    path: Path | None = None
    """The file in the Maildir, if the message is stored."""

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
        return decode_words(next(find_fields(header_section(self.content), name), ""))

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
            Attachment(part.file_name, part.type, part.content, part.content_id)
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


@dataclass(eq=False)
class _Part:
    """A part of a message."""

    header: bytes
    default_type: str  # the media type if there is no valid Content-Type
    body: bytes = b""  # as sent

    def _field(self, name: str) -> str:
        return next(find_fields(self.header, name), "")

    @cached_property
    def _parameters(self) -> dict[str, str]:
        return parse_mime_parameters(self._field("Content-Type"))

    @cached_property
    def type(self) -> str:
        """The media type in lower case."""
        token = _first_token(self._field("Content-Type"))
        return token if re.fullmatch("[^/]+/[^/]+", token) else self.default_type

    @cached_property
    def boundary(self) -> bytes:
        """The boundary between the parts of a multipart; b"" for other types."""
        boundary = decode_parameter(self._parameters, "boundary").rstrip().encode()
        return boundary if self.type.startswith("multipart/") else b""

    @cached_property
    def file_name(self) -> str:
        """The file name, or ""."""
        disposition = parse_mime_parameters(self._field("Content-Disposition"))
        name = decode_parameter(disposition, "filename")
        return name or decode_parameter(self._parameters, "name")

    @cached_property
    def is_file(self) -> bool:
        """Whether the part is a file rather than something to be shown with the message."""
        disposition = _first_token(self._field("Content-Disposition"))
        return disposition == "attachment" or self.file_name != ""

    @property
    def content_id(self) -> str:
        """The Content-ID without angle brackets, or ""."""
        return self._field("Content-ID").strip().removeprefix("<").removesuffix(">")

    @cached_property
    def content(self) -> bytes:
        """The body with its transfer encoding undone (RFC 2045 section 6)."""
        encoding = _first_token(self._field("Content-Transfer-Encoding"))
        if encoding == "base64":
            return _decode_base64(self.body)
        return binascii.a2b_qp(self.body) if encoding == "quoted-printable" else self.body

    @cached_property
    def text(self) -> str:
        """The content as text; line ends are LF."""
        text = decode_text(self.content, decode_parameter(self._parameters, "charset"))
        return text.replace("\r\r\n", "\n").replace("\r\n", "\n")

    @cached_property
    def html_as_text(self) -> tuple[str, list[str]]:
        """What parse_html() makes of the content."""
        return parse_html(self.text)


# A line that may be a delimiter (RFC 2046 section 5.1.1)
_DELIMITER = re.compile(rb"\n--([^\n]*)")


def split_parts(content: bytes) -> Iterator[_Part]:
    """Yield the parts that have no parts themselves, in their order (RFC 2046 section 5.1).

    One search finds the delimiters of all multiparts, so the time does not grow with nesting.
    """
    # {boundary of an open multipart: default type of its parts}, the innermost last
    types: dict[bytes, str] = {}
    part: _Part | None
    part, start = _open_part(content, 0, "text/plain", types)
    for line in _DELIMITER.finditer(content):
        text = line[1].rstrip()
        boundary = text if text in types else text.removesuffix(b"--")
        if boundary not in types:
            continue
        if part and part.boundary != boundary:  # what precedes the first delimiter is no part
            part.body = content[start : line.start()].rstrip(b"\r")
            yield part
        while next(reversed(types)) != boundary:  # multiparts that are not closed
            types.popitem()
        if text == boundary:
            part, start = _open_part(content, line.end() + 1, types[boundary], types)
        else:
            part = None
            types.popitem()
    if part:
        part.body = content[start:]
        yield part


def _open_part(
    content: bytes, start: int, default_type: str, types: dict[bytes, str]
) -> tuple[_Part, int]:
    """Return the part whose header begins at start, and where its body begins."""
    end, body = _find_body(content, start)
    part = _Part(content[start:end], default_type)
    if part.boundary:
        is_digest = part.type == "multipart/digest"
        types.setdefault(part.boundary, "message/rfc822" if is_digest else "text/plain")
    return part, body


def readable_text(envelope: Envelope) -> str:
    """Return all texts of a message; if they are blank, the text of its HTML."""
    texts = [part.text.strip("\n") for part in envelope._inline_parts("text/plain")]
    if not any(map(str.strip, texts)):
        texts = [part.html_as_text[0] for part in envelope._inline_parts("text/html")]
    return "\n\n".join(filter(str.strip, texts))


# --- Header fields --------------------------------------------------------------------

# The name of a field, or the start of the "From " line of an mbox file. No name begins with "--"
# here, because such a line may be the delimiter of the next part.
_FIELD_START = re.compile(rb"(?!--)[!-9;-~]+[ \t]*:|>?From ")
# A line end before a line that is neither a field nor goes on with one, and that line if it is
# empty. Programs that convert line ends twice send CR CR LF.
_HEADER_END = re.compile(rb"\n(?!%b|[ \t])(?:\r*\n)?" % _FIELD_START.pattern)


def header_section(content: bytes) -> bytes:
    """Return the header fields at the start of the content.

    White space before a colon is accepted, as RFC 5322 section 4.5 requires.
    """
    return content[: _find_body(content, 0)[0]]


def _find_body(content: bytes, start: int) -> tuple[int, int]:
    """Return where the header that begins at start ends, and where its body begins."""
    if start == 0 and not _FIELD_START.match(content):  # no header, as in a text without a subject
        empty_line = re.match(rb"\r*\n", content)
        return 0, empty_line.end() if empty_line else 0
    end = _HEADER_END.search(content, max(start - 1, 0))
    return (end.start() + 1, end.end()) if end else (len(content), len(content))


@lru_cache
def _field_pattern(name: str) -> re.Pattern[bytes]:
    return re.compile(rb"(?i)\n%b[ \t]*:([^\n]*(?:\n[ \t][^\n]*)*)" % re.escape(name.encode()))


def find_fields(header: bytes, name: str) -> Iterator[str]:
    """Yield the value of each header field with this name, unfolded, but not decoded."""
    for match in _field_pattern(name).finditer(b"\n" + header):
        lines = match[1][:MAX_FIELD_SIZE].split(b"\n")
        value = b"".join(line.rstrip(b"\r") for line in lines)
        yield value.decode("utf-8", "replace").lstrip(" \t")


# encoded-word = "=?" charset ["*" language] "?" encoding "?" encoded-text "?="
# (RFC 2047 section 2, RFC 2231 section 5). Spaces in the text are a common error.
_ENCODED_WORD = r"=\?([^?*\s]+)(?:\*[^?\s]*)?\?([bq])\?([^?]*)\?="
# White space between adjacent encoded-words is not part of the text (RFC 2047 section 6.2).
_ADJACENT_WORDS = re.compile(rf"{_ENCODED_WORD}(?:[ \t]*{_ENCODED_WORD})*", re.IGNORECASE)


def decode_words(text: str) -> str:
    """Decode the encoded-words in the value of a header field (RFC 2047)."""
    return _ADJACENT_WORDS.sub(_decode_adjacent, text) if "=?" in text else text


def _decode_adjacent(run: re.Match[str]) -> str:
    """Decode adjacent encoded-words; those in an unknown charset stay as they are."""
    texts = []
    words = re.finditer(_ENCODED_WORD, run[0], re.IGNORECASE)
    for charset, group in groupby(words, key=lambda word: word[1].lower()):
        if find_codec(charset):  # joined first: two words may share a character
            texts.append(decode_text(b"".join(map(_decode_word, group)), charset))
        else:
            texts.append(" ".join(word[0] for word in group))
    return "".join(texts)


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
_TOKEN = re.compile(r"""(?:[\s"';]|\([^()]*\))*([^\s"';()]+)""")

# parameter = attribute "=" value; value = token / quoted-string (RFC 2045 section 5.1). A value
# without quotes goes on to the next semicolon, because many programs forget the quotes.
_PARAMETER = re.compile(
    r""";\s*([^\s=;"]+)\s*=\s*(?:"([^"\\]*(?:\\.[^"\\]*)*)"?|([^;]*))""", re.DOTALL
)


def _first_token(value: str) -> str:
    """Return a media type, a mechanism, a disposition or a charset, in lower case; or ""."""
    match = _TOKEN.match(value)
    return match[1].lower() if match else ""


def parse_mime_parameters(value: str) -> dict[str, str]:
    """Return the parameters of a field as {name in lower case: value}; name* becomes name*0*."""
    parameters: dict[str, str] = {}
    for name, quoted, unquoted in _PARAMETER.findall(value):
        key = re.sub(r"^([^*]+)\*$", r"\1*0*", name.lower())
        parameters.setdefault(key, re.sub(r'\\([\\"])', r"\1", quoted) or unquoted.strip())
    return parameters


def decode_parameter(parameters: Mapping[str, str], name: str) -> str:
    """Return a decoded parameter; "" if there is none.

    Its pieces name*0, name*1* and so on (RFC 2231 sections 3 and 4) go before a plain value. A
    plain value may contain encoded-words, which RFC 2047 section 5 forbids.
    """
    octets, charset = b"", ""
    for number in count():
        piece = f"{name}*{number}"
        if f"{piece}*" in parameters:
            value = parameters[f"{piece}*"]
            if number == 0 and value.count("'") >= 2:
                charset, _language, value = value.split("'", 2)
            octets += unquote_to_bytes(value)
        elif piece in parameters:
            octets += parameters[piece].encode()
        else:
            break
    return decode_words(decode_text(octets, charset) or parameters.get(name, ""))


def is_binary(mail_options: Mapping[str, str]) -> bool:
    """Return whether MAIL had BODY=BINARYMIME: the content need not be lines (RFC 3030)."""
    return mail_options.get("BODY", "").upper() == "BINARYMIME"


# --- Charsets -------------------------------------------------------------------------

# {codec: the labels for which it is used, as Python names their codecs, or as sent where Python
# knows none}. Most stand for supersets of Windows (WHATWG Encoding Standard section 4.2).
_LABELS = {
    "big5hkscs": "big5 cn-big5",
    "cp1252": "ascii iso8859-1 iso88591",
    "cp1254": "iso8859-9 iso88599",
    "cp874": "iso8859-11 iso885911 tis-620 windows-874 dos-874",
    "cp932": "shift_jis windows-31j",
    "cp949": "euc_kr windows-949 ks_c_5601-1989 ksc_5601 iso-ir-149 cseuckr",
    "gb18030": "gb2312 gbk gb_2312 gb_2312-80 csgb2312",
    "iso2022_jp": "cp50220 cp50221",
    "iso8859-6": "iso-8859-6-e iso-8859-6-i csiso88596e csiso88596i",
    "iso8859-8": "iso-8859-8-e iso-8859-8-i csiso88598e csiso88598i logical visual",
    "koi8-r": "koi koi8",
    "koi8-u": "koi8-ru",
    "mac-roman": "mac csmacintosh",
    "utf-8-sig": "utf-8 unicode-1-1-utf-8",
    "utf-16": "unicode ucs-2 csunicode iso-10646-ucs-2",
    "": "idna punycode raw_unicode_escape unicode_escape",  # no charsets
}
_CODECS = {label: codec for codec, labels in _LABELS.items() for label in labels.split()}


@lru_cache
def find_codec(label: str) -> str:
    """Return the codec for the label of a charset; "" if there is none."""
    label = _first_token(label).removeprefix("x-")
    with contextlib.suppress(LookupError, ValueError):
        label = codecs.lookup(_CODECS.get(label, label)).name
        return _CODECS.get(label, label)
    return ""


def decode_text(octets: bytes, label: str) -> str:
    """Decode text in the charset with this label, or in UTF-8 if there is no such charset.

    Each character that cannot be decoded becomes one U+FFFD.
    """
    codec = find_codec(label) or "utf-8-sig"
    if codec == "iso2022_jp":
        octets, codec = _ISO_2022_JP.sub(_to_euc_jp, octets), "euc_jp"
    errors = "dsmtpd.replace" if codec.startswith(("big5", "cp", "gb")) else "replace"
    if codec == "euc_jp":
        octets, codec, errors = _EUC_JP.sub(_to_shift_jis, octets), "cp932", "dsmtpd.replace-pair"
    try:
        text = octets.decode(codec, errors)
    except (LookupError, ValueError):  # a codec that is not for text, or that fails
        text = octets.decode("utf-8", "replace")
    if codec == "cp932":
        text = text.translate(_NO_SHIFT_JIS)
    return text.encode("utf-8", "replace").decode()  # UTF-7 can express surrogates


def _replace_undecodable(error: UnicodeError) -> tuple[str, int]:
    """Error handler that does what the decoders of the WHATWG Encoding Standard do."""
    assert isinstance(error, UnicodeDecodeError)
    first, end = error.object[error.start], error.end
    if error.encoding == "charmap":
        return chr(first) if first < 0xA0 else "\ufffd", end
    if 0x80 < first < 0xFF and error.object[end : end + 1] >= b"\x80":
        return "\ufffd", end + 1  # a double-byte charset, in which this octet belongs to it
    return "\ufffd", end


def _replace_pair(error: UnicodeError) -> tuple[str, int]:
    """Error handler for what _to_shift_jis() returns, where only pairs cannot be decoded."""
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd", error.start + 2


codecs.register_error("dsmtpd.replace", _replace_undecodable)
codecs.register_error("dsmtpd.replace-pair", _replace_pair)

# What cp932 makes of octets that Shift_JIS does not use
_NO_SHIFT_JIS = dict.fromkeys(range(0xF8F0, 0xF8F4), "\ufffd")

# Python's codecs for ISO-2022-JP and EUC-JP lack the characters of Windows. Its codec for Shift_JIS
# has them, and the three encode the same table (WHATWG Encoding Standard sections 12 and 13).
_ISO_2022_JP = re.compile(rb"\x1b(\([BIJ]|\$[@B])([^\x1b]*)")
# Katakana, two octets, and what is not decoded: JIS X 0212 and invalid octets
_EUC_JP = re.compile(
    rb"\x8e([\xa1-\xdf])|([\xa1-\xfe]{2})|\x8f[\xa1-\xfe]{2}|[\x8e\xa1-\xfe][\x80-\xff]|[\x80-\xff]"
)
_SET_HIGH_BIT = bytes(octet | 0x80 if 0x21 <= octet <= 0x7E else octet for octet in range(256))


def _to_euc_jp(segment: re.Match[bytes]) -> bytes:
    """Return a segment of ISO-2022-JP, which begins with an escape sequence, as EUC-JP."""
    charset, octets = segment.groups()
    if charset in (b"(B", b"(J"):
        return octets
    octets = octets.translate(_SET_HIGH_BIT)
    return re.sub(rb"[\xa1-\xdf]", b"\x8e\\g<0>", octets) if charset == b"(I" else octets


def _to_shift_jis(character: re.Match[bytes]) -> bytes:
    """Return a character of EUC-JP as Shift_JIS."""
    katakana, pair = character.groups()
    if not pair:
        return katakana or b"\xff"
    row, cell = pair[0] - 0xA1, pair[1] - 0xA1
    lead = row // 2 + (0x81 if row < 62 else 0xC1)
    trail = cell + (0x9F if row % 2 else 0x40 if cell < 63 else 0x41)
    return bytes([lead, trail])


# --- HTML and URLs --------------------------------------------------------------------

_URL_START = re.compile(r"https?://", re.IGNORECASE)
# The characters that may end a URL
_URL_END = re.compile(r"[\x00-\x20<>\"`()\[\]{}\x7f]|[^\x00-\x7f]")
# Categories of Unicode: separators, and all punctuation but dashes and connectors
_ENDING_CATEGORIES = ("Cc", "Pe", "Pf", "Pi", "Po", "Ps", "Zl", "Zp", "Zs")
_OPENING_BRACKETS = {")": "(", "]": "[", "}": "{"}


def find_urls(text: str) -> list[str]:
    """Return the http and https URLs in a text, without the punctuation after them."""
    urls = []
    position = 0
    while start := _URL_START.search(text, position):
        position = _find_url_end(text, start.end())
        urls.append(text[start.start() : position].rstrip(".,:;!?*'([{"))
    return [url for url in urls if not url.endswith("://")]


def _find_url_end(text: str, position: int) -> int:
    """Return where the URL ends that goes on at this position.

    It contains only brackets that are balanced, and no quotes, brackets and sentence marks of
    other scripts, by which it is often followed without a space.
    """
    opened: list[str] = []
    for match in _URL_END.finditer(text, position):
        char = match[0]
        if char in "([{":
            opened.append(char)
        elif opened and _OPENING_BRACKETS.get(char) == opened[-1]:
            opened.pop()
        elif char.isascii() or unicodedata.category(char) in _ENDING_CATEGORIES:
            return match.start()
    return len(text)


# A comment, an element whose content is not shown, or the start of a tag
_MARKUP = re.compile(
    r"<!--(?:-?>|.*?(?:--!?>|\Z))"
    r"|<[!?][^>]*>?"
    r"|<(script|style|title)\b.*?(?:</\1[^>]*>|\Z)"
    r"|<(?P<name>/?[a-z][^\s/>]*)",
    re.IGNORECASE | re.DOTALL,
)
# An attribute, or the end of a tag. Quotes count only after "=" (HTML standard section 13.2.5).
_ATTRIBUTE = re.compile(
    r"""(?P<name>[^\s/>=]+)(?:\s*=\s*(?P<value>"[^"]*"|'[^']*'|[^\s>"'][^\s>]*))?|>"""
)
# Elements that begin and end a line
_BLOCKS = set(
    """address article aside blockquote body br caption center dd details dialog div dl dt fieldset
    figcaption figure footer form h1 h2 h3 h4 h5 h6 header hgroup hr legend li main menu nav ol
    optgroup option p pre search section summary table tbody tfoot thead tr ul""".split()
)


def parse_html(document: str) -> tuple[str, list[str]]:
    """Return the text of an HTML document, and the links in it.

    The text is roughly what a browser shows. The target of a link follows the text of the link in
    angle brackets, unless that contains it.
    """
    writer = _TextWriter()
    position = 0
    while markup := _MARKUP.search(document, position):
        writer.add_text(document[position : markup.start()])
        position = markup.end()
        if markup["name"]:
            position, href = _read_attributes(document, position)
            writer.add_tag(markup["name"].lower(), href)
    writer.add_text(document[position:])
    return writer.text(), writer.links


def _read_attributes(document: str, position: int) -> tuple[int, str]:
    """Return where a tag ends whose attributes begin at position, and its first href, or ""."""
    hrefs: list[str] = []
    for attribute in _ATTRIBUTE.finditer(document, position):
        if attribute["name"] is None:
            return attribute.end(), "".join(hrefs[:1])
        if attribute["name"].lower() == "href":
            value = attribute["value"] or ""
            hrefs.append(value[1:-1] if value.startswith(('"', "'")) else value)
    return len(document), ""


class _TextWriter:
    """Makes text of the tags and the text of an HTML document."""

    def __init__(self) -> None:
        self.links: list[str] = []
        self._fragments = ["\n"]  # none is empty
        self._link = ""  # the target of the link whose text is being added
        self._link_start = 0  # the index of the first fragment of that text
        self._is_preformatted = False

    def add_text(self, source: str) -> None:
        if not source:
            return
        text = _unescape(source)
        self.links += find_urls(text)
        if not self._is_preformatted:
            text = re.sub(r"[ \t\n\f\r]+", " ", text)
            if self._fragments[-1][-1] in " \n":
                text = text.removeprefix(" ")
        if text:
            self._fragments.append(text)

    def add_tag(self, name: str, href: str) -> None:
        element = name.removeprefix("/")
        if name in ("a", "area"):
            self._start_link(href)
        elif name == "/a":
            self._end_link()
        elif name in ("td", "th") and self._fragments[-1][-1] != "\n":
            self._fragments.append(" " if self._fragments[-1][-1] == " " else "  ")
        elif element in _BLOCKS:
            self._fragments.append("\n")
        if element == "pre":
            self._is_preformatted = name == "pre"

    def _start_link(self, href: str) -> None:
        target = _REFERENCE.sub(_decode_reference, href)
        self._link = re.sub(r"[\t\n\r]", "", target).strip()  # as the URL standard, section 4.4
        if re.match("#|mailto:|tel:|javascript:|$", self._link, re.IGNORECASE):
            self._link = ""
        else:
            self.links.append(self._link)
        self._link_start = len(self._fragments)

    def _end_link(self) -> None:
        if self._link and self._link not in "".join(self._fragments[self._link_start :]):
            self._fragments.append(f" <{self._link}>")
        self._link = ""

    def text(self) -> str:
        """Return the text of what has been added."""
        lines = [line.rstrip() for line in "".join(self._fragments).split("\n")]
        return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


def _unescape(text: str) -> str:
    """Decode the character references of HTML, but drop those that html.unescape() refuses."""
    return html.unescape(re.sub(r"&#[0-9]{50,};?", "", text)) if "&" in text else text


# A reference in an attribute. A name without a semicolon before "=" or a letter or digit is text
# (HTML standard section 13.2.5.73), such as "&currency=" in a URL.
_REFERENCE = re.compile(
    r"&(#[0-9]{1,50};?|#[xX][0-9a-fA-F]+;?|[a-zA-Z][a-zA-Z0-9]*(?:;|(?![=a-zA-Z0-9])))"
)


def _decode_reference(reference: re.Match[str]) -> str:
    if reference[1].startswith("#"):
        return html.unescape(reference[0])
    return html5.get(reference[1], reference[0])


# --- Lint -----------------------------------------------------------------------------

# Octets of the content in which the lint searches for the header fields.
FIELDS_SEARCH_SIZE = 1_048_576


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
_REQUIRED_FIELDS = {
    b"date": "missing-date",
    b"from": "missing-from",
    b"message-id": "missing-message-id",
}
_UNIQUE_FIELDS = (
    "Date From Sender Reply-To To Cc Bcc Message-ID In-Reply-To References Subject".split()
)
# ".*" skips the rest of the line, which would otherwise be searched as well.
_FIELD_NAME = re.compile(rb"^([!-9;-~]+)[ \t]*:.*", re.MULTILINE)

# RFC 5322 section 2.1.1, without the line end
_MAX_LINE_LENGTH = 998


def warning(name: str, detail: str = "") -> str:
    """Return the text of a warning: "name: description (RFC section)"."""
    return f"{name}: {WARNINGS[name].format(detail)}"


def lint(content: bytes, mail_options: Mapping[str, str]) -> list[str]:
    """Return what real servers object to in a message, each as the text of a warning.

    The content is searched as a whole, without splitting it into lines.
    """
    warnings = [] if is_binary(mail_options) else _lint_lines(content)
    header = header_section(content)
    if "SMTPUTF8" not in mail_options and not header.isascii():
        warnings.append(warning("utf8-header"))
    return warnings + _lint_fields(header[:FIELDS_SEARCH_SIZE])


def _lint_lines(content: bytes) -> list[str]:
    warnings = []
    line_ends = content.count(b"\r\n")
    if content.count(b"\n") > line_ends:
        warnings.append(warning("bare-lf", "in the content"))
    if content.count(b"\r") > line_ends:
        warnings.append(warning("bare-cr"))
    if _has_long_line(content):
        warnings.append(warning("long-line"))
    return warnings


def _has_long_line(content: bytes) -> bool:
    """Return whether a line has over 998 octets.

    Each search goes backwards from where the longest valid line would end, and so skips the
    shorter lines before that.
    """
    start = 0
    while start + _MAX_LINE_LENGTH < len(content):
        end = content.rfind(b"\n", start, start + _MAX_LINE_LENGTH + len("\r\n"))
        if end < 0:
            return True
        start = end + 1
    return False


def _lint_fields(header: bytes) -> list[str]:
    """Return the warnings about the names of the header fields."""
    names = _FIELD_NAME.findall(header.lower())
    distinct = set(names)
    warnings = [warning(name) for key, name in _REQUIRED_FIELDS.items() if key not in distinct]
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

# Seconds after which a file in the tmp of a Maildir is a leftover (maildir(5)).
LEFTOVER_AGE = 36 * 60 * 60


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
    date = format_datetime(envelope.received.replace(microsecond=0))
    mail_from = envelope.mail_from
    if not _can_be_folded(mail_from):
        mail_from = re.sub(" +", " ", mail_from)
    header = [
        f"Return-Path: <{mail_from}>",  # RFC 5321 section 4.4
        f"X-Peer: {envelope.peer}",
        f"X-MailFrom: {_encode_words(envelope.mail_from)}",
        f"X-RcptTo: {_encode_words(', '.join(envelope.rcpt_tos))}",
        f"Received: from {helo} ({address}) by {HOSTNAME} (dsmtpd {__version__})"
        f" with {envelope.protocol} id {key}; {date}",
    ]
    return "".join(f"{_fold(line)}\n" for line in header).encode()


def _fold(line: str) -> str:
    """Fold a header line at spaces (RFC 5322 section 2.2.3), or inside a long word."""
    if len(line) <= _FOLD_WIDTH:
        return line
    pattern = rf".{{1,{_FOLD_WIDTH}}}(?= |$)|.{{{_FOLD_WIDTH}}}"
    first, *rest = re.findall(pattern, line)
    return "\n".join([first, *(part if part.startswith(" ") else f" {part}" for part in rest)])


def _can_be_folded(text: str) -> bool:
    """Return whether no folded line can consist of spaces.

    Some readers take such a line for the end of the header.
    """
    # With 200 characters and the name of the field, a line is not folded.
    return len(text) < 200 or "  " not in text


def _encode_words(text: str) -> str:
    """Return the text as RFC 2047 encoded-words if a header field cannot contain it."""
    has_long_word = re.search(rf"[^ ]{{{_FOLD_WIDTH}}}", text)
    if text.isascii() and "=?" not in text and not has_long_word and _can_be_folded(text):
        return text
    # An encoded-word has 75 characters at most: 11 characters of up to four octets fit.
    parts = [text[start : start + 11].encode() for start in range(0, len(text), 11)]
    return " ".join(f"=?utf-8?b?{base64.b64encode(part).decode()}?=" for part in parts)


class MaildirStore:
    """Stores messages in a Maildir. Several threads and processes may use the same one.

    directory is created if it is missing. If it is empty or contains cur or new, its missing
    folders are created, and files in its tmp that are older than 36 hours are removed. None means
    the current directory, where missing folders are always created. Raises mailbox.Error for any
    other directory, which is left unchanged, and for one that cannot be read or written to.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None) -> None:
        self.path = Path(directory or ".").absolute()
        try:
            if directory is not None:
                _require_maildir(self.path)
            for name in ("tmp", "new", "cur"):
                (self.path / name).mkdir(mode=0o700, parents=True, exist_ok=True)
            _require_writable(self.path)
            if directory is not None:  # the current directory may have other files in tmp
                _remove_leftovers(self.path)
        except OSError as error:
            raise mailbox.Error(f"cannot write to {self.path}: {error.strerror}") from error

    def count(self) -> int:
        """Return the number of messages in the Maildir."""
        return len(mailbox.Maildir(self.path, create=False))

    def store(self, envelope: Envelope) -> Path:
        """Store a message, and return its path.

        The file is complete and flushed to disk when this returns; after a power failure in
        the next seconds it may still be in tmp. Raises SMTPError 451 if it cannot be written;
        nothing is left of it then.
        """
        # mailbox.Maildir.add() leaves a file in tmp when the disk is full, is not safe to use
        # from several threads, and writes CRLF on Windows.
        seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
        unique = f"M{nanoseconds // 1000:06}P{os.getpid()}R{os.urandom(8).hex()}"
        key = f"{seconds}.{unique}.{HOSTNAME}"
        # Operations on Path objects take longer than the system calls.
        tmp, new = os.path.join(self.path, "tmp", key), os.path.join(self.path, "new", key)
        try:
            _write_file(tmp, *_file_parts(envelope, key))
            os.rename(tmp, new)
        except OSError as error:
            if not os.path.exists(new):  # NFS may report an error for a rename that it has done
                log.error("Cannot store a message from %s: %s", envelope.peer, error)
                text = "Cannot store the message, try again later"
                raise SMTPError(451, "4.3.0", text) from error
        finally:
            with contextlib.suppress(OSError):  # after the rename, it is not there
                os.unlink(tmp)
        return Path(new)


def _require_maildir(path: Path) -> None:
    """Raise mailbox.Error if the directory exists and contains something else."""
    if not path.exists():
        return
    if not path.is_dir():
        raise mailbox.Error(f"{path} is not a directory")
    names = {entry.name for entry in path.iterdir() if not entry.name.startswith(".")}
    if names and not names & {"cur", "new"}:
        missing = ", ".join(sorted({"cur", "new", "tmp"} - names))
        raise mailbox.Error(f"{path} is not a Maildir: it has no {missing}")


def _require_writable(path: Path) -> None:
    """Raise OSError if no message can be stored in the Maildir."""
    for name in ("tmp", "new"):
        test = path / name / f"dsmtpd-{os.urandom(8).hex()}"
        test.touch()
        test.unlink()


def _remove_leftovers(path: Path) -> None:
    """Remove what programs that were killed have left in tmp."""
    for file in (path / "tmp").iterdir():
        with contextlib.suppress(OSError):  # another program removes it, or it is a folder
            if file.stat().st_mtime < time.time() - LEFTOVER_AGE:
                file.unlink()


_BARE_CR = re.compile(rb"\r(?!\n)")


def _file_parts(envelope: Envelope, key: str) -> list[bytes]:
    """Return what to write: the trace header, the content, and an empty line if it lacks one.

    Line ends are LF, the custom in a Maildir, except in BINARYMIME content. Bare CRs are kept.
    An empty line always ends the header section, because many mail readers require it.
    """
    header, content = trace_header(envelope, key), envelope.content
    line_end = b"\n"
    if is_binary(envelope.mail_options):
        first_line = content.partition(b"\n")[0]
        if first_line.endswith(b"\r"):
            line_end = b"\r\n"
            header = header.replace(b"\n", line_end)
    elif _BARE_CR.search(content):
        content = content.replace(b"\r\n", b"\n")
    else:
        content = content.translate(None, b"\r")  # each CR belongs to a CRLF
    if content.startswith(line_end):
        return [header, content]
    if not _FIELD_NAME.match(content):  # a body without header fields
        return [header, line_end, content]
    if line_end * 2 in content:
        return [header, content]
    return [header, content, line_end if content.endswith(line_end) else line_end * 2]


_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)


def _write_file(path: str, *parts: bytes) -> None:
    """Create a file and flush it to disk. A file object would make more system calls."""
    descriptor = os.open(path, _NEW_FILE, 0o666)
    try:
        for part in parts:
            rest = memoryview(part)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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

    interrupt() ends the session when the server stops or the client is idle: it cancels the task,
    and _close() sends the final reply. A delivery is never cancelled; the session ends after it.
    abort() is for a client that does not read the final reply.
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
        self._final_reply: Reply | None = None  # the reply that ends the session, from interrupt()
        self._task = asyncio.current_task()
        self._loop = asyncio.get_running_loop()
        self.last_activity = self._loop.time()
        """When the client last sent something or an action ended, in the time of the event loop."""
        self._idle_timer = self._loop.call_later(IDLE_TIMEOUT, self._check_idle)
        # asyncio allocates max_size bytes for each read, by default 256 KiB. Other event loops
        # do not have this attribute.
        transport: Any = writer.transport
        with contextlib.suppress(AttributeError):
            transport.max_size = READ_SIZE

    async def run(self) -> None:
        """Serve the client until one side closes the connection."""
        try:
            await self._run_session()
        except asyncio.CancelledError:
            # It is not raised again: the task ends here in any case.
            if self._final_reply is None:  # not by interrupt(): the event loop ends
                self._writer.transport.abort()
        except OSError as error:
            log.debug("%s: %s", self._session.peer, error)
        except Exception:
            log.exception("%s: Session failed", self._session.peer)
        finally:
            await self._close()

    def interrupt(self, reply: Reply) -> None:
        """End the session with this reply; a delivery in progress is finished first."""
        self._final_reply = reply
        if isinstance(self._action, Deliver):
            summary = self._action.envelope.summary()
            log.info("%s: Waiting for the delivery of %s", self._session.peer, summary)
        elif self._task is not None:
            self._task.cancel()

    def abort(self) -> None:
        """Close the connection at once, unless a delivery is in progress."""
        if not isinstance(self._action, Deliver):
            self._writer.transport.abort()

    async def _run_session(self) -> None:
        if self._session.tls:
            # Before any other await: the plain reader must not get the ClientHello.
            await self._perform(StartTLS())
        data = b""  # the first call of receive() yields the greeting
        while True:
            await self._process(data)
            if self._session.ended or self._final_reply is not None:
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
            if self._final_reply is not None:  # interrupted during a delivery
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

        Raises OSError if the client has disconnected. What it sent before is not processed: it
        would not learn that a message was accepted, and would send it again.
        """
        if self._unsent:
            self._writer.write(bytes(self._unsent))
            self._unsent.clear()
        try:
            await self._writer.drain()
        except asyncio.CancelledError:
            self._writer.transport.abort()  # the client would not read the last reply either
            raise
        if self._writer.is_closing():
            raise ConnectionResetError("The client has disconnected")

    async def _perform(self, action: Action) -> None:
        """Perform an action. Close needs nothing: the session is closed already."""
        self._action = action
        try:
            if isinstance(action, Deliver):
                action.reply = await self._deliver(action.envelope)
            elif isinstance(action, StartTLS):
                await self._start_tls()
            # wait_for() of Python 3.10 and 3.11 can lose a cancellation at the end of a delay.
            elif isinstance(action, Delay) and self._final_reply is None:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._read_ahead(), action.seconds)
        finally:
            self._action = None
            self.last_activity = self._loop.time()

    async def _read_ahead(self) -> None:
        """During a delay, give the session what the client sends, at most READ_SIZE bytes.

        Never returns. Raises OSError if the client disconnects. A client that has sent more
        commands may have closed only its side of the connection, and wait for the replies.
        """
        remaining = READ_SIZE
        while remaining and (data := await self._reader.read(remaining)):
            self._session.feed(data)
            remaining -= len(data)
        while True:
            if not self._session.has_input or self._writer.is_closing():
                raise ConnectionResetError("The client has disconnected")
            await asyncio.sleep(1)

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
        # By default, 512 KiB of replies are kept for a client that does not read.
        transport.set_write_buffer_limits(READ_SIZE)
        protocol.connection_made(transport)
        self._reader = reader
        self._writer = asyncio.StreamWriter(transport, protocol, reader, self._loop)
        self._acknowledge_quickly()

    async def _close(self) -> None:
        """Send the last replies, and close the connection."""
        self._task = None  # interrupt() has no effect from here on
        try:
            self._session.close(self._final_reply)
            if self._final_reply is not None:
                self._unsent += self._final_reply.encoded
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
            if self._task is None:
                self.abort()  # the client does not read the last reply
            else:
                self.interrupt(TIMED_OUT)
            deadline = now + IDLE_TIMEOUT
        self._idle_timer = self._loop.call_at(deadline, self._check_idle)


def _handshake_failure(error: OSError) -> str:
    """Return why a TLS handshake failed, with the likely cause."""
    import ssl

    reason = ""
    if isinstance(error, ssl.SSLError):
        reason = (error.reason or "").replace("_", " ").lower()
    if reason in ("wrong version number", "http request", "unknown protocol"):
        return f"{reason}; the client sent plain text instead of TLS"
    if "alert" in reason:
        return f"{reason}; the client may not trust the certificate"
    if reason and "eof" not in reason:
        return reason
    if isinstance(error, ConnectionAbortedError) and str(error):  # the handshake timeout
        return str(error)
    return (
        "the client closed the connection; it may not trust the certificate, or it does not use"
        " TLS and waits for the greeting"
    )


# --- Server ---------------------------------------------------------------------------

# Sessions at the same time, so that a loop in a client cannot exhaust the machine.
MAX_CONNECTIONS = 1000

# Seconds that clients have to read the last reply when the server stops.
STOP_TIMEOUT = 0.5

# Seconds that Server.close() waits before it stops listening: asyncio would leave connections
# open that it has accepted but not yet passed to the server.
ACCEPT_GRACE = 0.001

# Seconds after which storing a message counts as slow, and the messages that wait for it get
# threads of their own.
SLOW_DELIVERY = 0.01


# Called with each message: a plain function, or one that returns an awaitable.
Handler = Callable[[Envelope], object]


class StoragePool:
    """Stores messages in a Maildir by threads, as few as possible.

    One thread stores the waiting messages one after another, because several would contend
    with the event loop for the interpreter lock at every system call. If a timer expires
    before the thread has finished, a message is slow, and each message that waits gets a
    thread of its own, as far as the system has threads. Invariant: while messages wait, the timer
    runs. Results are set together, so that the event loop wakes up once.

    executor has started one thread already, so that messages are stored even if the system
    allows no more.
    """

    def __init__(self, maildir: MaildirStore, executor: concurrent.futures.Executor) -> None:
        self._maildir = maildir
        self._executor = executor
        self._lacks_threads = False
        self._waiting: deque[tuple[Envelope, asyncio.Future[Path | Exception]]] = deque()
        self._results: deque[tuple[asyncio.Future[Path | Exception], Path | Exception]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    async def store(self, envelope: Envelope) -> Path:
        """Store a message in a thread; return and raise what MaildirStore.store() does."""
        future: asyncio.Future[Path | Exception] = asyncio.get_running_loop().create_future()
        self._waiting.append((envelope, future))
        if self._timer is None:
            self._start_threads(1)
        result = await future
        if isinstance(result, Exception):
            raise result
        return result

    def _start_threads(self, count: int) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(SLOW_DELIVERY, self._on_timer)
        try:
            for _ in range(count):
                self._executor.submit(self._store_waiting, loop)
        except RuntimeError as error:  # the existing threads store the messages
            if not self._lacks_threads:
                log.warning("Storing messages with fewer threads: %s", error)
            self._lacks_threads = True

    def _store_waiting(self, loop: asyncio.AbstractEventLoop) -> None:
        """Run in a thread: store messages until none is left."""
        with contextlib.suppress(IndexError):  # no message is left
            while True:
                envelope, future = self._waiting.popleft()
                try:
                    result: Path | Exception = self._maildir.store(envelope)
                except Exception as error:
                    result = error
                self._results.append((future, result))
        loop.call_soon_threadsafe(self._on_empty)

    def _on_timer(self) -> None:
        self._timer = None
        if self._waiting:
            self._start_threads(len(self._waiting))
        self._set_results()

    def _on_empty(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waiting:  # a message that arrived after the thread had ended its loop
            self._start_threads(1)
        self._set_results()

    def _set_results(self) -> None:
        while self._results:
            future, result = self._results.popleft()
            if not future.cancelled():
                future.set_result(result)


class Server:
    """An SMTP server in the running event loop; `async with` starts and closes it.

    config sets the options; keyword options, named as the fields of Config, take precedence.
    handler(envelope) is called with each message: in a thread if it is a plain function, in
    the event loop if it is async. The reply is 250 when it returns, the reply of the exception
    if it raises SMTPError, and 451 for any other exception. Messages are stored in
    config.directory before that. Without a directory, they are stored in the current directory
    if there is no handler, and not at all if there is one.
    on_message(envelope), plain or async, is called in the event loop with each accepted message,
    before the reply, and on_refusal(refusal) with each Refusal. Raises TypeError or ValueError
    for an invalid option.

    These attributes are set once the server has started: host and port are the first address
    that it listens on, and addresses are all of them. maildir is where messages are stored, or
    None. cafile is the file of the temporary certificate, for clients that verify it, or None;
    it exists while the server runs.
    """

    def __init__(
        self,
        config: Config | None = None,
        /,
        *,
        handler: Handler | None = None,
        on_message: Handler | None = None,
        on_refusal: Callable[[Refusal], object] | None = None,
        **options: Unpack[Options],
    ) -> None:
        if handler is not None and not callable(handler):
            raise TypeError(f"handler: must be callable, not {handler!r}")
        self.config = with_options(config or Config(), options)
        self.handler = handler
        self.host, self.port = self.config.interface, self.config.port
        self.addresses: list[tuple[str, int]] = []
        self.maildir: MaildirStore | None = None
        self.cafile: str | None = None
        self._handler_is_async = inspect.iscoroutinefunction(handler)
        self._on_message = on_message
        self._threads = concurrent.futures.ThreadPoolExecutor(MAX_CONNECTIONS, "dsmtpd")
        self._shared = SharedState(self.config, on_refusal)
        self._pool: StoragePool | None = None
        self._tls_context: ssl.SSLContext | None = None
        self._cleanup = contextlib.ExitStack()  # closes the sockets, removes the certificate
        self._connections: dict[asyncio.Task[None], Connection] = {}
        self._closed = asyncio.Event()

    async def start(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen on the addresses of the config, or on sockets that listen already.

        Raises OSError if it cannot listen, ValueError for a host name or a certificate that
        cannot be used, RuntimeError if no thread can be started, and what MaildirStore raises.
        """
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
                # This starts the first thread; later, the system may have none.
                self.maildir = await asyncio.get_running_loop().run_in_executor(
                    self._threads, MaildirStore, self.config.directory
                )
                self._pool = StoragePool(self.maildir, self._threads)
            for sock in sockets:
                listener = await asyncio.start_server(
                    self._serve_client, sock=sock, backlog=MAX_CONNECTIONS
                )
                cleanup.callback(listener.close)
                if opened_here:  # others, such as systemd, may go on listening on their sockets
                    cleanup.callback(_stop_listening, sock)
            self._cleanup = cleanup.pop_all()
        self.addresses = [sock.getsockname()[:2] for sock in sockets]
        self.host, self.port = self.addresses[0]

    def _make_tls_context(self, cleanup: contextlib.ExitStack) -> ssl.SSLContext:
        if self.config.cert is not None:
            return make_tls_context(self.config.cert, self.config.key)
        import tempfile

        folder = cleanup.enter_context(tempfile.TemporaryDirectory(prefix="dsmtpd-"))
        self.cafile, key = make_certificate(folder)
        return make_tls_context(self.cafile, key)

    async def serve_forever(self) -> None:
        """Wait until the server is closed."""
        await self._closed.wait()

    @property
    def rejected_messages(self) -> int:
        """How many messages were rejected because of config.strict."""
        return self._shared.rejected_messages

    def fail(self, *rules: str) -> None:
        """Replace the failure rules; from any thread. Raises ValueError as parse_rule() does."""
        self._shared.rules = Rules(rules)

    async def wait_for_clients(self, timeout: float) -> None:
        """Wait until all clients have disconnected, at most timeout seconds."""
        if self._connections:
            await asyncio.wait(self._connections, timeout=timeout)

    async def wait_for_quit(self, grace: float) -> None:
        """Wait until the clients that were active in the last `grace` seconds have disconnected.

        Clients that stay connected delay this by at most that time.
        """
        now = asyncio.get_running_loop().time()
        active = [
            task
            for task, connection in self._connections.items()
            if connection.last_activity > now - grace
        ]
        if active:
            await asyncio.wait(active, timeout=grace)

    async def close(self) -> None:
        """Stop listening, send 421 to the clients, and wait for deliveries in progress."""
        await asyncio.sleep(ACCEPT_GRACE)
        self._cleanup.close()
        for connection in self._connections.values():
            connection.interrupt(SHUTTING_DOWN)
        await self.wait_for_clients(STOP_TIMEOUT)
        while self._connections:  # abort() does not end a delivery
            for connection in self._connections.values():
                connection.abort()
            await self.wait_for_clients(STOP_TIMEOUT)
        self._threads.shutdown()
        self._closed.set()

    async def __aenter__(self) -> Server:
        await self.start()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def _serve_client(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        peer = format_address(writer.get_extra_info("peername"))
        if len(self._connections) >= MAX_CONNECTIONS:
            log.warning("%s: Too many connections", peer)
            if self.config.tls != "implicit":
                writer.write(TOO_MANY_CONNECTIONS.encoded)
            writer.close()
            return
        session = Session(self.config, peer, self._shared)
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
            if self._pool is not None:
                envelope = replace(envelope, path=await self._pool.store(envelope))
            if self.handler is not None:
                await self._call_handler(self.handler, envelope)
        except SMTPError as error:
            if error.reply is DELIVERY_FAILED:  # of the class: __init__() was not called
                log.exception("%s: The SMTPError of the handler has no reply", envelope.peer)
            return error.reply
        except asyncio.CancelledError:  # the event loop ends
            log.warning("%s: The delivery was cancelled", envelope.peer)
            raise
        except Exception:
            log.exception("%s: Cannot deliver the message", envelope.peer)
            return DELIVERY_FAILED
        if self._on_message is not None:
            await self._notify(self._on_message, envelope)
        if log.isEnabledFor(logging.INFO):
            log.info("%s: %s", envelope.peer, envelope.summary())
        return MESSAGE_ACCEPTED

    async def _notify(self, on_message: Handler, envelope: Envelope) -> None:
        try:
            result = on_message(envelope)
            if inspect.isawaitable(result):
                await result
        except Exception:  # the message is delivered: the client must not send it again
            log.exception("%s: on_message failed", envelope.peer)

    async def _call_handler(self, handler: Handler, envelope: Envelope) -> None:
        if self._handler_is_async:
            result = handler(envelope)
        else:
            result = await _call_in_thread(handler, envelope)
        if inspect.isawaitable(result):
            await _run_in_task(result)


async def _call_in_thread(handler: Handler, envelope: Envelope) -> object:
    """Call the handler in a thread of its own; return what it returns.

    The thread is a daemon, so that a handler that never returns does not keep the program
    from ending. Raises what _handler_result() raises.
    """
    loop = asyncio.get_running_loop()
    returned = asyncio.Event()
    outcome: concurrent.futures.Future[object] = concurrent.futures.Future()

    def run() -> None:
        try:
            outcome.set_result(handler(envelope))
        except BaseException as error:  # SystemExit too: it ends only this call
            outcome.set_exception(error)
        with contextlib.suppress(RuntimeError):  # the event loop is closed
            loop.call_soon_threadsafe(returned.set)

    try:
        threading.Thread(target=run, name="dsmtpd handler", daemon=True).start()
    except RuntimeError as error:
        log.error("Cannot call the handler: %s", error)
        raise SMTPError(451, "4.3.0", "Cannot accept the message, try again later") from error
    await returned.wait()
    return _handler_result(outcome)


async def _run_in_task(awaitable: Awaitable[object]) -> None:
    """Wait for what an async handler returns, in a task of its own.

    If the handler cancels that task, the connection continues.
    Raises what _handler_result() raises.
    """
    task = asyncio.ensure_future(awaitable)
    try:
        await asyncio.wait([task])
    except asyncio.CancelledError:  # the event loop ends
        task.cancel()
        raise
    _handler_result(task)


def _handler_result(outcome: concurrent.futures.Future[object] | asyncio.Future[object]) -> object:
    """Return what a handler returned.

    Raises the SMTPError that it raised, or RuntimeError for any other exception.
    """
    try:
        return outcome.result()
    except SMTPError:
        raise
    except BaseException as error:  # such as that of pytest.fail()
        raise RuntimeError("The handler failed") from error


# --- Sockets and certificates ---------------------------------------------------------


def client_host(host: str) -> str:
    """Return the address for clients on this machine of a server that listens on host."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def limit_loop_errors(loop: asyncio.AbstractEventLoop) -> None:
    """Make an event loop log one line a second while there are too many open files.

    asyncio reports the error for each place in the backlog, and accepts again after a second.
    """
    next_time = 0.0

    def on_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal next_time
        error = context.get("exception")
        if isinstance(error, ValueError) and "Invalid file descriptor" in str(error):
            return  # the server was closed before asyncio accepts again
        if not isinstance(error, OSError) or error.errno not in (errno.EMFILE, errno.ENFILE):
            loop.default_exception_handler(context)
        elif loop.time() >= next_time:
            next_time = loop.time() + 1
            log.error("Cannot accept connections: %s; trying again", error.strerror)

    loop.set_exception_handler(on_error)


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
    """Return a listening socket for each address whose family this machine supports."""
    sockets: list[socket.socket] = []
    errors: list[OSError] = []
    for family, (host, port, *scope) in addresses:
        if sockets:
            port = sockets[0].getsockname()[1]
        address = (host, port, *scope)
        try:
            sockets.append(socket.create_server(address, family=family, reuse_port=reuse_port))
        except OSError as error:
            errors.append(error)
    unsupported = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
    failures = [error for error in errors if error.errno not in unsupported]
    if failures or not sockets:
        for sock in sockets:
            sock.close()
        raise (failures or errors)[0]
    return sockets


def _stop_listening(sock: socket.socket) -> None:
    """Free the port, even if a forked process has a copy of the socket."""
    with contextlib.suppress(OSError):  # only Linux can do it
        sock.shutdown(socket.SHUT_RDWR)


def make_tls_context(
    cert: str | os.PathLike[str], key: str | os.PathLike[str] | None = None
) -> ssl.SSLContext:
    """Return a TLS context with this certificate.

    Raises ValueError; its text names the file and what is wrong with it.
    """
    import ssl

    def refuse_passphrase() -> str:  # without it, OpenSSL asks for one on the terminal
        raise ValueError("the key is encrypted; use a key without a passphrase")

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.num_tickets = 0  # libesmtp 1.1 hangs after session tickets of TLS 1.3
    files = f"certificate {os.fspath(cert)}"
    if key is not None:
        files += f" with key {os.fspath(key)}"
    try:
        for path in (cert, key or cert):
            # The errors of load_cert_chain() do not name the file.
            with open(path, "rb"):
                pass
        context.load_cert_chain(cert, key, refuse_passphrase)
    except ssl.SSLError as error:
        reason = (error.reason or "PEM").replace("_", " ").lower()
        if "pem" in reason:
            reason = "not a certificate and its private key in PEM format"
        raise ValueError(f"cannot use {files}: {reason}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot use {files}: {error}") from error
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
    import subprocess

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
        decoded subject. Raises TimeoutError after timeout seconds; its text lists the
        messages that arrived instead.
        """
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
        criteria = {"to": to, "mail_from": mail_from, "subject": subject}

        def matching() -> list[Envelope]:
            return [message for message in self._messages if _matches(message, **criteria)]

        with self._changed:
            self._changed.wait_for(lambda: len(matching()) >= count, timeout)
            found = matching()
            if len(found) >= count:
                return found[:count]
            arrived = [f"\n  {message.summary()}" for message in self._messages] or [" nothing"]
        given = [f"{name} {text!r}" for name, text in criteria.items() if text is not None]
        raise TimeoutError(
            f"{len(found)} of {count} messages{' with ' if given else ''}{', '.join(given)}"
            f" within {timeout} seconds; what arrived:{''.join(arrived)}"
        )


def _matches(message: Envelope, to: str | None, mail_from: str | None, subject: str | None) -> bool:
    return (
        (to is None or to in message.rcpt_tos)
        and (mail_from is None or mail_from == message.mail_from)
        and (subject is None or subject in message.subject)
    )


@contextlib.contextmanager
def capture(*, handler: Handler | None = None, **options: Unpack[Options]) -> Iterator[Inbox]:
    """Run a server in a background thread for the block of a with statement; yield its Inbox.

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
        limit_loop_errors(asyncio.get_running_loop())
        async with server:
            started.set_result(None)
            await asyncio.wrap_future(stopped)
            # The block may end before the client has got its reply: the inbox is filled first.
            await server.wait_for_quit(QUIT_GRACE)

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
        text = f"the handler {server.handler!r} did not return within {HANDLER_TIMEOUT} s"
        raise RuntimeError(text)


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

    config.pluginmanager.register(Fixtures(), "dsmtpd fixtures")


# --- Command line ---------------------------------------------------------------------

# Warnings of one kind that the program logs per minute, so that a client in a loop cannot fill
# the disk.
MAX_LOGGED_WARNINGS = 100

# Seconds after which a delivery, and the end of the program, no longer wait for an output that
# nobody reads.
OUTPUT_TIMEOUT = 2.0

# Characters that are written to an output at a time, to see whether somebody reads it.
OUTPUT_SIZE = 65_536

# Octets of messages and events that may wait for an output that nobody reads.
MAX_WAITING_OUTPUT = 64 * 1024 * 1024

# Characters of each part of a message that --print shows.
MAX_PRINTED_LENGTH = 100_000

# Seconds between SIGTERM and SIGKILL for a command that exceeds --timeout.
KILL_TIMEOUT = 5.0


_HELP = f"""\
usage: dsmtpd [options] [-- COMMAND [ARG ...]]

A local SMTP server that stores every message in a Maildir and never delivers it.
With a COMMAND, it runs until the command ends.

listening:
  -p, --port PORT          Listen on this port ({Config.port}); 0 selects a free one.
  -i, --interface ADDRESS  Listen on this address ({Config.interface}), or on all
                           addresses of a host name.
  --reuse-port             Share the port with other servers.

messages:
  -d, --directory DIR      Store messages in this Maildir (the current
                           directory, or a temporary one with a COMMAND).
  --handler MODULE:CALLABLE
                           Call this with each message.
  -s, --max-size BYTES     Reject larger messages ({Config.max_size}); 0 means no limit.
  --strict                 Reject messages with warnings.
  --ignore NAME            Do not give warnings of this name; repeatable.

SMTP:
  --tls MODE               Use TLS 1.2 or newer. MODE is starttls to offer
                           STARTTLS, required to reject clients without it, or
                           implicit to start with TLS.
  --cert PEM               Use this certificate (a temporary one for
                           localhost).
  --key PEM                Use this private key (the one in the --cert file).
  --auth USER:PASSWORD     Require this login; repeatable. Without it, any
                           login succeeds.
  --without KEYWORD        Do not offer this extension, such as CHUNKING;
                           repeatable.
  --disable-smtputf8       The same as --without SMTPUTF8.

testing:
  --fail RULE              Make a command or a message fail; repeatable. RULE
                           is 'VERB GLOB [xN] ACTION'. VERB is CONNECT, a
                           command, or . for a message. ACTION is CODE [x.y.z]
                           [text] [drop], delay SECONDS, drop or ok.
  --expect N               Exit with status 1 if fewer than N messages arrive,
                           or, with 0, if any does. Without a COMMAND, stop
                           after N messages.
  --timeout SECONDS        Stop after this time.

output:
  --print [FILE]           Print each message to this file (standard output).
  --json [FILE]            Write each event to this file (standard output) as
                           one line of JSON.
  -v, --verbose            Log each session as C: and S: lines.
  -q, --quiet              Log only warnings and errors.
  --version                Print the version.
  -h, --help               Print the options.

Examples:
  dsmtpd -d mail --print              store and print each message
  dsmtpd -p 0 --expect 1 -- make test run tests; fail if they sent no message
  dsmtpd --fail 'RCPT full@* 452 4.2.2 Mailbox full'

Exit status: 0 normal end, 1 an expectation was not met, 2 wrong usage, or a
directory, file, certificate or handler that cannot be used, 3 cannot listen.
With a COMMAND that ran, it is that of the command, unless the command succeeded
and an expectation was not met.
"""


class _Parser(argparse.ArgumentParser):
    """A parser that prints _HELP, and one line for wrong usage."""

    def format_help(self) -> str:
        """Return the text of --help."""
        return _HELP

    def error(self, message: str) -> NoReturn:
        """End the program because of wrong usage."""
        self.exit(2, f"{self.prog}: error: {message}\n")


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
    if unknown:
        text = f"unexpected argument {unknown[0]}; a command goes after --"
        if unknown[0].startswith("-"):
            text = f"unknown option {unknown[0]}"
        parser.error(text)
    args.auth = dict(args.auth)
    args.command = argv[end_of_options + 1 :]
    if end_of_options < len(argv) and not (args.command and args.command[0]):
        parser.error("expected a command after --, such as: dsmtpd -p 0 -- pytest")
    options = vars(args)  # each field of Config is the name of an option
    try:
        args.config = Config(**{item.name: options[item.name] for item in fields(Config)})
    except ValueError as error:
        parser.error(f"argument --{error}")
    return args


_REPEATABLE: Any = {"action": "append", "default": []}


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="dsmtpd", allow_abbrev=False)
    add = parser.add_argument
    add("-p", "--port", type=_integer, default=Config.port)
    add("-i", "--interface", default=Config.interface)
    add("--reuse-port", action="store_true")
    add("-d", "--directory")
    add("--handler")
    add("-s", "--max-size", type=_integer, default=Config.max_size)
    add("--strict", action="store_true")
    add("--ignore", choices=list(WARNINGS), **_REPEATABLE)
    add("--tls", choices=TLS_MODES)
    add("--cert")
    add("--key")
    add("--auth", type=_credentials, **_REPEATABLE)
    add("--without", type=str.upper, choices=EXTENSIONS, **_REPEATABLE)
    add("--disable-smtputf8", dest="smtputf8", action="store_false")
    add("--fail", type=_rule, **_REPEATABLE)
    add("--expect", type=_count)
    add("--timeout", type=_seconds)
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--print", nargs="?", const="-")
    output.add_argument("--json", nargs="?", const="-")
    add("-v", "--verbose", action="store_true")
    add("-q", "--quiet", action="store_true")
    add("--version", action="version", version=f"dsmtpd {__version__}")
    return parser


def _credentials(text: str) -> tuple[str, str]:
    with contextlib.suppress(UnicodeError):  # RFC 4616: UTF-8, whatever the locale is
        text = os.fsencode(text).decode()
    user, colon, password = text.partition(":")
    if not user or not colon:
        raise argparse.ArgumentTypeError("must be USER:PASSWORD")
    return user, password


def _integer(text: str) -> int:
    if not re.fullmatch("-?[0-9]{1,18}", text):
        raise argparse.ArgumentTypeError(f"must be an integer such as 1025, not {text}")
    return int(text)


def _count(text: str) -> int:
    if (number := _integer(text)) < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, not {text}")
    return number


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a number above 0, such as 10, not {text}")


def _rule(text: str) -> str:
    try:
        parse_rule(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the program; raises SystemExit with the exit status."""
    # A handler that imports dsmtpd gets this module, even when it runs as a script.
    sys.modules.setdefault("dsmtpd", sys.modules[__name__])
    args = argparse.Namespace(command=[])
    try:
        _set_signal_handler(_interrupt)
        if hasattr(signal, "SIGCHLD"):
            # If the parent process ignores it, so does this one, and gets no exit status.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        args = parse_args(argv)
        if args.command and os.getpid() == 1:
            _continue_in_child_process()
        status = _run(args)
    except KeyboardInterrupt as error:  # raised by _interrupt()
        status = error.args[0] if args.command else 0
    # A zipapp ignores what main() returns.
    sys.exit(status)


def _interrupt(number: int, frame: object) -> NoReturn:
    """Signal handler until the server listens: let the with statements clean up."""
    _set_signal_handler(signal.SIG_IGN)
    raise KeyboardInterrupt(128 + number)


def _run(args: argparse.Namespace) -> int:
    """Run the program until it is stopped; return the exit status."""
    _configure_logging(args)
    _raise_file_limit(3 * MAX_CONNECTIONS)  # a socket and the file of a message, with a reserve
    with contextlib.ExitStack() as stack:
        if args.command and args.directory is None and args.handler is None:
            import tempfile

            directory = tempfile.mkdtemp(prefix="dsmtpd-")
            stack.callback(_remove_directory, directory)
            args.config = replace(args.config, directory=directory)
        return asyncio.run(_Program(args, stack).run())


def _remove_directory(path: str) -> None:
    """Remove a directory in which threads may still create files, unless it is not there."""
    import shutil

    with contextlib.suppress(OSError):
        os.rename(path, f"{path}-removed")  # the threads no longer find it
        path = f"{path}-removed"
    shutil.rmtree(path, ignore_errors=True)


def _continue_in_child_process() -> None:
    """Fork, and return in the child process; the parent process waits for it and for orphans.

    The system gives the orphans of the command to process 1 of a container.
    """
    child = os.fork()
    if child == 0:
        os.setsid()  # Ctrl-C in a terminal reaches only process 1, which passes it on
        return
    _set_signal_handler(lambda number, frame: os.kill(child, number))
    while True:
        pid, status = os.wait()
        if pid == child:
            _set_signal_handler(signal.SIG_IGN)
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


class _WarningLimit(logging.Filter):
    """Limits the warnings of each kind in a minute. A kind is a message without its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self._minute = 0.0
        self._counts: Counter[str] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to log the record."""
        if record.levelno < logging.WARNING and record.msg != RULE_APPLIES:
            return True
        minute = record.created // 60
        if minute != self._minute:
            self._minute = minute
            self._counts.clear()
        self._counts[record.msg] += 1
        count = self._counts[record.msg]
        if count == MAX_LOGGED_WARNINGS:
            record.msg, record.args = f"{record.getMessage()} (no more of these in this minute)", ()
        return count <= MAX_LOGGED_WARNINGS


class _LogFormatter(logging.Formatter):
    """Escapes control characters, and indents the lines of a traceback.

    The traceback of a handler may have text from a message.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of the record."""
        return "\n  ".join(map(escape_unprintable, super().format(record).split("\n")))


def _configure_logging(args: argparse.Namespace) -> None:
    log.addFilter(_WarningLimit())
    output = logging.StreamHandler()
    output.setFormatter(_LogFormatter("%(asctime)s %(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[output])
    # asyncio warns of each write to a client that has disconnected.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    if args.verbose:
        log.setLevel(logging.DEBUG)
    elif args.quiet:
        log.setLevel(logging.WARNING)
    else:
        log.setLevel(logging.INFO)


def _raise_file_limit(count: int) -> None:
    """Allow this many open files, or as many as possible. The default of macOS is 256."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard != resource.RLIM_INFINITY:
            count = min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count), hard))


_MESSAGE_START = "---------- MESSAGE FOLLOWS ----------"


def _open_output(path: str, start: str) -> TextIO | None:
    """Open a file for output, and truncate it.

    Raises OSError also if it has content that does not begin with start: the path may be an
    argument that belongs after "--".
    """
    if path == "-":
        return _open_stdout()
    if os.path.isfile(path):
        with open(path, encoding="utf-8", errors="replace") as file:
            if file.read(len(start)) not in ("", start):
                raise OSError("it has other content; a command goes after --")
    return open(path, "w", encoding="utf-8", errors="backslashreplace")


def _open_stdout() -> TextIO | None:
    """Return a file that writes to standard output; None if that was closed before the start.

    It is not sys.stdout, because Python flushes that when the program ends, and would wait for a
    thread that writes to it.
    """
    try:
        descriptor = os.dup(sys.stdout.fileno())
    except (AttributeError, OSError):  # closed, or replaced by an object without a descriptor
        return sys.stdout
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # what a handler prints stays in order
    return open(descriptor, "w", encoding=sys.stdout.encoding, errors="backslashreplace")


class _Output:
    """Writes to a file in a thread, so that a file that nobody reads delays nothing else."""

    def __init__(self, file: TextIO | None, name: str) -> None:
        self._file = file  # None after an error
        self._name = name
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[tuple[Callable[[], str], int, asyncio.Future[None]] | None]
        self._queue = queue.SimpleQueue()
        self._waiting = 0  # octets that are not written yet
        self._is_writing = False
        self._progress = 0  # grows whenever the thread begins or continues to write
        self._is_read = True  # False after OUTPUT_TIMEOUT, until something is written
        self._closed = self._loop.create_future()
        # A daemon does not keep the program from ending.
        threading.Thread(target=self._run, name="dsmtpd output", daemon=True).start()

    def put(self, get_text: Callable[[], str], size: int) -> asyncio.Future[None]:
        """Have the thread write what get_text() returns, which has about size octets.

        The result of the future is set when it is written, or lost because too much waits.
        """
        written = self._loop.create_future()
        if self._waiting and self._waiting + size > MAX_WAITING_OUTPUT:
            log.warning("Nobody reads %s: an event is lost", self._name)
            written.set_result(None)
        else:
            self._waiting += size
            self._queue.put((get_text, size, written))
        return written

    async def write(self, get_text: Callable[[], str], size: int) -> None:
        """Do the same as put(), and wait until it is written, unless nobody reads the file."""
        written = self.put(get_text, size)
        if self._is_read:
            self._is_read = await self._wait(written)

    async def close(self) -> None:
        """Close the file when all is written. What nobody reads is lost."""
        self._queue.put(None)
        if not await self._wait(self._closed):
            log.error("Nobody reads %s: the rest of the output is lost", self._name)

    async def _wait(self, future: asyncio.Future[None]) -> bool:
        """Wait until a future is done; return False if nobody reads the file."""
        while not future.done():
            progress = self._progress
            await asyncio.wait([future], timeout=OUTPUT_TIMEOUT)
            if self._is_writing and self._progress == progress:
                return future.done()
        return True

    def _run(self) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop is closed
            while self._write_next():
                pass
            self._close_file()
            self._loop.call_soon_threadsafe(self._closed.set_result, None)

    def _write_next(self) -> bool:
        """Write the next text of the queue; return False at its end."""
        item = self._queue.get()
        if item is None:
            return False
        get_text, size, written = item
        self._write_text(get_text)
        self._loop.call_soon_threadsafe(self._on_written, size, written)
        return True

    def _write_text(self, get_text: Callable[[], str]) -> None:
        if self._file is None:
            return
        try:
            text = get_text()
            self._is_writing = True
            self._progress += 1
            for start in range(0, len(text), OUTPUT_SIZE):
                self._file.write(text[start : start + OUTPUT_SIZE])
                self._file.flush()
                self._progress += 1
        except OSError as error:
            log.warning("Cannot write to %s: %s", self._name, error)
            self._close_file()
        except Exception:
            log.exception("Cannot write to %s", self._name)
        finally:
            self._is_writing = False

    def _close_file(self) -> None:
        if self._file is not None and self._file is not sys.stdout:
            with contextlib.suppress(OSError):
                self._file.close()
        self._file = None

    def _on_written(self, size: int, written: asyncio.Future[None]) -> None:
        self._waiting -= size
        self._is_read = True
        written.set_result(None)


class _Command:
    """The command after "--"."""

    def __init__(self, arguments: list[str], timeout: float | None) -> None:
        self._arguments = arguments
        self._timeout = timeout
        self._process: asyncio.subprocess.Process | None = None
        self._early_signals: list[str] = []  # arrived before the process has started

    async def run(self, env: dict[str, str]) -> int:
        """Run the command; return its exit status as a shell does."""
        try:
            # With a session of its own, its processes are signalled together.
            process = await asyncio.create_subprocess_exec(
                *self._arguments, env={**os.environ, **env}, start_new_session=True
            )
        except (OSError, RuntimeError) as error:  # RuntimeError: no thread can be started
            log.error("Cannot run %s: %s", self._arguments[0], error)
            return 127
        self._process = process
        for name in self._early_signals:
            self.send_signal(name)
        status = await self._wait(process)
        self._kill_remaining_processes(process.pid)
        self._process = None
        return status if status >= 0 else 128 - status

    async def _wait(self, process: asyncio.subprocess.Process) -> int:
        """Wait until the process ends, or end it after --timeout; return its exit status."""
        ended = asyncio.ensure_future(process.wait())
        await asyncio.wait([ended], timeout=self._timeout)
        if ended.done():
            return ended.result()
        for name in ("SIGTERM", "SIGKILL"):
            log.warning("Timeout: sending %s to %s", name, self._arguments[0])
            self.send_signal(name)
            await asyncio.wait([ended], timeout=KILL_TIMEOUT)
            if ended.done():
                break
        status = await ended
        return -signal.SIGTERM if status == 0 else status  # servers end with status 0

    def send_signal(self, name: str) -> None:
        """Send a signal to all processes of the command.

        A signal that arrives before the command starts is sent as soon as it has started.
        """
        if self._process is None:
            self._early_signals.append(name)
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.name == "posix":
                os.killpg(self._process.pid, signal.Signals[name])
            elif name in ("SIGTERM", "SIGKILL"):  # Windows has only these
                self._process.kill()
            # On Windows, the console sends Ctrl-C and Ctrl-Break to the command as well.

    def _kill_remaining_processes(self, pid: int) -> None:
        """Kill the processes that the command has left running, after it has ended."""
        if os.name != "posix":
            return
        with contextlib.suppress(PermissionError):
            try:
                os.getsid(pid)  # if its number is another process now, that is not killed
            except ProcessLookupError:
                self.send_signal("SIGKILL")


def _exit_with_error(status: int, text: str) -> NoReturn:
    """Log why the server cannot start, and end the program."""
    log.error("%s", text)
    sys.exit(status)


class _Program:
    """One run of the program: the server, its output, its signal handlers and the command."""

    def __init__(self, args: argparse.Namespace, cleanup: contextlib.ExitStack) -> None:
        self._args = args
        self._cleanup = cleanup  # removes temporary files
        self._command = _Command(args.command, args.timeout)
        self._output: _Output | None = None
        self._loop: asyncio.AbstractEventLoop
        self._stop = asyncio.Event()
        self._received = 0  # messages
        self._refused = 0  # commands and messages

    async def run(self) -> int:
        """Run until the program is stopped; return the exit status."""
        self._loop = asyncio.get_running_loop()
        limit_loop_errors(self._loop)
        server = await self._start()
        self._handle_signals()
        self._announce(server)
        status = 0
        if self._args.command:
            status = await self._command.run(self._environment(server))
        else:
            await self._wait_until_stopped(server)
        log.info("Cleaning up")
        # A test run does not wait for its handler forever.
        is_test_run = self._args.command or self._args.expect is not None or self._args.timeout
        timeout = HANDLER_TIMEOUT if is_test_run and self._args.handler else None
        try:
            await asyncio.wait_for(server.close(), timeout)
            if self._output is not None:
                await self._output.close()
        except asyncio.TimeoutError:
            name = self._args.handler
            log.error("The handler %s did not return within %g s", name, HANDLER_TIMEOUT)
            self._cleanup.close()
            os._exit(status or 1)  # asyncio.run() would wait for the handler as well
        expectation_status = self._check_expectation(server)
        return status or expectation_status

    async def _start(self) -> Server:
        """Start the server and the output, or end the program with a line that says why not."""
        config: Config = self._args.config
        try:
            handler = _load_handler(self._args.handler) if self._args.handler else None
        except ValueError as error:
            _exit_with_error(2, f"Cannot start: {error}")
        try:
            sockets = _systemd_sockets() or listen(config)
        except (OSError, ValueError) as error:
            _exit_with_error(3, f"Cannot listen on {_listen_error(config, error)}")
        server = Server(
            config, handler=handler, on_message=self._on_message, on_refusal=self._on_refusal
        )
        try:
            await server.start(sockets)
            if self._args.json or self._args.print:
                self._output = self._start_output(self._args.json or self._args.print)
        except (OSError, RuntimeError, ValueError, mailbox.Error) as error:
            await server.close()
            _exit_with_error(2, f"Cannot start: {error}")
        if server.cafile is not None:  # the server does not remove it at the second signal
            self._cleanup.callback(_remove_directory, os.path.dirname(server.cafile))
        return server

    def _start_output(self, path: str) -> _Output:
        name = "standard output" if path == "-" else path
        try:
            return _Output(_open_output(path, "{" if self._args.json else _MESSAGE_START), name)
        except (OSError, RuntimeError) as error:  # RuntimeError: no thread can be started
            reason = error.strerror if isinstance(error, OSError) else None
            raise ValueError(f"cannot write to {name}: {reason or error}") from error

    def _check_expectation(self, server: Server) -> int:
        """Return the exit status, and log why it is not 0."""
        expected, rejected = self._args.expect, server.rejected_messages
        if expected is None:
            return 0
        is_met = self._received == 0 if expected == 0 else self._received >= expected
        if is_met and not rejected:
            return 0
        text = (
            "Expected messages: %d, arrived: %d, rejected by --strict: %d,"
            " refused commands and messages: %d"
        )
        log.error(text, expected, self._received, rejected, self._refused)
        return 1

    def _announce(self, server: Server) -> None:
        for address in server.addresses:
            log.info("Starting dsmtpd %s at %s", __version__, format_address(address))
        if self._args.handler:
            log.info("Handing the incoming emails to %s", self._args.handler)
        if server.maildir is not None:
            log.info("Storing the incoming emails into %s", server.maildir.path)
            log.info("Found a Maildir storage with %s mails", server.maildir.count())
        for host, port in server.addresses:
            self._put_event("listening", host=host, port=port, version=__version__)

    async def _on_message(self, envelope: Envelope) -> None:
        self._received += 1
        expected = self._args.expect
        if expected is not None and self._received >= expected and not self._args.command:
            self._stop.set()
        if self._output is not None:
            get_text = partial(_message_event if self._args.json else _as_text, envelope)
            # An estimate: the parameters of recipients and the other fields need memory as well.
            size = len(envelope.content) + sum(len(rcpt_to) + 500 for rcpt_to in envelope.rcpt_tos)
            await self._output.write(get_text, size + 1000)

    def _on_refusal(self, refusal: Refusal) -> None:
        self._refused += 1
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
        if self._output is not None and self._args.json:
            text = _json_line(event, **values)
            self._output.put(lambda: text, len(text))

    def _handle_signals(self) -> None:
        if os.name == "posix":
            # Otherwise, a signal just before the event loop waits is handled at its next event.
            reader, writer = socket.socketpair()
            self._cleanup.callback(reader.close)
            self._cleanup.callback(writer.close)
            self._cleanup.callback(signal.set_wakeup_fd, -1)
            reader.setblocking(False)
            writer.setblocking(False)
            self._loop.add_reader(reader, reader.recv, 4096)
            signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        _set_signal_handler(self._on_signal)
        if hasattr(signal, "SIGTSTP") and signal.getsignal(signal.SIGTSTP) is signal.SIG_DFL:
            signal.signal(signal.SIGTSTP, self._on_suspend)

    def _on_signal(self, number: int, frame: object) -> None:
        """Handle the first signal: pass it to the command, and stop."""
        _set_signal_handler(self._on_second_signal)
        self._command.send_signal(signal.Signals(number).name)
        with contextlib.suppress(RuntimeError):  # the event loop is closed: the program ends
            self._loop.call_soon_threadsafe(self._stop.set)

    def _on_second_signal(self, number: int, frame: object) -> NoReturn:
        """Kill the command, and end the program by this signal without waiting for anything."""
        self._command.send_signal("SIGKILL")
        self._cleanup.close()
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
        os._exit(128 + number)  # the system does not end process 1 of a container

    def _on_suspend(self, number: int, frame: object) -> None:
        """Stop at Ctrl-Z, together with the command, and continue with it."""
        # The system ignores SIGTSTP in a session without a terminal, such as that of the command.
        self._command.send_signal("SIGSTOP")
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)  # returns at SIGCONT
        signal.signal(number, self._on_suspend)
        self._command.send_signal("SIGCONT")

    async def _wait_until_stopped(self, server: Server) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._stop.wait(), self._args.timeout)
        if self._args.expect is not None and self._received >= self._args.expect:
            await server.wait_for_quit(STOP_TIMEOUT)

    def _environment(self, server: Server) -> dict[str, str]:
        """Return the environment variables that tell the command where to send messages."""
        env = {"SMTP_HOST": client_host(server.host), "SMTP_PORT": str(server.port)}
        if server.maildir is not None:
            env["DSMTPD_MAILDIR"] = str(server.maildir.path)
        if server.cafile is not None:
            env["DSMTPD_CAFILE"] = server.cafile
        return env


_LISTEN_ERRORS = {
    errno.EADDRINUSE: "the port is in use; use another one, or -p 0 for any free port",
    errno.EADDRNOTAVAIL: "this machine does not have that address",
    errno.EACCES: "ports below 1024 are reserved for root; use -p 1025, or systemd with"
    " contrib/dsmtpd.socket",
}


def _listen_error(config: Config, error: Exception) -> str:
    """Return the address, what is wrong with it, and what to use instead."""
    text = str(error)
    if isinstance(error, socket.gaierror | UnicodeError):
        text = "unknown host name"
    elif isinstance(error, OSError):
        text = _LISTEN_ERRORS.get(error.errno or 0, text)
    return f"{format_address((config.interface, config.port))}: {text}"


def _systemd_sockets() -> list[socket.socket]:
    """Return the listening sockets that systemd passes to this process (sd_listen_fds(3))."""
    is_for_us = os.environ.pop("LISTEN_PID", "") == str(os.getpid())
    count = int(os.environ.pop("LISTEN_FDS", "0"))
    if not is_for_us:
        return []
    sockets = [socket.socket(fileno=3 + number) for number in range(count)]
    for sock in sockets:
        sock.set_inheritable(False)  # not for the command
        if sock.family not in (socket.AF_INET, socket.AF_INET6):
            raise OSError("LISTEN_FDS has a socket that is not a TCP socket")
    return sockets


def _load_handler(name: str) -> Handler:
    """Return the callable MODULE:CALLABLE. Raises ValueError if there is none."""
    module_name, _, path = name.partition(":")
    if not module_name or not path:
        raise ValueError(f"--handler {name}: must be MODULE:CALLABLE, such as my_file:my_function")
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
        handler: Handler = operator.attrgetter(path)(module)
    except (Exception, SystemExit) as error:  # the module may raise anything
        raise ValueError(f"--handler {name}: {type(error).__name__}: {error}") from error
    if not callable(handler):
        raise ValueError(f"--handler {name}: {path} is not callable")
    return handler


def _set_signal_handler(handler: Callable[[int, object], object] | signal.Handlers) -> None:
    """Call handler(number, frame) at Ctrl-C, Ctrl-Break, SIGTERM, SIGHUP and SIGQUIT."""
    for name in ("SIGINT", "SIGTERM", "SIGBREAK", "SIGHUP", "SIGQUIT"):
        number = signal.Signals.__members__.get(name)
        if number is None:
            continue
        # Keep what the parent ignores: nohup does it for SIGHUP, and "&" in a script for SIGQUIT.
        if name in ("SIGHUP", "SIGQUIT") and signal.getsignal(number) is signal.SIG_IGN:
            continue
        signal.signal(number, handler)


def _json_line(event: str, **values: object) -> str:
    import json

    return json.dumps({"event": event, **values}) + "\n"


def _message_event(envelope: Envelope) -> str:
    """Return a message as a line of JSON."""
    attachments = [
        {"name": item.name, "type": item.type, "size": len(item.content)}
        for item in envelope.attachments
    ]
    return _json_line(
        "message",
        time=envelope.received.isoformat(),
        peer=envelope.peer,
        helo=envelope.helo,
        tls=envelope.tls,
        user=envelope.user,
        mail_from=envelope.mail_from,
        mail_options=envelope.mail_options,
        rcpt_tos=envelope.rcpt_tos,
        rcpt_options=envelope.rcpt_options,
        subject=envelope.subject,
        text=envelope.text,
        html=envelope.html,
        links=envelope.links,
        attachments=attachments,
        size=len(envelope.content),
        warnings=envelope.warnings,
        path=envelope.path and os.fsencode(envelope.path).decode("utf-8", "replace"),
    )


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
