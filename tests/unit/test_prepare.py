"""prepare.py: examples and splits of every dataset, files, own data, errors, and `check`."""

import functools
import io
import json
import re
import shutil
import subprocess
import sys
import urllib.request
from types import SimpleNamespace

import datasets
import pytest
from conftest import ROOT, call, message_row, read_lines, write_rows

sys.path.insert(0, str(ROOT / "datasets"))

import convert

run = functools.partial(call, "prepare")


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture
def hub(monkeypatch):
    """A hub with the data of `hub.data` by (name, config, split) or URL; requests are recorded in `hub.requests`."""
    made = SimpleNamespace(data={}, requests=[])

    def load_dataset(name, config=None, *, split, revision, streaming):
        made.requests.append((name, config, split, revision))
        if (name, config, split) not in made.data:
            raise ConnectionError(f"Couldn't reach {name!r} on the Hub")
        return made.data[name, config, split]

    def urlopen(url, timeout):
        if url not in made.data:
            raise OSError("no route")
        return io.BytesIO(made.data[url])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return made


GSM = [{"question": f"How many is {i}?", "answer": f"\u2028It is {i}.\n#### {i}"} for i in range(5)]


def put_gsm(hub, train=GSM[:3], test=GSM[3:]):
    for part, rows in (("train", train), ("test", test)):
        hub.data["openai/gsm8k", "main", part] = datasets.Dataset.from_list(rows)


def labeled(names, rows):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_list([{"text": text, "label": n} for text, n in rows], features=features)


# ------------------------------------------------------------------------------------------------ from the hub


MOVIES, MBPP = "cornell-movie-review-data/rotten_tomatoes", "google-research-datasets/mbpp"
NQ, ENDINGS = "google-research-datasets/nq_open", {"endings": ["a", "b", "c", "d"], "label": "2"}
SENTIMENT = "Determine whether the comment is positive or negative"
PROGRAM = {"text": "Write f.", "code": "def f(x):\r\n  return x ", "test_list": ["assert f(2)==2", "assert f(0)==0"],
           "test_setup_code": "y = 3"}  # fmt: skip
MBPP_USER = (
    "You are an expert Python programmer, and here is your task: Write f. Your code should pass these tests:"
    "\n\nassert f(2)==2\nassert f(0)==0"
)
CAPTIONS = [(7, "a"), (7, "b"), (9, "x"), (7, "c"), (9, "y"), (11, "single")]
CONVERTED = {  # name: (data of the hub, lines of the train file, lines of the test file)
    "gsm8k": (
        {("openai/gsm8k", "main", part): GSM for part in ("train", "test")},
        *2 * [[message_row(*row.values(), "Answer the math question, show steps.") for row in GSM]],
    ),
    "rotten_tomatoes": (
        {(MOVIES, None, "train"): labeled(["neg", "pos"], [("fine .", 1), ("dull .", 0)]),
         (MOVIES, None, "test"): labeled(["neg", "pos"], [("awful", 0)])},
        [message_row("fine .", "Good", SENTIMENT), message_row("dull .", "Bad", SENTIMENT)],
        [message_row("awful", "Bad", SENTIMENT)],
    ),
    "hellaswag": (
        {("Rowan/hellaswag", None, part): [{"ctx": part} | ENDINGS] for part in ("train", "validation")},
        *([message_row(f"{part}\nA) a\nB) b\nC) c\nD) d", "C", convert.HELLASWAG_SYSTEM)
           | {"text": [{"role": "user", "content": part}], "code": [{"role": "assistant", "content": "c"}]}]
          for part in ("train", "validation")),
    ),
    "nq_open": (
        {(NQ, "nq_open", "train"): [{"question": "who", "answer": ["1", "the 1st"]}],
         convert.NQ_OPEN_TEST: b'{"question": "where", "answer": ["1; 2", "3"]}\n'},
        [message_row("who", "1; the 1st", "Answer the question below.") | {"answers": ["1", "the 1st"]}],
        [message_row("where", "1; 2; 3", "Answer the question below.") | {"answers": ["1; 2", "3"]}],
    ),
    "mbpp": (
        {(MBPP, "full", "train"): [PROGRAM], (MBPP, "full", "test"): [PROGRAM | {"test_setup_code": ""}]},
        *([message_row(MBPP_USER, "def f(x):\n  return x", None)
           | {"text": [{"role": "user", "content": "Write f."}], "tests": [*setup, "assert f(2)==2", "assert f(0)==0"]}]
          for setup in (["y = 3"], [])),
    ),
    "paraphrase": (
        {("cestwc/paraphrase", None, "coco"): [{"paraphrase_set_id": i, "text": text} for i, text in CAPTIONS]},
        [message_row(*pair, None) | {"group": group} for pair, group in (("ab", "7"), ("bc", "7"), ("xy", "9"))],
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVERTED)
def test_datasets_of_the_hub_at_their_revisions(name, hub, out):
    data, train, test = CONVERTED[name]
    hub.data = {k: datasets.Dataset.from_list(rows) if isinstance(rows, list) else rows for k, rows in data.items()}
    done = run(name, "--out_dir", out)
    assert done.code == 0 and (test is None or f" {len(train)} train" in done.err), done.err
    assert read_lines(out / f"{name}_train.jsonl") == train
    assert not (out / f"{name}_test.jsonl").exists() if test is None else read_lines(out / f"{name}_test.jsonl") == test
    assert all(re.fullmatch("main" if name == "paraphrase" else "[0-9a-f]{40}", call[3]) for call in hub.requests)


def test_yelp_draws_the_same_examples_again(hub, out, monkeypatch):
    monkeypatch.setitem(convert.DRAWN, "", (10, 20))
    names = ["1 star", "2 star", "3 stars", "4 stars", "5 stars"]
    for part in ("train", "test"):
        data = labeled(names, [(f"review {i}", i % 5) for i in range(40)])
        hub.data["Yelp/yelp_review_full", "yelp_review_full", part] = data
    for folder in (out, out / "again"):
        assert run("yelp", "--out_dir", folder).code == 0
    drawn = read_lines(out / "yelp_test.jsonl")
    assert read_lines(out / "again" / "yelp_test.jsonl") == drawn and len(read_lines(out / "yelp_train.jsonl")) == 10
    numbers = [int(row["messages"][1]["content"].removeprefix("review ")) for row in drawn]
    stars = ("Very Bad", "Bad", "Mediocre", "Good", "Very Good")
    assert [row["messages"][2]["content"] for row in drawn] == [stars[i % 5] for i in numbers]
    assert len(set(numbers)) == 20 and numbers != sorted(numbers)


def test_unreachable_hub_is_exit_code_2(hub, out, monkeypatch, tmp_path):
    monkeypatch.setattr(convert, "SPIDER_ZIP", tmp_path / "none.zip")  # then Spider is read from the hub too
    for name in convert.DATASETS.keys() - {"synth"}:
        done = run(name, "--out_dir", out)
        assert done.code == 2 and done.err and list(out.iterdir()) == [], name


# ------------------------------------------------------------------------------------ SYNTH, deep-regex, Spider


def test_synth_generator_writes_the_committed_files_from_any_folder(tmp_path):
    command = [sys.executable, str(ROOT / "datasets" / "prepare.py"), "synth", "--out_dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={"PYTHONHASHSEED": "7"})
    assert done.returncode == 0, done.stderr
    for name in ("synth_train.jsonl", "synth_test.jsonl", "SHA256SUMS"):
        assert (tmp_path / name).read_bytes() == (ROOT / "datasets" / name).read_bytes()


def test_synth_descriptions_and_expressions_are_unique():
    rows = [row["messages"] for part in ("train", "test") for row in read_lines(ROOT / f"datasets/synth_{part}.jsonl")]
    pairs = {row[1]["content"]: row[2]["content"] for row in rows}
    assert len(pairs) == len(set(pairs.values())) == 10_000


def write_deep_regex(folder, count):
    folder.mkdir(parents=True, exist_ok=True)
    # The authors' files have no final line break.
    (folder / "src.txt").write_text("\n".join(f"lines with {i} " for i in range(count)), encoding="utf-8")
    (folder / "targ.txt").write_text("\n".join(f".*{i}.*" for i in range(count)), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name, place", [("synth", "NL-RX-Synth"), ("turk", "datasets/NL-RX-Turk"), ("turk", "URL")])
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
        wanted = [message_row(f"lines with {i}", f".*{i}.*", convert.REGEX_SYSTEM) for i in expected[part]["i"]]
        assert read_lines(out / f"{name}_{part}.jsonl") == wanted
    assert not (out / "SHA256SUMS").exists()


def spider_rows(database, count):
    return [
        {"db_id": database, "query": f"SELECT count(*) FROM t{i}", "question": f"How many t{i} are there?"}
        for i in range(count)
    ]


def spider_lines(rows):
    system = "Convert natural language to SQL."
    return [message_row(f"For db_id:[{r['db_id']}]\n\n{r['question']}", r["query"], system) for r in rows]


def write_spider(path, train, dev, top="spider_data"):
    """A folder in Spider's official layout, or a zip archive if the path ends in .zip."""
    folder = path.with_suffix("")
    (folder / top).mkdir(parents=True)
    for name, rows in (("train_spider.json", train), ("dev.json", dev)):
        (folder / top / name).write_text(json.dumps(rows), encoding="utf-8")
    if path.suffix == ".zip":
        shutil.make_archive(folder, "zip", folder)
    return path


@pytest.mark.parametrize(("kind", "top"), [("s.zip", "spider_data"), ("s.zip", ""), ("s", "spider_data"), ("s", "")])
def test_spider_by_database_is_the_official_split(kind, top, tmp_path, out):
    train, dev = spider_rows("farm", 3), spider_rows("pets", 2)
    path = write_spider(tmp_path / kind, train, dev, top)
    done = run("spider", "--source", path, "--out_dir", out)
    assert done.code == 0 and " 3 train" in done.err and "7000" in done.err
    assert read_lines(out / "spider_train.jsonl") == spider_lines(train)
    assert read_lines(out / "spider_test.jsonl") == spider_lines(dev)


def test_spider_random_is_the_published_split_of_both_files(tmp_path, out):
    both = spider_rows("farm", 30) + spider_rows("pets", 20)
    path = write_spider(tmp_path / "s.zip", both[:30], both[30:])
    assert run("spider", "--source", path, "--split", "random", "--out_dir", out).code == 0
    expected = datasets.Dataset.from_dict({"i": range(50)}).train_test_split(test_size=0.18, seed=42)
    for part in ("train", "test"):
        assert read_lines(out / f"spider_{part}.jsonl") == spider_lines(both[i] for i in expected[part]["i"])


def test_spider_archive_of_the_project_is_used_without_a_source(out):
    assert run("spider", "--out_dir", out).code == 0
    assert (len(read_lines(out / "spider_train.jsonl")), len(read_lines(out / "spider_test.jsonl"))) == (500, 150)


def test_unusable_source_is_reported_with_its_place(tmp_path, out):
    (tmp_path / "no.zip").write_bytes(b"no archive")
    write_deep_regex(tmp_path / "short", 3)
    (tmp_path / "short" / "targ.txt").write_text("a\n", encoding="utf-8")
    write_spider(tmp_path / "shared", spider_rows("farm", 3) + spider_rows("pets", 1), spider_rows("pets", 2))
    for folder, name, content in (
        ("cut", "train_spider.json", '[\n {"db_id": "a"\n'), ("empty", "dev.json", '[{"db_id": "a", "question": "q"}]'),
        ("less", "dev.json", None),
    ):  # fmt: skip
        path = write_spider(tmp_path / folder, spider_rows("farm", 1), spider_rows("pets", 1), top="") / name
        path.unlink() if content is None else path.write_text(content, encoding="utf-8")
    for name, source, message in (
        ("turk", "none", "--source"), ("turk", "out", "src.txt"), ("turk", "short", "src.txt:3"),
        ("spider", "no.zip", "no.zip"), ("spider", "cut", "train_spider.json: "), ("spider", "less", "dev.json"),
        ("spider", "empty", "dev.json: entry 1: "), ("spider", "shared", "--split random"), ("spider", "out", "out"),
    ):  # fmt: skip
        done = run(name, "--source", tmp_path / source, "--out_dir", out)
        assert done.code == 2 and message in done.err and list(out.iterdir()) == [], (name, source)


# ----------------------------------------------------------------------------------------------------------- files


def test_bad_example_is_reported_or_skipped_but_a_part_must_not_be_empty(hub, out):
    bad = [{"question": "And?", "answer": "4"}, {"question": " ", "answer": "#### 1"}]
    put_gsm(hub, train=[*GSM, *bad])
    done = run("gsm8k", "--out_dir", out)
    assert done.code == 2 and "row 6: " in done.err and list(out.iterdir()) == []
    done = run("gsm8k", "--out_dir", out, "--skip_bad_examples")
    assert done.code == 0 and "skipped 2" in done.out and len(read_lines(out / "gsm8k_train.jsonl")) == 5
    put_gsm(hub, test=bad)
    done = run("gsm8k", "--out_dir", out, "--skip_bad_examples", "--overwrite")
    assert done.code == 2 and "no examples" in done.err and len(read_lines(out / "gsm8k_test.jsonl")) == 2


def test_other_examples_are_replaced_only_with_overwrite(hub, out):
    put_gsm(hub)
    for _ in range(2):  # the same examples again are no conflict
        assert run("gsm8k", "--out_dir", out).code == 0
    before = {path: path.read_bytes() for path in out.iterdir()}
    put_gsm(hub, train=GSM[:1])
    done = run("gsm8k", "--out_dir", out)
    assert done.code == 2 and "gsm8k_train.jsonl" in done.err and "--overwrite" in done.err
    assert "gsm8k_test.jsonl" not in done.err and {path: path.read_bytes() for path in out.iterdir()} == before
    assert run("gsm8k", "--out_dir", out, "--overwrite").code == 0
    assert len(read_lines(out / "gsm8k_train.jsonl")) == 1


# ------------------------------------------------------------------------------------------------------ own data

FIELDS = ("--text_field", "ask", "--code_field", "sql")


def write_csv(path, *lines):
    path.write_text("\n".join(["ask,sql,note", *lines]) + "\n", encoding="utf-8")
    return path


def test_own_csv_is_split_by_share(tmp_path, out):
    path = write_csv(tmp_path / "mine.csv", *(f"q{i},a{i},n" for i in range(10)))
    own = ("own", "--name", "mine", "--train_file", path, *FIELDS, "--view_code_field", "note", "--out_dir", out)
    assert run(*own, "--system", "Be brief.", "--test_size", 0.25).code == 0
    expected = datasets.Dataset.from_dict({"i": range(10)}).train_test_split(test_size=0.25, seed=42)
    for part in ("train", "test"):
        view = {"code": [{"role": "assistant", "content": "n"}]}
        wanted = [message_row(f"q{i}", f"a{i}", "Be brief.") | view for i in expected[part]["i"]]
        assert read_lines(out / f"mine_{part}.jsonl") == wanted
    # A test part of another split would not match the new train part.
    assert run(*own).code == 2 and (out / "mine_test.jsonl").exists()
    assert run(*own, "--overwrite").code == 0 and not (out / "mine_test.jsonl").exists()


def test_own_files_keep_order_turns_views_and_answers(tmp_path, out):
    views = {"text": [{"role": "user", "content": "t"}], "code": [{"role": "assistant", "content": "c"}]}
    chat = message_row("q1", "a1")["messages"]
    train = [message_row("q1", "a1") | views, {"messages": chat + chat[1:], "pair": False}, views]
    test = [message_row("q3", "x; y", None) | {"answers": ["x", "y"]}]
    files = (write_rows(tmp_path / "a.jsonl", train), write_rows(tmp_path / "b.jsonl", test))
    flags = ("--train_file", tmp_path / "a*.jsonl", "--test_file", files[1], "--out_dir", out)
    assert run("own", "--name", "m", *flags).code == 0
    assert read_lines(out / "m_train.jsonl") == train and read_lines(out / "m_test.jsonl") == test


def test_split_of_own_examples_has_no_prompt_on_both_sides(tmp_path, out):
    path = write_csv(tmp_path / "mine.csv", *(f"q{i // 2},a{i},n" for i in range(20)))
    own = ("own", "--train_file", path, *FIELDS, "--out_dir", out, "--test_size", 0.3)
    assert run(*own, "--name", "mine").code == 0
    train, test = (
        [row["messages"][0]["content"] for row in read_lines(out / f"mine_{p}.jsonl")] for p in ("train", "test")
    )
    assert test and not set(train) & set(test) and sorted(train + test) == sorted(f"q{i // 2}" for i in range(20))
    assert run("check", out / "mine").code == run("check", out / "mine_tr*.jsonl").code == 0
    write_csv(path, *("q,a,n" for _ in range(9)))
    done = run(*own, "--name", "other")
    assert done.code == 2 and "mine.csv" in done.err and not (out / "other_train.jsonl").exists()


@pytest.mark.parametrize(
    "flags, messages",
    [(("--name", "gsm8k"), ["--name"]),
     (("--name", "m", "--text_field", "ask"), ["--text_field", "--code_field"]),
     (("--name", "m", "--test_file", "x.csv", "--test_size", "0.5"), ["--test_file", "--test_size"]),
     (("--name", "m", "--text_field", "ask", "--code_field", "note"), ["mine.csv:3: ", "'note'"]),
     (("--name", "m", *FIELDS, "--test_size", "1"), ["mine.csv"])],
)  # fmt: skip
def test_wrong_own_flags_or_data_are_reported(flags, messages, tmp_path, out):
    path = write_csv(tmp_path / "mine.csv", '"two\nlines",a, ', "q,b,n")
    done = run("own", "--train_file", path, "--out_dir", out, *flags)
    assert done.code == 2 and all(message in done.err for message in messages) and list(out.iterdir()) == []


# --------------------------------------------------------------------------------------------------------- check


def check(folder, train, test):
    """`prepare.py check` of two parts, with its findings as (leak, count, lines) by text."""
    for part, pairs in (("train", train), ("test", test)):
        write_rows(folder / f"mine_{part}.jsonl", [message_row(*pair) for pair in pairs])
    done = run("check", folder / "mine")
    found = re.findall(r"^  (LEAK|    ) +(\d+) of \d+ +(.*?)(?:: lines (.*))?$", done.out, re.MULTILINE)
    done.findings = {what: (leak == "LEAK", int(count), lines) for leak, count, what, lines in found}
    return done


def test_repeats_and_prompts_that_cannot_be_learned_are_found_and_are_no_leaks(tmp_path):
    train = [("q1", "a"), ("q2", "b"), *6 * [("q1", "a")], ("q1", "c"), ("q1", "a", "Do this."), ("It is 7!", "7")]
    done = check(tmp_path, train, [("q3", "c"), ("q1", "a", "Do that.")])
    found = {what: count for what, count in done.findings.items() if count[1]}
    assert done.code == 0 and found == {
        "train: repeated prompt and answer": (False, 6, "3, 4, 5, 6, 7 …"),
        "train: prompt with several answers": (False, 8, "1, 3, 4, 5, 6 …"),
        "train: answer in its own prompt": (False, 1, "11"),
    }


def test_prompts_pairs_and_databases_of_train_in_test_are_leaks(tmp_path):
    def sql(database, question, query):
        return f"For db_id:[{database}]\n\n{question}", query

    train = [("What is it?", "Two  words"), ("caf\u00e9", "\ufb01ne"), ("same", "same"), ("STRASSE", "a"), ("q", "b"),
             sql("Farm", "How many?", "SELECT 1"), sql("pets", "Who?", "SELECT 2")]  # fmt: skip
    test = [
        ("what  is\nit? ", "two words"),  # 1
        ("cafe\u0301", "fine"),  # 2: decomposed, and without the ligature
        ("stra\u00dfe", "other"),  # 3: only the prompt
        ("q!", "b"),
        sql("farm", "How much?", "SELECT 1"),  # 5
        sql("farm", "Which?", "SELECT 2"),  # 6: only the database
        sql("zoo", "Who?", "SELECT 2"),
    ]
    done = check(tmp_path, train, test)
    assert done.code == 1 and {what: found for what, found in done.findings.items() if found[0]} == {
        "test: prompt in train": (True, 3, "1, 2, 3"), "test: prompt and answer in train": (True, 2, "1, 2"),
        "test: database in train": (True, 2, "5, 6"), "test: database and SQL in train": (True, 1, "5"),
    }  # fmt: skip


def test_views_without_a_chat_are_a_prompt_and_an_answer(tmp_path):
    train, test = {"text": "q", "code": "a"}, [message_row("q", "b", None), {"text": "x", "code": "a"}]
    files = [write_rows(tmp_path / f"{part}.jsonl", rows) for part, rows in (("train", [train]), ("test", test))]
    done = run("check", *files)
    assert done.code == 1 and "LEAK      1 of 2      test: prompt in train: lines 1\n" in done.out


@pytest.mark.parametrize(
    "argv, message", [(["none"], "none_train.jsonl"), (["bad.jsonl"], "bad.jsonl:2: "), (["bad.jsonl"] * 3, "check")]
)
def test_wrong_usage_or_data_of_check_is_exit_code_2(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "bad.jsonl", [message_row("q", "a"), {"messages": []}])
    done = run("check", *argv)
    assert done.code == 2 and message in done.err
