"""Where a checkpoint is: a directory, or a repository of the Hugging Face hub to download."""

from __future__ import annotations

import os
import re
from pathlib import Path

from acme_jax.checkpoint_tensors import PretrainedError

_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?", re.ASCII)
_PATTERNS = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt"]


def find_directory(path_or_hub_id: str | Path) -> Path:
    """The directory of a checkpoint, downloaded first if need be.

    Only weights as safetensors, configurations and vocabularies are downloaded, into the cache of
    `huggingface_hub`; with HF_HUB_OFFLINE set, the cache alone is asked.

    Args:
      path_or_hub_id: an existing directory, or an id such as "google/vit-base-patch16-224".

    Raises:
      PretrainedError: neither a directory nor an id; `huggingface_hub` is not installed; the hub
        cannot be reached or does not have it.
    """
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise PretrainedError(f"{path} is a file, expected the checkpoint's directory around it")
    if isinstance(path_or_hub_id, Path) or not _HUB_ID.fullmatch(path_or_hub_id):
        raise PretrainedError(
            f"{path} does not exist; expected a checkpoint directory, or an id of the Hugging Face "
            "hub such as google/vit-base-patch16-224"
        )
    return _download(path_or_hub_id)


def _download(hub_id: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise PretrainedError(
            f"{hub_id} is no directory here, and downloading it needs huggingface_hub: "
            "`pip install huggingface_hub`, or name the directory of a checkpoint"
        ) from None
    # huggingface_hub reads the variable when it is imported, which may be long ago.
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    try:
        directory = snapshot_download(hub_id, allow_patterns=_PATTERNS, local_files_only=offline)
    except Exception as error:
        # Its errors and those of the HTTP library below it change with the version.
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        hint = (
            "HF_HUB_OFFLINE is set, so only checkpoints downloaded before are found"
            if offline
            else "check the id and the network, or name the directory of a checkpoint"
        )
        raise PretrainedError(
            f"{hub_id} is no directory here and could not be had from the Hugging Face hub "
            f"({why}); {hint}"
        ) from error
    return Path(directory)
