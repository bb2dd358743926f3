"""huggingface_hub itself against the server of the tests: it uploads a folder, and reads what we pushed."""

from __future__ import annotations

import sys

from huggingface_hub import HfApi

if __name__ == "__main__":
    folder, target, *paths = sys.argv[1:]
    api = HfApi()
    api.create_repo("org/theirs", private=True, exist_ok=True)
    api.upload_folder(repo_id="org/theirs", folder_path=folder)
    for path in paths:
        api.hf_hub_download("org/name", path, local_dir=target)
