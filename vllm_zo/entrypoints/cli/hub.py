"""`--push-to-hub`: uploads what a run has written to a repository of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from vllm_zo.errors import ConfigError, JobError


def check_hub(name: str) -> None:
    """Refuse before the run what would fail after it: no login, a name that no repository can have, no network.

    Raises:
        ConfigError: with what to do about it.
    """
    import huggingface_hub
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"--push-to-hub {name!r}: expected USER/NAME or NAME: {error}") from None
    if HF_HUB_OFFLINE:
        raise ConfigError(f"--push-to-hub {name}: HF_HUB_OFFLINE is set; unset it, or drop the flag.")
    if huggingface_hub.get_token() is None:
        raise ConfigError(f"--push-to-hub {name}: not logged in; run `hf auth login`, or set HF_TOKEN.")


def push(folder: Path, name: str) -> str:
    """Upload a folder; returns a line that says where it is. A repository that is new is private.

    Raises:
        JobError: the hub refuses, or cannot be reached. The message says how to do it by hand.
    """
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        repository = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repository.repo_id, folder_path=folder, commit_message="Trained with vllm_zo, without gradients"
        )
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        said = " ".join(str(error).split())
        raise JobError(f"not pushed to {name}: {said}. By hand: hf upload {name} {folder}") from error
    return f"pushed to {repository}"
