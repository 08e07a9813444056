"""models/tiny: its tokenizer keeps any text, make_tiny.py writes the committed files."""

import subprocess
import sys

from conftest import ROOT, snapshot
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoTokenizer

TINY = ROOT / "models" / "tiny"
SPECIAL = [f"<|{name}|>" for name in ("pad", "eot_id", "system", "user", "assistant", "perception")]
SPECIAL += [f"<|predictor_{k}|>" for k in range(1, 11)]

TOKENIZER = AutoTokenizer.from_pretrained(TINY)


@settings(deadline=None, max_examples=200)
@given(st.text())
@example("  two  spaces \t\n\r\n and a tail \n")
@example("naïve café, Ωmega, 漢字, \U0001f9ea\u200d\U0001f52c, e\u0301, \ufeff, \x00\x1f")
@example(r"~((\b[A-Za-z]\b){1,12})&(.*)|(dog)*")
@example("don't , . don 't ' dog' 'dog' <|user <|user|")
def test_decoding_an_encoded_text_returns_the_text(text):
    if any(token in text for token in SPECIAL):
        return
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text and not set(ids) & set(range(len(SPECIAL)))


def test_special_tokens_have_fixed_ids_that_the_configuration_has_too():
    assert sorted(TOKENIZER.get_vocab().values()) == list(range(512)) and TOKENIZER.model_max_length == 1024
    assert TOKENIZER.convert_tokens_to_ids(SPECIAL) == sorted(TOKENIZER.all_special_ids) == list(range(16))
    for token in SPECIAL:
        assert TOKENIZER.encode(f"a{token}b")[1:-1] == [SPECIAL.index(token)]
    assert (TOKENIZER.pad_token, TOKENIZER.eos_token, TOKENIZER.bos_token) == ("<|pad|>", "<|eot_id|>", None)
    config = AutoConfig.from_pretrained(TINY)
    assert (config.vocab_size, config.max_position_embeddings) == (len(TOKENIZER), TOKENIZER.model_max_length)
    assert (config.pad_token_id, config.eos_token_id) == (TOKENIZER.pad_token_id, TOKENIZER.eos_token_id)


def test_make_tiny_writes_the_committed_files(tmp_path):
    command = [sys.executable, str(ROOT / "models" / "make_tiny.py"), "--out_dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert snapshot(tmp_path) == snapshot(TINY)
