"""prepare.py as a script, from any folder, on the data as its authors publish it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "datasets" / "prepare.py"
SHARED = ROOT.parent / "shared" / "data"
published = pytest.mark.skipif(not SHARED.is_dir(), reason="the published rows are not here (shared/data)")


def run(*argv, cwd):
    """The script with another folder as the working directory."""
    command = [sys.executable, str(SCRIPT), *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, "HF_HUB_OFFLINE": "1"})


def chats(path):
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    return [[(m["role"], m["content"]) for m in json.loads(line)["messages"]] for line in lines if line]


@published
@pytest.mark.parametrize("name", ["synth", "turk"])
def test_regex_sets_are_the_published_rows_in_their_order(name, tmp_path):
    done = run(name, "--source", SHARED / "raw" / "deep-regex", "--out_dir", tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for part, count in (("train", 8000), ("test", 2000)):
        made = chats(tmp_path / f"{name}_{part}.jsonl")
        assert len(made) == count and made == chats(SHARED / f"{name}_{part}.jsonl")
    assert "warning" not in done.stderr


@published
def test_gsm8k_is_the_published_rows_in_their_order(tmp_path):
    done = run("gsm8k", "--source", SHARED / "raw" / "gsm8k", "--out_dir", tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert chats(tmp_path / "gsm8k_test.jsonl") == chats(SHARED / "gsm8k_test.jsonl")
    train = chats(tmp_path / "gsm8k_train.jsonl")
    with open(SHARED / "raw" / "gsm8k" / "train.jsonl", encoding="utf-8") as file:
        raw = [json.loads(line) for line in file]
    assert [(chat[1][1], chat[2][1]) for chat in train] == [(row["question"], row["answer"]) for row in raw]
    assert len(train) == 7473 and "warning" not in done.stderr


@published
def test_spider_at_random_is_the_published_split(tmp_path):
    """train_spider.json is not here, but train_gold.sql has its queries in order, among those of train_others.json."""
    others = {"academic", "geo", "imdb", "restaurants", "scholar", "yelp"}
    with open(SHARED / "spider_data" / "train_gold.sql", encoding="utf-8") as file:
        gold = [line.rstrip("\n").split("\t") for line in file]
    train = [{"db_id": db, "query": query, "question": "?"} for query, db in gold if db not in others]
    with zipfile.ZipFile(tmp_path / "spider_data.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("spider_data/train_spider.json", json.dumps(train))
        archive.write(SHARED / "spider_data" / "dev.json", "spider_data/dev.json")
    source = ("--source", tmp_path / "spider_data.zip", "--out_dir", tmp_path)
    done = run("spider", *source, "--split", "random", cwd=tmp_path)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    for part, count, from_dev in (("train", 6587, 851), ("test", 1447, 183)):
        made, reference = chats(tmp_path / f"spider_{part}.jsonl"), chats(SHARED / f"spider_{part}.jsonl")
        assert len(made) == len(reference) == count
        databases = [[chat[1][1].partition("\n")[0] for chat in rows] for rows in (made, reference)]
        assert databases[0] == databases[1]
        queries = [[" ".join(chat[2][1].split()) for chat in rows] for rows in (made, reference)]
        assert queries[0] == queries[1]
        assert sum(a == b for a, b in zip(made, reference, strict=True)) == from_dev

    done = run("spider", *source, "--overwrite", cwd=tmp_path)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    assert len(chats(tmp_path / "spider_train.jsonl")) == 7000 and len(chats(tmp_path / "spider_test.jsonl")) == 1034
    done = run("check", tmp_path / "spider", cwd=tmp_path)
    assert done.returncode == 0 and "140 databases in train, 20 in test, 0 in both" in done.stdout


@published
def test_rows_made_by_prepare_have_the_shape_of_the_published_ones(tmp_path):
    """HellaSwag's published rows, taken apart into the hub's columns, come back as they were."""
    with open(SHARED / "hellaswag_test.jsonl", encoding="utf-8") as file:
        wanted = [json.loads(line) for line in file][:50]
    parts = []
    for row in wanted:
        context, user = row["text"][0]["content"], row["messages"][1]["content"]
        endings = [line[3:] for line in user.removeprefix(context + "\n").split("\n")]
        parts.append({"ctx": context, "endings": endings, "label": "ABCD".index(row["messages"][2]["content"])})
    for name in ("train", "val"):
        with open(tmp_path / f"hellaswag_{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(part) + "\n" for part in parts)
    flags = ("--train_rows", 0, "--test_rows", 0, "--out_dir", tmp_path / "out")
    done = run("hellaswag", "--source", tmp_path, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "out" / "hellaswag_test.jsonl", encoding="utf-8") as file:
        assert [json.loads(line) for line in file] == wanted


def test_without_network_a_dataset_is_one_error_that_says_what_to_do(tmp_path):
    done = run("gsm8k", "--out_dir", tmp_path, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "give as --source a folder with train.jsonl and test.jsonl" in done.stderr
    assert "https://github.com/openai/grade-school-math" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_dataset_made_here_trains_and_checks_as_it_is(tmp_path):
    rows = [{"ask": f"lines with {word}", "regex": f".*{word}.*"} for word in ("dog", "ring", "lake", "truck")]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    fields = ("--text_field", "ask", "--code_field", "regex", "--test_size", "0.25")
    done = run("own", "--name", "mine", "--train_file", "mine.jsonl", *fields, "--out_dir", tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert run("check", "mine", cwd=tmp_path).returncode == 0
    command = [sys.executable, ROOT / "finetune.py", "--dry_run", "2", "--train_file", tmp_path / "mine_train.jsonl"]
    command += ["--model_name", ROOT / "models" / "tiny", "--pretrain"]
    trained = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
