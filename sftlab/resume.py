"""Large files from the Hub, fetched so that a stop loses nothing: the next call asks for the rest alone (HTTP Range).

huggingface_hub takes a broken line up again within one call, but throws away what it has of a file when the call ends. Here
that part stays beside the cache's blobs, and becomes a blob once its SHA-256 is the one that the Hub gives: from then on the
file is huggingface_hub's like any other.

    sftlab download EleutherAI/gpt-neo-125M
"""

import hashlib
import os
from pathlib import Path

from sftlab.options import UserError


def find_part(blobs: Path, sha256: str) -> Path:
    """The file with what has come so far."""
    return blobs / f"{sha256}.part"


def count_part(blobs: Path, sha256: str) -> int:
    """Bytes of a file that have come so far."""
    part = find_part(blobs, sha256)
    return part.stat().st_size if part.exists() else 0


def fetch_file(hub_id: str, commit: str, name: str, size: int, sha256: str, blobs: Path) -> None:
    """One file into the cache's blobs, from where an earlier call has stopped. size: bytes.

    Processes that want the same file take turns. Raises UserError if what has come is not the Hub's file.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers
    from tqdm.auto import tqdm

    blob, part = blobs / sha256, find_part(blobs, sha256)
    locks = blobs.parent.parent / ".locks" / blobs.parent.name  # where huggingface_hub has its own
    for folder in (blobs, locks):
        folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(locks / f"{part.name}.lock"):
        if blob.exists():
            return
        before = count_part(blobs, sha256)
        if before > size:
            part.unlink()
            before = 0
        with part.open("ab") as file:
            http_get(hf_hub_url(hub_id, name, revision=commit), file, resume_size=before, headers=build_hf_headers(),
                     expected_size=size, displayed_filename=name, tqdm_class=tqdm)  # fmt: skip
        if before and hash_file(part) != sha256:  # a whole answer is checked by its length, two halves may not fit
            part.unlink()
            raise UserError(f"model {hub_id}: {name} came whole but is not the Hub's file; it is removed. Start again.")
        os.replace(part, blob)


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hex; a second or two for each GB."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
