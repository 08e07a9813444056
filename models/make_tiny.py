"""Writes the tiny model of the tests and the quick start: a Llama configuration and a tokenizer, without weights.

    python models/make_tiny.py --out_dir models/tiny

The tokenizer is trained on `datasets/synth_train.jsonl`. The same examples give the same files, byte for byte.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parent / "datasets" / "synth_train.jsonl"

VOCAB_SIZE = 512  # including special tokens
MAX_LENGTH = 1024  # tokens
PAD, END, PERCEPTION = "<|pad|>", "<|eot_id|>", "<|perception|>"
PREDICTORS = tuple(f"<|predictor_{k}|>" for k in range(1, 11))
SPECIAL = (PAD, END, "<|system|>", "<|user|>", "<|assistant|>", PERCEPTION, *PREDICTORS)

# A token lies within one of these pieces: a character class with its parentheses, a run of operators and digits, a word
# with adjacent space and quotes, other signs, white space, or any single character, so that every text can be encoded.
PIECES = r"""\(?\[[A-Za-z0-9\-]+\]\)?|[.()*+&|~\\{},0-9]+| ?'?[^\W\d_]+'?|[^\S\n]*[^\s\w]+|\s+|[\w\W]"""

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant'] -%}
{{- raise_exception('unknown role ' ~ message['role'] ~ ': system, user and assistant are the roles') -}}
{%- endif -%}
{{- '<|' ~ message['role'] ~ '|>' ~ message['content'] | trim ~ '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' -}}
{%- endif -%}
"""


# Written here instead of saved by the library, so that the files do not change with its version.
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": MAX_LENGTH,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": SPECIAL.index(END),
    "pad_token_id": SPECIAL.index(PAD),
    "dtype": "float32",
    "use_cache": True,
}
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "pad_token": PAD,
    "eos_token": END,
    "additional_special_tokens": list(SPECIAL[2:]),
    "model_max_length": MAX_LENGTH,
    "clean_up_tokenization_spaces": False,
}


def make_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Trains a byte-level BPE tokenizer of `VOCAB_SIZE` tokens. Decoding an encoded text returns the same text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL),  # ids 0, 1, 2, … in this order
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the files to `--out_dir` and prints the numbers of tokens and parameters."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out_dir", type=Path, default=HERE / "tiny", help="output folder")
    args = parser.parse_args(argv)
    with EXAMPLES.open(encoding="utf-8") as lines:
        texts = [message["content"] for line in lines for message in json.loads(line)["messages"]]
    files = {
        "tokenizer.json": make_tokenizer(texts).to_str(pretty=True),
        "tokenizer_config.json": json.dumps(TOKENIZER_CONFIG, indent=2),
        "config.json": json.dumps(CONFIG, indent=2),
        "chat_template.jinja": CHAT_TEMPLATE.rstrip("\n"),
    }
    args.out_dir.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (args.out_dir / name).write_text(content + "\n", encoding="utf-8", newline="\n")
    tokens = len(AutoTokenizer.from_pretrained(args.out_dir))
    parameters = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.out_dir)).num_parameters()
    print(f"{args.out_dir}: {tokens} tokens, {parameters:,} parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
