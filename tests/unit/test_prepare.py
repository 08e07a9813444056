"""prepare.py: examples and splits of every dataset, files and manifest, own data, errors."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import shutil
import sys
import urllib.request
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
from conftest import ROOT, call, message_row, write_rows

from llm_jepa.files import sha256

sys.path.insert(0, str(ROOT / "datasets"))

import convert

run = functools.partial(call, "prepare")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REGEX_SYSTEM = "Convert natural language to regular expression."
SQL_SYSTEM = "Convert natural language to SQL."


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def turns(path):
    """(system, user, assistant) of each example; system is None if there is no such turn."""
    chats = [{m["role"]: m["content"] for m in example["messages"]} for example in read(path)]
    return [(chat.get("system"), chat["user"], chat["assistant"]) for chat in chats]


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture
def hub(monkeypatch):
    """A hub with the data of `hub.data` by (name, config, split); requests are recorded in `hub.requests`."""
    made = SimpleNamespace(data={}, requests=[])

    def load_dataset(name, config=None, *, split, revision, streaming):
        made.requests.append((name, config, split, revision))
        if (name, config, split) not in made.data:
            raise ConnectionError(f"Couldn't reach {name!r} on the Hub")
        return made.data[name, config, split]

    def urlopen(url, timeout):
        made.requests.append(url)
        if url not in made.data:
            raise OSError("no route")
        return io.BytesIO(made.data[url])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: SimpleNamespace(sha=COMMIT))
    return made


GSM = [{"question": f"How many is {i}?", "answer": f"\u2028It is {i}.\n#### {i}"} for i in range(5)]


def put_gsm(hub, train=GSM[:3], test=GSM[3:]):
    for part, rows in (("train", train), ("test", test)):
        hub.data["openai/gsm8k", "main", part] = datasets.Dataset.from_list(rows)


def labeled(names, rows):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_list([{"text": text, "label": n} for text, n in rows], features=features)


# ------------------------------------------------------------------------------------------------ from the hub


def test_gsm8k(hub, out):
    put_gsm(hub)
    done = run("gsm8k", "--out_dir", out)
    assert done.code == 0, done.err
    system, commit = "Answer the math question, show steps.", "740312add88f781978c0658806c59bc2815b9866"
    parts, source = {"train": GSM[:3], "test": GSM[3:]}, {"hub": "openai/gsm8k", "config": "main"}
    for part, rows in parts.items():
        assert turns(out / f"gsm8k_{part}.jsonl") == [(system, row["question"], row["answer"]) for row in rows]
    assert hub.requests == [("openai/gsm8k", "main", part, commit) for part in parts]
    files = {f"gsm8k_{part}.jsonl": len(rows) for part, rows in parts.items()}
    assert manifest(out)["gsm8k"] == {
        "licence": "MIT",
        "source": [source | {"split": part, "revision": commit} for part in parts],
        "skipped": 0,
        "rows other than published": {"train": "3, not 7473", "test": "2, not 1319"},
        "split": "the authors' own",
        "files": {file: {"rows": count, "sha256": sha256(out / file)} for file, count in files.items()},
    }
    assert "3, not 7473" in done.err and "2, not 1319" in done.err


def test_rotten_tomatoes(hub, out):
    name = "cornell-movie-review-data/rotten_tomatoes"
    hub.data[name, None, "train"] = labeled(["neg", "pos"], [("fine .", 1), ("dull .", 0)])
    hub.data[name, None, "test"] = labeled(["neg", "pos"], [("awful", 0)])
    assert run("rotten_tomatoes", "--out_dir", out).code == 0
    system = "Determine whether the comment is positive or negative"
    assert turns(out / "rotten_tomatoes_train.jsonl") == [(system, "fine .", "Good"), (system, "dull .", "Bad")]
    assert turns(out / "rotten_tomatoes_test.jsonl") == [(system, "awful", "Bad")]


def test_yelp_draws_the_same_examples_again(hub, out):
    names = ["1 star", "2 star", "3 stars", "4 stars", "5 stars"]
    for part in ("train", "test"):
        data = labeled(names, [(f"review {i}", i % 5) for i in range(40)])
        hub.data["Yelp/yelp_review_full", "yelp_review_full", part] = data
    flags = ("--train_rows", 10, "--test_rows", 20)
    for folder in (out, out / "again"):
        assert run("yelp", "--out_dir", folder, *flags).code == 0
    assert read(out / "again" / "yelp_test.jsonl") == read(out / "yelp_test.jsonl")
    drawn = turns(out / "yelp_test.jsonl")
    numbers = [int(user.removeprefix("review ")) for _, user, _ in drawn]
    stars = ("Very Bad", "Bad", "Mediocre", "Good", "Very Good")
    assert [answer for _, _, answer in drawn] == [stars[i % 5] for i in numbers]
    assert len(set(numbers)) == 20 and numbers != sorted(numbers) and len(turns(out / "yelp_train.jsonl")) == 10
    assert manifest(out)["yelp"]["split"] == "10 and 20 of the authors' parts, drawn with seed 42"


def test_hellaswag_views_are_context_and_ending(hub, out):
    rows = [{"ctx": f"They {i}", "endings": [f"{i}{c}" for c in "abcd"], "label": str(i)} for i in range(4)]
    for part in ("train", "validation"):
        hub.data["Rowan/hellaswag", None, part] = datasets.Dataset.from_list(rows)
    assert run("hellaswag", "--out_dir", out, "--train_rows", 0, "--test_rows", 0).code == 0
    assert read(out / "hellaswag_train.jsonl")[2] == {
        **message_row("They 2\nA) 2a\nB) 2b\nC) 2c\nD) 2d", "C", convert.HELLASWAG_SYSTEM),
        "text": [{"role": "user", "content": "They 2"}],
        "code": [{"role": "assistant", "content": "2c"}],
    }
    assert [answer for _, _, answer in turns(out / "hellaswag_test.jsonl")] == ["A", "B", "C", "D"]


def test_nq_open_keeps_all_answers(hub, out):
    train = [{"question": f"who is {i}", "answer": [f"{i}", f"the {i}th"]} for i in range(5)]
    hub.data["google-research-datasets/nq_open", "nq_open", "train"] = datasets.Dataset.from_list(train)
    hub.data[convert.NQ_OPEN_TEST] = b'{"question": "where", "answer": ["1; 2", "3"]}\n'
    assert run("nq_open", "--out_dir", out, "--train_rows", 2).code == 0
    answers = {row["question"]: row["answer"] for row in train}
    for example in read(out / "nq_open_train.jsonl"):
        assert example["answers"] == answers[example["messages"][1]["content"]]
    assert turns(out / "nq_open_test.jsonl") == [("Answer the question below.", "where", "1; 2; 3")]
    assert read(out / "nq_open_test.jsonl")[0]["answers"] == ["1; 2", "3"]
    assert manifest(out)["nq_open"]["source"][1]["url"] == convert.NQ_OPEN_TEST


def test_mbpp_keeps_the_tests_and_the_task_without_them_is_a_view(hub, out):
    rows = [
        {"task_id": i, "text": f"Write double{i}.", "code": f"def double{i}(x):\r\n  return 2 * x ",
         "test_list": [f"assert double{i}(2)==4", f"assert double{i}(0)==0"], "test_setup_code": "three = 3" * (i % 2),
         "challenge_test_list": []}
        for i in range(3)
    ]  # fmt: skip
    for part, some in (("train", rows[:1]), ("test", rows[1:])):
        hub.data["google-research-datasets/mbpp", "full", part] = datasets.Dataset.from_list(some)
    assert run("mbpp", "--out_dir", out).code == 0
    user = (
        "You are an expert Python programmer, and here is your task: Write double1. Your code should pass these tests:"
        "\n\nassert double1(2)==4\nassert double1(0)==0"
    )
    assert read(out / "mbpp_test.jsonl")[0] == {
        **message_row(user, "def double1(x):\n  return 2 * x", None),
        "text": [{"role": "user", "content": "Write double1."}],
        "tests": ["three = 3", "assert double1(2)==4", "assert double1(0)==0"],
    }
    assert read(out / "mbpp_train.jsonl")[0]["tests"] == ["assert double0(2)==4", "assert double0(0)==0"]
    assert {request[3] for request in hub.requests} == {"4bb6404fdc6cacfda99d4ac4205087b89d32030c"}
    done = call("evaluate", "--score_gold", "--input_file", out / "mbpp_test.jsonl", "--allow_code_execution")
    assert done.code == 0 and "pass_at_1          100.00" in done.out, done.err


def test_paraphrase_pairs_neighbors_within_a_set_at_a_resolved_commit(hub, out):
    texts = [(7, "a"), (7, "b"), (9, "x"), (7, "c"), (9, "y"), (11, "single")]
    rows = [{"paraphrase_set_id": i, "text": text} for i, text in texts]
    hub.data["cestwc/paraphrase", None, "coco"] = datasets.Dataset.from_list(rows)
    assert run("paraphrase", "--out_dir", out).code == 0
    assert turns(out / "paraphrase_train.jsonl") == [(None, "a", "b"), (None, "b", "c"), (None, "x", "y")]
    assert [example["group"] for example in read(out / "paraphrase_train.jsonl")] == ["7", "7", "9"]
    assert not (out / "paraphrase_test.jsonl").exists()
    assert hub.requests == [("cestwc/paraphrase", None, "coco", COMMIT)]
    assert manifest(out)["paraphrase"]["source"][0]["revision"] == COMMIT


@pytest.mark.parametrize("name", [name for name in convert.DATASETS if name != "synth"])
def test_unreachable_hub_is_exit_code_2(name, hub, out, monkeypatch, tmp_path):
    monkeypatch.setattr(convert, "SPIDER_ZIP", tmp_path / "none.zip")  # then Spider is read from the hub too
    done = run(name, "--out_dir", out)
    assert done.code == 2 and done.err and list(out.iterdir()) == []


# ------------------------------------------------------------------------------------------- deep-regex, Spider


def write_deep_regex(folder, count):
    folder.mkdir(parents=True, exist_ok=True)
    # The authors' files have no final line break.
    (folder / "src.txt").write_text("\n".join(f"lines with {i} " for i in range(count)), encoding="utf-8")
    (folder / "targ.txt").write_text("\n".join(f".*{i}.*" for i in range(count)), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "name, place", [("synth", "NL-RX-Synth"), ("turk", "datasets/NL-RX-Turk"), ("turk", ""), ("turk", "URL")]
)
def test_deep_regex_has_the_published_split(name, place, hub, tmp_path, out):
    folder = write_deep_regex(tmp_path / "source" / place, 11)
    flags = ("--source", tmp_path / "source")
    if place == "URL":
        flags = ()
        for file in folder.iterdir():
            hub.data[f"{convert.DEEP_REGEX_RAW}/datasets/NL-RX-Turk/{file.name}"] = file.read_bytes()
    assert run(name, *flags, "--out_dir", out).code == 0
    expected = datasets.Dataset.from_dict({"i": range(11)}).train_test_split(test_size=0.2, seed=42)
    for part in ("train", "test"):
        wanted = [(REGEX_SYSTEM, f"lines with {i}", f".*{i}.*") for i in expected[part]["i"]]
        assert turns(out / f"{name}_{part}.jsonl") == wanted
    assert manifest(out)[name]["licence"] == "MIT" and not (out / "SHA256SUMS").exists()


def test_split_is_published_only_with_the_published_counts_and_no_skipped_example(tmp_path, out, monkeypatch):
    source = write_deep_regex(tmp_path / "source", 10)
    flags = ("turk", "--source", source, "--out_dir", out, "--overwrite", "--skip_bad_examples")

    def split(counts):
        entry = dataclasses.replace(convert.DATASETS["turk"], counts={"": counts})
        monkeypatch.setitem(convert.DATASETS, "turk", entry)
        assert run(*flags).code == 0
        return manifest(out)["turk"]["split"]

    assert "published" in split((8, 2))
    assert "published" not in split((8, 3))
    (source / "src.txt").write_text((source / "src.txt").read_text().replace("lines with 3 \n", "\n"))
    assert "published" not in split((7, 2)) and manifest(out)["turk"]["skipped"] == 1


def spider_rows(database, count):
    return [
        {"db_id": database, "query": f"SELECT count(*) FROM t{i}", "question": f"How many t{i} are there?"}
        for i in range(count)
    ]


def write_spider(path, train, dev, top="spider_data"):
    """A folder in Spider's official layout, or a zip archive if the path ends in .zip."""
    folder = path.with_suffix("")
    (folder / top).mkdir(parents=True)
    for name, rows in (("train_spider.json", train), ("dev.json", dev)):
        (folder / top / name).write_text(json.dumps(rows), encoding="utf-8")
    if path.suffix == ".zip":
        shutil.make_archive(folder, "zip", folder)
    return path


@pytest.mark.parametrize("top", ["spider_data", ""])
@pytest.mark.parametrize("kind", ["s.zip", "s"])
def test_spider_by_database_is_the_official_split(kind, top, tmp_path, out):
    path = write_spider(tmp_path / kind, spider_rows("farm", 3), spider_rows("pets", 2), top)
    done = run("spider", "--source", path, "--out_dir", out)
    assert done.code == 0 and "3, not 7000" in done.err
    for part, database, count in (("train", "farm", 3), ("test", "pets", 2)):
        assert turns(out / f"spider_{part}.jsonl") == [
            (SQL_SYSTEM, f"For db_id:[{database}]\n\nHow many t{i} are there?", f"SELECT count(*) FROM t{i}")
            for i in range(count)
        ]
    files = [path] if kind == "s.zip" else [path / top / name for name in ("train_spider.json", "dev.json")]
    assert manifest(out)["spider"]["licence"] == "CC BY-SA 4.0"
    assert manifest(out)["spider"]["source"] == [{"file": file.name, "sha256": sha256(file)} for file in files]


def test_spider_random_is_the_published_split_of_both_files(tmp_path, out):
    both = spider_rows("farm", 30) + spider_rows("pets", 20)
    path = write_spider(tmp_path / "s.zip", both[:30], both[30:])
    assert run("spider", "--source", path, "--split", "random", "--out_dir", out).code == 0
    expected = datasets.Dataset.from_dict({"i": range(50)}).train_test_split(test_size=0.18, seed=42)
    for part in ("train", "test"):
        wanted = [f"For db_id:[{both[i]['db_id']}]\n\n{both[i]['question']}" for i in expected[part]["i"]]
        assert [user for _, user, _ in turns(out / f"spider_{part}.jsonl")] == wanted


@pytest.mark.parametrize("split", ["by_database", "random"])
def test_spider_archive_of_the_project_has_its_own_license_and_no_published_counts(split, out):
    done = run("spider", "--split", split, "--out_dir", out)
    entry = manifest(out)["spider"]
    assert done.code == 0 and done.err == "" and entry["licence"] == "Apache-2.0"
    assert "rows other than published" not in entry and "published" not in entry["split"]
    assert len(turns(out / "spider_train.jsonl")) + len(turns(out / "spider_test.jsonl")) == 650


def test_spider_by_database_refuses_shared_databases(tmp_path, out):
    path = write_spider(tmp_path / "s.zip", spider_rows("farm", 3) + spider_rows("pets", 1), spider_rows("pets", 2))
    done = run("spider", "--source", path, "--out_dir", out)
    assert done.code == 2 and "[pets]" in done.err and "--split random" in done.err and list(out.iterdir()) == []


@pytest.mark.parametrize(
    "name, content, place",
    [
        ("train_spider.json", '[\n {"db_id": "a"\n', "train_spider.json: "),
        ("dev.json", '[{"db_id": "a", "question": "q", "query": " "}]', "dev.json: entry 1: "),
        ("dev.json", None, "dev.json"),
        ("train_spider.json", None, ""),
    ],
)
def test_bad_spider_file_is_reported_with_its_place(name, content, place, tmp_path, out):
    path = write_spider(tmp_path / "s", spider_rows("farm", 1), spider_rows("pets", 1), top="")
    (path / name).unlink() if content is None else (path / name).write_text(content, encoding="utf-8")
    done = run("spider", "--source", path, "--out_dir", out)
    assert done.code == 2 and place in done.err and list(out.iterdir()) == []


def test_source_that_is_missing_or_has_other_files_is_reported(tmp_path, out):
    (tmp_path / "no.zip").write_bytes(b"no archive")
    write_deep_regex(tmp_path / "short", 3)
    (tmp_path / "short" / "targ.txt").write_text("a\n", encoding="utf-8")
    for name, source, message in (
        ("turk", "none", "--source"), ("turk", "out", "src.txt"), ("turk", "short", "src.txt:3"),
        ("spider", "no.zip", "no.zip"), ("all", "none", "--source"),
    ):  # fmt: skip
        done = run(name, "--source", tmp_path / source, "--out_dir", out)
        assert done.code == 2 and message in done.err and list(out.iterdir()) == []


# ------------------------------------------------------------------------------------------ files and manifest


def test_bad_example_is_reported_or_skipped_but_a_part_must_not_be_empty(hub, out):
    bad = [{"question": "And?", "answer": "4"}, {"question": " ", "answer": "#### 1"}]
    put_gsm(hub, train=[*GSM, *bad])
    done = run("gsm8k", "--out_dir", out)
    assert done.code == 2 and "row 6: " in done.err and list(out.iterdir()) == []
    done = run("gsm8k", "--out_dir", out, "--skip_bad_examples")
    assert done.code == 0 and "skipped 2" in done.out and len(turns(out / "gsm8k_train.jsonl")) == 5
    assert manifest(out)["gsm8k"]["skipped"] == 2
    put_gsm(hub, test=bad)
    done = run("gsm8k", "--out_dir", out, "--skip_bad_examples", "--overwrite")
    assert done.code == 2 and "test part" in done.err and len(turns(out / "gsm8k_test.jsonl")) == 2


def test_other_examples_are_replaced_only_with_overwrite(hub, out):
    put_gsm(hub)
    (out / "manifest.json").write_text('{"zoo": {"licence": "MIT"}}', encoding="utf-8")
    for _ in range(2):  # the same examples again are no conflict
        assert run("gsm8k", "--out_dir", out).code == 0
    before = {path: path.read_bytes() for path in out.iterdir()}
    put_gsm(hub, train=GSM[:1])
    done = run("gsm8k", "--out_dir", out)
    assert done.code == 2 and "gsm8k_train.jsonl" in done.err and "--overwrite" in done.err
    assert "gsm8k_test.jsonl" not in done.err and {path: path.read_bytes() for path in out.iterdir()} == before
    assert run("gsm8k", "--out_dir", out, "--overwrite").code == 0
    assert len(turns(out / "gsm8k_train.jsonl")) == 1 and list(manifest(out)) == ["gsm8k", "zoo"]


def test_all_prepares_what_it_can_and_lists_the_rest(hub, tmp_path, out):
    put_gsm(hub)
    write_deep_regex(tmp_path / "downloads" / "turk", 10)
    done = run("all", "--source", tmp_path / "downloads", "--out_dir", out)
    assert done.code == 2 and sorted(manifest(out)) == ["gsm8k", "spider", "synth", "turk"]
    assert "not prepared: paraphrase, rotten_tomatoes, yelp, nq_open, mbpp, hellaswag" in done.err


# ------------------------------------------------------------------------------------------------------ own data

FIELDS = ("--text_field", "ask", "--code_field", "sql")


def write_csv(path, *lines):
    path.write_text("\n".join(["ask,sql,note", *lines]) + "\n", encoding="utf-8")
    return path


def test_own_csv_is_split_by_share_and_seed(tmp_path, out):
    path = write_csv(tmp_path / "mine.csv", *(f"q{i},a{i},n" for i in range(10)))
    own = ("own", "--name", "mine", "--train_file", path, *FIELDS, "--out_dir", out)
    for seed, more in ((42, ()), (7, ("--split_seed", 7, "--overwrite"))):
        assert run(*own, "--system", "Be brief.", "--test_size", 0.25, *more).code == 0
        expected = datasets.Dataset.from_dict({"i": range(10)}).train_test_split(test_size=0.25, seed=seed)
        for part in ("train", "test"):
            wanted = [message_row(f"q{i}", f"a{i}", "Be brief.") for i in expected[part]["i"]]
            assert read(out / f"mine_{part}.jsonl") == wanted
    source = [{"file": "mine.csv", "sha256": sha256(path)}]
    entry = {"licence": "own", "source": source, "text_field": "ask", "code_field": "sql", "system": "Be brief."}
    assert manifest(out)["mine"].items() >= entry.items()
    # A test part of another split would not match the new train part.
    assert run(*own).code == 2 and (out / "mine_test.jsonl").exists()
    assert run(*own, "--overwrite").code == 0 and not (out / "mine_test.jsonl").exists()


def test_own_files_keep_order_views_and_answers(tmp_path, out):
    views = {"text": [{"role": "user", "content": "t"}], "code": [{"role": "assistant", "content": "c"}]}
    train = [message_row("q1", "a1") | views, message_row("q2", "a2", None)]
    test = [message_row("q3", "x; y") | {"answers": ["x", "y"]}]
    files = (write_rows(tmp_path / "a.jsonl", train), write_rows(tmp_path / "b.jsonl", test))
    flags = ("--train_file", files[0], "--test_file", files[1], "--out_dir", out)
    assert run("own", "--name", "m", *flags).code == 0
    assert read(out / "m_train.jsonl") == train and read(out / "m_test.jsonl") == test


@pytest.mark.parametrize(
    "flags, messages",
    [
        (("--name", "gsm8k"), ["--name"]),
        (("--name", "m", "--text_field", "ask"), ["--text_field", "--code_field"]),
        (("--name", "m", "--test_file", "x.csv", "--test_size", "0.5"), ["--test_file", "--test_size"]),
        (("--name", "m", "--split_seed", "1"), ["--split_seed", "--test_size"]),
        (("--name", "m", "--text_field", "ask", "--code_field", "note"), ["mine.csv:3: ", "'note'"]),
        (("--name", "m", *FIELDS, "--test_size", "1"), ["mine.csv"]),
    ],
)
def test_wrong_own_flags_or_data_are_reported(flags, messages, tmp_path, out):
    path = write_csv(tmp_path / "mine.csv", '"two\nlines",a, ', "q,b,n")
    done = run("own", "--train_file", path, "--out_dir", out, *flags)
    assert done.code == 2 and all(message in done.err for message in messages) and list(out.iterdir()) == []
