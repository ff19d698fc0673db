"""Build backend of dsmtpd: flit_core, with type stubs in the wheel.

Type checkers such as mypy use the annotations of an installed package only if it has a file
py.typed. A single module cannot have one (PEP 561), but it can have a stub package. The wheel
therefore contains dsmtpd.py a second time, as dsmtpd-stubs/__init__.pyi. A stub file may contain
complete functions, so it needs no changes.

pyproject.toml names this module as the build backend. The sdist and the editable wheel are those
of flit_core. The editable wheel has no stubs, because a copy would not follow later changes.
"""

from __future__ import annotations

import io
from pathlib import Path

from flit_core.buildapi import (
    build_editable,
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from flit_core.wheel import WheelBuilder

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def build_wheel(
    wheel_directory: str,
    config_settings: dict[str, str | list[str]] | None = None,
    metadata_directory: str | None = None,
) -> str:
    """Write the wheel to the directory and return its file name, as PEP 517 specifies."""
    content = io.BytesIO()
    # PEP 517: the current directory is the source tree.
    builder = WheelBuilder.from_ini_path(Path("pyproject.toml"), content)
    builder._add_file(builder.module.path, f"{builder.module.name}-stubs/__init__.pyi")
    builder.build()
    filename: str = builder.wheel_filename
    Path(wheel_directory, filename).write_bytes(content.getvalue())
    return filename
