"""python -m llm_jepa.search: the nearest entries, the stored index, questions from stdin, errors."""

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import EXAMPLES, JEPA, MODEL, call, message_row, weights, write_rows
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from synthetic_runs import change

from llm_jepa.evaluation.model import weight_files

USERS, CODES = ([row["messages"][i]["content"] for row in EXAMPLES] for i in (1, 2))
FLAGS = {
    "reverse_pred": (*JEPA, "--reverse_pred"),
    "in_chat": (*JEPA, "--text_view", "in_chat"),
    "plain": (*JEPA, "--plain"),
}


def run_search(*argv: object, stdin: bytes = b"") -> SimpleNamespace:
    """Runs search.main in this process: its exit code, stderr, and the lines of stdout, split at tabs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        done = call("llm_jepa.search", *argv)
    return SimpleNamespace(code=done.code, err=done.err, lines=[x.split("\t") for x in done.out.splitlines()])


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of a run, which a test may change."""
    return shutil.copytree(trained(*JEPA), tmp_path / "run")


def units(run: Path, data: Path, *flags: object) -> list[np.ndarray]:
    """The Text and the Code views of a file, of length 1, as evaluate.py exports them."""
    path = run.parent / "views.safetensors"
    flags = ("--input_file", data, "--export_embeddings", path, "--overwrite", *flags)
    call("evaluate", "--model_name", run, *flags, code=0)
    views = load_file(path)
    return [views[x] / np.linalg.norm(views[x], axis=1, keepdims=True) for x in ("text", "code")]


@pytest.mark.parametrize("name", FLAGS)
def test_matches_are_the_exact_nearest_views_of_the_run(name, trained, data, tmp_path):
    run = shutil.copytree(trained(*FLAGS[name]), tmp_path / "run")
    text, code = units(run, data, *(["--plain"] if name == "plain" else []))
    for side, queries, contents, cosines in (
        ("code", USERS, CODES, text @ code.T),
        ("text", CODES, USERS, code @ text.T),
    ):
        found = run_search(run, "--corpus", data, "--side", side, "--top", 5, queries[7])
        assert found.code == 0, found.err
        order = np.argsort(-cosines[7], kind="stable")[:5]
        assert [int(line) for _, line, _ in found.lines] == (order + 1).tolist()
        assert [entry for _, _, entry in found.lines] == [contents[i] for i in order]
        assert [float(c) for c, _, _ in found.lines] == pytest.approx(cosines[7][order].tolist(), abs=1e-4)


@pytest.mark.parametrize("side", ["code", "text"])
def test_entries_may_have_views_only(side, trained, tmp_path):
    run = shutil.copytree(trained(*FLAGS["in_chat"]), tmp_path / "run")
    chats = write_rows(tmp_path / "chats.jsonl", [message_row(f"q{i}", f"a{i}", None) for i in range(4)])
    views = write_rows(tmp_path / "views.jsonl", [{"text": f"q{i}", "code": f"a{i}"} for i in range(4)])
    found = [run_search(run, "--corpus", corpus, "--side", side, "q") for corpus in (chats, views)]
    assert [done.code for done in found] == [0, 0] and found[0].lines == found[1].lines


def test_text_file_has_one_entry_per_line(run, tmp_path):
    corpus = tmp_path / "codes.txt"
    corpus.write_text("\n".join(["", *CODES[:8], "", CODES[8]]) + "\r\n", encoding="utf-8-sig")
    found = run_search(run, "--corpus", corpus, USERS[3])
    assert {int(line): entry for _, line, entry in found.lines} == dict(zip((*range(2, 10), 11), CODES, strict=False))


def test_top_limits_the_matches_and_text_is_one_line(run, tmp_path):
    corpus = write_rows(tmp_path / "rows.jsonl", [message_row(f"q{i}", f"a{i}\nb") for i in range(15)])
    for flags, n in (((), 10), (("--top", 3), 3), (("--top", 100), 15)):
        found = run_search(run, "--corpus", corpus, *flags, "a question")
        assert len(found.lines) == n and all(entry.endswith(r"\nb") for _, _, entry in found.lines)


def test_questions_from_stdin_are_those_of_single_searches(run, data):
    stdin = "\n".join([USERS[2], "", "naïve 你好"]).encode()
    found = run_search(run, "--corpus", data, "--top", 2, stdin=stdin)
    single = [run_search(run, "--corpus", data, "--top", 2, q).lines for q in (USERS[2], "naïve 你好")]
    assert found.lines == [[USERS[2]], *single[0], ["naïve 你好"], *single[1]]


# ------------------------------------------------------------------------------------------------------------ index


def vectors(run: Path) -> np.ndarray:
    """The vectors of the only index of a run."""
    (path,) = (run / "index").iterdir()
    return load_file(path)["vectors"]


def poison(path: Path) -> None:
    """Makes all vectors of an index equal, so that matches tell whether it was used."""
    with safe_open(path, "np") as file:
        metadata, equal = file.metadata(), np.ones_like(file.get_tensor("vectors"))
    save_file({"vectors": equal}, path, metadata)


@pytest.mark.parametrize("what", ["nothing", "corpus", "weights", "settings"])
def test_index_is_used_until_corpus_or_model_change(what, run, tmp_path):
    corpus = write_rows(tmp_path / "rows.jsonl", EXAMPLES)
    first = run_search(run, "--corpus", corpus, USERS[0])
    (index,) = (run / "index").iterdir()
    assert str(index) in first.err
    before = vectors(run)
    poison(index)
    if what == "corpus":
        write_rows(corpus, [*EXAMPLES[1:], EXAMPLES[0]])
    elif what == "weights":
        save_file({k: (v * 1.5).numpy() for k, v in weights(run).items()}, run / "model.safetensors", {"format": "pt"})
    elif what == "settings":
        change(run, "args.json", last_token=-1)
    found = run_search(run, "--corpus", corpus, USERS[0])
    after = vectors(run)
    assert found.code == 0 and str(index) in found.err
    if what == "nothing":
        assert (after == 1).all() and len({cosine for cosine, _, _ in found.lines}) == 1
    else:
        assert f"the {'weights' if what == 'weights' else 'views'} changed" in found.err and not (after == 1).any()
        assert (what == "corpus") == np.allclose(np.roll(after, 1, axis=0), before, atol=1e-6)
        assert found.lines != first.lines


def test_weights_of_an_adapter_include_its_configuration_and_its_base(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder, name in ((base, "model"), (adapter, "adapter_model")):
        folder.mkdir()
        (folder / f"{name}.safetensors").write_bytes(b"1")
    config = {"base_model_name_or_path": str(base)}
    changes = [(adapter / "adapter_config.json", json.dumps(config | x)) for x in ({}, {"r": 1})]
    found = []
    for path, text in (changes[0], (base / "model.safetensors", "12"), changes[1]):
        path.write_text(text)
        found.append(weight_files(str(adapter)))
    assert found[0] != found[1] != found[2]


def test_index_has_the_place_that_was_given_and_sides_have_their_own(run, data, tmp_path):
    path = tmp_path / "new" / "a.index"
    assert run_search(run, "--corpus", data, "--index", path, "q").code == 0
    assert path.is_file() and not (run / "index").exists()
    for side in ("code", "text"):
        assert run_search(run, "--corpus", data, "--side", side, "q").code == 0
    assert len(list((run / "index").iterdir())) == 2
    path.write_bytes(b"mine")
    found = run_search(run, "--corpus", data, "--index", path, "q")
    assert found.code == 2 and str(path) in found.err and path.read_bytes() == b"mine"


def test_model_that_is_no_run_gets_no_index_by_itself(data, tmp_path):
    model = shutil.copytree(MODEL, tmp_path / "model")
    before = sorted(model.rglob("*"))
    assert len(run_search(model, "--corpus", data, "--top", 2, "q").lines) == 2
    assert sorted(model.rglob("*")) == before


# ----------------------------------------------------------------------------------------------- warnings and errors


def test_run_whose_loss_has_not_learned_its_pairs_is_announced(run, data):
    for collapsed in (True, False):
        change(run, "run.json", learned={"jepa": {"collapsed": collapsed}})
        found = run_search(run, "--corpus", data, "q")
        assert found.code == 0 and ("warning" in found.err) == collapsed


BAD = {  # the arguments, and what the error mentions
    "no such run": (("nowhere", "--corpus", "DATA", "q"), "nowhere"),
    "no such corpus": (("RUN", "--corpus", "no.txt", "q"), "no.txt"),
    "not UTF-8": (("RUN", "--corpus", "bytes.txt", "q"), "bytes.txt:2"),
    "long entry": (("RUN", "--corpus", "long.txt", "q"), "long.txt:2"),
    "long question": (("RUN", "--corpus", "DATA", "a " * 3000), "the question"),
    "special token": (("RUN", "--corpus", "DATA", "what is <|eot_id|>"), "<|eot_id|>"),
    "no corpus": (("RUN", "q"), "--corpus"),
    "empty question": (("RUN", "--corpus", "DATA", " "), "question"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_with_its_place(case, run, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bytes.txt").write_bytes(b"good\n\xff\n")
    Path("long.txt").write_text("short\n" + "a " * 3000)
    arguments, place = BAD[case]
    found = run_search(*({"RUN": run, "DATA": data}.get(a, a) for a in arguments))
    assert found.code == 2 and place in found.err.splitlines()[-1] and not found.lines
    assert "Traceback" not in found.err and found.err.count("error:") == 1


def test_bad_line_of_stdin_and_unfinished_run(run, data):
    found = run_search(run, "--corpus", data, stdin=b"good\n\xff\n")
    assert found.code == 2 and "stdin:2" in found.err and found.lines[0] == ["good"]
    change(run, "run.json", status="running")
    found = run_search(run, "--corpus", data, "q")
    assert found.code == 2 and str(run) in found.err
