from __future__ import annotations

import ast
import asyncio
import base64
import concurrent.futures
import contextlib
import dataclasses
import email.header
import email.message
import email.policy
import email.utils
import functools
import html.parser
import io
import json
import logging
import mailbox
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import smtplib
import socket
import ssl
import struct
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
import urllib.parse
import zipfile
from collections.abc import Awaitable, Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

import dsmtpd
from dsmtpd import Config, Envelope, Reply, Server, SMTPError

HERE = Path(__file__).parent
SCRIPT = HERE / "dsmtpd.py"
NOW = datetime(2026, 11, 21, 12, 0, 0, tzinfo=timezone.utc)
# A header section without warnings.
CLEAN = "From: <a@b>\r\nDate: Sat, 21 Nov 2026 12:00:00 +0000\r\nMessage-ID: <1@b>\r\n"
HELLO = "EHLO x"
OPENSSL = pytest.mark.skipif(not shutil.which("openssl"), reason="needs the openssl program")
POSIX = pytest.mark.skipif(os.name != "posix", reason="needs POSIX")


# --- Session without a socket ----------------------------------------------------------


class Client:
    """Drive a Session without a socket, accept every message and collect the envelopes."""

    def __init__(self, config: Config | None = None, **options: Any) -> None:
        self.session = dsmtpd.Session(config or Config(**options), "127.0.0.1:54321")
        self.envelopes: list[Envelope] = []
        self.greeting = self.send(b"")

    def send(self, data: bytes) -> bytes:
        """Return the replies to the data."""
        replies = b""
        for action in self.session.receive(data, NOW.timestamp()):
            if isinstance(action, dsmtpd.Deliver):
                self.envelopes.append(action.envelope)
                action.reply = dsmtpd.MESSAGE_ACCEPTED
            elif isinstance(action, Reply):
                replies += action.encoded
            else:
                replies += f"<{action}>\r\n".encode()
        return replies

    def send_in_pieces(self, data: bytes, size: int) -> bytes:
        """Return the replies to the data, which arrives in pieces of this size."""
        return b"".join(self.send(piece) for piece in pieces(data, size))

    def codes(self, *lines: str) -> str:
        """Return the reply code of each line, or "-" for a line without a reply."""
        replies = [self.send(line.encode() + b"\r\n").decode() for line in lines]
        return " ".join(reply.splitlines()[-1][:3] if reply else "-" for reply in replies)

    def deliver(self, content: str = CLEAN, *lines: str) -> list[str]:
        """Send a message after these lines, and return the names of its warnings."""
        lines = lines or (HELLO, "MAIL FROM:<a@b>", "RCPT TO:<c@d>")
        self.codes(*lines, "DATA")
        self.send(content.encode() + b".\r\n")
        return [text.partition(":")[0] for text in self.envelopes[-1].warnings]


def pieces(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


def without_early_talker(client: Client) -> list[Envelope]:
    """Return the envelopes without early-talker, which depends on how the input is split."""
    return [
        dataclasses.replace(
            envelope,
            warnings=[text for text in envelope.warnings if not text.startswith("early-talker")],
        )
        for envelope in client.envelopes
    ]


def client_with_recipient(**options: Any) -> Client:
    """Return a client that has sent EHLO, MAIL and RCPT."""
    client = Client(**options)
    assert client.codes("EHLO app.test", "MAIL FROM:<a@x.test>", "RCPT TO:<b@y.test>") == (
        "250 250 250"
    )
    return client


# Method, arguments, data, what is returned, and what is left of the data.
INPUTS: list[tuple[str, tuple[Any, ...], bytes, object, bytes]] = [
    ("line", (), b"NOOP\r\nx", b"NOOP\r\n", b"x"),
    ("line", (), b"\nNOOP\r\n", b"\n", b"NOOP\r\n"),
    ("octets", (3,), b"a\r\nb", b"a\r\n", b"b"),
    ("octets", (0,), b"a", b"", b"a"),
    ("discard", (3,), b"a\r\nb", None, b"b"),
    ("discard", (0,), b"a", None, b"a"),
    ("content", (b"\r\n", 99), b".\r\nQUIT", b"", b"QUIT"),
    ("content", (b"\r\n", 99), b"..\r\n.b\n.\n.\r\n\r\n.\r\n.", b".\r\nb\n.\n.\r\n\r\n", b"."),
    ("content", (b"\n", 99), b"a\r\n.\r\n..b\n.\nc", b"a\r\n\r\n.b\n", b"c"),
    ("content", (b"\r\n", 5), b"..ab\r\n.\r\nc", b".ab\r\n", b"c"),
    ("content", (b"\r\n", 4), b"..ab\r\n.\r\nc", None, b"c"),
    ("content", (b"\r\n", 4), b"x" * 99 + b"\r\n.\r\nc", None, b"c"),
]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(("method", "arguments", "data", "result", "rest"), INPUTS)
def test_input(
    method: str, arguments: tuple[Any, ...], data: bytes, result: object, rest: bytes, whole: bool
) -> None:
    source = dsmtpd.Input()
    remaining = iter(pieces(data, len(data) if whole else 1))
    assert read(getattr(source, method)(*arguments), source, remaining) == result
    source += b"".join(remaining)
    assert read(source.octets(len(rest)), source, iter([])) == rest
    assert source == b""


def read(reader: Iterator[object], source: dsmtpd.Input, data: Iterator[bytes]) -> Any:
    """Return what a method of Input returns, which gets more data when it waits for it."""
    while True:
        try:
            next(reader)
        except StopIteration as end:
            return end.value
        source += next(data)


# --- Dialogues ----------------------------------------------------------------------------

# Each line of the client, with the lines of the reply to it. A line ends with CRLF unless it ends
# with an escaped LF.
EHLO = r"""
EHLO app.test       -> 250-HOST
                    -> 250-SIZE 33554432
                    -> 250-8BITMIME
                    -> 250-SMTPUTF8
                    -> 250-PIPELINING
                    -> 250-ENHANCEDSTATUSCODES
                    -> 250-CHUNKING
                    -> 250-DSN
                    -> 250-HELP
                    -> 250 AUTH PLAIN LOGIN XOAUTH2
"""
RECIPIENT = """
MAIL FROM:<a@x>     -> 250 2.1.0 Sender OK
RCPT TO:<b@y>       -> 250 2.1.5 Recipient OK
"""

DIALOGUES = {
    "message after EHLO": rf"""
{EHLO}
MAIL FROM:<app@example.com> SIZE=100 BODY=8BITMIME -> 250 2.1.0 Sender OK
RCPT TO:<user@test.com> -> 250 2.1.5 Recipient OK
DATA                -> 354 End data with <CR><LF>.<CR><LF>
Subject: Hello
\r\n
..one dot
.                   -> 250 2.0.0 Message accepted
QUIT                -> 221 2.0.0 Bye
NOOP
""",
    "message after HELO": """
helo app            -> 250 HOST
mail from: <>       -> 250 2.1.0 Sender OK
rcpt to: <Postmaster> -> 250 2.1.5 Recipient OK
data                -> 354 End data with <CR><LF>.<CR><LF>
.                   -> 250 2.0.0 Message accepted
""",
    "errors keep the transaction": """
HELO app            -> 250 HOST
MAIL FROM:<a@x>     -> 250 2.1.0 Sender OK
MAIL FROM:<b@x>     -> 503 5.5.1 Nested MAIL command
RCPT TO:<>          -> 501 5.1.3 Bad address syntax
DATA                -> 503 5.5.1 Send MAIL and RCPT first
RCPT TO:<b@y>       -> 250 2.1.5 Recipient OK
RSET now            -> 501 5.5.4 No argument allowed
DATA                -> 354 End data with <CR><LF>.<CR><LF>
text
.                   -> 250 2.0.0 Message accepted
""",
    "lines that end with LF": r"""
HELO me\n           -> 250 HOST
MAIL FROM:<me@x>\n  -> 250 2.1.0 Sender OK
RCPT TO:<you@y>\n   -> 250 2.1.5 Recipient OK
DATA\n              -> 354 End data with <CR><LF>.<CR><LF>
Hello\n
..\n
.
.\n                 -> 250 2.0.0 Message accepted
QUIT\n              -> 221 2.0.0 Bye
""",
    "HELP lists the commands": """
HELP -> 214-2.0.0 Commands:
     -> 214 2.0.0 EHLO HELO MAIL RCPT DATA BDAT RSET NOOP QUIT VRFY HELP STARTTLS AUTH
""",
    "AUTH": rf"""
{EHLO}
AUTH login          -> 334 VXNlcm5hbWU6
dXNlcg==            -> 334 UGFzc3dvcmQ6
*                   -> 501 5.7.0 Authentication cancelled
auth plain          -> 334\x20
AHVzZXIAc2VjcmV0    -> 235 2.7.0 Authentication successful
AUTH PLAIN AHVzZXIA -> 503 5.5.1 Already authenticated
{EHLO.replace("250-HELP", "250 HELP").replace("-> 250 AUTH PLAIN LOGIN XOAUTH2", "")}
MAIL FROM:<a@x>     -> 250 2.1.0 Sender OK
""",
    "BDAT": rf"""
HELO app            -> 250 HOST
BDAT 4
ab                  -> 503 5.5.1 Send MAIL and RCPT first
MAIL FROM:<a@x>     -> 250 2.1.0 Sender OK
BDAT 6 LAST
QUIT                -> 503 5.5.1 Send MAIL and RCPT first
RCPT TO:<b@y>       -> 250 2.1.5 Recipient OK
bdat 6
.\r\n.              -> 250 2.0.0 OK
RCPT TO:<c@y>       -> 503 5.5.1 RCPT is not allowed after BDAT
DATA                -> 503 5.5.1 DATA is not allowed after BDAT
BDAT 0              -> 250 2.0.0 OK
NOOP                -> 250 2.0.0 OK
BDAT 3 last
a                   -> 250 2.0.0 Message accepted
{RECIPIENT}
BDAT 5
abc                 -> 250 2.0.0 OK
RSET                -> 250 2.0.0 OK
{RECIPIENT}
BDAT 99999999
QUIT
.
""",
    "HTTP request": """
POST / HTTP/1.1     -> 421 4.7.0 HTTP request refused
MAIL FROM:<a@x>
RCPT TO:<b@y>
""",
}


def exchanges(dialogue: str) -> Iterator[tuple[bytes, bytes]]:
    """Yield each line of the client with the replies to it."""
    for part in re.split(r"\s*\n(?=\S)", dialogue.strip()):
        texts = [text.strip().replace("HOST", dsmtpd.HOSTNAME) for text in part.split("->")]
        sent, *replies = [text.encode().decode("unicode_escape") for text in texts]
        line_end = "" if sent.endswith("\n") else "\r\n"
        yield f"{sent}{line_end}".encode(), "".join(f"{reply}\r\n" for reply in replies).encode()


@pytest.mark.parametrize("name", DIALOGUES)
def test_dialogue(name: str) -> None:
    """The replies are the same line by line, byte by byte and all at once (pipelining)."""
    by_line, all_at_once, by_byte = Client(), Client(), Client()
    greeting = f"220 {dsmtpd.HOSTNAME} ESMTP dsmtpd {dsmtpd.__version__}\r\n"
    assert by_line.greeting == greeting.encode()
    pairs = list(exchanges(DIALOGUES[name]))
    for sent, replies in pairs:
        assert by_line.send(sent) == replies, sent
    data = b"".join(sent for sent, _ in pairs)
    expected = b"".join(replies for _, replies in pairs)
    assert all_at_once.send(data) == by_byte.send_in_pieces(data, 1) == expected
    envelopes = without_early_talker(by_line)
    assert envelopes == without_early_talker(all_at_once) == without_early_talker(by_byte)


# --- Commands ---------------------------------------------------------------------------

# The reply code of each command (row) in each state (column).
MATRIX = """
            start  helo  ehlo  mail  rcpt
EHLO x      250    250   250   250   250
HELO x      250    250   250   250   250
EHLO        501    501   501   501   501
MAIL F      503    250   250   503   503
RCPT T      503    503   503   250   250
DATA        503    503   503   503   354
DATA x      501    501   501   501   501
RSET        250    250   250   250   250
RSET x      501    501   501   501   501
NOOP        250    250   250   250   250
NOOP x      250    250   250   250   250
QUIT        221    221   221   221   221
QUIT x      501    501   501   501   501
VRFY x      252    252   252   252   252
VRFY        501    501   501   501   501
EXPN x      502    502   502   502   502
HELP        214    214   214   214   214
STARTTLS    502    502   502   502   502
AUTH        503    501   501   503   503
AUTH X      503    504   504   503   503
AUTH PLAIN  503    334   334   503   503
AUTH LOGIN  503    334   334   503   503
BDAT        501    501   501   501   501
BDAT 1      -      -     -     -     -
BDAT 0      503    503   503   503   250
BDAT x LAST 501    501   501   501   501
TURN        502    502   502   502   502
SEND F      502    502   502   502   502
XYZZY       500    500   500   500   500
.           500    500   500   500   500
GET /       421    421   421   421   421
"""
# The commands that lead to each state.
STATES = {
    "start": [],
    "helo": ["HELO x"],
    "ehlo": ["EHLO x"],
    "mail": ["EHLO x", "MAIL FROM:<a@x>"],
    "rcpt": ["EHLO x", "MAIL FROM:<a@x>", "RCPT TO:<b@y>"],
}


def matrix_cells() -> Iterator[tuple[str, str, str]]:
    head, *rows = MATRIX.strip().splitlines()
    for row in rows:
        command = row[:12].strip().replace(" F", " FROM:<a@x>").replace(" T", " TO:<b@y>")
        for state, code in zip(head.split(), row[12:].split(), strict=True):
            yield state, command, code


@pytest.mark.parametrize(("state", "command", "code"), list(matrix_cells()))
def test_command_in_state(state: str, command: str, code: str) -> None:
    client = Client()
    client.codes(*STATES[state])
    assert client.codes(command) == code


def test_transaction_after_command() -> None:
    """Errors, NOOP, VRFY and HELP keep the transaction; RSET, EHLO and HELO abort it."""
    for command in "XYZZY|NOOP|VRFY x|HELP|EXPN x|MAIL FROM:<a@x>|EHLO|QUIT x".split("|"):
        client = client_with_recipient()
        assert client.codes(command, "DATA").endswith(" 354"), command
    for command in ("RSET", "EHLO x", "HELO x"):
        client = client_with_recipient()
        assert client.codes(command, "RCPT TO:<b@y>", "MAIL FROM:<a@x>") == "250 503 250", command


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ehlo under_score", "250"),
        ("EHLO [127.0.0.1]", "250"),
        ("EHLO  x  ", "250"),
        ("EHLO bücher.test", "250"),
        ("EHLO ", "501 5.5.4"),
        ("EHLO a b", "501 5.5.4"),
        ("HELO a\x00b", "501 5.5.4"),
        ("HELO a\x85b", "501 5.5.4"),
        ("nOoP", "250 2.0.0"),
        ("RSET  ", "250 2.0.0"),
        (" RSET", "500 5.5.2"),
        ("RSET\t", "250 2.0.0"),
        ("RSET \t ", "250 2.0.0"),
        ("R\tSET", "500 5.5.2"),
        ("", "500 5.5.2"),
        ("R\u017fET", "500 5.5.2"),
        *((verb, "502 5.5.1") for verb in "EXPN TURN ETRN ATRN SEND SOML SAML".split()),
        *((verb, "421") for verb in "PUT HEAD OPTIONS CONNECT DELETE PATCH PRI Host:".split()),
    ],
)
def test_command_syntax(line: str, expected: str) -> None:
    reply = Client().send(line.encode() + b"\r\n").decode().splitlines()[-1]
    assert reply.startswith(expected), reply


# --- Addresses and parameters -------------------------------------------------------------

# The path in the command, and the mailbox in the envelope.
VALID_PATHS = {
    "<a@b>": "a@b",
    "<a.b-c+d=e@x-y.example>": "a.b-c+d=e@x-y.example",
    "<!#$%&'*+-/=?^_`{|}~@x>": "!#$%&'*+-/=?^_`{|}~@x",
    '<"a b"@x>': '"a b"@x',
    r'<"a>\"<b"@x>': r'"a>\"<b"@x',
    '<""@x>': '""@x',
    "<a@[127.0.0.1]>": "a@[127.0.0.1]",
    "<a@[IPv6:::1]>": "a@[IPv6:::1]",
    "<a@[ipv6:2001:db8::127.0.0.1]>": "a@[ipv6:2001:db8::127.0.0.1]",
    "<a@[x-tag:some;thing]>": "a@[x-tag:some;thing]",
    "<Postmaster>": "Postmaster",
    "<@relay.test:a@b>": "a@b",
    "<@one.test,@two.test:a@b>": "a@b",
    " <a@b>": "a@b",
    f"<{'a' * 300}@{'b' * 300}>": f"{'a' * 300}@{'b' * 300}",
}
# Paths that are refused, by the enhanced status code; BAD is 5.1.7 for MAIL and 5.1.3 for RCPT.
INVALID_PATHS = {
    "5.5.4": ["a@b", "", "<a@b", "<a@b>x", "<a@b>>", "<a@_>x"],
    "5.5.2": ["<a\udcff@b>"],  # an octet that is not UTF-8
    "BAD": [
        *["<a b@c>", '<"a@b>', '<a"b@c>', "<.a@b>", "<a.@b>", "<a..b@c>", "<a@>", "<@b>", "<@b:>"],
        *["<a@b@c>", "<a@-b>", "<a@b->", "<a@b..c>", "<a@b c>", "<a@[256.0.0.1]>", "<a@[1.2.3]>"],
        *["<a@[IPv6:1::2::3]>", "<a@[IPv6:]>", "<a@[x]>", "<a@[]>", "<a\rb@c>", "<a\x00b@c>"],
        *["<a\tb@c>", "<a\x1bb@c>", "<a\x7fb@c>", '<"a\rb"@c>', '<"a\\\x00b"@c>', "<a\x85b@c>"],
        *["<a\u2028b@c>", "<a@b\u2029c>"],
    ],
}


@pytest.mark.parametrize("path", VALID_PATHS)
def test_valid_path(path: str) -> None:
    client = Client()
    client.deliver("", "EHLO x", f"MAIL FROM:{path}", f"RCPT TO:{path}")
    assert client.envelopes[0].mail_from == VALID_PATHS[path]
    assert client.envelopes[0].rcpt_tos == [VALID_PATHS[path]]


@pytest.mark.parametrize("status", INVALID_PATHS)
def test_invalid_path(status: str) -> None:
    for path in INVALID_PATHS[status]:
        client = Client()
        client.codes("EHLO x")
        line = f"MAIL FROM:{path} SMTPUTF8\r\n".encode("utf-8", "surrogateescape")
        reply = client.send(line).decode()
        assert reply.startswith("501 " + status.replace("BAD", "5.1.7")), path
        client.codes("MAIL FROM:<> SMTPUTF8")
        reply = client.send(f"RCPT TO:{path}\r\n".encode("utf-8", "surrogateescape")).decode()
        assert reply.startswith("501 " + status.replace("BAD", "5.1.3")), path


@pytest.mark.parametrize("address", ["é@x.test", "a@bücher.test", '"é x"@x.test', "用户@例子.广告"])
def test_non_ascii_address(address: str) -> None:
    client = Client()
    assert client.codes("EHLO x", f"MAIL FROM:<{address}>") == "250 553"
    assert client.codes("MAIL FROM:<a@b>", f"RCPT TO:<{address}>", "RSET") == "250 553 250"
    assert client.codes(f"MAIL FROM:<{address}> SMTPUTF8", f"RCPT TO:<{address}>") == "250 250"
    assert client.codes("DATA", ".") == "354 250"
    assert client.envelopes[0].mail_from == address
    assert client.envelopes[0].protocol == "UTF8SMTP"


# Parameters, between two spaces, by the verb and the reply.
PARAMETERS = {
    "MAIL 250": "SIZE=0  size=33554432  BODY=7bit  body=8BITMIME  SMTPUTF8  AUTH=<>  RET=FULL"
    "  AUTH=e+3Dmc2@example.com  RET=hdrs ENVID=QQ314159  ENVID=a+2Bb",
    "MAIL 501 5.5.4": "SIZE=  SIZE  SIZE=-1  SIZE=1x  SIZE=1 SIZE=1  BODY=9BIT  BODY=BINARYMIME"
    "  BODY=8B\u0131TM\u0131ME  SMTPUTF8=1  SMTPUTF8=  AUTH=a+b  RET=SOME  ENVID=  ENVID=a=b"
    "  ENVID=a+0Ab  ENVID=a+7Fb",
    "MAIL 552 5.3.4": "SIZE=33554433",
    "MAIL 555 5.5.4": "\u017fIZE=1  NOTIFY=NEVER  X=1  =",
    "RCPT 250": "NOTIFY=NEVER  NOTIFY=SUCCESS,failure,DELAY  ORCPT=rfc822;a+40b@c"
    "  ORCPT=utf-8;a\\x{E9}@b",
    "RCPT 501 5.5.4": "NOTIFY=NEVER,SUCCESS  NOTIFY=  NOTIFY=FA\u0131LURE  ORCPT=utf-8;a+E9@b"
    "  ORCPT=rfc822;\u00e9@b  ORCPT=a@b  ORCPT=rfc822;a+0Db@c  ORCPT=rfc822;a ORCPT=rfc822;a",
    "RCPT 553 5.6.7": "ORCPT=utf-8;\u00e9@b",
    "RCPT 555 5.5.4": "SIZE=1",
}


@pytest.mark.parametrize("key", PARAMETERS)
def test_parameters(key: str) -> None:
    verb, _, expected = key.partition(" ")
    path = "FROM:<a@b>" if verb == "MAIL" else "TO:<c@d>"
    for parameters in PARAMETERS[key].split("  "):
        client = Client()
        client.codes("EHLO x", *(["MAIL FROM:<a@b>"] if verb == "RCPT" else []))
        reply = client.send(f"{verb} {path} {parameters}\r\n".encode()).decode()
        assert reply.startswith(expected), parameters


def test_parameters_in_envelope() -> None:
    client = Client()
    sender, recipient = "MAIL FROM:<a@b> size=3  SMTPUTF8 RET=FULL", "RCPT TO:<c@d> NOTIFY=NEVER"
    client.deliver("", "EHLO x", sender, recipient, "RCPT TO:<e@f>")
    assert client.envelopes[0].mail_options == {"SIZE": "3", "SMTPUTF8": "", "RET": "FULL"}
    assert client.envelopes[0].rcpt_options == [{"NOTIFY": "NEVER"}, {}]


def test_parameters_require_ehlo() -> None:
    client = Client()
    assert client.codes("HELO x", "MAIL FROM:<a@b> SIZE=1", "MAIL FROM:<a@b>") == "250 555 250"
    assert client.codes("RCPT TO:<c@d> NOTIFY=NEVER", "RCPT TO:<c@d>  ") == "555 250"


@pytest.mark.parametrize(
    ("body", "content", "expected"),
    [
        ("7BIT", "Subject: a\r\n\r\nb", "250 2.0.0"),
        ("7BIT", "Subject: é\r\n\r\nb", "554 5.6.7"),
        ("8BITMIME", "Subject: é", "554 5.6.7"),
        ("8BITMIME", "Subject: a\r\n\r\né", "250 2.0.0"),
        ("7BIT", "Subject: a\r\n\r\né", "250 2.0.0"),
        ("7BIT", "Subject: a\n\né", "250 2.0.0"),
        ("7BIT", "\r\né", "250 2.0.0"),
    ],
)
def test_content_without_smtputf8(body: str, content: str, expected: str) -> None:
    client = Client(smtputf8=False)
    assert b"SMTPUTF8" not in client.send(b"EHLO x\r\n")
    client.codes(f"MAIL FROM:<a@b> BODY={body}", "RCPT TO:<c@d>", "DATA")
    reply = client.send(content.encode() + b"\r\n.\r\n").decode()
    assert reply.startswith(expected), reply
    assert client.codes("MAIL FROM:<a@b>") == "250"


# --- Content ------------------------------------------------------------------------------

CONTENTS = [
    b"",
    b"\r\n",
    b".\r\n",
    b"..\r\n.\r\n...\r\n\r\n\r\nbare \r and \n and \r\r\n\n\r\n\r\r\r\n.\n.\r.\r\n",
    b"x" * 1_000_000 + b"\r\n",
    bytes(range(256)) * 40 + b"\r\n",
]
# Sequences that some servers accept as the end of the content (SMTP smuggling).
NOT_TERMINATORS = r"""
    \n.\n \n.\r\n \r.\r \r.\r\n \r\n.\r \r\n.\n \n.\r \r.\n
    \r\n\0.\r\n \r\n.\0\r\n \r\n.\r\r\n \r\n.\n\r\n \r\r\n.\r\r\n \r\n.\x20\r\n
""".split()


def dot_stuffed(content: bytes, eol: bytes = b"\r\n") -> bytes:
    """Stuff the dots and append the terminator (RFC 5321 section 4.5.2)."""
    return re.sub(rb"(\A|%b)\." % eol, rb"\1..", content) + b"." + eol


@pytest.mark.parametrize("content", CONTENTS, ids=range(len(CONTENTS)))
def test_content_is_unchanged(content: bytes) -> None:
    data = dot_stuffed(content) + b"NOOP\r\n"
    for size in (1, 2, 3, 5, 100, 100_000) if len(data) < 20_000 else (100, 100_000):
        client = client_with_recipient()
        client.codes("DATA")
        replies = client.send_in_pieces(data, size)
        assert replies == b"250 2.0.0 Message accepted\r\n250 2.0.0 OK\r\n"
        assert client.envelopes[0].content == content


@pytest.mark.parametrize("text", NOT_TERMINATORS)
def test_other_sequences_do_not_end_content(text: str) -> None:
    data = b"one" + text.encode().decode("unicode_escape").encode() + b"MAIL FROM:<smuggled@x>\r\n"
    for size in (1, len(data)):
        client = client_with_recipient()
        client.codes("DATA")
        assert client.send_in_pieces(data, size) == b""
        assert client.send(b".\r\n") == b"250 2.0.0 Message accepted\r\n"
        # The server removes a leading dot that is not part of the terminator.
        assert client.envelopes[0].content == data.replace(b"\r\n.", b"\r\n")


def test_envelope() -> None:
    client = client_with_recipient()
    client.codes("DATA", "Subject: Hi", "From: <a@x>", "Date: now", ".")
    assert client.envelopes == [
        Envelope(
            peer="127.0.0.1:54321",
            helo="app.test",
            protocol="ESMTP",
            tls=False,
            user=None,
            mail_from="a@x.test",
            mail_options={},
            rcpt_tos=["b@y.test"],
            rcpt_options=[{}],
            content=b"Subject: Hi\r\nFrom: <a@x>\r\nDate: now\r\n",
            received=NOW,
            warnings=["missing-message-id: no Message-ID field (RFC 5322 section 3.6.4)"],
            path=None,
        )
    ]
    assert client.envelopes[0].email["Subject"] == "Hi"


SUBJECTS = {
    b"Subject: Welcome Email\r\n\r\nText": "Welcome Email",
    b"To: a\r\nsubject:\ta\r\n\tb\r\n  c\r\nX: y\r\n": "a\tb  c",
    b"X : y\r\nSubject\t: a\r\n\r\n": "a",
    b"X: y\r\r\nSubject: a\r\r\n b\r\r\n\r\r\nText\r\r\n": "a b",
    b"From a@b Sat Nov 21\r\nSubject: mbox\r\n\r\n": "mbox",
    b"No field\r\nSubject: in the body\r\n": "",
    b"X: y\r\n Subject: folded\r\n\r\nSubject: in the body\r\n": "",
    b"\r\nSubject: in the body\r\n": "",
    b"X: a\rb\nSubject: bare\n\n": "bare",
    b"Subject: =?utf-8?q?h=C3=A9?= =?iso-8859-1?q?_=E9?=\r\n": "h\u00e9 \u00e9",
    b"Subject: h\xe2\x82\xac=?utf-8?q?=E2=82=AC?= b\xff\r\n": "h\u20ac\u20ac b\ufffd",
    b"Subject: =?nothing?q?a?= =?nothing?b?w6k?=\r\n": "aé",
    b"Subject: =?utf-8?b?a?=\r\n": "",
    b"Subject: =?utf-7?q?+2AA-?=\r\n": "?",
    b"Subject: =?utf-8?q?a=0D=0Ab?=\r\n": "a\r\nb",
    b"Subject: =?UTF-8?Q?_=C2=A0a__b=E3=80=80?=\r\n\t=?utf-8?b?w6kg?=\r\n": " \xa0a  b\u3000é ",
    b"Subject: =?utf-8?q?M=C3?= =?UTF-8?q?=BCnchen?= =?us-ascii?q?er?= x\r\n": "Münchener x",
    b"Subject: (=?utf-8*de?q?a b?==?latin1?b?6Q?=)\r\n": "(a b\xe9)",
    b"": "",
}


@pytest.mark.parametrize("content", SUBJECTS)
def test_subject(content: bytes) -> None:
    client = client_with_recipient()
    client.codes("DATA")
    client.send(dot_stuffed(content + b"\r\n"))
    assert client.envelopes[0].subject == SUBJECTS[content]


def mime(*lines: str) -> Envelope:
    """Return an envelope with this content."""
    return envelope(content="\r\n".join(lines).encode("utf-8", "surrogateescape"))


def test_decoded_parts() -> None:
    both = email.message.EmailMessage()
    both.set_content("Grüße\n", charset="iso-8859-15", cte="quoted-printable")
    both.add_alternative("<p>Grüße</p>", subtype="html", cte="base64")
    both.add_attachment("a text file", filename="notes.txt")
    both.add_attachment(HTML_MESSAGE)
    message = envelope(content=both.as_bytes(policy=email.policy.SMTP))
    assert (message.text, message.html) == ("Grüße\n", "<p>Grüße</p>\n")
    attached = HTML_MESSAGE.as_bytes(policy=email.policy.SMTP)
    assert message.attachments == [
        dsmtpd.Attachment("notes.txt", "text/plain", b"a text file\r\n"),
        dsmtpd.Attachment("", "message/rfc822", attached),
    ]
    message = envelope(content=attached)
    assert (message.text, message.links) == ("", ["https://example.com/verify?a=1&b=2"])
    assert message.attachments == [dsmtpd.Attachment("für.pdf", "application/pdf", b"%PDF")]


# Lines; "|" is a line end. Then the text, the HTML, and the attachments: name, type and content.
STRUCTURES: list[tuple[str, str, str, list[tuple[str, str, bytes]]]] = [
    ("Subject: x||Text", "Text", "", []),
    (" Text", " Text", "", []),
    ("|Text", "Text", "", []),
    *((f"Content-Type: text/plain; charset={x}||ü", "ü", "", []) for x in ("x", "idna", "rot13")),
    ("Content-Type: text/plain; charset = 'UTF8' (a comment)||ü", "ü", "", []),
    ("Content-Type: text/plain; charset*=utf-8''koi8-r||ü", "ц╪", "", []),
    ("Content-Transfer-Encoding: no-such-encoding|Content-Type: no type at all||ü", "ü", "", []),
    ("Content-Type : text/html|X-Y\t: z||<p>", "", "<p>", []),
    ("Content-Type: application/json||{}", "", "", [("", "application/json", b"{}")]),
    ("Content-Type: text/html, charset=utf-8||<p>", "", "<p>", []),
    (
        'Content-Type: multipart/x; boundary="=?utf-8?q?a?="||x|--=?utf-8?q?a?=||b',
        "b",
        "",
        [],
    ),
    # The only delimiter is the last one
    ("Content-Type: multipart/x; boundary=a||b|--a--|", "", "", [("", "multipart/x", b"b")]),
    (
        "Content-Type: multipart/alternative; boundary=a b=1'|||--a b=1'||1|--a b=1'"
        "|Content-Type: text/html||2|--a b=1'|Content-Type: text/x-amp-html||3"
        "|--a b=1'|Content-Type: Text/Calendar; method=REQUEST||4|--a b=1'--|epilogue",
        "1",
        "2",
        [("", "text/x-amp-html", b"3"), ("", "text/calendar", b"4")],
    ),
    # The second text, an empty part, a part without an end, lines that are no delimiters
    (
        'Content-Type: multipart/mixed; boundary="B:1"||preamble|--B:1 |X: y||1|--B:12|2||--B:1|'
        "Content-Type: text/plain||3|--B:1|--B:1|Content-Type: text/csv||4|",
        "1\n--B:12\n2\n",
        "",
        [("", "text/plain", b"3"), ("", "text/plain", b""), ("", "text/csv", b"4\r\n")],
    ),
    # Multiparts in multiparts, of which one is not closed and one has no parts
    (
        "Content-Type: multipart/mixed; boundary=1||--1|Content-Type: multipart/related; boundary=2"
        "||--2|Content-Type: multipart/alternative; boundary=3||--3||a|--3--|--2"
        "|Content-Type: image/png||b|--1|Content-Type: multipart/x; boundary=4||c|--1--|--1||d",
        "a",
        "",
        [("", "image/png", b"b"), ("", "multipart/x", b"c")],
    ),
    # Messages in messages
    (
        "Content-Type: multipart/digest; boundary=1||--1||Subject: a||b|--1"
        "|Content-Disposition: inline; filename=x.eml|Content-Transfer-Encoding: base64||YQpiCg==|"
        "--1|Content-Type: text/plain||c|--1--|",
        "c",
        "",
        [("", "message/rfc822", b"Subject: a\r\n\r\nb"), ("x.eml", "message/rfc822", b"a\nb\n")],
    ),
]


@pytest.mark.parametrize(("lines", "text", "html", "attachments"), STRUCTURES)
def test_structures(
    lines: str, text: str, html: str, attachments: list[tuple[str, str, bytes]]
) -> None:
    message = mime(*lines.split("|"))
    assert (message.text, message.html) == (text, html)
    assert [(item.name, item.type, item.content) for item in message.attachments] == attachments


def test_double_line_ends() -> None:
    """Lines end in CR CR LF, as those of a file with CRLF that curl --crlf sends."""
    lines = "Content-Type: multipart/mixed; boundary=1|X: y||--1||a|b|--1|Content-Type: text/html"
    message = mime(f"{lines}||=3D|--1--|".replace("|", "\r\r\n"))
    assert (message.text, message.html, message.attachments) == ("a\nb", "=3D", [])


# Parameters of Content-Disposition, or a field with others, and the name of the file
FILE_NAMES = [
    ('FileName = "a  b\\"c;d\\\\.pdf" ; size=1', 'a  b"c;d\\.pdf'),
    ("filename=two words (1).pdf; size=1", "two words (1).pdf"),
    ("filename=it's.pdf", "it's.pdf"),
    ("filename==?iso-8859-1?q?=E4=F6_?= =?utf-8?b?w7wucGRm?=;", "äö ü.pdf"),
    ('filename="=?utf-8?q?=C3=A4_=C3=B6?=\r\n =?utf-8?q?=C3=BC?=.pdf"', "ä öü.pdf"),
    ('filename="a\u3000\xa0b.pdf', "a\u3000\xa0b.pdf"),
    ("filename*=UTF-8'de'%C3%A4%20b.pdf; filename=x.pdf", "ä b.pdf"),
    ("filename=x.pdf; filename*=latin1''%80.pdf", "€.pdf"),
    ("filename*=%C3%A4.pdf", "ä.pdf"),
    ("filename*=a%27b%27.pdf", "a'b'.pdf"),
    ("filename*1*=%A4b.pdf; filename*0*=utf-8''a%C3; filename*3=d", "aäb.pdf"),
    ('filename*0="a;b"; filename*1=c.pdf', "a;bc.pdf"),
    ("filename*0*=utf-8''" + "%E8%AA%9E;\r\n filename*1*=" * 1 + "%E8%AA%9E" * 300, "語" * 301),
    ("x\r\nContent-Type: image/png; name*=utf-8''%C3%A4.png", "ä.png"),
    ("filename*=''; filename=\r\nContent-Type: image/png; name=a b.png; x=y", "a b.png"),
    ("", ""),
]


@pytest.mark.parametrize(("parameters", "name"), FILE_NAMES)
def test_file_names(parameters: str, name: str) -> None:
    message = mime(f"Content-Disposition: attachment; {parameters}", "Content-ID: <i@d> ", "", "x")
    assert [(item.name, item.content_id) for item in message.attachments] == [(name, "i@d")]


@pytest.mark.parametrize("field", ["BASE64 ", "base64;x", "(a) base64\t(b)", '\r\n "base64"'])
def test_transfer_encodings(field: str) -> None:
    for body in ("SMO2", "S MO2=", "SA==w7Y", "!SMO2A"):
        assert mime(f"Content-Transfer-Encoding: {field}", "", body).text == "Hö"
    assert mime("Content-Transfer-Encoding: Quoted-Printable;", "", "=\r\nH=c3=B6=").text == "Hö"


# Labels of a charset, octets, and their text
CHARSETS = [
    ("us-ascii ISO-8859-1 latin1 windows-1252 x-cp1252", b"\x80\x93\x81\xe4", "€“\ufffdä"),
    ("iso-8859-9 windows-1254 latin5", b"\x80\xfe", "€ş"),
    ("iso-8859-11 tis-620 windows-874", b"\x85\xa1\xff", "…ก\ufffd"),
    ("iso-8859-8-i iso-8859-8-e", b"\xf9", "ש"),
    ("windows-1253", b"\xaaa", "\ufffda"),
    ("iso-8859-2 iso88592 latin2", b"\xb1", "ą"),
    ("unicode_escape unknown", b"\\d", "\\d"),
    (
        "gb2312 gbk x-gbk gb_2312-80 csgb2312",
        b"\xa2\xa1 \x87a \xffa\x81",
        "\u2170 嘺 \ufffda\ufffd",
    ),
    ("big5 big5-hkscs", b"\xa4\xa4\xf9\xd6\xffa", "中碁\ufffda"),
    ("shift_jis ms_kanji x-sjis windows-31j", b"\x87@\x81`\xfa\xb1\xffa", "①\uff5e﨑\ufffda"),
    ("euc-kr ks_c_5601-1987 korean windows-949", b"\x8cc\xffa", "똠\ufffda"),
    ("euc-jp x-euc-jp", b"\xad\xa1\xa1\xc1\xf9\xb5\x8e\xb1\xffa\xa4", "①\uff5e侊ｱ\ufffda\ufffd"),
    ("iso-2022-jp", b"a\x1b$B-!!A|bL\n\x1b(B\xffb\x1b(I1\x1b(Jc", "a①\uff5e髙\ufffd\n\ufffdbｱc"),
    ("utf-8", b"\xef\xbb\xbfa\xe2\x82b\xf0\x9f\x98\xc3\xa4", "a\ufffdb\ufffdä"),
    ("utf-16", b"\xff\xfea\0\xac ", "a€"),
]


@pytest.mark.parametrize(("labels", "octets", "text"), CHARSETS)
def test_charsets(labels: str, octets: bytes, text: str) -> None:
    for label in labels.split():
        header = f'Content-Type: text/plain; charset="{label}"\r\n'
        assert envelope(content=header.encode() + b"\r\n" + octets).text == text
        word = base64.b64encode(octets)
        subject = b"Subject: =?%b?b?%b?=\r\n" % (label.encode(), word)
        assert envelope(content=subject).subject == text


# Text, and the URLs in it
URLS = [
    ("See https://a.test/x?y=1&z=2, please.", "https://a.test/x?y=1&z=2"),
    ("(http://a.test/b) <https://c.test>", "http://a.test/b https://c.test"),
    ("https://a.test! https://b.test https://a.test", "https://a.test https://b.test"),
    ("ftp://a.test mailto:a@b.test www.a.test https:// https://.", ""),
    ("HTTPS://A.test/\u00fc.", "HTTPS://A.test/\u00fc"),
    (
        "https://a.test/wiki/A_(b) (https://a.test/(b)(c))d",
        "https://a.test/wiki/A_(b) https://a.test/(b)(c)",
    ),
    ("[a](https://a.test/b) {https://[::1]/{{c}}}", "https://a.test/b https://[::1]/{{c}}}"),
    ("'https://a.test/it's' `https://b.test`", "https://a.test/it's https://b.test"),
    ("„https://a.test“\u2039https://b.test\u203a", "https://a.test https://b.test"),
    ("\uff08https://a.test\uff09『https://b.test』", "https://a.test https://b.test"),
    ("https://a.test、https://b.test\uff01", "https://a.test https://b.test"),
    ("https://a.test؟ https://b.test।", "https://a.test https://b.test"),
    ("https://a.test/x\u2013y https://a.test\xa0b", "https://a.test/x\u2013y https://a.test"),
]


@pytest.mark.parametrize(("text", "urls"), URLS)
def test_links_in_text(text: str, urls: str) -> None:
    assert mime("Subject: Hi", "", text).links == urls.split()


# HTML, and its text
HTML_TEXTS = [
    ("<p>a<p>b<br>c</p>", "a\nb\nc"),
    ("a &lt;b&gt; &amp;&nbsp;c&#x1; 1 < 2", "a <b> &\xa0c 1 < 2"),
    ("<!-- <a href='x://y'> --><!--><b>x</b", "x"),
    ("<title-bar>a</title-bar> <button>b</button>", "a\nb"),
    ("<title>t</title><script>var a = '<p>';</script >x<![if mso]><?y?>", "x"),
    ("<img alt='a>b'>x<ul><li>1<li>2</ul>", "x\n\n1\n2"),
    ("<tr>\n<td>a</td><td>b<th>c</tr><tr><td>d", "a  b  c\n\nd"),
    ("a<form>b</form><h4>c</h4>d<dl><dt>e<dd>f</dl>g", "a\nb\n\nc\nd\n\ne\nf\ng"),
    ("<b>a </b> b\n<pre>\n  c\n d  e</pre> <i> f</i>", "a b\n\n  c\n d  e\nf"),
    ("a\u3000 \xa0b <a href=/it's>isn't</a>", "a\u3000 \xa0b isn't"),
    (f"a&#{'9' * 5000};b", f"a\ufffd{'9' * 4950};b"),
]


@pytest.mark.parametrize(("document", "text"), HTML_TEXTS)
def test_text_of_html(document: str, text: str) -> None:
    assert dsmtpd.parse_html(document)[0] == text


# HTML, and the targets of its links
TARGETS = [
    (
        '<a href="https://a.test/?b&amp;c">https://a.test/</a>',
        ["https://a.test/?b&c", "https://a.test/"],
    ),
    ("<A HREF=app://open>", ["app://open"]),
    ("<a href='mailto:a@b'><a href=#c><a href=TEL:1><a href=' java&#10;script:c'><a href><a>", []),
    ("<a href='/b?c=1'><a href='{{ url }}'><area href=d>", ["/b?c=1", "{{ url }}", "d"]),
    ("<a href='?a&lt=1&notify&not&para;&#38;&#x26;&sect'>", ["?a&lt=1&notify¬¶&&§"]),
    ("<a title='href=a>'href = b href=c>", ["b"]),
    ("<a data-href=a\nhref=' b\r\nc '>", ["bc"]),
    ("<a href=/it's><a href=\"?a='b'\">", ["/it's", "?a='b'"]),
]


@pytest.mark.parametrize(("document", "urls"), TARGETS)
def test_links_in_html(document: str, urls: list[str]) -> None:
    assert mime("Content-Type: text/html", "", document).links == urls


def test_link() -> None:
    message = mime("", "https://a.test/verify?a=1 https://a.test/b https://c.test/b")
    assert message.link("/verify") == "https://a.test/verify?a=1"
    for part, count in (("/b", 2), ("/none", 0)):
        with pytest.raises(LookupError) as caught:
            message.link(part)
        assert str(caught.value) == (
            f"{count} links contain '{part}'; the links of the message:\n"
            "  https://a.test/verify?a=1\n  https://a.test/b\n  https://c.test/b"
        )
    with pytest.raises(LookupError, match="the links of the message: none"):
        mime("").link("")


def test_header() -> None:
    message = mime("X-Tag:  =?utf-8?q?=C3=A9?=\r\n  b ", "x-tag: c", "", "X-Body: d")
    assert (message.header("x-TAG"), message.header("X-Body")) == ("é  b ", "")
    assert envelope(content="To: a <é@b>; (\r\n".encode()).header("To") == "a <é@b>; ("


def test_pickle() -> None:
    message = envelope(content=HTML_MESSAGE.as_bytes(policy=email.policy.SMTP))
    assert message.email["Subject"] == message.subject
    assert (message.links, message.attachments[0].name) != ([], "")
    copy = pickle.loads(pickle.dumps(message))
    assert copy == message
    assert copy.attachments == message.attachments


# --- Pages --------------------------------------------------------------------------------

# 37 by 19 pixels
PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAACUAAAATAQAAAAA/xvkeAAAADklEQVR42mNYBQIMdCQBDSo/F2KngF4AAAAASUVORK5C"
    "YII="
)
CHROMIUM = shutil.which("google-chrome") or shutil.which("chromium") or ""


def page_message(text: str = "Text", document: str = "<p>HTML</p>") -> Envelope:
    """Return a message with the text in every place of a page, an image and an attachment."""
    name = urllib.parse.quote(f"file {text}.svg", "")
    lines = f"""\
Subject: {text}
From: {text}
Date: {text}
Content-Type: multipart/mixed; boundary=X

--X

{text}
--X
Content-Type: text/html

{document}
--X
Content-Type: image/png
Content-ID: <logo+1@x>
Content-Transfer-Encoding: base64

{PNG}
--X
Content-Type: image/svg+xml
Content-Disposition: attachment; filename*=utf-8''{name}

<svg/>
--X--
"""
    message = mime(*lines.splitlines())
    return dataclasses.replace(message, mail_from=text, rcpt_tos=[text, text], warnings=[text])


class PageParser(html.parser.HTMLParser):
    """The elements of a page: their attributes and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.is_open = False
        self.elements: list[tuple[str, dict[str, str], list[str]]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.is_open = True
        self.elements.append((tag, {name: value or "" for name, value in attrs}, []))

    def handle_endtag(self, tag: str) -> None:
        self.is_open = False

    def handle_data(self, data: str) -> None:
        if self.is_open:
            self.elements[-1][2].append(data)

    def attributes(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes, _ in self.elements if name == tag]

    def texts(self, tag: str) -> list[str]:
        return ["".join(data).strip() for name, _, data in self.elements if name == tag]

    def structure(self) -> list[tuple[str, list[str]]]:
        return [(name, list(attributes)) for name, attributes, _ in self.elements]


# A line of the list
ENTRY = [("a", ["href"]), *((name, []) for name in ("time", "b", "span", "mark", "mark"))]


def list_entries(directory: Path) -> PageParser:
    """Return what has been appended to the list."""
    return PageParser((directory / "list.html").read_text("utf-8").rpartition("</p>\n")[2])


def frame(message: Envelope) -> str:
    """Return the HTML in the frame of the page of a message."""
    (attributes,) = PageParser(message.as_html()).attributes("iframe")
    assert attributes["sandbox"] == "allow-popups allow-popups-to-escape-sandbox"
    document = attributes["srcdoc"]
    assert document.startswith("<base target=_blank>")
    return document.removeprefix("<base target=_blank>")


def test_page() -> None:
    message = page_message("Grüße", "<p>Hello</p>")
    page = PageParser(message.as_html())
    assert page.texts("title") == ["Grüße"]
    fields = dict(zip(page.texts("dt"), page.texts("dd"), strict=True))
    assert fields["From"] == fields["Date"] == fields["Warnings"] == "Grüße"
    assert fields["Envelope"] == "Grüße → Grüße, Grüße"
    assert page.texts("label") == ["HTML", "Text", "Source"]
    assert [
        attributes["id"] for attributes in page.attributes("input") if "checked" in attributes
    ] == ["HTML"]
    assert page.texts("pre") == ["Grüße", message.content.decode()]
    assert frame(message) == "<p>Hello</p>"
    policy = " ".join(page.attributes("meta")[3]["content"].split())
    assert policy == (
        "default-src 'none'; form-action 'none'; base-uri 'none'; img-src data: http: https:;"
        " font-src data: http: https:; style-src 'unsafe-inline' data: http: https:"
    )
    assert {"name": "referrer", "content": "no-referrer"} in page.attributes("meta")
    url = "data:application/octet-stream;base64,"
    assert page.attributes("a") == [
        {"download": "", "href": url + PNG},
        {"download": "file Grüße.svg", "href": url + base64.b64encode(b"<svg/>").decode()},
    ]
    assert page.texts("a") == ["unnamed", "file Grüße.svg"]


def test_page_escapes_every_text(tmp_path: Path) -> None:
    text = "</title></style></dd></textarea>--><!-- ]]><base href=x>$subject ${fields} {0} %s \\1"
    text += """<script>alert(1)</script> "onclick="alert(1)" a='b' & &lt; </pre></iframe>\u202e"""
    message = page_message(text, f"<p>HTML</p>{text}")
    page = PageParser(message.as_html())
    assert page.structure() == PageParser(page_message().as_html()).structure()
    assert page.texts("h1") == [text]
    assert page.texts("dd")[-2] == text
    assert page.attributes("a")[1]["download"] == page.texts("a")[1] == f"file {text}.svg"
    assert page.texts("pre")[0] == text
    assert frame(message) == f"<p>HTML</p>{text}"
    dsmtpd.PageDirectory(tmp_path).add(message)
    entries = list_entries(tmp_path)
    assert entries.structure() == ENTRY
    assert entries.texts("b") == [text]
    assert entries.texts("span") == [f"{text} → {text}, {text}"[:200]]


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ("<img src='cid:logo+1@x'>", "<img src='URL'>"),
        ("<img src=CID:logo%2B1%40x>", "<img src=URL>"),
        ('<img srcset="cid:logo+1@x, cid:logo+1@x 2x">', '<img srcset="URL, URL 2x">'),
        ("<td background='cid:logo+1@x'>", "<td background='URL'>"),
        ("<p style='background: url(cid:logo+1@x)'>", "<p style='background: url(URL)'>"),
        ('<style>p { background: url("cid:logo+1@x") }', '<style>p { background: url("URL") }'),
        ("<img src=cid:other><img src=cid:>", "<img src=cid:other><img src=cid:>"),
        ("see cid:logo+1@x, target=_self", "see cid:logo+1@x, target=_self"),
        ("<a href=x target=_top>", "<a href=x data-target=_top>"),
        ("<base target=_self>", "<base data-target=_self>"),
    ],
)
def test_html_in_page(document: str, expected: str) -> None:
    expected = expected.replace("URL", f"data:image/png;base64,{PNG}")
    assert frame(page_message("Text", document)) == expected


def test_page_of_text() -> None:
    text = "See (https://a.test/?b&c=<d>) or <http://a.test>.\r\nftp://a javascript:b"
    message = mime("X: y", "", text)
    page = PageParser(message.as_html())
    assert page.texts("label") == ["Text", "Source"]
    assert page.attributes("a") == [{"href": "https://a.test/?b&c="}, {"href": "http://a.test"}]
    assert "&lt;<a href=" in message.as_html()
    assert page.texts("h1") == ["(no subject)"]
    assert page.texts("dt") == ["Envelope", "Warnings"]


def test_page_of_html_without_text() -> None:
    message = mime("Content-Type: text/html", "", "<p>One<p>Two")
    assert PageParser(message.as_html()).texts("pre")[0] == "One\nTwo"
    assert "? → ?" in envelope(mail_from="\udcff", rcpt_tos=["\udcff"]).as_html()


def test_size_of_a_page() -> None:
    size = dsmtpd.MAX_PAGE_CONTENT
    page = envelope(content=b"Subject: Large\r\n\r\n".ljust(size + 1, b"x")).as_html()
    assert "<h1>Large</h1>" in page
    assert "The content of 33,554,433 bytes is not shown" in page
    assert len(page) < 10_000
    lines = "Content-Type: multipart/related; boundary=X||--X|Content-Type: text/html||"
    lines += "<img src=cid:a>" * 100 + "|--X|Content-ID: <a>|Content-Type: image/png||"
    images = mime(*lines.split("|"), "x" * 1_000_000)
    assert size // 2 < len(frame(images)) < size


def test_page_directory(tmp_path: Path) -> None:
    path = tmp_path / "a b" / "pages"
    servers = [dsmtpd.PageDirectory(path) for _ in range(2)]
    assert servers[0].url == (path / "index.html").as_uri()
    page_list = path / "list.html"
    empty = page_list.read_text("utf-8")
    assert "No messages yet" in empty
    messages = [page_message(str(number)) for number in range(3)]
    for number, message in enumerate(messages):
        before = page_list.read_bytes()
        servers[number % 2].add(message)
        assert page_list.read_bytes().startswith(before)
    dsmtpd.PageDirectory(path)  # a restart
    entries = list_entries(path)
    assert entries.texts("b") == ["0", "1", "2"]
    names = [attributes["href"] for attributes in entries.attributes("a")]
    assert all(re.fullmatch(r"20261121-120000-[0-9a-f]{8}\.html", name) for name in names)
    for name, message in zip(names, messages, strict=True):
        assert (path / name).read_bytes() == message.as_html().encode()
    shutil.rmtree(path)
    servers[0].add(messages[0])
    assert {file.name for file in path.iterdir()} > {"index.html", "list.html"}
    assert page_list.read_text("utf-8").startswith(empty)


def test_concurrent_pages(tmp_path: Path) -> None:
    def add_all(directory: dsmtpd.PageDirectory) -> None:
        for _ in range(50):
            directory.add(page_message())

    directories = [dsmtpd.PageDirectory(tmp_path) for _ in range(4)]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(add_all, directories))
    assert list_entries(tmp_path).structure() == 200 * ENTRY


def test_page_directory_errors(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(OSError, match="file"):
        dsmtpd.PageDirectory(file / "pages")
    directory = dsmtpd.PageDirectory(tmp_path / "pages")
    shutil.rmtree(tmp_path / "pages")
    (tmp_path / "pages").touch()
    with pytest.raises(OSError, match="pages"):
        directory.add(page_message())


HOSTILE_HTML = """\
</iframe><meta http-equiv="refresh" content="0;url=about:blank"><base target="_top">
<img src="cid:logo+1@x"><img src="x" onerror="document.body.textContent = ''">
<script>document.body.textContent = ""; top.document.title = "The script has run"</script>
<form action="about:blank"></form></style></body></html><iframe src="about:blank"></iframe>
"""

# What a browser draws: the subjects in the list from top to bottom.
VIEWER = """\
<iframe src="list.html"></iframe>
<iframe src="{page}" style="width: 100%; height: 700px"></iframe>
<script>
  onload = () => {{
    const subjects = [...frames[0].document.querySelectorAll("b")]
    subjects.sort((a, b) => a.offsetTop - b.offsetTop)
    document.body.append("Subjects: " + subjects.map((b) => b.textContent))
  }}
</script>
"""


# A snap cannot read temporary files.
@pytest.mark.skipif(not CHROMIUM or "/snap/" in CHROMIUM, reason="needs Chromium")
def test_pages_in_chromium(tmp_path: Path) -> None:
    directory = dsmtpd.PageDirectory(tmp_path)
    for subject in ("First", "Second", "Third"):
        directory.add(page_message(subject, HOSTILE_HTML))
    page = max(tmp_path.glob("2*.html"))
    (tmp_path / "viewer.html").write_text(VIEWER.format(page=page.name))
    arguments = "--headless --no-sandbox --disable-gpu --disable-background-networking".split()
    arguments += "--allow-file-access-from-files --virtual-time-budget=1000 --dump-dom".split()
    arguments += [f"--user-data-dir={tmp_path / 'profile'}"]
    arguments += [f"--print-to-pdf={tmp_path / 'viewer.pdf'}", (tmp_path / "viewer.html").as_uri()]
    result = subprocess.run([CHROMIUM, *arguments], capture_output=True, timeout=60)
    assert b"Subjects: Third,Second,First" in result.stdout
    assert b"The script has run" not in result.stdout
    # The image is drawn: the script has not removed it.
    assert re.search(rb"/Width 37\s/Height 19\s", (tmp_path / "viewer.pdf").read_bytes())


# --- AUTH, STARTTLS, CHUNKING -----------------------------------------------------------------


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


LOGIN = "AUTH PLAIN " + b64("\0user\0secret")
XOAUTH2 = b64("user=user\x01auth=Bearer secret\x01\x01")
# Lines after EHLO, and the last reply code: if any account is valid, and if only user:secret is.
LOGINS = [
    ([LOGIN], "235", "235"),
    (["AUTH PLAIN", b64("\0user\0secret")], "235", "235"),
    (["auth plain", b64("\0other\0secret")], "235", "535"),
    (["AUTH PLAIN " + b64("other\0user\0secret")], "235", "235"),
    (["AUTH PLAIN " + b64("\0user\0wrong")], "235", "535"),
    (["AUTH PLAIN " + b64("\0user\0")], "235", "535"),
    (["AUTH PLAIN " + b64("\0\0secret")], "235", "535"),
    (["AUTH PLAIN " + b64("\0\0")], "235", "535"),
    (["AUTH PLAIN " + b64("user\0secret")], "501", "501"),
    (["AUTH PLAIN " + b64("\0user\0secret\0")], "501", "501"),
    (["AUTH PLAIN ="], "501", "501"),
    (["AUTH PLAIN", ""], "501", "501"),
    (["AUTH PLAIN !!!!"], "501", "501"),
    (["AUTH PLAIN AHVzZXI"], "501", "501"),
    (["AUTH PLAIN é"], "501", "501"),
    (["AUTH PLAIN", "*"], "501", "501"),
    (["AUTH LOGIN", b64("user"), b64("secret")], "235", "235"),
    (["AUTH LoGiN " + b64("user"), b64("secret")], "235", "235"),
    (["AUTH LOGIN " + b64("user"), b64("wrong")], "235", "535"),
    (["AUTH LOGIN =", b64("secret")], "235", "535"),
    (["AUTH LOGIN", "", ""], "235", "535"),
    (["AUTH LOGIN", "*"], "501", "501"),
    (["AUTH LOGIN", b64("user"), "*"], "501", "501"),
    (["AUTH LOGIN", b64("user"), "x"], "501", "501"),
    (["AUTH LOGIN", "QUIT"], "334", "334"),
    (["AUTH LOGIN", "x" * 13_000], "500", "500"),
    (["AUTH LOGIN", "x" * 130_000, "NOOP"], "250", "250"),
    (["AUTH LOGIN", b64("x" * 9000), b64("y" * 9000)], "235", "535"),
    (["AUTH XOAUTH2 " + XOAUTH2], "235", "235"),
    (["auth xoauth2", XOAUTH2], "235", "235"),
    (["AUTH XOAUTH2", b64("user=user\x01auth=Bearer x\x01\x01")], "235", "535"),
    (["AUTH XOAUTH2", b64("user=user\x01auth=Basic secret\x01\x01")], "501", "501"),
    (["AUTH XOAUTH2", b64("user=user")], "501", "501"),
    (["AUTH XOAUTH2", ""], "501", "501"),
    (["AUTH CRAM-MD5"], "504", "504"),
    (["AUTH ="], "504", "504"),
    (["AUTH"], "501", "501"),
]


@pytest.mark.parametrize(("lines", "any_account", "one_account"), LOGINS)
def test_auth(lines: list[str], any_account: str, one_account: str) -> None:
    for auth, code in (({}, any_account), ({"user": "secret"}, one_account)):
        client = Client(auth=auth)
        assert client.codes("EHLO x", *lines).split()[-1] == code
        if code != "334":
            reply = "250" if code == "235" or not auth else "530"
            assert client.codes("MAIL FROM:<a@b>") == reply


def test_user_in_envelope() -> None:
    client = Client()
    client.deliver("", HELLO, "AUTH PLAIN " + b64("\0jürgen\0x"), *START[1:])
    assert (client.envelopes[0].user, client.envelopes[0].protocol) == ("jürgen", "ESMTPA")


def test_secrets_are_masked_in_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "dsmtpd")
    client = Client(auth={"user": "sesame"})
    secrets = [b64("\0user\0sesame"), b64("user"), b64("sesame"), b64("\0user\0sesame!")]
    client.codes("EHLO x", "NOOP visible", "XYZZY", "STARTTLS", "MAIL FROM:<a@b>")
    client.codes("AUTH LOGIN", secrets[1], secrets[3], f"AUTH CRAM-MD5 {secrets[0]}", secrets[0])
    client.codes(f" auth  plain {secrets[0]}", f"AUTH\tLOGIN {secrets[1]}", secrets[2])
    client.codes("AUTH PLAIN\t" + secrets[0], "AUTH " + secrets[1], "abc", "AUTH LOGIN", "u", "uvw")
    client.codes("AUTHPLAIN " + secrets[0], "AUTH PLAIN " + secrets[0])
    assert client.session.user == "user"
    assert not [word for word in [*secrets, "sesame", "abc", "uvw"] if word in caplog.text]
    assert "sesame" not in repr(client.session.config)
    for word in ("C: NOOP visible", "C: XYZZY", "C: STARTTLS", "C: ***", "C: AUTH PLAIN ***"):
        assert word in caplog.text


def test_session_after_starttls() -> None:
    """The user and the transaction are forgotten, and what arrived in plain text."""
    client = client_with_recipient(tls="starttls")
    assert b"250-STARTTLS\r\n" in client.send(b"EHLO x\r\n")
    client.codes(LOGIN, "MAIL FROM:<a@b>", "RCPT TO:<c@d>")
    assert client.codes("STARTTLS now", "DATA", ".") == "501 354 250"
    assert client.send(b"STARTTLS\r\nEHLO evil\r\nMAIL FROM:<a@b>\r\n") == (
        b"220 2.0.0 Ready to start TLS\r\n<StartTLS()>\r\n"
    )
    assert client.codes(LOGIN, "MAIL FROM:<a@b>", "HELO x", "DATA") == "503 503 250 503"
    assert client.session.user is None
    replies = client.send(b"EHLO x\r\n")
    assert b"STARTTLS" not in replies
    assert b"AUTH" in replies
    assert client.codes("STARTTLS", "STARTTLS x") == "503 501"
    client.deliver("", LOGIN, "MAIL FROM:<a@b>", "RCPT TO:<c@d>")
    assert client.envelopes[-1].protocol == "ESMTPSA"
    assert client.envelopes[-1].tls


def test_session_with_implicit_tls() -> None:
    client = client_with_recipient(tls="implicit")
    assert client.codes("STARTTLS", "DATA", ".") == "503 354 250"
    assert client.envelopes[0].protocol == "ESMTPS"


# Commands before TLS, with --tls required, by the code of the reply
REQUIRED = {
    "250": ["EHLO x", "HELO x", "NOOP", "RSET"],
    "214": ["HELP"],
    "221": ["QUIT"],
    "501": ["STARTTLS x"],
    "530": ["MAIL FROM:<a@b>", "RCPT TO:<a@b>", "DATA", "VRFY x", "AUTH PLAIN", "BDAT 0"],
    "502": ["EXPN x"],
    "500": ["XYZZY"],
}


def test_required_tls() -> None:
    for code, commands in REQUIRED.items():
        for command in commands:
            assert Client(tls="required").codes("EHLO x", command) == f"250 {code}", command
    client = Client(tls="required")
    assert b"AUTH" not in client.send(b"EHLO x\r\n")
    assert client.send(b"BDAT 6\r\nQUIT\r\nNOOP\r\n") == (
        b"530 5.7.0 Must issue a STARTTLS command first\r\n250 2.0.0 OK\r\n"
    )
    client.send(b"STARTTLS\r\n")
    assert b"AUTH PLAIN" in client.send(b"EHLO x\r\n")
    client.deliver()
    assert client.envelopes[0].protocol == "ESMTPS"


def test_login_without_tls() -> None:
    """A warning where TLS is offered, since a real server refuses it."""
    for tls, upgrade, names in [
        (None, [], []),
        ("starttls", [], ["plaintext-auth"]),
        ("starttls", ["STARTTLS", HELLO], []),
        ("implicit", [], []),
    ]:
        client = Client(tls=tls)
        client.codes(HELLO, *upgrade, LOGIN)
        for _ in range(2):
            assert client.deliver(CLEAN, "MAIL FROM:<a@b>", "RCPT TO:<c@d>") == names


def test_commands_that_require_a_login() -> None:
    for line in ("MAIL FROM:<a@b>", "RCPT TO:<a@b>", "DATA", "VRFY x", "BDAT 0"):
        client = Client(auth={"user": "secret"})
        assert client.codes(HELLO, line) == "250 530"
        assert not client.codes(LOGIN, line).endswith("530")
    client = Client(auth={"user": "secret"})
    assert client.codes(HELLO, "BDAT 6", "QUIT", "NOOP") == "250 - 530 250"


# Keyword, what is sent, and the codes of the replies.
WITHOUT: list[tuple[str, list[str], str]] = [
    ("SIZE", ["MAIL FROM:<a@b> SIZE=1", "MAIL FROM:<a@b>"], "555 250"),
    ("8BITMIME", ["MAIL FROM:<a@b> BODY=8BITMIME", "MAIL FROM:<a@b>"], "555 250"),
    ("SMTPUTF8", ["MAIL FROM:<a@b> SMTPUTF8", "MAIL FROM:<\u00e9@b>"], "555 553"),
    ("CHUNKING", ["BDAT 4 LAST", "QUIT"], "502 221"),
    (
        "DSN",
        ["MAIL FROM:<a@b> RET=FULL", "MAIL FROM:<a@b>", "RCPT TO:<c@d> NOTIFY=NEVER"],
        "555 250 555",
    ),
    ("HELP", ["HELP"], "502"),
    ("STARTTLS", ["STARTTLS"], "502"),
    ("AUTH", ["AUTH PLAIN", "MAIL FROM:<a@b> AUTH=<>"], "502 555"),
]


@pytest.mark.parametrize(("keyword", "lines", "codes"), WITHOUT)
def test_without_extension(keyword: str, lines: list[str], codes: str) -> None:
    client = Client(without=[keyword.lower()], tls="starttls")
    assert keyword.encode() not in client.send(b"EHLO x\r\n")
    assert client.codes(*lines) == codes
    assert keyword.encode() in Client(tls="starttls").send(b"EHLO x\r\n")


def test_without_enhanced_status_codes(caplog: pytest.LogCaptureFixture) -> None:
    client = Client(without=["ENHANCEDSTATUSCODES"])
    client.send(b"EHLO x\r\n")
    assert client.send(b"NOOP\r\nXYZZY\r\n") == b"250 OK\r\n500 Command not recognized\r\n"
    assert caplog.messages[0].endswith("XYZZY refused: 500 Command not recognized")
    assert client.session.end(dsmtpd.TIMED_OUT) == b"421 Idle timeout\r\n"
    assert Client().session.end(dsmtpd.TIMED_OUT) == b"421 4.4.2 Idle timeout\r\n"


@pytest.mark.parametrize(
    ("address", "names"),
    [
        ("root@container_name_1", ["address-syntax"]),
        ("a@_b.test", ["address-syntax"]),
        ("under_score@b.test", []),
        ("under_score", []),
    ],
)
def test_underscores_in_domains(address: str, names: list[str]) -> None:
    sender = f"MAIL FROM:<{address}>"
    assert Client().deliver(CLEAN, HELLO, sender, "RCPT TO:<c@d>") == names
    assert Client().deliver(CLEAN, HELLO, "MAIL FROM:<a@b>", f"RCPT TO:<{address}>") == names
    reset = [HELLO, sender, "RSET", "MAIL FROM:<a@b>", "RCPT TO:<c@d>"]
    assert Client().deliver(CLEAN, *reset) == []


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_bdat_content_is_unchanged(size: int) -> None:
    binary = bytes(range(256)) + b"\r\n.\r\n..\r\n\n.\n"
    client = client_with_recipient()
    data = b"BDAT %d\r\n%bBDAT 0\r\nBDAT 1\r\n.NOOP\r\nBDAT 3 LAST\r\nabcQUIT\r\n"
    replies = client.send_in_pieces(data % (len(binary), binary), size)
    assert [line[:3] for line in replies.splitlines()] == [b"250"] * 5 + [b"221"]
    assert client.envelopes[0].content == binary + b".abc"


def test_bdat_chunks_share_size_limit() -> None:
    client = client_with_recipient(max_size=10)
    assert client.send(b"BDAT 6\r\n123456BDAT 5\r\nQUIT\nBDAT 4 LAST\r\nNOOPNOOP\r\n") == (
        b"250 2.0.0 OK\r\n"
        b"552 5.3.4 Message exceeds the maximum size\r\n"
        b"503 5.5.1 Send MAIL and RCPT first\r\n"
        b"250 2.0.0 OK\r\n"
    )
    client = client_with_recipient(max_size=10)
    assert client.send(b"BDAT 6\r\n123456BDAT 4 LAST\r\n7890").endswith(b"Message accepted\r\n")


@pytest.mark.parametrize(
    ("argument", "codes"),
    [
        *((argument, "501 221") for argument in ("", "-1", "x", "9" * 21)),
        (" 6", "- 250"),
        # The octets of a chunk with an invalid argument are discarded before the reply.
        *((argument, "- 501") for argument in ("6 2", "6LAST", "6 LAST x", "6\tLAST")),
        ("0" * 30 + "6 l\u017fst", "- 501"),
    ],
)
def test_bdat_syntax(argument: str, codes: str) -> None:
    client = client_with_recipient()
    assert client.codes(f"BDAT {argument}", "QUIT") == codes


# --- Limits -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "expected"), [(98, b"250"), (99, b"552 5.3.4"), (300_000, b"552 5.3.4")]
)
def test_message_size(size: int, expected: bytes) -> None:
    """The rest of a message that is too large is not parsed as commands."""
    client = client_with_recipient(max_size=100)
    assert client.codes("DATA") == "354"
    reply = client.send_in_pieces(b".." + b"x" * (size - 1) + b"\r\n.\r\nNOOP\r\n", 90)
    assert reply.startswith(expected)
    assert reply.endswith(b"250 2.0.0 OK\r\n")
    assert len(client.envelopes) == (expected == b"250")
    client = client_with_recipient(max_size=10)
    assert client.codes("DATA", *["QUIT"] * 100, ".", "NOOP") == "354 " + "- " * 100 + "552 250"


def test_no_size_limit() -> None:
    client = Client(max_size=0)
    assert b"250-SIZE 0\r\n" in client.send(b"EHLO x\r\n")
    assert client.codes("MAIL FROM:<a@b> SIZE=99999999999999999999") == "250"


def test_recipient_limit() -> None:
    client = Client()
    client.codes("EHLO x", "MAIL FROM:<a@b>")
    replies = client.send(b"".join(b"RCPT TO:<u%d@x>\r\n" % n for n in range(1001))).splitlines()
    assert set(replies[:1000]) == {b"250 2.1.5 Recipient OK"}
    assert replies[1000].startswith(b"452 4.5.3")
    client.codes("DATA", ".")
    assert client.envelopes[0].rcpt_tos == [f"u{n}@x" for n in range(1000)]


def test_consecutive_errors() -> None:
    """Replies of rules neither count as errors nor end a row of them."""
    assert Client().codes(*["XYZZY"] * 20, "NOOP") == "500 " * 20 + "250"
    assert Client().codes(*["XYZZY"] * 21, "NOOP") == "500 " * 20 + "421 -"
    client = Client(fail=["NOOP * 550"])
    assert client.codes(*["XYZZY", "NOOP"] * 21) == "500 550 " * 20 + "421 -"
    assert Client(fail=["NOOP * 500"]).codes(*["NOOP"] * 40) == " ".join(["500"] * 40)


@pytest.mark.parametrize("size", [1, 1000, 100_000])
def test_long_line(size: int) -> None:
    data = b"NOOP " + b"x" * (12_288 - 7) + b"\r\nNOOP " + b"x" * (12_288 - 6) + b"\r\nNOOP\r\n"
    replies = Client().send_in_pieces(data, size)
    assert replies == b"250 2.0.0 OK\r\n500 5.5.2 Line too long\r\n250 2.0.0 OK\r\n"


def test_memory_of_endless_line() -> None:
    client = Client()
    chunk = b"x" * dsmtpd.READ_SIZE
    tracemalloc.start()
    try:
        for _ in range(2**26 // len(chunk)):
            client.send(chunk)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert client.codes("", "NOOP") == "500 250"


def test_memory_of_large_message() -> None:
    for max_size, copies in ((2**23, 3.5), (2**16, 0.1)):
        client = client_with_recipient(max_size=max_size)
        client.codes("DATA")
        chunk = (b"x" * 1022 + b"\r\n") * 64
        tracemalloc.start()
        try:
            for _ in range(2**23 // len(chunk)):
                client.send(chunk)
            client.send(b".\r\n")
            assert tracemalloc.get_traced_memory()[1] < copies * 2**23
        finally:
            tracemalloc.stop()
        assert len(client.envelopes) == (max_size == 2**23)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"port": 70_000}, "port: must be from 0"),
        ({"port": -1}, "port: must be from 0"),
        ({"port": "25"}, "port: must be from 0 (any free one) to 65535, not '25'"),
        ({"max_size": -1}, "max-size: must be a number of bytes, such as 33554432, or 0 for no"),
        ({"max_size": 1.5}, "max-size: must be a number of bytes"),
        ({"interface": " "}, "127.0.0.1"),
        ({"tls": "ssl"}, "tls: must be one of starttls, required, implicit, not ssl"),
        ({"cert": "x.pem"}, "cert: requires tls"),
        ({"tls": "starttls", "key": "x.pem"}, "key: requires cert"),
        ({"tls": "required", "without": ["starttls"]}, "without: tls=required needs STARTTLS"),
        ({"auth": {"u": "p"}, "without": ["AUTH"]}, "without: auth needs AUTH"),
        ({"without": ["x"]}, "without: must be one of SIZE, 8BITMIME, "),
        ({"ignore": ["typo"]}, "ignore: must be one of bare-lf, bare-cr, "),
        ({"fail": "RCPT * 550"}, "fail: must be a list of strings, not 'RCPT * 550'"),
        ({"auth": ["u:p"]}, "auth: must be a dictionary {user: password}"),
        ({"handler": 5}, "handler: must be callable, not 5"),
        ({"fial": []}, "unknown option 'fial'; the options are interface, port, directory"),
    ],
)
def test_invalid_options(options: dict[str, Any], text: str) -> None:
    for use in (lambda: dsmtpd.Server(**options), lambda: dsmtpd.capture(**options).__enter__()):
        with pytest.raises((TypeError, ValueError), match=re.escape(text)) as caught:
            use()
        assert len(str(caught.value).splitlines()) == 1


def test_config_is_hashable() -> None:
    configs = {Config(fail=["RCPT * 550"], auth={"u": "p"}), Config(fail=["RCPT * 550"])}
    assert Config(fail=("RCPT * 550",)) in configs


def test_typed_options() -> None:
    """Type checkers see the fields of Config with their types."""
    classes = {
        node.name: {
            item.target.id: ast.unparse(item.annotation)
            for item in node.body
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
        }
        for node in ast.walk(ast.parse(SCRIPT.read_text("utf-8")))
        if isinstance(node, ast.ClassDef)
    }
    assert classes["Options"] == classes["Config"]


@pytest.mark.parametrize("code", [(250, "2.0.0"), (550, "4.0.0"), (550, ""), (600, "6.0.0")])
def test_smtp_error_requires_error_code(code: tuple[int, str]) -> None:
    with pytest.raises(ValueError, match="not an error code"):
        SMTPError(*code, "text")


def test_reply_with_line_breaks() -> None:
    assert SMTPError(550, "5.7.1", "no\r\n250 yes é").reply.encoded == b"550 5.7.1 no 250 yes ?\r\n"
    assert Reply(250, "2.0.0", "a\nb").encoded == b"250-2.0.0 a\r\n250 2.0.0 b\r\n"


# --- Random input -------------------------------------------------------------------------

TOKENS = [line.split()[0].encode() for line in MATRIX.strip().splitlines()[1:]] + [
    b" ", b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r", b".", b"\x00", b"\xff", b"\xc3\xa9",
    b"\r\n.\r\n", b" FROM:<a@b>", b" TO:<c@d>", b"EHLO x\r\n", b"MAIL FROM:<a@b>\r\n",
    b"BDAT 9\r\n", b"BDAT 3 LAST\r\n", b"BDAT 99999999999\r\n", b"AUTH LOGIN\r\n", b"dXNlcg==\r\n",
    b"STARTTLS\r\n", b"RCPT TO:<c@d>\r\n", b"DATA\r\n", b'<"', b" SIZE=1", b" SMTPUTF8",
    b"x" * 13_000,
]  # fmt: skip
REPLIES = re.compile(rb"(?:(?:[2-5]\d\d-[ -~]*\r\n)*[2-5]\d\d [ -~]*\r\n)*")


# A longer run: DSMTPD_FUZZ=10000 python -m pytest -k random_input
@pytest.mark.parametrize("seed", range(int(os.environ.get("DSMTPD_FUZZ", "50"))))
def test_random_input(seed: int) -> None:
    """The replies are well-formed and do not depend on how the input is split.

    The comparison excludes STARTTLS, because the server discards input that is pipelined after it.
    """
    generator = random.Random(seed)
    options: dict[str, Any] = {"max_size": 20_000, "tls": generator.choice([None, "implicit"])}
    data = b"".join(generator.choices(TOKENS, k=200))
    whole, split = Client(**options), Client(**options)
    replies = whole.send(data)
    assert REPLIES.fullmatch(replies)
    replies_to_pieces = b""
    remaining = data
    while remaining:
        size = generator.randint(1, generator.choice([2, 400]))
        replies_to_pieces += split.send(remaining[:size])
        remaining = remaining[size:]
    assert replies_to_pieces == replies
    assert without_early_talker(split) == without_early_talker(whole)
    assert REPLIES.fullmatch(Client(tls="starttls").send(data).replace(b"<StartTLS()>\r\n", b""))


# --- Scripted failures ----------------------------------------------------------------------

MESSAGE = ["MAIL FROM:<app@x.test>", "RCPT TO:<you@y.test>", "DATA", "Subject: An Invoice", "."]
# Rules, lines of the client, and reply codes.
FAILURES: list[tuple[list[str], list[str], str]] = [
    (["RCPT *@bounce.test 550 5.1.1 No such user"], MESSAGE[:2], "250 250"),
    (["RCPT *@Y.test 550 5.1.1 No such user"], MESSAGE[:2], "250 550"),
    (["RCPT * x1 451 4.7.1 Greylisted"], [*MESSAGE[:2], *MESSAGE[1:]], "250 451 250 354 - 250"),
    (["mail app@* x2 450"], [*MESSAGE[:1] * 3], "450 450 250"),
    ([". *invoice* 554 5.6.0 Refused"], [*MESSAGE, "NOOP", "DATA"], "250 250 354 - 554 250 503"),
    ([". *receipt* 554 5.6.0 Refused"], MESSAGE, "250 250 354 - 250"),
    (["DATA * 451", "DATA * 552"], [*MESSAGE[:3], "RSET", "."], "250 250 451 250 500"),
    (["DATA * x1 451", "DATA * 452"], [*MESSAGE[:3], "DATA"], "250 250 451 452"),
    (["EHLO * 502"], ["EHLO x", "HELO x"], "502 250"),
    (["HELO * 550"], ["HELO x"], "550"),
    (["EHLO *.test 550"], ["EHLO x", "EHLO a.test"], "250 550"),
    (["STARTTLS * 454 4.7.0 TLS not available"], ["STARTTLS", "NOOP"], "454 250"),
    (["AUTH login* 535 5.7.8"], ["AUTH LOGIN", "AUTH PLAIN", "*"], "535 334 501"),
    (["BDAT * x1 452"], [*MESSAGE[:2], "BDAT 4", "QU", MESSAGE[0]], "250 250 - 452 250"),
    (["BDAT * 452"], [*MESSAGE[:2], "BDAT 2 LAST\r\n", "NOOP"], "250 250 452 250"),
    ([". * 451"], [*MESSAGE[:2], "BDAT 0 LAST", "NOOP"], "250 250 451 250"),
    (["RSET * 421"], ["RSET", "NOOP"], "421 -"),
    (["NOOP now 450"], ["NOOP", "NOOP now"], "250 450"),
    (["VRFY root 550"], ["VRFY you", "VRFY root"], "252 550"),
    (["QUIT * 450"], ["QUIT", "NOOP"], "450 250"),
    (["HELP * 500"], ["HELP", "NOOP"], "500 250"),
    (["MAIL * x2 ok", "MAIL * 421 4.7.0"], ["MAIL F", "MAIL", *MESSAGE[:1]], "501 501 421"),
    (["NOOP * 550 5.7.1 Go drop it"], ["NOOP", "NOOP"], "550 550"),
    ([" noop  * X1  450  4.7.0  Later "], ["NOOP", "NOOP"], "450 250"),
]


@pytest.mark.parametrize(("rules", "lines", "codes"), FAILURES)
def test_rules(rules: list[str], lines: list[str], codes: str) -> None:
    client = Client(fail=rules, tls="starttls")
    if not lines[0].endswith(("HELO x", "EHLO x")):
        client.codes("EHLO x")
    assert client.codes(*lines) == codes
    assert len(client.envelopes) == (codes.endswith("354 - 250"))


@pytest.mark.parametrize("verb", dsmtpd.RULE_VERBS)
def test_drop_and_delay_for_each_verb(verb: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "dsmtpd")
    data = b"HELO x\r\nEHLO x\r\nNOOP\r\nVRFY x\r\nHELP\r\nAUTH PLAIN AHUAcA==\r\n"
    data += b"MAIL FROM:<a@b>\r\nRSET\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nBDAT 1\r\nxRSET\r\n"
    data += b"MAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n.\r\nSTARTTLS x\r\nQUIT\r\n"
    normal = Client()
    expected = normal.greeting + normal.send(data)
    delayed = Client(fail=[f"{verb} * delay 1.5", f"{verb} * x1 delay 2"])
    replies = delayed.greeting + delayed.send(data)
    first, *rest = replies.split(b"<Delay(seconds=1.5)>\r\n")
    assert rest
    assert replies.count(b"<Delay(seconds=2.0)>\r\n") == 1
    assert re.sub(rb"<Delay.*>\r\n", b"", replies) == expected
    assert f"rule {verb} * delay 1.5" in caplog.text
    dropped = Client(fail=[f"{verb} * drop"])
    replies = dropped.greeting + dropped.send(data)
    assert replies == first + b"<Close()>\r\n"


@pytest.mark.parametrize(
    ("rule", "reply"),
    [
        ("NOOP * 421 4.7.0 Bye drop", b"421 4.7.0 Bye\r\n"),
        ("NOOP * 554 drop", b"554 5.0.0 Scripted failure\r\n<Close()>\r\n"),
        ("NOOP * 554 5.7.1 drop", b"554 5.7.1 Scripted failure\r\n<Close()>\r\n"),
        ("NOOP * 554 Go away DROP", b"554 5.0.0 Go away\r\n<Close()>\r\n"),
    ],
)
def test_rule_that_replies_and_drops(rule: str, reply: bytes) -> None:
    assert Client(fail=[rule]).send(b"NOOP\r\n").startswith(reply)


@pytest.mark.parametrize("size", [1, 1000, 100_000])
def test_rejecting_greeting(size: int) -> None:
    client = Client(fail=["CONNECT 127.0.0.1 554 5.7.1 Go away"])
    assert client.greeting == b"554 5.7.1 Go away\r\n"
    lines = ["EHLO x", "MAIL FROM:<a@b>", "NOOP " + "x" * 20_000, "NOOP", "QUIT", "QUIT"]
    replies = client.send_in_pieces("\r\n".join([*lines, ""]).encode(), size)
    assert [line[:3] for line in replies.splitlines()] == [b"503", b"503", b"500", b"503", b"221"]
    assert Client(fail=["CONNECT 127.0.0.2 554"]).greeting.startswith(b"220")


@pytest.mark.parametrize(
    ("rule", "error"),
    [
        ("", "rule '': it must begin with one of CONNECT EHLO HELO"),
        ("RCTP * 550", "rule 'RCTP * 550': it must begin with one of CONNECT EHLO HELO"),
        ("EXPN * 550", "it must begin with one of CONNECT EHLO HELO"),
        ("DATA *invoice* 550", "the pattern *invoice* can never match: DATA has no argument"),
        ("quit now 550", "the pattern now can never match: QUIT has no argument"),
        ("CONNECT localhost 450", "the pattern localhost can never match: CONNECT has the address"),
        ("RCPT <a@b> 450", "the pattern <a@b> can never match: RCPT has an address without"),
        ("RCPT", "rule 'RCPT': incomplete; write it in quotes, such as 'RCPT * 550'"),
        ("RCPT *", "expected a code from 400 to 599 [x.y.z] [text] [drop], delay SECONDS, drop or"),
        ("RCPT 550", "the pattern is missing, as in 'RCPT * 550'"),
        ("RCPT * x0 550", "drop or ok, not x0 550"),
        ("RCPT * 250 OK", "drop or ok, not 250 OK"),
        ("RCPT * 550 4.1.1 text", "not an error code with its enhanced status code: 550 4.1.1"),
        ("RCPT * delay", "drop or ok, not delay"),
        ("RCPT * delay soon", "drop or ok, not delay soon"),
        ("RCPT * drop it", "drop or ok, not drop it"),
        ("RCPT * x2", "drop or ok, not nothing"),
    ],
)
def test_invalid_rule(rule: str, error: str) -> None:
    with pytest.raises(ValueError, match=re.escape(error)):
        dsmtpd.parse_rule(rule)


def test_rule_counts_are_shared_and_delays_are_not() -> None:
    rules = ["RCPT * x1 450", "NOOP * delay 0.1", "NOOP slow delay 60", "VRFY * drop"]

    async def scenario(server: Server, connect: Connect) -> None:
        slow, fast = await connect(), await connect()
        for peer in (slow, fast):
            await peer.exchange("EHLO x")
            await peer.exchange("MAIL FROM:<a@b>")
        assert (await slow.exchange("RCPT TO:<c@d>")).startswith("450 4.0.0 Scripted failure")
        assert (await fast.exchange("RCPT TO:<c@d>")).startswith("250")
        waiting = asyncio.create_task(slow.exchange("NOOP"))
        assert (await fast.exchange("RSET")).startswith("250")
        assert not waiting.done()
        assert (await waiting).startswith("250")
        fast.writer.write(b"RSET\r\nVRFY x\r\n")
        assert (await fast.reply()).startswith("250")
        assert await fast.reply() == ""
        slow.writer.write(b"NOOP slow\r\n")
        await slow.writer.drain()
        closing = asyncio.create_task(server.close())
        assert await slow.reply() in ("250 2.0.0 OK", "421 4.3.2 Shutting down")
        await closing

    serve(scenario, fail=rules)


# --- Warnings -------------------------------------------------------------------------------

# Parameters of MAIL, content, and names of the warnings.
LINT: list[tuple[str, str, str]] = [
    ("", CLEAN + "\r\nText\r\n", ""),
    ("", CLEAN, ""),
    ("", "", "missing-date missing-from missing-message-id"),
    ("", "\r\n" + CLEAN, "missing-date missing-from missing-message-id"),
    ("", "from : a\r\nDATE:\r\nmessage-id:x\r\n\r\n", ""),
    ("", "X: y\r\n Date: folded\r\nFrom: a\r\nMessage-ID: <b>\r\n", "missing-date"),
    ("", CLEAN + "\r\nText\nmore\r\n", "bare-lf"),
    ("", CLEAN.replace("\r\n", "\n") + "\nText\n", "bare-lf"),
    ("", CLEAN + "\r\nText\rmore\r\n", "bare-cr"),
    ("", CLEAN + "\r\n" + "x" * 998 + "\r\n" + "y" * 998 + "\r\n", ""),
    ("", CLEAN + "\r\n" + "x" * 999 + "\r\n", "long-line"),
    ("", CLEAN + "\r\nx\r\n" + "x" * 1001, "long-line"),
    ("", CLEAN + "\r\n" + "x\r\n" * 5000 + "x" * 1000 + "\r\nx\r\n", "long-line"),
    ("", CLEAN + "\r\né\r\n", ""),
    ("BODY=7BIT", CLEAN + "\r\né\r\n", ""),
    ("BODY=8BITMIME", CLEAN + "\r\né\r\n", ""),
    ("BODY=8BITMIME", CLEAN + "Subject: é\r\n\r\né\r\n", "utf8-header"),
    ("BODY=8BITMIME SMTPUTF8", CLEAN + "Subject: é\r\n\r\né\r\n", ""),
    ("", CLEAN + "Bcc: <hidden@x>\r\n\r\n", "bcc-header"),
    ("", CLEAN + "bcc: a\r\nBCC: b\r\n", "duplicate-field bcc-header"),
    ("", CLEAN + "To: a\r\nTo: b\r\nX: 1\r\nX: 2\r\n\r\nTo: c\r\n", "duplicate-field"),
    ("", CLEAN + "Subject: a\r\nsubject: b\r\n\r\n", "duplicate-field"),
    ("", "X-Tag : a\r\n" + CLEAN + "To : a\r\nTo\t: b\r\n\r\n", "duplicate-field"),
    ("", (CLEAN + "\r\nTo: a\r\nTo: b\r\n").replace("\r\n", "\r\r\n"), "bare-cr"),
    ("", "é is text\r\n" + CLEAN, "missing-date missing-from missing-message-id"),
]


@pytest.mark.parametrize(("parameters", "content", "names"), LINT)
def test_lint(parameters: str, content: str, names: str) -> None:
    for strict in (False, True):
        client = Client(strict=strict)
        client.codes("EHLO x", f"MAIL FROM:<a@b> {parameters}", "RCPT TO:<c@d>")
        data = content.encode()
        reply = client.send(b"BDAT %d LAST\r\n%b" % (len(data), data)).decode()
        if strict and names:
            assert reply.startswith(f"554 5.6.0 {names.split()[0]}: ")
            assert client.envelopes == []
        else:
            assert reply.startswith("250")
            warnings = client.envelopes[0].warnings
            assert [warning.partition(":")[0] for warning in warnings] == names.split()
            assert all(re.search(r" \(RFC \d+ section [\d.]+\)$", warning) for warning in warnings)


def test_lint_of_command_lines() -> None:
    ehlo, mail = b"EHLO x\r\n", b"MAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\n"
    data, content = b"DATA\r\n", CLEAN.encode() + b".\r\n"
    early = "early-talker: data was sent before the reply to {} (RFC 2920 section 3.1)"
    bare_lf = "bare-lf: LF without CR after a command (RFC 5321 section 2.3.8)"
    for without, chunks, warnings in [
        ([], [ehlo, mail + data, content], []),
        ([], [ehlo, mail + b"BDAT %d LAST\r\n%b" % (len(CLEAN), CLEAN.encode())], []),
        ([], [ehlo + mail, data, content], [early.format("EHLO")]),
        ([], [b"HELO x\r\n" + mail, data, content], [early.format("HELO")]),
        ([], [ehlo, mail + data + content], [early.format("DATA")]),
        ([], [ehlo, b"RSET\n", mail + data, content], [bare_lf]),
        (["PIPELINING"], [ehlo, mail, data, content], [early.format("MAIL")]),
    ]:
        client = Client(without=without)
        for chunk in chunks:
            client.send(chunk)
        assert client.envelopes[0].warnings == warnings, chunks


def test_lint_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    ignored = client_with_recipient(ignore=["missing-date", "missing-message-id"], strict=True)
    assert ignored.codes("DATA", "From: a", ".") == "354 - 250"
    assert ignored.envelopes[0].warnings == []
    client_with_recipient().codes("DATA", *CLEAN.split("\r\n")[:2], ".")
    text = "127.0.0.1:54321: missing-message-id: no Message-ID field (RFC 5322 section 3.6.4)"
    assert caplog.record_tuples == [("dsmtpd", logging.WARNING, text)]


# --- Refusals in the log ----------------------------------------------------------------------

START = [HELLO, "MAIL FROM:<a@b>", "RCPT TO:<c@d>"]
ACCOUNT = {"auth": {"u": "p"}}
REFUSALS: list[tuple[dict[str, Any], list[str], str]] = [
    ({}, [HELLO, "MAIL FROM:a@b"], "MAIL FROM:a@b refused: 501 5.5.4 Syntax: MAIL FROM:<address>"),
    ({}, ["MAIL FROM:<a@b>"], "MAIL FROM:<a@b> refused: 503 5.5.1 Send EHLO or HELO first"),
    ({}, ["expn  x"], "EXPN  x refused: 502 5.5.1 Command not implemented"),
    ({}, ["x\x1by\x00"], "x\\x1by\\x00 refused: 500 5.5.2 Command not recognized"),
    ({}, ["."], ". refused: 500 5.5.2 Command not recognized"),
    ({}, [""], "empty line refused: 500 5.5.2 Command not recognized"),
    ({}, ["NOOP", "X" * 20_000], "(line of over 12288 octets) refused: 500 5.5.2 Line too long"),
    ({}, ["STARTTLS"], "STARTTLS refused: 502 5.5.1 TLS is not available (see --tls)"),
    ({}, ["GET / HTTP/1.1"], "GET / HTTP/1.1 refused: 421 4.7.0 HTTP request refused"),
    ({"fail": ["RCPT * 550 5.1.1 No"]}, START, "RCPT TO:<c@d> refused: 550 5.1.1 No"),
    ({"fail": ["CONNECT * 554 5.7.1 No"]}, [], "CONNECT 127.0.0.1 refused: 554 5.7.1 No"),
    (
        {"max_size": 5},
        [*START, "DATA", "123456", "."],
        "DATA refused: 552 5.3.4 Message exceeds the maximum size",
    ),
    (
        {"strict": True},
        [*START, "DATA", "Subject: Hi", "."],
        "message a@b -> c@d [Hi] refused: 554 5.6.0"
        " missing-date: no Date field (RFC 5322 section 3.6.1)",
    ),
    (ACCOUNT, START[:2], "MAIL FROM:<a@b> refused: 530 5.7.0 Authentication required"),
    (
        ACCOUNT,
        [HELLO, "AUTH PLAIN " + b64("\0\x1bob\0pass")],
        "AUTH PLAIN *** refused: 535 5.7.8 Authentication failed (user '\\x1bob': unknown user)",
    ),
    (
        ACCOUNT,
        [HELLO, "AUTH LOGIN", "dQ==", "cGFzcw=="],
        "AUTH LOGIN refused: 535 5.7.8 Authentication failed (user 'u': wrong password)",
    ),
    *(
        ({}, [HELLO, line], "AUTH *** refused: 504 5.5.4 Unknown authentication mechanism")
        for line in ("AUTH XYZ", "AUTH CRAM-MD5", "AUTH hunter2", "AUTH c2VjcmV0")
    ),
]


@pytest.mark.parametrize(("options", "lines", "text"), REFUSALS)
def test_refusal_is_logged(
    options: dict[str, Any], lines: list[str], text: str, caplog: pytest.LogCaptureFixture
) -> None:
    Client(**options).codes(*lines)
    assert [text for text in caplog.messages if "refused" in text] == [f"127.0.0.1:54321: {text}"]


def test_refusals() -> None:
    """They have the verb in upper case, as rules do, and no secrets."""
    refusals: list[dsmtpd.Refusal] = []
    session = dsmtpd.Session(Config(), "[::1]:25", on_refusal=refusals.append)
    lines = ["x: y", ".", "", "expn  x", HELLO, "AUTH x y", "dXNlcg=="]
    for _ in session.receive("\r\n".join([*lines, ""]).encode(), NOW.timestamp()):
        pass
    assert [(item.verb, item.argument, item.reply.code) for item in refusals] == [
        ("", "x: y", 500),
        ("", ".", 500),
        ("", "", 500),
        ("EXPN", " x", 502),
        ("AUTH", "***", 504),
        ("", "***", 500),
    ]
    assert {(item.peer, item.time) for item in refusals} == {("[::1]:25", NOW)}


def test_log_of_control_characters(caplog: pytest.LogCaptureFixture) -> None:
    """Text from a client cannot control the terminal."""
    caplog.set_level("DEBUG", "dsmtpd")
    client = Client(strict=True)
    evil = "\x1b[31m red \x9b\u202e"
    client.codes(f"EHLO {evil}", f"NOOP {evil}", HELLO, f'MAIL FROM:<"{evil}"@x>')
    client.codes("MAIL FROM:<a@b>", "RCPT TO:<c@d>", "DATA", f"Subject: {evil}\n\nforged", ".")
    assert "\\x1b[31m red" in caplog.text
    assert all(text.isprintable() for text in caplog.messages)


def test_hint_at_tls(caplog: pytest.LogCaptureFixture) -> None:
    """It says why a client that has read what a server without TLS offers may have left."""
    caplog.set_level("INFO", "dsmtpd")
    hint = "127.0.0.1:54321: Closed without a message; if the client requires TLS, use --tls"
    for tls, lines, is_hinted in [
        (None, [HELLO], True),
        (None, [HELLO, "QUIT"], True),
        (None, ["HELO x", "STARTTLS"], True),
        (None, [], False),
        (None, ["QUIT"], False),
        (None, [HELLO, "NOOP"], False),
        (None, [HELLO, "XYZZY"], False),
        (None, [*START, "DATA", ".", "QUIT"], False),
        ("starttls", [HELLO], False),
    ]:
        client = Client(tls=tls)
        client.codes(*lines)
        client.session.end()
        assert (hint in caplog.messages) is is_hinted, lines
        caplog.clear()


def test_tls_client_on_a_plain_port(caplog: pytest.LogCaptureFixture) -> None:
    client = Client()
    assert client.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03") == b"<Close()>\r\n"
    assert caplog.messages == [
        "127.0.0.1:54321: TLS on a plain connection; use --tls implicit, or STARTTLS in the client"
    ]
    assert client.send(b"MAIL FROM:<a@b>\r\n") == b""


# --- Storage ------------------------------------------------------------------------------


def envelope(**changes: Any) -> Envelope:
    client = client_with_recipient()
    client.codes("DATA", "Subject: Hi", "", "Text", ".")
    return dataclasses.replace(client.envelopes[0], **changes)


def test_trace_header() -> None:
    changes = {"rcpt_tos": ["b@y.test", "c@z.test"], "helo": "app);X-Bad:1 é"}
    text = dsmtpd.trace_header(envelope(**changes), "KEY").decode()
    assert text == (
        "Return-Path: <a@x.test>\n"
        "X-Peer: 127.0.0.1:54321\n"
        "X-MailFrom: a@x.test\n"
        "X-RcptTo: b@y.test, c@z.test\n"
        f"Received: from app??X-Bad:1?? (127.0.0.1) by {dsmtpd.HOSTNAME}"
        f" (dsmtpd {dsmtpd.__version__}) with ESMTP id KEY; Sat, 21 Nov 2026 12:00:00 +0000\n"
    )


def runs_of_spaces(seed: int) -> str:
    """Return an address with words and runs of spaces of lengths near that of a folded line."""
    generator = random.Random(seed)
    runs = [character * generator.choice([1, 2, 99, 188, 240, 300]) for character in "a b c d e"]
    return f'"{"".join(runs)}"@y'


@pytest.mark.parametrize(
    "rcpt_tos",
    [
        ["b@y"],
        ["é@x", "用户@例子.广告"],
        [f"user{n}@example.test" for n in range(1000)],
        [f"ü{n}@example.test" for n in range(1000)],
        ["x" * 12_000 + "@y"],
        ['"' + "a b  " * 1000 + '"@y'],
        ['"' + " " * 3000 + '"@y'],
        ['"' + "a" * 188 + " " * 99 + "b" * 300 + '"@y'],
        ["=?utf-8?q?no?=@y"],
        ["😀" * 500 + "@y"],
        *([runs_of_spaces(seed)] * (1 + seed % 3) for seed in range(30)),
    ],
)
def test_trace_header_contains_every_address(rcpt_tos: list[str]) -> None:
    """No line consists of spaces: some readers would end the header section there."""
    changes = {"mail_from": rcpt_tos[0], "rcpt_tos": rcpt_tos, "helo": "h" * 12_000}
    data = dsmtpd.trace_header(envelope(**changes), "KEY")
    assert max(map(len, data.splitlines())) < 998
    assert all(line.strip() for line in data.splitlines())
    message = email.message_from_bytes(data + b"X-Last: 1\n\n")
    assert message.keys() == "Return-Path X-Peer X-MailFrom X-RcptTo Received X-Last".split()
    unfolded = re.sub(r"\n(?= )", "", message["X-RcptTo"])
    ((decoded, charset),) = email.header.decode_header(unfolded)
    decoded = decoded.decode(charset or "ascii") if isinstance(decoded, bytes) else decoded
    assert decoded == ", ".join(rcpt_tos)


@pytest.mark.parametrize(
    ("content", "stored"),
    [
        (b"", b"\n"),
        (b"\r\n", b"\n"),
        (b"Subject: Hi", b"Subject: Hi\n\n"),
        (b"Subject: Hi\r\n", b"Subject: Hi\n\n"),
        (b"Subject: Hi\r\n\r\n", b"Subject: Hi\n\n"),
        (b"Subject: Hi\r\n\r\nText", b"Subject: Hi\n\nText"),
        (b"Hello!\r\n", b"\nHello!\n"),
        (b" folded\r\nText", b"\n folded\nText"),
        (b"From me\r\nX: y\r\n\r\n", b"From me\nX: y\n\n"),
        (b"\r\nText", b"\nText"),
        (b"A: b\r\n\r\n\xff \r \n \x00\r\n\r\r\nend", b"A: b\n\n\xff \r \n \x00\n\r\nend"),
    ],
)
def test_stored_content(content: bytes, stored: bytes) -> None:
    """The header section ends with an empty line, and content is never a part of our fields."""
    data = dsmtpd.stored_content(envelope(content=content), "KEY")
    assert data == dsmtpd.trace_header(envelope(), "KEY") + stored
    assert email.message_from_bytes(data)["Received"].endswith("+0000")


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_maildir(tmp_path: Path) -> None:
    maildir = dsmtpd.Maildir(tmp_path / "deep" / "mail")
    key = maildir.add(b"A: 1\r\n\nbytes are stored unchanged")
    assert maildir.path == tmp_path / "deep" / "mail"
    assert (maildir.path / "new" / key).read_bytes() == b"A: 1\r\n\nbytes are stored unchanged"
    assert maildir.add(b"A: 2\n\n", "given") == "given"
    other = email.message.EmailMessage()
    other["A"] = "3"
    added = [maildir.add(other), maildir.add("A: 4\n\n"), maildir.add(io.BytesIO(b"A: 5\n\n"))]
    assert {maildir[key]["A"] for key in added} == {"3", "4", "5"}
    assert sorted(message["A"] for message in maildir) == ["1", "2", "3", "4", "5"]
    shutil.rmtree(maildir.path)
    assert files(tmp_path) == ["deep"]
    maildir.add(b"A: 6\n\n", "again")  # the directory is created again
    assert files(maildir.path) == ["cur", "new", "new/again", "tmp"]
    assert len(maildir) == 1


def test_start_changes_no_file_of_a_maildir(tmp_path: Path) -> None:
    """A program that watches new sees no other files, and those in tmp may belong to others."""
    dsmtpd.Maildir(tmp_path)
    old = tmp_path / "tmp" / "old"
    old.touch()
    for path in (old, tmp_path / "tmp", tmp_path / "new"):
        os.utime(path, (0, 0))
    maildir = dsmtpd.Maildir(tmp_path)
    assert [path.stat().st_mtime for path in (tmp_path / "tmp", tmp_path / "new")] == [0, 0]
    maildir.add(b"")
    assert old.exists()


@POSIX
def test_full_disk(tmp_path: Path) -> None:
    code = (
        "import dsmtpd, resource\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "maildir = dsmtpd.Maildir('mail')\n"
        "try: maildir.add(bytes(101))\n"
        "except OSError as error: print(error)\n"
        "maildir.add(bytes(100), 'fits')\n"
    )
    assert "File too large" in python(code, tmp_path).stdout
    assert files(tmp_path / "mail") == ["cur", "new", "new/fits", "tmp"]


def test_storage_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is left of a message that cannot be stored."""
    with dsmtpd.capture(directory=tmp_path / "mail") as inbox:
        (tmp_path / "mail" / "new").rmdir()
        (tmp_path / "mail" / "new").touch()
        with pytest.raises(smtplib.SMTPDataError, match=r"451, .*4\.3\.0 Cannot store the message"):
            send(inbox)
        assert files(tmp_path / "mail") == ["cur", "new", "tmp"]
        (tmp_path / "mail" / "new").unlink()
        send(inbox)
        assert inbox.wait().path in list((tmp_path / "mail" / "new").iterdir())
    assert "Cannot store a message from 127.0.0.1:" in caplog.text


def test_concurrent_deliveries(tmp_path: Path) -> None:
    def add(maildir: dsmtpd.Maildir) -> None:
        for _ in range(50):
            maildir.add(b"Subject: Hi\n\n")

    maildirs = [dsmtpd.Maildir(tmp_path) for _ in range(2)]
    with concurrent.futures.ThreadPoolExecutor() as executor:
        list(executor.map(add, maildirs * 2))
    assert len(maildirs[0]) == 200


def test_maildir_creation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".gitignore").touch()
    (tmp_path / "git" / "cur").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    for name in ("empty", "git", "missing"):
        dsmtpd.Maildir(tmp_path / name)
        assert {*files(tmp_path / name)} - {".gitignore"} == {"cur", "new", "tmp"}
    with pytest.raises(mailbox.Error, match="other is not a Maildir: it has no cur, new, tmp"):
        dsmtpd.Maildir(tmp_path / "other")
    with pytest.raises(mailbox.Error, match="is not a directory"):
        dsmtpd.Maildir(tmp_path / "other" / "file")
    assert files(tmp_path / "other") == ["file"]
    monkeypatch.chdir(tmp_path / "other")
    assert dsmtpd.Maildir().path == tmp_path / "other"
    assert files(tmp_path / "other") == ["cur", "file", "new", "tmp"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_maildir_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "new").symlink_to("/proc/self")
    for directory in (tmp_path, Path("/proc/self/mail")):
        with pytest.raises(mailbox.Error, match=f"cannot write to {directory}"):
            dsmtpd.Maildir(directory)


# --- Server -------------------------------------------------------------------------------


class Peer:
    """An asyncio client on a socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.greeting = ""

    async def reply(self) -> str:
        """Return the last line of the next reply."""
        while (line := (await self.reader.readline()).decode())[3:4] == "-":
            pass
        return line.rstrip("\r\n")

    async def exchange(self, line: str) -> str:
        """Send a line, and return the last line of the reply."""
        self.writer.write(line.encode() + b"\r\n")
        return await self.reply()

    async def send_mail(self, fields: str = "Subject: Hi") -> str:
        for line in (*START, "DATA"):
            await self.exchange(line)
        return await self.exchange(f"{CLEAN}{fields}\r\n.")

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()


Connect = Callable[..., Awaitable[Peer]]


def run(scenario: Callable[[], Any]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 30))


def serve(scenario: Callable[[Server, Connect], Awaitable[None]], **options: Any) -> None:
    """Run a scenario with a server, and with a function that returns a client of it."""

    async def run_scenario() -> None:
        async with contextlib.AsyncExitStack() as stack:
            server = Server(**{"port": 0, "handler": str, **options})

            async def connect(**arguments: Any) -> Peer:
                """Return a client that has read the greeting."""
                arguments = {"host": server.host, "port": server.port, **arguments}
                peer = Peer(*await asyncio.open_connection(**arguments))
                stack.push_async_callback(peer.close)
                peer.greeting = await peer.reply()
                return peer

            async with server:
                await scenario(server, connect)

    run(run_scenario)


async def until(condition: Callable[[], object]) -> None:
    """Run the event loop until the condition is true."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0)


class SlowHandler:
    """A handler that returns after `release` is set, if the subject is "slow"."""

    def __init__(self) -> None:
        self.started, self.release = threading.Event(), threading.Event()
        self.envelopes: list[Envelope] = []

    def __call__(self, envelope: Envelope) -> None:
        if envelope.subject == "slow":
            self.started.set()
            assert self.release.wait(20)
        self.envelopes.append(envelope)


SLOW = [*START, "DATA", f"{CLEAN}Subject: slow\r\n", "."]


def test_server(tmp_path: Path) -> None:
    async def scenario(server: Server, connect: Connect) -> None:
        peer = await connect()
        assert await peer.send_mail() == "250 2.0.0 Message accepted"
        waiting = asyncio.create_task(server.serve_forever())
        with pytest.raises(RuntimeError, match="a Server can be started only once"):
            await server.start()
        await server.close()
        await waiting
        assert await peer.reply() == "421 4.3.2 Shutting down"
        assert await peer.reply() == ""
        with pytest.raises(RuntimeError, match="a Server can be started only once"):
            await server.start()

    serve(scenario, directory=tmp_path / "mail", handler=None)
    (message,) = mailbox.Maildir(tmp_path / "mail")
    assert message["Subject"] == "Hi"
    assert message["X-Peer"].startswith("127.0.0.1:")


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not (has_ipv6() and socket.has_dualstack_ipv6()), reason="needs dual stack")
def test_all_interfaces(caplog: pytest.LogCaptureFixture) -> None:
    """An IPv4 client of :: is logged, stored and matched by rules with its IPv4 address."""
    caplog.set_level("INFO", "dsmtpd")
    with dsmtpd.capture(interface="::", fail=["CONNECT 127.0.0.1 x1 554"]) as inbox:
        assert inbox.url == f"smtp://[::1]:{inbox.port}"
        with pytest.raises(smtplib.SMTPConnectError):
            smtplib.SMTP("127.0.0.1", inbox.port)
        for host in (inbox.host, "127.0.0.1"):
            with smtplib.SMTP(host, inbox.port) as client:
                client.sendmail("a@b", ["c@d"], CLEAN)
    for message, host in zip(inbox.messages, ("[::1]", "127.0.0.1"), strict=True):
        assert message.peer.startswith(f"{host}:")
        assert f" ({host}) by ".encode() in dsmtpd.trace_header(message, "KEY")
        assert f"{message.peer}: a@b -> c@d []" in caplog.text


def test_handler_results(caplog: pytest.LogCaptureFixture) -> None:
    async def accept(envelope: Envelope) -> None:
        await asyncio.sleep(0)

    async def reject(envelope: Envelope) -> None:
        raise SMTPError(554, "5.6.0", "Refused")

    def close_connection(envelope: Envelope) -> None:
        raise SMTPError(421, "4.3.2", "Gone")

    assert replies_with(accept) == ["250 2.0.0 Message accepted", "250 2.0.0 OK"]
    assert replies_with(reject) == ["554 5.6.0 Refused", "250 2.0.0 OK"]
    assert replies_with(close_connection) == ["421 4.3.2 Gone", ""]
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "message a@b -> c@d [Hi] refused: 554 5.6.0 Refused",
        "message a@b -> c@d [Hi] refused: 421 4.3.2 Gone",
    ]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("secret detail"),
        StopIteration("too few"),
        pytest.fail.Exception("unexpected mail"),  # not an Exception
        GeneratorExit("end of a generator"),
        SystemExit("over"),
    ],
    ids=repr,
)
def test_handler_exceptions(
    error: BaseException, asynchronous: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(envelope: Envelope) -> None:
        raise error

    async def fail_async(envelope: Envelope) -> None:
        raise error

    replies = replies_with(fail_async if asynchronous else fail)
    assert replies == ["451 4.3.0 Cannot accept the message, try again later", "250 2.0.0 OK"]
    assert str(error) in caplog.text


def replies_with(handler: Callable[[Envelope], object], **options: Any) -> list[str]:
    """Return the replies to the content and to NOOP."""
    replies = []

    async def scenario(server: Server, connect: Connect) -> None:
        peer = await connect()
        replies.extend([await peer.send_mail(), await peer.exchange("NOOP")])

    serve(scenario, handler=handler, **options)
    return replies


def test_exceptions_of_callbacks(caplog: pytest.LogCaptureFixture) -> None:
    """The client gets its reply all the same: it must not send a delivered message again."""

    def fail(item: object) -> None:
        raise OSError("no callback today")

    options = {"on_message": fail, "on_refusal": fail, "fail": ["NOOP * 450"]}
    replies = replies_with(str, **options)
    assert replies == ["250 2.0.0 Message accepted", "450 4.0.0 Scripted failure"]
    assert caplog.text.count("OSError: no callback today") == 2


def test_end_of_the_event_loop_cancels_the_handler(caplog: pytest.LogCaptureFixture) -> None:
    events = []
    called = asyncio.Event()

    async def hang(envelope: Envelope) -> None:
        called.set()
        try:
            await asyncio.Event().wait()
        finally:
            events.append("cancelled")

    async def scenario(server: Server, connect: Connect) -> None:
        tasks_of_the_test = asyncio.all_tasks()
        peer = await connect()
        peer.writer.write("\r\n".join([*SLOW, ""]).encode())
        await called.wait()
        tasks = asyncio.all_tasks() - tasks_of_the_test
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    serve(scenario, handler=hang)
    assert events == ["cancelled"]
    assert "The delivery was cancelled" in caplog.text


@pytest.mark.skipif(sys.platform != "linux" or sys.maxsize < 1 << 46, reason="needs 64-bit Linux")
def test_no_new_threads(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """The stack of a new thread does not fit into the address space."""

    async def scenario(server: Server, connect: Connect) -> None:
        peer = await connect()
        threading.stack_size(1 << 46)
        try:
            with pytest.raises(RuntimeError, match="can't start new thread"):
                await Server(port=0, directory=tmp_path).start()
            assert (await peer.send_mail()).startswith("451")
        finally:
            threading.stack_size(0)
        assert (await peer.send_mail()).startswith("250")

    serve(scenario)
    assert "can't start new thread" in caplog.text


def test_slow_handlers(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """They do not block other sessions; close() waits for them, but not for a client."""
    caplog.set_level("INFO", "dsmtpd")
    monkeypatch.setattr(dsmtpd, "STOP_TIMEOUT", 0.05)
    handler = SlowHandler()

    async def scenario(server: Server, connect: Connect) -> None:
        slow = [await connect() for _ in range(5)]
        fast = [await connect() for _ in range(5)]
        paused = await connect()
        sending = [asyncio.create_task(peer.send_mail("Subject: slow")) for peer in slow]
        await asyncio.to_thread(handler.started.wait, 20)
        for peer in fast:
            assert (await peer.send_mail()).startswith("250")
        # Unread replies fill the buffers on both sides.
        pause(paused)
        paused.writer.write(b"HELP\r\n" * 100_000)
        writers = [connection._writer for connection in server._connections.values()]
        await until(lambda: max(w.transport.get_write_buffer_size() for w in writers) > 65_536)
        closing = asyncio.create_task(server.close())
        for peer in fast:
            assert await peer.reply() == "421 4.3.2 Shutting down"
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(closing), 0.2)
        assert not any(task.done() for task in sending)
        handler.release.set()
        assert {await task for task in sending} == {"250 2.0.0 Message accepted"}
        assert await slow[0].reply() == "421 4.3.2 Shutting down"
        await closing
        paused.writer.transport.abort()

    serve(scenario, handler=handler)
    assert "Waiting for the delivery of a@b -> c@d [slow]" in caplog.text


def pause(peer: Peer) -> asyncio.Transport:
    """Have a client stop reading, and return its transport."""
    transport = peer.writer.transport
    assert isinstance(transport, asyncio.Transport)
    transport.pause_reading()
    return transport


RESET = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)


def test_message_of_a_client_that_hangs_up_during_a_delay(tmp_path: Path) -> None:
    with dsmtpd.capture(directory=tmp_path, fail=[". * delay 0.1"]) as inbox:
        client = smtplib.SMTP(inbox.host, inbox.port)
        client.ehlo()
        client.mail("a@b")
        client.rcpt("c@d")
        client.docmd("DATA")
        client.send("Subject: Hi\r\n.\r\n")
        client.close()
        path = inbox.wait(subject="Hi").path
    assert path in list((tmp_path / "new").iterdir())


def test_pipelined_commands_do_not_block_other_session() -> None:
    """The other client gets its reply before the first one has all of its replies."""
    refusals: list[dsmtpd.Refusal] = []

    async def scenario(server: Server, connect: Connect) -> None:
        peer, other = await connect(), await connect()
        peer.writer.write(b"NOOP\r\n" * 5000)
        assert await other.exchange("HELP") != ""
        assert len(refusals) < 5000
        for _ in range(5000):
            assert (await peer.reply()).startswith("550")

    serve(scenario, fail=["NOOP * 550"], on_refusal=refusals.append)


def test_listen_on_a_host_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of its addresses have the same port."""
    addresses = socket.getaddrinfo("localhost", 0, type=socket.SOCK_STREAM)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: addresses * 2)
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(sock) for sock in dsmtpd.listen(Config(port=0))]
        assert len(listeners) == len(set(addresses))
        assert len({listener.getsockname()[1] for listener in listeners}) == 1


@OPENSSL
def test_close_while_clients_connect(
    pem: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(tls: str | None, iterations: int) -> None:
        server = Server(tls=tls, cert=pem / "both.pem" if tls else None, port=0, handler=str)
        await server.start()
        peers = [socket.socket() for _ in range(5)]
        for peer in peers:
            peer.setblocking(False)
            peer.connect_ex((server.host, server.port))
        for _ in range(iterations):
            await asyncio.sleep(0)
        with monkeypatch.context() as patch:
            patch.setattr(dsmtpd, "STOP_TIMEOUT", 0.02)
            await server.close()
        for peer in peers:
            peer.close()

    for tls in (None, "implicit"):
        for iterations in range(8):
            run(functools.partial(scenario, tls, iterations))
    assert not [record for record in caplog.records if record.name == "asyncio"]


def test_idle_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a client that never reads: the server stops reading, and closes the connection."""
    monkeypatch.setattr(dsmtpd, "IDLE_TIMEOUT", 0.05)

    async def scenario(server: Server, connect: Connect) -> None:
        peer = await connect()
        assert await peer.exchange("NOOP") == "250 2.0.0 OK"  # the delay is longer
        assert await peer.reply() == "421 4.4.2 Idle timeout"
        assert await peer.reply() == ""
        peer = await connect()
        peer.writer.write(b"EHLO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\nhalf a")
        codes = [(await peer.reply())[:3] for _ in range(5)]
        assert codes == ["250", "250", "250", "354", "421"]
        peer = await connect()
        pause(peer)
        with contextlib.suppress(ConnectionError):
            while True:
                peer.writer.write(b"HELP\r\n" * 10_000)
                await peer.writer.drain()

    serve(scenario, fail=["NOOP * delay 0.2"])


def test_paused_client_does_not_block_others() -> None:
    """The paused client receives all replies after it resumes reading."""

    async def scenario(server: Server, connect: Connect) -> None:
        paused, other = await connect(), await connect()
        transport = pause(paused)
        for _ in range(50):
            paused.writer.write(b"HELP\r\n" * 300)
            assert await asyncio.wait_for(other.exchange("NOOP"), 5) == "250 2.0.0 OK"
        transport.resume_reading()
        for _ in range(50 * 300):
            assert (await paused.reply()).startswith("214 ")

    serve(scenario)


def test_half_closed_connections(tmp_path: Path) -> None:
    """A client that shuts down its sending side receives all replies."""
    with dsmtpd.capture(directory=tmp_path, fail=["HELP * delay 0.05"]) as inbox:
        for last_line, codes in [("", ""), ("HELP\r\n", "214"), ("HELP\r\nQUIT\r\n", "214 221")]:
            with socket.create_connection((inbox.host, inbox.port), 20) as client:
                client.sendall("\r\n".join([*SLOW, last_line]).encode())
                client.shutdown(socket.SHUT_WR)
                replies = re.findall("^[0-9]{3}(?= )", client.makefile().read(), re.MULTILINE)
            assert replies == ["220", "250", "250", "250", "354", "250", *codes.split()]
        assert len(inbox.messages) == 3


def test_session_error(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """An unexpected exception is logged and ends only its own session."""

    async def scenario(server: Server, connect: Connect) -> None:
        peer = await connect()
        with monkeypatch.context() as patch:
            patch.setattr(dsmtpd, "lint", lambda *arguments: 1 / 0)
            assert await peer.send_mail() == ""
        peer = await connect()
        assert (await peer.send_mail()).startswith("250")

    serve(scenario)
    (record,) = (record for record in caplog.records if record.name == "dsmtpd")
    assert record.getMessage().endswith(": Session failed")
    assert "ZeroDivisionError" in caplog.text


def test_too_many_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dsmtpd, "MAX_CONNECTIONS", 2)

    async def scenario(server: Server, connect: Connect) -> None:
        peers = [await connect() for _ in range(3)]
        assert [peer.greeting[:3] for peer in peers] == ["220", "220", "421"]
        assert await peers[2].reply() == ""
        await peers[0].exchange("QUIT")
        assert await peers[0].reply() == ""
        assert (await connect()).greeting.startswith("220")

    serve(scenario)


@POSIX
def test_maximum_connections() -> None:
    """It is half of the limit of open files, at most 1000."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit in (soft, 400):
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        try:
            expected = min(1000, limit // 2) if limit != resource.RLIM_INFINITY else 1000
            assert dsmtpd._max_connections() == expected
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_no_delay() -> None:
    """Replies are sent at once, also in several small writes of TLS."""

    async def scenario() -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        server = Server(handler=str)
        await server.start([listener])
        assert listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        await server.close()

    run(scenario)


def test_connection_reset(caplog: pytest.LogCaptureFixture) -> None:
    """After a reset at any step of a session, the server logs no warning and keeps running."""
    steps = [*START, "DATA", "text", *[".", *START[1:], "DATA"] * 100]

    async def scenario(server: Server, connect: Connect) -> None:
        for count in (*range(6), len(steps)):
            for read in (True, False):
                peer = await connect()
                peer.writer.write("\r\n".join([*steps[:count], ""]).encode())
                for _ in range(min(count, 4) if read else 0):
                    await peer.reply()
                linger = (socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                peer.writer.get_extra_info("socket").setsockopt(*linger)
                peer.writer.transport.abort()
        assert (await (await connect()).send_mail()).startswith("250")
        await until(lambda: len(server._connections) == 1)

    serve(scenario, ignore=list(dsmtpd.WARNINGS))
    assert not [record for record in caplog.records if record.levelname != "INFO"]


# --- TLS ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with cert.pem, key.pem, both.pem, other.pem, locked.pem and text.pem."""
    folder = tmp_path_factory.mktemp("pem")
    for _ in range(2):
        if (folder / "key.pem").exists():
            (folder / "key.pem").rename(folder / "other.pem")
        subprocess.run(dsmtpd.OPENSSL_COMMAND.split(), cwd=folder, check=True, capture_output=True)
    encrypt = "openssl ec -aes128 -passout pass:secret -in key.pem -out locked.pem"
    subprocess.run(encrypt.split(), cwd=folder, check=True, capture_output=True)
    both = (folder / "key.pem").read_bytes() + (folder / "cert.pem").read_bytes()
    (folder / "both.pem").write_bytes(both)
    (folder / "text.pem").write_text("no certificate")
    return folder


def client_context(pem: Path) -> ssl.SSLContext:
    """Return a context that trusts cert.pem."""
    return ssl.create_default_context(cafile=str(pem / "cert.pem"))


def connect_tls(port: int, context: ssl.SSLContext) -> ssl.SSLSocket:
    plain = socket.create_connection(("127.0.0.1", port), 20)
    return context.wrap_socket(plain, server_hostname="localhost")


@OPENSSL
@pytest.mark.parametrize("command", [b"", b"QUIT\r\n"])
def test_silent_tls_clients(command: bytes, pem: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another client gets their place, although they neither end TLS nor close their sockets."""
    monkeypatch.setattr(dsmtpd, "IDLE_TIMEOUT", 0.1)
    monkeypatch.setattr(dsmtpd, "MAX_CONNECTIONS", 2)

    async def scenario(server: Server, connect: Connect) -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(2):
                client = await asyncio.to_thread(connect_tls, server.port, client_context(pem))
                stack.enter_context(client).sendall(command)
            await until(lambda: not server._connections)
            client = await asyncio.to_thread(connect_tls, server.port, client_context(pem))
            greeting = await asyncio.to_thread(stack.enter_context(client).recv, 100)
            assert greeting.startswith(b"220 ")

    serve(scenario, tls="implicit", cert=pem / "cert.pem", key=pem / "key.pem")


@OPENSSL
def test_too_many_connections_with_implicit_tls(pem: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(server: Server, connect: Connect) -> None:
        monkeypatch.setattr(dsmtpd, "MAX_CONNECTIONS", 0)
        assert (await connect()).greeting == ""  # it is closed without a reply

    serve(scenario, tls="implicit", cert=pem / "both.pem")


@OPENSSL
def test_close_after_failed_tls_session(pem: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dsmtpd, "STOP_TIMEOUT", 0.1)

    async def scenario(server: Server, connect: Connect) -> None:
        with await asyncio.to_thread(connect_tls, server.port, client_context(pem)) as client:
            client.sendall("\r\n".join([*SLOW, ""]).encode())  # it sends no close_notify
            await until(lambda: server._connections and failures)
            await asyncio.wait_for(server.close(), 10)

    failures: list[Envelope] = []

    def fail(envelope: Envelope) -> None:
        failures.append(envelope)
        raise RuntimeError

    serve(scenario, tls="implicit", cert=pem / "both.pem", on_message=fail)


@OPENSSL
def test_starttls_and_login(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "dsmtpd")
    with dsmtpd.capture(tls="starttls", auth={"user": "sesame:open"}) as inbox:
        assert inbox.cafile is not None
        with smtplib.SMTP("localhost", inbox.port) as client:
            with pytest.raises(smtplib.SMTPSenderRefused, match="Authentication required"):
                client.sendmail("a@b", ["c@d"], "Subject: Hi")
            client.starttls(context=ssl.create_default_context(cafile=inbox.cafile))
            with pytest.raises(smtplib.SMTPAuthenticationError):
                client.login("user", "wrong")
            client.login("user", "sesame:open")
            client.sendmail("a@b", ["c@d"], "Subject: Hi")
        assert inbox.wait().protocol == "ESMTPSA"
    assert not Path(inbox.cafile).exists()
    assert "AUTH PLAIN ***" in caplog.text
    assert "sesame" not in caplog.text


@OPENSSL
def test_smtplib_with_implicit_tls(pem: Path) -> None:
    with dsmtpd.capture(tls="implicit", cert=pem / "both.pem", auth={"u": "p"}) as inbox:
        assert inbox.url == f"smtps://127.0.0.1:{inbox.port}"
        assert inbox.cafile is None
        with smtplib.SMTP_SSL("localhost", inbox.port, context=client_context(pem)) as client:
            client.login("u", "p")
            client.sendmail("a@b", ["c@d"], b"x" * 3_000_000)
        assert inbox.wait().content == b"x" * 3_000_000 + b"\r\n"
        assert inbox.wait().user == "u"


@OPENSSL
def test_uvloop(pem: Path) -> None:
    """uvloop reads from a client before a server can start TLS."""
    uvloop = pytest.importorskip("uvloop")
    envelopes: list[Envelope] = []

    def send_mail(port: int) -> None:
        with smtplib.SMTP_SSL("localhost", port, context=client_context(pem)) as client:
            client.sendmail("a@b", ["c@d"], CLEAN)

    async def scenario() -> None:
        options: dict[str, Any] = {"cert": pem / "both.pem", "handler": envelopes.append}
        async with Server(port=0, tls="implicit", **options) as server:
            for _ in range(5):
                await asyncio.wait_for(asyncio.to_thread(send_mail, server.port), 10)

    loop = uvloop.new_event_loop()
    loop.run_until_complete(scenario())
    loop.close()
    assert [envelope.tls for envelope in envelopes] == [True] * 5


@OPENSSL
@pytest.mark.parametrize(
    ("cert", "key", "text"),
    [
        ("missing.pem", None, "No such file"),
        ("cert.pem", "missing.pem", "No such file"),
        ("cert.pem", "other.pem", "key values mismatch"),
        ("cert.pem", "locked.pem", "the key is encrypted; use a key without a passphrase"),
        ("text.pem", None, "PEM"),
        ("cert.pem", None, "in PEM format; --key names the file of the key"),
        ("cert.pem", "text.pem", "PEM"),
    ],
)
def test_invalid_certificate(cert: str, key: str | None, text: str, pem: Path) -> None:
    server = Server(port=0, tls="starttls", cert=pem / cert, key=key and pem / key, handler=print)
    with pytest.raises(ValueError, match=text) as caught:
        asyncio.run(server.start())
    assert str(pem / cert) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_certificate_without_openssl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="on a machine with OpenSSL, by 'openssl req -x509 "):
        dsmtpd.make_certificate(str(tmp_path))


@OPENSSL
def test_tls_client_errors(pem: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each error logs one line at most, without a traceback, and the server keeps running."""
    tls = {"ssl": client_context(pem), "server_hostname": "localhost"}

    async def implicit(server: Server, connect: Connect) -> None:
        # Plain text, a broken handshake, and two that end early
        for text in (b"EHLO x\r\n", b"\x16\x03\x01\x02\x00" + bytes(512), b"", b"\x16\x03\x01"):
            with socket.create_connection((server.host, server.port)) as client:
                client.sendall(text)
                if len(text) > 3:
                    await asyncio.to_thread(client.recv, 100)
        for command in ("NOOP", "MAIL FROM:<a@b>"):  # disconnect without close_notify
            peer = await connect(**tls)
            await peer.exchange(command)
            peer.writer.transport.abort()
        with pytest.raises(ssl.SSLCertVerificationError):
            await asyncio.to_thread(connect_tls, server.port, ssl.create_default_context())
        assert (await (await connect(**tls)).send_mail()).startswith("250")

    async def starttls(server: Server, connect: Connect) -> None:
        for text in (b"no handshake at all\r\n", b""):
            peer = await connect()
            await peer.exchange("STARTTLS")
            peer.writer.write(text)
            if text:
                await peer.reply()
            await peer.close()

    serve(implicit, tls="implicit", cert=pem / "both.pem")
    serve(starttls, tls="starttls", cert=pem / "both.pem")
    records = [record for record in caplog.records if record.levelname != "INFO"]
    assert {record.name for record in records} == {"dsmtpd"}
    assert not [record for record in records if record.exc_info]
    reasons = [record.getMessage().partition(": TLS handshake failed: ")[2] for record in records]
    reasons = [reason for reason in reasons if reason]
    assert any("the client sent plain text instead of TLS" in reason for reason in reasons)
    assert any("; it may not trust the certificate" in reason for reason in reasons)
    assert any("; the client may not trust the certificate" in reason for reason in reasons)
    assert 4 <= len(reasons) <= 7


@OPENSSL
@pytest.mark.parametrize("closing", [False, True])
@pytest.mark.parametrize("tls", [None, "implicit"])
def test_rest_of_the_input_after_a_disconnect(
    tls: str | None, closing: bool, pem: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """After the delivery in progress, no other message that has arrived is delivered."""
    caplog.set_level("INFO", "dsmtpd")
    handler = SlowHandler()

    async def scenario(server: Server, connect: Connect) -> None:
        async def new_client() -> socket.socket:
            if tls:
                return await asyncio.to_thread(connect_tls, server.port, client_context(pem))
            return socket.create_connection((server.host, server.port))

        with await new_client() as client:
            client.sendall("\r\n".join([*SLOW, *SLOW, *SLOW, ""]).encode())
            await asyncio.to_thread(handler.started.wait, 20)
            if closing:
                ended = asyncio.create_task(server.close())
                await until(lambda: "Waiting for the delivery" in caplog.text)
                handler.release.set()
                await ended
                replies = client.makefile().read().splitlines()
                assert replies[-2:] == ["250 2.0.0 Message accepted", "421 4.3.2 Shutting down"]
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        if not closing:  # the server notices the reset before the commands of another client
            with await new_client() as other:
                await asyncio.to_thread(other.recv, 100)
        handler.release.set()
        await until(lambda: not server._connections)

    serve(scenario, tls=tls, cert=pem / "both.pem" if tls else None, handler=handler)
    assert len(handler.envelopes) == 1
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert {record.name for record in caplog.records} == {"dsmtpd"}


@OPENSSL
def test_client_disconnects_before_tls(pem: Path) -> None:
    async def scenario(server: Server, connect: Connect) -> None:
        peer = await connect()
        peer.writer.write(b"NOOP\r\nSTARTTLS\r\n")
        await peer.reply()
        peer.writer.transport.abort()
        await until(lambda: not server._connections)

    serve(scenario, tls="starttls", cert=pem / "both.pem", fail=["STARTTLS * delay 0.1"])


@OPENSSL
def test_plain_text_after_starttls_is_discarded(pem: Path) -> None:
    with dsmtpd.capture(tls="starttls", cert=pem / "both.pem") as inbox:
        with socket.create_connection((inbox.host, inbox.port), 20) as plain:
            assert plain.recv(1000).startswith(b"220 ")
            plain.sendall(b"STARTTLS\r\nEHLO evil\r\nNOOP\r\n")
            assert plain.recv(1000) == b"220 2.0.0 Ready to start TLS\r\n"
            context = client_context(pem)
            with context.wrap_socket(plain, server_hostname="localhost") as client:
                # The server has discarded EHLO and NOOP: the first reply answers MAIL.
                client.sendall(b"MAIL FROM:<a@b>\r\n")
                assert client.recv(1000).startswith(b"503")
                client.sendall(b"QUIT\r\n")
                assert client.recv(1000) == b"221 2.0.0 Bye\r\n"


# --- Process ------------------------------------------------------------------------------


class Process:
    """The program in a subprocess; the constructor returns after the log contains last_line."""

    def __init__(
        self,
        *arguments: str | Path,
        cwd: Path,
        program: tuple[str | Path, ...] = (SCRIPT,),
        last_line: str = "Found a Maildir storage with",
        stdout: int | None = None,
        close_fds: bool = True,
    ) -> None:
        command: list[str | Path] = [sys.executable, "-W", "error", *program, "-p", "0", *arguments]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.popen = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
            close_fds=close_fds,
            encoding="utf-8",
            cwd=cwd,
            env={**environment, "PYTHONUTF8": "1"},
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
        self.lines: list[str] = []
        self.port = 0
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            self.lines.append(line)
            if match := re.search(r"Starting dsmtpd \S+ at .*:(\d+)$", line):
                self.port = int(match[1])
            if last_line in line:
                break

    def wait(self) -> tuple[int, str]:
        """Wait until the process exits, and return the exit status and the log."""
        try:
            _, rest = self.popen.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            raise
        return self.popen.returncode, "".join(self.lines) + rest

    def stop(
        self, number: int = getattr(signal, "CTRL_BREAK_EVENT", signal.SIGTERM)
    ) -> tuple[int, str]:
        self.popen.send_signal(number)
        return self.wait()


@contextlib.contextmanager
def process(*arguments: str | Path, **options: Any) -> Iterator[Process]:
    running = Process(*arguments, **options)
    with running.popen:
        try:
            yield running
        finally:
            running.popen.kill()


def test_end_to_end(tmp_path: Path) -> None:
    content = f"{CLEAN}Subject: Welcome Email\r\n\r\nÄ dot:\r\n.\r\n".encode()
    with process("-d", tmp_path / "mail", cwd=tmp_path) as server:
        with smtplib.SMTP("127.0.0.1", server.port) as client:
            client.sendmail("app@example.com", ["user@test.com"], content, ["BODY=8BITMIME"])
            assert client.sock is not None
            _, port = client.sock.getsockname()
        status, text = server.stop()
    assert status == 0
    assert [line[24:] for line in text.splitlines()] == [
        f"INFO: Starting dsmtpd {dsmtpd.__version__} at 127.0.0.1:{server.port}",
        f"INFO: Storing the incoming emails into {tmp_path / 'mail'}",
        "INFO: Found a Maildir storage with 0 mails",
        f"INFO: 127.0.0.1:{port}: app@example.com -> user@test.com [Welcome Email]",
        "INFO: Cleaning up",
    ]
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO: ", text)
    (path,) = (tmp_path / "mail" / "new").iterdir()
    assert path.read_bytes().endswith(content.replace(b"\r\n", b"\n"))


@POSIX
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_with_idle_clients(number: int, tmp_path: Path) -> None:
    with process("-d", tmp_path / "mail", cwd=tmp_path) as server, contextlib.ExitStack() as stack:
        address = ("127.0.0.1", server.port)
        clients = [stack.enter_context(socket.create_connection(address)) for _ in range(5)]
        files = [stack.enter_context(client.makefile("rb")) for client in clients]
        for file in files:
            assert file.readline().startswith(b"220")
        status, text = server.stop(number)
        assert [file.read() for file in files] == [b"421 4.3.2 Shutting down\r\n"] * 5
    assert status == 0
    assert "Traceback" not in text


@POSIX
def test_message_is_stored_before_reply(tmp_path: Path) -> None:
    with process("-d", tmp_path / "mail", cwd=tmp_path) as server:
        with smtplib.SMTP("127.0.0.1", server.port) as client:
            client.ehlo()
            client.mail("a@b")
            client.rcpt("c@d")
            client.data(b"x" * 100_000)
            server.popen.kill()
            server.popen.wait()
            with contextlib.suppress(smtplib.SMTPServerDisconnected):
                client.quit()
    (path,) = (tmp_path / "mail" / "new").iterdir()
    assert path.read_bytes().endswith(b"x" * 100_000 + b"\n")


def test_verbose_and_quiet(main: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    assert main("-v", "--", *SEND, "1") == 0
    assert re.search(
        r"^127\.0\.0\.1:\d+ C: data\n127.0.0.1:\d+ S: 354 ", "\n".join(caplog.messages), re.M
    )
    caplog.clear()
    assert main("-q", "--", *SEND, "1") == 0
    assert {record.levelname for record in caplog.records} == {"WARNING"}  # no Date field


def execute(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program until it exits."""
    options = {"capture_output": True, "encoding": "utf-8", "timeout": 60, **options}
    return subprocess.run(command, check=False, **options)


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the program until it exits."""
    return execute(sys.executable, "-W", "error", SCRIPT, *arguments)


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """A function that runs the program in this process on a free port; it returns the status."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    levels = {name: logging.getLogger(name).level for name in ("asyncio", "dsmtpd")}
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK", "SIGCHLD")
    numbers = [signal.Signals[name] for name in names if hasattr(signal, name)]
    handlers = {number: signal.getsignal(number) for number in numbers}

    def run_main(*arguments: str | Path) -> Any:
        with pytest.raises(SystemExit) as caught:
            dsmtpd.main(["-p", "0", *map(str, arguments)])
        return caught.value.code

    yield run_main
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["-p", "70000"], "port: must be from 0 (any free one) to 65535, not 70000"),
        (["-s", "32M"], "must be a number of bytes, such as 33554432, not 32M"),
        (["--auth", "secret"], "argument --auth: must be USER:PASSWORD"),
        (["--fail", "RCPT", "a.txt"], "write it in quotes, such as 'RCPT * 550'"),
        (["--expect", "-1"], "expect: must be a number of messages, such as 1, or 0 for none"),
        (["--timeout", "0"], "timeout: must be a number of seconds above 0"),
        (["--json", "--print"], "argument --print: not allowed with argument --json"),
        (["-o", "x"], "output: requires --print or --json"),
        (["--html", ""], "html: must not be empty"),
        (["--direct", "x"], "unrecognized arguments: --direct x"),
        (["pytest"], "unrecognized arguments: pytest; a command goes after --"),
        (["--"], "expected a command after --"),
    ],
)
def test_usage_errors(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        dsmtpd.parse_args(arguments)
    assert caught.value.code == 2
    usage, error = capsys.readouterr().err.splitlines()
    assert usage == "usage: dsmtpd [options] [-- COMMAND [ARG ...]]"
    assert text in error


NOT_ROOT = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="needs a user without all rights"
)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["-d", "."], "is not a Maildir: it has no cur, new, tmp"),
        (["-d", "file"], "file is not a directory"),
        (["--handler", "os"], "--handler os: must be MODULE:CALLABLE"),
        (["--handler", "no_such:x"], "No module named 'no_such'"),
        (["--handler", "os:no_such"], "has no attribute 'no_such'"),
        (["--handler", "os:name"], "--handler os:name: must be MODULE:CALLABLE"),
        (["--handler", "exits:x"], "SystemExit: 5"),
        (["-d", "mail", "--json", "-o", "no/such/folder"], "No such file or directory: 'no/such"),
        (["-d", "mail", "--html", "file"], "file"),
        pytest.param(["-d", "unreadable"], "unreadable/cur", marks=NOT_ROOT),
        (["--", "true"], "No such file or directory: "),
    ],
)
def test_start_errors(
    arguments: list[str],
    text: str,
    main: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    (tmp_path / "file").touch()
    (tmp_path / "exits.py").write_text("import sys; sys.exit(5)")
    (tmp_path / "unreadable" / "cur").mkdir(0o300, parents=True)
    assert main(*arguments) == 2
    (error,) = [item.getMessage() for item in caplog.records if item.levelname == "ERROR"]
    assert error.startswith("Cannot start: ")
    assert text in error
    assert "\n" not in error


def test_cannot_listen(
    main: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        for arguments, text in (
            (["-p", port], f"127.0.0.1:{port}: the port is in use; use another one"),
            (["-i", "192.0.2.1"], "192.0.2.1:0: this machine does not have that address"),
            (["-i", "a..b"], "a..b:0: not a valid host name"),
        ):
            caplog.clear()
            assert main(*arguments, "-d", tmp_path / "mail") == 3
            (line,) = caplog.messages
            assert line.startswith(f"Cannot listen on {text}")
    assert not (tmp_path / "mail").exists()


@pytest.mark.skipif(not hasattr(socket, "SO_REUSEPORT"), reason="needs SO_REUSEPORT")
def test_two_servers_on_one_port(tmp_path: Path) -> None:
    options = ["--reuse-port", "-d", str(tmp_path / "mail")]
    with process(*options, cwd=tmp_path) as first:
        second_options = [*options, "-p", str(first.port)]
        with process(*second_options, cwd=tmp_path) as second:
            assert second.port == first.port
            for _ in range(50):
                with smtplib.SMTP("127.0.0.1", first.port) as client:
                    client.sendmail("a@b", ["c@d"], CLEAN)
            texts = [first.stop()[1], second.stop()[1]]
    assert len(mailbox.Maildir(tmp_path / "mail")) == 50
    assert all(text.count(" -> ") for text in texts)


@POSIX
@pytest.mark.parametrize(
    ("pid_offset", "count", "is_used"), [(0, "1", True), (1, "1", False), (0, "", False)]
)
def test_socket_activation(pid_offset: int, count: str, is_used: bool, tmp_path: Path) -> None:
    """The sockets start at descriptor 3, and LISTEN_PID is the process ID, as with systemd."""
    starter = (
        "import os, sys\n"
        "os.dup2(int(sys.argv[1]), 3)\n"
        f"os.environ.update(LISTEN_PID=str(os.getpid() + {pid_offset}), LISTEN_FDS='{count}')\n"
        "os.execv(sys.executable, [sys.executable, *sys.argv[2:]])\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.set_inheritable(True)
        program = ("-c", starter, str(listener.fileno()), "-W", "error", SCRIPT)
        options: dict[str, Any] = {"program": program, "cwd": tmp_path, "close_fds": False}
        with process("-d", tmp_path / "mail", **options) as server:
            assert (server.port == listener.getsockname()[1]) is is_used
            with smtplib.SMTP("127.0.0.1", server.port) as client:
                client.sendmail("a@b", ["c@d"], CLEAN)
            assert server.stop()[0] == 0


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--version", "-h"):
        with pytest.raises(SystemExit):
            dsmtpd.parse_args([option])
    version, usage, *lines = capsys.readouterr().out.splitlines()
    assert version == f"dsmtpd {dsmtpd.__version__}"
    assert usage == "usage: dsmtpd [options] [-- COMMAND [ARG ...]]"
    assert max(map(len, lines)) <= 80


def test_current_directory(
    main: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    warning = f"{tmp_path} has other files too; -d DIR selects another directory"
    assert main("--timeout", "0.01") == 0
    assert warning not in caplog.messages
    (tmp_path / "new" / "1.2.3").touch()
    (tmp_path / "manage.py").touch()
    assert main("--timeout", "0.01") == 0
    assert caplog.messages[-3:-1] == ["Found a Maildir storage with 1 mails", warning]


# pip caches a wheel built from an sdist by its path; another run may have the same path.
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-cache-dir")


def build_wheel(source: Path, directory: Path) -> Path:
    """Build a wheel from a source tree or an sdist, without network."""
    offline = ("--no-index", "--no-deps", "--no-build-isolation")
    subprocess.run(
        [*PIP, "wheel", *offline, "--wheel-dir", directory, source],
        check=True,
        env={**os.environ, "SOURCE_DATE_EPOCH": str(int(NOW.timestamp()))},
    )
    (wheel,) = directory.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")
    (source / "contrib").mkdir()
    needed = ("dsmtpd.py", "pyproject.toml", "README.rst", "LICENSE", "contrib/build_backend.py")
    for name in needed:
        shutil.copy(HERE / name, source / name)
    return build_wheel(source, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for sys.path in which the wheel is installed."""
    path = tmp_path_factory.mktemp("site")
    subprocess.run(
        [*PIP, "install", "--no-deps", "--no-index", "--target", path, wheel], check=True
    )
    return path


def test_wheel(wheel: Path, site: Path, tmp_path: Path) -> None:
    """The wheel can be installed and run."""
    assert wheel.name == f"dsmtpd-{dsmtpd.__version__}-py3-none-any.whl"
    program = next((site / "bin").glob("dsmtpd*"))
    environment = {**os.environ, "PYTHONPATH": str(site)}
    completed = execute(program, "--version", cwd=tmp_path, env=environment)
    assert completed.stdout == f"dsmtpd {dsmtpd.__version__}\n"
    info = f"dsmtpd-{dsmtpd.__version__}.dist-info"
    metadata = (site / info / "METADATA").read_text("utf-8")
    assert "Requires-Dist" not in metadata
    assert (dsmtpd.__doc__ or "").splitlines()[0] in metadata
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert archive.read("dsmtpd.py") == archive.read("dsmtpd-stubs/__init__.pyi")
    assert {name.partition("/")[0] for name in names} == {"dsmtpd.py", "dsmtpd-stubs", info}


def test_wheel_from_sdist(wheel: Path, tmp_path: Path) -> None:
    """The wheel built from the sdist is the same."""
    build = "import build_backend, sys; build_backend.build_sdist(sys.argv[1])"
    environment = {**os.environ, "PYTHONPATH": str(HERE / "contrib")}
    subprocess.run([sys.executable, "-c", build, tmp_path], check=True, cwd=HERE, env=environment)
    sdist = tmp_path / f"dsmtpd-{dsmtpd.__version__}.tar.gz"
    assert build_wheel(sdist, tmp_path).read_bytes() == wheel.read_bytes()


def test_wheel_types(site: Path, tmp_path: Path) -> None:
    """mypy finds the types of the installed module."""
    pytest.importorskip("mypy")
    correct = """\
import dsmtpd
from dsmtpd import Config, Envelope, Server, SMTPError

def handler(envelope: Envelope) -> None:
    if "spam" in envelope.subject:
        raise SMTPError(554, "5.7.1", "Spam is not accepted")

server: Server = Server(Config(port=0), handler=handler)
with dsmtpd.capture(handler=handler) as inbox:
    subject: str = inbox.wait(to="user@test.com", timeout=5).subject
"""
    wrong = {
        'inbox.wait(too="user@test.com")': 'Unexpected keyword argument "too"',
        "number: int = inbox.wait().subject": 'expression has type "str"',
        'SMTPError(554, "5.7.1", b"Spam")': 'Argument 3 to "SMTPError"',
        "inbox.mails": '"Inbox" has no attribute "mails"',
    }
    (tmp_path / "user.py").write_text(correct + "\n".join(wrong) + "\n", "utf-8")
    # mypy reads PYTHONPATH like site-packages, and MYPYPATH like the user's own code.
    environment = {**os.environ, "PYTHONPATH": str(site), "MYPYPATH": ""}
    mypy = (sys.executable, "-m", "mypy", "--config-file=", "--strict")
    completed = execute(*mypy, "user.py", cwd=tmp_path, env=environment)
    errors = [line for line in completed.stdout.splitlines() if ": error: " in line]
    assert len(errors) == len(wrong), completed.stdout + completed.stderr
    first = correct.count("\n") + 1
    for number, (error, text) in enumerate(zip(errors, wrong.values(), strict=True), first):
        assert error.startswith(f"user.py:{number}: error: ")
        assert text in error


# --- Capture --------------------------------------------------------------------------------


def send(inbox: dsmtpd.Inbox, to: str = "c@d", subject: str = "Hi", sender: str = "a@b") -> None:
    with smtplib.SMTP(inbox.host, inbox.port) as client:
        client.sendmail(sender, [to], f"Subject: {subject}")


def test_capture() -> None:
    with dsmtpd.capture(ignore=list(dsmtpd.WARNINGS)) as inbox:
        assert inbox.url == f"smtp://127.0.0.1:{inbox.port}"
        assert inbox.cafile is None
        send(inbox, "one@x", "First")
        send(inbox, "two@x", "=?utf-8?q?Zw=C3=B6lf?=", sender="z@x")
        assert [message.subject for message in inbox.messages] == ["First", "Zwölf"]
        assert inbox.wait().subject == "First"
        assert inbox.wait(to="two@x").subject == "Zwölf"
        assert inbox.wait(mail_from="z@x", subject="ölf").rcpt_tos == ["two@x"]
        assert inbox.wait(subject="First").email["Subject"] == "First"
        assert inbox.wait_for(2) == inbox.messages
        assert len(inbox.wait_for(1)) == 1
        text = "0 of 1 messages with to 'three@x' within 0.01 seconds; " + inbox.report()
        with pytest.raises(TimeoutError, match=re.escape(text)):
            inbox.wait(to="three@x", timeout=0.01)
        inbox.clear()
        assert inbox.report() == "nothing arrived from the clients that connected: 2"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((inbox.host, inbox.port))


def test_capture_exceptions() -> None:
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError), dsmtpd.capture() as inbox:  # noqa: PT012
        idle = socket.create_connection((inbox.host, inbox.port))
        raise ZeroDivisionError
    idle.close()
    with dsmtpd.capture() as inbox, pytest.raises(OSError, match="in use"):
        with dsmtpd.capture(port=inbox.port):
            pass
    assert threading.active_count() == before


def test_capture_waits_for_quit() -> None:
    for _ in range(20):
        with dsmtpd.capture() as inbox:
            sender = threading.Thread(target=send, args=(inbox,))
            sender.start()
            inbox.wait()
        # pytest fails the test if the thread raises an exception.
        sender.join()


def test_capture_with_an_idle_client() -> None:
    """A connection that was idle before the end of the block does not delay it."""

    async def scenario(server: Server, connect: Connect) -> None:
        await connect()
        for connection in server._connections.values():
            connection.last_activity -= 60
        await asyncio.wait_for(server.close(59), 5)

    serve(scenario)


def test_capture_with_a_stopped_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that stop the clock also end, and their clients have time to send QUIT."""
    monkeypatch.setattr(time, "monotonic", lambda: 1.0)
    with dsmtpd.capture() as inbox:
        idle = socket.create_connection((inbox.host, inbox.port))
        assert idle.recv(100).startswith(b"220 ")
        send(inbox)
        assert inbox.wait().subject == "Hi"
        start = time.perf_counter()
    assert time.perf_counter() - start < 2
    assert idle.recv(100) == b"421 4.3.2 Shutting down\r\n"
    idle.close()


def test_concurrent_captures() -> None:
    with contextlib.ExitStack() as stack:
        inboxes = [stack.enter_context(dsmtpd.capture()) for _ in range(10)]
        executor = stack.enter_context(concurrent.futures.ThreadPoolExecutor())
        for number, inbox in enumerate(inboxes):
            for _ in range(3):
                executor.submit(send, inbox, f"{number}@x")
        for number, inbox in enumerate(inboxes):
            messages = inbox.wait_for(3)
            assert {message.rcpt_tos[0] for message in messages} == {f"{number}@x"}


def test_handler_and_directory(tmp_path: Path) -> None:
    """The message is stored first; the handler finds it."""
    stored = []

    def handler(envelope: Envelope) -> None:
        assert envelope.path is not None
        stored.append(envelope.path.read_bytes())

    with dsmtpd.capture(handler=handler, directory=tmp_path / "mail", max_size=500) as inbox:
        send(inbox)
        path = inbox.wait().path
        with pytest.raises(smtplib.SMTPSenderRefused, match="exceeds"):
            send(inbox, subject="x" * 500)
    assert path is not None
    assert path.parent == tmp_path / "mail" / "new"
    assert stored == [path.read_bytes()]


def test_rules_and_refusals() -> None:
    with dsmtpd.capture(fail=["RCPT * 451 4.7.1 Greylisted"]) as inbox:
        with pytest.raises(smtplib.SMTPRecipientsRefused):
            send(inbox)
        inbox.fail(". * 554 5.6.0 No", "DATA * ok")
        with pytest.raises(smtplib.SMTPDataError, match="No"):
            send(inbox)
        with pytest.raises(ValueError, match="it must begin with one of"):
            inbox.fail("nonsense")
        inbox.fail()
        send(inbox)
        assert len(inbox.messages) == 1
        first, second = inbox.refused
        assert (first.verb, first.argument.upper()) == ("RCPT", "TO:<C@D>")
        assert (second.verb, second.argument) == (".", "a@b -> c@d [Hi]")
        assert [str(item.reply) for item in (first, second)] == [
            "451 4.7.1 Greylisted",
            "554 5.6.0 No",
        ]
        assert first.time <= second.time
        inbox.clear()
        assert inbox.refused == []


@OPENSSL
def test_cafile_of_the_command(tmp_path: Path) -> None:
    code = (
        "import os, smtplib, ssl\n"
        "context = ssl.create_default_context(cafile=os.environ['DSMTPD_CAFILE'])\n"
        "port = int(os.environ['SMTP_PORT'])\n"
        "with smtplib.SMTP_SSL('localhost', port, context=context) as client: client.noop()\n"
    )
    completed = command("-p", "0", "--tls", "implicit", "--", sys.executable, "-c", code)
    assert completed.returncode == 0, completed.stderr


# The start of a message, and what follows it again and again.
LARGE = [
    (b": x\n\n", b""),
    (b'From: <<<>>>@@,;:\nTo: "\nDate: yesterday\nMessage-ID: <\nSender: @\n\n', b""),
    (b'Subject: =?utf-8?b?////?= =?x?y?z?=\nContent-Type: =?;;="\nMIME-Version: x.y\n\n', b""),
    (b"Content-Type: multipart/mixed\n\n--\n", b""),
    (b'Content-Type: multipart/mixed; boundary="\xff"\n\n--\xff\n\n--\xff--', b""),
    (b"Content-Type: text/plain; charset=\"\x00\"; charset*0*=x''%\n\n\xff", b""),
    (b"Content-Disposition: ; filename*=''\nContent-Transfer-Encoding: base64\n\n!", b""),
    (b"To: =?utf-7?q?+2AA-?= <a@[>, ;;\n\n", b""),
    (b"", b"Content-Type: message/rfc822\r\n\r\n"),
    (
        b"".join(b"Content-Type: multipart/x; boundary=%d\n\n--%d\n" % (n, n) for n in range(3000)),
        b"",
    ),
    (b"Content-Disposition: attachment; " + b'filename*1="a";' * 20_000, b""),
    (b"", b"Content-Type: multipart/mixed; boundary=a\r\n\r\n--a\r\n"),
    (b"Content-Type: multipart/digest; boundary=B\r\n", b"\r\n--B\r\n\r\n"),
    (b'Content-Type: multipart/mixed; boundary="a:b"\r\n\r\n', b"--a:b\n"),
    (b"Content-Type: multipart/mixed; boundary=B\r\n\r\n", b"--B\r\nContent-Type: (((((\r\n\r\n"),
    (b"Content-Type: text/plain", b'; a="\\'),
    (b"Content-Type: text/plain; charset=", b"(a)' "),
    (b"Content-Disposition: attachment; filename*0=a", b"; filename*1=b"),
    (b"To: ", b"(a)("),
    (b"Subject: ", b"=?utf-8?q?a?= =?"),
    (b"Subject: a", b"\r\r\n "),
    (b"a", b" "),
    (b"Content-Transfer-Encoding: base64\r\n\r\n", b"Y="),
    (b"Content-Type: text/plain; charset=iso-2022-jp\r\n\r\n", b"\x1b$B\xff!"),
    (b"Content-Type: text/plain; charset=punycode\r\n\r\n", b"a-"),
    (b"\r\n", b"https://a(\xe3\x80\x82"),
    (b"Content-Type: text/html\r\n\r\n<a href='", b"&a&#1"),
    (b"Content-Type: text/html\r\n\r\n<a ", b"= "),
    (b"Content-Type: text/html\r\n\r\n<script>", b"</script\r\n"),
    *(
        (b"Content-Type: text/html\r\n\r\n", markup)
        for markup in b"<|<a |<a b='|<a b=\"c|<a '|<a href=b>|<!--|<td>|&a|&#1".split(b"|")
    ),
]


@pytest.mark.parametrize(("start", "unit"), LARGE)
def test_malformed_and_large_messages(start: bytes, unit: bytes) -> None:
    """The time is linear: a quadratic search takes ten times the limit, and more."""
    message = envelope(content=start + unit * (100_000 // max(len(unit), 1)))
    began = time.process_time()
    dsmtpd._as_text(message).encode()
    assert time.process_time() - began < 2


@pytest.mark.parametrize("seed", range(50))
def test_random_headers(seed: int) -> None:
    generator = random.Random(seed)
    names = "From To Content-Type Subject Content-Disposition Content-Transfer-Encoding".split()
    atoms = ["\r\n ", " ", *"<>\"@;:,()\\'=[]\0éa1%.", "=?utf-8?q?", "?=", "*0*=", "boundary"]
    atoms += ["multipart/mixed", "charset", "filename"]
    lines = [f"{name}: {''.join(generator.choices(atoms, k=9))}\r\n" for name in names]
    lines += ["\r\n", "".join(generator.choices([*atoms, "https://", "<a href=", "&#"], k=300))]
    message = envelope(content="".join(lines).encode())
    dsmtpd._as_text(message).encode()


MARKER_FILE = """
import pytest

pytestmark = pytest.mark.smtpd(max_size=1000, strict=True)

def ehlo(smtpd):
    import smtplib
    with smtplib.SMTP(smtpd.host, smtpd.port) as client:
        client.ehlo()
        return client.esmtp_features["size"], client.has_extn("starttls"), client.rcpt("x")

def test_module(smtpd):
    assert ehlo(smtpd)[0] == "1000"

@pytest.mark.smtpd(max_size=2000, fail=["RCPT * 451 4.7.1 Later"])
class TestClass:
    def test_class(self, smtpd):
        assert ehlo(smtpd) == ("2000", False, (451, b"4.7.1 Later"))

    @pytest.mark.smtpd(max_size=3000)
    def test_function(self, smtpd):
        assert ehlo(smtpd) == ("3000", False, (451, b"4.7.1 Later"))

@pytest.mark.smtpd(fial=[])
def test_unknown(smtpd): pass

@pytest.mark.smtpd("starttls")
def test_positional(smtpd): pass
"""


def run_pytest(folder: Path, *arguments: str) -> str:
    """Run pytest with a copy of the module, and return its output."""
    shutil.copy(SCRIPT, folder)
    pytest_line = (sys.executable, "-m", "pytest", "-W", "error", "-q", "--strict-markers")
    return execute(*pytest_line, *arguments, cwd=folder).stdout


FAILING_FILE = """
import asyncio, smtplib, pytest

def send(smtpd, *recipients):
    with smtplib.SMTP(smtpd.host, smtpd.port) as client:
        for recipient in recipients:
            client.sendmail("a@b", recipient, "Subject: Hi")

@pytest.mark.smtpd(fail=["RCPT bad@* 550 5.1.1 Unknown"], ignore=["missing-from", "missing-date"])
def test_other_recipient(smtpd):
    with pytest.raises(smtplib.SMTPRecipientsRefused):
        send(smtpd, "c@d", "bad@d")
    smtpd.wait(to="you@d", timeout=0.01)

def test_nothing_arrived(smtpd):
    assert smtpd.messages

def test_client_without_a_message(smtpd):
    send(smtpd)
    assert smtpd.messages

def test_wait_async(smtpd):
    async def sign_up():
        asyncio.get_running_loop().call_soon(send, smtpd, "c@d")
        return await smtpd.wait_async(to="c@d")
    assert asyncio.run(sign_up()).rcpt_tos == ["c@d"]
"""


def test_pytest_plugin(tmp_path: Path) -> None:
    """Each test has an inbox of its own, and a failed one reports what the server received."""
    # pytest warns of an imported module that it cannot rewrite, if it does not forbid that.
    (tmp_path / "conftest.py").write_text('import dsmtpd\npytest_plugins = ["dsmtpd"]')
    (tmp_path / "test_fixture.py").write_text(FAILING_FILE)
    (tmp_path / "test_marker.py").write_text(MARKER_FILE)
    output = run_pytest(tmp_path, "--show-capture=all").replace("RCPT to:", "RCPT TO:")
    assert "3 failed, 4 passed, 2 errors" in output, output
    received = (
        "received a@b -> c@d [Hi]\n"
        "  missing-message-id: no Message-ID field (RFC 5322 section 3.6.4)\n"
        "refused RCPT TO:<bad@d>: 550 5.1.1 Unknown\n"
    )
    assert received in output
    assert "Captured smtpd call" in output
    assert "\nnothing arrived, and no client connected\n" in output
    assert "\nnothing arrived from the clients that connected: 1\n" in output
    assert "TypeError: unknown option 'fial'; the options are interface, port" in output
    assert "TypeError: the options of the marker smtpd are keyword arguments" in output
    failures = output.partition("= FAILURES =")[2]
    assert "dsmtpd.py:" not in failures.replace("dsmtpd:dsmtpd.py:", "")  # no line of its source
    check = "import sys, dsmtpd; sys.exit('pytest' in sys.modules)"
    assert execute(sys.executable, "-c", check, cwd=tmp_path).returncode == 0


def test_fixture_of_smtpdfix_wins(tmp_path: Path) -> None:
    (tmp_path / "smtpdfix").mkdir()
    (tmp_path / "smtpdfix" / "__init__.py").touch()
    (tmp_path / "smtpdfix" / "fixture.py").write_text(
        "import pytest\n@pytest.fixture\ndef smtpd(): return 'smtpdfix'\n"
    )
    (tmp_path / "test_it.py").write_text("def test_it(smtpd): assert smtpd == 'smtpdfix'\n")
    assert "1 passed" in run_pytest(tmp_path, "-p", "smtpdfix.fixture", "-p", "dsmtpd")


def python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run code that can import dsmtpd."""
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    return execute(sys.executable, "-c", code, cwd=cwd, env=environment)


@POSIX
def test_interrupt_while_capture_starts(tmp_path: Path) -> None:
    code = (
        "import dsmtpd, os, signal\n"
        "listen = dsmtpd.listen\n"
        "def interrupted(config):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    return listen(config)\n"
        "dsmtpd.listen = interrupted\n"
        "with dsmtpd.capture(): pass\n"
    )
    completed = python(code, tmp_path)
    assert completed.stderr.strip().endswith("KeyboardInterrupt")


@pytest.mark.parametrize(
    "code", ["", "class A:\n def __del__(self): block.__exit__(*3 * [None])\na = A()\n"]
)
def test_capture_that_is_left_open(code: str, tmp_path: Path) -> None:
    """The program can end, as it does in a REPL, although the thread of the server runs."""
    start = (
        "import dsmtpd\ndsmtpd.HANDLER_TIMEOUT = 60\nblock = dsmtpd.capture()\nblock.__enter__()\n"
    )
    completed = python(start + code, tmp_path)
    assert (completed.returncode, completed.stderr) == (0, "")


@pytest.mark.skipif(sys.platform != "linux", reason="needs shutdown() of listening sockets")
def test_forked_child_does_not_keep_the_port(tmp_path: Path) -> None:
    code = (
        "import dsmtpd, os, socket\n"
        "reader, writer = os.pipe()\n"
        "with dsmtpd.capture() as inbox:\n"
        "    if os.fork() == 0:\n"
        "        os.close(writer)\n"
        "        os.read(reader, 1)  # until the parent process ends\n"
        "        os._exit(0)\n"
        "try: socket.create_connection((inbox.host, inbox.port))\n"
        "except ConnectionRefusedError: print('refused')\n"
        "with dsmtpd.capture(port=inbox.port): print('listening')\n"
    )
    assert python(code, tmp_path).stdout == "refused\nlistening\n"


def test_handler_that_does_not_return(tmp_path: Path) -> None:
    """Leaving the block raises an error, and the program can end."""
    code = (
        "import dsmtpd, smtplib, threading\n"
        "dsmtpd.HANDLER_TIMEOUT = 0.2\n"
        "received = threading.Event()\n"
        "def hangs(envelope):\n"
        "    received.set()\n"
        "    threading.Event().wait()\n"
        "with dsmtpd.capture(handler=hangs) as inbox:\n"
        "    client = smtplib.SMTP(inbox.host, inbox.port)\n"
        "    client.ehlo(); client.mail('a@b'); client.rcpt('c@d'); client.docmd('DATA')\n"
        "    client.send('Subject: Hi\\r\\n.\\r\\n')\n"
        "    received.wait()\n"
    )
    completed = python(code, tmp_path)
    assert "RuntimeError: the server did not stop within 0.2 s: the handler <function hangs" in (
        completed.stderr
    )
    assert completed.returncode == 1


def test_capture_on_all_interfaces() -> None:
    with dsmtpd.capture(interface="0.0.0.0") as inbox:
        assert inbox.host == "127.0.0.1"
        assert inbox.url == f"smtp://127.0.0.1:{inbox.port}"
        send(inbox)
        inbox.wait()


# The last one ignores that the event loop cancels it.
HANDLERS = """
import asyncio, contextlib, os, signal, threading, time, dsmtpd
dsmtpd.HANDLER_TIMEOUT = 0.2
def hang(envelope): threading.Event().wait()
async def block(envelope):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
async def persist(envelope):
    while True:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
"""


@POSIX
@pytest.mark.parametrize(
    ("handler", "options", "status", "error"),
    [
        ("hang", ["--timeout", "0.1"], 1, "The handler handlers:hang did not return within 0.2 s"),
        ("persist", ["--expect", "1", "--timeout", "0.1"], 1, "The handler handlers:persist did"),
        ("block", [], -signal.SIGTERM, ""),
    ],
)
def test_handler_that_hangs_in_the_program(
    handler: str, options: list[str], status: int, error: str, tmp_path: Path
) -> None:
    """A second signal ends the program also while the event loop is blocked."""
    (tmp_path / "handlers.py").write_text(HANDLERS)
    options = ["--handler", f"handlers:{handler}", *options]
    with process(*options, cwd=tmp_path, last_line="Handing the") as server:
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(b"EHLO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n\r\n.\r\n")
            returncode, text = server.wait()
    assert returncode == status
    assert error in text
    assert "Traceback" not in text


def test_older_python(tmp_path: Path) -> None:
    source = SCRIPT.read_text("utf-8")
    ast.parse(source, feature_version=(3, 8))  # so that Python 3.8 runs the check
    first = next(line for line in source.splitlines() if ":=" in line)
    assert first.endswith("# dsmtpd requires Python 3.10 or newer")  # a syntax error shows it
    code = f"import runpy, sys; sys.version_info = (3, 9); runpy.run_path({str(SCRIPT)!r})"
    completed = python(code, tmp_path)
    assert completed.returncode == 1
    assert completed.stderr == "dsmtpd requires Python 3.10 or newer, not 3.9\n"


# --- Options for CI -------------------------------------------------------------------------

SENDER = """
import os, smtplib, sys
with smtplib.SMTP(os.environ["SMTP_HOST"], int(os.environ["SMTP_PORT"])) as client:
    for number in range(int(sys.argv[1])):
        client.sendmail("a@b", ["c@d"], f"Subject: {number}")
print(len(os.listdir(os.environ["DSMTPD_MAILDIR"] + "/new")))
"""
SEND = [sys.executable, "-c", SENDER]
TRY_TO_SEND = [sys.executable, "-c", f"try: exec({SENDER!r})\nexcept smtplib.SMTPException: pass"]


@pytest.fixture
def temp_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory in which the program creates temporary Maildirs."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.setenv(name, str(folder))
    return folder


@pytest.mark.parametrize(
    ("arguments", "status", "error"),
    [
        (["--", *SEND, "1"], 0, ""),
        (["--expect", "2", "--", *SEND, "2"], 0, ""),
        (["--expect", "2", "--", *SEND, "3"], 0, ""),
        (["--expect", "2", "--", *SEND, "1"], 1, "Expected messages: 2, arrived: 1, rejected by"),
        (["--expect", "1", "--", *SEND, "0"], 1, "Django's test backend do not send to this"),
        (["--expect", "0", "--", *SEND, "0"], 0, ""),
        (["--expect", "0", "--", *TRY_TO_SEND, "1"], 1, "Expected messages: 0, arrived: 1"),
        (["--strict", "--", *TRY_TO_SEND, "1"], 0, ""),
        (["--strict", "--expect", "0", "--", *TRY_TO_SEND, "1"], 1, "rejected by --strict: 1"),
        (["--", sys.executable, "-c", "exit(7)"], 7, ""),
        (["--expect", "1", "--", sys.executable, "-c", "exit(7)"], 7, "Expected messages: 1"),
        (["--", "no-such-command"], 127, "Cannot run no-such-command: No such file or directory"),
        (["-d", "mail", "--timeout", "0.1"], 0, ""),
        (["-d", "mail", "--timeout", "0.1", "--expect", "0"], 0, ""),
        (["-d", "mail", "--timeout", "0.1", "--expect", "1"], 1, "Expected messages: 1"),
    ],
)
def test_exit_status(
    arguments: list[str],
    status: int,
    error: str,
    main: Callable[..., Any],
    temp_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(*arguments) == status
    errors = [item.getMessage() for item in caplog.records if item.levelname == "ERROR"]
    assert len(errors) == bool(error)
    assert error in "".join(errors)
    assert list(temp_dir.iterdir()) == []


@pytest.mark.parametrize(("expected", "status"), [("10", 0), ("0", 1)])
def test_expect_with_many_clients(expected: str, status: int, tmp_path: Path) -> None:
    """Each client whose message was accepted can send QUIT."""
    with process("--expect", expected, "-d", tmp_path / "mail", cwd=tmp_path) as server:
        clients = [smtplib.SMTP("127.0.0.1", server.port) for _ in range(10)]
        for client in clients:
            client.ehlo()
            client.mail("a@b")
            client.rcpt("c@d")
            client.docmd("DATA")
        for client in clients:
            client.send(CLEAN + "\r\n.\r\n")
        assert {client.getreply()[0] for client in clients} == {250}
        assert {client.quit()[0] for client in clients} == {221}
        assert server.wait()[0] == status


@POSIX
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("text", ["Starting", "Storing", "Found", "Cleaning"])
@pytest.mark.parametrize("has_command", [False, True])
def test_signal_at_a_log_line(
    number: int, text: str, has_command: bool, main: Callable[..., Any], temp_dir: Path
) -> None:
    """The program stops in order; a command does not run."""

    def raise_signal(record: logging.LogRecord) -> bool:
        if record.getMessage().startswith(text):
            signal.raise_signal(number)
        return True

    dsmtpd.log.addFilter(raise_signal)
    arguments = ["--", *SEND, "1"] if has_command else ["-d", str(temp_dir.parent / "mail")]
    if text == "Cleaning" and not has_command:
        arguments += ["--timeout", "0.01"]
    try:
        status = main(*arguments)
    finally:
        dsmtpd.log.removeFilter(raise_signal)
    assert status == (128 + number if has_command and text != "Cleaning" else 0)
    assert list(temp_dir.iterdir()) == []


# Sends a message at the first SIGTERM, and ends with status 5 at the next one.
SEND_AT_SIGTERM = f"""
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
os.write(1, b"ready\\n")
signal.sigwait([signal.SIGTERM])
sys.argv[1:] = ["1"]
exec({SENDER!r})
sys.stdout.flush()
signal.sigwait([signal.SIGTERM])
sys.exit(5)
"""
SLEEP = ["sh", "-c", "echo ready; exec sleep 60"]
EXIT_0_AT_SIGTERM = ["sh", "-c", "trap 'exit 0' TERM; echo ready; while :; do sleep 0.02; done"]
IGNORE_SIGTERM = ["sh", "-c", "trap '' TERM; echo ready; exec sleep 60"]


@POSIX
@pytest.mark.parametrize(
    ("options", "command_line", "signals", "status"),
    [
        ("", SLEEP, "SIGTERM", 128 + 15),
        ("", SLEEP, "SIGINT SIGHUP", 128 + 1),
        ("", [sys.executable, "-c", SEND_AT_SIGTERM], "SIGINT SIGTERM sent SIGINT SIGTERM", 5),
        ("--timeout 0.2", SLEEP, "", 128 + 15),
        ("--timeout 0.2", EXIT_0_AT_SIGTERM, "", 128 + 15),
        ("--timeout 0.2", IGNORE_SIGTERM, "", 128 + 9),
    ],
)
def test_signals_with_command(
    options: str, command_line: list[str], signals: str, status: int, temp_dir: Path
) -> None:
    """SIGINT is left to the terminal; the others are passed on, and the server continues."""
    starter = "import sys, dsmtpd; dsmtpd.KILL_TIMEOUT = 0.2; dsmtpd.main(sys.argv[1:])"
    program = [sys.executable, "-W", "error", "-c", starter, "-p", "0", *options.split(), "--"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with (
        subprocess.Popen([*program, *command_line], **pipes, encoding="utf-8", cwd=HERE) as running,
        contextlib.ExitStack() as stack,
    ):
        stack.callback(running.kill)
        assert running.stdout is not None
        assert running.stdout.readline() == "ready\n"
        for name in signals.split():
            if name == "sent":
                assert running.stdout.readline() == "1\n"
            else:
                running.send_signal(signal.Signals[name])
        _, text = running.communicate(timeout=20)
    assert running.returncode == status
    assert "Cleaning up" in text
    assert (" a@b -> c@d [0]" in text) is ("sent" in signals)
    assert list(temp_dir.iterdir()) == []


@POSIX
def test_command_at_a_terminal(tmp_path: Path) -> None:
    """Ctrl-C reaches the command, which has the terminal, and the program waits for it."""
    starter = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    starter += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    program = [sys.executable, "-c", starter, str(SCRIPT), "-p", "0"]
    code = "trap 'sleep 0.1; exit 7' INT; echo ready > /dev/tty; while :; do sleep 0.02; done"
    try:
        terminal, device = os.openpty()
    except OSError:
        pytest.skip("needs a pseudo-terminal")
    with os.fdopen(terminal, "r+b", buffering=0) as file, os.fdopen(device) as device_file:
        with subprocess.Popen(
            [*program, "--", "sh", "-c", code], stdin=device_file, start_new_session=True
        ) as running:
            assert file.readline() == b"ready\r\n"
            file.write(b"\x03")
            assert running.wait(20) == 7


@POSIX
@pytest.mark.parametrize(
    ("name", "code"), [("SIGCHLD", "exit 7"), ("SIGHUP", "kill -HUP $PPID; exit 7")]
)
def test_signals_that_the_parent_ignores(name: str, code: str) -> None:
    """SIGHUP stays ignored, as with nohup; SIGCHLD must not."""
    starter = f"import signal, dsmtpd; signal.signal(signal.{name}, signal.SIG_IGN); "
    starter += f"dsmtpd.main(['-p', '0', '--', 'sh', '-c', '{code}'])"
    assert execute(sys.executable, "-c", starter, cwd=HERE).returncode == 7


def test_warnings_for_smtplib() -> None:
    message = email.message.EmailMessage()
    message["From"], message["To"], message["Subject"] = "a@b", "c@d", "Grüße"
    with dsmtpd.capture(ignore=["missing-date", "missing-message-id"]) as inbox:
        with smtplib.SMTP(inbox.host, inbox.port) as client:
            for text in ("Hello!", "Grüße"):
                message.set_content(text)
                client.send_message(message)
                client.send_message(message, mail_options=["BODY=8BITMIME"])
    assert [envelope.warnings for envelope in inbox.messages] == [[]] * 4


@pytest.mark.filterwarnings("ignore")  # newer versions of Django deprecate get_connection()
@pytest.mark.parametrize("text", ["Grüße aus Köln", "こんにちは世界"])
def test_django_messages_have_no_warnings(text: str) -> None:
    """In any language, as Django sends them by default."""
    django = pytest.importorskip("django")
    mail = pytest.importorskip("django.core.mail")
    if not django.conf.settings.configured:
        django.conf.settings.configure(USE_I18N=False)
    backend = "django.core.mail.backends.smtp.EmailBackend"
    with dsmtpd.capture(strict=True) as inbox:
        connection = mail.get_connection(backend, host=inbox.host, port=inbox.port)
        addresses = ("a@b.test", ["c@d.test"], ["e@f.test"], connection)
        message = mail.EmailMultiAlternatives(text, text * 500, *addresses)
        message.attach_alternative(f"<p>{text}</p>", "text/html")
        message.attach("größe.txt", text, "text/plain")
        message.send()
    (envelope,) = inbox.messages
    assert (envelope.text.strip(), envelope.html.strip()) == (text * 500, f"<p>{text}</p>")
    assert envelope.attachments[0].name == "größe.txt"


NODEMAILER = """
const transport = require("nodemailer").createTransport({host: process.env.SMTP_HOST,
    port: process.env.SMTP_PORT, ignoreTLS: true});
const send = text => transport.sendMail({from: "a@b.test", to: "c@d.test", bcc: "e@f.test",
    subject: text, text, html: `<p>${text}</p>`,
    attachments: [{filename: "größe.txt", content: text}]});
send("Grüße aus Köln").then(() => send("こんにちは世界"));
"""


@pytest.mark.skipif(not shutil.which("node"), reason="needs Node.js")
def test_nodemailer_messages_have_no_warnings(tmp_path: Path) -> None:
    """With the folder of Nodemailer in NODE_PATH."""
    if execute("node", "-e", "require('nodemailer')").returncode:
        pytest.skip("needs Nodemailer")
    completed = command("-p", "0", "--strict", "--expect", "2", "--", "node", "-e", NODEMAILER)
    assert completed.returncode == 0, completed.stderr
    assert "WARNING" not in completed.stderr


# --- Output ---------------------------------------------------------------------------------


def test_json(main: Callable[..., Any], tmp_path: Path) -> None:
    """The events are appended to the file; test_json_of_the_readme() tests their other fields."""
    path = tmp_path / "events.jsonl"
    path.write_text("{}\n")
    options = ["-d", tmp_path / "mail", "--json", "-o", path]
    options += ["--fail", ". *1* 554 5.7.1 Looks like spam"]
    assert main(*options, "--", *SEND, "2") == 1  # smtplib raises
    _, listening, message, refused = map(json.loads, path.read_text("utf-8").splitlines())
    assert listening["port"] > 0
    assert listening["version"] == dsmtpd.__version__
    assert datetime.fromisoformat(message["time"]).tzinfo is not None
    assert refused["time"] >= message["time"]
    assert message["peer"].startswith("127.0.0.1:")
    assert refused["peer"] == message["peer"]
    assert Path(message["path"]).parent == tmp_path / "mail" / "new"
    assert (message["mail_options"], message["links"], message["size"]) == ({"SIZE": "10"}, [], 12)
    warnings = "missing-date missing-from missing-message-id".split()
    assert [text.partition(":")[0] for text in message["warnings"]] == warnings
    assert (refused["verb"], refused["argument"]) == (".", "a@b -> c@d [1]")


def test_json_flush_and_closed_pipe(tmp_path: Path) -> None:
    with process("--json", "-d", tmp_path / "mail", cwd=tmp_path, stdout=subprocess.PIPE) as server:
        output = server.popen.stdout
        assert output is not None
        assert json.loads(output.readline())["port"] == server.port
        with smtplib.SMTP("127.0.0.1", server.port) as client:
            client.sendmail("a@b", ["c@d"], b"Subject: \xff=?utf-7?q?+2AA-?=")
            assert json.loads(output.readline())["subject"] == "\ufffd?"
            output.close()
            for _ in range(3):
                client.sendmail("a@b", ["c@d"], "Subject: Hi")
        status, text = server.stop()
    assert status == 0
    assert text.count("WARNING: Cannot write to standard output: ") == 1
    assert len(mailbox.Maildir(tmp_path / "mail")) == 4


@POSIX
def test_output_that_nobody_reads(tmp_path: Path) -> None:
    """Messages are stored all the same, and the program ends at a signal."""
    code = "import sys, dsmtpd; dsmtpd.OUTPUT_TIMEOUT = 0.2; dsmtpd.main(sys.argv[1:])"
    content = f"{CLEAN}\r\n" + "Hello!\r\n" * 20_000  # more than a pipe holds
    source, target = os.pipe()
    options: dict[str, Any] = {"cwd": HERE, "program": ("-c", code), "stdout": target}
    try:
        with process("--json", "-d", tmp_path / "mail", **options) as server:
            with smtplib.SMTP("127.0.0.1", server.port, timeout=10) as client:
                for _ in range(3):
                    client.sendmail("a@b", ["c@d"], content)
            status, text = server.stop()
    finally:
        os.close(source)
        os.close(target)
    assert status == 0
    assert "ERROR: Cannot write to standard output in time: the rest is lost" in text
    assert len(mailbox.Maildir(tmp_path / "mail")) == 3


def test_output_queue(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Slow writes are waited for; what exceeds the limit, or fails, is lost with one warning."""
    monkeypatch.setattr(dsmtpd, "MAX_WAITING_OUTPUT", 10)
    added = threading.Event()
    written: list[str] = []

    def write(text: str) -> None:
        added.wait()
        if text == "fails":
            raise OSError("no space left")
        written.append(text)

    for first, size, reason in (
        ("large", 20, "too much is waiting"),
        ("fails", 5, "no space left"),
    ):
        caplog.clear()
        added.clear()
        output = dsmtpd._Output("the file", write)
        output.put(first, size)
        output.put("second", 1)
        added.set()
        output.close()
        assert caplog.messages == [f"Cannot write to the file: {reason}"]
    assert written == ["large", "second"]


def test_print_as_sent() -> None:
    """Only what a terminal would interpret is escaped."""
    lines = "To: b@b.test <c@c.test>,\r\n\t(x|to : =?utf-8?q?a=0A=1B?= =?utf-8?q?b_?= [d]|"
    lines += "Cc: [object Object]|Content-Type: multipart/mixed; boundary=1||--1||"
    lines += "日本\u3000語\u202f1\xa0\u200f\u061c\u200c\u200d\xad\t|\x1b[0m\x7f\x9b\u202e\u2066\r|"
    message = mime(*f"{lines}--1|| \t|--1||https://a.test".split("|"))
    assert dsmtpd._as_text(message) == (
        "---------- MESSAGE FOLLOWS ----------\n"
        "To: b@b.test <c@c.test>,\t(x\n"
        "To: a\\n\\x1bb  [d]\n"
        "Cc: [object Object]\n"
        "Subject: \n"
        "Envelope: a@x.test -> b@y.test\n"
        "\n"
        "日本\u3000語\u202f1\xa0\u200f\u061c\u200c\u200d\xad\t\n"
        "\\x1b[0m\\x7f\\x9b\\u202e\\u2066\n"
        "\n"
        "https://a.test\n"
        "\n"
        "Links:\n"
        "  https://a.test\n"
        "\n"
        "Attachments:\n"
        "  unnamed (text/plain, 2 bytes)\n"
        "  unnamed (text/plain, 14 bytes)\n"
        "------------ END MESSAGE ------------\n"
    )
    message = envelope(content=HTML_MESSAGE.as_bytes(), rcpt_tos=["c@d", "e@f"], path=Path("1.M2"))
    assert dsmtpd._as_text(message) == (
        "---------- MESSAGE FOLLOWS ----------\n"
        "From: Jürgen <a@b>\n"
        "To: c@d\n"
        "Date: Sat, 21 Nov 2026 12:00:00 +0000\n"
        "Subject: Grüße\n"
        "Envelope: a@x.test -> c@d, e@f\n"
        "File: 1.M2\n"
        "\n"
        "Willkommen\n"
        "\n"
        "Ihr\xa0Link\\x1b[31m\n"
        "\n"
        "HTML: 166 characters\n"
        "\n"
        "Links:\n"
        "  https://example.com/verify?a=1&b=2\n"
        "\n"
        "Attachments:\n"
        "  für.pdf (application/pdf, 4 bytes)\n"
        "------------ END MESSAGE ------------\n"
    )
    lines = "Content-Type: multipart/x; boundary=1||--1||\xa0"
    lines += "|--1|Content-Type: text/html||<p>abc</p>"
    assert "\nabc\n\nHTML: 10 characters\n" in dsmtpd._as_text(mime(*lines.split("|")))


def test_print_of_long_and_binary_content() -> None:
    limit = dsmtpd.MAX_PRINTED_LENGTH
    printed = dsmtpd._as_text(envelope(content=b"\r\n" + b"\x01" * (limit + 5)))
    assert "\\x01" * limit + "\n(5 more characters)\n" in printed
    printed = dsmtpd._as_text(envelope(content=b"\r\nab\0cd"))
    assert "\n(5 bytes of binary content)\n" in printed
    urls = b" ".join(b"https://example.com/%d" % number for number in range(10_000))
    printed = dsmtpd._as_text(envelope(content=b"Subject: " + b"s" * limit + b"\r\n\r\n" + urls))
    assert len(printed) < 4 * limit
    assert printed.count("more characters)") == 2


def test_html_option(
    main: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The log has the address of the pages at the start, and after a command that sent mail."""
    line = f"Open {(tmp_path / 'pages' / 'index.html').as_uri()}"
    assert main("--html", tmp_path / "pages", "-d", tmp_path / "mail", "--timeout", "0.01") == 0
    assert caplog.messages.count(line) == 1
    caplog.clear()
    assert main("--html", tmp_path / "pages", "--", *SEND, "1") == 0
    assert caplog.messages.count(line) == 2
    assert (tmp_path / "pages" / "list.html").read_text("utf-8").count("c@d") == 1


HTML_MESSAGE = email.message.EmailMessage()
HTML_MESSAGE["From"] = "Jürgen <a@b>"
HTML_MESSAGE["To"] = "c@d"
HTML_MESSAGE["Subject"] = "Grüße"
HTML_MESSAGE["Date"] = "Sat, 21 Nov 2026 12:00:00 +0000"
HTML_MESSAGE.set_content(
    "<html><head><style>p {color: red}</style></head><body><h1>Willkommen</h1>"
    "<p>Ihr&nbsp;<a href='https://example.com/verify?a=1&amp;b=2'>Link</a>\x1b[31m</p></body></html>",
    subtype="html",
    charset="iso-8859-1",
)
HTML_MESSAGE.add_attachment(b"%PDF", maintype="application", subtype="pdf", filename="für.pdf")


def test_handler_option(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import dsmtpd\n"
        "class Handler:\n"
        "    async def handle(self, envelope):\n"
        "        open('recorded', 'a').write(envelope.subject)\n"
        "        raise dsmtpd.SMTPError(554, '5.6.0', 'Refused')\n"
        "handler = Handler()\n"
    )
    (tmp_path / "json.py").write_text("raise ImportError('not the standard library')")
    options = ["--json", "--handler", "mine:handler.handle"]
    with process(*options, cwd=tmp_path, last_line="Handing the") as server:
        with smtplib.SMTP("127.0.0.1", server.port) as client:
            with pytest.raises(smtplib.SMTPDataError, match="Refused"):
                client.sendmail("a@b", ["c@d"], "Subject: Hi")
        status, text = server.stop()
    assert status == 0
    assert "Handing the incoming emails to mine:handler.handle" in text
    assert "Maildir" not in text
    assert (tmp_path / "recorded").read_text() == "Hi"
    names = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert names == {"json.py", "mine.py", "recorded"}


# --- README -------------------------------------------------------------------------------

README = (HERE / "README.rst").read_text("utf-8")


def example(text: str) -> str:
    """Return the only literal block of the README that contains the text."""
    blocks = re.findall(r"(?:^\.\. code-block:: \w+|::)\n\n((?:    .*\n|\n)+)", README, re.M)
    (block,) = [block for block in blocks if text in block]
    return textwrap.dedent(block).rstrip("\n") + "\n"


def setting(title: str) -> str:
    """Return the lines below the first such comment in the examples of settings."""
    match = re.search(rf"^    (?:#|//) {title}.*\n((?:    (?!#|//).+\n)+)", README, re.M)
    assert match
    return textwrap.dedent(match[1])


def sh(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command line of the README with the Python under test."""
    line = line.replace("python3", shlex.quote(sys.executable))
    return execute("sh", "-c", line, env={**os.environ, **environment})


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with dsmtpd.py and welcome.py."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(SCRIPT, tmp_path)
    Path("welcome.py").write_text(example("def send_welcome"), "utf-8")
    return tmp_path


@POSIX
def test_first_screen_of_the_readme(checkout: Path) -> None:
    assert dsmtpd.__doc__ is not None
    assert README.split("\n")[2] == dsmtpd.__doc__.split("\n")[0]
    _, *options = shlex.split(example("-d mail --print").removeprefix("python3"))
    (send,) = re.findall('``(python3 -c ".*")``', README)
    output = ["-o", "printed", "--html", "pages"]
    with process(*options, "-p", "0", *output, cwd=checkout) as server:
        assert sh(send, SMTP_PORT=str(server.port)).returncode == 0
        _, text = server.stop()
    line, printed = example("MESSAGE FOLLOWS").split("\n", 1)
    assert re.sub(".*127.0.0.1:[0-9]+", "", line) in text
    varying = re.compile("^(Date: |File: .*/mail/new/).*", re.M)
    assert varying.sub("", Path("printed").read_text("utf-8")) == varying.sub("", printed)
    assert "Welcome" in Path("pages", "list.html").read_text("utf-8")


@POSIX
def test_zipapp_of_the_readme(checkout: Path) -> None:
    assert sh(example("zipapp")).returncode == 0
    for program in ("./dsmtpd.pyz", "python3 -m dsmtpd"):
        assert sh(f"{program} --version").stdout == f"dsmtpd {dsmtpd.__version__}\n"
        assert sh(f"{program} -p 0 -d build").returncode == 2  # build is not a Maildir


@OPENSSL
@pytest.mark.parametrize("folder", [".", "tools"])
def test_pytest_of_the_readme(folder: str, checkout: Path) -> None:
    """The test passes, the marker sets options, and the mail of a failed test is kept."""
    plugins, pythonpath = re.findall("``(pytest_plugins .*?|pythonpath .*?)``", README)
    if folder != ".":
        Path(folder).mkdir()
        Path("dsmtpd.py").rename(Path(folder, "dsmtpd.py"))
        Path("pytest.ini").write_text(f"[pytest]\n{pythonpath}\n")
    Path("conftest.py").write_text(f"{plugins}\n{example('pytest_exception_interact')}")
    (marker,) = re.findall("``(@pytest.mark.smtpd.*?)``", README)
    Path("test_it.py").write_text(
        f"import pytest, smtplib\n{example('def test_welcome(smtpd)')}\n{marker}\n"
        "def test_marker(smtpd):\n"
        "    assert smtpd.cafile\n"
        "    with pytest.raises(smtplib.SMTPRecipientsRefused):\n"
        "        send_welcome('you@example.com', smtpd.port)\n"
        "    send_welcome('you@example.com', smtpd.port)\n"
        "    assert not smtpd.messages\n"
    )
    pytest_line = [sys.executable, "-W", "error", "-m", "pytest", "-p", "no:cacheprovider"]
    completed = execute(*pytest_line)
    assert "1 failed, 1 passed" in completed.stdout, completed.stdout + completed.stderr
    assert "received app@example.com -> you@example.com [Welcome]" in completed.stdout
    assert "Confirm" in Path("failed test_marker 1.html").read_text("utf-8")


@POSIX
def test_json_of_the_readme(checkout: Path) -> None:
    """The events have the fields of the examples, and the table has no other fields."""
    text = re.sub("\n ", "", example('"event": "listening"'))
    examples = [json.loads(line) for line in text.splitlines()]
    program = "import welcome; [welcome.send_welcome(to) for to in ('you@example.com', 'b@x.test')]"
    rule = "RCPT b@x.test 550 5.1.1 Unknown"
    completed = sh(
        f"python3 dsmtpd.py -d mail -p 0 --json --fail '{rule}' -- python3 -c \"{program}\""
    )
    events = [json.loads(line) for line in completed.stdout.splitlines()]
    assert [list(event) for event in events] == [list(event) for event in examples]
    variable = set("time peer port version mail_options argument html links size path".split())
    for event, shown in zip(events, examples, strict=True):
        for name in event.keys() - variable:
            assert event[name] == shown[name], name
    rows = re.findall("^(``time``.*?)^===", README, re.M | re.S)[0].splitlines()
    names = {name for row in rows for name in re.findall(r"``(\w+)``", row[:34])}
    assert names < {name for event in events for name in event}


# Programs that send a message with the settings of the README: {title: (module, program)}
PROGRAMS = {
    "Django": (
        "django",
        "import django.conf, django.core.mail\n{settings}\n"
        "names = {{name: value for name, value in globals().items() if name.isupper()}}\n"
        "django.conf.settings.configure(**names)\n"
        "django.core.mail.send_mail('Grüße', 'Schön', 'app@example.com', ['you@example.com'])",
    ),
    "Flask-Mail": (
        "flask_mail",
        "import flask, flask_mail\napp = flask.Flask('app')\n{settings}\n"
        "with app.app_context():\n"
        "    flask_mail.Mail(app).send_message('Grüße', ['you@example.com'], 'Schön',"
        " sender='app@example.com')",
    ),
    "FastAPI-Mail": (
        "fastapi_mail",
        "import asyncio\nfrom fastapi_mail import *\n{settings}\n"
        "message = MessageSchema(subject='Grüße', recipients=['you@example.com'], body='Schön',"
        " subtype='plain')\n"
        "asyncio.run(FastMail(config).send_message(message))",
    ),
    "Nodemailer": (
        "require('nodemailer')",
        "const nodemailer = require('nodemailer');\n{settings}\n"
        "transport.sendMail({{ from: 'app@example.com', to: 'you@example.com', subject: 'Grüße',"
        " text: 'Schön' }});",
    ),
    "Symfony": (
        "Symfony/Component/Mailer/autoload.php",
        "require 'Symfony/Component/Mailer/autoload.php';\n"
        "require 'Symfony/Component/Dotenv/autoload.php';\n"
        "$settings = (new Symfony\\Component\\Dotenv\\Dotenv())->parse('{settings}');\n"
        "$transport = Symfony\\Component\\Mailer\\Transport::fromDsn($settings['MAILER_DSN']);\n",
    ),
    "Laravel": (
        "Symfony/Component/Mailer/autoload.php",  # Laravel sends with it
        "require 'Symfony/Component/Mailer/autoload.php';\n"
        "function env($name, $default) {{ return getenv($name) ?: $default; }}\n"
        "$settings = [{settings}];\n"
        "$transport = new Symfony\\Component\\Mailer\\Transport\\Smtp\\EsmtpTransport("
        "$settings['host'], $settings['port']);\n",
    ),
}
SYMFONY_SEND = (
    "(new Symfony\\Component\\Mailer\\Mailer($transport))->send("
    "(new Symfony\\Component\\Mime\\Email())->from('app@example.com')->to('you@example.com')"
    "->subject('Grüße')->text('Schön'));"
)


def run_program(title: str, settings: str, inbox: dsmtpd.Inbox, **environment: str) -> Envelope:
    """Send a message with these settings; skip the test if the framework is not installed."""
    module, program = PROGRAMS[title]
    program = program.format(settings=settings.strip())
    if title == "Nodemailer":
        command, check = ["node", "-e"], module
    elif title in ("Symfony", "Laravel"):
        command, check = ["php", "-r"], f"exit((int)!stream_resolve_include_path('{module}'));"
        program += SYMFONY_SEND
    else:
        command, check = [sys.executable, "-c"], f"import {module}"
        program = example("# Flask-Mail").partition("#")[0] + program
    environment |= {"SMTP_HOST": inbox.host, "SMTP_PORT": str(inbox.port)}
    if not shutil.which(command[0]) or execute(*command, check).returncode:
        pytest.skip(f"needs {command[0]} and {module}")
    subprocess.run([*command, program], check=True, env={**os.environ, **environment})
    return inbox.wait(timeout=0)


@pytest.mark.parametrize("title", [*PROGRAMS, "Django 6.1"])
def test_settings_of_the_readme(title: str) -> None:
    if title == "Django 6.1" and pytest.importorskip("django").VERSION < (6, 1):
        pytest.skip("needs Django 6.1")
    with dsmtpd.capture() as inbox:
        message = run_program(title.split()[0], setting(title), inbox)
    assert (message.mail_from, message.subject) == ("app@example.com", "Grüße")
    assert message.text.strip() == "Schön"
    assert message.warnings == []


@POSIX
@pytest.mark.skipif(not shutil.which("msmtp"), reason="needs msmtp")
def test_sendmail_of_php_of_the_readme() -> None:
    (sendmail,) = re.findall("sendmail_path = '(.*)'", README)
    with dsmtpd.capture() as inbox:
        line = f"echo To: you@example.com | {sendmail}"
        assert sh(line, SMTP_PORT=str(inbox.port)).returncode == 0
        assert inbox.wait(timeout=0).rcpt_tos == ["you@example.com"]


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the certificate that the command of the README makes."""
    directory = tmp_path_factory.mktemp("certificate")
    subprocess.run(["sh", "-c", example("openssl req")], cwd=directory, check=True)
    return directory


@POSIX
@OPENSSL
@pytest.mark.parametrize("tls", ["required", "implicit"])
@pytest.mark.parametrize("title", ["Django", "FastAPI-Mail", "Nodemailer"])
def test_tls_settings_of_the_readme(
    title: str, tls: str, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(certificate)
    ((starttls, implicit, trust),) = re.findall(
        rf"^{title} +``(.*?)`` +``(.*?)`` .*``(.*?)``", README, re.M
    )
    option = implicit if tls == "implicit" else starttls
    settings = setting(title)
    if title == "Django":
        settings += option
    elif title == "Nodemailer":
        settings = settings.replace("port }", f"port, {option} }}")
    else:
        off = option.replace("True", "False")
        settings = settings.replace(off, f"{option}, {trust}")
    variables = dict([trust.split("=")]) if trust.endswith("=cert.pem") else {}
    with dsmtpd.capture(tls=tls, cert="cert.pem", key="key.pem") as inbox:
        assert run_program(title, settings, inbox, **variables).tls


def test_django_of_the_readme(checkout: Path) -> None:
    pytest.importorskip("django")
    (checkout / "settings.py").touch()
    (checkout / "test_it.py").write_text(example("SimpleTestCase"))
    django = [sys.executable, "-m", "django", "test", "--settings=settings"]
    subprocess.run(django, check=True, env={**os.environ, "PYTHONPATH": ""})


@POSIX
def test_ci_of_the_readme(checkout: Path) -> None:
    lines = set(re.findall(r"(python3 dsmtpd.py .* -- ./run-tests.sh)", README))
    assert len(lines) == 2
    tests = checkout / "run-tests.sh"
    (send,) = re.findall('``(python3 -c ".*")``', README)
    tests.write_text(f"#!/bin/sh\n{send.replace('python3', shlex.quote(sys.executable))}\n")
    tests.chmod(0o755)
    for line in lines:
        assert sh(line).returncode == 0
    tests.write_text("#!/bin/sh\n")
    for line in lines:
        assert sh(line).returncode == 1


def test_options_of_the_readme() -> None:
    """The options and command lines of the README exist."""
    lines = re.findall(r"python3 /?dsmtpd\.py (-.*)", README)
    assert len(lines) >= 4
    for line in lines:
        dsmtpd.parse_args(line.split())
    options = set(re.findall(r"``(--[a-z-]+)", README))
    assert options <= set(dsmtpd._make_parser()._option_string_actions)
    for rule in re.findall(r"``--fail '(?!VERB)(.*?)'``", README):
        dsmtpd.parse_rule(rule)


def test_options_of_the_help() -> None:
    """The text of --help lists the options that the parser has."""
    shown = set(re.findall(r"(?<![\w-])--?[a-z][a-z0-9-]*", command("-h").stdout))
    assert shown == set(dsmtpd._make_parser()._option_string_actions)


def test_log_lines_of_the_readme() -> None:
    """The lines of the log in the table of remedies are texts of the module."""
    lines = re.findall("^Log: ``(.*?)``", README, re.M)
    assert len(lines) == 4
    for line in lines:
        assert line in SCRIPT.read_text("utf-8")


def test_handler_and_server_of_the_readme() -> None:
    def send_two(server: Server) -> None:
        with smtplib.SMTP(server.host, server.port) as client:
            client.sendmail("a@b", ["c@d"], "")
            with pytest.raises(smtplib.SMTPDataError, match="No such user"):
                client.sendmail("a@b", ["nobody@example.com"], "")

    names: dict[str, Any] = {"asyncio": asyncio, "send_two": send_two}
    (statement,) = re.findall("``(async with .*)``", README)
    statement = statement.replace("1025", "0")
    main = f"async def main():\n    {statement} await asyncio.to_thread(send_two, server)"
    exec(example("async def handler") + main, names)
    run(names["main"])


def test_warnings_of_the_readme() -> None:
    """The README lists the same warnings as the error about an unknown one."""
    table = README.partition("\nWarnings\n--------\n")[2].partition("\nTLS\n---\n")[0]
    listed = re.findall(r"^``([a-z0-9-]+)``", table, re.M)
    error = command("--ignore", "x").stderr.rpartition("argument --ignore")[2]
    assert set(listed) == set(re.findall(r"[a-z0-9]+(?:-[a-z0-9]+)+", error))


# --- Repository ---------------------------------------------------------------------------

SCRIPTS = pytest.mark.skipif(not (HERE / "contrib" / "bump.py").exists(), reason="needs contrib/")
GIT = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
CLONE = pytest.mark.skipif(not (HERE / ".github").exists(), reason="needs a clone")


def read_file(path: str) -> str:
    return (HERE / path).read_text("utf-8")


CHANGES = """\
Changes
=======

Unreleased
----------

- ``-x`` is new:

  - twice.

Version 1.2.3 (2026-01-31)
--------------------------

- ``-w`` is new.
"""

# Git ignores the configuration of the machine.
GIT_ENVIRONMENT = {
    "LC_ALL": "C",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_SYSTEM": os.devnull,
    "GIT_AUTHOR_NAME": "author",
    "GIT_AUTHOR_EMAIL": "author",
    "GIT_COMMITTER_NAME": "author",
    "GIT_COMMITTER_EMAIL": "author",
}


class Project:
    """A Git repository with dsmtpd.py, CHANGES.rst and contrib/bump.py."""

    def __init__(self, root: Path, version: str = "1.2.3") -> None:
        self.root = root
        self.module = root / "dsmtpd.py"
        self.changes = root / "CHANGES.rst"
        root.mkdir()
        self.module.write_text(f'import sys\n\n__version__ = "{version}"\n', newline="\n")
        self.changes.write_text(CHANGES, newline="\n")
        (root / "contrib").mkdir()
        shutil.copy(HERE / "contrib" / "bump.py", root / "contrib")
        self.git("init", "--quiet", "--initial-branch=main")
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", "Commit")

    def run(self, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a program in the repository, without the GIT_ variables that a Git hook sets."""
        env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        env |= {**GIT_ENVIRONMENT, "GIT_CEILING_DIRECTORIES": str(self.root.parent)}
        return execute(*arguments, cwd=self.root, env=env | environment)

    def git(self, *arguments: str | Path) -> str:
        completed = self.run("git", *arguments)
        assert completed.returncode == 0, completed.stderr
        return completed.stdout

    def bump(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "contrib/bump.py", *arguments)

    def files(self) -> dict[str, str]:
        return {path.name: path.read_text() for path in (self.module, self.changes)}


@SCRIPTS
@GIT
@pytest.mark.parametrize(
    ("old", "part", "new"),
    [
        ("1.2.3", "minor", "1.3.0"),
        # CHANGES.rst has no section for these versions, so they are not released yet.
        ("1.3.0rc1", "minor", "1.3.0"),
        ("1.2.10", "patch", "1.2.10"),
    ],
)
def test_bump(old: str, part: str, new: str, tmp_path: Path) -> None:
    """With --dry-run, it prints a diff with the same changes, and changes no file."""
    project = Project(tmp_path / "project", old)
    before = project.files()
    (tmp_path / "diff").write_text(project.bump(part, "--dry-run").stdout, newline="\n")
    assert project.files() == before
    completed = project.bump(part)
    assert (completed.returncode, completed.stdout, completed.stderr) == (0, f"{new}\n", "")
    assert project.module.read_text() == f'import sys\n\n__version__ = "{new}"\n'
    changes = project.changes.read_text()
    title = re.search(rf"^Version {new} \(\d{{4}}-\d\d-\d\d\)$", changes, re.M)
    assert title
    underline = "-" * len(title[0])
    assert changes == CHANGES.replace(
        "Unreleased\n----------\n", f"Unreleased\n----------\n\n{title[0]}\n{underline}\n"
    )
    changed = {line[3:] for line in project.git("status", "--porcelain").splitlines()}
    assert changed == {"CHANGES.rst"} | ({"dsmtpd.py"} if new != old else set())
    assert project.bump("notes").stdout == "- ``-x`` is new:\n\n  - twice.\n"
    assert project.bump("check", f"v{new}").stdout == "prerelease=false\n"
    project.git("apply", "--reverse", tmp_path / "diff")
    assert project.files() == before


@SCRIPTS
@GIT
@pytest.mark.parametrize(
    ("name", "text", "arguments", "message"),
    [
        ("CHANGES.rst", "Unreleased\n----------\n", "patch", "CHANGES.rst has no entries under"),
        ("CHANGES.rst", "", "patch", "CHANGES.rst has no section Unreleased"),
        ("dsmtpd.py", "", "minor", 'dsmtpd.py has no line such as __version__ = "1.2.3"'),
        ("dsmtpd.py", '__version__ = "2.0.0"', "patch", "2.0.0 is not released yet; use major to"),
        ("dsmtpd.py", '__version__ = "1.3.0"', "check main", "the tag is main, but the version in"),
        ("dsmtpd.py", '__version__ = "1.3.0"', "check v1.3.0", "CHANGES.rst has no entries under"),
        ("other.py", "", "minor", "commit or stash these changes first:\n?? other.py"),
    ],
)
def test_bump_error(name: str, text: str, arguments: str, message: str, tmp_path: Path) -> None:
    project = Project(tmp_path / "project")
    (project.root / name).write_text(text)
    before = project.files()
    completed = project.bump(*arguments.split())
    assert (completed.returncode, completed.stdout) == (1, "")
    assert completed.stderr.startswith(f"bump: {message}")
    assert project.files() == before


@SCRIPTS
@GIT
def test_check_of_a_prerelease(tmp_path: Path) -> None:
    project = Project(tmp_path / "project", "1.3.0rc1")
    assert project.bump("check", "v1.3.0rc1").stdout == "prerelease=true\n"
    assert project.bump("notes").stdout == "- ``-x`` is new:\n\n  - twice.\n"


@POSIX
@CLONE
@GIT
def test_release_step(tmp_path: Path) -> None:
    """It commits, tags and pushes, or pushes nothing where the branch has moved."""
    release = read_file(".github/workflows/release.yml")
    script = re.search(r"- name: Commit, tag and push.*?run: \|\n(.*?)\n\n", release, re.S)
    assert script
    step = ("sh", "-e", "-c", script[1])
    variables = {"VERSION": "1.3.0", "GITHUB_REF": "refs/heads/main"}
    project = Project(tmp_path / "project")
    project.git("clone", "--quiet", "--bare", ".", tmp_path / "origin")
    project.git("remote", "add", "origin", tmp_path / "origin")
    project.bump("minor")
    assert project.run(*step, **variables).returncode == 0
    assert project.git("log", "-1", "--format=%B", "v1.3.0") == (
        "Version 1.3.0\n\n- ``-x`` is new:\n\n  - twice.\n\n"
    )
    assert project.git("status", "--porcelain") == ""
    before = project.git("ls-remote", "origin")
    head = project.git("rev-parse", "HEAD", "v1.3.0^{commit}").split()
    assert head == 2 * [project.git("rev-parse", "origin/main").strip()]
    project.git("reset", "--quiet", "--hard", "HEAD^")
    project.bump("major")
    assert project.run(*step, **{**variables, "VERSION": "2.0.0"}).returncode != 0
    assert project.git("tag") == "v1.3.0\nv2.0.0\n"
    assert project.git("ls-remote", "origin") == before


@SCRIPTS
def test_smoke() -> None:
    smoke = (sys.executable, HERE / "contrib" / "smoke.py", sys.executable)
    assert execute(*smoke, SCRIPT).stdout == f"dsmtpd {dsmtpd.__version__} stored the message\n"
    completed = execute(*smoke, "-c", "raise SystemExit('broken')")
    assert completed.returncode == 1
    assert completed.stderr == "smoke: the server did not start:\nbroken\n\n"


@SCRIPTS
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_units() -> None:
    units = [HERE / "contrib" / "dsmtpd.service", HERE / "contrib" / "dsmtpd.socket"]
    completed = execute("systemd-analyze", "verify", *units)
    assert completed.returncode == 0
    assert "dsmtpd" not in completed.stdout + completed.stderr


@CLONE
def test_hooks_use_the_versions_of_tox() -> None:
    requirement = r"\b(?:ruff|mypy)[=~<>]+[\d.]+"
    pins = set(re.findall(requirement, read_file("tox.ini")))
    assert len(pins) == 2
    assert set(re.findall(requirement, read_file(".pre-commit-config.yaml"))) == pins


@CLONE
def test_actions_are_pinned() -> None:
    """Each action is pinned to one commit, with its version in a comment."""
    workflows = "".join(
        path.read_text("utf-8") for path in (HERE / ".github" / "workflows").iterdir()
    )
    actions = set(re.findall(r"\buses: (?!\./)(.*)", workflows))
    assert actions
    for action in actions:
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+(\.\d+)*", action)
    assert len({action.partition("@")[0] for action in actions}) == len(actions)


@CLONE
def test_python_versions() -> None:
    """tox and the tests workflow run the Python versions that the package supports."""
    classifier = r"Programming Language :: Python :: (3\.\d+)"
    supported = set(re.findall(classifier, read_file("pyproject.toml")))
    minors = re.search(r"\bpy3\{([\d,]+)\}", read_file("tox.ini"))
    assert minors
    assert {f"3.{minor}" for minor in minors[1].split(",")} == supported
    assert set(re.findall(r'"(3\.\d+)"', read_file(".github/workflows/tests.yml"))) == supported


def test_environments_of_the_readme() -> None:
    """The tox environments that the README names exist."""
    names = re.findall(r"``tox -e (\w+)", README)
    assert names
    for name in names:
        assert f"\n[testenv:{name}]\n" in read_file("tox.ini")


def test_imports() -> None:
    """dsmtpd.py needs only the standard library."""
    assert execute(sys.executable, "-I", "-S", SCRIPT, "--version").returncode == 0


def test_changes() -> None:
    """Unreleased is the first section; the versions follow, newest first."""
    text = read_file("CHANGES.rst")
    titles = re.findall(r"^(\S.*)\n-{4,}$", text, re.M)
    assert titles[0] == "Unreleased"
    versions = [
        re.fullmatch(r"Version (\d+\.\d+\.\d+) \(\d{4}-\d\d-\d\d\)", title) for title in titles[1:]
    ]
    numbers = [[int(number) for number in version[1].split(".")] for version in versions if version]
    assert len(numbers) == len(versions)
    assert numbers == sorted(numbers, reverse=True)
    current = [int(number) for number in re.findall(r"\d+", dsmtpd.__version__)[:3]]
    # A current version without a section is not released yet.
    assert not numbers or current >= numbers[0]


def test_extensions_of_the_readme() -> None:
    """The README names every extension in the reply to EHLO."""
    _, *lines = Client(tls="starttls").send(b"EHLO x\r\n").decode().splitlines()
    keywords = {line[4:].split()[0] for line in lines}
    # HELP is not an extension but a command of RFC 5321.
    for keyword in keywords - {"HELP"}:
        assert re.search(rf"\b{keyword}\b", README), keyword
