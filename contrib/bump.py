"""Set the version of dsmtpd, and print or check its release notes.

Usage::

    python contrib/bump.py patch|minor|major [--dry-run]
    python contrib/bump.py notes        # print the release notes of the current version
    python contrib/bump.py check TAG    # fail if TAG does not match the current version

The first form sets `__version__` in dsmtpd.py to the next version, moves the entries under
Unreleased in CHANGES.rst to a new section for that version, and prints the version. With
--dry-run, it changes no file and prints a diff for `git apply`.

A version without a section in CHANGES.rst is not released yet, so it is the next version. For
example, 2.1.0rc1 is followed by 2.1.0.
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
    """An error in the repository or in the arguments, with a message for the user."""


def find_version(module: str) -> str:
    """Return `__version__` from the source of the module."""
    match = re.search(r'^__version__ = "(\d+\.\d+\.\d+[^"]*)"$', module, re.M)
    if match is None:
        raise BumpError('dsmtpd.py has no line such as __version__ = "1.2.3"')
    return match[1]


def release_version(version: str) -> str:
    """Return the version without a pre-release suffix: 2.1.0 for 2.1.0rc1."""
    return ".".join(re.findall(r"\d+", version)[:3])


def release_part(numbers: list[int]) -> str:
    """Return the part that a release with these numbers increases: minor for 2.1.0."""
    if numbers[2]:
        return "patch"
    if numbers[1]:
        return "minor"
    return "major"


def find_section(changes: str, title: str) -> str | None:
    """Return the text of a section of CHANGES.rst, or None if there is no such section.

    The title is given without the release date.
    """
    match = re.search(
        rf"^{re.escape(title)}(?: \([\d-]+\))?\n-+\n(.*?)(?=^\S[^\n]*\n-{{4,}}\n|\Z)",
        changes,
        re.M | re.S,
    )
    return match[1].strip() if match else None


def next_version(version: str, changes: str, part: str) -> str:
    """Return the version that follows when the given part is increased."""
    release = release_version(version)
    numbers = [int(number) for number in release.split(".")]
    if find_section(changes, f"Version {release}") is None:
        expected = release_part(numbers)
        if part != expected:
            raise BumpError(f"{release} is not released yet; use {expected} to release it")
        return release
    index = PARTS.index(part)
    numbers = [*numbers[:index], numbers[index] + 1] + [0] * (2 - index)
    return ".".join(str(number) for number in numbers)


def move_unreleased(changes: str, version: str, today: date) -> str:
    """Return CHANGES.rst with the entries under Unreleased in a new section for the version."""
    entries = find_section(changes, UNRELEASED)
    if entries is None:
        raise BumpError(f"CHANGES.rst has no section {UNRELEASED}")
    if not entries:
        raise BumpError(f"CHANGES.rst has no entries under {UNRELEASED}")
    heading = f"{UNRELEASED}\n{'-' * len(UNRELEASED)}\n\n"
    title = f"Version {version} ({today})"
    return changes.replace(heading, f"{heading}{title}\n{'-' * len(title)}\n\n", 1)


def check_clean() -> None:
    """Raise BumpError if the working tree has changes, which would go into the release."""
    git = ["git", "status", "--porcelain"]
    completed = subprocess.run(git, cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    if completed.returncode:
        raise BumpError(completed.stderr.strip())
    if completed.stdout:
        raise BumpError(f"commit or stash these changes first:\n{completed.stdout.rstrip()}")


def bump(part: str, dry_run: bool) -> str:
    """Set the next version and return it; with dry_run, return a diff instead."""
    module, changes = MODULE.read_text("utf-8"), CHANGES.read_text("utf-8")
    old = find_version(module)
    new = next_version(old, changes, part)
    new_module = module.replace(f'__version__ = "{old}"', f'__version__ = "{new}"', 1)
    new_changes = move_unreleased(changes, new, date.today())
    if dry_run:
        return diff(MODULE, module, new_module) + diff(CHANGES, changes, new_changes)
    check_clean()
    MODULE.write_text(new_module, "utf-8", newline="\n")
    CHANGES.write_text(new_changes, "utf-8", newline="\n")
    return new


def diff(path: Path, old: str, new: str) -> str:
    """Return the unified diff of a file, or an empty string if nothing changes."""
    lines = old.splitlines(keepends=True), new.splitlines(keepends=True)
    return "".join(difflib.unified_diff(*lines, f"a/{path.name}", f"b/{path.name}"))


def release_notes() -> str:
    """Return the entries of the current version; for a pre-release, those under Unreleased."""
    version = find_version(MODULE.read_text("utf-8"))
    title = f"Version {version}" if version == release_version(version) else UNRELEASED
    entries = find_section(CHANGES.read_text("utf-8"), title)
    if not entries:
        raise BumpError(f"CHANGES.rst has no entries under {title}")
    return entries


def check_tag(tag: str) -> str:
    """Check that the tag matches the version and that the version has release notes.

    Return the line `prerelease=true` or `prerelease=false`, as GITHUB_OUTPUT expects it.
    """
    version = find_version(MODULE.read_text("utf-8"))
    if tag != f"v{version}":
        raise BumpError(f"the tag is {tag}, but the version in dsmtpd.py is {version}")
    release_notes()
    return f"prerelease={'false' if version == release_version(version) else 'true'}"


def main() -> None:
    """Run the command line program."""
    parser = argparse.ArgumentParser(prog="bump")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for part in PARTS:
        command = commands.add_parser(part, help=f"set the next {part} version")
        command.add_argument("--dry-run", action="store_true", help="only print the diff")
    commands.add_parser("notes", help="print the release notes of the current version")
    command = commands.add_parser("check", help="fail if TAG does not match the current version")
    command.add_argument("tag", metavar="TAG")
    args = parser.parse_args()
    try:
        if args.command == "notes":
            output = release_notes()
        elif args.command == "check":
            output = check_tag(args.tag)
        else:
            output = bump(args.command, args.dry_run)
    except (BumpError, OSError) as error:
        sys.exit(f"bump: {error}")
    print(output.rstrip("\n"))


if __name__ == "__main__":
    main()
