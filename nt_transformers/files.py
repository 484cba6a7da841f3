# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Files that an interruption leaves whole or absent."""

import os
from pathlib import Path


PARTIAL_SUFFIX = ".partial"


def partial_path(path: Path) -> Path:
    """Where a file or folder is written before it takes its name."""
    return path.with_name(path.name + PARTIAL_SUFFIX)


def write_text(path: Path, text: str) -> None:
    """Writes a file aside, syncs it and renames it."""
    partial = partial_path(path)
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Returns when a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
