"""Start dsmtpd, send a message to it, and check that the message is stored.

Usage::

    python contrib/smoke.py PROGRAM [ARGUMENT ...]      # such as python "$PWD/dist/dsmtpd.pyz"

The program runs in an empty directory, so that it does not import the dsmtpd.py of this
repository. Paths in the arguments must therefore be absolute.
"""

from __future__ import annotations

import re
import smtplib
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> None:
    """Run the command line program; exit with a message and status 1 if the check fails."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        command = [*sys.argv[1:], "-p", "0", "-d", "mail"]
        with subprocess.Popen(
            command, cwd=directory, stderr=subprocess.PIPE, encoding="utf-8"
        ) as server:
            try:
                version = send_message(server)
            finally:
                server.terminate()
        if not list(Path(directory, "mail", "new").iterdir()):
            sys.exit("smoke: the message is not in the Maildir")
    print(f"{version} stored the message")


def send_message(server: subprocess.Popen[str]) -> str:
    """Wait until the server listens and send a message; return its name and version."""
    assert server.stderr is not None
    log = []
    for line in server.stderr:
        log.append(line)
        if match := re.search(r"(dsmtpd \S+) at \S+:(\d+)$", line):
            with smtplib.SMTP("127.0.0.1", int(match[2]), timeout=20) as client:
                client.sendmail("app@example.com", ["user@test.com"], "Subject: Smoke\n\nHello")
            return match[1]
    sys.exit("smoke: the server did not start:\n" + "".join(log))


if __name__ == "__main__":
    main()
