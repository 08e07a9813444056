"""python -m llm_jepa.model_card: the card has the run's figures, and only the listed files are uploaded."""

import json
import re
import shutil
from pathlib import Path
from unittest.mock import MagicMock

import huggingface_hub
import pytest
from conftest import MODEL, ROOT, call, message_row, train, write_rows
from huggingface_hub import ModelCard
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import filter_repo_objects
from synthetic_runs import change
from transformers import AutoConfig, AutoModelForCausalLM

from llm_jepa.data.examples import Example
from llm_jepa.data.rendering import Renderer
from llm_jepa.losses import JEPA_LOSSES, NITP_FORMULA, STP_LOSSES
from llm_jepa.model import load_tokenizer

TEST, TRAIN = "eval/mine_test/metrics.json", "eval/mine_train/metrics.json"


def train_eight(folder: Path, out: Path, *flags: object, model: Path = MODEL) -> Path:
    """A run on eight examples."""
    rows = [message_row(f"lines with the number {i}", f"({i}).*") for i in range(8)]
    return train(write_rows(folder / "mine_train.jsonl", rows), out, "--max_steps", 2, *flags, model=model)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of finetune.py, evaluated on two files."""
    folder = tmp_path_factory.mktemp("finished")
    flags = ("--predictors", 1, "--lbd", 0.5, "--jepa_ratio", 0.75, "--finetune_seed", 7)
    run = train_eight(folder, folder / "mine", *flags)
    test = write_rows(folder / "mine_test.jsonl", [message_row("lines with 9", "9"), message_row("lines with 8", "8")])
    for file in (test, folder / "mine_train.jsonl"):
        flags = ("--output_file", run / "eval" / file.stem / "predictions.jsonl", "--max_new_tokens", 4)
        call("evaluate", "--model_name", run, "--input_file", file, "--task", "text", *flags, code=0)
    return run


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """A LoRA run whose base model has no predictor tokens."""
    folder = tmp_path_factory.mktemp("adapter")
    base = shutil.copytree(ROOT / "models" / "tiny", folder / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).write_text((base / name).read_text().replace("<|predictor_", "<|spare_"))
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base)).save_pretrained(base)
    return train_eight(folder, folder / "lora", "--lora", "--lora_rank", 2, "--predictors", 1, "--lbd", 1, model=base)


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "mine")


def write(run: Path, *flags: object) -> ModelCard:
    done = call("llm_jepa.model_card", run, *flags, code=0)
    assert done.out.splitlines()[0] == str(run / "README.md")
    return ModelCard.load(run / "README.md")


def refused(*argv: object, code: int = 2) -> str:
    done = call("llm_jepa.model_card", *argv)
    assert (done.code, done.out, done.err.count("\n")) == (code, "", 1), done.err
    return done.err


def test_front_matter_has_the_scores_of_every_evaluation(run):
    data = write(run, "--license", "apache-2.0").data
    found = {(r.dataset_type, r.metric_type): (r.metric_value, r.metric_args["ci95"]) for r in data.eval_results}
    metrics = {path.parent.name: json.loads(path.read_text()) for path in run.glob("eval/*/metrics.json")}
    scores = ("exact", "startswith", "stop_rate")
    assert found == {(name, s): (m[s], m["ci95"][s]) for name, m in metrics.items() for s in scores}
    assert {(r.dataset_type, r.dataset_args["n"]) for r in data.eval_results} == {("mine_test", 2), ("mine_train", 8)}
    assert (data.library_name, data.pipeline_tag, data.tags) == ("transformers", "text-generation", ["llm-jepa"])
    assert (data.license, data.base_model, data.datasets) == ("apache-2.0", None, None)


def test_text_has_the_figures_of_the_run(run):
    record = json.loads((run / "run.json").read_text())
    change(run, "run.json", git_commit="df01d15", git_dirty=False, wall_seconds=1234.4, device="H100", processes=8)
    interval = json.loads((run / TEST).read_text())["ci95"] | {"exact": [0.6945, 0.73399]}
    change(run, TEST, n=2000, exact=0.71464, ci95=interval)
    text = write(run).text
    (checksum,) = record["data_sha256"].values()
    for line in (
        "| seed | 7 |", f"| steps, tokens | 2, {record['tokens']} |", "| wall time | 1234 s, 8 × H100 |",
        "| code | df01d15 |", f"lm_loss {record['final']['lm_loss']:.4g}", "| `--learning_rate` | 0.001 |",
        f"| mine_train.jsonl | trained on | {checksum} |",
        "| mine_test, mine_test.jsonl | exact | 71.46 | 69.45 | 73.40 | 2000 |",
    ):  # fmt: skip
        assert line in text, line
    assert "λ = 0.5, γ = 1, k = 1" in text and "0.75 of the examples" in text
    assert str(run.parent) not in text  # no local paths
    assert "`--lora_" not in text and "`--output_dir`" not in text  # settings without an effect
    limits = text.split("## Limits")[1]
    assert "mine_train" in limits and "mine_test" not in limits and "commit" not in limits


def test_text_depends_on_method_code_and_evaluations(run):
    change(run, "args.json", regular=True, lbd=0.1)
    change(run, "run.json", git_commit="df01d15", git_dirty=True)
    card = write(run)
    assert "| regular fine-tuning" in card.text and card.data.tags is None and "`--jepa_ratio`" not in card.text
    assert "Predictor tokens" not in card.text and "df01d15, with uncommitted changes" in card.text
    assert "| learned |" not in card.text
    change(run, "args.json", regular=False, lbd=1, jepa_ratio=0.0, stp="geodesic", stp_lbd=0.02)
    card = write(run)
    assert "| regular fine-tuning" in card.text and STP_LOSSES["geodesic"].formula in card.text
    assert card.data.tags == ["semantic-tube-prediction"]
    settings = json.loads((run / TRAIN).read_text())["settings"]
    change(run, TRAIN, settings=settings | {"process_split": "test"})
    for held_out in (0, 0.2):  # without a held-out part, the run was trained on the complete file
        change(run, "args.json", val_fraction=held_out)
        text = write(run).text
        assert "mine_train.jsonl, part test |" in text
        assert ("mine_train" in text.split("## Limits")[1]) == (not held_out)
    shutil.rmtree(run / "eval")
    card = write(run)
    assert "Not evaluated." in card.text and not card.data.eval_results


def test_text_has_what_the_terms_have_learned_and_the_retrieval(run):
    assert "| learned | not measured |" in write(run).text  # 2 steps
    learned = {"jepa": {"collapsed": False, "cosine": 0.75, "cosine_shuffled": 0.25, "cosine_shuffled_sd": 0.0625,
                        "retrieval": 0.4375, "retrieval_chance": 0.125}}  # fmt: skip
    learned["nitp"] = {"collapsed": True, "cosine": 0.0625, "cosine_shuffled": 0.03125}
    change(run, "run.json", learned=learned)
    change(run, "args.json", jepa_loss="clip", nitp=True, shuffle_pairs=True)
    at = {name: {"r1": r1} for name, r1 in (("text_to_code", 0.516), ("code_to_text", 0.25), ("chance", 0.0005))}
    change(run, TEST, retrieval=at | {"n": 2000})
    card = write(run)
    jepa, nitp = card.text.split("| learned | ")[1].split(" |")[0].split("; the")
    assert "JEPA term has learned" in jepa and all(f"{x:.3f}" in jepa for x in (0.75, 0.25, 0.4375, 0.125))
    assert "NITP term has not learned" in nitp and "0.0625" in nitp
    assert JEPA_LOSSES["clip"].formula in card.text and NITP_FORMULA in card.text and "placebo" in card.text
    change(run, "args.json", regular=True)
    change(run, "run.json", learned={"nitp": learned["nitp"]})
    assert "| learned | the NITP term has not" in write(run, "--overwrite").text
    assert card.data.tags == ["llm-jepa", "nitp"] and "`--nitp_lbd`" in card.text
    (line,) = [line for line in card.text.splitlines() if line.startswith("mine_test, retrieval")]
    assert all(text in line for text in ("2000 pairs", "0.516", "0.250", "0.0005"))


@pytest.mark.parametrize(
    ("settings", "base", "text"),
    [({"model_name": "Qwen/Qwen3-0.6B", "revision": "abc"}, "Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B at abc |"),
     ({"model_name": "/somewhere/private/mine"}, None, "| mine ("),
     ({"model_name": "Qwen/Qwen3-0.6B", "pretrain": True}, None, "| random weights")],
    ids=["hub", "folder", "random weights"],
)  # fmt: skip
def test_base_model_is_one_of_the_hub_or_none(run, settings, base, text):
    change(run, "args.json", **settings)
    card = write(run)
    assert card.data.base_model == base and text in card.text and "private/" not in card.text


def test_held_out_files_and_hub_data_sets(run):
    examples = "openai/gsm8k:main:train@abc"
    change(run, "args.json", eval_file="data/held.jsonl")
    change(run, "run.json", data_sha256={examples: "11", "data/held.jsonl": "22"})
    change(run, TEST, data_sha256="22")
    card = write(run)
    assert card.data.datasets == ["openai/gsm8k"] and "mine_test" not in card.text.split("## Limits")[1]
    assert f"| {examples} | trained on | 11 |" in card.text and "| held.jsonl | held out | 22 |" in card.text
    change(run, "args.json", data_file=examples, eval_file=None, eval_split=0.25)
    assert "held-out fraction 0.25 | 11 |" in write(run).text


def test_unfinished_or_damaged_run_is_refused(run, tmp_path):
    assert "run.json" in refused(tmp_path)
    change(run, "run.json", status="failed")
    assert f"{run}: failed" in refused(run)
    change(run, "run.json", status="finished")
    (run / TEST).write_text('{"task": ')
    assert TEST in refused(run) and not (run / "README.md").exists()


def test_card_of_another_origin_is_kept_unless_overwrite_is_given(run, adapter, tmp_path):
    (run / "README.md").write_text("# Mine")
    assert "--overwrite" in refused(run) and (run / "README.md").read_text() == "# Mine"
    write(run, "--overwrite")
    change(run, "args.json", finetune_seed=99)
    assert "| seed | 99 |" in write(run).text
    lora = shutil.copytree(adapter, tmp_path / "lora")
    blank = (lora / "README.md").read_text()
    assert "PEFT" in blank
    card = write(lora)
    assert (card.data.library_name, card.data.tags) == ("peft", ["llm-jepa", "lora"])
    (lora / "README.md").write_text(blank.replace("Model ID", "my model"))
    assert "--overwrite" in refused(lora)


def run_code(run: Path) -> tuple[str, str]:
    """The Python block of the run's card, and the prompt from which it generates when executed."""
    code = re.search(r"```python\n(.*?)```", write(run).text, re.S)[1]
    space: dict = {}
    exec(code.replace('"mine"', repr(str(run))).replace("max_new_tokens=128", "max_new_tokens=3"), space)
    assert len(space["answer"]) <= space["ids"].shape[1] + 3
    return code, space["tokenizer"].decode(space["ids"][0])


SYSTEM = "Write the regular expression."  # of all examples here


def test_code_in_the_card_of_an_adapter_generates_from_the_prompt_of_training(adapter, tmp_path, capsys):
    run = shutil.copytree(adapter, tmp_path / "mine")
    code, prompt = run_code(run)
    assert SYSTEM in code and capsys.readouterr().out
    assert prompt == Renderer(load_tokenizer(str(run))).prompt(Example(SYSTEM, "…", "x", "here", 1))


@pytest.mark.parametrize("system", [None, "Say \"a\" or 'b':\n```python\n\\d é\n```", ...], ids=repr)
def test_code_in_the_card_has_the_system_text_of_training(run, system):
    change(run, "run.json", system_turn=system)  # ...: the run has none
    code, prompt = run_code(run)
    assert ("system" in code) == (system is not None and system is not ...)
    example = Example(None if system is ... else system, "…", "x", "here", 1)
    assert prompt == Renderer(load_tokenizer(str(run))).prompt(example)
    assert "several" in write(run).text.split("## Use")[1] or system is not ...


def test_code_in_the_card_of_a_plain_run_has_its_prompt(tmp_path):
    run = train_eight(tmp_path, tmp_path / "mine", "--plain", "--lora", "--merge", "--regular")
    code, prompt = run_code(run)
    assert prompt.endswith("…<|perception|>") and "system" not in prompt + code
    template, merged = ((folder / "chat_template.jinja").read_text() for folder in (run, run / "merged"))
    assert "perception" in template and merged == template
    change(run, "args.json", train_all=True)
    assert "```python" not in write(run).text


# ------------------------------------------------------------------------------------------------------------- hub


@pytest.fixture
def server(monkeypatch) -> MagicMock:
    """The calls of the hub's client."""
    server = MagicMock(endpoint="https://hub.test")
    server.create_repo.return_value = "https://hub.test/me/run"
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token: server)
    return server


def uploaded(server: MagicMock) -> set[str]:
    """The files that the hub's client selects for the upload."""
    how = server.upload_folder.call_args.kwargs
    files = [str(p.relative_to(how["folder_path"])) for p in how["folder_path"].rglob("*") if p.is_file()]
    return set(filter_repo_objects(files, allow_patterns=how["allow_patterns"]))


PUSH = ("--push_to_hub", "me/run")


def test_only_listed_files_are_uploaded(run, server):
    for folder in (run / "checkpoint-9", run / "merged"):
        shutil.copytree(MODEL, folder)
    for name in ("secrets.json", ".env", "notes.txt", "optimizer.pt", "eval/mine_test/untuned.json",
                 "merged.safetensors", "adapter_config.json", "adapter_model.safetensors"):  # fmt: skip
        (run / name).write_text("secret")
    write(run)
    assert not server.mock_calls  # nothing is sent without --push_to_hub
    done = call("llm_jepa.model_card", run, *PUSH, code=0)
    assert done.out.splitlines() == [str(run / "README.md"), "https://hub.test/me/run"]
    assert uploaded(server) == {TEST, TRAIN} | set(
        "README.md args.json run.json metrics.jsonl config.json generation_config.json model.safetensors "
        "adapter_config.json adapter_model.safetensors tokenizer.json tokenizer_config.json chat_template.jinja".split()
    )
    assert 'from_pretrained("me/run")' in (run / "README.md").read_text()
    assert server.create_repo.call_args.kwargs["private"] is None


def test_private_creates_a_private_repository_and_refuses_a_public_one(run, server):
    server.model_info.return_value.private = False
    done = call("llm_jepa.model_card", run, *PUSH, "--private")
    assert done.code == 2 and "--private: me/run" in done.err and not server.upload_folder.called
    server.model_info.return_value.private = True
    assert call("llm_jepa.model_card", run, *PUSH, "--private").code == 0
    assert server.create_repo.call_args.kwargs["private"] and "model.safetensors" in uploaded(server)


def test_failed_upload_exits_with_1(run, server):
    server.upload_folder.side_effect = HTTPError("no\nnetwork")
    done = call("llm_jepa.model_card", run, *PUSH)
    assert done.code == 1 and "--push_to_hub me/run" in done.err and done.err.count("\n") == 1


@pytest.mark.parametrize("flags", [["--private"], ["--push_to_hub", "run"]], ids=" ".join)
def test_impossible_upload_is_refused_before_anything_is_written(run, server, flags):
    assert flags[0] in refused(run, *flags)
    (run / "model.safetensors").unlink()
    assert "model.safetensors" in refused(run, *PUSH)
    assert not (run / "README.md").exists() and not server.mock_calls


@pytest.mark.parametrize(("offline", "hint"), [(False, "hf auth login"), (True, "HF_HUB_OFFLINE")])
def test_upload_without_a_token_or_offline_exits_with_1(run, monkeypatch, offline, hint):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub.utils._headers, "get_token", lambda: "hf_fake" if offline else None)
    done = call("llm_jepa.model_card", run, *PUSH)
    assert done.code == 1 and hint in done.err and "--push_to_hub me/run" in done.err
