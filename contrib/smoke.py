"""Start a dsmtpd, send it a message, and see that it is stored.

Usage::

    python contrib/smoke.py PROGRAM [ARGUMENT ...]      # as in: python dist/dsmtpd.pyz

It runs in an empty folder, so that it is that program and no module of this one; a path has to
be absolute.
"""

from __future__ import annotations

import re
import smtplib
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> None:
    """Run the command line program; ends with a text and status 1 where something is wrong."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        command = [*sys.argv[1:], "-p", "0", "-d", "mail"]
        with subprocess.Popen(
            command, cwd=folder, stderr=subprocess.PIPE, encoding="utf-8"
        ) as server:
            try:
                said = send_a_message(server)
            finally:
                server.terminate()
        if not list(Path(folder, "mail", "new").iterdir()):
            sys.exit("smoke: the message is not in the Maildir")
    print("It took a message:", said)


def send_a_message(server: subprocess.Popen[str]) -> str:
    """Wait until the server listens, and send; returns what it said about itself."""
    assert server.stderr is not None
    log = []
    for line in server.stderr:
        log.append(line)
        if match := re.search(r"(dsmtpd \S+) at \S+:(\d+)$", line):
            with smtplib.SMTP("127.0.0.1", int(match[2]), timeout=20) as client:
                client.sendmail("app@example.com", ["user@test.com"], "Subject: Smoke\n\nHello")
            return match[1]
    sys.exit("smoke: it does not listen:\n" + "".join(log))


if __name__ == "__main__":
    main()
