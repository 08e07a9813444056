"""Tokenizers, encoders and models for every chat template that the tests cover."""

from dataclasses import fields
from functools import cache
from typing import Any

from conftest import GOLDEN, MODELS, ROOT
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from llm_jepa.data.batching import SegmentDataset
from llm_jepa.data.examples import Example, Problems
from llm_jepa.data.rendering import Renderer
from llm_jepa.data.segments import Encoder
from llm_jepa.data.spans import Draws
from llm_jepa.forward import LMHeadSelector
from llm_jepa.model import load_model, load_tokenizer

END_OF_TURN = {
    "llama3": "<|eot_id|>", "chatml": "<|im_end|>", "google_gemma": "<end_of_turn>", "tiny": "<|eot_id|>",
    "deepseek_v3": "<｜end▁of▁sentence｜>", "gemma3": "<end_of_turn>", "llama3_2": "<|eot_id|>",
    "mistral_nemo": "</s>", "qwen3": "<|im_end|>",
}  # fmt: skip
FOLDERS = {name: ROOT / "tests" / "tokenizers" / name for name in END_OF_TURN}
FOLDERS |= {name: GOLDEN / "models" / name for name in MODELS} | {"tiny": ROOT / "models" / "tiny"}
# Configurations of Llama-3.2-1B and Llama-3.1-8B.
LLAMA_1B = {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
            "tie_word_embeddings": True}  # fmt: skip
LLAMA_8B = LLAMA_1B | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128,
                       "tie_word_embeddings": False}  # fmt: skip
RENDERING = {f.name for f in fields(Renderer)}


@cache
def tokenizer(name: str, plain: bool = False) -> Any:
    """The tokenizer with the method's special tokens."""
    return load_tokenizer(str(FOLDERS[name]), plain=plain)


def encoder(name: str, **flags: Any) -> Encoder:
    """The encoder that these flags of finetune.py make."""
    rendering = {key: value for key, value in flags.items() if key in RENDERING}
    renderer = Renderer(tokenizer(name, flags.get("plain", False)), **rendering)
    return Encoder(renderer, **{key: value for key, value in flags.items() if key not in RENDERING})


def dataset(examples: list[Example], encoder: Encoder, draws: Draws | None = None) -> SegmentDataset:
    """The encoded examples. Raises ExampleError for an example that cannot be used."""
    return SegmentDataset(examples, encoder, Problems(), draws or Draws(0))


@cache
def model(name: str, plain: bool = False) -> tuple[Any, LMHeadSelector]:
    """A small model and its selector: a golden model, or random parameters."""
    text = tokenizer(name, plain)
    if name in MODELS:
        loaded = load_model(str(FOLDERS[name]), None, text)
    else:
        set_seed(0)
        config = LlamaConfig(
            vocab_size=len(text), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1,
        )  # fmt: skip
        loaded = LlamaForCausalLM(config)
    loaded.eval()
    return loaded, LMHeadSelector(loaded)
