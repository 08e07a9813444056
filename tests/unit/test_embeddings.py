"""What is said of embeddings: every figure against another way to compute it, and the files written."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors import safe_open

from llm_jepa.cli import UsageError
from llm_jepa.data.examples import Example, ExampleError
from llm_jepa.evaluation import embeddings
from llm_jepa.evaluation.embeddings import similarity
from llm_jepa.reports import plots


def pairs(n: int, dims: int, noise: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts, and codes that are a linear map of them but for noise."""
    draw = torch.Generator().manual_seed(n + dims)
    text, linear, other = (torch.randn(shape, generator=draw) for shape in ((n, dims), (dims, dims), (n, dims)))
    return text, text @ linear + noise * other


# -------------------------------------------------------------------------------------------------------- cosines


def test_cosines_of_pairs_and_of_shuffled_pairs():
    text = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    code = torch.tensor([[1.0, 1.0], [0.0, -1.0]])
    said = similarity(text, code, seed=0)
    assert said["n"] == said["dims"] == 2
    assert said["cosine"] == pytest.approx((0.5**0.5 - 1) / 2)
    assert said["cosine_shuffled"] == pytest.approx(0.5**0.5 / 2)  # two pairs have one other order alone


def test_shuffled_pairs_are_other_pairs_drawn_by_seed():
    for n, seed in itertools.product((2, 3, 4, 5, 50), range(20)):
        partner = embeddings.derangement(n, seed)
        assert sorted(partner) == list(range(n)) and not (partner == np.arange(n)).any()
        assert (partner == embeddings.derangement(n, seed)).all()
    assert len({tuple(embeddings.derangement(4, seed)) for seed in range(100)}) == 6  # all (4 − 1)! cycles
    text, code = pairs(40, 8)
    mean = similarity(text, code, seed=1)["cosine_shuffled"]
    partner = torch.from_numpy(embeddings.derangement(40, 1))
    assert mean == pytest.approx(torch.cosine_similarity(text, code[partner]).mean().item(), abs=1e-6)
    assert mean != similarity(text, code, seed=2)["cosine_shuffled"]


def test_one_pair_has_no_other_to_be_shuffled_with():
    said = similarity(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.0]]), seed=0)
    assert said["cosine"] == pytest.approx(1) and said["retrieval_at_1"] == 1
    assert said["cosine_shuffled"] is None and said["least_squares_error"] is None


def test_a_vector_of_zeros_is_near_nothing():
    said = similarity(torch.zeros(3, 2), torch.eye(3, 2) + 1, seed=0)
    assert said["cosine"] == 0 and said["retrieval_at_1"] == pytest.approx(1 / 3)


# ------------------------------------------------------------------------------------------------------ retrieval


def ranked(ranks: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthogonal codes, and texts whose own code is the `ranks[i]`-th nearest, counted from 1, without ties."""
    n, text = len(ranks), torch.zeros(len(ranks), len(ranks))
    for i, rank in enumerate(ranks):
        others = [j for j in range(n) if j != i]
        order = [*others[: rank - 1], i, *others[rank - 1 :]]
        text[i, order] = torch.arange(n, 0, -1.0)
    return text, 5 * torch.eye(n)


def test_retrieval_counts_the_texts_whose_own_code_is_among_the_nearest():
    said = similarity(*ranked([1, 2, 10, 11, 12, 1, 3, 10, 11, 12, 12, 12]), seed=0)
    assert said["retrieval_at_1"] == pytest.approx(2 / 12)
    assert said["retrieval_at_10"] == pytest.approx(6 / 12)
    text, code = ranked([1] * 5)
    assert similarity(text, code.roll(1, dims=0), seed=0)["retrieval_at_1"] == 0


def test_retrieval_is_from_texts_to_codes_by_cosine():
    # By the dot product the long code would be nearest to every text; from codes to texts only one would be found.
    text = torch.tensor([[1.0, 0.1], [1.0, 0.2], [1.0, 0.3]])
    code = torch.tensor([[1.0, 0.1], [50.0, 10.0], [0.2, 0.9]])
    found = embeddings.retrieval(text.double().numpy(), code.double().numpy(), at=(1, 2, 3))
    assert found == pytest.approx({1: 2 / 3, 2: 2 / 3, 3: 1})


@pytest.mark.parametrize("n", [7, 1500])
def test_collapsed_embeddings_find_their_code_by_chance_alone(n):
    point = torch.randn(16, generator=torch.Generator().manual_seed(3))
    said = similarity(point.expand(n, 16), 3 * point.expand(n, 16), seed=0)
    assert said["cosine"] == pytest.approx(1) and said["cosine_shuffled"] == pytest.approx(1)
    assert said["retrieval_at_1"] == pytest.approx(1 / n)
    assert said["retrieval_at_10"] == pytest.approx(min(1, 10 / n))
    assert similarity(torch.zeros(n, 16), point.expand(n, 16), seed=0)["retrieval_at_1"] == pytest.approx(1 / n)


def test_codes_that_are_equal_share_their_places():
    text = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2], [0.0, 1.0]])
    code = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    found = embeddings.retrieval(text.numpy(), code.numpy(), at=(1, 2, 3))
    assert found == pytest.approx({1: (3 / 3 + 1) / 4, 2: (3 * 2 / 3 + 1) / 4, 3: 1})


def test_retrieval_of_many_texts_is_that_of_all_at_once():
    text, code = pairs(2300, 12, noise=8.0)
    x, y = torch.nn.functional.normalize(text.double()), torch.nn.functional.normalize(code.double())
    cosines = x @ y.T
    rank = (cosines > cosines.diagonal()[:, None]).sum(dim=1)
    said = similarity(text, code, seed=0)
    assert said["retrieval_at_1"] == pytest.approx((rank < 1).double().mean().item())
    assert said["retrieval_at_10"] == pytest.approx((rank < 10).double().mean().item())
    assert 0 < said["retrieval_at_1"] < said["retrieval_at_10"] < 1


# --------------------------------------------------------------------------------------- least squares, Table 14


@pytest.mark.parametrize("n, dims", [(50, 6), (7, 6), (200, 40)])
def test_least_squares_error_is_the_least_there_is(n, dims):
    text, code = pairs(n, dims)
    said = similarity(text, code, seed=0)
    x, y = text.double().numpy(), code.double().numpy()
    closed_form = np.square(x @ np.linalg.solve(x.T @ x, x.T @ y) - y).sum()
    library = np.linalg.lstsq(x, y)[1].sum()
    assert said["least_squares_error"] == pytest.approx(closed_form, rel=1e-6)
    assert said["least_squares_error"] == pytest.approx(library, rel=1e-6)
    assert said["least_squares_relative"] == pytest.approx(closed_form / np.square(y).sum(), rel=1e-6)


def test_least_squares_of_shuffled_pairs_is_what_chance_fits():
    n, dims = 400, 100
    text, code = pairs(n, dims, noise=0.01)
    said = similarity(text, code, seed=5)
    other = code[torch.from_numpy(embeddings.derangement(n, 5))].double().numpy()
    expected = np.linalg.lstsq(text.double().numpy(), other)[1].sum() / np.square(other).sum()
    assert said["least_squares_relative_shuffled"] == pytest.approx(expected, rel=1e-6)
    assert said["least_squares_relative_shuffled"] == pytest.approx((n - dims) / n, abs=0.05)
    assert said["least_squares_relative"] < 1e-3


def test_least_squares_by_hand():
    text, code = torch.tensor([[1.0], [2.0], [0.0]]), torch.tensor([[2.0], [4.0], [3.0]])
    said = similarity(text, code, seed=0)  # W = 2, and nothing reaches the 3: there is no constant term
    assert said["least_squares_error"] == pytest.approx(9)
    assert said["least_squares_relative"] == pytest.approx(9 / 29)


def test_a_linear_map_has_no_error_and_texts_may_depend_on_one_another():
    text, code = pairs(60, 8, noise=0.0)
    assert similarity(text, code, seed=0)["least_squares_relative"] < 1e-10
    draw = torch.Generator().manual_seed(0)
    some, mixed = torch.randint(-50, 50, (400, 20), generator=draw), torch.randint(-5, 5, (20, 20), generator=draw)
    _, code = pairs(400, 40)
    text = torch.cat([some, some @ mixed], dim=1).float()  # rank 20 of 40
    expected = np.linalg.lstsq(some.double().numpy(), code.double().numpy())[1].sum()
    assert similarity(text, code, seed=0)["least_squares_error"] == pytest.approx(expected)
    assert similarity(text, torch.zeros(400, 40), seed=0)["least_squares_relative"] == 0


def test_an_error_that_is_zero_whatever_the_codes_is_not_given():
    names = ("least_squares_error", "least_squares_relative", "least_squares_relative_shuffled")
    for n, given in ((5, False), (6, False), (7, True)):
        said = similarity(*pairs(n, 6), seed=0)
        assert all((said[name] is not None) == given for name in names)
        assert (said["n"], said["dims"]) == (n, 6)


def test_singular_values_of_the_difference():
    diagonal = torch.diag(torch.arange(1.0, 5))
    said = similarity(torch.eye(4) + diagonal, torch.eye(4), seed=0)
    assert said["singular_values"] == pytest.approx([4, 3, 2, 1])
    assert said["singular_value_mean"] == pytest.approx(2.5)
    text, code = pairs(130, 120)
    difference = (text - code).double()
    expected = torch.linalg.eigvalsh(difference.T @ difference).flip(0)[:100].sqrt()
    said = similarity(text, code, seed=0)
    assert len(said["singular_values"]) == 100
    assert said["singular_values"] == pytest.approx(expected.tolist(), rel=1e-6)
    assert said["singular_value_mean"] == pytest.approx(expected.mean().item(), rel=1e-6)
    assert len(similarity(text[:30], code[:30], seed=0)["singular_values"]) == 30


def test_what_is_said_can_be_written_as_json():
    for n in (1, 5, 20):
        said = similarity(*pairs(n, 6), seed=0)
        assert json.loads(json.dumps(said)) == said


# --------------------------------------------------------------------------------------------------------- export


def test_export_keeps_numbers_ids_and_where_they_are_from(tmp_path):
    text, code = pairs(4, 3)
    path = tmp_path / "new" / "views.safetensors"
    metadata = {"model": "models/tiny", "layer": -1, "pooling": "last", "dtype": "float32", "revision": None}
    embeddings.export(path, text, code.T.contiguous().T, [3, 1, 8, 9], metadata)
    with safe_open(path, "pt") as file:
        assert sorted(file.keys()) == ["code", "ids", "text"]
        assert file.get_tensor("text").equal(text) and file.get_tensor("code").equal(code)
        assert file.get_tensor("ids").tolist() == [3, 1, 8, 9]
        assert file.metadata() == {k: str(v) for k, v in metadata.items()}
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_export_that_fails_leaves_what_there_was(tmp_path, monkeypatch):
    path = tmp_path / "views.safetensors"
    path.write_bytes(b"before")

    def full(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(embeddings.os, "fsync", full)
    with pytest.raises(OSError):
        embeddings.export(path, *pairs(4, 3), [1, 2, 3, 4], {})
    assert path.read_bytes() == b"before"


# ---------------------------------------------------------------------------------------------------------- t-SNE


def clusters(*sizes: int, dims: int = 6) -> dict[str, torch.Tensor]:
    """Groups of points, far from one another."""
    draw = torch.Generator().manual_seed(0)
    return {f"g{i}": torch.randn(n, dims, generator=draw) + 20 * i for i, n in enumerate(sizes)}


def test_t_sne_keeps_neighbours_and_is_the_same_for_the_same_seed(tmp_path):
    groups = clusters(12, 9, 7)
    first = embeddings.t_sne(tmp_path / "a.png", groups, seed=1, title="Views")
    again = embeddings.t_sne(tmp_path / "b.png", groups, seed=1, title="Views")
    assert list(first) == list(groups) and [xy.shape for xy in first.values()] == [(12, 2), (9, 2), (7, 2)]
    assert all((first[name] == again[name]).all() for name in groups)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    plane, owner = np.concatenate(list(first.values())), np.repeat(np.arange(3), [12, 9, 7])
    distances = np.linalg.norm(plane[:, None] - plane, axis=-1) + np.diag(np.full(28, np.inf))
    assert (owner[distances.argmin(axis=1)] == owner).all()


def test_t_sne_writes_the_coordinates_beside_the_picture(tmp_path):
    drawn = embeddings.t_sne(tmp_path / "new" / "views.png", clusters(8, 5), seed=7, title="$ of \\frac$")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["views.json", "views.png"]
    record = json.loads((tmp_path / "new" / "views.json").read_text())
    assert record["groups"] == {name: xy.tolist() for name, xy in drawn.items()}
    assert record["seed"] == 7 and record["title"] == "$ of \\frac$" and record["perplexity"] == 4


@pytest.mark.parametrize("groups", [{"Text": 3, "Code": 4}, {f"set {i}": 3 for i in range(10)}])
def test_every_group_is_seen_in_a_colour_and_a_shape_of_its_own(groups):
    draw = np.random.default_rng(0)
    alone = set()
    for k, (name, n) in enumerate(groups.items()):
        coordinates = {other: np.empty((0, 2)) for other in groups} | {name: draw.normal(size=(50 * n, 2))}
        with Image.open(io.BytesIO(plots.t_sne_png(coordinates, "title"))) as image:
            assert image.format == "PNG" and min(image.size) >= 800
            pixels = np.asarray(image.convert("RGB")).reshape(-1, 3).astype(int)
        ink = embeddings.unit(255.0 - pixels[(255 - pixels).max(axis=1) > 80])  # points are transparent
        colour = 255.0 - np.array([int(plots.PALETTE[k][0][i : i + 2], 16) for i in (1, 3, 5)])
        assert (ink @ colour > 0.99 * np.linalg.norm(colour)).sum() > 5000
        alone.add(plots.PALETTE[k])
    assert len({c for c, _ in alone}) == len({m for _, m in alone}) == len(groups)


def test_t_sne_draws_embeddings_that_have_collapsed(tmp_path):
    for name, points in (("one", torch.ones(20, 4)), ("two", torch.ones(20, 4).index_fill(0, torch.arange(9), 2.0))):
        groups = {"Text": points[:10], "Code": points[10:]}
        first, again = (embeddings.t_sne(tmp_path / f"{name}.png", groups, 0, "x") for _ in range(2))
        assert np.isfinite(np.concatenate(list(first.values()))).all()
        assert all((first[group] == again[group]).all() for group in groups)


def test_t_sne_refuses_what_it_cannot_draw(tmp_path):
    with pytest.raises(UsageError, match="--t_sne needs at least 10 points, not 9"):
        embeddings.t_sne(tmp_path / "a.png", clusters(4, 5), 0, "x")
    with pytest.raises(UsageError, match=r"--t_sne .*a\.json does not end in \.png"):
        embeddings.t_sne(tmp_path / "a.json", clusters(6, 5), 0, "x")
    assert not any(tmp_path.iterdir())
    embeddings.t_sne(tmp_path / "a.png", clusters(5, 5), 0, "x")


def answered(*answers: str) -> list[Example]:
    return [Example(None, "comment", answer, f"rows.jsonl:{i}", i) for i, answer in enumerate(answers, start=1)]


def test_t_sne_groups_of_views():
    text, code = pairs(3, 2)
    groups = embeddings.t_sne_groups("in_n_out", text, code, answered("a", "b", "c"))
    assert list(groups) == ["Text", "Code"] and groups["Text"].equal(text) and groups["Code"].equal(code)


def grouped(*groups: str | None) -> list[Example]:
    return [dataclasses.replace(e, group=g) for e, g in zip(answered(*groups), groups, strict=True)]


def test_t_sne_groups_of_paraphrases_are_the_texts_of_the_largest_sets():
    text, code = pairs(6, 2)
    groups = embeddings.t_sne_groups("paraphrase", text, code, grouped("9", "7", "9", "11", "7", "7"))
    assert list(groups) == ["set 7", "set 9", "set 11"]
    assert groups["set 7"].equal(text[[1, 4, 5]]) and groups["set 9"].equal(text[[0, 2]])
    assert groups["set 11"].equal(text[[3]])
    text, code = pairs(25, 2)
    sets = [str(i) for i in range(12)] * 2 + ["11"]  # twelve, of which one is larger
    groups = embeddings.t_sne_groups("paraphrase", text, code, grouped(*sets))
    assert list(groups) == ["set 11", *(f"set {i}" for i in range(9))], "the ten largest, of equal ones the first"
    assert groups["set 11"].equal(text[[11, 23, 24]]) and groups["set 8"].equal(text[[8, 20]])


def test_t_sne_of_paraphrases_needs_a_set_in_every_row():
    text, code = pairs(2, 2)
    with pytest.raises(ExampleError, match=r'rows\.jsonl:2: --t_sne_type paraphrase needs .* a text under "group"'):
        embeddings.t_sne_groups("paraphrase", text, code, grouped("7", None))


def test_t_sne_groups_of_classes_are_the_texts_in_a_fixed_order():
    text, code = pairs(6, 2)
    groups = embeddings.t_sne_groups("rotten_tomatoes", text, code, answered(*["Bad", " Good\n"] * 3))
    assert list(groups) == ["Good", "Bad"]
    assert groups["Good"].equal(text[1::2]) and groups["Bad"].equal(text[0::2])
    answers = ("Very Bad", "Mediocre", "Good", "Very Good", "Bad", "Very Bad")
    groups = embeddings.t_sne_groups("rotten_tomatoes", text, code, answered(*answers))
    assert list(groups) == ["Very Good", "Good", "Mediocre", "Bad", "Very Bad"]
    assert groups["Very Bad"].equal(text[[0, 5]]) and groups["Very Good"].equal(text[[3]])
    with pytest.raises(ExampleError, match=r"rows\.jsonl:2: answer 'good' is not one of Very Good, Good"):
        embeddings.t_sne_groups("rotten_tomatoes", text[:2], code[:2], answered("Bad", "good"))


def test_drawing_libraries_are_loaded_only_to_draw():
    code = "import sys, llm_jepa.evaluation.embeddings; print({'matplotlib', 'sklearn'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
