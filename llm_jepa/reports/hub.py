"""Uploads a run to a model repository of the Hugging Face hub; model_card.py --push_to_hub calls it.

Only what is named here goes out: weights, tokenizer, card, args.json, run.json, metrics.jsonl and each evaluation's
metrics.json, with the command lines and paths that these hold. Checkpoints and their optimiser states, predictions, a
merged copy of an adapter, training_args.bin and whatever else lies in the folder stay here.
"""

from __future__ import annotations

import glob
import re
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError  # the last is its HTTP library's own
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from llm_jepa.cli import UsageError, first_line
from llm_jepa.files import read_json

INDEX = "model.safetensors.index.json"
FILES = set("README.md args.json run.json metrics.jsonl config.json generation_config.json adapter_config.json "
            "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json tokenizer.model vocab.json "
            f"vocab.txt merges.txt chat_template.jinja {INDEX}".split())  # fmt: skip
WEIGHTS = re.compile(r"(adapter_)?model(-\d+-of-\d+)?\.safetensors")


class PushError(Exception):
    """The hub cannot be reached or refuses: nothing that other flags would mend."""


def uploaded(run: Path) -> list[str]:
    """The files of a run folder that go to the hub."""
    files = [p.name for p in run.iterdir() if p.is_file() and (p.name in FILES or WEIGHTS.fullmatch(p.name))]
    return sorted(files) + sorted(p.relative_to(run).as_posix() for p in run.glob("eval/*/metrics.json"))


def check(run: Path, repo: str) -> None:
    """Raises UsageError where nothing could be uploaded, before anything is written or sent."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(f"--push_to_hub {repo}: {first_line(error)}") from None
    if "/" not in repo:
        raise UsageError(f"--push_to_hub {repo} is not OWNER/NAME")
    if constants.is_offline_mode():
        raise UsageError(f"--push_to_hub {repo}: the environment sets HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE; unset it")
    if get_token() is None:
        raise UsageError(f"--push_to_hub {repo}: there is no token; set HF_TOKEN or call `hf auth login`")
    if not run.is_dir():
        raise UsageError(f"{run}: no such run")
    parts = set(read_json(run / INDEX)["weight_map"].values()) if (run / INDEX).is_file() else set()
    for name in sorted(parts) or ["adapter_model.safetensors" if (run / "adapter_config.json").is_file() else
                                  "model.safetensors"]:  # fmt: skip
        try:
            with safe_open(run / name, framework="numpy"):
                pass
        except (OSError, SafetensorError) as error:
            raise UsageError(f"{run / name}: no weights to upload ({first_line(error)})") from None


def push(run: Path, repo: str, private: bool) -> str:
    """Uploads the run and returns the repository's address.

    Raises UsageError where `private` is asked for and the repository is there and public, PushError where the hub
    cannot be reached or refuses.
    """
    api = HfApi()
    try:
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        # The hub ignores `private` for a repository that is there already.
        if private and not api.model_info(repo).private:
            raise UsageError(f"--private: {repo} is there already and public; nothing was uploaded")
        api.upload_folder(
            repo_id=repo,
            folder_path=run,
            commit_message="Upload of a run",
            allow_patterns=[glob.escape(name) for name in uploaded(run)],
        )
    except HfHubHTTPError as error:
        code = error.response.status_code
        why = {401: "the token is not valid", 403: "the token's owner may not write there"}.get(code, first_line(error))
        raise PushError(f"--push_to_hub {repo}: the hub refuses ({code}): {why}") from None
    except (OSError, HTTPError) as error:
        raise PushError(f"--push_to_hub {repo}: {api.endpoint} cannot be reached ({first_line(error)})") from None
    except (ValueError, RuntimeError) as error:
        raise PushError(f"--push_to_hub {repo}: {first_line(error)}") from None
    return str(url)
