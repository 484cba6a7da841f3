# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints are complete or absent, and damage never goes unnoticed."""

import json
from pathlib import Path

import pytest
import torch

from nt_transformers.training import checkpoint
from nt_transformers.training.checkpoint import (
    find_damage,
    list_checkpoints,
    load_checkpoint,
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
    del manifest["training.pt"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "training.pt" in str(find_damage(folder))


def test_an_interrupted_save_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def fail(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step_1"]
    assert find_damage(tmp_path / "step_1") is None


def test_rotation_keeps_the_newest_and_removes_leftovers(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        save(tmp_path, step)
    (tmp_path / "step_11.partial").mkdir()
    rotate_checkpoints(tmp_path, keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_10", "step_9"]


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
