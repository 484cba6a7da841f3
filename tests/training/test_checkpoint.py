# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints are complete or absent, and damage never goes unnoticed."""

import json
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import xxhash

from nt_transformers.training.checkpoint import (
    CheckpointError,
    find_damage,
    load_checkpoint,
    newest_checkpoint,
    rotate_checkpoints,
    save_checkpoint,
)


FILES = ("model.safetensors", "training.pt", "state.json", "manifest.json")


def save(root: Path, step: int) -> Path:
    weights = {"layer.weight": torch.arange(6.0).reshape(2, 3) + step}
    return save_checkpoint(root, step, weights, {"optimizer": {"step": torch.tensor(step)}}, {"step": step})


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    weights, training, state = load_checkpoint(save(tmp_path, 3))
    assert torch.equal(weights["layer.weight"], torch.arange(6.0).reshape(2, 3) + 3)
    assert training["optimizer"]["step"] == 3
    assert state == {"step": 3}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped", "emptied"])
def test_every_damaged_file_is_found(tmp_path: Path, name: str, damage: str) -> None:
    folder = save(tmp_path, 1)
    path = folder / name
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    assert find_damage(folder) is not None
    with pytest.raises(ValueError, match="step_1 cannot be resumed: .*name another one, or `latest`"):
        load_checkpoint(folder)


def test_a_manifest_that_lists_less_is_damage(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]["training.pt"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "manifest.json is not as it was written" in str(find_damage(folder))


def test_a_manifest_edited_to_fit_an_edited_file_is_damage(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    state, manifest = folder / "state.json", folder / "manifest.json"
    state.write_text('{"step": 1000}')
    content = json.loads(manifest.read_text())
    content["files"]["state.json"] = {"size": 14, "xxh3_128": xxhash.xxh3_128_hexdigest(state.read_bytes())}
    manifest.write_text(json.dumps(content))
    assert "manifest.json is not as it was written" in str(find_damage(folder))


def assert_only_the_former_is_left(root: Path) -> None:
    assert [path.name for path in root.iterdir()] == ["step_1"]
    assert find_damage(root / "step_1") is None


@pytest.mark.parametrize("function", ["torch.save", "save_file", "sync"])
def test_a_failed_save_leaves_the_former_checkpoint_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    save(tmp_path, 1)

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"nt_transformers.training.checkpoint.{function}", fail)
    with pytest.raises(CheckpointError, match=r"of step 2 could not be written to .*No space left.*make room"):
        save(tmp_path, 2)
    assert_only_the_former_is_left(tmp_path)


@pytest.mark.parametrize("kilobytes", [1, 30])
def test_a_file_that_the_system_refuses_to_grow(tmp_path: Path, kilobytes: int) -> None:
    """The kernel's own error, in the midst of the write of the first file or of the second."""
    save(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="could not be written"):
            save_checkpoint(tmp_path, 2, {"w": torch.zeros(5000)}, {"optimizer": torch.zeros(20_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_only_the_former_is_left(tmp_path)


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system takes root")
    try:
        save(tmp_path, 1)
        with pytest.raises(CheckpointError, match=r"bytes are free there\). Earlier checkpoints are untouched"):
            save_checkpoint(tmp_path, 2, {"w": torch.zeros(1000)}, {"optimizer": torch.zeros(80_000)}, {})
        assert_only_the_former_is_left(tmp_path)
        save(tmp_path, 3)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def damage(folder: Path) -> None:
    path = folder / "training.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_rotation_keeps_the_newest_and_removes_leftovers(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        save(tmp_path, step)
    (tmp_path / "step_11.partial").mkdir()
    rotate_checkpoints(tmp_path, keep_last=2)
    assert names(tmp_path) == ["step_10", "step_9"]


def test_rotation_keeps_every_so_many_steps(tmp_path: Path) -> None:
    for step in range(1, 10):
        rotate_checkpoints(tmp_path, keep_last=2, keep_every=4, written=save(tmp_path, step))
    assert names(tmp_path) == ["step_4", "step_8", "step_9"]


@pytest.mark.parametrize("keep_last", [1, 2])
def test_rotation_never_deletes_the_only_whole_checkpoint(tmp_path: Path, keep_last: int) -> None:
    for step in range(1, 5):
        folder = save(tmp_path, step)
        if step > 1:
            damage(folder)
    rotate_checkpoints(tmp_path, keep_last=keep_last, keep_every=2)
    assert names(tmp_path) == ["step_1"]
    damage(tmp_path / "step_1")
    rotate_checkpoints(tmp_path, keep_last=keep_last)
    assert names(tmp_path) == ["step_1"]


def test_incomplete_checkpoints_do_not_count_as_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "step_2" / "state.json").unlink()
    rotate_checkpoints(tmp_path, keep_last=2, written=tmp_path / "step_3")
    assert names(tmp_path) == ["step_1", "step_3"]


def test_what_came_after_the_step_resumed_goes_once_there_is_something_new(tmp_path: Path) -> None:
    for step in (1, 2, 5, 6):
        save(tmp_path, step)
    rotate_checkpoints(tmp_path, keep_last=2, written=save(tmp_path, 3))
    assert names(tmp_path) == ["step_2", "step_3"]


def test_the_newest_whole_checkpoint_is_found_and_the_others_named(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path, print) is None
    for step in (9, 10, 11):
        save(tmp_path, step)
    (tmp_path / "step_12.partial").mkdir()
    (tmp_path / "step_x").mkdir()
    damage(tmp_path / "step_11")
    skipped: list[str] = []
    assert newest_checkpoint(tmp_path, skipped.append) == tmp_path / "step_10"
    assert len(skipped) == 1
    assert "step_11: training.pt is not as it was written" in skipped[0]
    damage(tmp_path / "step_10")
    damage(tmp_path / "step_9")
    with pytest.raises(ValueError, match="all 3 checkpoints in .* are damaged; restore one, or start anew"):
        newest_checkpoint(tmp_path, skipped.append)


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 1)
    assert find_damage(save(tmp_path, 1)) is None


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "it_ran",))

    folder = save_checkpoint(tmp_path, 1, {"w": torch.zeros(1)}, {"optimizer": Payload()}, {})
    with pytest.raises(Exception, match=r"[Ww]eights"):
        load_checkpoint(folder)
    assert not (tmp_path / "it_ran").exists()
