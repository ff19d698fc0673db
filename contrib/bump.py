"""The version of dsmtpd, and what CHANGES.rst says of it.

Usage::

    python contrib/bump.py patch|minor|major [--dry-run]
    python contrib/bump.py notes        # what changed in the present version
    python contrib/bump.py check TAG    # fails where the tag is not that of this version

The first makes the next version: it sets `__version__` in dsmtpd.py, moves what stands under
Unreleased in CHANGES.rst to a section of its own, changes nothing else, and prints the version;
with --dry-run it prints the diff instead, as `git apply` takes it.

A version without a section in CHANGES.rst has not been released yet: then it is the next one.
So 2.0.0 becomes the first release, and 2.1.0 follows 2.1.0rc1.
"""

from __future__ import annotations

import argparse
import difflib
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODULE = ROOT / "dsmtpd.py"
CHANGES = ROOT / "CHANGES.rst"

PARTS = ("major", "minor", "patch")
UNRELEASED = "Unreleased"


class BumpError(Exception):
    """Why it cannot be done."""


def find_version(module: str) -> str:
    """The `__version__` in the source of the module."""
    match = re.search(r'^__version__ = "(\d+\.\d+\.\d+[^"]*)"$', module, re.M)
    if match is None:
        raise BumpError("dsmtpd.py has no __version__ with three numbers")
    return match[1]


def without_suffix(version: str) -> str:
    """The three numbers of a version: 2.1.0 for 2.1.0rc1."""
    return ".".join(re.findall(r"\d+", version)[:3])


def find_section(changes: str, title: str) -> str | None:
    """What stands below a title in CHANGES.rst, with or without a date; None if there is none."""
    match = re.search(
        rf"^{re.escape(title)}(?: \([\d-]+\))?\n-+\n(.*?)(?=^\S[^\n]*\n-{{4,}}\n|\Z)",
        changes,
        re.M | re.S,
    )
    return match and match[1].strip()


def next_version(version: str, changes: str, part: str) -> str:
    """The version that comes when this part is counted up."""
    base = without_suffix(version)
    numbers = [int(number) for number in base.split(".")]
    if find_section(changes, f"Version {base}") is None:
        kind = "patch" if numbers[2] else "minor" if numbers[1] else "major"
        if kind != part:
            raise BumpError(f"{base} has not been released yet, and is a {kind} version")
        return base
    index = PARTS.index(part)
    return ".".join(map(str, [*numbers[:index], numbers[index] + 1, 0, 0][:3]))


def move_unreleased(changes: str, version: str, today: date) -> str:
    """CHANGES.rst with a section for the version, and nothing under Unreleased."""
    text = find_section(changes, UNRELEASED)
    if text is None:
        raise BumpError(f"CHANGES.rst has no section {UNRELEASED}")
    if not text:
        raise BumpError(f"CHANGES.rst has nothing under {UNRELEASED}")
    top = f"{UNRELEASED}\n{'-' * len(UNRELEASED)}\n\n"
    title = f"Version {version} ({today})"
    return changes.replace(top, f"{top}{title}\n{'-' * len(title)}\n\n", 1)


def check_clean() -> None:
    """Refuse a working tree with changes, which would become a part of the release."""
    git = ["git", "status", "--porcelain"]
    done = subprocess.run(git, cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        raise BumpError(done.stderr.strip())
    if done.stdout:
        raise BumpError(f"commit or put away these first:\n{done.stdout.rstrip()}")


def bump(part: str, dry_run: bool) -> str:
    """Make the next version; returns what to print."""
    module, changes = MODULE.read_text("utf-8"), CHANGES.read_text("utf-8")
    old = find_version(module)
    new = next_version(old, changes, part)
    after = {
        MODULE: module.replace(f'__version__ = "{old}"', f'__version__ = "{new}"', 1),
        CHANGES: move_unreleased(changes, new, date.today()),
    }
    if dry_run:
        return diff(MODULE, module, after[MODULE]) + diff(CHANGES, changes, after[CHANGES])
    check_clean()
    for path, text in after.items():
        path.write_text(text, "utf-8", newline="\n")
    return new


def diff(path: Path, old: str, new: str) -> str:
    """The unified diff of a file, "" where nothing changes."""
    lines = old.splitlines(keepends=True), new.splitlines(keepends=True)
    return "".join(difflib.unified_diff(*lines, f"a/{path.name}", f"b/{path.name}"))


def notes() -> str:
    """What changed in the present version; for a pre-release, what is not released yet."""
    version = find_version(MODULE.read_text("utf-8"))
    title = f"Version {version}" if version == without_suffix(version) else UNRELEASED
    text = find_section(CHANGES.read_text("utf-8"), title)
    if not text:
        raise BumpError(f"CHANGES.rst has nothing under {title}")
    return text


def check(tag: str) -> str:
    """Refuse a tag of another version, or of one without notes; says if it is a pre-release."""
    version = find_version(MODULE.read_text("utf-8"))
    if tag != f"v{version}":
        raise BumpError(f"the tag {tag} is not v{version}, as dsmtpd.py has it")
    notes()
    return f"prerelease={str(version != without_suffix(version)).lower()}"


def main() -> None:
    """Run the command line program."""
    parser = argparse.ArgumentParser(prog="bump")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for part in PARTS:
        command = commands.add_parser(part, help=f"make the next {part} version")
        command.add_argument("--dry-run", action="store_true", help="print the diff only")
    commands.add_parser("notes", help="print what changed in this version")
    command = commands.add_parser("check", help="fail where the tag is not that of this version")
    command.add_argument("tag", metavar="TAG")
    arguments = parser.parse_args()
    try:
        if arguments.command == "notes":
            text = notes()
        elif arguments.command == "check":
            text = check(arguments.tag)
        else:
            text = bump(arguments.command, arguments.dry_run)
    except (BumpError, OSError) as error:
        sys.exit(f"bump: {error}")
    print(text.rstrip("\n"))


if __name__ == "__main__":
    main()
