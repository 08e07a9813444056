"""What prepare.py writes and never loses: files, manifest, own rows, all of them at once."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
from conftest import message_row, write_rows

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "datasets"))

import convert
import prepare

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def run(capsys, *argv):
    """prepare.main in this process: its exit code, output and errors."""
    try:
        code = prepare.main([str(a) for a in argv])
    except SystemExit as exit_:
        code = exit_.code
    out, err = capsys.readouterr()
    return SimpleNamespace(code=code, out=out, err=err)


def users(path):
    return [json.loads(line)["messages"][-2]["content"] for line in path.read_bytes().splitlines()]


def read_manifest(folder):
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.fixture
def gsm(tmp_path):
    """A source of gsm8k, three rows and two."""
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    for part, count in (("train", 3), ("test", 2)):
        values = [{"question": f"{part} {i}?", "answer": f"\u2028{i}\n#### {i}"} for i in range(count)]
        write_rows(folder / f"{part}.jsonl", values)
    return folder


# ---- files and manifest ----


def test_files_are_utf8_lines_and_the_manifest_has_their_counts_and_checksums(gsm, out, capsys):
    done = run(capsys, "gsm8k", "--source", gsm, "--out_dir", out)
    assert done.code == 0 and f"{out}/gsm8k_train.jsonl: 3 rows" in done.out
    content = (out / "gsm8k_train.jsonl").read_bytes()
    assert content.count(b"\n") == 3 and content.endswith(b"\n") and "\u2028".encode() in content
    assert read_manifest(out)["gsm8k"]["files"] == {
        f"gsm8k_{part}.jsonl": {
            "rows": rows,
            "sha256": hashlib.sha256((out / f"gsm8k_{part}.jsonl").read_bytes()).hexdigest(),
        }
        for part, rows in (("train", 3), ("test", 2))
    }
    assert sorted(p.name for p in out.iterdir()) == ["gsm8k_test.jsonl", "gsm8k_train.jsonl", "manifest.json"]


def test_the_manifest_keeps_other_datasets_and_refuses_to_lose_a_damaged_file(gsm, out, capsys):
    (out / "manifest.json").write_text('{"zoo": {"licence": "MIT"}}', encoding="utf-8")
    assert run(capsys, "gsm8k", "--source", gsm, "--out_dir", out).code == 0
    assert list(read_manifest(out)) == ["gsm8k", "zoo"] and read_manifest(out)["zoo"] == {"licence": "MIT"}
    (out / "manifest.json").write_text("{", encoding="utf-8")
    done = run(capsys, "gsm8k", "--source", gsm, "--out_dir", out)
    assert done.code == 2 and f"{out}/manifest.json" in done.err
    assert (out / "manifest.json").read_text() == "{"


@pytest.mark.parametrize("content", ["[]", '"x"', "null", "3"])
def test_a_manifest_that_is_no_object_is_refused_before_anything_is_written(content, gsm, out, capsys):
    (out / "manifest.json").write_text(content, encoding="utf-8")
    done = run(capsys, "gsm8k", "--source", gsm, "--out_dir", out, "--overwrite")
    assert done.code == 2 and f"{out}/manifest.json: not a JSON object" in done.err and "Traceback" not in done.err
    assert [p.name for p in out.iterdir()] == ["manifest.json"] and (out / "manifest.json").read_text() == content


def test_the_same_rows_again_are_fine_and_other_rows_need_overwrite(gsm, out, capsys):
    assert run(capsys, "gsm8k", "--source", gsm, "--out_dir", out).code == 0
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.glob("*.jsonl")}
    assert run(capsys, "gsm8k", "--source", gsm, "--out_dir", out).code == 0
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.glob("*.jsonl")} == before

    write_rows(gsm / "train.jsonl", [{"question": "new?", "answer": "#### 1"}])
    done = run(capsys, "gsm8k", "--source", gsm, "--out_dir", out)
    assert done.code == 2 and f"{out}/gsm8k_train.jsonl would be replaced" in done.err and "--overwrite" in done.err
    assert "gsm8k_test" not in done.err
    assert {p: p.read_bytes() for p in out.glob("*.jsonl")} == {p: content for p, (content, _) in before.items()}
    assert read_manifest(out)["gsm8k"]["files"]["gsm8k_train.jsonl"]["rows"] == 3

    assert run(capsys, "gsm8k", "--source", gsm, "--out_dir", out, "--overwrite").code == 0
    assert users(out / "gsm8k_train.jsonl") == ["new?"]
    assert read_manifest(out)["gsm8k"]["files"]["gsm8k_train.jsonl"]["rows"] == 1


def test_the_projects_synth_rows_are_not_replaced_by_the_authors(out, tmp_path, capsys):
    source = tmp_path / "NL-RX-Synth"
    source.mkdir()
    for name in ("src.txt", "targ.txt"):
        (source / name).write_text("\n".join("abcdefghij"), encoding="utf-8")
    assert run(capsys, "synth", "--out_dir", out).code == 0
    own = (out / "synth_train.jsonl").read_bytes()
    done = run(capsys, "synth", "--source", source, "--out_dir", out)
    assert done.code == 2 and "synth_train.jsonl" in done.err and "--overwrite" in done.err
    assert (out / "synth_train.jsonl").read_bytes() == own
    assert read_manifest(out)["synth"]["licence"] == "Apache-2.0"


def test_both_files_are_renamed_only_when_both_are_written(gsm, out, capsys, monkeypatch):
    written = Path.write_bytes

    def full(self, content):
        if "test" in self.name:
            raise OSError(28, "No space left on device")
        return written(self, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    done = run(capsys, "gsm8k", "--source", gsm, "--out_dir", out)
    assert done.code == 2 and "No space left on device" in done.err
    assert list(out.iterdir()) == []


# ---- all ----


def test_all_does_what_can_be_done_and_names_the_rest(gsm, out, capsys, monkeypatch):
    def no_network(self, name, revision):
        raise RuntimeError("no network")

    def no_route(url, timeout):
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", no_network)
    monkeypatch.setattr("urllib.request.urlopen", no_route)
    monkeypatch.setattr(convert, "SPIDER_ZIP", out / "none.zip")
    done = run(capsys, "all", "--source", gsm.parent, "--out_dir", out)
    assert done.code == 2
    assert sorted(read_manifest(out)) == ["gsm8k", "synth"]
    failed = ["turk", "spider", "paraphrase", "rotten_tomatoes", "yelp", "nq_open", "hellaswag"]
    assert f"not prepared: {', '.join(failed)}" in done.err
    for name in failed:
        assert f"error: {name}: " in done.err
    assert users(out / "gsm8k_train.jsonl") == ["train 0?", "train 1?", "train 2?"]


def test_an_os_error_in_one_dataset_does_not_stop_the_others(gsm, out, capsys, monkeypatch):
    def unreadable(source):
        """Cannot be read."""
        raise PermissionError(13, "Permission denied", "src.txt")

    broken = dataclasses.replace(convert.DATASETS["turk"], convert=unreadable)
    monkeypatch.setattr(prepare, "DATASETS", {"turk": broken, "gsm8k": convert.DATASETS["gsm8k"]})
    done = run(capsys, "all", "--source", gsm.parent, "--out_dir", out)
    assert done.code == 2 and list(read_manifest(out)) == ["gsm8k"]
    assert "error: turk: [Errno 13] Permission denied: 'src.txt'" in done.err and "not prepared: turk" in done.err


def test_all_succeeds_where_every_dataset_does(out, capsys, monkeypatch):
    monkeypatch.setattr(convert, "DATASETS", {"synth": convert.DATASETS["synth"]})
    monkeypatch.setattr(prepare, "DATASETS", convert.DATASETS)
    assert run(capsys, "all", "--out_dir", out).code == 0


# ---- own rows ----


def write_csv(path, rows):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["ask", "sql", "note"], *rows])
    return path


def test_own_rows_of_a_csv_file_are_split_by_share_and_seed(tmp_path, out, capsys):
    path = write_csv(tmp_path / "mine.csv", [(f"q{i}", f"a{i}", "n") for i in range(10)])
    flags = ("own", "--name", "mine", "--train_file", path, "--text_field", "ask", "--code_field", "sql")
    done = run(capsys, *flags, "--system", "Be brief.", "--test_size", 0.25, "--out_dir", out)
    assert done.code == 0, done.err
    expected = datasets.Dataset.from_dict({"i": range(10)}).train_test_split(test_size=0.25, seed=42)
    for part in ("train", "test"):
        assert users(out / f"mine_{part}.jsonl") == [f"q{i}" for i in expected[part]["i"]]
    first = json.loads((out / "mine_test.jsonl").read_text().splitlines()[0])
    assert first == message_row(first["messages"][1]["content"], first["messages"][2]["content"], "Be brief.")
    entry = read_manifest(out)["mine"]
    assert {flag: entry[flag] for flag in ("text_field", "code_field", "system", "skipped")} == {
        "text_field": "ask",
        "code_field": "sql",
        "system": "Be brief.",
        "skipped": 0,
    }
    assert entry["source"] == [{"file": "mine.csv", "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}]
    again = run(capsys, *flags, "--test_size", 0.25, "--split_seed", 7, "--out_dir", out, "--overwrite")
    assert again.code == 0 and users(out / "mine_test.jsonl") != [f"q{i}" for i in expected["test"]["i"]]


def test_own_rows_of_two_files_keep_their_order_and_views(tmp_path, out, capsys):
    views = {"text": [{"role": "user", "content": "t"}], "code": [{"role": "assistant", "content": "c"}]}
    train = write_rows(tmp_path / "a.jsonl", [message_row("q1", "a1") | views, message_row("q2", "a2", None)])
    test = write_rows(tmp_path / "b.jsonl", [message_row("q3", "x; y") | {"answers": ["x", "y"]}])
    done = run(capsys, "own", "--name", "m", "--train_file", train, "--test_file", test, "--out_dir", out)
    assert done.code == 0, done.err
    made = [json.loads(line) for line in (out / "m_train.jsonl").read_text().splitlines()]
    assert made == [message_row("q1", "a1") | views, message_row("q2", "a2", None)]
    assert json.loads((out / "m_test.jsonl").read_text())["answers"] == ["x", "y"]


def test_own_rows_without_a_test_part(tmp_path, out, capsys):
    path = write_csv(tmp_path / "mine.csv", [("q", "a", "n")])
    flags = ("--train_file", path, "--text_field", "ask", "--code_field", "sql", "--out_dir", out)
    assert run(capsys, "own", "--name", "mine", *flags).code == 0
    assert sorted(p.name for p in out.iterdir()) == ["manifest.json", "mine_train.jsonl"]


def test_own_rows_of_the_hub_are_recorded_by_commit(out, capsys, monkeypatch):
    asked = []

    def load_dataset(name, config=None, *, split, revision):
        asked.append((name, config, split, revision))
        return datasets.Dataset.from_dict({"ask": ["q"], "sql": ["a"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *a, **k: SimpleNamespace(sha=COMMIT))
    flags = ("--text_field", "ask", "--code_field", "sql", "--out_dir", out)
    assert run(capsys, "own", "--name", "mine", "--train_file", "me/rows:small:train", *flags).code == 0
    assert asked == [("me/rows", "small", "train", COMMIT)]
    entry = {"hub": "me/rows", "config": "small", "split": "train", "revision": COMMIT}
    assert read_manifest(out)["mine"]["source"] == [entry]


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--name", "gsm8k"), "--name gsm8k"),
        (("--name", "a/b"), "--name a/b"),
        (("--name", "m", "--text_field", "ask"), "--text_field and --code_field together"),
        (("--name", "m", "--system", "S"), "--system: only with"),
        (("--name", "m", "--test_file", "x.csv", "--test_size", "0.5"), "one of --test_file and --test_size"),
        (("--name", "m", "--split_seed", "1"), "--split_seed: only with --test_size"),
        (("--name", "m", "--text_field", "ask", "--code_field", "code"), "mine.csv:3: no field 'code'"),
        (("--name", "m", "--text_field", "ask", "--code_field", "note"), "mine.csv:3: field 'note' is empty"),
        (("--name", "m", "--text_field", "ask", "--code_field", "sql", "--test_size", "1"), "a share of 1"),
        (("--name", "m", "--train_file", "none.csv"), "none.csv: cannot be read"),
    ],
)
def test_wrong_own_rows_are_one_error_and_nothing_is_written(flags, message, tmp_path, out, capsys):
    path = write_csv(tmp_path / "mine.csv", [("two\nlines", "a", " "), ("q", "b", "n")])
    done = run(capsys, "own", "--train_file", path, "--out_dir", out, *flags)
    assert done.code == 2 and message in done.err and "Traceback" not in done.err
    assert list(out.iterdir()) == []


def test_bad_own_rows_can_be_left_out(tmp_path, out, capsys):
    path = write_csv(tmp_path / "mine.csv", [("q1", " ", "n"), ("q2", "b", "n")])
    flags = ("--train_file", path, "--text_field", "ask", "--code_field", "sql", "--out_dir", out)
    done = run(capsys, "own", "--name", "mine", *flags, "--skip_bad_examples")
    assert done.code == 0 and "skipped 1 bad examples" in done.out and users(out / "mine_train.jsonl") == ["q2"]
    entry = read_manifest(out)["mine"]
    assert entry["skipped"] == 1 and "system" not in entry


# ---- command line ----


@pytest.mark.parametrize(
    "argv", [(), ("yelp", "--split", "random"), ("yelp", "--train_rows", "-1"), ("gsm8k", "--over")]
)
def test_wrong_usage_is_exit_code_2(argv, out, capsys):
    done = run(capsys, *argv, *(("--out_dir", out) if argv else ()))
    assert done.code == 2 and "usage: " in done.err and list(out.iterdir()) == []


@pytest.mark.parametrize("name", convert.DATASETS)
def test_help_of_each_dataset_names_its_source_and_licence(name, capsys):
    done = run(capsys, name, "--help")
    text = " ".join(done.out.split())
    dataset = convert.DATASETS[name]
    assert done.code == 0 and f"(licence: {dataset.licence})" in text
    assert dataset.takes.replace("-", "").replace(" ", "") in text.replace("-", "").replace(" ", "")


def test_pinned_commits_are_whole_hashes():
    for address in (convert.GSM8K, convert.SPIDER, convert.ROTTEN_TOMATOES, convert.YELP, convert.NQ_OPEN):
        assert len(address.partition("@")[2]) == 40


def test_all_refuses_a_source_that_is_not_there(out, capsys, tmp_path):
    done = run(capsys, "all", "--source", tmp_path / "typo", "--out_dir", out)
    assert done.code == 2 and "typo: there is no such folder" in done.err and list(out.iterdir()) == []


def test_a_part_that_is_no_longer_made_goes_with_overwrite_and_is_kept_without(tmp_path, out, capsys):
    rows = write_csv(tmp_path / "mine.csv", [(f"q{i}", f"a{i}", "n") for i in range(4)])
    flags = ("own", "--name", "mine", "--train_file", rows, "--text_field", "ask", "--code_field", "sql")
    flags += ("--out_dir", out)
    assert run(capsys, *flags, "--test_size", 0.5).code == 0
    before = (out / "mine_train.jsonl").read_bytes()
    done = run(capsys, *flags)
    assert done.code == 2 and "mine_test.jsonl" in done.err and (out / "mine_train.jsonl").read_bytes() == before
    assert "mine_test.jsonl: removed" in run(capsys, *flags, "--overwrite").out
    assert not (out / "mine_test.jsonl").exists() and len(users(out / "mine_train.jsonl")) == 4


# ---- what a killed process leaves ----


@pytest.fixture
def gone():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_temporary_files_of_processes_that_are_gone_are_removed(gsm, out, gone, capsys):
    ours = [out / f".gsm8k_{part}.jsonl.{gone}.tmp" for part in ("train", "test")]
    kept = [
        out / f".gsm8k_train.jsonl.{os.getppid()}.tmp",  # its process runs
        out / f".turk_train.jsonl.{gone}.tmp",
        out / ".gsm8k_train.jsonl.old.tmp",
        out / f".gsm8k_train.jsonl.{gone}.bak",
    ]
    for path in (*ours, *kept):
        path.write_text("half a row")
    bad = run(capsys, "gsm8k", "--source", out, "--out_dir", out)
    assert bad.code == 2 and all(path.exists() for path in ours)
    assert run(capsys, "gsm8k", "--source", gsm, "--out_dir", out).code == 0
    assert not any(path.exists() for path in ours) and all(path.exists() for path in kept)


def test_a_process_number_that_cannot_be_is_gone():
    assert prepare.is_running(os.getpid()) and not prepare.is_running(10**30)


def test_check_reports_a_file_that_is_not_the_manifests(gsm, out, capsys):
    assert run(capsys, "gsm8k", "--source", gsm, "--out_dir", out).code == 0
    done = run(capsys, "check", out / "gsm8k")
    assert done.code == 0 and "manifest" not in done.out
    path = out / "gsm8k_test.jsonl"
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    for given in ((out / "gsm8k",), (path,), (out / "gsm8k_train.jsonl", path, "--allow")):
        done = run(capsys, "check", *given)
        assert done.code == 1 and f"{path}: not the file that manifest.json names" in done.out
        assert "gsm8k_train.jsonl: not the file" not in done.out


@pytest.mark.parametrize("content, code", [("{", 2), ("[]", 2), ('{"gsm8k": 1}', 0), ('{"gsm8k": {"files": []}}', 0)])
def test_check_survives_any_manifest(content, code, gsm, out, capsys):
    assert run(capsys, "gsm8k", "--source", gsm, "--out_dir", out).code == 0
    (out / "manifest.json").write_text(content, encoding="utf-8")
    done = run(capsys, "check", out / "gsm8k")
    assert done.code == code and ("manifest.json" in done.err) == bool(code)


@pytest.mark.parametrize(
    "content, line, message",
    [
        ("ask,sql\nq,a\nna\u00efve,b\n".encode("latin-1"), 3, "not UTF-8 (byte 3 of the line)"),
        ("ask,sql\nq,a\n".encode("utf-16"), 1, "UTF-16, not UTF-8"),
    ],
)
def test_a_csv_in_another_encoding_is_named_with_its_line(content, line, message, tmp_path, out, capsys):
    path = tmp_path / "mine.csv"
    path.write_bytes(content)
    flags = ("own", "--name", "mine", "--train_file", path, "--text_field", "ask", "--code_field", "sql")
    done = run(capsys, *flags, "--out_dir", out)
    assert done.code == 2 and f"{path}:{line}: {message}" in done.err and "not CSV" not in done.err
    assert list(out.iterdir()) == []
    assert f"{path}:{line}: {message}" in run(capsys, "check", path).err

    (tmp_path / "yelp").mkdir()
    for part in ("train", "test"):
        (tmp_path / "yelp" / f"{part}.csv").write_bytes(content)
    done = run(capsys, "yelp", "--source", tmp_path / "yelp", "--out_dir", out)
    assert done.code == 2 and f"train.csv:{line}: {message}" in done.err and "not CSV" not in done.err
    assert f"{path}:{line}: {message}" in run(capsys, "paraphrase", "--source", path, "--out_dir", out).err
