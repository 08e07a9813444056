"""Figures about embeddings, each against another way to compute it; t-SNE."""

import itertools
import json
from collections.abc import Iterable

import numpy as np
import pytest
import torch

from llm_jepa.cli import UsageError
from llm_jepa.data.examples import Example, ExampleError
from llm_jepa.evaluation import embeddings
from llm_jepa.evaluation.embeddings import similarity


def random_pairs(n: int, dims: int, noise: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts, and codes that are a linear map of them plus noise."""
    draw = torch.Generator().manual_seed(n + dims)
    text, linear, other = (torch.randn(shape, generator=draw) for shape in ((n, dims), (dims, dims), (n, dims)))
    return text, text @ linear + noise * other


# ------------------------------------------------------------------------------------------- cosines and retrieval


def test_cosines_of_pairs_and_of_shuffled_pairs():
    text, code = random_pairs(40, 8)
    found, cosines = similarity(text, code, seed=1), torch.cosine_similarity(text[:, None], code, dim=-1)
    assert (found["n"], found["dims"]) == (40, 8)
    assert found["cosine"] == pytest.approx(cosines.diagonal().mean().item(), abs=1e-6)
    others = cosines[~torch.eye(40, dtype=torch.bool)]
    assert found["cosine_shuffled"] == pytest.approx(others.mean().item(), abs=1e-6)
    single = similarity(text[:1], text[:1], seed=0)
    assert single["cosine"] == pytest.approx(1) and single["cosine_shuffled"] is None


def test_derangement_has_no_fixed_point_and_depends_on_the_seed():
    for n, seed in itertools.product((2, 3, 4, 50), range(20)):
        partner = embeddings.derangement(n, seed)
        assert sorted(partner) == list(range(n)) and not (partner == np.arange(n)).any()
        assert (partner == embeddings.derangement(n, seed)).all()
    assert len({tuple(embeddings.derangement(4, seed)) for seed in range(100)}) == 6  # all (4 − 1)! cycles


@pytest.mark.parametrize("n, ties", [(2, False), (37, False), (2500, False), (60, True)])  # 2500: in several blocks
def test_retrieval_equals_sorted_cosines_with_ties_in_random_order(n, ties):
    draw = np.random.default_rng(0)
    text, code = (x.double().numpy() for x in random_pairs(n, 24, noise=3.0))
    if ties:
        text, code = draw.integers(-1, 2, size=(2, n, 3)).astype(float)  # many equal vectors, and zeros
    found, cosines = embeddings.retrieval(text, code), embeddings.unit(text) @ embeddings.unit(code).T
    for name, table in (("text_to_code", cosines), ("code_to_text", cosines.T)):
        orders = (np.lexsort((draw.random((n, n)), -table.round(9)), axis=1) for _ in range(2000 if ties else 1))
        ranks = np.array([1 + (order == np.arange(n)[:, None]).argmax(axis=1) for order in orders])
        want = {"r1": (ranks == 1).mean(), "r10": (ranks <= 10).mean(), "mrr": (1 / ranks).mean()}
        assert found[name] == pytest.approx(want, abs=0.005 if ties else 1e-9)
    assert n == 2 or found["text_to_code"] != found["code_to_text"]


@pytest.mark.parametrize("n", [1, 7, 2500])
def test_collapsed_embeddings_retrieve_by_chance(n):
    point = torch.randn(16, generator=torch.Generator().manual_seed(3)).double().numpy()
    harmonic = sum(1 / i for i in range(1, n + 1))
    for text in (np.tile(point, (n, 1)), np.zeros((n, 16))):
        found = embeddings.retrieval(text, np.tile(3 * point, (n, 1)))
        assert found["chance"] == pytest.approx({"r1": 1 / n, "r10": min(1, 10 / n), "mrr": harmonic / n})
        assert found["text_to_code"] == found["code_to_text"] == pytest.approx(found["chance"])
        assert found["cosine"] == pytest.approx(float(text.any()))
        assert found["cosine_shuffled"] == (None if n == 1 else pytest.approx(float(text.any())))


# --------------------------------------------------------------------------------------- least squares, Table 14


@pytest.mark.parametrize("n, dims", [(50, 6), (7, 6), (200, 40)])
def test_least_squares_error_equals_the_closed_form(n, dims):
    text, code = random_pairs(n, dims)
    found = similarity(text, code, seed=5)
    x, y = text.double().numpy(), code.double().numpy()
    want = np.square(x @ np.linalg.solve(x.T @ x, x.T @ y) - y).sum()
    assert found["least_squares_error"] == pytest.approx(want, rel=1e-6)
    assert found["least_squares_relative"] == pytest.approx(want / np.square(y).sum(), rel=1e-6)
    other = y[embeddings.derangement(n, 5)]
    shuffled = np.linalg.lstsq(x, other)[1].sum() / np.square(other).sum()
    assert found["least_squares_relative_shuffled"] == pytest.approx(shuffled, rel=1e-6)


def test_least_squares_of_dependent_dimensions():
    draw = torch.Generator().manual_seed(0)
    some, mixed = torch.randint(-50, 50, (400, 20), generator=draw), torch.randint(-5, 5, (20, 20), generator=draw)
    text, (_, code) = torch.cat([some, some @ mixed], dim=1).float(), random_pairs(400, 40)  # rank 20 of 40
    want = np.linalg.lstsq(some.double().numpy(), code.double().numpy())[1].sum()
    assert similarity(text, code, seed=0)["least_squares_error"] == pytest.approx(want)


@pytest.mark.parametrize("n, reported", [(5, False), (6, False), (7, True)])
def test_least_squares_error_needs_more_pairs_than_dimensions(n, reported):
    found = similarity(*random_pairs(n, 6), seed=0)
    for name in ("least_squares_error", "least_squares_relative", "least_squares_relative_shuffled"):
        assert (found[name] is not None) == reported
    assert json.loads(json.dumps(found)) == found


def test_singular_values_of_the_difference_and_their_size_relative_to_the_views():
    text, code = random_pairs(130, 120, noise=0.1)
    found, scaled = similarity(text, code, seed=0), similarity(7 * text, 7 * code, seed=0)
    x, y = text.double().numpy(), code.double().numpy()
    for name, other in (("", y), ("_shuffled", y[embeddings.derangement(130, 0)])):
        values = np.linalg.svd(x - other, compute_uv=False)[:100]
        want = values.mean() / np.sqrt((np.linalg.norm(x) ** 2 + np.linalg.norm(y) ** 2) / 2)
        assert found[f"singular_value_relative{name}"] == pytest.approx(want)
        assert scaled[f"singular_value_relative{name}"] == pytest.approx(want)
        if not name:
            assert found["singular_values"] == pytest.approx(values.tolist(), rel=1e-6)
            assert found["singular_value_mean"] == pytest.approx(values.mean(), rel=1e-6)


# ---------------------------------------------------------------------------------------------------------- t-SNE


def test_t_sne_draws_collapsed_embeddings_but_not_few_points(tmp_path):
    for points in (torch.ones(20, 4), torch.ones(20, 4).index_fill(0, torch.arange(9), 2.0)):
        drawn = embeddings.t_sne(tmp_path / "a.png", {"Text": points[:10], "Code": points[10:]}, 0, "$ of \\frac$")
        assert np.isfinite(np.concatenate(list(drawn.values()))).all()
    with pytest.raises(UsageError, match="--t_sne"):
        embeddings.t_sne(tmp_path / "b.png", {"Text": points[:9]}, 0, "x")
    assert not (tmp_path / "b.png").exists()


def examples_of(*answers: str, groups: Iterable[str | None] = itertools.repeat(None)) -> list[Example]:
    given = enumerate(zip(answers, groups, strict=False), start=1)
    return [Example(None, "comment", answer, f"data:{i}", i, group=group) for i, (answer, group) in given]


def test_t_sne_groups_of_views_and_classes():
    text, code = random_pairs(6, 2)
    groups = embeddings.t_sne_groups("in_n_out", text, code, examples_of(*"abcdef"))
    assert list(groups) == ["Text", "Code"] and groups["Text"].equal(text) and groups["Code"].equal(code)
    groups = embeddings.t_sne_groups("rotten_tomatoes", text, code, examples_of(*["Bad", " Good\n"] * 3))
    assert list(groups) == ["Good", "Bad"], "the classes' own order"
    assert groups["Good"].equal(text[1::2]) and groups["Bad"].equal(text[0::2])
    with pytest.raises(ExampleError, match="data:2: answer 'good'"):
        embeddings.t_sne_groups("rotten_tomatoes", text[:2], code[:2], examples_of("Bad", "good"))


def test_t_sne_groups_of_paraphrases_are_the_largest_sets():
    text, code = random_pairs(25, 2)
    sets = [str(i) for i in range(12)] * 2 + ["11"]  # twelve, one of which is larger
    groups = embeddings.t_sne_groups("paraphrase", text, code, examples_of(*"a" * 25, groups=sets))
    assert list(groups) == ["set 11", *(f"set {i}" for i in range(9))], "the first of equally large ones"
    assert groups["set 11"].equal(text[[11, 23, 24]]) and groups["set 8"].equal(text[[8, 20]])
