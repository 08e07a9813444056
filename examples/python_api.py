"""Train, generate, score and embed from Python. Every step of this file is explained in docs/python.md.

    python examples/python_api.py OUTPUT_DIR

Trains the tiny model for a few steps, so its scores are near 0.
"""

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for finetune.py, which is not part of the package

from finetune import fine_tune  # noqa: E402
from llm_jepa.data.examples import Problems, read_examples  # noqa: E402
from llm_jepa.data.rendering import Renderer  # noqa: E402
from llm_jepa.data.segments import Encoder  # noqa: E402
from llm_jepa.evaluation.embeddings import embed, encode_views, similarity  # noqa: E402
from llm_jepa.evaluation.generation import generate  # noqa: E402
from llm_jepa.evaluation.model import layer_states  # noqa: E402
from llm_jepa.evaluation.scores import scored_row, summarize  # noqa: E402
from llm_jepa.model import load_tokenizer  # noqa: E402
from llm_jepa.scoring.tasks import TASKS  # noqa: E402
from llm_jepa.settings import Settings, check_settings  # noqa: E402

TRAIN, TEST = (ROOT / "datasets" / f"synth_{part}.jsonl" for part in ("train", "test"))


def train(train_file: Path, output_dir: str, steps: int) -> Settings:
    """Trains a model into a run folder. Returns the settings with all defaults resolved."""
    settings = Settings(
        train_file=str(train_file),
        model_name=str(ROOT / "models" / "tiny"),
        pretrain=True,  # models/tiny has no weights
        predictors=1,
        lbd=1.0,
        learning_rate=1e-3,
        batch_size=8,
        grad_accum=1,
        max_steps=steps,
        output_dir=output_dir,
    )
    settings = check_settings(settings, given={"max_steps"})  # `given`: checked not to contradict other flags
    state = PartialState(cpu=not torch.cuda.is_available())
    fine_tune(settings, state)
    return settings


def evaluate(model, renderer: Renderer, examples: list, task: str, max_new_tokens: int) -> dict[str, tuple]:
    """(share, its 95 % interval) of each score."""
    with TASKS[task].start(None) as score:  # the argument is for the tasks spider and mbpp
        batches = generate(model, renderer, examples, 64, max_new_tokens)
        rows = [scored_row(example, generation, score) for batch in batches for example, generation in batch]
    metrics = summarize(rows, task)
    return {name: (metrics[name], interval) for name, interval in metrics["ci95"].items()}


def main(
    output_dir: str, train_file: Path = TRAIN, steps: int = 20, examples: int = 200, max_new_tokens: int = 32
) -> tuple[dict, dict]:
    """Returns the scores on the first test examples, and the similarity of their views."""
    settings = train(train_file, output_dir, steps)
    model = AutoModelForCausalLM.from_pretrained(output_dir).eval()  # a run folder is a model folder
    tokenizer = load_tokenizer(output_dir)
    renderer = Renderer(tokenizer, predictors=settings.predictors)  # views are rendered as in training
    test = read_examples(str(TEST), Problems())[:examples]
    scores = evaluate(model, renderer, test, "synth", max_new_tokens)
    _, views = encode_views(model, Encoder(renderer), test, Problems())
    with layer_states(model, tokenizer.pad_token_id, -1) as read:  # of the last layer, as in training
        text, code = embed(views, read, batch_size=64)  # (P, D) each
    return scores, similarity(text, code, seed=42)


if __name__ == "__main__":
    scores, views = main(sys.argv[1])
    for name, (share, (low, high)) in scores.items():
        print(f"{name:12}{100 * share:6.1f} %  [{100 * low:.1f}, {100 * high:.1f}]")
    print(f"cosine of pairs {views['cosine']:.4f}, of shuffled pairs {views['cosine_shuffled']:.4f}")
