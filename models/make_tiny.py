"""Writes the tiny model of the tests and the quick start: a Llama configuration and a tokenizer, without weights.

    python models/make_tiny.py --out_dir models/tiny

The tokenizer is trained on `datasets/synth_train.jsonl`, with the vocabulary size and the special tokens of the
configuration files in `models/tiny`. The same examples give the same files, byte for byte.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

TINY = Path(__file__).resolve().parent / "tiny"
EXAMPLES = TINY.parents[1] / "datasets" / "synth_train.jsonl"

# A token lies within one of these pieces: a character class with its parentheses, a run of operators and digits, a word
# with adjacent space and quotes, other signs, white space, or any single character, so that every text can be encoded.
PIECES = r"""\(?\[[A-Za-z0-9\-]+\]\)?|[.()*+&|~\\{},0-9]+| ?'?[^\W\d_]+'?|[^\S\n]*[^\s\w]+|\s+|[\w\W]"""


def make_tokenizer(texts: Iterable[str], vocab_size: int, special: Sequence[str]) -> Tokenizer:
    """Trains a byte-level BPE tokenizer; `vocab_size` includes the special tokens, whose ids are 0, 1, 2, … in order.

    Decoding an encoded text returns the same text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the files to `--out_dir` and prints the numbers of tokens and parameters."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out_dir", type=Path, default=TINY, help="output folder")
    args = parser.parse_args(argv)
    with EXAMPLES.open(encoding="utf-8") as lines:
        texts = [message["content"] for line in lines for message in json.loads(line)["messages"]]
    names = ("config.json", "tokenizer_config.json", "chat_template.jinja")
    files = {name: (TINY / name).read_text(encoding="utf-8") for name in names}
    config, options = (json.loads(files[name]) for name in names[:2])
    special = [options["pad_token"], options["eos_token"], *options["additional_special_tokens"]]
    files["tokenizer.json"] = make_tokenizer(texts, config["vocab_size"], special).to_str(pretty=True) + "\n"
    args.out_dir.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (args.out_dir / name).write_text(content, encoding="utf-8", newline="\n")
    tokens = len(AutoTokenizer.from_pretrained(args.out_dir))
    parameters = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.out_dir)).num_parameters()
    print(f"{args.out_dir}: {tokens} tokens, {parameters:,} parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
