# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints that are either complete or absent.

A checkpoint is a folder `step_N` with `model.safetensors` (weights), `training.pt` (optimizer, sparsifier, random
states: tensors and plain numbers, read with `weights_only=True`), `state.json` (step, data position, configuration)
and `manifest.json` (size and XXH3 hash of every file, and of the list itself). It is written aside, synced, renamed.
The hashes find damage, at the speed of memory; nothing here guards against forgery, which would take a secret key.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.serialization import config as serialization_config

from ..files import PARTIAL_SUFFIX, partial_path, sync


MANIFEST = "manifest.json"
FILES = ("model.safetensors", "training.pt", "state.json")


class CheckpointError(OSError):
    """A checkpoint could not be written; those written before are as they were."""


def checkpoint_folder(root: Path, step: int) -> Path:
    return root / f"step_{step}"


def save_checkpoint(
    root: Path, step: int, weights: dict[str, torch.Tensor], training: dict[str, Any], state: dict[str, Any]
) -> Path:
    """Writes the checkpoint of `step` under `root` and returns its folder.

    Raises:
        CheckpointError: the disk is full or fails; nothing is left of this checkpoint, earlier ones are untouched.
    """
    folder = checkpoint_folder(root, step)
    partial = partial_path(folder)
    writers: dict[str, Callable[[Path], object]] = {
        "model.safetensors": lambda path: save_file(weights, path, metadata={"format": "pt"}),
        "training.pt": lambda path: _save_training(training, path),
        "state.json": lambda path: path.write_text(json.dumps(state, indent=2), encoding="utf-8"),
    }
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        # Side by side: one file is hashed and synced while another is still written.
        with ThreadPoolExecutor() as pool:
            sealed = pool.map(lambda name: _write_sealed(partial / name, writers[name]), writers)
        _write_sealed(
            partial / MANIFEST, lambda path: path.write_text(_manifest(dict(zip(writers, sealed, strict=True))))
        )
        sync(partial)
        if folder.exists():
            _remove(folder)
        partial.rename(folder)
        sync(root)
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch.save and safetensors have errors of their own for a full disk.
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written to {folder}: {error} "
            f"({shutil.disk_usage(root).free:,} bytes are free there). Earlier checkpoints are untouched: make room "
            "and continue with resume_from_checkpoint=latest."
        ) from error
    return folder


def load_checkpoint(
    folder: Path, *, checked: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, Any]]:
    """Reads what `save_checkpoint` was given: weights, training state, state.

    Args:
        folder: The checkpoint.
        checked: `check_checkpoint` or `newest_checkpoint` has just read all of it; it is not hashed again.

    Raises:
        ValueError: see `check_checkpoint`.
    """
    if not checked:
        check_checkpoint(folder)
    weights = load_file(folder / "model.safetensors")
    training = torch.load(folder / "training.pt", map_location="cpu", weights_only=True)
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return weights, training, state


def check_checkpoint(folder: Path) -> None:
    """Raises a `ValueError` if the folder is no complete checkpoint, or a file is not as it was written."""
    if damage := find_damage(folder):
        raise ValueError(f"checkpoint {folder} cannot be resumed: {damage}; name another one, or `latest`")


def find_damage(folder: Path, *, contents: bool = True) -> str | None:
    """What is wrong with a checkpoint, or None if it is as it was written.

    Args:
        folder: The checkpoint.
        contents: Read the files and compare their hashes, not only their sizes.
    """
    if not os.path.isdir(folder):
        return "there is no such folder"
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {str(name): (int(entry["size"]), str(entry["xxh3_128"])) for name, entry in manifest["files"].items()}
        digest = manifest["xxh3_128"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} is missing or damaged, so it was never completed"
    if digest != _digest_of_list(manifest["files"]):
        return f"its {MANIFEST} is not as it was written"
    if missing := set(FILES) - set(files):
        return f"its {MANIFEST} does not list {sorted(missing)}"
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        try:
            if contents and _hash(path) != digest:
                return f"{name} is not as it was written (its hash differs)"
        except OSError as error:
            return f"{name} cannot be read ({error})"
    return None


def list_checkpoints(root: Path) -> list[Path]:
    """The checkpoint folders under `root`, oldest first, complete or not."""
    return sorted((path for path in root.glob("step_*") if path.name[5:].isdecimal()), key=_step)


def newest_checkpoint(root: Path, report: Callable[[str], object]) -> Path | None:
    """The newest checkpoint that is as it was written, or None if there is none at all.

    Args:
        root: Folder of the checkpoints.
        report: Told of each one that is skipped, and why.

    Raises:
        ValueError: there are checkpoints, but all are damaged.
    """
    folders = list_checkpoints(root)
    for folder in reversed(folders):
        damage = find_damage(folder)
        if damage is None:
            return folder
        report(f"skipping {folder}: {damage}")
    if folders:
        raise ValueError(
            f"resume_from_checkpoint='latest': all {len(folders)} checkpoints in {root} are damaged; restore one, or "
            "start anew with overwrite_output_dir=true and without resume_from_checkpoint"
        )
    return None


def rotate_checkpoints(root: Path, keep_last: int, keep_every: int | None = None, written: Path | None = None) -> None:
    """Deletes old checkpoints, damaged ones, and what interrupted saves left behind; never the newest whole one.

    Args:
        root: Folder of the checkpoints.
        keep_last: How many of the newest complete ones are kept.
        keep_every: Complete ones of steps that are multiples of this are kept as well.
        written: The one that has just been written: it is whole, and later ones are of a run that was given up. None
            looks for the newest whole one, and deletes no checkpoint if there is none.
    """
    folders = list_checkpoints(root)
    whole = written or next((folder for folder in reversed(folders) if find_damage(folder) is None), None)
    if whole is not None:
        usable = [f for f in folders if _step(f) <= _step(whole) and find_damage(f, contents=False) is None]
        kept = {*usable[-keep_last:], *(f for f in usable if keep_every and _step(f) % keep_every == 0)}
        for folder in set(folders) - kept:
            _remove(folder)
    remove_leftovers(root)


def remove_leftovers(root: Path) -> None:
    """Deletes what interrupted saves and deletions left behind under `root`."""
    for leftover in root.glob(f"*{PARTIAL_SUFFIX}"):
        shutil.rmtree(leftover, ignore_errors=True)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def _save_training(training: dict[str, Any], path: Path) -> None:
    # The manifest holds a hash of the whole file: checksums of each tensor would take as long as writing it.
    with serialization_config.patch("save.compute_crc32", False):  # type: ignore[attr-defined]
        torch.save(training, path)


def _write_sealed(path: Path, write: Callable[[Path], object]) -> dict[str, Any]:
    """Writes a file through to the disk and returns its entry in the manifest."""
    write(path)
    with ThreadPoolExecutor() as pool:
        # The disk works while the file is hashed, which reads it from memory.
        synced = pool.submit(sync, path)
        entry = {"size": path.stat().st_size, "xxh3_128": _hash(path)}
        synced.result()
    return entry


def _manifest(files: dict[str, Any]) -> str:
    return json.dumps({"files": files, "xxh3_128": _digest_of_list(files)}, indent=2)


def _digest_of_list(files: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(files, sort_keys=True).encode())


def _remove(folder: Path) -> None:
    # Renamed first: a deletion that is interrupted must not leave something that looks like a checkpoint.
    doomed = partial_path(partial_path(folder))
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
