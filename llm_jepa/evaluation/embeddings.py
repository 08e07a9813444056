"""Embeddings of an example's two views.

`encode_views` renders them, `embed` reads them at the same tokens as training, `similarity` measures them (paper
section 4.2 and Table 14), `export` writes them and `t_sne` draws them.
Letters: P pairs, R rows of a batch, T tokens in a row, D hidden size.
"""

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
from safetensors.torch import save
from tqdm import tqdm

from llm_jepa.cli import UsageError
from llm_jepa.data.examples import Example, ExampleError, Problems
from llm_jepa.data.segments import Encoder, Segment
from llm_jepa.evaluation.generation import batches, encode_usable
from llm_jepa.files import write_bytes, write_json
from llm_jepa.model import context_length
from llm_jepa.reports import plots
from llm_jepa.scoring.tasks import STARS

# --embedding_pooling: hidden states (R, T, D), attention mask (R, T), view tokens (R,) → (R, D).
POOLINGS = {
    "last": lambda hidden, mask, view_at: hidden[torch.arange(len(hidden)), view_at],
    "mean": lambda hidden, mask, view_at: (hidden.float() * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True),
    "cls": lambda hidden, mask, view_at: hidden[:, 0],
}
PARAPHRASE_SETS = 10  # as many as there are colors


# ---------------------------------------------------------------------------------------------------------- embed


def encode_views(
    model: Any, encoder: Encoder, examples: list[Example], problems: Problems
) -> tuple[list[Example], list[tuple[Segment, Segment]]]:
    """(examples, their Text and Code views), without those that cannot be rendered or are longer than the context.

    The Text view comes first even if --reverse_pred trained on the Code view first. Examples without a pair are left
    out; raises ExampleError if there are no others.
    """
    pairs = [example for example in examples if example.pair]
    if examples and not pairs:
        raise ExampleError(f"{examples[0].source}: no example has a pair of views")
    limit = context_length(model.config) or sys.maxsize

    def encode(example: Example) -> tuple[Segment, Segment]:
        if encoder.text_view == "in_chat":
            item = encoder([example])[0]  # (chat, Code view), or why there is none
            views = (item,) if isinstance(item, ValueError) else (item[0].text_view, item[1])
        else:
            views = encoder.views([example])[0]
        for view in views:
            if isinstance(view, ValueError):
                raise view
            if len(view.ids) > limit:
                raise ValueError(f"a view has {len(view.ids)} tokens, the model's context {limit}")
        return views[::-1] if encoder.renderer.reverse_pred else views

    return encode_usable(pairs, encode, problems)


@torch.inference_mode()
def embed_batches(
    segments: list[Segment], read: Callable[[list[Segment]], torch.Tensor], batch_size: int = 1,
    pooling: str = "last", *, tokens_per_batch: int = 0, share: tuple[int, int] = (0, 1), show: bool = True,
) -> Iterator[tuple[list[int], torch.Tensor]]:  # fmt: skip
    """(indices of segments, their embeddings (R, D), float32 on the CPU) batch by batch; see `generation.batches`.

    `read(segments)` returns the hidden states (R, T, D) of a layer, with one segment per row. Pooling `last` reads the
    view token, as the JEPA loss does; `mean` averages over all tokens of the view, including those of template and
    predictors; `cls` is the first token, which in a causal model does not depend on the view. `share` (n, N) selects
    the batches n, n + N, n + 2N …; `show`: whether to show progress, if n is 0.

    Raises UsageError for embeddings that overflow.
    """
    lengths, views = [len(s.ids) for s in segments], [s.view for s in segments]
    chosen = itertools.islice(batches(lengths, batch_size, tokens_per_batch), share[0], None, share[1])
    with tqdm(total=len(segments), unit="view", disable=not show or share[0] > 0) as bar:
        for indices in chosen:
            hidden = read([segments[i] for i in indices])  # (R, T, D)
            length, view_at = (torch.tensor([x[i] for i in indices]) for x in (lengths, views))
            mask = (torch.arange(hidden.shape[1]) < length[:, None]).to(hidden.device)  # (R, T)
            vectors = POOLINGS[pooling](hidden, mask, view_at).float().cpu()  # (R, D)
            if not vectors.isfinite().all():
                raise UsageError("the embeddings are not finite in this precision; give --dtype float32")
            yield indices, vectors
            bar.update(len(indices) * share[1])


def in_order(parts: Iterable[tuple[list[int], torch.Tensor]]) -> torch.Tensor:
    """The embeddings (N, D) of `embed_batches`, of all shares, in the order of the segments."""
    indices, vectors = zip(*parts, strict=True)
    return torch.cat(vectors)[torch.tensor(list(itertools.chain(*indices))).argsort()]


def embed(
    views: list[tuple[Segment, Segment]], read: Callable[[list[Segment]], torch.Tensor], batch_size: int, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (P, D) of the Text and the Code views of `encode_views`, with the options of `embed_batches`."""
    return in_order(embed_batches(by_side(views), read, batch_size, **options)).chunk(2)


def by_side(pairs: list[tuple[Segment, Segment]]) -> list[Segment]:
    """All Text views, then all Code views."""
    return [view for side in zip(*pairs, strict=True) for view in side]


# -------------------------------------------------------------------------------------------------------- measure


def derangement(n: int, seed: int) -> np.ndarray:
    """A random permutation of n indices without fixed points (if n > 1): a single cycle."""
    order, partner = np.random.default_rng(seed).permutation(n), np.empty(n, dtype=np.int64)
    partner[order] = np.roll(order, 1)
    return partner


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors (P, D) scaled to length 1, except those of length 0, whose cosine with any other is 0."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1)


def retrieval(text: np.ndarray, code: np.ndarray) -> dict[str, Any]:
    """Whether each view finds the other one of its pair among those of all P pairs by cosine; (P, D) each, float64.

    For a Text, m Codes are nearer than its own, and e Codes (its own included) are as near. Equally near ones are
    ranked at random, so the rank of its own Code is one of m + 1 … m + e. `text_to_code` has the means over all Texts,
    `code_to_text` those over all Codes:

        r1, r10   P(rank ≤ k) = min(max((k − m) / e, 0), 1) for k = 1, 10
        mrr       E[1 / rank] = (H(m + e) − H(m)) / e, with H(i) = 1 + 1/2 + … + 1/i

    `chance`: the same for equal embeddings, m = 0 and e = P. `n`: P. `cosine`: the mean over pairs. `cosine_shuffled`:
    the mean over all Texts and the Codes of other pairs, None for a single pair.
    """
    text, code, n, rounding = unit(text), unit(code), len(text), 1e-12  # of equal vectors' cosines in float64
    own = (text * code).sum(axis=1)  # (P,)
    nearer, equal = np.zeros((2, 2, n), dtype=np.int64)  # (2, P) each: for Texts and for Codes
    harmonic = np.append(0, np.cumsum(1 / np.arange(1, n + 1)))  # (P + 1,)

    def scores(m: np.ndarray, e: np.ndarray) -> dict[str, float]:
        shares = {f"r{k}": float(np.clip((k - m) / e, 0, 1).mean()) for k in (1, 10)}
        return shares | {"mrr": float(((harmonic[m + e] - harmonic[m]) / e).mean())}

    size = max(1, 2**22 // n)  # rows of 32 MiB together
    for rows in (slice(begin, begin + size) for begin in range(0, n, size)):
        cosines = text[rows] @ code.T  # (≤ size, P)
        for side, to, reference, axis in ((0, rows, own[rows, None], 1), (1, slice(n), own, 0)):
            gap = cosines - reference
            nearer[side, to] += (gap > rounding).sum(axis=axis)
            equal[side, to] += (np.abs(gap) <= rounding).sum(axis=axis)
    shuffled = (text.sum(axis=0) @ code.sum(axis=0) - own.sum()) / max(1, n * (n - 1))
    return {
        "n": n,
        "text_to_code": scores(nearer[0], equal[0]),
        "code_to_text": scores(nearer[1], equal[1]),
        "chance": scores(np.array([0]), np.array([n])),
        "cosine": float(own.mean()),
        "cosine_shuffled": float(shuffled) if n > 1 else None,
    }


def least_squares(text: np.ndarray, code: np.ndarray, shuffled: np.ndarray) -> dict[str, float | None]:
    """Fits a linear map W (D, D) from the texts X (P, D) to the codes Y (P, D), without a constant term.

    `least_squares_error` = min over W of ‖XW − Y‖², the squared Frobenius norm, summed over pairs and dimensions;
    `least_squares_relative` = error / ‖Y‖²; `least_squares_relative_shuffled` = the same for Y[shuffled], the codes of
    other pairs, because the fit becomes easier as P approaches D. With P ≤ D some W has error 0 for any codes, which
    means nothing: all are None.
    """
    names = ("least_squares_error", "least_squares_relative", "least_squares_relative_shuffled")
    if len(text) <= text.shape[1]:
        return dict.fromkeys(names)
    both = np.hstack([code, code[shuffled]])  # (P, 2D), so that X is factorized once
    rounding = np.finfo(np.float64).eps * len(text)  # as in numpy, whose solver is several times slower
    residual = text @ scipy.linalg.lstsq(text, both, cond=rounding, lapack_driver="gelsy")[0] - both
    error, by_chance = (float(np.square(part).sum()) for part in np.hsplit(residual, 2))
    total = float(np.square(code).sum()) or 1.0
    return dict(zip(names, (error, error / total, by_chance / total), strict=True))


def similarity(text: torch.Tensor, code: torch.Tensor, seed: int) -> dict[str, Any]:
    """Figures about the views' embeddings, (P, D) each, computed in float64.

    Those of `retrieval` and `least_squares`. `dims`: D. `singular_values`: the largest 100 of X − Y (P, D), or all;
    `singular_value_mean`: their mean; `singular_value_relative`: the mean / √((‖X‖² + ‖Y‖²) / 2), which can be compared
    between models; `singular_value_relative_shuffled`: the same with the codes of other pairs.
    """
    x, y = text.double().numpy(), code.double().numpy()
    partner = derangement(len(x), seed)
    top, by_chance = (np.linalg.svdvals(x - other)[:100] for other in (y, y[partner]))
    norm = float(np.sqrt((np.square(x).sum() + np.square(y).sum()) / 2)) or 1.0
    return {
        **retrieval(x, y),
        "dims": x.shape[1],
        **least_squares(x, y, partner),
        "singular_values": top.tolist(),
        "singular_value_mean": float(top.mean()),
        "singular_value_relative": float(top.mean()) / norm,
        "singular_value_relative_shuffled": float(by_chance.mean()) / norm,
    }


# ---------------------------------------------------------------------------------------------------------- write


def export(path: Path, text: torch.Tensor, code: torch.Tensor, ids: list[int], metadata: dict[str, Any]) -> None:
    """Writes a safetensors file: `text` and `code` (P, D) float32, `ids` (P,) int64, and the metadata as strings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"text": text.contiguous(), "code": code.contiguous(), "ids": torch.tensor(ids, dtype=torch.int64)}
    write_bytes(path, save(tensors, {name: str(value) for name, value in metadata.items()}))


# ----------------------------------------------------------------------------------------------------------- draw


def t_sne_groups(kind: str, text: torch.Tensor, code: torch.Tensor, examples: list[Example]) -> dict[str, torch.Tensor]:
    """The embeddings (·, D) of each group to draw; `kind` is a value of --t_sne_type.

    in_n_out: Text and Code views. paraphrase: the Text views of each of the PARAPHRASE_SETS largest sets, the earlier
    one first if equally large. rotten_tomatoes: the Text views of each class, in the order of STARS.
    Raises ExampleError for an example without a set, or an answer that is not a class.
    """
    if kind == "in_n_out":
        return {"Text": text, "Code": code}
    members: dict[str, list[int]] = {} if kind == "paraphrase" else {name: [] for name in STARS}
    for i, example in enumerate(examples):
        name = f"set {example.group}" if kind == "paraphrase" else example.assistant.strip()
        if kind == "paraphrase" and example.group is None:
            raise ExampleError(f'{example.source}: --t_sne_type paraphrase needs the example\'s set, "group": text')
        if kind == "rotten_tomatoes" and name not in members:
            raise ExampleError(f"{example.source}: answer {name[:40]!r} is not one of {', '.join(STARS)}")
        members.setdefault(name, []).append(i)
    if kind == "paraphrase":
        members = dict(sorted(members.items(), key=lambda item: -len(item[1]))[:PARAPHRASE_SETS])
    return {name: text[rows] for name, rows in members.items() if rows}


def t_sne(path: Path, groups: dict[str, torch.Tensor], seed: int, title: str) -> dict[str, np.ndarray]:
    """Draws t-SNE of all groups' vectors (·, D) as a PNG and writes the coordinates to a JSON file of the same name.

    Returns the coordinates (·, 2) of each group, the same for the same seed. Raises UsageError for fewer than
    T_SNE_MIN_POINTS points.
    """
    points = torch.cat(list(groups.values())).numpy()  # (N, D)
    if len(points) < plots.T_SNE_MIN_POINTS:
        raise UsageError(f"--t_sne needs at least {plots.T_SNE_MIN_POINTS} points, not {len(points)}")
    plane, perplexity = plots.t_sne(points, seed)  # (N, 2)
    ends = np.cumsum([len(vectors) for vectors in groups.values()])
    coordinates = dict(zip(groups, np.split(plane, ends[:-1]), strict=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, plots.t_sne_png(coordinates, title))
    record = {"title": title, "seed": seed, "perplexity": perplexity}
    write_json(path.with_suffix(".json"), record | {"groups": {name: xy.tolist() for name, xy in coordinates.items()}})
    return coordinates
