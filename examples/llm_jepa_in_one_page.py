"""LLM-JEPA (arXiv 2509.14252) in one page: the loss of two examples and its gradient, without the rest of the project.

    python examples/llm_jepa_in_one_page.py

    L = gamma * L_LM + lbd * mean of (1 - cos(h_text, h_code))

Letters in shape comments: T tokens of a text, N label tokens, D hidden size, V vocabulary.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

TINY = Path(__file__).resolve().parents[1] / "models" / "tiny"
PAIRS = [  # (Text view, Code view)
    ("lines that start with a vowel", "([AEIOUaeiou]).*"),
    ("lines with the string 'dog' before a number", ".*(dog).*([0-9]).*"),
]
GAMMA, LBD, PREDICTORS = 1.0, 1.0, 2


def load() -> tuple:
    """The tiny model with random parameters, and its tokenizer, which has the predictor tokens."""
    torch.manual_seed(42)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TINY), dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(TINY)


def encode(tokenizer, messages: list[dict]) -> tuple[torch.Tensor, int, int]:
    """Token ids (1, T) of messages in the chat template, and the tokens [first, stop) of the last message's content."""
    text, content = tokenizer.apply_chat_template(messages, tokenize=False), messages[-1]["content"]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    begin = text.rindex(content)  # characters
    end = begin + len(content)
    inside = [t for t, (a, b) in enumerate(encoded["offset_mapping"]) if begin <= a and b <= end]
    return torch.tensor([encoded["input_ids"]]), inside[0], inside[-1] + 1


def lm_loss(model, tokenizer, text: str, code: str) -> tuple[torch.Tensor, int]:
    """(sum, N) of the cross-entropy of the answer's tokens and the end-of-turn token, each predicted by its prefix."""
    chat = [{"role": "user", "content": text}, {"role": "assistant", "content": code}]
    ids, first, stop = encode(tokenizer, chat)  # (1, T)
    stop += 1  # the end-of-turn token is a label too, so that the model learns to stop
    hidden = model.model(ids).last_hidden_state[0]  # (T, D)
    logits = model.lm_head(hidden[first - 1 : stop - 1])  # (N, V)
    return F.cross_entropy(logits, ids[0, first:stop], reduction="sum"), stop - first


def embed(model, tokenizer, role: str, content: str) -> torch.Tensor:
    """The embedding (D,) of a view: the last hidden state, after the final norm, at the last token of its content."""
    ids, _, stop = encode(tokenizer, [{"role": role, "content": content}])  # (1, T)
    hidden = model.model(ids).last_hidden_state  # (1, T, D)
    return hidden[0, stop - 1]  # (D,)


def objective(model, tokenizer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(L_LM, L_JEPA, L) of PAIRS. The sums are divided by the numbers of labels and pairs in all examples."""
    predictors = "".join(f"<|predictor_{i}|>" for i in range(PREDICTORS, 0, -1))
    lm_sum, jepa_sum, labels = 0.0, 0.0, 0
    for text, code in PAIRS:
        loss, count = lm_loss(model, tokenizer, text, code)
        lm_sum, labels = lm_sum + loss, labels + count
        # With predictor tokens appended, the model itself predicts the Code view's embedding from the Text view.
        h_text = embed(model, tokenizer, "user", text + predictors)  # (D,)
        h_code = embed(model, tokenizer, "assistant", code)  # (D,)
        jepa_sum = jepa_sum + 1 - F.cosine_similarity(h_text, h_code, dim=-1)  # gradients flow into both
    lm, jepa = lm_sum / labels, jepa_sum / len(PAIRS)
    return lm, jepa, GAMMA * lm + LBD * jepa


if __name__ == "__main__":
    model, tokenizer = load()
    lm, jepa, total = objective(model, tokenizer)
    total.backward()  # an optimizer step would follow
    print(f"lm loss {lm.item():.6f}, jepa loss {jepa.item():.6f}, total {total.item():.6f}")
