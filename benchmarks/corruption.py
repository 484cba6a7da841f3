# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Random damage to a checkpoint folder: all of it has to be found, and the checkpoint before taken instead.

    python benchmarks/corruption.py [--count N] [--seed N] [--quick] [--json FILE]

Kinds of damage, in turn, each to a random file at a random place: cut short, lengthened, one bit flipped, a stretch of
zeros (as after a power failure), missing, replaced by that of another checkpoint, manifest edited.

    undetected = damaged folders that `load_checkpoint` loads or `newest_checkpoint` returns; must be 0
    false_alarms = intact folders refused; must be 0
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from harness import parse_args, report

from nt_transformers.training.checkpoint import (
    FILES,
    MANIFEST,
    find_damage,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)


COUNT = 30


def save(root: Path, step: int) -> Path:
    """A small checkpoint with the contents of a real one."""
    generator = torch.Generator().manual_seed(step)
    weights = {f"layer.{i}": torch.randn(8, 16, generator=generator) for i in range(4)}
    training = {"optimizer": {i: {"exp_avg": torch.randn(8, 16, generator=generator)} for i in range(4)}}
    return save_checkpoint(root, step, weights, training, {"step": step, "position": {"epoch": 0, "document": step}})


def cut(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def lengthen(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randint(1, 100)))


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def zero(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    # From a byte that is not zero yet.
    first = rng.choice([place for place, byte in enumerate(content) if byte])
    length = min(rng.randint(1, 512), len(content) - first)
    content[first : first + length] = bytes(length)
    path.write_bytes(content)


def remove(path: Path, rng: random.Random) -> None:
    path.unlink()


def replace(path: Path, rng: random.Random) -> None:
    shutil.copyfile(path.parent.with_name("step_1") / path.name, path)


def edit_manifest(path: Path, rng: random.Random) -> None:
    """Changes the manifest's list, sometimes so that it fits a changed file."""
    manifest = json.loads((path.parent / MANIFEST).read_text())
    name = rng.choice(FILES)
    entry = manifest["files"][name]
    edit = rng.choice(("remove", "add", "size", "xxh3_128", "fit"))
    if edit == "remove":
        del manifest["files"][name]
    elif edit == "add":
        manifest["files"][f"{name}.more"] = entry
    elif edit == "size":
        entry["size"] += rng.randint(1, 9)
    elif edit == "xxh3_128":
        entry["xxh3_128"] = f"{rng.getrandbits(128):032x}"
    else:
        lengthen(path.parent / name, rng)
        entry["size"] = (path.parent / name).stat().st_size
    (path.parent / MANIFEST).write_text(json.dumps(manifest, indent=2))


DAMAGES: tuple[Callable[[Path, random.Random], None], ...] = (
    cut,
    lengthen,
    flip,
    zero,
    remove,
    replace,
    edit_manifest,
)


def loads(folder: Path) -> bool:
    try:
        load_checkpoint(folder)
    except ValueError as error:
        return folder.name not in str(error)
    return True


def main() -> None:
    """Damage, look, report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=COUNT, help="how many folders to damage (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parse_args(parser)
    rng = random.Random(args.seed)
    undetected, false_alarms = [], 0
    with tempfile.TemporaryDirectory(prefix="corruption-") as name:
        root = Path(name)
        good, newest = save(root, 1), save(root, 2)
        shutil.copytree(newest, root / "original")
        for index in range(args.count):
            shutil.rmtree(newest)
            shutil.copytree(root / "original", newest)
            false_alarms += find_damage(newest) is not None
            damage = DAMAGES[index % len(DAMAGES)]
            path = newest / (MANIFEST if damage is edit_manifest else rng.choice((*FILES, MANIFEST)))
            damage(path, rng)
            skipped: list[str] = []
            if loads(newest) or newest_checkpoint(root, skipped.append) != good or len(skipped) != 1:
                undetected.append(f"{damage.__name__} of {path.name}")
    report({"corruptions": args.count, "undetected": len(undetected), "false_alarms": false_alarms}, args)
    if undetected or false_alarms:
        sys.exit(f"not found: {undetected}")


if __name__ == "__main__":
    main()
