"""Embeddings of an example's two views, and what is said of them.

`embed` reads them where training does, `similarity` measures them (paper section 4.2 and Table 14), `export` writes
them and `t_sne` draws them.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
from safetensors.torch import save
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from llm_jepa.cli import UsageError
from llm_jepa.data.examples import Example, ExampleError, Problems
from llm_jepa.data.segments import Encoder, Segment
from llm_jepa.evaluation.generation import batches
from llm_jepa.files import write_json
from llm_jepa.model import context_length
from llm_jepa.reports import plots
from llm_jepa.scoring.tasks import STARS

# Letters: P pairs, R rows of a batch, T tokens in a row, D hidden size.

# --embedding_pooling: hidden states (R, T, D), which of them are no padding (R, T), view tokens (R,) → (R, D).
POOLINGS = {
    "last": lambda hidden, mask, view_at: hidden[torch.arange(len(hidden)), view_at],
    "mean": lambda hidden, mask, view_at: (hidden.float() * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True),
    "cls": lambda hidden, mask, view_at: hidden[:, 0],
}
PARAPHRASE_SETS = 10  # with more, colours would no longer be told apart


# ---------------------------------------------------------------------------------------------------------- embed


def view_segments(model: Any, encoder: Encoder, examples: list[Example]) -> tuple[list[Segment], list[Segment]]:
    """(Text views, Code views), in this order also where --reverse_pred trained on the Code view first.

    Raises ExampleError for a view that cannot be rendered or is longer than the model's context.
    """
    limit, views = context_length(model.config), encoder.views(examples)
    if encoder.text_view == "in_chat":
        chats = encoder.chats(examples)
        texts = [chat if isinstance(chat, ValueError) else chat.text_view for chat in chats]
        views = [(text, code) for text, (_, code) in zip(texts, views, strict=True)]
    for example, view in ((e, v) for e, pair in zip(examples, views, strict=True) for v in pair):
        if isinstance(view, ValueError):
            raise ExampleError(f"{example.source}: {view}")
        if limit and len(view.ids) > limit:
            raise ExampleError(f"{example.source}: a view has {len(view.ids)} tokens, the model's context {limit}")
    first, second = (list(side) for side in zip(*views, strict=True))
    return (second, first) if encoder.renderer.reverse_pred else (first, second)


def usable(model: Any, encoder: Encoder, examples: list[Example], problems: Problems) -> list[Example]:
    """The examples whose views can be encoded. Raises ExampleError for another one unless `problems` skips those."""
    good = []
    for example in examples:
        try:
            view_segments(model, encoder, [example])
            good.append(example)
        except ExampleError as error:
            problems.add(example.source, str(error).removeprefix(f"{example.source}: "))
    if not good:
        raise ExampleError("no usable example is left: " + "; ".join(problems.messages[:3]))
    return good


def hidden_states(model: Any, ids: torch.Tensor, mask: torch.Tensor, layer: int) -> torch.Tensor:
    """A layer's hidden states (R, T, D): 0 the embedding layer, −1 the last one behind the final norm.

    Raises UsageError where the model has no such layer.
    """
    # The decoder alone: logits of every token would take more memory than all else, and so would every layer's states.
    out = model.get_decoder()(
        input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=layer != -1, return_dict=True
    )
    if layer == -1:
        return out.last_hidden_state
    n = len(out.hidden_states)
    if not -n <= layer < n:
        raise UsageError(f"--embedding_layer {layer} is not in {-n} to {n - 1}, the layers of this model")
    return out.hidden_states[layer]


def embed(
    model: Any, encoder: Encoder, examples: list[Example], batch_size: int, layer: int = -1, pooling: str = "last",
    *, tokens_per_batch: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Embeddings (P, D) of the Text and the Code views, float32 on the CPU, in the order of the examples.

    Views are encoded by `encoder`, whose flags are those of training, and encoded in batches as in
    `generation.batches`, each in a row of its own. Pooling `last` reads the view token, as the JEPA loss does; `mean`
    averages over all the view's tokens, those of template and predictors too; `cls` is the first token, which in a
    causal model has seen nothing of the view. The model is put in evaluation mode.

    Raises ExampleError for a view that cannot be encoded, UsageError for a wrong layer or embeddings that overflow.
    """
    text, code = view_segments(model, encoder, examples)
    segments, pad = text + code, encoder.renderer.tokenizer.pad_token_id
    model.eval()
    parts, order = [], []
    with tqdm(total=len(segments), unit="view") as bar, torch.inference_mode():
        for indices in batches([len(s.ids) for s in segments], batch_size, tokens_per_batch):
            batch = [segments[i] for i in indices]
            order += indices
            ids = pad_sequence([torch.from_numpy(s.ids) for s in batch], batch_first=True, padding_value=pad)  # (R, T)
            mask = (torch.arange(ids.shape[1]) < torch.tensor([[len(s.ids)] for s in batch])).long()  # (R, T)
            hidden = hidden_states(model, ids.to(model.device), mask.to(model.device), layer)
            view_at = torch.tensor([s.view for s in batch])
            parts.append(POOLINGS[pooling](hidden, mask.to(hidden.device), view_at).float().cpu())  # (R, D)
            bar.update(len(batch))
    vectors = torch.cat(parts)[torch.tensor(order).argsort()]  # (2P, D)
    if not vectors.isfinite().all():
        raise UsageError("the embeddings are not finite in this precision; give --dtype float32")
    return vectors[: len(text)], vectors[len(text) :]


# -------------------------------------------------------------------------------------------------------- measure


def derangement(n: int, seed: int) -> np.ndarray:
    """A permutation of n > 1 things that leaves none in its place: a single cycle, drawn by seed."""
    order, partner = np.random.default_rng(seed).permutation(n), np.empty(n, dtype=np.int64)
    partner[order] = np.roll(order, 1)
    return partner


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors (P, D) of length 1; one of length 0 stays, its cosine with any other being 0."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1)


def retrieval(text: np.ndarray, code: np.ndarray, at: tuple[int, ...] = (1, 10)) -> dict[int, float]:
    """Share of the texts whose own code is among the k codes of greatest cosine, for each k of `at`.

    Codes as near as the own one share their places: it counts as found with the probability that it is among the first
    k when they are put in random order. Embeddings collapsed into one point thus score chance, k / P.
    """
    text, code, found = unit(text), unit(code), dict.fromkeys(at, 0.0)
    for begin in range(0, len(text), 1000):
        cosines = text[begin : begin + 1000] @ code.T  # (≤ 1000, P)
        own = np.take_along_axis(cosines, begin + np.arange(len(cosines))[:, None], axis=1)
        rounding = 1e-12  # of equal vectors' cosines in float64
        nearer = (cosines > own + rounding).sum(axis=1)
        equal = (np.abs(cosines - own) <= rounding).sum(axis=1)  # the own one among them
        for k in at:
            found[k] += float(np.clip((k - nearer) / equal, 0, 1).sum())
    return {k: found[k] / len(text) for k in at}


def least_squares(text: np.ndarray, code: np.ndarray, shuffled: np.ndarray) -> tuple[float, float, float] | None:
    """How far the codes Y (P, D) are from a linear map of the texts X (P, D), without a constant term.

    (error, relative, by chance): error = min over W (D, D) of ‖XW − Y‖², the squared Frobenius norm, summed over pairs
    and dimensions; relative = error / ‖Y‖²; by chance, the latter for Y[shuffled], the codes of other pairs, since the
    fit grows easier the nearer P is to D. With P ≤ D there is a W of error 0 for any codes (unless texts depend on one
    another linearly), which says nothing: None, and more pairs are needed.
    """
    if len(text) <= text.shape[1]:
        return None
    both = np.hstack([code, code[shuffled]])  # (P, 2D), so that X is factorised once
    rounding = np.finfo(np.float64).eps * len(text)  # numpy's own, whose solver is several times slower
    residual = text @ scipy.linalg.lstsq(text, both, cond=rounding, lapack_driver="gelsy")[0] - both
    error, by_chance = (float(np.square(part).sum()) for part in np.hsplit(residual, 2))
    total = float(np.square(code).sum()) or 1.0
    return error, error / total, by_chance / total


def similarity(text: torch.Tensor, code: torch.Tensor, seed: int) -> dict[str, Any]:
    """What is said of the views' embeddings, (P, D) each, computed in float64.

    `n` and `dims` (P and D); `cosine`, the mean over pairs, and `cosine_shuffled`, the same of texts with the codes of
    other pairs, near `cosine` where all has collapsed and None for a single pair; `retrieval_at_1` and `_at_10` of
    texts to codes; `least_squares_error`, `_relative` and `_relative_shuffled` as in `least_squares`;
    `singular_values`, the greatest 100 of X − Y (P, D) or all where there are fewer, and their mean.

    The errors and the mean have their names from the paper's Table 14. The least-squares error needs more pairs than
    the embedding has dimensions: else it is 0 for any model, and is left out (None). The published 3035 and 4.04, of
    1000 pairs in 2048 dimensions, are thus another quantity and do not compare with it.
    """
    x, y = text.double().numpy(), code.double().numpy()
    cosine = float((unit(x) * unit(y)).sum(axis=1).mean())
    fit = shuffled = None
    if len(x) > 1:
        partner = derangement(len(x), seed)
        shuffled = float((unit(x) * unit(y)[partner]).sum(axis=1).mean())
        fit = least_squares(x, y, partner)
    found, top = retrieval(x, y), np.linalg.svdvals(x - y)[:100]
    names = ("least_squares_error", "least_squares_relative", "least_squares_relative_shuffled")
    return {
        "n": len(x),
        "dims": x.shape[1],
        "cosine": cosine,
        "cosine_shuffled": shuffled,
        **{f"retrieval_at_{k}": share for k, share in found.items()},
        **dict(zip(names, fit or (None, None, None), strict=True)),
        "singular_values": top.tolist(),
        "singular_value_mean": float(top.mean()),
    }


# ---------------------------------------------------------------------------------------------------------- write


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all, its folder too where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def export(path: Path, text: torch.Tensor, code: torch.Tensor, ids: list[int], metadata: dict[str, Any]) -> None:
    """Writes a safetensors file: `text` and `code` (P, D) float32, `ids` (P,) int64, and the metadata as strings."""
    tensors = {"text": text.contiguous(), "code": code.contiguous(), "ids": torch.tensor(ids, dtype=torch.int64)}
    write_bytes(path, save(tensors, {name: str(value) for name, value in metadata.items()}))


# ----------------------------------------------------------------------------------------------------------- draw


def t_sne_groups(kind: str, text: torch.Tensor, code: torch.Tensor, examples: list[Example]) -> dict[str, torch.Tensor]:
    """The embeddings (·, D) of each group of a picture; `kind` is one of --t_sne_type.

    in_n_out sets the Text against the Code views. The others tell the Text views apart: paraphrase by the set that they
    belong to, the PARAPHRASE_SETS with most rows, others being left out; rotten_tomatoes by their answer's class.
    Raises ExampleError for a row without a set or an answer that is no class.
    """
    if kind == "in_n_out":
        return {"Text": text, "Code": code}
    members = paraphrase_sets(examples) if kind == "paraphrase" else classes(examples)
    return {name: text[rows] for name, rows in members.items() if rows}


def paraphrase_sets(examples: list[Example]) -> dict[str, list[int]]:
    """The places of the rows of the PARAPHRASE_SETS with most rows; of as large ones, the earlier in the file first.

    Raises ExampleError for a row without a set.
    """
    for example in examples:
        if example.group is None:
            needed = (
                'each row\'s set of paraphrases, a text under "group", as `datasets/prepare.py paraphrase` writes it'
            )
            raise ExampleError(f"{example.source}: --t_sne_type paraphrase needs {needed}")
    largest = Counter(example.group for example in examples).most_common(PARAPHRASE_SETS)
    return {f"set {group}": [i for i, e in enumerate(examples) if e.group == group] for group, _ in largest}


def classes(examples: list[Example]) -> dict[str, list[int]]:
    """The places of the rows of each class, in the order of STARS; rotten_tomatoes has two of yelp's classes.

    Raises ExampleError for an answer that is no class.
    """
    members = {name: [] for name in STARS}
    for i, example in enumerate(examples):
        answer = example.assistant.strip()
        if answer not in members:
            raise ExampleError(f"{example.source}: answer {answer[:40]!r} is not one of {', '.join(STARS)}")
        members[answer].append(i)
    return members


def t_sne(path: Path, groups: dict[str, torch.Tensor], seed: int, title: str) -> dict[str, np.ndarray]:
    """Draws t-SNE of all groups' vectors (·, D) as a PNG and writes the coordinates to a JSON file of the same name.

    Returns the coordinates (·, 2) of each group, the same for the same seed. Raises UsageError for fewer than
    T_SNE_MIN_POINTS points or a path that does not end in .png.
    """
    points = torch.cat(list(groups.values())).numpy()  # (N, D)
    if len(points) < plots.T_SNE_MIN_POINTS:
        raise UsageError(f"--t_sne needs at least {plots.T_SNE_MIN_POINTS} points, not {len(points)}")
    if path.suffix != ".png":
        raise UsageError(f"--t_sne {path} does not end in .png")
    plane, perplexity = plots.t_sne(points, seed)  # (N, 2)
    ends = list(itertools.accumulate(map(len, groups.values())))
    coordinates = dict(zip(groups, np.split(plane, ends[:-1]), strict=True))
    write_bytes(path, plots.t_sne_png(coordinates, title))
    record = {"title": title, "seed": seed, "perplexity": perplexity}
    write_json(path.with_suffix(".json"), record | {"groups": {name: xy.tolist() for name, xy in coordinates.items()}})
    return coordinates
