"""`plainloop push`: upload an exported folder to the Hub, in one commit."""

from __future__ import annotations

import sys
from pathlib import Path

from plainloop.trainer.config.trained_options import PushConfig
from plainloop.trainer.errors import InputError
from plainloop.trainer.publish.model_card import TO_COMPLETE
from plainloop.trainer.run_folder.files import read_source
from plainloop.trainer.trained.model_folder import checkpoint_path


def push(config: PushConfig) -> str:
    """Return the address of the commit. Raises InputError."""
    from huggingface_hub import HfApi, constants, errors

    if not config.folder or not config.repo:
        raise InputError("push needs a folder and a name: plainloop push DIR USER/NAME.")
    folder = Path(config.folder)
    if (read_source(folder) or {}).get("kind") != "export":
        raise InputError(f"{folder}: was not written by plainloop export; export the run first.")
    checkpoint_path(str(folder))  # verifies it
    try:
        card = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{folder / 'README.md'}: can't be read ({error}); export the run again.") from None
    if TO_COMPLETE in card:
        print(f"warning: {folder / 'README.md'} is not complete: licence and intended use", file=sys.stderr)
    if constants.HF_HUB_OFFLINE:
        raise InputError("HF_HUB_OFFLINE is set: push needs the network; unset it on a node with internet.")
    try:
        api = HfApi(endpoint=constants.ENDPOINT)
        api.create_repo(config.repo, private=config.private, exist_ok=True)
        if config.private and not api.repo_info(config.repo).private:
            raise InputError(f"{config.repo}: is a public repository; choose another, or --private false.")
        commit = api.upload_folder(
            repo_id=config.repo, folder_path=folder, commit_message=config.message, delete_patterns="*"
        )
    except InputError:
        raise
    except errors.HFValidationError as error:
        raise InputError(f"{config.repo}: must be USER/NAME ({error}).") from None
    except errors.LocalTokenNotFoundError:
        raise InputError("push needs a token of the Hub: run `hf auth login` once.") from None
    except Exception as error:  # those of the HTTP library, which has changed more than once
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{config.repo}: could not be uploaded to {constants.ENDPOINT} ({reason}). Run this where there"
            " is internet, with a token that may write (`hf auth login`)."
        ) from None
    return str(commit.commit_url)
