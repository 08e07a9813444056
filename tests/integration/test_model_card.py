"""model_card.py: the card's figures are the run's, and of a run nothing goes to the hub but what is named."""

from __future__ import annotations

import base64
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from conftest import GOLDEN, ROOT, call, message_row, write_rows
from huggingface_hub import ModelCard
from synthetic_runs import change
from transformers import AutoConfig, AutoModelForCausalLM

from llm_jepa.reports import hub

ROWS = [message_row(f"lines with the number {i}", f"({i}).*") for i in range(8)]
MODEL = GOLDEN / "models" / "llama3"


def train(folder: Path, out: Path, *flags: object, model: Path = MODEL) -> Path:
    data = write_rows(folder / "mine_train.jsonl", ROWS)
    done = call("finetune", "--train_file", data, "--model_name", model, "--output_dir", out, "--learning_rate", "1e-3",
                "--max_steps", 2, "--grad_accum", 2, *flags)  # fmt: skip
    assert done.code == 0, done.err
    return out


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run as finetune.py and evaluate.py leave it."""
    folder = tmp_path_factory.mktemp("finished")
    run = train(folder, folder / "mine", "--predictors", 1, "--lbd", 0.5, "--jepa_ratio", 0.75, "--finetune_seed", 7)
    rows = write_rows(folder / "mine_test.jsonl", [message_row("lines with 9", "9"), message_row("lines with 8", "8")])
    for file, task in ((rows, "text"), (folder / "mine_train.jsonl", "text")):
        flags = ("--output_file", run / "eval" / file.stem / "predictions.jsonl", "--max_new_tokens", 4)
        done = call("evaluate", "--model_name", run, "--input_file", file, "--task", task, *flags)
        assert done.code == 0, done.err
    return run


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "mine")


def write(run: Path, *flags: object) -> ModelCard:
    done = call("llm_jepa.model_card", run, *flags)
    assert done.code == 0, done.err
    assert done.out.splitlines()[0] == str(run / "README.md")
    return ModelCard.load(run / "README.md")


def refused(*argv: object, code: int = 2) -> str:
    done = call("llm_jepa.model_card", *argv)
    assert (done.code, done.out) == (code, "") and done.err.startswith("model_card.py: error: ")
    return done.err


# ------------------------------------------------------------------------------------------------------------ card


def test_the_front_matter_has_the_scores_of_every_evaluation(run):
    path = "eval/mine_test/metrics.json"
    interval = json.loads((run / path).read_text())["ci95"] | {"exact": [0.6945328, 0.7339921]}
    change(run, path, exact=0.7146401, ci95=interval)
    data = write(run).data
    found = {(r.dataset_type, r.metric_type): (r.metric_value, r.metric_args["ci95"]) for r in data.eval_results}
    expected = {}
    for path in run.glob("eval/*/metrics.json"):
        metrics = json.loads(path.read_text())
        for name in ("exact", "startswith", "stop_rate"):
            expected[path.parent.name, name] = (metrics[name], metrics["ci95"][name])
    assert found == expected and len(found) == 6
    assert {(r.dataset_type, r.dataset_args["n"]) for r in data.eval_results} == {("mine_test", 2), ("mine_train", 8)}
    assert (data.library_name, data.pipeline_tag, data.tags) == ("transformers", "text-generation", ["llm-jepa"])
    assert data.license is None and data.base_model is None and data.datasets is None
    assert write(run, "--license", "apache-2.0").data.license == "apache-2.0"


def test_the_text_has_the_figures_of_the_files(run):
    record = json.loads((run / "run.json").read_text())
    change(run, "run.json", git_commit="df01d15", git_dirty=False, wall_seconds=1234.4, device="H100", processes=8)
    path = run / "eval/mine_test/metrics.json"
    change(run, path.relative_to(run), n=2000, exact=0.71464, ci95=json.loads(path.read_text())["ci95"] | {
        "exact": [0.6945, 0.73399]}, task="text")  # fmt: skip
    text = write(run).text
    for line in lines(record):
        assert line in text, line
    assert "uncommitted" not in text and str(run.parent) not in text, "folders of this machine"
    for name in ("--layout", "--tokens_per_row", "--lora_rank", "--eval_split", "--output_dir", "--stp_lbd"):
        assert f"`{name}`" not in text


def lines(record: dict) -> list[str]:
    return [
        "| method | LLM-JEPA with λ = 0.5, γ = 1, k = 1 predictor tokens, 1 − cosine, for a share 0.75 of the examples",
        "| labels | answer |",
        "| seed | 7 |",
        f"| steps, tokens | 2, {record['tokens']} |",
        "| wall time | 1234 s, 8 × H100 |",
        "| code | df01d15 |",
        f"python {record['versions']['python']}, torch {record['versions']['torch']}",
        f"| mine_train.jsonl | trained on | {next(iter(record['data_sha256'].values()))} |",
        "| `--learning_rate` | 0.001 |",
        "| `--max_steps` | 2 |",
        "| mine_test | exact | 71.46 | 69.45 | 73.40 | 2000 | mine_test.jsonl |",
        f"lm_loss {record['final']['lm_loss']:.4g}",
    ]


def test_a_regular_run_has_no_views_and_an_unclean_commit_is_said(run):
    change(run, "args.json", regular=True, lbd=0.1)
    change(run, "run.json", git_dirty=True)
    card = write(run)
    assert "regular fine-tuning, without the JEPA term" in card.text and card.data.tags is None
    assert "`--jepa_ratio`" not in card.text and "Predictor tokens" not in card.text
    assert "with uncommitted changes" in card.text and "The exact code:" in card.text
    change(run, "args.json", regular=False, lbd=1, jepa_ratio=0.0)
    assert "without the JEPA term" in write(run).text, "a ratio of 0 is regular fine-tuning"
    change(run, "run.json", git_commit=None, git_dirty=None)
    assert "unknown, changes unknown" in write(run).text


def test_what_is_not_shown_is_said(run):
    text = write(run).text.split("## What is not shown")[1]
    assert "One run of one seed" in text and "mine_train has rows that were trained on" in text
    assert "mine_test" not in text and "not been evaluated" not in text
    settings = json.loads((run / "eval/mine_train/metrics.json").read_text())["settings"]
    change(run, "eval/mine_train/metrics.json", settings=settings | {"process_split": "test"})
    card = write(run)
    assert "has rows that were trained on" not in card.text and "mine_train.jsonl, part test |" in card.text
    shutil.rmtree(run / "eval")
    card = write(run)
    assert "Not evaluated." in card.text and "it has not been evaluated" in card.text and not card.data.eval_results


@pytest.mark.parametrize(
    ("settings", "base"),
    [
        ({"model_name": "Qwen/Qwen3-0.6B", "revision": "abc"}, "Qwen/Qwen3-0.6B"),
        ({"model_name": "models/tiny"}, None),
        ({"model_name": "/somewhere/private/mine"}, None),
        ({"model_name": "Qwen/Qwen3-0.6B", "pretrain": True}, None),
    ],
    ids=["hub", "folder of the project", "folder", "random weights"],
)
def test_the_base_is_a_model_of_the_hub_or_none(run, settings, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a folder of the project is one from anywhere
    change(run, "args.json", **settings)
    card = write(run)
    assert card.data.base_model == base
    assert "Qwen3-0.6B at abc" in card.text or not settings.get("revision")
    assert "random weights of the shape" in card.text or not settings.get("pretrain")
    assert "private/" not in card.text


def test_held_out_files_and_hub_datasets_are_told_apart(run):
    hub_rows = "openai/gsm8k:main:train@abc"
    change(run, "args.json", eval_file="data/held.jsonl")
    change(run, "run.json", data_sha256={hub_rows: "11", "data/held.jsonl": "22"})
    change(run, "eval/mine_test/metrics.json", data_sha256="22")
    card = write(run)
    assert card.data.datasets == ["openai/gsm8k"]
    assert f"| {hub_rows} | trained on | 11 |" in card.text and "| held.jsonl | held out | 22 |" in card.text
    assert "mine_test has rows that were trained on" not in card.text
    change(run, "args.json", data_file=hub_rows, eval_file=None, eval_split=0.25)
    assert f"| {hub_rows} | trained on but for a share 0.25 held out | 11 |" in write(run).text


@pytest.mark.parametrize("status", ["running", "interrupted", "failed"])
def test_an_unfinished_run_is_refused(run, status):
    change(run, "run.json", status=status)
    assert f"{run}: the run is {status}, not finished" in refused(run) and not (run / "README.md").exists()


DAMAGE = [
    ("run.json", {"status": None}, "run.json: no valid status"),
    ("run.json", {"tokens": "many"}, "run.json: no valid tokens"),
    ("args.json", {"lbd": None}, "args.json: no valid lbd"),
    ("eval/mine_test/metrics.json", {"exact": 1.5}, "metrics.json: exact is 1.5"),
    ("eval/mine_test/metrics.json", {"ci95": {}}, "metrics.json: no valid exact"),
    ("eval/mine_test/metrics.json", {"startswith": 0.5, "ci95": {n: [0.6, 0.9] for n in ("exact", "startswith")},
                                     "exact": 0.7}, "metrics.json: startswith is 0.5, its interval"),
    ("eval/mine_test/metrics.json", {"settings": {}}, "metrics.json: no valid input_file"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "changes", "named"), DAMAGE, ids=[named for *_, named in DAMAGE])
def test_a_damaged_run_is_refused_by_file_and_key(run, file, changes, named):
    change(run, file, **changes)
    assert named in refused(run) and not (run / "README.md").exists()


def test_a_file_cut_short_or_a_folder_that_is_no_run_is_refused(run, tmp_path):
    (run / "eval/mine_test/metrics.json").write_text('{"task": ')
    assert "mine_test/metrics.json: cannot be read" in refused(run)
    assert "run.json: cannot be read" in refused(tmp_path)


def test_another_s_card_is_kept_unless_overwrite_is_given(run):
    card = run / "README.md"
    card.write_text("# Mine")
    assert f"{card} exists and was not written by model_card.py; give --overwrite" in refused(run)
    assert card.read_text() == "# Mine"
    write(run, "--overwrite")
    change(run, "args.json", finetune_seed=99)
    assert "| seed | 99 |" in write(run).text, "its own card is replaced"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """On a base whose vocabulary has no predictor tokens."""
    folder = tmp_path_factory.mktemp("adapter")
    base = shutil.copytree(ROOT / "models" / "tiny", folder / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).write_text((base / name).read_text().replace("<|predictor_", "<|spare_"))
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base)).save_pretrained(base)
    return train(folder, folder / "lora", "--lora", "--lora_rank", 2, "--predictors", 1, "--lbd", 1, model=base)


def test_the_blank_card_that_peft_leaves_is_replaced_and_an_edited_one_kept(adapter, tmp_path):
    run = shutil.copytree(adapter, tmp_path / "lora")
    assert "PEFT" in (run / "README.md").read_text()
    edited = (run / "README.md").read_text().replace("Model ID", "my model")
    card = write(run)
    assert (card.data.library_name, card.data.tags) == (
        "peft",
        ["llm-jepa", "lora"],
    ) and "`--lora_rank` | 2" in card.text
    (run / "README.md").write_text(edited)
    assert "--overwrite" in refused(run)


@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_the_code_in_the_card_answers(finished, adapter, tmp_path, kind, capsys):
    run = shutil.copytree(finished if kind == "whole" else adapter, tmp_path / "mine")
    template = run / "chat_template.jinja"  # one that prints what training pins
    shown = "{{- date_string ~ (enable_thinking is defined and not enable_thinking) -}}"
    template.write_text(shown + template.read_text())
    code = re.search(r"```python\n(.*?)```", write(run).text, re.S)[1]
    space: dict = {}
    exec(code.replace('"mine"', repr(str(run))).replace("max_new_tokens=128", "max_new_tokens=3"), space)
    assert len(space["answer"]) <= space["prompt"]["input_ids"].shape[1] + 3 and capsys.readouterr().out
    # The prompt is that of training and of evaluate.py.
    from finetune import Settings
    from llm_jepa.data.examples import Example
    from llm_jepa.data.rendering import Renderer
    from llm_jepa.model import load_tokenizer

    s = Settings(model_name=str(run))
    asked = Renderer(load_tokenizer(s), s).prompt(Example("…", "…", "x", "here", 1))
    assert "26 Jul 2024True" in asked
    assert space["tokenizer"].decode(space["prompt"]["input_ids"][0]) == asked


def test_a_model_without_a_chat_format_is_asked_without_one(run):
    change(run, "args.json", plain=True)
    text = write(run).text
    assert "<|perception|>" in text and "apply_chat_template" not in text
    change(run, "args.json", plain=True, train_all=True)
    assert "answers nothing" in write(run).text


# ------------------------------------------------------------------------------------------------------------- hub


class FakeHub:
    """Stands for the hub's HTTP interface: keeps what is sent to it."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.created: list[dict] = []
        self.tokens: set[str] = set()
        self.exists, self.private, self.refuse = False, False, {}
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: object) -> None:
                pass

            def reply(self, value: object, code: int = 200) -> None:
                content = json.dumps(value).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def do_GET(self) -> None:
                there = server.exists or server.created
                self.reply(*(({"id": "me/run", "private": server.private}, 200) if there else ({"error": "no"}, 404)))

            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["Content-Length"]))
                server.tokens.add(self.headers["Authorization"])
                code = next((code for part, code in server.refuse.items() if part in self.path), 0)
                self.reply(*(({"error": "no"}, code) if code else server.post(self.path, content)))

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def post(self, path: str, content: bytes) -> tuple[dict, int]:
        if path == "/api/repos/create":
            self.created.append(json.loads(content))
            if not self.exists:
                self.private = self.created[-1].get("visibility") == "private"
            return {"url": f"{self.url}/me/run"}, 409 if self.exists else 200
        if path == "/api/validate-yaml":
            return {"warnings": [], "errors": []}, 200
        if "/preupload/" in path:
            files = json.loads(content)["files"]
            return {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}, 200
        assert path == "/api/models/me/run/commit/main"
        for line in map(json.loads, content.splitlines()):
            if line["key"] == "file":
                self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return {"commitUrl": f"{self.url}/me/run/commit/1", "commitOid": "1"}, 200


@pytest.fixture
def fake_hub(monkeypatch):
    server = FakeHub()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_fake")
    yield server
    server.http.shutdown()
    server.http.server_close()


def test_what_is_named_is_uploaded_and_nothing_else(run, fake_hub):
    (run / "checkpoint-9").mkdir()
    for name in ("checkpoint-9/config.json", "checkpoint-9/model.safetensors", "secrets.json", ".env", "notes.txt",
                 "optimizer.pt", "eval/mine_test/untuned.json", "merged.safetensors"):  # fmt: skip
        (run / name).write_text("secret")
    assert (run / "training_args.bin").exists() and (run / "eval/mine_test/predictions.jsonl").exists()
    assert list(run.glob("checkpoint-2/optimizer.pt"))
    done = call("llm_jepa.model_card", run, "--push_to_hub", "me/run")
    assert done.code == 0, done.err
    assert done.out.splitlines() == [str(run / "README.md"), f"{fake_hub.url}/me/run"]
    named = set("README.md args.json run.json metrics.jsonl config.json generation_config.json model.safetensors "
                "tokenizer.json tokenizer_config.json chat_template.jinja eval/mine_test/metrics.json "
                "eval/mine_train/metrics.json".split())  # fmt: skip
    assert set(fake_hub.files) == named
    for name, content in fake_hub.files.items():
        assert content == (run / name).read_bytes(), name
    assert b'from_pretrained("me/run")' in fake_hub.files["README.md"]
    assert fake_hub.tokens == {"Bearer hf_fake"} and "visibility" not in fake_hub.created[0]
    fake_hub.exists = True
    assert call("llm_jepa.model_card", run, "--push_to_hub", "me/run").code == 0, (
        "a repository that is there is updated"
    )


def test_of_an_adapter_the_adapter_is_uploaded(adapter, tmp_path, fake_hub):
    run = shutil.copytree(adapter, tmp_path / "mine")
    shutil.copytree(MODEL, run / "merged")
    assert call("llm_jepa.model_card", run, "--push_to_hub", "me/run").code == 0
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= set(fake_hub.files)
    assert not [name for name in fake_hub.files if name.startswith(("merged", "checkpoint"))]


def test_private_means_private(run, fake_hub):
    assert call("llm_jepa.model_card", run, "--push_to_hub", "me/run", "--private").code == 0
    assert fake_hub.created[0]["visibility"] == "private" and "model.safetensors" in fake_hub.files
    fake_hub.exists, fake_hub.private, fake_hub.files = True, False, {}
    done = call("llm_jepa.model_card", run, "--push_to_hub", "me/run", "--private")
    assert done.code == 2 and "--private: me/run is there already and public; nothing was uploaded" in done.err
    assert fake_hub.files == {}


@pytest.mark.parametrize(("code", "why"), [(401, "token is not valid"), (403, "may not write there"), (500, "500")])
@pytest.mark.parametrize("where", ["create", "commit"])
def test_what_the_hub_refuses_is_said_with_exit_code_1(run, fake_hub, code, why, where):
    fake_hub.refuse = {where: code}
    fake_hub.exists = where == "commit"
    done = call("llm_jepa.model_card", run, "--push_to_hub", "me/run")
    assert done.code == 1 and f"--push_to_hub me/run: the hub refuses ({code})" in done.err and why in done.err
    assert "Traceback" not in done.err and done.err.count("\n") == 1 and not fake_hub.files


def test_no_network_is_said_with_exit_code_1(run, fake_hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    done = call("llm_jepa.model_card", run, "--push_to_hub", "me/run")
    assert done.code == 1 and "--push_to_hub me/run: http://127.0.0.1:9 cannot be reached" in done.err


def test_what_cannot_be_pushed_is_refused_before_anything_is_written_or_sent(run, fake_hub, monkeypatch):
    def refuses(*flags: object) -> str:
        message = refused(run, *flags)
        assert not (run / "README.md").exists() and not fake_hub.created
        return message

    assert "--private: only with --push_to_hub" in refuses("--private")
    assert "--push_to_hub run is not OWNER/NAME" in refuses("--push_to_hub", "run")
    assert "--push_to_hub me/a..b: Cannot have" in refuses("--push_to_hub", "me/a..b")
    push = ("--push_to_hub", "me/run")
    weights = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").write_bytes(weights[:-10])
    assert "model.safetensors: no weights to upload" in refuses(*push)
    (run / "model.safetensors").unlink()
    assert "model.safetensors: no weights to upload" in refuses(*push)
    (run / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    assert "model-00001-of-00002.safetensors: no weights to upload" in refuses(*push)
    (run / "model-00001-of-00002.safetensors").write_bytes(weights)
    change(run, "run.json", status="failed")
    assert "the run is failed, not finished" in refuses(*push)
    monkeypatch.setattr(hub, "get_token", lambda: None)
    assert "there is no token; set HF_TOKEN or call `hf auth login`" in refuses(*push)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refuses(*push)


def test_nothing_is_uploaded_without_being_asked_for(run, fake_hub):
    write(run)
    assert fake_hub.created == [] and fake_hub.files == {} and fake_hub.tokens == set()
