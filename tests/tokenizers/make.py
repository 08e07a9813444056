"""Writes tokenizer.json and tokenizer_config.json of the folders here: python tests/tokenizers/make.py

Each tokenizer has the structure of a model family's tokenizer, and a small vocabulary trained on the golden examples.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

HERE = Path(__file__).resolve().parent
CORPUS = [HERE.parent / "golden" / name for name in ("regex_rows.jsonl", "sql_rows.jsonl", "tricky_rows.jsonl")]
MERGES = 300
FAMILIES = {  # name: (beginning of text, end of turn, padding, other special tokens, added tokens that are not special)
    "llama3_2": ("<|begin_of_text|>", "<|eot_id|>", None, ["<|start_header_id|>", "<|end_header_id|>"], []),
    "gemma3": ("<bos>", "<end_of_turn>", "<pad>", ["<unk>", "<start_of_turn>"], []),
    "qwen3": (None, "<|im_end|>", "<|endoftext|>", ["<|im_start|>"], ["<think>", "</think>"]),
    "mistral_nemo": ("<s>", "</s>", None, ["<unk>", "[INST]", "[/INST]"], []),
    "deepseek_v3": (
        "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>", [],
        ["<｜User｜>", "<｜Assistant｜>"],
    ),
}  # fmt: skip
ADDS_BOS = ("llama3_2", "gemma3", "mistral_nemo")  # to every text
# Digits in groups of three or single; words with a leading space; punctuation with line ends; white space.
PIECES = r"\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def texts() -> list[str]:
    """The contents of the golden examples."""
    rows = [json.loads(line) for path in CORPUS for line in path.read_text(encoding="utf-8").splitlines()]
    return [message["content"] for row in rows for message in row["messages"]]


def byte_level(name: str) -> tuple[Tokenizer, list[str]]:
    """A byte-level BPE, and its alphabet."""
    tokenizer = Tokenizer(models.BPE())
    pieces = PIECES if name in ("llama3_2", "deepseek_v3") else PIECES.replace("{1,3}", "")
    # Qwen's offsets include white space, the others' do not.
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=name != "qwen3", use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pieces), "isolated"), level])
    tokenizer.decoder = decoders.ByteLevel()
    if name == "qwen3":
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer, sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_fallback() -> tuple[Tokenizer, list[str]]:
    """A BPE of characters, spaces as ▁, with tokens of bytes for unknown characters, and its alphabet."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer, [chr(c) for c in range(33, 127)] + ["▁", "\n"]


def write(name: str) -> None:
    """Trains the tokenizer of a family and writes its files."""
    bos, eos, pad, others, not_special = FAMILIES[name]
    tokenizer, alphabet = byte_fallback() if name == "gemma3" else byte_level(name)
    special = list(dict.fromkeys([*filter(None, (pad, bos, eos)), *others]))
    size = len(special) + len(alphabet) + MERGES
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, limit_alphabet=len(alphabet),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts(), trainer)
    if name == "gemma3":
        state = json.loads(tokenizer.to_str())
        vocabulary = state["model"]["vocab"]
        vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
        tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_tokens([AddedToken(token, special=False) for token in not_special])
    if name in ADDS_BOS:
        special_tokens = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=special_tokens)
    tokenizer.save(str(HERE / name / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos,
        "pad_token": pad, "unk_token": "<unk>" if "<unk>" in others else None,
        "clean_up_tokenization_spaces": False, "padding_side": "left" if name == "gemma3" else "right",
    }  # fmt: skip
    (HERE / name / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    for family in FAMILIES:
        write(family)
