# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Publishing a run on the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from .config import TrainingConfig


def create_hub_repository(config: TrainingConfig) -> str:
    """Creates the repository of `config.hub_model_id` unless it exists, and returns its full id.

    Called before training, so that a run does not end in the discovery that it may not push.

    Raises:
        ValueError: there is no hub, no login or no right to write.
    """
    repository = config.hub_model_id or Path(config.output_dir).resolve().name
    try:
        return HfApi().create_repo(repository, private=config.hub_private_repo, exist_ok=True).repo_id
    except (HTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled) as error:
        raise ValueError(
            f"push_to_hub=True: the repository {repository!r} cannot be used: {error}\nLog in with `hf auth login`, "
            "check hub_model_id, or train with push_to_hub=False and push the folder later with `hf upload`"
        ) from error


def push_run(output_dir: Path, repository: str) -> None:
    """Uploads the finished checkpoint with its metrics and summary, but not the training checkpoints."""
    HfApi().upload_folder(
        repo_id=repository, folder_path=output_dir, ignore_patterns=["*/*"], commit_message="Upload the trained model"
    )
