# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints that are either complete or absent.

A checkpoint is a folder `step_N` with `model.safetensors` (weights), `training.pt` (optimizer, sparsifier, random
states: tensors and plain numbers, read with `weights_only=True`), `state.json` (step, data position, configuration)
and `manifest.json` (size and SHA-256 of every file). It is written aside, synced and renamed.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


MANIFEST = "manifest.json"
PARTIAL_SUFFIX = ".partial"


def checkpoint_folder(root: Path, step: int) -> Path:
    return root / f"step_{step}"


def save_checkpoint(
    root: Path, step: int, weights: dict[str, torch.Tensor], training: dict[str, Any], state: dict[str, Any]
) -> Path:
    """Writes the checkpoint of `step` under `root` and returns its folder."""
    folder = checkpoint_folder(root, step)
    with _written_atomically(folder) as partial:
        save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
        torch.save(training, partial / "training.pt")
        (partial / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
    return folder


def load_checkpoint(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, Any]]:
    """Reads what `save_checkpoint` was given: weights, training state, state.

    Raises:
        ValueError: the folder is no complete checkpoint, or a file is not as it was written.
    """
    damage = find_damage(folder)
    if damage:
        raise ValueError(f"checkpoint {folder} cannot be resumed: {damage}; name another one, or `latest`")
    weights = load_file(folder / "model.safetensors")
    training = torch.load(folder / "training.pt", map_location="cpu", weights_only=True)
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return weights, training, state


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None if it is as it was written."""
    if not folder.is_dir():
        return "there is no such folder"
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in manifest.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} is missing or damaged, so it was never completed"
    missing = {"model.safetensors", "training.pt", "state.json"} - set(files)
    if missing:
        return f"its {MANIFEST} does not list {sorted(missing)}"
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if _sha256(path) != digest:
            return f"{name} is not as it was written (its SHA-256 differs)"
    return None


def list_checkpoints(root: Path) -> list[Path]:
    """The checkpoint folders under `root`, oldest first, complete or not."""
    folders = [path for path in root.glob("step_*") if path.name.removeprefix("step_").isdigit()]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("step_")))


def rotate_checkpoints(root: Path, keep_last: int) -> None:
    """Deletes all but the newest `keep_last` checkpoints, and what interrupted saves left behind."""
    for folder in list_checkpoints(root)[:-keep_last]:
        _remove(folder)
    for leftover in root.glob(f"*{PARTIAL_SUFFIX}"):
        shutil.rmtree(leftover)


@contextmanager
def _written_atomically(folder: Path) -> Iterator[Path]:
    partial = folder.with_name(folder.name + PARTIAL_SUFFIX)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    files = sorted(partial.iterdir())
    manifest = {path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in files}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    for path in (*files, partial / MANIFEST, partial):
        _sync(path)
    if folder.exists():
        _remove(folder)
    partial.rename(folder)
    _sync(folder.parent)


def _remove(folder: Path) -> None:
    # Renamed first: a deletion that is interrupted must not leave something that looks like a checkpoint.
    doomed = folder.with_name(folder.name + PARTIAL_SUFFIX + PARTIAL_SUFFIX)
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
