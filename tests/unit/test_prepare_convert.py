"""Each dataset from the hub and from its authors' files: rows, views, splits, what the manifest says, errors."""

from __future__ import annotations

import csv
import dataclasses
import json
import sys
import tracemalloc
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "datasets"))

import convert
import prepare
import sources

from llm_jepa.data import examples

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Features, Value, ClassLabel = datasets.Features, datasets.Value, datasets.ClassLabel


def run(capsys, *argv):
    """prepare.main in this process: its exit code, output and errors."""
    try:
        code = prepare.main([str(a) for a in argv])
    except SystemExit as exit_:
        code = exit_.code
    out, err = capsys.readouterr()
    return SimpleNamespace(code=code, out=out, err=err)


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def turns(path):
    """(system, user, assistant) of each row of a file; the system text is None where there is no such turn."""
    chats = [{m["role"]: m["content"] for m in row["messages"]} for row in rows(path)]
    assert all(list(chat) in (["system", "user", "assistant"], ["user", "assistant"]) for chat in chats)
    return [(chat.get("system"), chat["user"], chat["assistant"]) for chat in chats]


def manifest(folder, name):
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))[name]


def write_jsonl(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


class Hub:
    """A hub of made rows: `data` by (name, config, split), the revisions that were asked for in `asked`."""

    def __init__(self):
        self.data, self.asked = {}, []

    def load_dataset(self, name, config=None, *, split, revision):
        self.asked.append((name, config, split, revision))
        return self.data[name, config, split]


@pytest.fixture
def hub(monkeypatch):
    made = Hub()
    monkeypatch.setattr(datasets, "load_dataset", made.load_dataset)
    return made


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


# ---- what the hub and the authors have: columns as they are there, a few made rows ----

GSM = [{"question": f"How many is {i}?", "answer": f"It is {i}.\n#### {i}"} for i in range(3)]


def hellaswag_rows(count, label=str):
    """As on the hub, where a label is a text; in the authors' files it is a number."""
    return [
        {
            "ind": i,
            "activity_label": "Walking",
            "ctx_a": f"Someone {i} walks.",
            "ctx_b": "they",
            "ctx": f"Someone {i} walks. they",
            "endings": [f"end {i} {letter}" for letter in "abcd"],
            "source_id": f"activitynet~{i}",
            "split": "train",
            "split_type": "indomain",
            "label": label(i % 4),
        }
        for i in range(count)
    ]


def spider_rows(database, count):
    return [
        {
            "db_id": database,
            "query": f"SELECT count(*)  FROM t{i};",
            "question": f"How many t{i} are there?",
            "query_toks": ["SELECT"],
            "query_toks_no_value": ["select"],
            "question_toks": ["How"],
        }
        for i in range(count)
    ]


# ---- from the hub ----


def test_gsm8k_from_the_hub(hub, out, capsys):
    hub.data = {
        ("openai/gsm8k", "main", "train"): datasets.Dataset.from_list(GSM[:2]),
        ("openai/gsm8k", "main", "test"): datasets.Dataset.from_list(GSM[2:]),
    }
    done = run(capsys, "gsm8k", "--out_dir", out)
    assert done.code == 0, done.err
    system = "Answer the math question, show steps."
    assert turns(out / "gsm8k_train.jsonl") == [(system, row["question"], row["answer"]) for row in GSM[:2]]
    assert turns(out / "gsm8k_test.jsonl") == [(system, GSM[2]["question"], GSM[2]["answer"])]
    commit = "740312add88f781978c0658806c59bc2815b9866"
    assert hub.asked == [("openai/gsm8k", "main", part, commit) for part in ("train", "test")]
    entry = manifest(out, "gsm8k")
    assert entry["licence"] == "MIT"
    assert entry["source"] == [
        {"hub": "openai/gsm8k", "config": "main", "split": part, "revision": commit} for part in ("train", "test")
    ]
    assert "warning: gsm8k: train rows other than published: 2, not 7473" in done.err
    assert "warning: gsm8k: test rows other than published: 1, not 1319" in done.err and "warning" not in done.out
    assert entry["rows other than published"] == {"train": "2, not 7473", "test": "1, not 1319"}


def test_rotten_tomatoes_from_the_hub(hub, out, capsys):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    parts = {"train": [("fine .", 1), ("dull .", 0)], "test": [("awful", 0)], "validation": [("unused", 1)]}
    name = "cornell-movie-review-data/rotten_tomatoes"
    hub.data = {
        (name, None, part): datasets.Dataset.from_list([{"text": t, "label": n} for t, n in values], features=features)
        for part, values in parts.items()
    }
    assert run(capsys, "rotten_tomatoes", "--out_dir", out).code == 0
    system = "Determine whether the comment is positive or negative"
    assert turns(out / "rotten_tomatoes_train.jsonl") == [(system, "fine .", "Good"), (system, "dull .", "Bad")]
    assert turns(out / "rotten_tomatoes_test.jsonl") == [(system, "awful", "Bad")]
    assert hub.asked[0] == (name, None, "train", "aa13bc287fa6fcab6daf52f0dfb9994269ffea28")
    assert manifest(out, "rotten_tomatoes")["licence"] == "unknown"


def yelp_on_the_hub(count):
    names = ["1 star", "2 star", "3 stars", "4 stars", "5 stars"]
    features = Features({"label": ClassLabel(names=names), "text": Value("string")})
    values = [{"label": i % 5, "text": f"review {i}\\nmore"} for i in range(count)]
    return datasets.Dataset.from_list(values, features=features)


def test_yelp_from_the_hub_is_drawn_by_seed(hub, out, capsys, tmp_path):
    name = ("Yelp/yelp_review_full", "yelp_review_full")
    hub.data = {(*name, "train"): yelp_on_the_hub(40), (*name, "test"): yelp_on_the_hub(30)}
    flags = ("--train_rows", 10, "--test_rows", 20)
    assert run(capsys, "yelp", "--out_dir", out, *flags).code == 0
    stars = ("Very Bad", "Bad", "Mediocre", "Good", "Very Good")
    drawn = turns(out / "yelp_test.jsonl")
    numbers = [int(user.split("\\n")[0].removeprefix("review ")) for _, user, _ in drawn]
    assert [answer for _, _, answer in drawn] == [stars[i % 5] for i in numbers]
    assert len(set(numbers)) == 20 and numbers != sorted(numbers)
    assert drawn[0][1].endswith("\\nmore")  # the hub's text has a backslash and an n
    assert len(turns(out / "yelp_train.jsonl")) == 10
    (tmp_path / "again").mkdir()
    assert run(capsys, "yelp", "--out_dir", tmp_path / "again", *flags).code == 0
    assert (tmp_path / "again" / "yelp_test.jsonl").read_bytes() == (out / "yelp_test.jsonl").read_bytes()
    assert manifest(out, "yelp")["split"] == "10 and 20 of the authors' parts, drawn with seed 42"


def test_hellaswag_from_the_hub_has_views_of_its_own(hub, out, capsys):
    hub.data = {
        ("Rowan/hellaswag", None, "train"): datasets.Dataset.from_list(hellaswag_rows(4)),
        ("Rowan/hellaswag", None, "validation"): datasets.Dataset.from_list(hellaswag_rows(3)),
    }
    assert run(capsys, "hellaswag", "--out_dir", out, "--train_rows", 0, "--test_rows", 0).code == 0
    system = "Which one of A), B), C), or D) is the best ending for the context? Answer A, B, C, or D."
    user = "Someone 2 walks. they\nA) end 2 a\nB) end 2 b\nC) end 2 c\nD) end 2 d"
    assert rows(out / "hellaswag_train.jsonl")[2] == {
        "messages": [
            {"role": "system", "content": system},
            {"role": "user", "content": user},
            {"role": "assistant", "content": "C"},
        ],
        "text": [{"role": "user", "content": "Someone 2 walks. they"}],
        "code": [{"role": "assistant", "content": "end 2 c"}],
    }
    assert [answer for _, _, answer in turns(out / "hellaswag_test.jsonl")] == ["A", "B", "C"]
    assert {revision for *_, revision in hub.asked} == {"218ec52e09a7e7462a5400043bb9a69a41d06b76"}


class Reply:
    """What urlopen gives."""

    def __init__(self, content):
        self.content = content

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def read(self):
        return self.content


def test_nq_open_takes_its_test_rows_from_efficientqa(hub, out, capsys, monkeypatch):
    train = [{"question": f"who is {i}", "answer": [f"{i}", f"the {i}th"]} for i in range(5)]
    hub.data = {("google-research-datasets/nq_open", "nq_open", "train"): datasets.Dataset.from_list(train)}
    test = {"question": "where", "answer": ["Nine"], "def_correct_predictions": ["9"]}
    urls = []

    def urlopen(url, timeout):
        urls.append(url)
        return Reply(json.dumps(test).encode() + b"\n")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    assert run(capsys, "nq_open", "--out_dir", out, "--train_rows", 2).code == 0
    made = rows(out / "nq_open_train.jsonl")
    assert len(made) == 2
    for row in made:
        assert row["answers"] == next(t["answer"] for t in train if t["question"] == row["messages"][1]["content"])
        assert row["messages"][2]["content"] == "; ".join(row["answers"])
    assert turns(out / "nq_open_test.jsonl") == [("Answer the question below.", "where", "Nine")]
    assert rows(out / "nq_open_test.jsonl")[0]["answers"] == ["Nine"]
    assert urls == [convert.NQ_OPEN_TEST] and manifest(out, "nq_open")["source"][1]["url"] == urls[0]


def paraphrase_rows():
    """Sets of which one is broken up by another, as nothing promises that it is not."""
    texts = [(7, "a"), (7, "b"), (9, "x"), (7, "c"), (9, "y"), (11, "alone")]
    return [{"paraphrase_set_id": i, "text": text, "id": n} for n, (i, text) in enumerate(texts)]


def test_paraphrase_pairs_each_sentence_with_the_next_of_its_set(hub, out, capsys, monkeypatch):
    hub.data = {("cestwc/paraphrase", None, "coco"): datasets.Dataset.from_list(paraphrase_rows())}
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    asked = []

    def dataset_info(self, name, revision):
        asked.append((name, revision))
        return SimpleNamespace(sha=COMMIT)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    assert run(capsys, "paraphrase", "--out_dir", out).code == 0
    assert turns(out / "paraphrase_train.jsonl") == [(None, "a", "b"), (None, "b", "c"), (None, "x", "y")]
    assert [row["group"] for row in rows(out / "paraphrase_train.jsonl")] == ["7", "7", "9"]
    read = examples.read_examples(str(out / "paraphrase_train.jsonl"), examples.Problems())
    assert [example.group for example in read] == ["7", "7", "9"]
    assert not (out / "paraphrase_test.jsonl").exists()
    # The branch is resolved first, so that what is loaded and what is recorded are one commit.
    assert asked == [("cestwc/paraphrase", "main")] and hub.asked == [("cestwc/paraphrase", None, "coco", COMMIT)]
    assert manifest(out, "paraphrase")["source"][0]["revision"] == COMMIT


def test_spider_from_the_hub_where_there_is_no_zip(hub, out, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(convert, "SPIDER_ZIP", tmp_path / "none.zip")
    hub.data = {
        ("xlangai/spider", "spider", "train"): datasets.Dataset.from_list(spider_rows("farm", 2)),
        ("xlangai/spider", "spider", "validation"): datasets.Dataset.from_list(spider_rows("pets", 1)),
    }
    assert run(capsys, "spider", "--out_dir", out).code == 0
    user = "For db_id:[pets]\n\nHow many t0 are there?"
    assert turns(out / "spider_test.jsonl") == [
        ("Convert natural language to SQL.", user, "SELECT count(*)  FROM t0;"),
    ]
    assert manifest(out, "spider")["source"][0]["revision"] == "0c350918f3f29ec754f1181c65cdce76cd6c133c"
    assert manifest(out, "spider")["licence"] == "CC BY-SA 4.0"


@pytest.mark.parametrize("name", ["gsm8k", "rotten_tomatoes", "yelp", "nq_open", "hellaswag", "paraphrase", "spider"])
def test_a_hub_out_of_reach_is_one_error_that_says_where_the_files_are(name, out, capsys, monkeypatch, tmp_path):
    def no_network(self, name, revision):
        raise RuntimeError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", no_network)
    monkeypatch.setattr(convert, "SPIDER_ZIP", tmp_path / "none.zip")
    done = run(capsys, name, "--out_dir", out)
    assert done.code == 2 and "Traceback" not in done.err
    assert "Name or service not known" in done.err
    assert f"give as --source {convert.DATASETS[name].takes}" in done.err
    assert "https://" in done.err or "hub's" in done.err
    assert list(out.iterdir()) == []


def test_turk_out_of_reach_names_the_url_and_the_flag(out, capsys, monkeypatch):
    def no_network(url, timeout):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    done = run(capsys, "turk", "--out_dir", out)
    assert done.code == 2 and "NL-RX-Turk/src.txt does not answer" in done.err
    assert "give as --source a folder with NL-RX-Turk's src.txt and targ.txt, from https://github.com/" in done.err


def test_rows_missing_from_the_hubs_cache_are_asked_for_as_well(out, capsys, monkeypatch):
    def not_cached(*arguments, **options):
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", not_cached)
    done = run(capsys, "gsm8k", "--out_dir", out)  # HF_HUB_OFFLINE is set in tests
    assert done.code == 2 and "Couldn't reach" in done.err and "give as --source" in done.err


def test_a_bad_row_of_the_hub_is_named(hub, out, capsys):
    bad = [*GSM[:1], {"question": "And?", "answer": "no end"}]
    hub.data = {("openai/gsm8k", "main", "train"): datasets.Dataset.from_list(bad)}
    done = run(capsys, "gsm8k", "--out_dir", out)
    assert done.code == 2 and ": row 2: the answer does not end with '#### N'" in done.err
    assert "--source" not in done.err and list(out.iterdir()) == []


# ---- from the authors' files ----


@pytest.fixture
def source(tmp_path):
    return tmp_path / "source"


def test_gsm8k_from_the_authors_files(source, out, capsys):
    write_jsonl(source / "train.jsonl", GSM[:2])
    write_jsonl(source / "test.jsonl", GSM[2:])
    assert run(capsys, "gsm8k", "--source", source, "--out_dir", out).code == 0
    assert [user for _, user, _ in turns(out / "gsm8k_train.jsonl")] == [row["question"] for row in GSM[:2]]
    entry = manifest(out, "gsm8k")["source"][0]
    assert entry == {"file": "train.jsonl", "sha256": sources.sha256(source / "train.jsonl")}
    assert str(source) not in (out / "manifest.json").read_text()


def test_a_copy_of_the_hub_repository_is_a_source(source, out, capsys):
    (source / "main").mkdir(parents=True)
    for part, values in (("train", GSM[:2]), ("test", GSM[2:])):
        datasets.Dataset.from_list(values).to_parquet(source / "main" / f"{part}-00000-of-00001.parquet")
    assert run(capsys, "gsm8k", "--source", source, "--out_dir", out).code == 0
    assert len(turns(out / "gsm8k_train.jsonl")) == 2


def write_deep_regex(folder, count):
    folder.mkdir(parents=True)
    # The authors' files end without a line break.
    (folder / "src.txt").write_text("\n".join(f"lines with {i}" for i in range(count)), encoding="utf-8")
    (folder / "targ.txt").write_text("\n".join(f".*{i}.*" for i in range(count)), encoding="utf-8")


@pytest.mark.parametrize("name, folder", [("synth", "NL-RX-Synth"), ("turk", "NL-RX-Turk")])
@pytest.mark.parametrize("above", ["", "datasets"])
def test_deep_regex_is_split_as_published(name, folder, above, source, out, capsys):
    write_deep_regex(source / above / folder, 11)
    assert run(capsys, name, "--source", source, "--out_dir", out).code == 0
    expected = datasets.Dataset.from_dict({"i": range(11)}).train_test_split(test_size=0.2, seed=42)
    for part in ("train", "test"):
        system = "Convert natural language to regular expression."
        wanted = [(system, f"lines with {i}", f".*{i}.*") for i in expected[part]["i"]]
        assert turns(out / f"{name}_{part}.jsonl") == wanted
    assert len(expected["test"]) == 3
    assert manifest(out, name)["licence"] == "MIT"
    assert [entry["file"] for entry in manifest(out, name)["source"]] == ["src.txt", "targ.txt"]
    assert not (out / "SHA256SUMS").exists()  # which holds the project's own rows


def test_synth_without_a_source_is_the_projects_own(out, capsys):
    assert run(capsys, "synth", "--out_dir", out).code == 0
    entry = manifest(out, "synth")
    assert entry["licence"] == "Apache-2.0" and entry["source"] == [{"generator": "synth_grammar.py"}]


def test_deep_regex_files_have_to_match(source, out, capsys):
    write_deep_regex(source, 5)
    (source / "targ.txt").write_text("a\nb\n", encoding="utf-8")
    done = run(capsys, "turk", "--source", source, "--out_dir", out)
    assert done.code == 2 and f"{source}/src.txt:5" in done.err and f"{source}/targ.txt:2" in done.err


def test_rotten_tomatoes_from_pang_and_lees_files(source, out, capsys):
    source.mkdir()
    for kind in ("pos", "neg"):
        text = "".join(f"{kind} caf\u00e9 {i} \n" for i in range(20))
        (source / f"rt-polarity.{kind}").write_text(text, encoding="latin-1")
    assert run(capsys, "rotten_tomatoes", "--source", source, "--out_dir", out).code == 0
    train, test = turns(out / "rotten_tomatoes_train.jsonl"), turns(out / "rotten_tomatoes_test.jsonl")
    assert [(user, answer) for _, user, answer in train] == [
        (f"{kind} caf\u00e9 {i}", answer) for kind, answer in (("pos", "Good"), ("neg", "Bad")) for i in range(16)
    ]
    assert [user for _, user, _ in test] == [f"{kind} caf\u00e9 {i}" for kind in ("pos", "neg") for i in (18, 19)]


def write_yelp(source, train, test):
    source.mkdir()
    for name, cells in (("train.csv", train), ("test.csv", test)):
        with open(source / name, "w", encoding="utf-8", newline="") as file:
            csv.writer(file, quoting=csv.QUOTE_ALL).writerows(cells)


def test_yelp_from_the_authors_files(source, out, capsys):
    write_yelp(source, [(1, 'so "bad"'), (5, "a, b")], [(3, "fine\\nthen")])
    assert run(capsys, "yelp", "--source", source, "--out_dir", out).code == 0
    assert sorted((user, answer) for _, user, answer in turns(out / "yelp_train.jsonl")) == [
        ("a, b", "Very Good"),
        ('so "bad"', "Very Bad"),
    ]
    assert turns(out / "yelp_test.jsonl")[0][1:] == ("fine\\nthen", "Mediocre")


@pytest.mark.parametrize("cells, reason", [((9, "x"), "label '9' is not known"), ((1, "x", "y"), "3 cells, not 2")])
def test_a_bad_row_of_yelp_is_named_and_can_be_left_out(cells, reason, source, out, capsys):
    write_yelp(source, [(1, "one\nline"), cells], [(2, "ok")])
    done = run(capsys, "yelp", "--source", source, "--out_dir", out)
    assert done.code == 2 and f"{source}/train.csv:3: {reason}" in done.err
    done = run(capsys, "yelp", "--source", source, "--out_dir", out, "--skip_bad_examples")
    assert done.code == 0 and "skipped 1 bad examples" in done.out and reason in done.out
    assert len(turns(out / "yelp_train.jsonl")) == 1


def test_nq_open_from_the_authors_files(source, out, capsys):
    write_jsonl(source / "NQ-open.train.jsonl", [{"question": "who", "answer": ["A", "B"]}])
    write_jsonl(source / "NQ-open.efficientqa.test.1.1.jsonl", [{"question": "when", "answer": ["1; 2", "3"]}])
    assert run(capsys, "nq_open", "--source", source, "--out_dir", out).code == 0
    assert rows(out / "nq_open_test.jsonl")[0]["answers"] == ["1; 2", "3"]  # which "1; 2; 3" does not tell
    assert turns(out / "nq_open_test.jsonl")[0][2] == "1; 2; 3"


def test_hellaswag_from_the_authors_files(source, out, capsys):
    write_jsonl(source / "hellaswag_train.jsonl", hellaswag_rows(2, label=int))
    write_jsonl(source / "hellaswag_val.jsonl", hellaswag_rows(4, label=int))
    assert run(capsys, "hellaswag", "--source", source, "--out_dir", out).code == 0
    assert sorted(answer for _, _, answer in turns(out / "hellaswag_test.jsonl")) == ["A", "B", "C", "D"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_paraphrase_from_a_local_copy(kind, source, out, capsys):
    if kind == "file":
        path = write_jsonl(source / "mine.jsonl", paraphrase_rows())
    else:
        (source / "data").mkdir(parents=True)
        path = source
        datasets.Dataset.from_list(paraphrase_rows()).to_parquet(source / "data" / "coco-00000-of-00001.parquet")
    assert run(capsys, "paraphrase", "--source", path, "--out_dir", out, "--train_rows", 2).code == 0
    drawn = turns(out / "paraphrase_train.jsonl")
    assert len(drawn) == 2 and set(drawn) < {(None, "a", "b"), (None, "b", "c"), (None, "x", "y")}


# ---- spider ----


def write_spider(path, train, dev, top="spider_data/", readme=None):
    """A zip file in Spider's official layout, or for a path without .zip an unpacked folder."""
    files = {
        "train_spider.json": json.dumps(train, indent=1),
        "train_others.json": json.dumps(spider_rows("others", 1)),
        "dev.json": json.dumps(dev),
        "tables.json": "[]",
    }
    if readme:
        files["README.txt"] = readme
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("__MACOSX/other/._train_spider.json", "no")
            for name, content in files.items():
                archive.writestr(top + name, content)
    else:
        (path / top).mkdir(parents=True)
        for name, content in files.items():
            (path / top / name).write_text(content, encoding="utf-8")
    return path


@pytest.mark.parametrize("top", ["spider_data/", "spider/", ""])
@pytest.mark.parametrize("kind", ["s.zip", "s"])
def test_spider_by_database_is_the_official_split(kind, top, tmp_path, out, capsys):
    path = write_spider(tmp_path / kind, spider_rows("farm", 3), spider_rows("pets", 2), top)
    done = run(capsys, "spider", "--source", path, "--out_dir", out)
    assert done.code == 0, done.err
    train, test = turns(out / "spider_train.jsonl"), turns(out / "spider_test.jsonl")
    assert train[2] == (
        "Convert natural language to SQL.",
        "For db_id:[farm]\n\nHow many t2 are there?",
        "SELECT count(*)  FROM t2;",
    )
    assert len(train) == 3 and len(test) == 2 and all("[pets]" in user for _, user, _ in test)
    assert manifest(out, "spider")["split"].startswith("by database")


def test_spiders_default_is_the_zip_of_the_repository(tmp_path, out, capsys, monkeypatch):
    path = write_spider(tmp_path / "s.zip", spider_rows("farm", 3), spider_rows("pets", 2))
    monkeypatch.setattr(convert, "SPIDER_ZIP", path)
    assert run(capsys, "spider", "--out_dir", out).code == 0
    assert manifest(out, "spider")["source"] == [{"file": "s.zip", "sha256": sources.sha256(path)}]


@pytest.mark.parametrize(
    "readme, licence", [(None, "CC BY-SA 4.0"), ("Some rows.\n\nLicence: Apache-2.0, as for the rest.\n", "Apache-2.0")]
)
def test_a_spider_set_may_state_another_licence(readme, licence, tmp_path, out, capsys):
    path = write_spider(tmp_path / "s.zip", spider_rows("farm", 3), spider_rows("pets", 2), readme=readme)
    assert run(capsys, "spider", "--source", path, "--out_dir", out).code == 0
    assert manifest(out, "spider")["licence"] == licence


def test_spider_at_random_is_the_published_split_of_both_files(tmp_path, out, capsys):
    train, dev = spider_rows("farm", 30), spider_rows("pets", 20)
    path = write_spider(tmp_path / "s.zip", train, dev)
    assert run(capsys, "spider", "--source", path, "--split", "random", "--out_dir", out).code == 0
    expected = datasets.Dataset.from_dict({"i": range(50)}).train_test_split(test_size=0.18, seed=42)
    both = train + dev
    for part in ("train", "test"):
        wanted = [f"For db_id:[{both[i]['db_id']}]\n\n{both[i]['question']}" for i in expected[part]["i"]]
        assert [user for _, user, _ in turns(out / f"spider_{part}.jsonl")] == wanted
    assert len(expected["test"]) == 9


def test_spider_by_database_refuses_databases_of_both_files(tmp_path, out, capsys):
    path = write_spider(tmp_path / "s.zip", spider_rows("farm", 3) + spider_rows("pets", 1), spider_rows("pets", 2))
    done = run(capsys, "spider", "--source", path, "--out_dir", out)
    assert done.code == 2 and "1 databases" in done.err and "[pets]" in done.err and "--split random" in done.err
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("train_spider.json", '[\n {"db_id": "a"\n', "train_spider.json:3: not JSON"),
        ("dev.json", "{}", "dev.json: not a JSON list"),
        ("dev.json", '[{"db_id": "a", "question": "q"}]', "dev.json: entry 1: no field 'query'"),
        ("dev.json", '[{"db_id": "a", "question": "q", "query": " "}]', "dev.json: entry 1: db_id, question and query"),
        ("dev.json", None, "dev.json: cannot be read"),
    ],
)
def test_bad_spider_files_are_named(name, content, message, tmp_path, out, capsys):
    path = write_spider(tmp_path / "s", spider_rows("farm", 1), spider_rows("pets", 1))
    file = path / "spider_data" / name
    file.unlink() if content is None else file.write_text(content, encoding="utf-8")
    done = run(capsys, "spider", "--source", path, "--out_dir", out)
    assert done.code == 2 and f"{path}/spider_data/{message}" in done.err
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("content", [b"no zip file", None])
def test_a_file_that_is_no_spider_zip_is_named(content, tmp_path, out, capsys):
    path = tmp_path / "s.zip"
    if content is None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("deep/er/train_spider.json", "[]")
    else:
        path.write_bytes(content)
    done = run(capsys, "spider", "--source", path, "--out_dir", out)
    assert done.code == 2 and str(path) in done.err and "https://yale-lily.github.io/spider" in done.err


# ---- what is wrong with a source ----


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"question": "q"', "not JSON"),
        ('{"question": "q"}', "no field 'answer'"),
        ('["question"]', "no field 'answer'"),
        ('{"question": "q", "answer": "4"}', "does not end with '#### N'"),
        ('{"question": " ", "answer": "a\\n#### 4"}', "content of the user turn is empty"),
        ('{"question": 7, "answer": "a\\n#### 4"}', "content of the user turn is int"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_written(line, reason, source, out, capsys):
    write_jsonl(source / "train.jsonl", GSM)
    path = write_jsonl(source / "test.jsonl", GSM[:1])
    path.write_text(path.read_text() + line + "\n", encoding="utf-8")
    done = run(capsys, "gsm8k", "--source", source, "--out_dir", out)
    assert done.code == 2 and f"{path}:2: " in done.err and reason in done.err
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"label": "4"}, "label '4' is none of 0, 1, 2 and 3"),
        ({"label": ""}, "label '' is none of 0, 1, 2 and 3"),
        ({"endings": ["a", "b"]}, "not a list of four texts"),
        ({"endings": ["a", "b", "c", 4]}, "not a list of four texts"),
    ],
)
def test_a_bad_hellaswag_row_is_named(change, reason, source, out, capsys):
    write_jsonl(source / "hellaswag_train.jsonl", [*hellaswag_rows(1), hellaswag_rows(1)[0] | change])
    write_jsonl(source / "hellaswag_val.jsonl", hellaswag_rows(1))
    done = run(capsys, "hellaswag", "--source", source, "--out_dir", out)
    assert done.code == 2 and f"{source}/hellaswag_train.jsonl:2: " in done.err and reason in done.err


@pytest.mark.parametrize("answer", ["A", [], ["A", 3]])
def test_nq_open_answers_have_to_be_texts(answer, source, out, capsys):
    write_jsonl(source / "NQ-open.train.jsonl", [{"question": "who", "answer": answer}])
    done = run(capsys, "nq_open", "--source", source, "--out_dir", out)
    assert done.code == 2 and "NQ-open.train.jsonl:1: field 'answer' is not a list of texts" in done.err


def test_a_source_that_is_not_there_or_holds_something_else(source, out, capsys):
    done = run(capsys, "gsm8k", "--source", source, "--out_dir", out)
    assert done.code == 2 and f"--source {source}: there is no such" in done.err and "grade-school-math" in done.err
    source.mkdir()
    done = run(capsys, "gsm8k", "--source", source, "--out_dir", out)
    assert done.code == 2 and f"--source {source} holds no train.jsonl" in done.err and "grade-school" in done.err


def test_text_in_another_encoding_is_named(source, out, capsys):
    write_deep_regex(source, 3)
    (source / "src.txt").write_bytes(b"one\nt\xffo\nthree")
    done = run(capsys, "turk", "--source", source, "--out_dir", out)
    assert done.code == 2 and f"{source}/src.txt:2: not UTF-8" in done.err


# ---- drawing ----


def test_draw_takes_each_row_with_the_same_chance_and_none_twice():
    values = [("place", i, i) for i in range(50)]
    drawn = [row for _, _, row in convert.draw(values, 20)]
    assert len(set(drawn)) == 20 and drawn != sorted(drawn)
    assert convert.draw(values, 20) == convert.draw(iter(values), 20)
    assert convert.draw(values, 0) == values and sorted(convert.draw(values, 99)) == values
    assert convert.draw(values, 5) == convert.draw(values, 20)[:5]


def test_a_damaged_zip_is_named(tmp_path, out, capsys):
    path = write_spider(tmp_path / "spider.zip", spider_rows("a", 40), spider_rows("b", 2))
    data = bytearray(path.read_bytes())
    begin = data.index(b"train_spider.json") + 40
    data[begin : begin + 200] = bytes(200)
    path.write_bytes(data)
    done = run(capsys, "spider", "--source", path, "--out_dir", out)
    assert done.code == 2 and "cannot be read" in done.err and list(out.iterdir()) == []


# ---- a part without rows ----


def write_whole_source(name, folder):
    """A source of each dataset with a few rows in every file."""
    folder.mkdir(exist_ok=True)
    if name in ("synth", "turk"):
        (folder / "src.txt").write_text("a\nb\nc\n", encoding="utf-8")
        (folder / "targ.txt").write_text("x\ny\nz\n", encoding="utf-8")
    elif name == "gsm8k":
        write_jsonl(folder / "train.jsonl", GSM)
        write_jsonl(folder / "test.jsonl", GSM)
    elif name == "spider":
        (folder / "train_spider.json").write_text(json.dumps(spider_rows("farm", 9)), encoding="utf-8")
        (folder / "dev.json").write_text(json.dumps(spider_rows("pets", 4)), encoding="utf-8")
    elif name == "paraphrase":
        write_jsonl(folder / "coco-00000-of-00001.jsonl", paraphrase_rows())
    elif name == "rotten_tomatoes":
        for kind in ("pos", "neg"):
            (folder / f"rt-polarity.{kind}").write_text("one\n" * 10, encoding="latin-1")
    elif name == "yelp":
        for part in ("train", "test"):
            (folder / f"{part}.csv").write_text('"1","so bad"\n', encoding="utf-8")
    elif name == "nq_open":
        write_jsonl(folder / "NQ-open.train.jsonl", [{"question": "who", "answer": ["A"]}])
        write_jsonl(folder / "NQ-open.efficientqa.test.1.1.jsonl", [{"question": "where", "answer": ["B"]}])
    else:
        write_jsonl(folder / "hellaswag_train.jsonl", hellaswag_rows(2))
        write_jsonl(folder / "hellaswag_val.jsonl", hellaswag_rows(2))
    return folder / "coco-00000-of-00001.jsonl" if name == "paraphrase" else folder


EMPTY = [
    ("synth", ("src.txt", "targ.txt"), ""),
    ("turk", ("src.txt", "targ.txt"), ""),
    ("gsm8k", ("train.jsonl",), ""),
    ("gsm8k", ("test.jsonl",), "\n"),
    ("gsm8k", ("train.jsonl", "test.jsonl"), ""),
    ("spider", ("train_spider.json",), "[]"),
    ("spider", ("dev.json",), "[]"),
    ("paraphrase", ("coco-00000-of-00001.jsonl",), ""),
    ("paraphrase", ("coco-00000-of-00001.jsonl",), '{"paraphrase_set_id": 1, "text": "alone"}\n'),
    ("rotten_tomatoes", ("rt-polarity.pos",), ""),
    ("rotten_tomatoes", ("rt-polarity.neg",), ""),
    ("yelp", ("train.csv",), ""),
    ("yelp", ("test.csv",), ""),
    ("nq_open", ("NQ-open.train.jsonl",), ""),
    ("nq_open", ("NQ-open.efficientqa.test.1.1.jsonl",), ""),
    ("hellaswag", ("hellaswag_train.jsonl",), ""),
    ("hellaswag", ("hellaswag_val.jsonl",), ""),
]


@pytest.mark.parametrize("flags", [(), ("--skip_bad_examples",)])
@pytest.mark.parametrize("name, files, content", EMPTY)
def test_a_part_without_rows_is_an_error_and_costs_no_rows(name, files, content, flags, source, out, capsys):
    path = write_whole_source(name, source)
    assert run(capsys, name, "--source", path, "--out_dir", out).code == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    for file in files:
        (source / file).write_text(content, encoding="utf-8")
    splits = [("--split", "random"), ()] if name == "spider" else [()]
    for split in splits:
        done = run(capsys, name, "--source", path, "--out_dir", out, "--overwrite", *flags, *split)
        assert done.code == 2 and "no rows in " in done.err and files[0] in done.err, done.err
        assert {p.name: p.read_bytes() for p in out.iterdir()} == before


@pytest.mark.parametrize(
    "name, file, bad",
    [
        ("gsm8k", "test.jsonl", '{"question": "q"}\n'),
        ("gsm8k", "test.jsonl", "{\n"),
        ("spider", "dev.json", "[1]"),
        ("yelp", "test.csv", "1,2,3\n"),
        ("yelp", "test.csv", '"9","text"\n'),
        ("hellaswag", "hellaswag_val.jsonl", "{}\n"),
        ("rotten_tomatoes", "rt-polarity.neg", " \n \n"),
    ],
)
def test_a_part_of_which_every_row_is_bad_has_no_rows(name, file, bad, source, out, capsys):
    write_whole_source(name, source)
    (source / file).write_text(bad, encoding="utf-8")
    done = run(capsys, name, "--source", source, "--out_dir", out, "--skip_bad_examples")
    assert done.code == 2 and "no rows in " in done.err and file in done.err and list(out.iterdir()) == []


def test_an_empty_part_of_the_hub_is_an_error(hub, out, capsys):
    hub.data = {
        ("openai/gsm8k", "main", "train"): datasets.Dataset.from_list(GSM),
        ("openai/gsm8k", "main", "test"): datasets.Dataset.from_list([]),
    }
    done = run(capsys, "gsm8k", "--out_dir", out)
    assert done.code == 2 and "no rows in openai/gsm8k:main:test" in done.err and list(out.iterdir()) == []


def test_too_few_lines_for_a_test_part_name_the_part(source, out, capsys):
    write_whole_source("rotten_tomatoes", source)
    for kind in ("pos", "neg"):
        (source / f"rt-polarity.{kind}").write_text("one\n", encoding="utf-8")
    done = run(capsys, "rotten_tomatoes", "--source", source, "--out_dir", out)
    assert done.code == 2 and "no rows in the test part of rotten_tomatoes" in done.err and list(out.iterdir()) == []


# ---- counts other than the published ones ----


def test_rows_as_many_as_published_or_as_asked_for_are_no_warning(source, out, capsys, monkeypatch):
    write_whole_source("gsm8k", source)
    entry = convert.DATASETS["gsm8k"]
    monkeypatch.setitem(convert.DATASETS, "gsm8k", dataclasses.replace(entry, rows={"": (3, 3)}))
    done = run(capsys, "gsm8k", "--source", source, "--out_dir", out)
    assert done.err == "" and "rows other than published" not in manifest(out, "gsm8k")
    path = write_whole_source("nq_open", source)
    done = run(capsys, "nq_open", "--source", path, "--out_dir", out, "--train_rows", 1)
    assert "train rows" not in done.err and "test rows other than published: 1, not 1769" in done.err


@pytest.mark.parametrize("split", ["by_database", "random"])
@pytest.mark.parametrize("readme, warned", [(None, True), ("Licence: Apache-2.0\n", False)])
def test_the_projects_own_spider_is_not_held_against_the_published_counts(split, readme, warned, tmp_path, out, capsys):
    path = write_spider(tmp_path / "s.zip", spider_rows("farm", 30), spider_rows("pets", 9), readme=readme)
    done = run(capsys, "spider", "--source", path, "--out_dir", out, "--split", split)
    assert done.code == 0 and ("published" in done.err) == warned and "published" not in done.out
    assert ("rows other than published" in manifest(out, "spider")) == warned


# ---- encodings ----


def test_a_byte_order_mark_is_no_part_of_the_first_line(source, out, capsys):
    write_deep_regex(source, 5)
    plain = out / "plain"
    assert run(capsys, "turk", "--source", source, "--out_dir", plain).code == 0
    for name in ("src.txt", "targ.txt"):
        (source / name).write_bytes(b"\xef\xbb\xbf" + (source / name).read_bytes())
    assert run(capsys, "turk", "--source", source, "--out_dir", out / "marked").code == 0
    for part in ("train", "test"):
        assert turns(out / "marked" / f"turk_{part}.jsonl") == turns(plain / f"turk_{part}.jsonl")


def test_yelp_with_a_byte_order_mark_is_read(source, out, capsys):
    write_yelp(source, [(1, "bad")], [(3, "fine")])
    for name in ("train.csv", "test.csv"):
        (source / name).write_bytes(b"\xef\xbb\xbf" + (source / name).read_bytes())
    done = run(capsys, "yelp", "--source", source, "--out_dir", out)
    assert done.code == 0, done.err
    assert turns(out / "yelp_train.jsonl")[0][1:] == ("bad", "Very Bad")


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_polarity_files_in_utf8_are_read_as_such_and_the_others_as_latin_1(mark, source, out, capsys):
    source.mkdir()
    text = "".join(f"caf\u00e9 {i} \u2014\n" for i in range(10))
    (source / "rt-polarity.pos").write_bytes(mark + text.encode())
    (source / "rt-polarity.neg").write_bytes("".join(f"caf\u00e9 {i}\n" for i in range(10)).encode("latin-1"))
    assert run(capsys, "rotten_tomatoes", "--source", source, "--out_dir", out).code == 0
    made = [(user, answer) for _, user, answer in turns(out / "rotten_tomatoes_train.jsonl")]
    assert made == [(f"caf\u00e9 {i} \u2014", "Good") for i in range(8)] + [(f"caf\u00e9 {i}", "Bad") for i in range(8)]


# ---- archives that unpack to more than there is memory for ----


@pytest.mark.parametrize("kind", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("member", ["train_spider.json", "dev.json"])
def test_a_spider_archive_that_unpacks_to_too_much_is_named(member, kind, tmp_path, out, capsys, monkeypatch):
    monkeypatch.setattr(sources, "MAX_BYTES", 2**20)
    path = tmp_path / "s.zip"
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name in ("train_spider.json", "dev.json"):
            rows_ = json.dumps(spider_rows(name, 2))
            archive.writestr(name, "[" + " " * 2**21 + "]" if name == member else rows_)
    done = run(capsys, "spider", "--source", path, "--out_dir", out)
    assert done.code == 2 and f"{path}/{member}: more than 1 MiB unpacked" in done.err and list(out.iterdir()) == []


def test_an_archive_that_states_too_small_a_size_takes_no_memory(tmp_path, out, capsys):
    path = tmp_path / "s.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("dev.json", "[]")
        with archive.open("train_spider.json", "w") as file:
            for _ in range(200):
                file.write(bytes(2**20))
    size, stated = (200 * 2**20).to_bytes(4, "little"), (100).to_bytes(4, "little")
    path.write_bytes(path.read_bytes().replace(size, stated))
    tracemalloc.start()
    done = run(capsys, "spider", "--source", path, "--out_dir", out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert done.code == 2 and f"{path}/train_spider.json: cannot be read" in done.err
    assert peak < 20 * 2**20


def test_a_json_list_that_memory_does_not_hold_is_named(tmp_path, out, capsys, monkeypatch):
    path = write_spider(tmp_path / "s", spider_rows("farm", 1), spider_rows("pets", 1))

    def full(content):
        raise MemoryError

    monkeypatch.setattr(sources.json, "loads", full)
    done = run(capsys, "spider", "--source", path, "--out_dir", out)
    assert done.code == 2 and "train_spider.json: not JSON that can be read (MemoryError)" in done.err


# ---- what the manifest says was done ----


def test_a_split_is_the_published_one_only_where_all_rows_are_there(source, out, capsys, monkeypatch):
    write_deep_regex(source, 10)
    entry = convert.DATASETS["turk"]
    monkeypatch.setitem(convert.DATASETS, "turk", dataclasses.replace(entry, rows={"": (8, 2)}))
    assert run(capsys, "turk", "--source", source, "--out_dir", out).code == 0
    made = manifest(out, "turk")
    assert made["split"] == "one in five at random, seed 42: the published split" and made["skipped"] == 0

    path = source / "src.txt"
    path.write_text(path.read_text().replace("lines with 3\n", "\n"))
    flags = ("--source", source, "--out_dir", out, "--overwrite", "--skip_bad_examples")
    assert run(capsys, "turk", *flags).code == 0
    made = manifest(out, "turk")
    assert made["split"] == "one in five at random, seed 42" and made["skipped"] == 1
    # As many as published, but not the published ones.
    monkeypatch.setitem(convert.DATASETS, "turk", dataclasses.replace(entry, rows={"": (7, 2)}))
    assert run(capsys, "turk", *flags).code == 0
    assert "rows other than published" not in manifest(out, "turk")
    assert manifest(out, "turk")["split"] == "one in five at random, seed 42"


@pytest.mark.parametrize("name", ["gsm8k", "rotten_tomatoes", "spider", "turk"])
def test_a_source_with_fewer_rows_is_not_said_to_be_the_published_split(name, source, out, capsys):
    path = write_whole_source(name, source)
    assert run(capsys, name, "--source", path, "--out_dir", out).code == 0
    split = manifest(out, name)["split"]
    assert not [claim for claim in ("published", "authors", "hub") if claim in split], split


@pytest.mark.parametrize("split", ["by_database", "random"])
def test_the_projects_own_spider_is_not_said_to_be_the_authors(split, tmp_path, out, capsys, monkeypatch):
    path = write_spider(
        tmp_path / "s.zip", spider_rows("farm", 3), spider_rows("pets", 2), readme="Licence: Apache-2.0\n"
    )
    entry = convert.DATASETS["spider"]
    rows = {"by_database": (3, 2), "random": (4, 1)}
    monkeypatch.setitem(convert.DATASETS, "spider", dataclasses.replace(entry, rows=rows))
    assert run(capsys, "spider", "--source", path, "--out_dir", out, "--split", split).code == 0
    said = manifest(out, "spider")["split"]
    assert (
        said
        == {
            "by_database": "by database: the source's train_spider.json and dev.json",
            "random": "18 % of train_spider.json and dev.json at random, seed 42",
        }[split]
    )


def test_too_few_rows_to_draw_from_are_not_said_to_be_drawn(source, out, capsys):
    path = write_whole_source("hellaswag", source)
    assert run(capsys, "hellaswag", "--source", path, "--out_dir", out, "--test_rows", 1).code == 0
    parts = "of the training and the validation part"
    assert manifest(out, "hellaswag")["split"] == f"all 2, fewer than 8000, and 1 {parts}, drawn with seed 42"
    path = write_whole_source("yelp", source)
    assert run(capsys, "yelp", "--source", path, "--out_dir", out).code == 0
    split = "all 1, fewer than 8000, and all 1, fewer than 2000, of the authors' parts, in an order drawn with seed 42"
    assert manifest(out, "yelp")["split"] == split
    path = write_whole_source("nq_open", source)
    assert run(capsys, "nq_open", "--source", path, "--out_dir", out, "--train_rows", 0).code == 0
    said = "all and all of NQ-Open's training part and EfficientQA's test part, in order"
    assert manifest(out, "nq_open")["split"] == said
    path = write_whole_source("paraphrase", source)
    assert run(capsys, "paraphrase", "--source", path, "--out_dir", out, "--train_rows", 2).code == 0
    assert manifest(out, "paraphrase")["split"] == "2 of the pairs, drawn with seed 42; all for training"
