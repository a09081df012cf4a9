"""`diffpress push`: an artifact or export on the hub."""

from __future__ import annotations

from pathlib import Path

from diffpress.export.artifact import is_artifact, verify
from diffpress.export.digests import is_card
from diffpress.export.errors import OutputError, UserError
from diffpress.export.manifest import MANIFEST, REPORT
from diffpress.export.portable.manifest import EXPORT, check_files, is_export, read_export

from .card import artifact_card, export_card
from .hub import HUB_ID

CARD = "README.md"


def push(folder: Path, name: str, private: bool = False) -> str:
    """Put what the manifest of `folder` names on the hub in one commit, with a new card; gives its address.

    The repository is made where there is none. Raises UserError where the folder is not sound or the hub refuses.
    """
    if not HUB_ID.fullmatch(name):
        raise UserError(f"{name!r} is no name of a repository: give ORG/NAME.")
    files, card = _sound(folder)
    from huggingface_hub import CommitOperationAdd, HfApi

    operations = [CommitOperationAdd(own, folder / own) for own in files if not is_card(own)]
    operations.append(CommitOperationAdd(CARD, card.encode()))
    api = HfApi(library_name="diffpress")
    try:
        api.create_repo(name, private=private or None, exist_ok=True)
        api.create_commit(name, operations, commit_message=f"Put {folder.resolve().name} here with diffpress")
    except Exception as error:
        # Of many kinds, from no login to no network.
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise OutputError(
            f"{folder} could not be put on the hub as {name} ({reason}). Log in by `hf auth login` with a token that may write "
            "there, check the name and the network, and give the same command again."
        ) from error
    return f"{api.endpoint}/{name}"


def _sound(folder: Path) -> tuple[list[str], str]:
    """The files to be put there, and their card. Raises ArtifactError where one is not as it was saved."""
    if is_export(folder):
        export = read_export(folder)
        check_files(folder, export)
        return [EXPORT, *sorted(export.files)], export_card(folder, export)
    if not is_artifact(folder):
        raise UserError(f"{folder} is neither an artifact nor an export of diffpress: compress or export first.")
    manifest = verify(folder)
    beside = [name for name in (MANIFEST, REPORT) if (folder / name).is_file()]
    return [*beside, *sorted(manifest.files)], artifact_card(folder, manifest)
