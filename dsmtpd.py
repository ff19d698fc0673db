"""An SMTP server that stays home: it keeps every message and passes none on.

Usage::

    python dsmtpd.py -p 1025 -d mail     # every message becomes a file in mail/new/

It is for developers at their desk and for CI: what an application sends to it is
accepted, stored in a Maildir, and never reaches anybody.

It follows RFC 5321 (SMTP), RFC 1870 (SIZE), RFC 6152 (8BITMIME), RFC 6531 (SMTPUTF8),
RFC 2920 (PIPELINING), RFC 2034 and RFC 3463 (ENHANCEDSTATUSCODES), RFC 3461 (DSN),
RFC 3030 (CHUNKING, BINARYMIME), RFC 3207 (STARTTLS), RFC 4954 and RFC 4616 (AUTH PLAIN).
Where those leave a choice it does what Postfix does.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import concurrent.futures
import contextlib
import email
import email.header
import email.message
import errno
import importlib
import inspect
import logging
import mailbox
import operator
import os
import re
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timezone
from email.utils import format_datetime
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache, partial
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

if TYPE_CHECKING:
    import email.policy
    import ssl
    from pathlib import Path  # takes a thirtieth of the time until the server listens

__version__ = "2.0.0"
__all__ = ["Config", "Envelope", "Inbox", "Reply", "SMTPError", "Server", "capture"]

log = logging.getLogger("dsmtpd")
log.addHandler(logging.NullHandler())  # tests with capture() need no log on the screen


# --- Limits and configuration -------------------------------------------------------

# Octets of a command line with its CRLF. RFC 5321 section 4.5.3.1.4 asks for 512, and
# RFC 4954 section 4 for 12,288, which AUTH needs; one limit for all is simpler.
MAX_COMMAND = 12_288

# Recipients of one message. RFC 5321 section 4.5.3.1.8 asks for 100; Postfix has 1000.
MAX_RECIPIENTS = 1000

# Errors in a row until the client is sent away; smtpd_hard_error_limit in Postfix is 20.
MAX_ERRORS = 20

# Sessions at the same time, so that a loop in a client cannot use up the machine.
MAX_CONNECTIONS = 1000

# Octets of content that all sessions hold together; twice the message size if that is
# more, so that one large message never keeps a second one out.
MAX_CONTENT = 256 * 1024 * 1024

# Octets of all addresses and parameters of one message: enough for those recipients, with
# 512 octets each, and too little to use up the machine.
MAX_ADDRESSES = 524_288

# Characters of encoded-words in a subject that are decoded.
MAX_ENCODED = 4096

# Seconds of silence. RFC 5321 section 4.5.3.2.7 asks for five minutes.
IDLE_TIMEOUT = 300.0

# Seconds that clients have for reading the 421 when the server stops.
STOP_TIMEOUT = 0.5

# Seconds that the client of a message has for its QUIT when the block of capture() ends.
LAST_WORD = 0.2

# Seconds after which a delivery counts as slow, and others get threads of their own.
PATIENCE = 0.01

# Octets of one read, and of the replies that may wait until they are written.
CHUNK = 65_536


_TLS = (None, "starttls", "implicit")


@dataclass(frozen=True)
class Config:
    """The options of a server, named as on the command line; checked when it is made.

    Raises ValueError, with a text that says what is allowed.
    """

    interface: str = "127.0.0.1"
    """Address or host name to listen at; every address that a name has is used."""
    port: int = 1025
    """TCP port; 0 takes a free one."""
    directory: str | os.PathLike[str] | None = None
    """Maildir to store into; None is the current directory."""
    max_size: int = 33_554_432
    """Octets of the largest message that is accepted (RFC 1870); 0 for no limit."""
    smtputf8: bool = True
    """Whether the SMTPUTF8 extension (RFC 6531) is on offer."""
    tls: str | None = None
    """ "starttls" (RFC 3207), "implicit" (RFC 8314), or None for no TLS."""
    cert: str | os.PathLike[str] | None = None
    """PEM file of the certificate; None makes a throw-away one for localhost."""
    key: str | os.PathLike[str] | None = None
    """PEM file of its key; None where the certificate's file has it as well."""
    auth: dict[str, str] = field(default_factory=dict, repr=False)
    """{user: password} of those who may log in, and must; empty lets everybody do both."""
    fail: list[str] = field(default_factory=list)
    """Rules of failures on purpose, as parse_rule takes them; the first that matches counts."""
    strict: bool = False
    """Whether a message that lint() warns of is refused."""
    reuse_port: bool = False
    """Whether several servers may listen at the same port, each getting a share."""

    def __post_init__(self) -> None:
        port, size = self.port, self.max_size
        shared = not self.reuse_port or hasattr(socket, "SO_REUSEPORT")
        for fine, wanted in (
            (
                self.interface.strip(),
                "interface: an address or a host name is needed, as 127.0.0.1",
            ),
            (0 <= port <= 65_535, f"port: must be from 0 (any free one) to 65535, not {port}"),
            (size >= 0, f"max-size: must be a number of bytes, or 0 for no limit, not {size}"),
            (self.tls in _TLS, f"tls: must be starttls or implicit, not {self.tls}"),
            (self.tls or not self.cert, "cert: has no use without tls, starttls or implicit"),
            (self.cert or not self.key, "key: has no use without cert"),
            (not isinstance(self.fail, str), "fail: must be a list of rules, not one"),
            (shared, "reuse-port: this system cannot share a port"),
        ):
            if not fine:
                raise ValueError(wanted)


# --- Replies --------------------------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    """What the server says (RFC 5321 section 4.2).

    code is the three-digit reply code, status the enhanced status code of RFC 3463 as
    "2.1.0", or "" where none belongs, and each line of text becomes a line of the reply.
    """

    code: int
    status: str
    text: str

    @cached_property
    def octets(self) -> bytes:
        """The reply as it is sent; most replies are constants, and said all day."""
        # RFC 2034 section 4: the status code stands on every line.
        status = self.status and self.status + " "
        *lines, last = [status + line for line in self.text.split("\n")]
        rows = [f"{self.code}-{line}\r\n" for line in lines] + [f"{self.code} {last}\r\n"]
        return "".join(rows).encode("ascii", "replace")

    @cached_property
    def closes(self) -> bool:
        """Whether the server closes the connection after it (RFC 5321 section 3.8)."""
        return self.code in (221, 421)


class SMTPError(Exception):
    """A command or a message is refused; carries the Reply that says so, as `reply`.

    code is 400 to 599, status an enhanced status code of the same class (RFC 3463).
    Raises ValueError when they do not fit.
    """

    def __init__(self, code: int, status: str, text: str) -> None:
        if code // 100 not in (4, 5) or not re.fullmatch(
            rf"{code // 100}(\.\d{{1,3}}){{2}}", status
        ):
            raise ValueError(f"not a code and a status of failure: {code} {status}")
        super().__init__(code, status, text)
        self.reply = Reply(code, status, " ".join(text.split()))


OK = Reply(250, "2.0.0", "OK")
BYE = Reply(221, "2.0.0", "Bye")
SENDER_OK = Reply(250, "2.1.0", "Sender OK")
RECIPIENT_OK = Reply(250, "2.1.5", "Recipient OK")
SEND_DATA = Reply(354, "", "End data with <CR><LF>.<CR><LF>")
ACCEPTED = Reply(250, "2.0.0", "Message accepted")


# --- Grammar --------------------------------------------------------------------------
#
# Every expression takes one look at each character, whatever the text, so that no
# client can make one slow.

# The classes say what is not in them: that compiles in a tenth of the time. None has the C0
# and C1 controls, which terminals obey; all have UTF8-non-ascii (RFC 6531 section 3.3).
_NOT_TEXT = r"\x00-\x1f\x7f-\x9f"
# RFC 5322 section 3.2.3: atext, and RFC 5321 section 4.1.2: Dot-string
_ATEXT = rf'[^{_NOT_TEXT} "(),.:;<>@\[\\\]]'
_DOT_STRING = rf"{_ATEXT}+(?:\.{_ATEXT}+)*"
# Quoted-string = DQUOTE *(qtextSMTP / quoted-pairSMTP) DQUOTE
_QUOTED_STRING = rf'"(?:[^{_NOT_TEXT}"\\]|\\[ -~])*"'
# Domain = sub-domain *("." sub-domain); hyphens only inside a sub-domain
_LET_DIG = rf"[^{_NOT_TEXT} -/:-@\[-`{{-~]"
_SUB_DOMAIN = rf"{_LET_DIG}+(?:-+{_LET_DIG}+)*"
_DOMAIN = rf"{_SUB_DOMAIN}(?:\.{_SUB_DOMAIN})*"
# RFC 5321 section 4.1.3: IPv4-, IPv6- and General-address-literal
_SNUM = r"(?:25[0-5]|2[0-4][0-9]|[01]?[0-9]{1,2})"
_LITERAL = (
    rf"\[(?:{_SNUM}(?:\.{_SNUM}){{3}}|(?i:IPv6):(?P<ipv6>[0-9A-Fa-f:.]+)"
    r"|(?!(?i:IPv6):)(?:[A-Za-z0-9]|-+[A-Za-z0-9])+:[!-Z^-~]+)\]"
)
# A-d-l = At-domain *( "," At-domain )
_ROUTE = rf"@{_DOMAIN}(?:,@{_DOMAIN})*:"
_MAILBOX = re.compile(
    rf"(?:{_ROUTE})?(?P<mailbox>(?:{_DOT_STRING}|{_QUOTED_STRING})(?:@(?:{_DOMAIN}|{_LITERAL}))?)"
)
# The brackets of a path, which a quoted string may contain too; an unbalanced quote ends
# up inside, for parse_mailbox to refuse. RFC 5321 section 3.3 forbids the blank after the
# colon; everybody takes it.
_PATH = r':[ ]*<(?P<path>[^">]*(?:"(?:[^"\\]|\\.)*"[^">]*)*|[^>]*)>(?: +(?P<parameters>.*))?'
_FROM = re.compile("FROM" + _PATH, re.IGNORECASE | re.ASCII)
_TO = re.compile("TO" + _PATH, re.IGNORECASE | re.ASCII)
# What names a client in EHLO: anything visible, in one word. RFC 5321 section 4.1.1.1 wants
# a domain or an address literal; what applications have is the name of their machine. What
# the decoder makes of octets that are not UTF-8 is no name; parse_mailbox asks by itself.
_HELO = re.compile(rf"[^{_NOT_TEXT}\ud800-\udfff ]+")

# RFC 3461 section 4: xtext = *( xchar / hexchar )
_XTEXT = r"(?:[!-*,-<>-~]|\+[0-9A-F]{2})+"

# Parameter keyword -> what may follow it.
MAIL_PARAMETERS = {
    "SIZE": "=[0-9]{1,20}",  # RFC 1870 section 6.1
    "BODY": "=(?:7BIT|8BITMIME|BINARYMIME)",  # RFC 6152, RFC 3030 section 3
    "SMTPUTF8": "",  # RFC 6531 section 3.4
    "AUTH": f"={_XTEXT}",  # RFC 4954 section 5; "<>" is xtext as well
    "RET": "=(?:FULL|HDRS)",  # RFC 3461 section 4.3
    "ENVID": f"={_XTEXT}",  # RFC 3461 section 4.4
}
RCPT_PARAMETERS = {
    # RFC 3461 sections 4.1 and 4.2
    "NOTIFY": "=(?:NEVER|(?:SUCCESS|FAILURE|DELAY)(?:,(?:SUCCESS|FAILURE|DELAY))*)",
    "ORCPT": f"=[a-z0-9-]+;{_XTEXT}",
}


# bdat-cmd = "BDAT" SP chunk-size [ SP "LAST" ] (RFC 3030 section 2)
_BDAT = re.compile("0*(?P<size>[0-9]{1,20})(?P<last>(?![0-9]).*)")


def extensions(config: Config, *, tls: bool, user: str | None) -> list[str]:
    """The keyword lines of the EHLO reply (RFC 5321 section 4.1.1.1).

    tls is whether the session is in TLS, and user who has logged in.
    """
    lines = [
        f"SIZE {config.max_size}",
        "8BITMIME",
        "SMTPUTF8" if config.smtputf8 else "",
        "PIPELINING",
        "ENHANCEDSTATUSCODES",
        "CHUNKING",
        "BINARYMIME",
        "DSN",
        "HELP",
        "STARTTLS" if config.tls == "starttls" and not tls else "",
        "AUTH PLAIN LOGIN" if user is None else "",
    ]
    return [line for line in lines if line]


def parse_parameters(text: str, known: dict[str, str]) -> dict[str, str]:
    """Mail-parameters / Rcpt-parameters = esmtp-param *(SP esmtp-param)

    known is MAIL_PARAMETERS or RCPT_PARAMETERS. Returns {keyword in capitals: value}, the
    value "" where there is none. Raises SMTPError 555 for a keyword that is not known
    (RFC 5321 section 4.1.1.11), and 501 for a wrong value or a keyword that comes twice.
    """
    found: dict[str, str] = {}
    for parameter in filter(None, text.split(" ")):
        keyword, equals, value = parameter.partition("=")
        keyword = keyword.upper()
        # str.upper turns some letters outside ASCII into letters inside it.
        if keyword not in known or not parameter[: len(keyword)].isascii():
            raise SMTPError(555, "5.5.4", "Parameter not recognized")
        if keyword in found:
            raise SMTPError(501, "5.5.4", f"{keyword} is given twice")
        if not re.fullmatch(known[keyword], equals + value, re.IGNORECASE | re.ASCII):
            raise SMTPError(501, "5.5.4", f"{keyword} has a wrong value")
        found[keyword] = value
    return found


def parse_mailbox(text: str, status: str) -> str:
    """[ A-d-l ":" ] Mailbox, or a Local-part alone, as in <Postmaster>

    Returns the address without the source route (RFC 5321 appendix C). Raises SMTPError
    501 with the enhanced status given, or 5.5.2 where the text is not valid UTF-8.
    """
    # What the decoder made of octets that are not UTF-8
    if not text.isascii() and re.search("[\udc80-\udcff]", text):
        raise SMTPError(501, "5.5.2", "Address is not valid UTF-8")
    match = _MAILBOX.fullmatch(text)
    if match is None or not (match["ipv6"] is None or _is_ipv6(match["ipv6"])):
        raise SMTPError(501, status, "Bad address syntax")
    return match["mailbox"]


def _is_ipv6(text: str) -> bool:
    try:
        return bool(socket.inet_pton(socket.AF_INET6, text))
    except OSError:
        return False


def printable(text: str) -> str:
    """The text with what is not printable escaped, so that a log line stays one line."""
    return text if text.isprintable() else re.sub(r"[^ -~]+", _escape, text)


def _escape(match: re.Match[str]) -> str:
    if match[0].isprintable():
        return match[0]
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in match[0]
    )


# --- Envelope, lint, and actions ------------------------------------------------------


def _host_name() -> str:
    """The name of this machine, as a name of files and in replies; nothing is looked up."""
    return re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname()) or "localhost"


HOSTNAME = _host_name()
GREETING = Reply(220, "", f"{HOSTNAME} ESMTP dsmtpd {__version__}")


@dataclass(frozen=True)
class Envelope:
    """One message, with what the session knew about it."""

    peer: str
    """The client, as "127.0.0.1:54321"; an IPv6 address stands in brackets."""
    helo: str
    """What the client called itself in EHLO or HELO."""
    protocol: str
    """SMTP, ESMTP, UTF8SMTP and so on (RFC 3848, RFC 6531 section 4.3)."""
    tls: bool
    """Whether the message came over TLS."""
    user: str | None
    """The name of a login, or None."""
    mail_from: str
    """The reverse-path without its brackets; "" is the null reverse-path."""
    mail_options: dict[str, str]
    """The parameters of MAIL: {keyword in capitals: value, or ""}."""
    rcpt_tos: list[str]
    """The forward-paths without their brackets, in the order given."""
    rcpt_options: list[dict[str, str]]
    """The parameters of RCPT, one dictionary for each of rcpt_tos."""
    content: bytes
    """The content as sent: line ends are CRLF, and dot-stuffing is undone."""
    received: datetime
    """When the end of the content arrived, with its time zone."""
    warnings: list[str] = field(default_factory=list)
    """What a real server would mind about the message."""
    path: Path | None = None
    """The file in the Maildir, once the message is stored."""

    @cached_property
    def has_bare_cr(self) -> bool:
        """Whether the content has a CR without LF (RFC 5321 section 2.3.8)."""
        return _BARE_CR.search(self.content) is not None

    @cached_property
    def email(self) -> email.message.EmailMessage:
        """The content, parsed; a field that makes no sense is the text that was sent."""
        import email.parser

        parser = email.parser.BytesParser(policy=_lenient_policy())
        try:
            message = parser.parsebytes(self.content)
        except RecursionError:  # parts in parts in parts: the body is a text, then
            message = parser.parsebytes(self.content, headersonly=True)
        assert isinstance(message, email.message.EmailMessage)
        return message

    @cached_property
    def subject(self) -> str:
        """The decoded Subject, in one line; "" where there is none."""
        match = re.match(_SUBJECT, self.content[:_SUBJECT_WITHIN])
        raw = match["body"].decode("utf-8", "replace") if match else ""
        text = re.sub(_ENCODED_WORDS, _decode_words, " ".join(raw.split()))
        return " ".join(text.encode("utf-8", "replace").decode().split())


@lru_cache
def _lenient_policy() -> email.policy.EmailPolicy:
    import email.policy  # takes as long as half of what the server needs to start

    class LenientPolicy(email.policy.EmailPolicy):
        """The default, but for fields that make its parser raise errors of many kinds."""

        def header_fetch_parse(self, name: str, value: str) -> Any:
            try:
                return super().header_fetch_parse(name, value)
            except Exception:
                return " ".join(value.encode("utf-8", "replace").decode().split())

    return LenientPolicy()


# The first Subject of the header section, with its folded lines. Only the top of the
# content is searched, so that one without an empty line is not read through. These two are
# compiled when somebody asks for a subject.
_SUBJECT = (
    rb"(?i)(?:(?!\r?\n|subject[ \t]*:)[^\n]+\n)*subject[ \t]*:(?P<body>[^\n]*(?:\n[ \t]+[^\n]*)*)"
)
_SUBJECT_WITHIN = 65_536
# RFC 2047 section 2; blanks between two encoded-words do not count.
_ENCODED_WORD = r"=\?[!->@-~]+\?[bq]\?[!->@-~]*\?="
_ENCODED_WORDS = f"(?i){_ENCODED_WORD}(?: {_ENCODED_WORD})*"


def _decode_words(match: re.Match[str]) -> str:
    # Anything can stand in an encoded-word: its decoders raise errors of many kinds, and take
    # long for a long one; RFC 2047 section 2 allows 75 characters for each.
    with contextlib.suppress(Exception):
        if len(match[0]) <= MAX_ENCODED:
            return str(email.header.make_header(email.header.decode_header(match[0])))
    return match[0]


_BARE_CR = re.compile(rb"\r(?!\n)")
_EMPTY_LINE = re.compile(rb"\n\r?\n")
_FIELD_NAME = re.compile(rb"^([!-9;-~]+)[ \t]*:.*", re.MULTILINE)
# Octets of the header section that are looked at for its fields.
_FIELDS_WITHIN = 1_048_576
# RFC 5322 section 3.6
_REQUIRED_FIELDS = {
    b"date": "missing-date: no Date field (RFC 5322 section 3.6.1)",
    b"from": "missing-from: no From field (RFC 5322 section 3.6.2)",
    b"message-id": "missing-message-id: no Message-ID field (RFC 5322 section 3.6.4)",
}
_UNIQUE_FIELDS = (
    *("Date", "From", "Sender", "Reply-To", "To", "Cc", "Bcc"),
    *("Message-ID", "In-Reply-To", "References", "Subject"),
)


def _split(content: bytes) -> tuple[bytes, bytes]:
    """The header section, and what follows it from its empty line on."""
    if content.startswith((b"\n", b"\r\n")):
        return b"", content
    match = _EMPTY_LINE.search(content)
    at = match.start() if match else len(content)
    return content[:at], content[at:]


def lint(envelope: Envelope) -> list[str]:
    """What real servers mind about a message, each as "name: what it is (RFC section)".

    It looks at the whole, not at each line, so that a large message takes no longer than a
    few copies of it.
    """
    content, mail_options = envelope.content, envelope.mail_options
    body_type = mail_options.get("BODY", "7BIT").upper()
    warnings = [] if body_type == "BINARYMIME" else _lint_lines(envelope)
    if not content.isascii():
        header, body = _split(content)
        if body_type == "7BIT" and not body.isascii():
            warnings.append("undeclared-8bit: the body needs BODY=8BITMIME (RFC 6152 section 3)")
        if "SMTPUTF8" not in mail_options and not header.isascii():
            warnings.append("utf8-header: the header needs SMTPUTF8 (RFC 6531 section 3.4)")
    return warnings + _lint_fields(content)


def _lint_lines(envelope: Envelope) -> list[str]:
    warnings, content = [], envelope.content
    # Where no CR is bare, each begins a CRLF; single octets are counted in a third of the time.
    crlf = b"\r\n" if envelope.has_bare_cr else b"\r"
    if content.count(b"\n") > content.count(crlf):
        warnings.append("bare-lf: LF without CR in the content (RFC 5321 section 2.3.8)")
    if envelope.has_bare_cr:
        warnings.append("bare-cr: CR without LF in the content (RFC 5321 section 2.3.8)")
    if _has_long_line(content):
        warnings.append("long-line: a line of over 998 octets (RFC 5322 section 2.1.1)")
    return warnings


def _lint_fields(content: bytes) -> list[str]:
    header, _ = _split(content[:_FIELDS_WITHIN])
    names = _FIELD_NAME.findall(header.lower())
    once = set(names)
    warnings = [text for name, text in _REQUIRED_FIELDS.items() if name not in once]
    if len(names) > len(once):
        warnings += [
            f"duplicate-field: more than one {name} field (RFC 5322 section 3.6)"
            for name in _UNIQUE_FIELDS
            if names.count(name.lower().encode()) > 1
        ]
    if b"bcc" in once:
        warnings.append("bcc-header: a Bcc field tells everybody (RFC 5322 section 3.6.3)")
    return warnings


def _has_long_line(content: bytes) -> bool:
    """Looks for a line end in steps of the longest line with its CRLF, not for each line."""
    start = 0
    while start + 998 < len(content):
        end = content.rfind(b"\n", start, start + 1000)
        if end < 0:
            return True
        start = end + 1
    return False


def _summary(envelope: Envelope) -> str:
    """The message in a line of the log."""
    rcpt_tos = ", ".join(envelope.rcpt_tos)
    return printable(f"{envelope.mail_from} -> {rcpt_tos} [{envelope.subject}]")


@dataclass
class Transaction:
    """What MAIL began, and what RSET forgets (RFC 5321 section 3.3)."""

    mail_from: str
    mail_options: dict[str, str]
    rcpt_tos: list[str] = field(default_factory=list)
    rcpt_options: list[dict[str, str]] = field(default_factory=list)
    octets: int = 0
    """Of the addresses and their parameters."""
    content: bytearray = field(default_factory=bytearray)
    chunks: int = 0
    """How often BDAT has added to the content."""
    refusal: SMTPError | None = None
    """Why the content is read but not kept."""


# Actions are NamedTuples, since a frozen dataclass takes six times as long to make, which
# each start would pay for. Ask for their class: those without fields are false, and equal.


class Deliver(NamedTuple):
    """Action: store the envelope, then send the reply to the end of the content."""

    envelope: Envelope


class StartTLS(NamedTuple):
    """Action: begin TLS, and throw away what has arrived in plain text (RFC 3207)."""


class Delay(NamedTuple):
    """Action: wait so many seconds before the next action; other sessions go on."""

    seconds: float


class Close(NamedTuple):
    """Action: close the connection without a word."""


Action = Reply | Deliver | StartTLS | Delay | Close
Reader = Callable[[], Action | None]
# A SASL mechanism: yields prompts, is sent the answers, returns the user and the password.
Dialogue = Generator[str, bytes, tuple[bytes, bytes]]


def _plain() -> Dialogue:
    """RFC 4616: message = [authzid] NUL authcid NUL passwd"""
    answer = yield ""
    _, user, password = answer.split(b"\0")
    return user, password


def _login() -> Dialogue:
    """The prompts are those of Microsoft's LOGIN, which no RFC describes."""
    user = yield "Username:"
    password = yield "Password:"
    return user, password


MECHANISMS = {"PLAIN": _plain, "LOGIN": _login}


# --- Failures on purpose --------------------------------------------------------------

# The moments that rules are for: the greeting, the commands, and the end of the content.
STAGES = (
    *("CONNECT", "EHLO", "HELO", "STARTTLS", "AUTH", "MAIL", "RCPT", "DATA", "BDAT", "."),
    *("RSET", "NOOP", "QUIT", "VRFY", "HELP"),
)


@dataclass
class Rule:
    """A failure on purpose, as parse_rule makes it."""

    text: str
    verb: str
    """Its moment, in capitals: one of STAGES."""
    pattern: str
    """For fnmatch, in small letters."""
    left: float
    """How often it still applies."""
    action: Reply | Delay | Close | None
    """What is done instead of what would be; after a Delay the next rules count as well."""


_VERB = rf"\s*({'|'.join(map(re.escape, STAGES))})(?=\s|$)"
_TIMES = r"(?:\s+x([1-9][0-9]{0,8})(?=\s|$))?"
_ACTION = (
    r"\s+(?:(?P<word>drop|ok)|delay\s+(?P<delay>[0-9]{1,6}(?:\.[0-9]{1,6})?)"
    r"|(?P<code>(?P<class>[45])[0-9]{2})(?:\s+(?P<status>(?P=class)(?:\.[0-9]{1,3}){2}))?"
    r"(?:\s+(?![0-9]\.[0-9])(?P<text>\S.*))?)\s*$"
)


def parse_rule(text: str) -> Rule:
    """VERB GLOB [ "x" N ] ( CODE [ x.y.z ] [ text ] / "delay" SECONDS / "drop" / "ok" )

    Raises ValueError with the place that does not parse between >>> and <<<.
    """
    at = 0

    def take(pattern: str, wanted: str) -> re.Match[str]:
        nonlocal at
        match = re.compile(pattern, re.IGNORECASE | re.ASCII).match(text, at)
        if match is None:
            rest = text[at:].strip() or "nothing"
            raise ValueError(f"rule {text[:at]} >>>{rest}<<< {wanted} is needed there")
        at = match.end()
        return match

    verb = take(_VERB, "CONNECT, a command, or . for the end of the content,")[1]
    pattern = take(r"\s+(\S+)", "a pattern such as * or *@example.com")[1]
    times = take(_TIMES, "")[1]
    action = take(_ACTION, "a code from 400 to 599, delay SECONDS, drop, or ok")
    left = int(times) if times else float("inf")
    return Rule(text, verb.upper(), pattern.lower(), left, _action(action))


def _action(match: re.Match[str]) -> Reply | Delay | Close | None:
    if match["delay"]:
        return Delay(float(match["delay"]))
    if match["word"]:
        return Close() if match["word"].lower() == "drop" else None
    status = match["status"] or match["class"] + ".0.0"
    return SMTPError(int(match["code"]), status, match["text"] or "On purpose").reply


class Shared:
    """What the sessions of a server have in common: room for content, and its rules.

    limit is how many octets of content they may hold together. Raises ValueError for a
    rule that does not parse.
    """

    def __init__(self, config: Config, limit: float = float("inf")) -> None:
        self.limit = limit
        self.held = 0
        self.rules = [parse_rule(text) for text in config.fail]
        self.refused = 0
        """How many messages config.strict has refused."""

    def consult(self, verb: str, text: str, peer: str) -> list[Action]:
        """What the rules want at this moment: delays, and then one reply or Close at most."""
        actions: list[Action] = []
        for rule in self.rules:
            if rule.verb == verb and rule.left and fnmatchcase(text.lower(), rule.pattern):
                rule.left -= 1
                log.info("%s: rule %s", peer, rule.text)
                if rule.action is not None:
                    actions.append(rule.action)
                if not isinstance(rule.action, Delay):
                    break
        return actions


# --- Session --------------------------------------------------------------------------


class Session:
    """One SMTP session, without I/O: octets in, actions out.

    peer is the client's address, for the envelopes; shared is what it has in common with
    other sessions.
    """

    def __init__(self, config: Config, peer: str = "", shared: Shared | None = None) -> None:
        self.config = config
        self.peer = peer
        self.tls = config.tls == "implicit"
        self.helo: str | None = None
        self.extended = False
        self.user: str | None = None
        self.transaction: Transaction | None = None
        self._shared = Shared(config) if shared is None else shared
        # What the client does that lint() cannot see in the content.
        self._habits: dict[str, None] = {}
        self._held = 0
        self._buffer = bytearray()
        self._searched = 0
        self._line_end = b"\r\n"
        self._left = 0  # octets of the chunk that BDAT announced
        self._guarded = False  # whether the log has shown AUTH
        self._errors = 0
        self._now = 0.0
        # Who takes the next octets off the buffer. A reader takes one unit and returns its
        # action, raises SMTPError, or returns None when the unit is not complete.
        self._read: Reader = self._greet

    def receive(self, data: bytes, now: float) -> Iterator[Action]:
        """Take the octets that arrived, and do what they ask for.

        The actions are worked out one by one, as they are asked for: whoever drives the
        session carries each one out before it takes the next. No octets at all, at the
        start, get the greeting. now is what time.time() says, for the envelopes.
        """
        self._buffer += data
        self._now = now
        while True:
            if self.transaction is None and self._held:
                self._hold(0)
            try:
                action = self._read()
                if action is None:
                    return
                self._errors = 0
            except SMTPError as error:
                action = self._refuse(error)
            if isinstance(action, Reply) and action.closes:
                self._read = self._ignore
            yield action

    def close(self) -> None:
        """Forget the transaction; the client is gone."""
        self.transaction = None
        self._hold(0)

    def _refuse(self, error: SMTPError) -> Reply:
        """RFC 5321 section 4.3.2 lets a server end a session that makes no sense."""
        self._errors += error.reply.code >= 500
        if self._errors > MAX_ERRORS:
            error = SMTPError(421, "4.7.0", "Too many errors")
        return error.reply

    def _hold(self, octets: int) -> None:
        """Tell the others how much content this session holds."""
        self._shared.held += octets - self._held
        self._held = octets

    # Readers

    def _greet(self) -> Action | None:
        self._read = self._turn_away
        return self._stage("CONNECT", self._address, self._welcome)

    def _address(self) -> str:
        return self.peer.rpartition(":")[0].strip("[]")

    def _welcome(self) -> Reply:
        self._read = self._read_command
        return GREETING

    def _turn_away(self) -> Reply | None:
        """RFC 5321 section 3.1: after a greeting that refuses, the client may only QUIT."""
        line = self._take_line(self._turn_away)
        if line is None:
            return None
        if line.strip().upper() != b"QUIT":
            raise SMTPError(503, "5.5.1", "Nothing but QUIT is served")
        return BYE

    def _stage(self, verb: str, text: Callable[[], str], proceed: Reader) -> Action | None:
        """Proceed, unless the rules for this moment have something else in mind."""
        if not self._shared.rules:
            return proceed()
        actions = self._shared.consult(verb, text(), self.peer)
        return self._act(actions, self._read, proceed)

    def _act(self, actions: list[Action], resume: Reader, proceed: Reader) -> Action | None:
        self._read = resume
        if not actions:
            return proceed()
        if isinstance(actions[0], Delay):
            self._read = partial(self._act, actions[1:], resume, proceed)
        return actions[0]

    def _ignore(self) -> None:
        self._buffer.clear()

    def _read_command(self) -> Action | None:
        line = self._take_line(self._read_command)
        if line is None:
            return None
        self._line_end = b"\r\n"
        if not line.endswith(b"\r\n"):
            self._line_end = b"\n"
            self._habits["bare-lf: LF without CR after a command (RFC 5321 section 2.3.8)"] = None
        text = line[: -len(self._line_end)].decode("utf-8", "surrogateescape").rstrip(" ")
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s C: %s", self.peer, self._masked(text))
        name, _, argument = text.partition(" ")
        verb = name.upper() if name.isascii() else ""
        if verb in _COMMANDS:
            argument = argument.lstrip(" ")
            # BDAT asks the rules itself, when it knows what to skip. And where there are none,
            # not to ask saves a fiftieth of the time of a short message.
            if not self._shared.rules or verb == "BDAT":
                return _COMMANDS[verb](self, argument)
            command = partial(_COMMANDS[verb], self, argument)
            return self._stage(verb, lambda: _about(argument), command)
        if verb in _NOT_SERVED:
            raise SMTPError(502, "5.5.1", "Command not implemented")
        if verb in _HTTP:
            log.warning("%s: speaks HTTP, not SMTP", self.peer)
            raise SMTPError(421, "4.7.0", "This is not a web server")
        raise SMTPError(500, "5.5.2", "Command not recognized")

    def _masked(self, text: str) -> str:
        """The line for the log; after AUTH, a line that is no command may be a late answer."""
        words = text.upper().split()
        if words and "AUTH" in words[0]:
            self._guarded = True
            shown = ["AUTH", *(word for word in words[1:2] if word in MECHANISMS)]
            return " ".join(shown + ["***"] * (len(words) > len(shown)))
        secret = self._guarded and words and words[0] not in _COMMANDS
        return "***" if secret else printable(text)

    def _take_line(self, after_error: Reader) -> bytes | None:
        """A bare LF ends a line as well, so that a person with netcat can type a message.

        after_error is who reads on when a line was too long.
        """
        end = self._buffer.find(b"\n", self._searched) + 1
        if not end:
            self._searched = len(self._buffer)
            if self._searched >= MAX_COMMAND:
                self._read = partial(self._skip_line, after_error)
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[:end]
        self._searched = 0
        if end > MAX_COMMAND:
            self._read = after_error
            raise SMTPError(500, "5.5.2", "Line too long")
        return line

    def _skip_line(self, after_error: Reader) -> None:
        end = self._buffer.find(b"\n") + 1
        del self._buffer[: end or len(self._buffer)]
        self._searched = 0
        if end:
            self._read = after_error
            raise SMTPError(500, "5.5.2", "Line too long")

    def _read_content(self, transaction: Transaction) -> Action | None:
        """RFC 5321 section 4.5.2: up to the line with one dot, and without dot-stuffing.

        The end of the DATA line is still in front, so that every line of the content, the
        first one too, begins behind a line end. Only the line end of the DATA line counts
        as one: no other mixture of CR, LF and dots ends a message (SMTP smuggling).
        """
        eol, buffer = self._line_end, self._buffer
        if len(buffer) <= 2 * len(eol):  # too short for an end
            return None
        # Most chunks have no such dot, and those of an attachment no dot at all: that is found
        # out in no time.
        dot = buffer.find(eol + b".") if b"." in buffer else -1
        end = buffer.find(eol + b"." + eol, dot) if dot >= 0 else -1
        if end >= 0:
            self._keep_lines(transaction, end + len(eol), dot)
            del buffer[: 1 + len(eol)], transaction.content[: len(eol)]
            self._read = self._read_command
            return self._end_of_content(transaction)
        # The last octets may be the beginning of what was searched for.
        rest = buffer.find(eol[:1], max(0, len(buffer) - 2 * len(eol)))
        self._keep_lines(transaction, len(buffer) if rest < 0 else rest, dot)
        return None

    def _keep_lines(self, transaction: Transaction, count: int, dot: int) -> None:
        octets = self._buffer[:count]
        if 0 <= dot < count - len(self._line_end):  # the dot of the end is not among them
            octets = octets.replace(self._line_end + b".", self._line_end)
        del self._buffer[:count]
        self._keep(transaction, octets, len(self._line_end))

    def _read_chunk(self, transaction: Transaction, last: bool) -> Action | None:
        """RFC 3030 section 2: as many octets as BDAT said, whatever they are."""
        octets = self._buffer[: self._left]
        del self._buffer[: self._left]
        self._left -= len(octets)
        self._keep(transaction, octets)
        if transaction.refusal is not None:
            self._read = self._skip_chunk
            raise transaction.refusal
        if self._left:
            return None
        self._read = self._read_command
        return self._end_of_content(transaction) if last else OK

    def _skip_chunk(self) -> Action | None:
        """The octets of a refused chunk come all the same, and are not commands."""
        if self.transaction is not None and self.transaction.rcpt_tos:
            self.transaction = None  # a message without one of its chunks is none
        skipped = min(self._left, len(self._buffer))
        del self._buffer[:skipped]
        self._left -= skipped
        if self._left:
            return None
        self._read = self._read_command
        return self._read()

    def _keep(self, transaction: Transaction, octets: bytearray, extra: int = 0) -> None:
        """Add to the content, of which extra octets do not count, unless it is refused."""
        if transaction.refusal is None:
            transaction.content += octets
            transaction.refusal = self._too_much(len(transaction.content) - extra)
        if transaction.refusal is not None:
            transaction.content.clear()
        self._hold(len(transaction.content))

    def _too_much(self, size: int) -> SMTPError | None:
        if 0 < self.config.max_size < size:
            return SMTPError(552, "5.3.4", "Message is larger than the maximum")
        if self._shared.held - self._held + size > self._shared.limit:
            return SMTPError(452, "4.3.1", "Too much mail at the same time")
        return None

    def _end_of_content(self, transaction: Transaction) -> Action | None:
        self.transaction = None
        if transaction.refusal is not None:
            raise transaction.refusal
        content = bytes(transaction.content)
        # A large message is in memory once, not twice, while it is stored.
        transaction.content = bytearray()
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
        )
        envelope.warnings.extend([*self._habits, *lint(envelope)])
        self._habits.clear()
        return self._stage(".", lambda: envelope.subject, lambda: self._take(envelope))

    def _take(self, envelope: Envelope) -> Deliver:
        if not self.config.smtputf8:
            _check_ascii(envelope)
        for warning in envelope.warnings:
            log.warning("%s: %s", self.peer, warning)
        if self.config.strict and envelope.warnings:
            self._shared.refused += 1
            raise SMTPError(554, "5.6.0", envelope.warnings[0])
        return Deliver(envelope)

    def _protocol(self, transaction: Transaction) -> str:
        """RFC 3848 and RFC 6531 section 4.3: the word after WITH in Received."""
        utf8 = "SMTPUTF8" in transaction.mail_options
        name = "UTF8SMTP" if utf8 else "ESMTP" if self.extended else "SMTP"
        return name + "S" * self.tls + "A" * (self.user is not None)

    def _upgrade(self) -> StartTLS:
        """RFC 3207 section 4.2: the session starts again, and knows nothing."""
        self._buffer.clear()
        self.tls = True
        self.helo = self.user = self.transaction = None
        self._read = self._read_command
        return StartTLS()

    def _read_answer(self, dialogue: Dialogue) -> Reply | None:
        """RFC 4954 section 4: a line of base64, or "*" to cancel."""
        line = self._take_line(self._read_command)
        if line is None:
            return None
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s C: ***", self.peer)
        self._read = self._read_command
        if line.strip() == b"*":
            raise SMTPError(501, "5.7.0", "Authentication cancelled")
        return self._answer(dialogue, line.strip())

    def _answer(self, dialogue: Dialogue, answer: bytes) -> Reply:
        try:
            prompt = dialogue.send(base64.b64decode(answer, validate=True))
        except StopIteration as end:
            return self._log_in(*end.value)
        except ValueError as error:
            raise SMTPError(501, "5.5.2", "Cannot decode this answer") from error
        return self._ask(dialogue, prompt)

    def _ask(self, dialogue: Dialogue, prompt: str) -> Reply:
        self._read = partial(self._read_answer, dialogue)
        return Reply(334, "", base64.b64encode(prompt.encode()).decode())

    def _log_in(self, user: bytes, password: bytes) -> Reply:
        accounts = {os.fsencode(name): os.fsencode(word) for name, word in self.config.auth.items()}
        # RFC 4616 section 2: there is no empty user.
        if not user or (accounts and accounts.get(user) != password):
            raise SMTPError(535, "5.7.8", "Authentication failed")
        self.user = user.decode("utf-8", "replace")
        return Reply(235, "2.7.0", "Authentication successful")

    # Commands

    def _hello(self, argument: str) -> str:
        if not _HELO.fullmatch(argument):
            raise SMTPError(501, "5.5.4", "Say who you are: EHLO name")
        # RFC 5321 section 4.1.4: either of them resets the transaction.
        self.transaction = None
        self.helo = argument
        return HOSTNAME

    def _must_be_last(self, verb: str) -> None:
        """RFC 2920 section 3.1: these have to be the last of what is sent together."""
        if self._buffer:
            warning = f"early-talker: more came ahead of the reply to {verb}"
            self._habits[f"{warning} (RFC 2920 section 3.1)"] = None

    def _ehlo(self, argument: str) -> Reply:
        self._must_be_last("EHLO")
        lines = [self._hello(argument), *extensions(self.config, tls=self.tls, user=self.user)]
        self.extended = True
        return _greeted("\n".join(lines))

    def _helo(self, argument: str) -> Reply:
        self._must_be_last("HELO")
        name = self._hello(argument)
        self.extended = False
        return _greeted(name)

    def _mail(self, argument: str) -> Reply:
        if self.helo is None:
            raise SMTPError(503, "5.5.1", "Send EHLO first")
        if self.config.auth and self.user is None:
            raise SMTPError(530, "5.7.0", "Authentication required")
        if self.transaction is not None:
            raise SMTPError(503, "5.5.1", "A message has begun already")
        path, options = self._path(_FROM.fullmatch(argument), MAIL_PARAMETERS)
        if "SMTPUTF8" in options and not self.config.smtputf8:
            raise SMTPError(555, "5.5.4", "SMTPUTF8 is disabled")
        # RFC 5321 section 4.5.5: the null reverse-path
        mail_from = path and parse_mailbox(path, "5.1.7")
        _check_declared(mail_from, options)
        if 0 < self.config.max_size < int(options.get("SIZE", 0)):
            raise SMTPError(552, "5.3.4", "Message is larger than the maximum")
        self.transaction = Transaction(mail_from, options)
        return SENDER_OK

    def _rcpt(self, argument: str) -> Reply:
        if self.transaction is None or self.transaction.chunks:
            raise SMTPError(503, "5.5.1", "Send MAIL first, and BDAT last")
        octets = self.transaction.octets + len(argument)
        if len(self.transaction.rcpt_tos) >= MAX_RECIPIENTS or octets > MAX_ADDRESSES:
            # RFC 5321 section 4.5.3.1.10
            raise SMTPError(452, "4.5.3", "Too many recipients")
        path, options = self._path(_TO.fullmatch(argument), RCPT_PARAMETERS)
        rcpt_to = parse_mailbox(path, "5.1.3")
        _check_declared(rcpt_to, self.transaction.mail_options)
        self.transaction.octets = octets
        self.transaction.rcpt_tos.append(rcpt_to)
        self.transaction.rcpt_options.append(options)
        return RECIPIENT_OK

    def _path(
        self, match: re.Match[str] | None, known: dict[str, str]
    ) -> tuple[str, dict[str, str]]:
        """What stands between the brackets, and the parameters behind them."""
        if match is None:
            raise SMTPError(501, "5.5.4", "Syntax: MAIL FROM:<address> or RCPT TO:<address>")
        parameters = match["parameters"] or ""
        if parameters and not self.extended:
            raise SMTPError(555, "5.5.4", "Parameters need EHLO")
        return match["path"], parse_parameters(parameters, known)

    def _data(self, argument: str) -> Reply:
        _no_argument(argument)
        transaction = self._addressed()
        if transaction.chunks or transaction.mail_options.get("BODY", "").upper() == "BINARYMIME":
            # RFC 3030 sections 2 and 3
            raise SMTPError(503, "5.5.1", "Go on with BDAT")
        self._must_be_last("DATA")
        self._buffer[:0] = self._line_end
        self._read = partial(self._read_content, transaction)
        return SEND_DATA

    def _bdat(self, argument: str) -> Action | None:
        match = _BDAT.fullmatch(argument)
        if match is None:
            raise SMTPError(501, "5.5.4", "Syntax: BDAT size [LAST]")
        self._left = int(match["size"])
        self._read = self._skip_chunk
        return self._stage("BDAT", lambda: argument, partial(self._begin_chunk, match["last"]))

    def _begin_chunk(self, last: str) -> Action | None:
        if last and not re.fullmatch(" +LAST", last, re.IGNORECASE | re.ASCII):
            raise SMTPError(501, "5.5.4", "Syntax: BDAT size [LAST]")
        transaction = self._addressed()
        refusal = self._too_much(len(transaction.content) + self._left)
        if refusal is not None:
            raise refusal
        transaction.chunks += 1
        self._read = partial(self._read_chunk, transaction, last=bool(last))
        return self._read()

    def _addressed(self) -> Transaction:
        """The transaction, if there is somebody to deliver to."""
        if self.transaction is None or not self.transaction.rcpt_tos:
            raise SMTPError(503, "5.5.1", "Send MAIL and RCPT first")
        return self.transaction

    def _rset(self, argument: str) -> Reply:
        _no_argument(argument)
        self.transaction = None
        return OK

    def _noop(self, argument: str) -> Reply:
        return OK

    def _quit(self, argument: str) -> Reply:
        _no_argument(argument)
        return BYE

    def _vrfy(self, argument: str) -> Reply:
        if not argument:
            raise SMTPError(501, "5.5.4", "Syntax: VRFY address")
        # RFC 5321 section 3.5.3: the honest answer of a server that takes every address
        return Reply(252, "2.5.0", "Cannot verify, but will take mail for it")

    def _starttls(self, argument: str) -> Reply:
        _no_argument(argument)
        if self.tls:
            raise SMTPError(503, "5.5.1", "TLS is active already")
        if self.config.tls is None:
            raise SMTPError(502, "5.5.1", "TLS is not available")
        self._read = self._upgrade
        return Reply(220, "2.0.0", "Ready to start TLS")

    def _auth(self, argument: str) -> Reply:
        """RFC 4954 section 4; "=" is an initial response of no octets."""
        if self.helo is None:
            raise SMTPError(503, "5.5.1", "Send EHLO first")
        if self.transaction is not None or self.user is not None:
            raise SMTPError(503, "5.5.1", "Not in a message, and only once")
        name, _, initial = argument.partition(" ")
        if not name:
            raise SMTPError(501, "5.5.4", "Syntax: AUTH mechanism [initial-response]")
        if name.upper() not in MECHANISMS:
            raise SMTPError(504, "5.5.4", "Mechanism not supported")
        dialogue = MECHANISMS[name.upper()]()
        prompt = next(dialogue)
        if not initial:
            return self._ask(dialogue, prompt)
        answer = "" if initial == "=" else initial.strip()
        return self._answer(dialogue, answer.encode("utf-8", "replace"))

    def _help(self, argument: str) -> Reply:
        return Reply(214, "2.0.0", "Commands:\n" + " ".join(_COMMANDS))


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
# Known verbs that a server of this kind does not serve (RFC 5321 section 4.2.4).
_NOT_SERVED = frozenset(["EXPN", "TURN", "ETRN", "ATRN", "SEND", "SOML", "SAML"])
# First words of HTTP: somebody uses a browser to make it talk to us.
_HTTP = frozenset(
    ["GET", "POST", "PUT", "HEAD", "OPTIONS", "CONNECT", "DELETE", "PATCH", "PRI", "HOST:"]
)


@lru_cache
def _greeted(text: str) -> Reply:
    return Reply(250, "", text)


def _no_argument(argument: str) -> None:
    if argument:
        raise SMTPError(501, "5.5.4", "This command takes no argument")


def _check_declared(address: str, mail_options: dict[str, str]) -> None:
    """RFC 6531 section 3.5: an address outside ASCII needs SMTPUTF8."""
    if not address.isascii() and "SMTPUTF8" not in mail_options:
        raise SMTPError(553, "5.6.7", "This address needs SMTPUTF8")


def _about(argument: str) -> str:
    """What a rule is held against: the address in MAIL and RCPT, or the whole argument."""
    match = _FROM.fullmatch(argument) or _TO.fullmatch(argument)
    return match["path"] if match else argument


def _check_ascii(envelope: Envelope) -> None:
    """What --disable-smtputf8 refuses: an UTF-8 header section, an undeclared 8-bit body."""
    header, body = _split(envelope.content)
    if not header.isascii():
        raise SMTPError(554, "5.6.7", "The header is not ASCII")
    if not body.isascii() and envelope.mail_options.get("BODY", "7BIT").upper() == "7BIT":
        raise SMTPError(554, "5.6.1", "The body is not ASCII, and 8BITMIME was not declared")


# --- Storage --------------------------------------------------------------------------


def trace_header(envelope: Envelope, key: str) -> bytes:
    """What is known of the envelope, as the header fields in front of the stored content.

    key is the name of the message in its Maildir. The lines end with LF and have less than
    998 octets (RFC 5322 section 2.1.1).
    """
    # Parentheses and semicolons mean something in Received; a name has none of them.
    helo = _NO_NAME.sub("?", envelope.helo[:255])
    address = envelope.peer.rpartition(":")[0]
    fields = [
        # RFC 5321 section 4.4. A line of blanks would end the header for some.
        _BLANKS.sub(" " * 99, f"Return-Path: <{envelope.mail_from}>"),
        f"X-Peer: {envelope.peer}",
        f"X-MailFrom: {_encoded(envelope.mail_from)}",
        f"X-RcptTo: {_encoded(', '.join(envelope.rcpt_tos))}",
        f"Received: from {helo} ({address}) by {HOSTNAME} (dsmtpd {__version__})"
        f" with {envelope.protocol} id {key}; {_date(envelope.received.replace(microsecond=0))}",
    ]
    return "".join(_fold(line) + "\n" for line in fields).encode()


# Many messages come in the same second.
_date = lru_cache(1)(format_datetime)

# Characters of a folded line, of up to four octets each.
_FOLD = 240
_NO_NAME = re.compile(r"[^A-Za-z0-9.:_\[\]-]")
_BLANKS = re.compile(" {100,}")
_UNFOLDABLE = re.compile(rf"[^ ]{{{_FOLD}}}|{_BLANKS.pattern}")


def _fold(line: str) -> str:
    """RFC 5322 section 2.2.3; a word that does not fit into a line is broken."""
    if len(line) <= _FOLD:
        return line
    lines = re.findall(rf".{{1,{_FOLD}}}(?= |$)|.{{{_FOLD}}}", line)
    return "\n".join([lines[0]] + [" " * (not part.startswith(" ")) + part for part in lines[1:]])


def _encoded(text: str) -> str:
    """RFC 2047 encoded-words for what does not go into a header field as it is."""
    plain = text.isascii() and "=?" not in text and not _UNFOLDABLE.search(text)
    if plain:
        return text
    # An encoded-word has 75 characters at most: 11 characters of up to four octets fit.
    parts = [text[at : at + 11].encode() for at in range(0, len(text), 11)]
    return " ".join(f"=?utf-8?b?{base64.b64encode(part).decode()}?=" for part in parts)


class MaildirStore(mailbox.Maildir):
    """A Maildir that messages are delivered into, from several threads or processes.

    directory is made where it is missing, and completed where it is a Maildir already or
    empty; None is the current directory, which is completed whatever it holds. Raises
    OSError, or mailbox.Error with a text that says what is wrong, and then makes nothing.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None) -> None:
        root = os.path.abspath(directory or ".")
        if directory is not None:
            _check_maildir(root)
        self.directory = root
        for name in ("tmp", "new", "cur"):
            os.makedirs(os.path.join(root, name), mode=0o700, exist_ok=True)
        super().__init__(root, create=False)

    def deliver(self, envelope: Envelope) -> Path:
        """Store the message; returns where it is.

        The file is whole and on disk when this returns. Raises SMTPError 451, with nothing
        left behind, when it could not be written.
        """
        from pathlib import Path

        # mailbox.Maildir.add leaves a file in tmp when the disk is full, counts on one
        # thread, and on Windows ends the lines with CRLF.
        seconds, rest = divmod(time.time_ns(), 1_000_000_000)
        key = f"{seconds}.M{rest // 1000:06}P{os.getpid()}R{os.urandom(8).hex()}.{HOSTNAME}"
        tmp, new = f"{self.directory}/tmp/{key}", f"{self.directory}/new/{key}"
        header, content = trace_header(envelope, key), envelope.content
        if envelope.mail_options.get("BODY", "").upper() != "BINARYMIME":
            if envelope.has_bare_cr:
                content = content.replace(b"\r\n", b"\n")
            else:  # the same in a third of the time
                content = content.translate(None, b"\r")
        try:
            _write(tmp, header, content)
            os.rename(tmp, new)
        except OSError as error:
            log.error("Cannot store a message of %s: %s", envelope.peer, error)
            with contextlib.suppress(OSError):
                os.unlink(tmp)
            raise SMTPError(451, "4.3.0", "Cannot store the message now") from error
        return Path(new)


_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)


def _write(path: str, *parts: bytes) -> None:
    """Make a file that is on disk when this returns.

    Without a file object, and without a Path: the two take as long again.
    """
    descriptor = os.open(path, _NEW_FILE, 0o666)
    try:
        for part in parts:
            rest = memoryview(part)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_maildir(root: str) -> None:
    """Refuse a directory that is in use for something else."""
    if not os.path.exists(root):
        return
    if not os.path.isdir(root):
        raise mailbox.Error(f"{root} is not a directory")
    names = set(os.listdir(root))
    if names and not names & {"cur", "new"}:
        missing = ", ".join(sorted({"cur", "new", "tmp"} - names))
        raise mailbox.Error(f"{root} is not a Maildir: it has no {missing}")


# --- Server ---------------------------------------------------------------------------


class Server:
    """An SMTP server in the running event loop; `async with` starts and closes it.

    What it does is in config, in which options, named as the fields of Config, replace what
    they name. deliver(envelope) takes each message: a plain function, in a thread, or an async
    one, in the loop. When it returns, the reply is 250; an SMTPError is the reply, and any
    other exception is 451. Without it messages go into the Maildir of the config. Where it
    returns a Path, that is the path of the envelope that on_message gets.
    on_message(envelope) is called in the loop with each message that was taken, before the
    reply. Raises ValueError for a certificate or a rule that cannot be used, and what
    MaildirStore raises.
    """

    def __init__(
        self,
        config: Config | None = None,
        /,
        *,
        deliver: Callable[[Envelope], object] | None = None,
        on_message: Callable[[Envelope], object] | None = None,
        **options: Any,
    ) -> None:
        self.config = replace(config or Config(), **options)
        self.host = self.config.interface
        """The first address that the server listens at."""
        self.port = self.config.port
        """The port, known once the server has started."""
        self.listening: list[tuple[str, int]] = []
        """All of them, as (address, port)."""
        self._tls = _tls_context(self.config) if self.config.tls else None
        self._deliver: Callable[[Envelope], Any] = (
            deliver or MaildirStore(self.config.directory).deliver
        )
        self._deliver_in_loop = inspect.iscoroutinefunction(self._deliver)
        self._on_message = on_message
        self._buffer = memoryview(bytearray(CHUNK))
        self._sockets: list[socket.socket] = []
        self._listeners: list[asyncio.Server] = []
        self._connections: dict[asyncio.Task[None], Connection] = {}
        limit = max(MAX_CONTENT, 2 * self.config.max_size or float("inf"))
        self._shared = Shared(self.config, limit)
        self._workers = Workers(self._deliver)
        self._to_send: list[Connection] = []
        self._closed = asyncio.Event()

    async def start(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, at sockets that listen already or at those of the config.

        Raises OSError, or ValueError for a host name that cannot be one.
        """
        self._sockets = sockets or _listen(self.config)
        self.listening = [sock.getsockname()[:2] for sock in self._sockets]
        self.host, self.port = self.listening[0]
        loop = asyncio.get_running_loop()
        for sock in self._sockets:
            listener = await loop.create_server(self._streams, sock=sock, backlog=MAX_CONNECTIONS)
            self._listeners.append(listener)

    def _streams(self) -> asyncio.StreamReaderProtocol:
        # What was read is copied at once, so that one buffer will do for the loop.
        return _StreamProtocol(self._buffer, self._accept)

    async def serve_forever(self) -> None:
        """Wait until the server is closed."""
        await self._closed.wait()

    @property
    def refused(self) -> int:
        """How many messages were refused because of `strict`."""
        return self._shared.refused

    async def finish(self, seconds: float) -> None:
        """Wait until all clients have gone, for so many seconds at most."""
        if self._connections:
            await asyncio.wait(self._connections, timeout=seconds)

    async def close(self) -> None:
        """Stop listening, tell the clients (421 4.3.2), and finish deliveries in progress."""
        await self._stop_listening()
        for connection in self._connections.values():
            connection.interrupt(SMTPError(421, "4.3.2", "Shutting down"))
        await self.finish(STOP_TIMEOUT)
        while self._connections:
            for connection in self._connections.values():
                connection.give_up()
            await self.finish(STOP_TIMEOUT)
        self._workers.close()
        self._closed.set()

    async def _stop_listening(self) -> None:
        # asyncio loses the clients that it has accepted and not handed over yet. It takes
        # some turns of the loop until they are ours, and there must be no new ones meanwhile.
        with contextlib.suppress(NotImplementedError):  # on Windows
            for sock in self._sockets:
                asyncio.get_running_loop().remove_reader(sock)
        for _ in range(5):
            await asyncio.sleep(0)
        for listener in self._listeners:
            listener.close()
        self._sockets = []

    async def __aenter__(self) -> Server:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _accept(self, reader: _Reader, writer: asyncio.StreamWriter) -> None:
        peer = _address(writer.get_extra_info("peername"))
        if len(self._connections) >= MAX_CONNECTIONS:
            log.warning("%s: too many connections", peer)
            writer.write(Reply(421, "4.3.2", "Too many connections").octets)
            writer.close()
            return
        session = Session(self.config, peer, self._shared)
        connection = Connection(self, session, reader, writer)
        task = asyncio.current_task()
        assert task is not None
        self._connections[task] = connection
        try:
            await connection.run()
        finally:
            del self._connections[task]

    def send_soon(self, connection: Connection) -> None:
        """Have its replies sent at the end of the loop's turn, with those of the others.

        Replies that leave one behind the other find clients awake; that saves a twentieth.
        """
        if not self._to_send:
            asyncio.get_running_loop().call_soon(self._send)
        self._to_send.append(connection)

    def _send(self) -> None:
        to_send, self._to_send = self._to_send, []
        for connection in to_send:
            connection.send()

    async def start_tls(
        self, transport: asyncio.WriteTransport
    ) -> tuple[_Reader, asyncio.StreamWriter]:
        """Begin TLS on a connection; returns the new streams. Raises OSError if that fails."""
        # Not StreamWriter.start_tls: Python 3.10 lacks it, and the old reader would keep the
        # plain text that came after STARTTLS.
        loop = asyncio.get_running_loop()
        reader = _Reader()
        protocol = _TLSReaderProtocol(reader)
        assert self._tls is not None
        if transport.is_closing():  # of which start_tls would never hear
            raise ConnectionResetError("the client is gone")
        plain = transport.get_protocol()
        try:
            secure = await loop.start_tls(transport, protocol, self._tls, server_side=True)
            if secure is None:
                raise ConnectionResetError("the client is gone")
        except (OSError, asyncio.CancelledError):
            plain.connection_lost(None)  # asyncio tells the protocol of TLS only
            raise
        protocol.connection_made(secure)
        return reader, asyncio.StreamWriter(secure, protocol, reader, loop)

    async def deliver(self, envelope: Envelope) -> Reply:
        """Hand a message over; returns the reply to the end of its content."""
        try:
            if self._deliver_in_loop:
                result = await self._deliver(envelope)
            else:
                result = await self._workers.call(envelope)
                if inspect.isawaitable(result):
                    result = await result
        except SMTPError as error:
            return error.reply
        except (asyncio.CancelledError, GeneratorExit):  # the end of the session
            raise
        except BaseException:  # SystemExit too: that is not for a handler to decide
            log.exception("%s: the message could not be delivered", envelope.peer)
            return Reply(451, "4.3.0", "Cannot take the message now")
        if self._on_message is not None:
            if isinstance(result, os.PathLike):
                from pathlib import Path

                envelope = replace(envelope, path=Path(result))
            self._on_message(envelope)
        if log.isEnabledFor(logging.INFO):
            log.info("%s: %s", envelope.peer, _summary(envelope))
        return ACCEPTED


class _Reader(asyncio.StreamReader):
    """A stream whose octets can be taken as they arrive, and not by a task that is woken.

    That saves an eighth of the time of a short message.
    """

    def __init__(self) -> None:
        super().__init__(limit=CHUNK)
        self._take: Callable[[bytes], bool] | None = None

    def feed_data(self, data: Any) -> None:
        if self._take is None:
            super().feed_data(data)
        elif not self._take(data):
            self._take = None
            super().feed_data(b"\n")  # wakes receive(), and is dropped there

    async def receive(self, take: Callable[[bytes], bool]) -> bytes | None:
        """Have take() called with what arrives, until it returns False.

        Returns what has arrived since then, or what was there before; None is the end.
        """
        self._take = take
        try:
            octets = await self.read(CHUNK)
            if not octets:
                return None
            return octets[1:] if self._take is None else octets
        finally:
            self._take = None


class _StreamProtocol(asyncio.StreamReaderProtocol, asyncio.BufferedProtocol):
    """Streams that read into a buffer of ours, and not each time into a new one of 256 KiB.

    With those a short message takes half as long again.
    """

    def __init__(self, buffer: memoryview, accept: Callable[..., Any]) -> None:
        reader = _Reader()
        super().__init__(reader, accept)
        self._feed = reader.feed_data  # data_received() looks for it each time
        self._buffer = buffer

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._feed(bytes(self._buffer[:nbytes]))


class _TLSReaderProtocol(asyncio.StreamReaderProtocol):
    """TLS has no half-closed connections, and asyncio warns where somebody asks for one."""

    def eof_received(self) -> bool:
        super().eof_received()
        return False


# What a function of Workers has returned, or what it has raised.
Outcome = asyncio.Future[tuple[object, BaseException | None]]


class Workers:
    """Calls a plain function in threads, for many callers in one event loop.

    One thread does all the calls that are waiting, one after the other, and the loop sleeps
    meanwhile: with a thread for each call the two of them hand over Python's lock all the
    time, and a short message takes two and a half times as long. But a call that takes
    longer than PATIENCE is left to its thread, and each that waits behind it gets another
    one. So nobody waits for somebody else's slow disk.
    """

    def __init__(self, function: Callable[[Envelope], object]) -> None:
        self._function = function
        self._waiting: deque[tuple[Envelope, Outcome]] = deque()
        self._done: deque[tuple[Outcome, object, BaseException | None]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    @cached_property
    def _threads(self) -> concurrent.futures.ThreadPoolExecutor:
        return concurrent.futures.ThreadPoolExecutor(MAX_CONNECTIONS, "dsmtpd")

    async def call(self, envelope: Envelope) -> object:
        """What the function returns for the envelope; raises what it raises."""
        future: Outcome = asyncio.get_running_loop().create_future()
        self._waiting.append((envelope, future))
        if self._timer is None:
            self._start(1)
        result, error = await future
        if error is not None:
            raise error
        return result

    def close(self) -> None:
        """End the threads, when the calls have ended."""
        self._threads.shutdown()

    def _start(self, threads: int) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(PATIENCE, self._look)
        for _ in range(threads):
            # In the next turn of the loop, when more are waiting; that saves a twelfth.
            loop.call_soon(self._threads.submit, self._work, loop)

    def _look(self) -> None:
        self._timer = None
        if self._waiting:
            self._start(len(self._waiting))
        self._settle()

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        with contextlib.suppress(IndexError):
            while True:
                envelope, future = self._waiting.popleft()
                try:
                    self._done.append((future, self._function(envelope), None))
                except BaseException as error:
                    self._done.append((future, None, error))
        loop.call_soon_threadsafe(self._rest)

    def _rest(self) -> None:
        """A thread has found nothing more to do."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waiting:
            self._start(1)
        self._settle()

    def _settle(self) -> None:
        """Last of all: a thread that has taken the last call may have ended others by then."""
        while self._done:
            future, result, error = self._done.popleft()
            if not future.cancelled():
                future.set_result((result, error))


class Connection:
    """A client: moves octets between its socket and its session."""

    def __init__(
        self,
        server: Server,
        session: Session,
        reader: _Reader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._server = server
        self._session = session
        self._peer = session.peer
        self._reader = reader
        self._writer = writer
        self._unsent = bytearray()
        self._put_off: Action | None = None
        """What _answer() has left to the task."""
        self._interrupted = asyncio.Event()
        self._delivering = False
        self._loop = asyncio.get_running_loop()
        self._waiting_since: float | None = None
        """When it began to wait for the client, while it does."""
        self._timer = self._loop.call_later(IDLE_TIMEOUT, self._watch)

    async def run(self) -> None:
        """Talk until one side has enough of it."""
        try:
            if self._session.tls:
                await self._start_tls()
            await self._converse()
        except SMTPError as error:  # interrupted
            self._say(error.reply)
        except OSError as error:
            log.debug("%s: %s", self._peer, error)
        except Exception:
            log.exception("%s: the session has failed", self._peer)
        finally:
            self._session.close()
            self.send()
            self._writer.close()
            # Without TLS, which says goodbye, and without unwritten replies it is closed in the
            # next turn of the loop. Not to wait for that saves a thirtieth of a session's time.
            if self._session.tls or self._unwritten():
                self._waiting_since = self._loop.time()
                with contextlib.suppress(Exception):  # what has ended it is no news
                    await self._writer.wait_closed()
            self._timer.cancel()

    # An interruption reaches a session that waits for octets, or in a Delay. One that waits
    # until it can write is aborted; a delivery ends first, and then the session sees it. A
    # TLS handshake does not see it: give_up() ends that.

    def interrupt(self, error: SMTPError) -> None:
        """End the session with this reply, at the next time it waits for the client."""
        self._interrupted.set()
        if self._unwritten():
            self._writer.transport.abort()  # it does not read what we say
        else:
            self._reader.set_exception(error)

    def give_up(self) -> None:
        """End the connection without a word, unless a message is being delivered."""
        if not self._delivering:
            self._writer.transport.abort()

    async def _converse(self) -> None:
        data: bytes | None = b""
        while data is not None:
            reader = self._reader
            if not await self._catch_up():
                return
            if reader is not self._reader:
                data = b""  # it came in plain text, ahead of TLS
            done = self._answer(data)
            data = b""
            if self._put_off is None:
                if not done:
                    await self._flush()
                    self._waiting_since = self._loop.time()
                data = await self._reader.receive(self._answer)
                self._waiting_since = None

    def _answer(self, data: bytes) -> bool:
        """Give the session what has arrived, and send its replies; never waits.

        Returns False when there is something to wait for: an action that takes time, which is
        put off, or a client that does not read.
        """
        for action in self._session.receive(data, time.time()):
            if not isinstance(action, Reply) or action.closes or len(self._unsent) >= CHUNK:
                self._put_off = action
                return False
            self._say(action)
        self._waiting_since = self._loop.time()
        self._server.send_soon(self)
        return not self._unwritten()

    async def _catch_up(self) -> bool:
        """Carry out what was put off, and its reply; returns whether the session goes on."""
        await self._flush()
        action, self._put_off = self._put_off, None
        reply = action if isinstance(action, Reply) else await self._perform(action)
        if reply is not None:
            self._say(reply)
        over = isinstance(action, Close) or (reply is not None and reply.closes)
        if over:
            await self._flush()
        return not over

    async def _perform(self, action: Action | None) -> Reply | None:
        if isinstance(action, Deliver):
            self._delivering = True
            try:
                return await self._server.deliver(action.envelope)
            finally:
                self._delivering = False
        if isinstance(action, StartTLS):
            await self._start_tls()
        if isinstance(action, Delay):
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._interrupted.wait(), action.seconds)
        return None

    async def _start_tls(self) -> None:
        try:
            streams = await self._server.start_tls(self._writer.transport)
        except OSError as error:
            log.warning("%s: the TLS handshake failed: %s", self._peer, error)
            raise
        self._reader, self._writer = streams

    def _say(self, reply: Reply) -> None:
        if log.isEnabledFor(logging.DEBUG):
            for line in reply.octets.decode().splitlines():
                log.debug("%s S: %s", self._peer, line)
        self._unsent += reply.octets

    def send(self) -> None:
        """Hand what was said to the system."""
        if self._unsent:
            self._writer.write(self._unsent)
            self._unsent = bytearray()

    async def _flush(self) -> None:
        """Send the replies, and wait for a client that does not read, before they pile up."""
        self.send()
        if self._unwritten():
            self._waiting_since = self._loop.time()
            await self._writer.drain()
            self._waiting_since = None

    def _unwritten(self) -> int:
        """Octets of replies that the system did not take, since the client does not read."""
        try:
            return self._writer.transport.get_write_buffer_size()
        except AttributeError:  # TLS of Python 3.10, without its client
            return 0

    def _watch(self) -> None:
        """Look whether the client is silent for too long, and when to look again.

        One timer for the whole connection: one for each wait would take a fifth of the time
        of a session.
        """
        now = self._loop.time()
        end = (now if self._waiting_since is None else self._waiting_since) + IDLE_TIMEOUT
        if end <= now:
            self.interrupt(SMTPError(421, "4.4.2", "Silent for too long"))
            self._waiting_since = now
            end = now + IDLE_TIMEOUT
        self._timer = self._loop.call_at(end, self._watch)


def _tls_context(config: Config) -> ssl.SSLContext:
    """Raises ValueError, with a text that says what is wrong with the certificate."""
    if config.cert is None:
        return _throw_away_context()
    return _load_certificate(config.cert, config.key)


def _load_certificate(
    cert: str | os.PathLike[str], key: str | os.PathLike[str] | None
) -> ssl.SSLContext:
    import ssl

    def password() -> str:
        raise ValueError("the key is encrypted; give one without a passphrase")

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    names = f"certificate {os.fspath(cert)}" + (f" with key {os.fspath(key)}" if key else "")
    try:
        for path in (cert, key or cert):
            with open(path, "rb"):  # load_cert_chain does not say which one it cannot read
                pass
        context.load_cert_chain(cert, key, password)
    except ssl.SSLError as error:
        reason = (error.reason or "PEM").replace("_", " ").lower()
        reason = "no certificate with its key in PEM format" if "pem" in reason else reason
        raise ValueError(f"cannot use {names}: {reason}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot use {names}: {error}") from error
    return context


# What makes a certificate for this machine, with any OpenSSL or LibreSSL of this decade.
_OPENSSL = (
    "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 30"
    " -subj /CN=localhost -addext subjectAltName=DNS:localhost,IP:127.0.0.1,IP:::1"
    " -keyout key.pem -out cert.pem"
)


def _throw_away_context() -> ssl.SSLContext:
    """A certificate that nobody trusts, for clients that do not ask."""
    import subprocess
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        try:
            subprocess.run(_OPENSSL.split(), cwd=directory, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise ValueError(
                f"cannot make a certificate ({error}); make one where there is OpenSSL, with"
                f" '{_OPENSSL}', and give it with --cert cert.pem --key key.pem"
            ) from error
        return _load_certificate(f"{directory}/cert.pem", f"{directory}/key.pem")


def _address(name: Any) -> str:
    """A socket's name as ADDRESS:PORT, IPv6 in brackets; a client may be gone already."""
    if not name:
        return "unknown:0"
    host, port = name[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _listen(config: Config) -> list[socket.socket]:
    """A listening socket for each address of the interface, all at the same port."""
    # Octets where they will do: to make them of a str loads all of IDNA.
    host = config.interface.encode() if config.interface.isascii() else config.interface
    found = socket.getaddrinfo(host, config.port, type=socket.SOCK_STREAM)
    attempts = 1 if config.port else 20
    while True:
        try:
            return _bind(list(dict.fromkeys(found)), config.reuse_port)
        except OSError as error:
            # The free port of the first address can be taken at the second one.
            attempts -= 1
            if not attempts or error.errno != errno.EADDRINUSE:
                raise


def _bind(found: list[Any], reuse_port: bool) -> list[socket.socket]:
    """Sockets for what getaddrinfo found; a family that this machine lacks is left out."""
    sockets: list[socket.socket] = []
    with contextlib.ExitStack() as undo:
        absent = OSError("no address")
        for family, _, _, _, (host, port, *scope) in found:
            name = (host, sockets[0].getsockname()[1] if sockets else port, *scope)
            try:
                sock = socket.create_server(name, family=family, reuse_port=reuse_port)
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                absent = error
            else:
                undo.callback(sock.close)
                sockets.append(sock)
        if not sockets:
            raise absent
        undo.pop_all()
    return sockets


# --- Capture --------------------------------------------------------------------------


class Inbox:
    """The messages that a server of capture() has taken; for use from any thread."""

    def __init__(self) -> None:
        self.host = ""
        """The address to send to."""
        self.port = 0
        """The port to send to."""
        self.url = ""
        """Both, as "smtp://127.0.0.1:1025"; smtps:// where TLS is implicit."""
        self._messages: list[Envelope] = []
        self._changed = threading.Condition()

    @property
    def messages(self) -> list[Envelope]:
        """What has come, the oldest first."""
        with self._changed:
            return list(self._messages)

    def clear(self) -> None:
        """Forget what has come."""
        with self._changed:
            self._messages.clear()

    def add(self, envelope: Envelope) -> None:
        """Take a message, and tell those who wait for it."""
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
        """The first message that matches, as soon as it is there.

        to is one of the recipients, mail_from the sender, and subject a part of the decoded
        subject. Raises TimeoutError after timeout seconds; it says what came instead.
        """
        (found,) = self.wait_for(1, to=to, mail_from=mail_from, subject=subject, timeout=timeout)
        return found

    def wait_for(
        self,
        count: int,
        *,
        to: str | None = None,
        mail_from: str | None = None,
        subject: str | None = None,
        timeout: float = 5.0,
    ) -> list[Envelope]:
        """The first count messages that match, as wait() finds them."""
        wanted = {"to": to, "mail_from": mail_from, "subject": subject}

        def found() -> list[Envelope]:
            return [envelope for envelope in self._messages if _matches(envelope, **wanted)][:count]

        with self._changed:
            self._changed.wait_for(lambda: len(found()) >= count, timeout)
            if len(matching := found()) >= count:
                return matching
            criteria = ", ".join(
                f"{name} {text!r}" for name, text in wanted.items() if text is not None
            )
            came = [f"\n  {_summary(envelope)}" for envelope in self._messages] or [" nothing"]
        raise TimeoutError(
            f"{len(matching)} of {count} messages{criteria and ' with ' + criteria}"
            f" within {timeout} seconds; what came:{''.join(came)}"
        )


def _matches(
    envelope: Envelope, to: str | None, mail_from: str | None, subject: str | None
) -> bool:
    return (
        (to is None or to in envelope.rcpt_tos)
        and (mail_from is None or mail_from == envelope.mail_from)
        and (subject is None or subject in envelope.subject)
    )


@contextlib.contextmanager
def capture(
    *, handler: Callable[[Envelope], object] | None = None, **options: Any
) -> Iterator[Inbox]:
    """A server in a thread of its own, for the length of a with block; gives its Inbox.

    options are the fields of Config, but that the port is a free one, and that messages are
    stored only where there is a directory. handler is the deliver of Server. Raises what
    Server and its start raise.
    """
    config = replace(Config(port=0), **options)
    deliver = handler
    if deliver is None:
        deliver = _nowhere if config.directory is None else MaildirStore(config.directory).deliver
    inbox = Inbox()
    server = Server(config, deliver=deliver, on_message=inbox.add)
    ready: concurrent.futures.Future[Callable[[], object]] = concurrent.futures.Future()

    async def serve() -> None:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        async with server:
            ready.set_result(lambda: loop.call_soon_threadsafe(stop.set))
            await stop.wait()
            # The test was told of a message before the client was.
            await server.finish(LAST_WORD)

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            if ready.done():
                raise
            ready.set_exception(error)

    thread = threading.Thread(target=run, name="dsmtpd", daemon=True)
    thread.start()
    try:
        stop = ready.result()
        inbox.host, inbox.port = server.host, server.port
        inbox.url = f"smtp{'s' * (config.tls == 'implicit')}://{_address(server.listening[0])}"
        try:
            yield inbox
        finally:
            stop()
    finally:
        thread.join()


async def _nowhere(envelope: Envelope) -> None:
    """The delivery of a server that only counts."""


def pytest_configure(config: Any) -> None:
    """Make this module a plug-in of pytest, with the fixture `smtpd`."""
    import pytest

    class Fixtures:
        @pytest.fixture
        def smtpd(self) -> Iterator[Inbox]:
            """An Inbox of its own for each test, with a server that is ready."""
            with capture() as inbox:
                yield inbox

    config.pluginmanager.register(Fixtures(), "dsmtpd fixtures")


# --- Command line ---------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Wrong usage is one line; the options are in --help."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line (sys.argv without one); wrong usage ends the program with status 2."""
    argv = sys.argv[1:] if argv is None else argv
    at = argv.index("--") if "--" in argv else len(argv)
    parser = _Parser(
        prog="dsmtpd",
        usage="%(prog)s [options] [-- COMMAND [ARG ...]]",
        # To ask for the width of the terminal takes 4 ms, at each start.
        formatter_class=partial(argparse.HelpFormatter, width=80),
        description="An SMTP server that keeps every message in a Maildir and passes none on."
        " With a command it serves while the command runs, and ends with its exit status.",
        epilog="Exit status: 0 normal end, 1 an expectation was not met, 2 wrong usage or no"
        " Maildir, 3 cannot listen there; or that of the command.",
        allow_abbrev=False,
    )
    _add_options(parser)
    arguments = parser.parse_args(argv[:at])
    arguments.auth = dict(arguments.auth)
    arguments.command = argv[at + 1 :]
    if at < len(argv) and not any(arguments.command[:1]):
        parser.error("a command is needed behind --, as in: dsmtpd -p 0 -- pytest")
    options = vars(arguments)
    try:
        arguments.config = Config(**{name: options[name] for name in _CONFIG_FIELDS})
    except ValueError as error:
        parser.error(f"argument --{error}")
    return arguments


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    text = "port to listen at; 0 takes a free one (%(default)s)"
    add("-p", "--port", type=_number, default=Config.port, help=text)
    text = "address to listen at; a name means every address that it has (%(default)s)"
    add("-i", "--interface", metavar="ADDRESS", default=Config.interface, help=text)
    text = "let several servers listen at the same port, each for a share of the clients"
    add("--reuse-port", action="store_true", help=text)
    text = "Maildir to save into (the current directory; a temporary one for a command)"
    add("-d", "--directory", metavar="DIR", help=text)
    text = "largest message that is accepted; 0 for no limit (%(default)s)"
    add("-s", "--max-size", metavar="BYTES", type=_number, default=Config.max_size, help=text)
    text = "refuse addresses and header fields outside ASCII"
    add("--disable-smtputf8", dest="smtputf8", action="store_false", help=text)
    text = "TLS, after the STARTTLS command or from the first octet"
    add("--tls", choices=["starttls", "implicit"], help=text)
    text = "certificate for --tls (a throw-away one for localhost, made by openssl)"
    add("--cert", metavar="PEM", help=text)
    add("--key", metavar="PEM", help="key of the certificate (in the file of the certificate)")
    text = "only these may log in, and must; repeatable (everybody may, nobody must)"
    add("--auth", metavar="USER:PASSWORD", type=_account, action="append", default=[], help=text)
    text = "fail on purpose: 'VERB GLOB [xN] CODE [x.y.z] [text] | delay SECONDS | drop | ok'"
    add("--fail", metavar="RULE", type=_rule, action="append", default=[], help=text)
    text = "refuse messages that real servers would mind"
    add("--strict", action="store_true", help=text)
    text = "call this with each message instead of storing it"
    add("--handler", metavar="MODULE:CALLABLE", help=text)
    output = parser.add_mutually_exclusive_group()
    text = "print each message to standard output"
    output.add_argument("--print", action="store_true", help=text)
    text = "print a JSON object to standard output for each event, one a line"
    output.add_argument("--json", action="store_true", help=text)
    text = "stop after N messages; status 1 if fewer came"
    add("--expect", metavar="N", type=_positive(int), help=text)
    text = "stop after this time"
    add("--timeout", metavar="SECONDS", type=_positive(float), help=text)
    add("-v", "--verbose", action="store_true", help="log every session, as C: and S: lines")
    add("-q", "--quiet", action="store_true", help="log warnings and errors only")
    add("--version", action="version", version=f"dsmtpd {__version__}")


def _account(text: str) -> tuple[str, str]:
    user, colon, password = text.partition(":")
    if not user or not colon:
        raise argparse.ArgumentTypeError("must be USER:PASSWORD")
    return user, password


def _number(text: str) -> int:
    if not re.fullmatch("-?[0-9]{1,18}", text):
        raise argparse.ArgumentTypeError(f"must be a whole number, as 1025, not {text}")
    return int(text)


def _rule(text: str) -> str:
    try:
        parse_rule(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    def convert(text: str) -> float:
        with contextlib.suppress(ValueError):
            if 0 < kind(text) < float("inf"):
                return kind(text)
        raise argparse.ArgumentTypeError(f"must be a number above 0, as 1 or 10, not {text}")

    return convert


_CONFIG_FIELDS = [item.name for item in fields(Config)]


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the command line program; ends in SystemExit with the exit status.

    A zipapp drops what this returns, so it exits by itself.
    """
    # For a handler that imports dsmtpd while the file runs as a script.
    sys.modules.setdefault("dsmtpd", sys.modules[__name__])
    arguments = parse_args(argv)
    logging.basicConfig(format="%(asctime)s %(levelname)s: %(message)s")
    # Its warnings are about clients that have gone ahead of their replies.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    log.setLevel(
        logging.DEBUG if arguments.verbose else logging.WARNING if arguments.quiet else logging.INFO
    )
    _allow_open_files(3 * MAX_CONNECTIONS)
    config: Config = arguments.config
    with contextlib.ExitStack() as stack:
        if arguments.command and config.directory is None and arguments.handler is None:
            import tempfile

            temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="dsmtpd-"))
            arguments.config = replace(config, directory=temporary)
        status = asyncio.run(_Program(arguments).run())
    sys.exit(status)


def _allow_open_files(count: int) -> None:
    """Sockets and messages at the same time: 1024 on Linux, and 256 on macOS, are too few."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard != resource.RLIM_INFINITY:
            count = min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count), hard))


# Seconds between SIGTERM and SIGKILL for a command that runs when the time is over.
KILL_TIMEOUT = 5.0


class _Program:
    """One run of the program: the server, what it prints, and what ends it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._config: Config = arguments.config
        self._stop = asyncio.Event()
        self._came = 0
        self._process: asyncio.subprocess.Process | None = None

    async def run(self) -> int:
        """Serve until it is over; returns the exit status."""
        try:
            deliver, storing = self._delivery()
            given = self._arguments
            watched = any((given.expect, given.json, given.print))
            on_message = self._on_message if watched else None
            server = Server(self._config, deliver=deliver, on_message=on_message)
        except (OSError, ValueError, mailbox.Error) as error:
            log.error("Cannot start: %s", error)
            return 2
        try:
            await server.start(_activated())
        except (OSError, ValueError) as error:  # ValueError: a name that cannot be one
            where = self._config.interface, self._config.port
            log.error("Cannot listen at %s, port %s: %s", *where, error)
            return 3
        _on_signals(self._on_signal)
        self._announce(server, storing)
        run = self._run_command if self._arguments.command else self._wait
        status = await run(server)
        log.info("Cleaning up")
        await server.close()
        expected = self._arguments.expect or 0
        return status or int(self._came < expected or (expected > 0 and server.refused > 0))

    def _delivery(self) -> tuple[Callable[[Envelope], object], list[str]]:
        """Where the messages go, and the lines of the log about it."""
        name = self._arguments.handler
        if name is not None:
            return _load_handler(name), [f"Handing the incoming emails to {name}"]
        store = MaildirStore(self._config.directory)
        return store.deliver, [
            f"Storing the incoming emails into {store.directory}",
            f"Found a Maildir storage with {len(store)} mails",
        ]

    def _announce(self, server: Server, storing: list[str]) -> None:
        for name in server.listening:
            log.info("Starting dsmtpd %s at %s", __version__, _address(name))
        for line in storing:
            log.info("%s", line)
        if self._arguments.json:
            for host, port in server.listening:
                _print_event("listening", host=host, port=port, version=__version__)

    def _on_message(self, envelope: Envelope) -> None:
        self._came += 1
        if self._came == self._arguments.expect and not self._arguments.command:
            self._stop.set()
        if self._arguments.json:
            _print_event("message", **_as_json(envelope))
        if self._arguments.print:
            _print(_as_text(envelope))

    def _on_signal(self, number: int) -> None:
        """The first signal ends what runs, the second one does not ask."""
        again = self._stop.is_set()
        self._stop.set()
        if self._process is not None:
            _signal_command(self._process, "SIGKILL" if again else signal.Signals(number).name)
        elif again and not self._arguments.command:  # which has a directory to remove
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    async def _wait(self, server: Server) -> int:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._stop.wait(), self._arguments.timeout)
        if self._came >= (self._arguments.expect or float("inf")):
            await server.finish(STOP_TIMEOUT)  # who has sent the last one will say QUIT
        return 0

    async def _run_command(self, server: Server) -> int:
        """Run the command while the server listens; returns its exit status, as a shell."""
        command = self._arguments.command
        environment = {**os.environ, **self._environment(server)}
        try:
            # In a session of its own its processes, but for daemons, can be reached at once.
            process = await asyncio.create_subprocess_exec(
                *command, env=environment, start_new_session=True
            )
        except OSError as error:
            log.error("Cannot run %s: %s", command[0], error)
            return 127
        if self._stop.is_set():  # by a signal that came meanwhile
            _signal_command(process, "SIGTERM")
        self._process = process
        ended = asyncio.ensure_future(process.wait())
        for name, seconds in (("SIGTERM", self._arguments.timeout), ("SIGKILL", KILL_TIMEOUT)):
            if (await asyncio.wait([ended], timeout=seconds))[0]:
                break
            log.warning("The time is over: %s for %s", name, command[0])
            _signal_command(process, name)
        status = await ended
        self._process = None
        _signal_command(process, "SIGKILL")  # what it has left behind
        return status if status >= 0 else 128 - status

    def _environment(self, server: Server) -> dict[str, str]:
        """What tells the command where to send, and where to look."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(server.host, server.host)
        found = {"SMTP_HOST": host, "SMTP_PORT": str(server.port)}
        if self._arguments.handler is None:
            found["DSMTPD_MAILDIR"] = os.path.abspath(self._config.directory or ".")
        return found


def _activated() -> list[socket.socket]:
    """The listening sockets that systemd passes (sd_listen_fds(3)), and nobody else's."""
    ours = os.environ.pop("LISTEN_PID", "") == str(os.getpid())
    count = int(os.environ.pop("LISTEN_FDS", "0")) if ours else 0
    sockets = [socket.socket(fileno=3 + number) for number in range(count)]
    for sock in sockets:
        sock.set_inheritable(False)  # not for the command
        if sock.family not in (socket.AF_INET, socket.AF_INET6):
            raise OSError("LISTEN_FDS has a socket that is not for TCP")
    return sockets


def _load_handler(name: str) -> Callable[[Envelope], object]:
    """The callable of --handler. Raises ValueError that says what is wrong with the name."""
    module_name, _, path = name.partition(":")
    if not module_name or not path:
        raise ValueError(f"--handler {name}: must be MODULE:CALLABLE, as in my_file:my_function")
    sys.path.insert(0, os.getcwd())
    try:
        handler: Callable[[Envelope], object] = operator.attrgetter(path)(
            importlib.import_module(module_name)
        )
    except (Exception, SystemExit) as error:  # the module is the user's, and may do anything
        raise ValueError(f"--handler {name}: {type(error).__name__}: {error}") from error
    if not callable(handler):
        raise ValueError(f"--handler {name}: {path} cannot be called; name a function")
    return handler


def _signal_command(process: asyncio.subprocess.Process, name: str) -> None:
    """Send a signal to all processes of the command; Windows knows only the first one."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if os.name == "posix":
            os.killpg(process.pid, signal.Signals[name])
        else:
            process.kill()


def _print_event(event: str, **values: object) -> None:
    import json

    _print(json.dumps({"event": event, **values}) + "\n")


def _as_json(envelope: Envelope) -> dict[str, object]:
    return {
        "time": envelope.received.isoformat(),
        "peer": envelope.peer,
        "helo": envelope.helo,
        "tls": envelope.tls,
        "user": envelope.user,
        "mail_from": envelope.mail_from,
        "mail_options": envelope.mail_options,
        "rcpt_tos": envelope.rcpt_tos,
        "rcpt_options": envelope.rcpt_options,
        "subject": envelope.subject,
        "size": len(envelope.content),
        "warnings": envelope.warnings,
        "path": envelope.path and os.fsencode(envelope.path).decode("utf-8", "replace"),
    }


def _as_text(envelope: Envelope) -> str:
    """The message for the eye; what would move the cursor or colour the screen is escaped."""
    lines = [
        f"X-Peer: {envelope.peer}",
        f"X-MailFrom: {envelope.mail_from}",
        f"X-RcptTo: {', '.join(envelope.rcpt_tos)}",
        *envelope.content.decode("utf-8", "backslashreplace").replace("\r\n", "\n").split("\n"),
    ]
    text = "\n".join("\t".join(map(printable, line.split("\t"))) for line in lines)
    return (
        "---------- MESSAGE FOLLOWS ----------\n"
        + text.rstrip("\n")
        + "\n------------ END MESSAGE ------------\n"
    )


def _print(text: str) -> None:
    """Write to standard output at once; where nobody reads it any more, do without."""
    if sys.stdout is None:  # closed from the start
        return
    encoding = sys.stdout.encoding
    try:
        sys.stdout.buffer.write(text.encode(encoding, "backslashreplace"))
        sys.stdout.buffer.flush()
    except OSError as error:
        log.warning("Cannot write to standard output: %s", error)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _on_signals(act: Callable[[int], object]) -> None:
    """Call act in the running loop, with the number, at Ctrl-C and at SIGTERM."""
    loop = asyncio.get_running_loop()

    def on_signal(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(act, number)

    for name in ("SIGINT", "SIGTERM", "SIGBREAK", "SIGHUP"):
        number = signal.Signals.__members__.get(name)
        # nohup has SIGHUP ignored, and it stays so.
        if number is None or (name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN):
            continue
        try:
            loop.add_signal_handler(number, act, number)
        except NotImplementedError:  # on Windows, where signal.signal wakes the loop as well
            signal.signal(number, on_signal)


if __name__ == "__main__":
    main()
