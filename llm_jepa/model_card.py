"""Write the model card of a run, RUN/README.md, and optionally upload the run to a repository of the Hugging Face hub.

python -m llm_jepa.model_card runs/RUN                                       the card: training, settings, scores
python -m llm_jepa.model_card runs/RUN --push_to_hub OWNER/NAME --private    also upload the model with its scores

Only the files in UPLOADED are uploaded, including the command lines and paths in them: no checkpoints, no predictions,
no merged copies of an adapter.
"""

import argparse
import re
import sys
from pathlib import Path

from llm_jepa.cli import FlagParser, UsageError, first_line, run_command

UPLOADED = (
    "model.safetensors adapter_model.safetensors model.safetensors.index.json model-*-of-*.safetensors README.md "
    "args.json run.json metrics.jsonl eval/*/metrics.json config.json generation_config.json adapter_config.json "
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json tokenizer.model vocab.json "
    "vocab.txt merges.txt chat_template.jinja additional_chat_templates/*.jinja"
).split()


def push(run: Path, repo: str, private: bool) -> str:
    """Uploads the run and returns the repository's address.

    Raises UsageError if `private` is set and the repository exists and is public, OSError if the upload fails.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    api = HfApi(token=True)  # an error names `hf auth login` if there is no token
    try:
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.model_info(repo).private:  # the hub ignores `private` for an existing repository
            raise UsageError(f"--private: {repo} exists and is public; nothing was uploaded")
        api.upload_folder(repo_id=repo, folder_path=run, commit_message="Upload of a run", allow_patterns=UPLOADED)
    except (OSError, HTTPError, RuntimeError, ValueError) as error:
        raise OSError(f"--push_to_hub {repo}: upload to {api.endpoint} failed: {first_line(error)}") from None
    return str(url)


def write_and_push(run: Path, overwrite: bool, license: str | None, push_to_hub: str | None, private: bool) -> None:
    """Writes the card and uploads the run, if a repository is given. Raises UsageError if it has no weights."""
    if push_to_hub and not any(run.glob("*model*.safetensors")):
        raise UsageError(f"{run} has no model.safetensors or adapter_model.safetensors to upload")
    from llm_jepa.reports.model_card import write_card

    print(write_card(run, overwrite, license, push_to_hub))
    if push_to_hub:
        print(push(run, push_to_hub, private))


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 written, 1 the upload failed, 2 wrong usage or run."""
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--overwrite", action="store_true", help="replace a README.md that model_card.py did not write")
    parser.add_argument("--license", metavar="ID", help="license of the model, as the hub spells it (apache-2.0 …)")
    parser.add_argument("--push_to_hub", metavar="OWNER/NAME", help="also upload the run to this model repository")
    parser.add_argument("--private", action="store_true", help="--push_to_hub: the repository must be private")
    options = parser.parse_args(argv)
    if options.private and not options.push_to_hub:
        parser.error("--private: only with --push_to_hub")
    if options.push_to_hub and not re.fullmatch(r"[\w.-]+/[\w.-]+", options.push_to_hub):
        parser.error(f"--push_to_hub {options.push_to_hub} is not OWNER/NAME")
    return run_command("model_card.py", lambda: write_and_push(**vars(options)))


if __name__ == "__main__":
    sys.exit(main())
