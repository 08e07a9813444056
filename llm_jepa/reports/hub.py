"""Upload a run to a model repository of the Hugging Face hub.

Only these files are uploaded: model, tokenizer, card, args.json, run.json, metrics.jsonl and each evaluation's
metrics.json, including the command lines and paths in them. Checkpoints, predictions, merged copies of an adapter and
all other files of the folder are not.
"""

from __future__ import annotations

import glob
import re
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HTTPError

from llm_jepa.cli import UsageError, first_line

FILES = set("README.md args.json run.json metrics.jsonl config.json generation_config.json adapter_config.json "
            "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json tokenizer.model vocab.json "
            "vocab.txt merges.txt chat_template.jinja model.safetensors.index.json".split())  # fmt: skip
WEIGHTS = re.compile(r"(adapter_)?model(-\d+-of-\d+)?\.safetensors")


class PushError(OSError):
    """The upload failed: the hub cannot be reached or refuses."""


def files_to_upload(run: Path) -> list[str]:
    """The files of a run folder that are uploaded."""
    files = [p.name for p in run.iterdir() if p.is_file() and (p.name in FILES or WEIGHTS.fullmatch(p.name))]
    return sorted(files) + sorted(p.relative_to(run).as_posix() for p in run.glob("eval/*/metrics.json"))


def check(run: Path, repo: str) -> None:
    """Raises UsageError if the upload cannot work: repository name, offline mode, token, model files."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UsageError(f"--push_to_hub {repo} is not OWNER/NAME")
    if constants.is_offline_mode():
        raise UsageError(f"--push_to_hub {repo}: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set; unset it")
    if get_token() is None:
        raise UsageError(f"--push_to_hub {repo}: there is no token; set HF_TOKEN or call `hf auth login`")
    if not any(WEIGHTS.fullmatch(name) for name in files_to_upload(run)):
        raise UsageError(f"{run} has no model.safetensors or adapter_model.safetensors to upload")


def push(run: Path, repo: str, private: bool) -> str:
    """Uploads the run and returns the repository's address.

    Raises UsageError if `private` is set and the repository exists and is public, PushError if the upload fails.
    """
    api = HfApi()
    try:
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.model_info(repo).private:  # the hub ignores `private` for an existing repository
            raise UsageError(f"--private: {repo} exists and is public; nothing was uploaded")
        api.upload_folder(
            repo_id=repo,
            folder_path=run,
            commit_message="Upload of a run",
            allow_patterns=[glob.escape(name) for name in files_to_upload(run)],
        )
    except (OSError, HTTPError, RuntimeError, ValueError) as error:
        raise PushError(f"--push_to_hub {repo}: upload to {api.endpoint} failed: {first_line(error)}") from None
    return str(url)
