"""The tiny model: its tokenizer keeps any text, its chat template is what it says, its files can be made again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "models" / "tiny"
FILES = ["chat_template.jinja", "config.json", "tokenizer.json", "tokenizer_config.json"]
ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]
PREDICTORS = [f"<|predictor_{k}|>" for k in range(1, 11)]
SPECIAL = ["<|pad|>", "<|eot_id|>", *ROLES, "<|perception|>", *PREDICTORS]

SYSTEM = {"role": "system", "content": "Convert natural language to regular expression."}
USER = {"role": "user", "content": "lines with a vowel before the string 'dog', 3 or more times"}
ASSISTANT = {"role": "assistant", "content": r"([AEIOUaeiou]).*((dog){3,}).*"}

TOKENIZER = AutoTokenizer.from_pretrained(TINY)


def render(messages, **options):
    return TOKENIZER.apply_chat_template(messages, tokenize=False, **options)


# ---- tokenizer ----


@settings(deadline=None, max_examples=500)
@given(st.text())
@example("")
@example("  two  spaces \t\n\r\n and a tail \n")
@example("naïve café, Ωmega, 漢字, \U0001f9ea\u200d\U0001f52c, e\u0301, \ufeff, \x00\x1f")
@example(r"~((\b[A-Za-z]\b){1,12})&(.*)|(dog)*")
@example("don't , . don 't ' dog' 'dog' <|user <|user|")
def test_any_text_survives_the_tokenizer(text):
    if any(token in text for token in SPECIAL):
        return
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert not set(ids) & set(range(len(SPECIAL)))


def test_there_are_512_tokens_and_no_more():
    assert len(TOKENIZER) == 512
    assert sorted(TOKENIZER.get_vocab().values()) == list(range(512))
    assert TOKENIZER.model_max_length == 1024


def test_special_tokens_have_their_ids_and_stay_whole():
    assert TOKENIZER.convert_tokens_to_ids(SPECIAL) == list(range(16))
    for token in SPECIAL:
        assert TOKENIZER.encode(f"a{token}b", add_special_tokens=False)[1:-1] == [SPECIAL.index(token)]
    assert (TOKENIZER.pad_token, TOKENIZER.eos_token, TOKENIZER.bos_token) == ("<|pad|>", "<|eot_id|>", None)
    assert sorted(TOKENIZER.all_special_ids) == list(range(16))
    assert TOKENIZER.decode(TOKENIZER.encode("<|user|>a vowel<|eot_id|>"), skip_special_tokens=True) == "a vowel"


def test_nothing_is_put_before_or_after_a_text():
    assert TOKENIZER.encode("lines") == TOKENIZER.encode("lines", add_special_tokens=False)
    assert TOKENIZER.decode(TOKENIZER.encode("lines")) == "lines"


def test_frequent_pieces_are_one_token():
    for piece in ["[AEIOUaeiou]", "[0-9]", "[A-Z]", "[a-z]", "[A-Za-z]", " vowel", " letter", " followed", " before"]:
        assert len(TOKENIZER.encode(piece)) == 1, piece
    assert len(TOKENIZER.encode(render([SYSTEM, USER, ASSISTANT]))) < 45


# ---- chat template ----


def test_template_renders_exactly():
    system = "<|system|>Convert natural language to regular expression.<|eot_id|>"
    user = "<|user|>lines with a vowel before the string 'dog', 3 or more times<|eot_id|>"
    assistant = r"<|assistant|>([AEIOUaeiou]).*((dog){3,}).*<|eot_id|>"
    assert render([SYSTEM, USER, ASSISTANT]) == system + user + assistant
    assert render([SYSTEM, USER], add_generation_prompt=True) == system + user + "<|assistant|>"
    assert render([USER]) == user
    assert render([ASSISTANT]) == assistant
    assert render([USER, ASSISTANT, USER]) == user + assistant + user


def test_template_trims_content_and_keeps_what_is_inside():
    messages = [{"role": "user", "content": " \n a  b\n\n<c> & 'd' \t"}]
    assert render(messages) == "<|user|>a  b\n\n<c> & 'd'<|eot_id|>"
    assert render([{"role": "assistant", "content": ""}]) == "<|assistant|><|eot_id|>"


@pytest.mark.parametrize("role", ["tool", "System", ""])
def test_template_refuses_other_roles(role):
    with pytest.raises(TemplateError, match="unknown role"):
        render([{"role": role, "content": "text"}])


def test_tokens_of_the_rendered_text_are_those_of_the_template():
    ids = TOKENIZER.apply_chat_template([SYSTEM, USER, ASSISTANT], return_dict=True)["input_ids"]
    assert ids == TOKENIZER.encode(render([SYSTEM, USER, ASSISTANT]))
    assert [ids.count(SPECIAL.index(role)) for role in ROLES] == [1, 1, 1]
    assert ids.count(TOKENIZER.eos_token_id) == 3 and ids[-1] == TOKENIZER.eos_token_id


# ---- model ----


def test_configuration_agrees_with_the_tokenizer():
    config = AutoConfig.from_pretrained(TINY)
    assert config.vocab_size == len(TOKENIZER)
    assert (config.pad_token_id, config.eos_token_id) == (TOKENIZER.pad_token_id, TOKENIZER.eos_token_id)
    assert config.bos_token_id is None
    assert config.max_position_embeddings == TOKENIZER.model_max_length
    assert (config.hidden_size, config.num_hidden_layers, config.tie_word_embeddings) == (192, 4, True)
    assert config.dtype == torch.float32


def test_model_has_about_two_million_weights_and_runs():
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TINY))
    assert 1_500_000 < model.num_parameters() < 2_500_000
    assert model.num_parameters() == 1_869_504
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    batch = TOKENIZER([render([USER]), render([ASSISTANT])], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits  # (B, T, V)
    assert logits.shape == (*batch["input_ids"].shape, 512) and logits.isfinite().all()


# ---- the files ----


def test_files_are_small_and_can_be_made_again(tmp_path):
    environment = {**os.environ, "RAYON_NUM_THREADS": "2", "PYTHONHASHSEED": "7"}
    command = [sys.executable, str(ROOT / "models" / "make_tiny.py"), "--out_dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "512 tokens, 1,869,504 weights" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (TINY / name).read_bytes(), name
    assert sum((TINY / name).stat().st_size for name in FILES) < 200_000
