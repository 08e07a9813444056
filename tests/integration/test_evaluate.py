"""evaluate.py: batched answers are those of one prompt at a time; results are continued, kept apart and never lost."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, MODELS, ROOT, call, message_row, weights, write_rows
from safetensors.torch import save_file

import evaluate
import finetune
from llm_jepa.cli import UsageError
from llm_jepa.data import segments
from llm_jepa.data.examples import Example, Problems, read_examples
from llm_jepa.evaluation import generation
from llm_jepa.model import check_name
from llm_jepa.scoring.tasks import TASKS, Task, pure

STEPS = 16
USERS = [
    "strings with a vowel",
    "x",
    "any character or a vowel, 6 times or more, " * 6,
    "words that hold a number",
    "naïve café — 你好 🙂",
    "strings that start with the word 'cat'",
    "  spaces around  ",
    "a",
    "two\nlines",
    "lines with [0-9]+ and (a|b)*",
    "strings with at least 2 of the word 'blue'",
]


def examples_of(users: list[str]) -> list[Example]:
    return [Example("Write.", user, "a", f"rows:{i}", i) for i, user in enumerate(users, start=1)]


EXAMPLES = examples_of(USERS)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def load(folder: Path):
    return evaluate.load(str(folder), evaluate.Settings(dtype="float32"))


def prompt_ids(folder: Path, example: Example) -> list[int]:
    model, renderer = load(folder)
    return renderer.tokenizer(renderer.prompt(example), add_special_tokens=False)["input_ids"]


@cache
@torch.no_grad()
def slow_answer(folder: Path, example: Example, steps: int) -> tuple[list[int], str]:
    """(tokens, stop reason) by the plainest way there is: one prompt, no cache, the likeliest token each time."""
    model, renderer = load(folder)
    ids = prompt_ids(folder, example)
    begin = len(ids)
    for _ in range(steps):
        token = int(model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0, -1].argmax())
        if token == segments.end_of_turn(renderer):
            return ids[begin:], "stop"
        ids = [*ids, token]
    return ids[begin:], "length"


def special_tokens(folder: Path) -> dict[int, str]:
    return {i: t.content for i, t in load(folder)[1].tokenizer.added_tokens_decoder.items() if t.special}


def text_of(folder: Path, tokens: list[int]) -> str:
    return load(folder)[1].tokenizer.decode([t for t in tokens if t not in special_tokens(folder)])


def slow_generation(folder: Path, example: Example, steps: int = STEPS) -> generation.Generation:
    tokens, reason = slow_answer(folder, example, steps)
    return generation.Generation(text_of(folder, tokens), reason)


def generated(
    folder: Path, examples: list[Example], batch_size: int, steps: int = STEPS
) -> list[generation.Generation]:
    answers = {e.id: g for batch in generation.generate(*load(folder), examples, batch_size, steps) for e, g in batch}
    return [answers[e.id] for e in examples]


def often_said(folder: Path) -> int:
    """The token that comes nearest to being in half of a model's answers."""
    said = [set(slow_answer(folder, e, STEPS)[0]) for e in EXAMPLES]
    counts = {t: sum(t in s for s in said) for t in set.union(*said)}
    return min(counts, key=lambda t: (abs(2 * counts[t] - len(said)), t))


def copy_model(source: Path, target: Path, config: dict | None = None, generation: dict | None = None) -> Path:
    """A copy of a model folder with changed configurations."""
    shutil.copytree(source, target)
    for name, changes in (("config.json", config), ("generation_config.json", generation)):
        if changes:
            (target / name).write_text(json.dumps(json.loads((target / name).read_text()) | changes))
    return target


def change_head(folder: Path, row: int, source: int, factor: float) -> None:
    """Makes a saved model say token `row` where it would have said `source`."""
    from safetensors.torch import save_file

    tensors = weights(folder)
    tensors["lm_head.weight"][row] = factor * tensors["lm_head.weight"][source]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def stopping(tmp_path_factory):
    """Golden models (by name) that end their turn wherever the original would say the token `often_said`."""
    folders = {}
    for name in MODELS:
        golden = GOLDEN / "models" / name
        folders[name] = copy_model(golden, tmp_path_factory.mktemp("models") / name)
        change_head(folders[name], segments.end_of_turn(load(golden)[1]), often_said(golden), 1.02)
    return folders


@pytest.fixture(scope="module")
def model(stopping) -> Path:
    return stopping["llama3"]


@pytest.fixture(scope="module")
def data(tmp_path_factory, model) -> Path:
    """Rows whose answer is what the model says, or what it begins with, or something else, in turn."""
    rows = []
    for i, example in enumerate(EXAMPLES):
        said = slow_generation(model, example).text.strip()
        answer = [said or "?", said[:2].strip() or "?", "something else"][i % 3]
        rows.append(message_row(example.user, answer, example.system))
    return write_rows(tmp_path_factory.mktemp("data") / "synth_test.jsonl", rows)


def score(model: object, data: object, output: object, *flags: object):
    """evaluate.py with a model, three rows a batch."""
    return call("evaluate", "--model_name", model, "--input_file", data, "--output_file", output, "--max_new_tokens",
                STEPS, "--batch_size", 3, "--dtype", "float32", *flags)  # fmt: skip


def score_by_tokens(model: object, data: object, output: object, tokens: int):
    """The same by a token budget."""
    return call("evaluate", "--model_name", model, "--input_file", data, "--output_file", output, "--max_new_tokens",
                STEPS, "--tokens_per_batch", tokens, "--dtype", "float32")  # fmt: skip


def score_file(predictions: object, data: object, *flags: object):
    return call("evaluate", "--score_only", predictions, "--input_file", data, *flags)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().decode().split("\n") if line]


def metrics_of(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def predictions(path: Path, data: Path, ids: list[int] | None = None) -> Path:
    """A file of the right answers to a data file's rows."""
    rows = [{"id": e.id, "prediction": e.assistant} for e in read_examples(str(data), Problems())]
    return write_rows(path, [r for r in rows if ids is None or r["id"] in ids])


# ------------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("batch_size", [1, 2, 4, len(USERS), 64])
@pytest.mark.parametrize("name", MODELS)
def test_a_batch_gives_what_one_prompt_at_a_time_gives(name, batch_size, stopping):
    want = [slow_generation(stopping[name], e) for e in EXAMPLES]
    assert generated(stopping[name], EXAMPLES, batch_size) == want
    assert {g.stop_reason for g in want} == {"stop", "length"}
    assert len({g.text for g in want}) > len(want) / 2


@pytest.mark.parametrize("name", MODELS)
def test_neighbours_in_a_batch_do_not_change_an_answer(name, stopping):
    one, other = EXAMPLES[0], examples_of(["y " * 200, "z"])
    want = slow_generation(stopping[name], one)
    for batch in ([one, *other], [other[0], one], [one, one], [one]):
        prompts = [prompt_ids(stopping[name], e) for e in batch]
        answers = generation.generate_batch(*load(stopping[name]), prompts, STEPS)
        assert answers[batch.index(one)] == want


@pytest.mark.parametrize("name", MODELS)
def test_an_answer_ends_at_the_end_of_turn_token_and_holds_no_special_token(name, stopping):
    """Up to there it is what the model says whose end-of-turn token was left alone."""
    golden, stop_at = GOLDEN / "models" / name, often_said(GOLDEN / "models" / name)
    cut = 0
    for example, got in zip(EXAMPLES, generated(stopping[name], EXAMPLES, 4), strict=True):
        assert not [t for t in special_tokens(golden).values() if t in got.text]
        whole = slow_answer(golden, example, STEPS)[0]
        if stop_at in whole and got.stop_reason == "stop":
            assert text_of(golden, whole[: whole.index(stop_at)]).startswith(got.text)
            cut += got.text == text_of(golden, whole[: whole.index(stop_at)])
    assert cut >= 3


def test_special_tokens_are_left_out_of_the_text():
    """The golden chatml model says predictor tokens and <bos> now and then."""
    folder = GOLDEN / "models" / "chatml"
    said = [e for e in EXAMPLES if special_tokens(folder).keys() & set(slow_answer(folder, e, STEPS)[0])]
    assert said
    assert generated(folder, said, 8) == [slow_generation(folder, e) for e in said]


@pytest.mark.parametrize("name", MODELS)
def test_the_stop_token_counts_within_max_new_tokens(name, stopping):
    folder = stopping[name]
    answers = {e: slow_answer(folder, e, STEPS) for e in EXAMPLES}
    example, tokens = next((e, tokens) for e, (tokens, reason) in answers.items() if reason == "stop" and tokens)
    text = slow_generation(folder, example).text
    assert generated(folder, [example], 1, len(tokens) + 1) == [generation.Generation(text, "stop")]
    assert generated(folder, [example], 1, len(tokens)) == [generation.Generation(text, "length")]


@pytest.mark.parametrize("name", MODELS)
def test_max_new_tokens_is_the_longest_answer(name):
    golden = GOLDEN / "models" / name
    prompts = [prompt_ids(golden, e) for e in EXAMPLES[:4]]
    rows = generation.next_tokens(*load(golden), prompts, 5)
    assert rows == [slow_answer(golden, e, 5)[0] for e in EXAMPLES[:4]]
    assert {len(r) for r in rows} == {5}


@pytest.mark.parametrize("max_new_tokens", [-1, 12, 1])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_an_answer_ends_with_the_context_whatever_its_neighbours(max_new_tokens, batch_size, tmp_path):
    examples = examples_of(["strings with a vowel", "?", "two\nlines", "any number"])
    golden = GOLDEN / "models" / "llama3"
    longest = max(len(prompt_ids(golden, e)) for e in examples)
    folder = copy_model(golden, tmp_path / "short", {"max_position_embeddings": longest + 4})
    want = []
    for example in examples:
        room = longest + 4 - len(prompt_ids(golden, example))
        steps = room if max_new_tokens == -1 else min(room, max_new_tokens)
        want.append(slow_generation(folder, example, steps))
    assert len({len(prompt_ids(golden, e)) for e in examples}) == len(examples)
    assert generated(folder, examples, batch_size, max_new_tokens) == want
    if max_new_tokens == -1:
        assert {g.stop_reason for g in want} == {"length"}


def test_max_new_tokens_minus_one_from_the_command_line_fills_the_context(tmp_path):
    folder = copy_model(GOLDEN / "models" / "llama3", tmp_path / "short", {"max_position_embeddings": 60})
    data = write_rows(tmp_path / "synth_test.jsonl", [message_row(u, "a") for u in ("x", "a longer one")])
    done = call("evaluate", "--model_name", folder, "--input_file", data, "--output_file", tmp_path / "p.jsonl",
                "--dtype", "float32", "--max_new_tokens", -1)  # fmt: skip
    assert done.code == 0, done.err
    for row, example in zip(lines(tmp_path / "p.jsonl"), read_examples(str(data), Problems()), strict=True):
        want = slow_generation(folder, example, 60 - len(prompt_ids(folder, example)))
        assert (row["prediction"], row["stop_reason"]) == (want.text, want.stop_reason)


@pytest.mark.parametrize(
    "generation",
    [
        {"repetition_penalty": 5.0},
        {"do_sample": True, "temperature": 5.0, "top_k": 50, "top_p": 0.9},
        {"num_beams": 3},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": list(range(100, 400))},
        {"min_new_tokens": STEPS, "max_length": 3, "max_new_tokens": 2},
        {"do_sample": True, "num_return_sequences": 2},
    ],
    ids=lambda g: next(iter(g)),
)
def test_generation_config_of_a_model_does_not_change_greedy_answers(generation, tmp_path, model):
    folder = copy_model(model, tmp_path / "odd", generation=generation)
    assert generated(folder, EXAMPLES[:4], 2) == [slow_generation(model, e) for e in EXAMPLES[:4]]


def test_generation_config_of_a_model_in_training_does_not_either(model):
    """finetune.py --eval_generate calls `generate` with a model that evaluate.py did not load."""
    ours, renderer = evaluate.load(str(model), evaluate.Settings(dtype="float32"))
    ours.generation_config.update(repetition_penalty=5.0, do_sample=True, temperature=5.0, num_beams=3)
    prompts = [prompt_ids(model, e) for e in EXAMPLES[:4]]
    assert generation.generate_batch(ours, renderer, prompts, STEPS) == [
        slow_generation(model, e) for e in EXAMPLES[:4]
    ]
    assert ours.generation_config.repetition_penalty == 5.0


def test_generation_ends_as_soon_as_every_answer_has(tmp_path, model):
    """The end-of-turn token is the template's, whatever tokenizer and generation configuration call the end."""
    folder = copy_model(model, tmp_path / "no_eos", generation={"eos_token_id": None})
    for file in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": "<|im_start|>"}))
    assert load(folder)[1].tokenizer.eos_token_id != segments.end_of_turn(load(folder)[1]) == 4
    answers = {e: slow_answer(folder, e, STEPS) for e in EXAMPLES}
    stopping = [e for e, (_, reason) in answers.items() if reason == "stop"]
    longest = max(len(answers[e][0]) for e in stopping)
    steps, (ours, renderer) = [], load(folder)
    hook = ours.register_forward_pre_hook(lambda *_: steps.append(1))
    generation.generate_batch(ours, renderer, [prompt_ids(folder, e) for e in stopping], 2 * STEPS)
    hook.remove()
    assert len(steps) == longest + 1


def test_a_stop_token_of_the_generation_config_stops_too(tmp_path):
    golden = GOLDEN / "models" / "llama3"
    stop_at = often_said(golden)
    folder = copy_model(golden, tmp_path / "stops", generation={"eos_token_id": [4, stop_at]})
    want = []
    for example in EXAMPLES:
        whole = slow_answer(golden, example, STEPS)[0]
        stops = stop_at in whole
        text = text_of(golden, whole[: whole.index(stop_at)] if stops else whole)
        want.append(generation.Generation(text, "stop" if stops else "length"))
    assert generated(folder, EXAMPLES, 4) == want
    assert {g.stop_reason for g in want} == {"stop", "length"}


PROMPTS = {
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe short.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nthe question<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "chatml": "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nthe question<|im_end|>\n"
    "<|im_start|>assistant\n",
    # Gemma's template refuses a system role.
    "google_gemma": "<bos><start_of_turn>user\nBe short.\n\nthe question<end_of_turn>\n<start_of_turn>model\n",
}


@pytest.mark.parametrize("name", MODELS)
def test_the_prompt_is_the_chat_up_to_the_answer_with_one_bos(name, tmp_path, monkeypatch):
    seen, true = [], generation.generate_batch

    def watch(model, renderer, prompts, *rest):
        seen.extend(renderer.tokenizer.decode(p) for p in prompts)
        return true(model, renderer, prompts, *rest)

    monkeypatch.setattr(generation, "generate_batch", watch)
    data = write_rows(tmp_path / "synth_test.jsonl", [message_row("the question", "secret", "Be short.")])
    done = score(GOLDEN / "models" / name, data, tmp_path / "p.jsonl")
    assert done.code == 0, done.err
    assert seen == [PROMPTS[name]]


@pytest.mark.parametrize("plain", [False, True])
def test_a_tokenizer_that_adds_bos_itself_adds_no_second_one(plain, tmp_path):
    folder, bos = copy_model(GOLDEN / "models" / "llama3", tmp_path / "adds_bos"), "<|begin_of_text|>"
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    single = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [0], "tokens": [bos]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    renderer = evaluate.load(str(folder), evaluate.Settings(plain=plain))[1]
    assert renderer.tokenizer("a").input_ids[0] == 0
    _, ids = generation.tokenise(load(folder)[0], renderer, EXAMPLES)
    assert [(i[0], i.count(0)) for i in ids] == [(0, 1)] * len(EXAMPLES)


def test_plain_prompts_have_no_chat_format(tmp_path, monkeypatch):
    seen = []

    def watch(model, renderer, prompts, *rest):
        seen.extend(renderer.tokenizer.decode(p) for p in prompts)
        return [generation.Generation("b", "stop")] * len(prompts)

    monkeypatch.setattr(generation, "generate_batch", watch)
    data = write_rows(tmp_path / "synth_test.jsonl", [message_row("the question", "secret", "Be short.")])
    assert score(GOLDEN / "models" / "llama3", data, tmp_path / "p.jsonl", "--plain").code == 0
    assert [s.removeprefix("<|begin_of_text|>") for s in seen] == ["the question<|perception|>"]


# ---------------------------------------------------------------------------------------------------------- results


def wilson_by_hand(hits: int, n: int) -> list[float]:
    z2, p = 1.959963984540054**2, hits / n
    centre, half = p + z2 / (2 * n), (z2 * (p * (1 - p) + z2 / (4 * n)) / n) ** 0.5
    return [max(0, (centre - half) / (1 + z2 / n)), min(1, (centre + half) / (1 + z2 / n))]


def test_predictions_and_metrics_say_the_same(model, data, tmp_path):
    done = score(model, data, tmp_path / "out" / "predictions.jsonl")
    assert done.code == 0, done.err
    examples, rows = read_examples(str(data), Problems()), lines(tmp_path / "out" / "predictions.jsonl")
    assert [row["id"] for row in rows] == list(range(1, len(USERS) + 1))
    for row, example in zip(rows, examples, strict=True):
        want = slow_generation(model, EXAMPLES[example.id - 1])
        said, answer = want.text.strip(), example.assistant.strip()
        own = {k: row.pop(k) for k in ("dfa_equal", "failure") if k in row}
        assert own["dfa_equal"] == (said == answer)  # the answers here are no regular expressions
        assert row == {"id": example.id, "prediction": want.text, "stop_reason": want.stop_reason,
                       "exact": said == answer, "startswith": said.startswith(answer)}  # fmt: skip
    metrics, n = metrics_of(tmp_path / "out"), len(rows)
    hits = {name: sum(row[name] for row in rows) for name in ("exact", "startswith")}
    hits["stop_rate"] = sum(row["stop_reason"] == "stop" for row in rows)
    assert 0 < hits["exact"] < hits["startswith"] < n and 0 < hits["stop_rate"] < n
    for name, count in hits.items():
        assert metrics[name] == count / n
        assert metrics["ci95"][name] == pytest.approx(wilson_by_hand(count, n))
    assert (metrics["task"], metrics["n"], metrics["score"]) == ("synth", n, "dfa_equal")
    assert metrics["dfa_equal"] == metrics["exact"]
    assert metrics["data_sha256"] == hashlib.sha256(data.read_bytes()).hexdigest()
    assert metrics["settings"]["max_new_tokens"] == STEPS and metrics["settings"]["model_name"] == str(model)
    assert metrics["versions"]["torch"] == torch.__version__
    # One table: a line for what it is, one of headings, one for each score with its interval.
    shown = [line.split() for line in done.out.splitlines()]
    assert shown[0] == ["synth,", "n", "=", str(n)]
    assert [words[0] for words in shown[2:6]] == ["dfa_equal", "exact", "startswith", "stop_rate"]
    for words in shown[3:6]:
        assert float(words[1]) == pytest.approx(100 * hits[words[0]] / n, abs=0.005)
        low, high = wilson_by_hand(hits[words[0]], n)
        assert words[2:] == [f"[{100 * low:.2f},", f"{100 * high:.2f}]"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["metrics.json", "predictions.jsonl"]


@pytest.mark.parametrize("flag", ["--startswith", "--statswith"])
def test_startswith_becomes_the_headline_score(flag, data, tmp_path):
    done = score_file(predictions(tmp_path / "p.jsonl", data), data, flag)
    assert done.code == 0, done.err
    assert metrics_of(tmp_path)["score"] == "startswith"
    assert [line.split()[0] for line in done.out.splitlines()[2:5]] == ["startswith", "dfa_equal", "exact"]


def test_a_tasks_own_score_is_the_headline_and_stands_beside_the_others(data, tmp_path, monkeypatch):
    score = pure(lambda p, example: {"same_length": len(p) == len(example.assistant)})
    monkeypatch.setitem(TASKS, "lengths", Task(("same_length",), score))
    rows = [{"id": i, "prediction": "something elsf", "stop_reason": "stop"} for i in range(1, len(USERS) + 1)]
    done = score_file(write_rows(tmp_path / "p.jsonl", rows), data, "--task", "lengths")
    assert done.code == 0, done.err
    metrics, scored = metrics_of(tmp_path), lines(tmp_path / "p.scored.jsonl")
    assert (metrics["task"], metrics["score"], metrics["exact"]) == ("lengths", "same_length", 0)
    assert 0 < metrics["same_length"] == sum(row["same_length"] for row in scored) / len(scored) < 1
    assert metrics["ci95"]["same_length"] == pytest.approx(
        wilson_by_hand(sum(r["same_length"] for r in scored), len(rows))
    )
    assert [line.split()[0] for line in done.out.splitlines()[2:]] == [
        "same_length",
        "exact",
        "startswith",
        "stop_rate",
    ]


def test_max_examples_takes_the_first_rows(data, tmp_path):
    assert score_file(predictions(tmp_path / "p.jsonl", data, [1, 2, 3]), data, "--max_examples", 3).code == 0
    assert metrics_of(tmp_path)["n"] == 3


def test_skipped_bad_examples_are_counted_and_the_others_scored(data, tmp_path):
    bad = tmp_path / "synth_test.jsonl"
    bad.write_bytes(b"{\n" + data.read_bytes() + b"[]\n")
    given = write_rows(tmp_path / "p.jsonl", [{"id": i, "prediction": "x"} for i in range(2, len(USERS) + 2)])
    refused = score_file(given, bad)
    assert refused.code == 2 and f"{bad}:1: not JSON" in refused.err
    done = score_file(given, bad, "--skip_bad_examples")
    assert done.code == 0, done.err
    assert "skipped 2 bad examples" in done.err and f"{bad}:1" in done.err and f"{bad}:{len(USERS) + 2}" in done.err
    assert metrics_of(tmp_path)["n"] == len(USERS)


# ------------------------------------------------------------------------------------------------------- score only


def test_score_only_gives_the_scores_of_the_evaluation_that_made_the_predictions(model, data, tmp_path):
    assert score(model, data, tmp_path / "a" / "predictions.jsonl").code == 0
    done = score_file(tmp_path / "a" / "predictions.jsonl", data, "--output_file", tmp_path / "b" / "predictions.jsonl")
    assert done.code == 0, done.err
    first, second = metrics_of(tmp_path / "a"), metrics_of(tmp_path / "b")
    for name in ("task", "n", "score", "exact", "startswith", "stop_rate", "ci95", "data_sha256", "versions"):
        assert first[name] == second[name]
    assert lines(tmp_path / "a" / "predictions.jsonl") == lines(tmp_path / "b" / "predictions.jsonl")


@pytest.mark.parametrize("form", ["LF", "CRLF", "BOM", "shuffled", "escaped"])
def test_score_only_reads_predictions_of_any_form(form, data, tmp_path):
    rows = [{"prediction": e.assistant, "id": e.id} for e in read_examples(str(data), Problems())]
    rows = rows[::-1] if form == "shuffled" else rows
    text = "".join(json.dumps(row, ensure_ascii=form == "escaped") + "\n" for row in rows).encode()
    text = {"CRLF": text.replace(b"\n", b"\r\n"), "BOM": b"\xef\xbb\xbf" + text}.get(form, text)
    (tmp_path / "p.jsonl").write_bytes(text)
    done = score_file(tmp_path / "p.jsonl", data)
    assert done.code == 0, done.err
    assert metrics_of(tmp_path)["exact"] == 1
    assert (tmp_path / "p.jsonl").read_bytes() == text


def test_without_a_stop_reason_in_every_row_there_is_no_stop_rate(data, tmp_path):
    given = predictions(tmp_path / "p.jsonl", data)
    rows = lines(given)
    assert score_file(given, data).code == 0
    assert metrics_of(tmp_path)["stop_rate"] is None and "stop_rate" not in metrics_of(tmp_path)["ci95"]
    for row in rows[1:]:
        row["stop_reason"] = "stop"
    given = write_rows(tmp_path / "q.jsonl", rows)
    assert score_file(given, data, "--output_file", tmp_path / "q" / "p.jsonl").code == 0
    assert metrics_of(tmp_path / "q")["stop_rate"] is None
    rows[0]["stop_reason"] = "length"
    given = write_rows(tmp_path / "r.jsonl", rows)
    assert score_file(given, data, "--output_file", tmp_path / "r" / "p.jsonl").code == 0
    assert metrics_of(tmp_path / "r")["stop_rate"] == (len(rows) - 1) / len(rows)


def edit(rows: list[dict], how: str) -> list[dict] | bytes:
    if how == "missing":
        return [*rows[:2], *rows[3:]]
    if how == "unknown":
        return [*rows, {"id": 99, "prediction": "x"}]
    if how == "zero-based":
        return [row | {"id": row["id"] - 1} for row in rows]
    if how == "twice":
        return [*rows, rows[2]]
    third = {
        "no id": {"prediction": "x"},
        "id a string": {"id": "3", "prediction": "x"},
        "id true": {"id": True, "prediction": "x"},
        "no prediction": {"id": 3},
        "prediction null": {"id": 3, "prediction": None},
        "prediction a list": {"id": 3, "prediction": ["x"]},
        "half a surrogate pair": {"id": 3, "prediction": "\ud800"},
        "a list": [3, "x"],
        "another stop reason": {"id": 3, "prediction": "x", "stop_reason": "eos"},
    }
    if how in third:
        return [*rows[:2], third[how], *rows[3:]]
    raw = {"not JSON": b'{"id": 3', "not UTF-8": b'{"id": 3, "prediction": "\xff"}', "nested": b"[" * 100_000}
    parts = [json.dumps(row).encode() for row in rows]
    return b"\n".join([*parts[:2], raw[how], *parts[3:]]) + b"\n"


WRONG_PREDICTIONS = {
    "missing": "has no prediction for 1 rows (ids 3)",
    "unknown": "has predictions for 1 rows (ids 99)",
    "zero-based": f"has no prediction for 1 rows (ids {len(USERS)})",
    "twice": f"p.jsonl:{len(USERS) + 1}: id 3 stands there a second time",
} | dict.fromkeys(
    ("no id", "id a string", "id true", "no prediction", "prediction null", "prediction a list", "a list",
     "half a surrogate pair", "another stop reason", "not JSON", "not UTF-8", "nested"),
    "p.jsonl:3: not a JSON object with",
)  # fmt: skip


@pytest.mark.parametrize("how", WRONG_PREDICTIONS)
def test_score_only_refuses_predictions_that_are_not_those_of_the_rows(how, data, tmp_path):
    given = predictions(tmp_path / "p.jsonl", data)
    changed = edit(lines(given), how)
    if isinstance(changed, bytes):
        given.write_bytes(changed)
    else:
        given.write_text("".join(json.dumps(row) + "\n" for row in changed))
    before = snapshot(tmp_path)
    done = score_file(given, data)
    assert done.code == 2 and WRONG_PREDICTIONS[how] in done.err and str(given) in done.err
    assert snapshot(tmp_path) == before


def test_score_only_of_a_missing_or_an_empty_file(data, tmp_path):
    done = score_file(tmp_path / "nowhere.jsonl", data)
    assert done.code == 2 and "nowhere.jsonl: cannot be read" in done.err
    (tmp_path / "empty.jsonl").touch()
    done = score_file(tmp_path / "empty.jsonl", data)
    assert done.code == 2 and f"empty.jsonl has no prediction for {len(USERS)} rows" in done.err
    assert [p.name for p in tmp_path.iterdir()] == ["empty.jsonl"]


def test_as_a_script_from_another_folder(data, tmp_path):
    predictions(tmp_path / "p.jsonl", data)
    shutil.copy(data, tmp_path / "synth_test.jsonl")
    command = [sys.executable, ROOT / "evaluate.py", "--score_only", "p.jsonl", "--input_file", "synth_test.jsonl"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"synth, n = {len(USERS)}\n")
    assert metrics_of(tmp_path)["exact"] == 1


# --------------------------------------------------------------------------------------------- continued, kept, refused


def interrupt_after(monkeypatch, batches: int) -> None:
    left, true = [batches], generation.generate_batch

    def stop(*args):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return true(*args)

    monkeypatch.setattr(generation, "generate_batch", stop)


def count_prompts(monkeypatch) -> list[int]:
    sizes, true = [], generation.generate_batch

    def count(model, renderer, prompts, *rest):
        sizes.append(len(prompts))
        return true(model, renderer, prompts, *rest)

    monkeypatch.setattr(generation, "generate_batch", count)
    return sizes


def interrupted(model, data, path, monkeypatch, batches: int = 2, *flags: object) -> None:
    """An evaluation that was interrupted after some batches of three rows."""
    with monkeypatch.context() as patch:
        interrupt_after(patch, batches)
        assert score(model, data, path, *flags).code == 130


@pytest.fixture(scope="module")
def uninterrupted(model, data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert score(model, data, folder / "p.jsonl").code == 0
    return folder


@pytest.mark.parametrize("batches", [0, 1, 3])
def test_an_interrupted_evaluation_goes_on(batches, model, data, uninterrupted, tmp_path, monkeypatch):
    interrupted(model, data, tmp_path / "p.jsonl", monkeypatch, batches)
    partial = lines(tmp_path / "p.jsonl")
    assert len(partial) == 3 * batches and not (tmp_path / "metrics.json").exists()
    sizes = count_prompts(monkeypatch)
    done = score(model, data, tmp_path / "p.jsonl")
    assert done.code == 0, done.err
    assert sum(sizes) == len(USERS) - len(partial)
    assert (tmp_path / "p.jsonl").read_bytes() == (uninterrupted / "p.jsonl").read_bytes()
    assert metrics_of(tmp_path)["ci95"] == metrics_of(uninterrupted)["ci95"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.json", "p.jsonl"]


@pytest.mark.parametrize("tokens", [1, 150, 100_000])
def test_a_token_budget_changes_no_answer_and_no_score(tokens, model, data, uninterrupted, tmp_path, monkeypatch):
    sizes = count_prompts(monkeypatch)
    done = score_by_tokens(model, data, tmp_path / "p.jsonl", tokens)
    assert done.code == 0, done.err
    assert (tmp_path / "p.jsonl").read_bytes() == (uninterrupted / "p.jsonl").read_bytes()
    assert metrics_of(tmp_path)["ci95"] == metrics_of(uninterrupted)["ci95"]
    assert metrics_of(tmp_path)["settings"]["tokens_per_batch"] == tokens
    if tokens == 150:  # more of the short prompts than of the long ones
        assert 1 < sizes[-2] and sizes[0] == 1 < len(sizes) < len(USERS)
    else:
        assert sizes == ([1] * len(USERS) if tokens == 1 else [len(USERS)])


def test_an_interrupted_evaluation_by_tokens_goes_on_with_the_same_batches(
    model, data, uninterrupted, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        whole = count_prompts(patch)
        assert score_by_tokens(model, data, tmp_path / "whole" / "p.jsonl", 150).code == 0
    path = tmp_path / "parts" / "p.jsonl"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        assert score_by_tokens(model, data, path, 150).code == 130
    refused = score(model, data, path)
    changed = "--batch_size 64, now 3, --tokens_per_batch 150, now 0"
    assert refused.code == 2 and f"was made otherwise ({changed})" in refused.err
    sizes = count_prompts(monkeypatch)
    assert score_by_tokens(model, data, path, 150).code == 0
    assert sizes == whole[2:]
    assert path.read_bytes() == (uninterrupted / "p.jsonl").read_bytes()


@pytest.mark.parametrize("cut", ["in a line", "in a character", "before the newline", "behind a line"])
def test_a_line_cut_short_is_answered_again_and_whole_ones_are_kept(
    cut, model, data, uninterrupted, tmp_path, monkeypatch
):
    path = tmp_path / "p.jsonl"
    interrupted(model, data, path, monkeypatch, 2)
    rows = path.read_bytes().split(b"\n")
    whole, fifth = b"\n".join(rows[:4]) + b"\n", rows[4].replace(b'"prediction": "', '"prediction": "ü'.encode())
    place = {"in a line": 9, "in a character": fifth.index("ü".encode()) + 1, "before the newline": len(fifth)}
    path.write_bytes(whole + fifth[: place.get(cut, 0)])
    kept = 5 if cut == "before the newline" else 4
    sizes = count_prompts(monkeypatch)
    done = score(model, data, path)
    assert done.code == 0, done.err
    assert sum(sizes) == len(USERS) - 3  # the second batch is computed again, as it was
    want, got = lines(uninterrupted / "p.jsonl"), lines(path)
    if kept == 4:
        assert got == want
    else:
        assert [(a["id"], b["prediction"]) for a, b in zip(want, got, strict=True) if a != b] == [
            (json.loads(fifth)["id"], json.loads(fifth)["prediction"])
        ]


def test_rows_that_other_processes_left_are_taken_up_and_cut_ones_answered_again(
    model, data, uninterrupted, tmp_path, monkeypatch
):
    path = tmp_path / "p[1].jsonl"  # no pattern
    interrupted(model, data, path, monkeypatch, 3)
    rows = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(rows[:3]))
    path.with_name(path.name + ".rank1").write_bytes(b"".join(rows[2:6]))  # one row stands in both
    path.with_name(path.name + ".rank12").write_bytes(b"".join(rows[6:])[:-9])
    sizes = count_prompts(monkeypatch)
    done = score(model, data, path)
    assert done.code == 0, done.err
    assert sum(sizes) == len(USERS) - 6  # batches of three, wholly there or not
    assert path.read_bytes() == (uninterrupted / "p.jsonl").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.json", path.name]


@pytest.mark.parametrize("how", ["another evaluation's", "damaged"])
def test_rows_of_other_processes_are_as_safe_as_those_of_the_main_one(how, model, data, tmp_path, monkeypatch):
    path = tmp_path / "p.jsonl"
    interrupted(model, data, path, monkeypatch, 2)
    left = path.rename(path.with_name("p.jsonl.rank1"))
    if how == "damaged":
        left.write_bytes(left.read_bytes().replace(b"{", b"", 1))
    before = snapshot(tmp_path)
    flags = ("--max_new_tokens", STEPS + 1) if how != "damaged" else ()
    done = score(model, data, path, *flags)
    assert done.code == 2 and ("was made otherwise" if flags else f"{left}:1: not a JSON object") in done.err
    assert snapshot(tmp_path) == before
    done = score(model, data, path, *flags, "--overwrite")
    assert done.code == 0 and sorted(p.name for p in tmp_path.iterdir()) == ["metrics.json", "p.jsonl"], done.err


def test_rows_that_never_came_are_an_error_and_not_left_out_of_the_scores(model, data, tmp_path, monkeypatch):
    """As where processes on several machines do not write to the same folder."""
    monkeypatch.setattr(evaluate, "generate", lambda *a, **k: generation.generate(*a, **k | {"share": (0, 2)}))
    done = score(model, data, tmp_path / "p.jsonl")
    assert done.code == 2 and "lacks rows of other processes" in done.err
    assert not (tmp_path / "metrics.json").exists() and len(lines(tmp_path / "p.jsonl")) == 6


def test_an_evaluation_may_be_cut_short_again_and_again(model, data, uninterrupted, tmp_path, monkeypatch):
    path = tmp_path / "p.jsonl"
    for batches in (1, 1, 2):
        interrupted(model, data, path, monkeypatch, batches)
        path.write_bytes(path.read_bytes()[:-9])
    assert len(path.read_bytes().split(b"\n")) > 4
    assert score(model, data, path).code == 0
    assert snapshot(tmp_path)["p.jsonl"] == (uninterrupted / "p.jsonl").read_bytes()


def test_finished_rows_stand_as_they_were_written(model, data, tmp_path, monkeypatch):
    interrupted(model, data, tmp_path / "p.jsonl", monkeypatch, 1)
    mine = [row | {"prediction": "as it was"} for row in lines(tmp_path / "p.jsonl")]
    write_rows(tmp_path / "p.jsonl", mine)
    assert score(model, data, tmp_path / "p.jsonl").code == 0
    assert [row for row in lines(tmp_path / "p.jsonl") if row["prediction"] == "as it was"] == sorted(
        mine, key=lambda row: row["id"]
    )


def test_a_line_damaged_in_the_middle_is_an_error(model, data, tmp_path, monkeypatch):
    path = tmp_path / "p.jsonl"
    interrupted(model, data, path, monkeypatch, 1)
    path.write_bytes(path.read_bytes().replace(b"{", b"", 1))
    before = snapshot(tmp_path)
    done = score(model, data, path)
    assert done.code == 2 and f"{path}:1" in done.err
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "change", ["max_new_tokens", "max_examples", "plain", "task", "data", "weights", "no settings"]
)
def test_an_evaluation_is_not_continued_with_anything_changed(change, model, data, tmp_path, monkeypatch):
    folder, rows = copy_model(model, tmp_path / "model"), tmp_path / "synth_test.jsonl"
    shutil.copy(data, rows)
    interrupted(folder, rows, tmp_path / "out" / "p.jsonl", monkeypatch)
    flags = {"max_new_tokens": ("--max_new_tokens", STEPS + 1), "max_examples": ("--max_examples", 9),
             "plain": ("--plain",), "task": ("--task", "text")}.get(change, ())  # fmt: skip
    if change == "data":
        rows.write_bytes(rows.read_bytes().replace(b"cat", b"dog"))
    elif change == "weights":
        change_head(folder, 100, 101, 1.0)
    elif change == "no settings":
        (tmp_path / "out" / "p.jsonl.settings.json").unlink()
    before = snapshot(tmp_path / "out")
    done = score(folder, rows, tmp_path / "out" / "p.jsonl", *flags)
    assert done.code == 2 and "was made otherwise" in done.err
    assert snapshot(tmp_path / "out") == before
    done = score(folder, rows, tmp_path / "out" / "p.jsonl", *flags, "--overwrite")
    assert done.code == 0, done.err
    n = 9 if change == "max_examples" else len(USERS)
    assert metrics_of(tmp_path / "out")["n"] == len(lines(tmp_path / "out" / "p.jsonl")) == n


def test_a_finished_evaluation_is_refused_unless_it_is_to_be_overwritten(model, data, tmp_path, monkeypatch):
    path = tmp_path / "p.jsonl"
    assert score(model, data, path, "--max_examples", 2).code == 0
    before = snapshot(tmp_path)
    sizes = count_prompts(monkeypatch)
    for flags in ((), ("--max_examples", 2)):
        done = score(model, data, path, *flags)
        assert done.code == 2 and "--overwrite" in done.err
        assert snapshot(tmp_path) == before and not sizes
    assert score(model, data, path, "--overwrite").code == 0
    assert len(lines(path)) == metrics_of(tmp_path)["n"] == len(USERS)


def test_metrics_without_their_predictions_are_kept_until_overwritten(data, tmp_path):
    given = predictions(tmp_path / "given.jsonl", data)
    assert score_file(given, data, "--output_file", tmp_path / "p.jsonl").code == 0
    (tmp_path / "p.jsonl").unlink()
    before = snapshot(tmp_path)
    assert score_file(given, data, "--output_file", tmp_path / "p.jsonl").code == 2
    assert snapshot(tmp_path) == before
    assert score_file(given, data, "--output_file", tmp_path / "p.jsonl", "--overwrite").code == 0


def test_two_output_files_in_one_folder_leave_each_others_metrics_alone(model, data, tmp_path, monkeypatch):
    interrupted(model, data, tmp_path / "a.jsonl", monkeypatch)
    assert score(model, data, tmp_path / "b.jsonl", "--max_examples", 4).code == 0
    before = snapshot(tmp_path)
    for name in ("a.jsonl", "c.jsonl"):
        for flags in ((), ("--overwrite",)):
            done = score(model, data, tmp_path / name, *flags)
            assert done.code == 2 and "metrics.json belongs to b.jsonl" in done.err
            assert snapshot(tmp_path) == before
    assert score(model, data, tmp_path / "b.jsonl", "--overwrite").code == 0
    assert metrics_of(tmp_path)["n"] == len(USERS)
    assert (tmp_path / "a.jsonl").read_bytes() == before["a.jsonl"]


def test_metrics_that_came_meanwhile_are_not_replaced(model, data, tmp_path, monkeypatch):
    true = generation.generate_batch

    def meanwhile(*args):
        (tmp_path / "metrics.json").write_text('{"settings": {"output_file": "other.jsonl"}}')
        return true(*args)

    with monkeypatch.context() as patch:
        patch.setattr(generation, "generate_batch", meanwhile)
        done = score(model, data, tmp_path / "p.jsonl")
    assert done.code == 2 and "written meanwhile" in done.err
    assert metrics_of(tmp_path) == {"settings": {"output_file": "other.jsonl"}}
    (tmp_path / "metrics.json").unlink()
    sizes = count_prompts(monkeypatch)
    assert score(model, data, tmp_path / "p.jsonl").code == 0
    assert not sizes and metrics_of(tmp_path)["n"] == len(USERS)


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "content, place",
    [
        (b"", "no examples"),
        (b"\n\n", "no examples"),
        (b"{\n", ":2: not JSON"),
        (b'{"messages": []}\n', ':2: no "messages" list'),
        (b'"\xff"\n', ":2: not UTF-8"),
        (json.dumps(message_row("x " * 1500, "b")).encode(), ":2: the prompt's"),
        (None, "cannot be read"),
    ],
    ids=["empty", "blank", "not JSON", "no messages", "not UTF-8", "too long", "missing"],
)
def test_bad_data_is_named_and_loses_nothing(content, place, model, data, tmp_path):
    rows = tmp_path / "synth_test.jsonl"
    if content is not None:
        rows.write_bytes(content if not content.strip() else data.read_bytes().split(b"\n")[0] + b"\n" + content)
    done = score(model, rows, tmp_path / "new" / "p.jsonl")
    assert done.code == 2 and str(rows) in done.err and place in done.err and not done.out
    assert not (tmp_path / "new").exists()
    given = predictions(tmp_path / "given.jsonl", data)
    assert score_file(given, data, "--output_file", tmp_path / "old" / "p.jsonl").code == 0
    before = snapshot(tmp_path)
    done = score(model, rows, tmp_path / "old" / "p.jsonl", "--overwrite")
    assert done.code == 2 and str(rows) in done.err and place in done.err
    assert snapshot(tmp_path) == before


def test_a_broken_model_is_one_line_and_loses_nothing(data, tmp_path):
    golden, out = GOLDEN / "models" / "llama3", tmp_path / "out" / "p.jsonl"
    assert score_file(predictions(tmp_path / "given.jsonl", data), data, "--output_file", out).code == 0
    before = snapshot(tmp_path / "out")
    cut, headless = copy_model(golden, tmp_path / "cut"), copy_model(golden, tmp_path / "headless")
    (cut / "model.safetensors").write_bytes((golden / "model.safetensors").read_bytes()[:50_000])
    from safetensors.torch import save_file

    save_file({k: v for k, v in weights(golden).items() if k != "lm_head.weight"}, headless / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    no_weights, no_tokenizer = (
        copy_model(golden, tmp_path / "no_weights"),
        copy_model(golden, tmp_path / "no_tokenizer"),
    )
    (no_weights / "model.safetensors").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (no_tokenizer / name).unlink()
    no_template = copy_model(golden, tmp_path / "no_template")
    (no_template / "chat_template.jinja").unlink()
    for folder, message in (
        (cut, "cannot be loaded"),
        (headless, "weights are missing (lm_head.weight"),
        (no_weights, "cannot be loaded"),
        (no_tokenizer, "tokenizer"),
        (no_template, "no chat template"),
        (tmp_path / "nowhere", "there is no such folder"),
    ):
        done = score(folder, data, out, "--overwrite")
        assert done.code == 2 and message in done.err and str(folder) in done.err
        assert all(line.startswith("evaluate.py: error: ") for line in done.err.splitlines())
        assert snapshot(tmp_path / "out") == before


def test_all_wrong_flags_are_named_at_once(data, tmp_path):
    done = call("evaluate", "--model_name", "m", "--score_only", "p", "--input_file", "rows.jsonl", "--batch_size", 0,
                "--max_new_tokens", 0, "--max_examples", -1, "--nosplit_data", "--process_split", "test", "--test_size",
                "1.5", "--task", "nothing", "--plain", "--split_tune_untune", "--dtype", "float32")  # fmt: skip
    assert done.code == 2
    for name in ("--model_name, --score_only and --score_gold", "--batch_size 0", "--max_new_tokens 0", "--dtype",
                 "--max_examples -1", "--nosplit_data", "--test_size 1.5", "--task nothing", "--plain",
                 "not with --score_only", "--split_tune_untune: only with --original_model_name"):  # fmt: skip
        assert name in done.err
    assert all(line.startswith("evaluate.py: error: ") for line in done.err.splitlines())
    done = call("evaluate", "--test_size", "0.5", "--split_seed", 3)
    assert done.code == 2
    for name in ("--input_file", "--model_name, --score_only and", "--test_size, --split_seed: only with"):
        assert name in done.err
    flags = ("--model_name", GOLDEN / "models" / "llama3", "--input_file", data)
    done = call("evaluate", *flags)
    assert done.code == 2 and "--output_file is missing" in done.err
    done = call("evaluate", *flags, "--batch_size", 64, "--tokens_per_batch", -1)
    assert done.code == 2 and "give one of --batch_size and --tokens_per_batch" in done.err
    assert "--tokens_per_batch -1 is negative" in done.err


def test_flags_of_a_single_process_are_refused_together_under_torchrun():
    flags = {"device_map": "auto", "score_only": "p", "score_gold": True, "similarity": True, "t_sne": True,
             "export_embeddings": "e"}  # fmt: skip
    settings = evaluate.Settings(input_file="synth_test.jsonl", **flags)
    message = ", ".join(f"--{name}" for name in flags)
    for processes in (1, 2):
        with pytest.raises(UsageError) as error:
            evaluate.check_settings(settings, set(flags), processes)
        assert (f"{message}: not under torchrun" in str(error.value)) == (processes == 2)


def test_abbreviated_and_unknown_flags_are_refused(data):
    for flag in ("--max_new", "--similarly"):
        assert call("evaluate", "--score_only", "p", "--input_file", data, flag, 3).code == 2


def test_a_file_that_is_read_is_not_written(data, tmp_path):
    rows = tmp_path / "synth_test.jsonl"
    shutil.copy(data, rows)
    given = predictions(tmp_path / "p.jsonl", rows)
    (tmp_path / "link.jsonl").symlink_to(rows)
    before = snapshot(tmp_path)
    for output in (rows, given, tmp_path / "link.jsonl", tmp_path / ".." / tmp_path.name / "p.jsonl"):
        done = score_file(given, rows, "--output_file", output, "--overwrite")
        assert done.code == 2 and "is also read" in done.err
    assert score_file(given, rows, "--output_file", tmp_path / "metrics.json").code == 2
    assert snapshot(tmp_path) == before


# ------------------------------------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize("name", ["synth", "synth_test", "synth_train", "synth_dev", "synth_val"])
def test_the_base_name_tells_the_task(name, data, tmp_path):
    rows = tmp_path / "somewhere" / "gsm8k" / f"{name}.jsonl"
    rows.parent.mkdir(parents=True)
    shutil.copy(data, rows)
    assert score_file(predictions(tmp_path / "p.jsonl", rows), rows).code == 0
    assert metrics_of(tmp_path)["task"] == "synth"


@pytest.mark.parametrize(
    "name",
    ["datasets/synth/rows.jsonl", "synthetic_test.jsonl", "my_synth.jsonl", "synth_test.2.jsonl", "SYNTH_test.jsonl"],
)
def test_a_name_that_is_not_a_tasks_needs_the_task(name, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = Path(name)
    rows.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(data, rows)
    given = predictions(tmp_path / "p.jsonl", rows)
    before = snapshot(tmp_path)
    done = score_file(given, rows)
    assert done.code == 2 and f"--task: {name} does not name its task" in done.err
    assert snapshot(tmp_path) == before
    assert score_file(given, rows, "--task", "text").code == 0
    assert metrics_of(tmp_path)["task"] == "text"


def test_a_numbers_task_is_never_scored_as_plain_text(tmp_path, monkeypatch):
    """`datasets/gsm8k_test.jsonl` has its own scores, not the exact match of a path that begins otherwise."""
    monkeypatch.chdir(tmp_path)
    Path("datasets").mkdir()
    write_rows(Path("datasets/gsm8k_test.jsonl"), [message_row("How many?", "2 × 500 = 1,000\n#### 1,000")])
    write_rows(Path("p.jsonl"), [{"id": 1, "prediction": "#### 1000.0"}])
    assert score_file("p.jsonl", "datasets/gsm8k_test.jsonl").code == 0
    metrics = metrics_of(tmp_path)
    assert (metrics["task"], metrics["score"], metrics["number"], metrics["exact"]) == ("gsm8k", "number", 1, 0)
    monkeypatch.delitem(TASKS, "gsm8k")
    done = score_file("p.jsonl", "datasets/gsm8k_test.jsonl", "--overwrite")
    assert done.code == 2 and "--task: datasets/gsm8k_test.jsonl does not name its task" in done.err


def test_the_flag_wins_over_the_name(data, tmp_path):
    assert score_file(predictions(tmp_path / "p.jsonl", data), data, "--task", "turk").code == 0
    assert metrics_of(tmp_path)["task"] == "turk"


# ------------------------------------------------------------------------------------------------------- run folders


def trained(folder: Path, *flags: object) -> Path:
    done = call("finetune", "--model_name", GOLDEN / "models" / "llama3", "--train_file", GOLDEN / "regex_rows.jsonl",
                "--regular", "--max_steps", 1, "--grad_accum", 1, "--learning_rate", 0.05, "--output_dir", folder,
                *flags)  # fmt: skip
    assert done.code == 0, done.err
    return folder


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("runs") / "plain", "--plain", "--save_strategy", "no")


def test_a_run_folder_is_asked_in_the_format_it_was_trained_in(plain_run, data):
    flags = ("--model_name", plain_run, "--input_file", data, "--max_examples", 2, "--max_new_tokens", 2)
    done = call("evaluate", *flags)
    assert done.code == 2 and f"{plain_run} was trained with --plain" in done.err
    assert not (plain_run / "eval").exists()
    done = call("evaluate", *flags, "--plain")
    assert done.code == 0, done.err
    assert metrics_of(plain_run / "eval" / "synth")["n"] == 2
    assert len(lines(plain_run / "eval" / "synth" / "predictions.jsonl")) == 2


@pytest.mark.parametrize("status", ["running", "interrupted", "failed"])
def test_an_unfinished_run_is_refused(status, plain_run, data, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(plain_run, folder, ignore=shutil.ignore_patterns("eval"))
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "finished"
    (folder / "run.json").write_text(json.dumps(record | {"status": status}))
    for name in ("config.json", "tokenizer_config.json"):  # saved at the end
        (folder / name).unlink()
    before = snapshot(folder)
    done = call("evaluate", "--model_name", folder, "--input_file", data, "--plain")
    assert done.code == 2 and f"{folder}: the run is {status}, not finished" in done.err
    assert snapshot(folder) == before


def test_a_run_in_the_chat_format_is_not_asked_plainly(plain_run, data, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(plain_run, folder, ignore=shutil.ignore_patterns("eval"))
    settings = json.loads((folder / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps(settings | {"plain": False}))
    done = call("evaluate", "--model_name", folder, "--input_file", data, "--plain")
    assert done.code == 2 and f"{folder} was trained without --plain" in done.err


def test_an_adapter_answers_as_the_model_it_is_merged_into(tmp_path):
    folder = trained(tmp_path / "run", "--lora", "--merge", "--save_strategy", "no")
    answers = generated(folder, EXAMPLES, 4)
    assert answers == generated(folder / "merged", EXAMPLES, 4)
    assert answers != generated(GOLDEN / "models" / "llama3", EXAMPLES, 4)


# -------------------------------------------------------------------------------------------------- splits and tables


@pytest.mark.parametrize("share, seed", [(0.2, 42), (0.5, 42), (0.2, 7)])
def test_process_split_is_the_split_of_finetune(share, seed, regex_rows):
    ours = {"input_file": str(regex_rows), "test_size": share, "split_seed": seed}
    theirs = finetune.Settings(data_file=str(regex_rows), eval_split=share, split_seed=seed)
    parts = [
        evaluate.load_rows(evaluate.Settings(process_split=part, **ours), Problems()) for part in ("train", "test")
    ]
    assert tuple(parts) == finetune.load_examples(theirs, Problems())
    assert len(parts[1]) == 120 * share


def test_process_split_defaults_are_those_of_finetune():
    ours, theirs = evaluate.Settings(), finetune.Settings()
    assert (ours.test_size, ours.split_seed) == (theirs.eval_split, theirs.split_seed)


def test_process_split_scores_the_rows_of_its_part_alone(regex_rows, tmp_path):
    held_out = finetune.load_examples(finetune.Settings(data_file=str(regex_rows)), Problems())[1]
    given = predictions(tmp_path / "p.jsonl", regex_rows, [e.id for e in held_out])
    flags = ("--task", "synth", "--process_split")
    assert score_file(given, regex_rows, *flags, "train").code == 2
    done = score_file(given, regex_rows, *flags, "test")
    assert done.code == 0, done.err
    assert (metrics_of(tmp_path)["n"], metrics_of(tmp_path)["exact"]) == (24, 1)


def test_split_tune_untune_scores_apart_what_the_untuned_model_got_right(model, data, tmp_path):
    golden = GOLDEN / "models" / "llama3"
    rows = lines(data)
    for i in (2, 5, 8):  # rows that the model got wrong: make the untuned one right
        rows[i]["messages"][2]["content"] = slow_generation(golden, EXAMPLES[i]).text
    data = write_rows(tmp_path / "synth_test.jsonl", rows)
    out = tmp_path / "out"
    done = score(model, data, out / "p.jsonl", "--split_tune_untune", "--original_model_name", golden)
    assert done.code == 0, done.err
    metrics, tuned, untuned = metrics_of(out), lines(out / "p.jsonl"), lines(out / "untuned" / "p.jsonl")
    assert [row["prediction"] for row in untuned] == [slow_generation(golden, e).text for e in EXAMPLES]
    assert [row["prediction"] for row in tuned] == [slow_generation(model, e).text for e in EXAMPLES]
    right = {row["id"] for row in untuned if row["exact"]}
    assert {3, 6, 9} <= right and len(right) < len(USERS)
    for part, ids in (("right", right), ("wrong", {row["id"] for row in untuned} - right)):
        got = metrics["by_untuned"][part]
        assert got["n"] == len(ids)
        assert got["exact"] == sum(row["exact"] for row in tuned if row["id"] in ids) / len(ids)
        assert f"rows the untuned model got {part}: synth, n = {len(ids)}\n" in done.out
    assert metrics["untuned"]["exact"] == len(right) / len(USERS)
    assert metrics["exact"] == sum(row["exact"] for row in tuned) / len(USERS)
    assert metrics["by_untuned"]["right"]["exact"] != metrics["by_untuned"]["wrong"]["exact"]
    assert sorted(snapshot(out)) == ["metrics.json", "p.jsonl", "untuned/p.jsonl"]


def test_split_tune_untune_goes_on_where_it_was_interrupted(model, data, tmp_path, monkeypatch):
    flags = ("--split_tune_untune", "--original_model_name", GOLDEN / "models" / "llama3")
    interrupted(model, data, tmp_path / "p.jsonl", monkeypatch, 5, *flags)  # four batches each
    assert len(lines(tmp_path / "untuned" / "p.jsonl")) == 3
    sizes = count_prompts(monkeypatch)
    assert score(model, data, tmp_path / "p.jsonl", *flags).code == 0
    assert sum(sizes) == len(USERS) - 3
    assert metrics_of(tmp_path)["untuned"]["n"] == len(USERS)


# ---------------------------------------------------------------------------------------------- the rows and the task


def spider_rows(path: Path, *pairs: tuple[str, str]) -> Path:
    rows = [message_row(f"For db_id:[{db_id}]\n\nWhich?", query, "Convert.") for db_id, query in pairs]
    return write_rows(path, rows)


def test_own_answers_are_scored_and_rows_of_another_task_are_refused(tmp_path):
    good = write_rows(tmp_path / "synth_test.jsonl", [message_row("a", "x&y"), message_row("b", ".*")])
    done = call("evaluate", "--score_gold", "--input_file", good)
    assert done.code == 0 and "dfa_equal          100.00" in done.out
    bad = write_rows(
        tmp_path / "turk_test.jsonl", [message_row("a", "x("), message_row("b", "))"), message_row("c", "[")]
    )
    done = call("evaluate", "--score_gold", "--input_file", bad, "--task", "gsm8k")
    assert done.code == 2 and "only 0.0 % of its own answers are right by number" in done.err


def test_an_unknown_database_costs_no_results(model, tmp_path):
    good = spider_rows(tmp_path / "spider_test.jsonl", ("town_library", "SELECT 1"))
    flags = ("--model_name", model, "--max_new_tokens", 2, "--output_file", tmp_path / "out" / "p.jsonl")
    assert call("evaluate", *flags, "--input_file", good).code == 0
    metrics = metrics_of(tmp_path / "out")
    assert len(metrics["databases_sha256"]) == 64 and "git_commit" in metrics
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    spider_rows(good, ("town_library", "SELECT 1"), ("nowhere", "SELECT 1"))
    done = call("evaluate", *flags, "--input_file", good, "--overwrite")
    assert done.code == 2 and "spider_test.jsonl:2: db_id 'nowhere'" in done.err
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_a_finished_evaluation_is_refused_before_the_model_is_loaded(model, data, tmp_path, monkeypatch):
    assert score(model, data, tmp_path / "p.jsonl").code == 0
    monkeypatch.setattr(evaluate, "load", None)
    done = score(model, data, tmp_path / "p.jsonl")
    assert done.code == 2 and f"from a finished evaluation of {data}; give --output_file" in done.err


def test_a_model_that_is_not_there_is_said_to_be_that(model, data, tmp_path):
    for name, said in (("nowhere", "there is no such folder"), ("empty", "neither config.json nor a tokenizer")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        done = call("evaluate", "--model_name", tmp_path / name, "--input_file", data)
        assert done.code == 2 and f"{tmp_path / name}" in done.err and said in done.err
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "run.json").write_text("{}")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        done = call("evaluate", "--model_name", "runs/mien", "--input_file", data)
        other = call("evaluate", "--model_name", model, "--original_model_name", "./base", "--input_file", data)
        patch.chdir("runs")
        check_name("gpt2")  # beside runs too, a name of the hub
    assert done.code == 2 and "--model_name runs/mien: there is no such folder" in done.err
    assert other.code == 2 and "--original_model_name ./base: there is no such folder" in other.err


def test_choices_of_half_precision_are_compared_by_float32_logits(model, tmp_path, monkeypatch):
    data = write_rows(tmp_path / "hellaswag_test.jsonl", [message_row(user, "A") for user in USERS])

    def likelihoods(name: str) -> list[dict]:
        out = tmp_path / name / "p.jsonl"
        where = ("--model_name", model, "--input_file", data, "--output_file", out)
        done = call("evaluate", *where, "--dtype", "bfloat16")
        assert done.code == 0, done.err
        return [row["log_likelihoods"] for row in lines(out)]

    exact = likelihoods("exact")
    monkeypatch.setattr(generation, "float32_logits", lambda model: contextlib.nullcontext())
    rounded = likelihoods("rounded")
    assert all(a != b for a, b in zip(exact, rounded, strict=True))
    for a, b in zip(exact, rounded, strict=True):
        assert a == pytest.approx(b, abs=0.05)


def test_a_sandbox_that_does_not_start_is_an_error_and_no_wrong_answer(tmp_path, monkeypatch):
    rows = write_rows(tmp_path / "synth_test.jsonl", [message_row("a", "x|y")])
    predictions = tmp_path / "p.jsonl"
    predictions.write_text('{"id": 1, "prediction": "y|x"}\n')
    monkeypatch.setattr("sandbox.sys.executable", "/bin/false")
    done = call("evaluate", "--score_only", predictions, "--input_file", rows)
    assert done.code == 1 and "llm_jepa.scoring.regexes:dfa_equal does not start with /bin/false" in done.err
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--export_embeddings", "{}/e", "--output_file", "{}/o"], "--output_file: not with --export_embeddings alone"),
        (["--similarity", "--export_embeddings", "{}/o", "--output_file", "{}/o"], "--output_file is the same file"),
        (["--export_embeddings", "{}/rows.jsonl", "--overwrite"], "rows.jsonl is also read"),
    ],
)
def test_embeddings_go_to_no_file_that_is_another_s(flags, named, model, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [message_row("a", "b")])
    flags = [flag.format(tmp_path) for flag in flags]
    done = call("evaluate", "--model_name", model, "--input_file", rows, *flags)
    assert done.code == 2 and named in done.err and sorted(tmp_path.iterdir()) == [rows]


@pytest.mark.parametrize("kind", ["generate", "choose", "embed"])
def test_examples_that_do_not_fit_the_context_can_be_left_out(kind, model, tmp_path):
    folder = copy_model(model, tmp_path / "short", {"max_position_embeddings": 120})
    answers = {"generate": "a", "choose": "B", "embed": "a"}
    rows = [message_row("short?", answers[kind]), message_row("long " * 300, answers[kind])]
    data = write_rows(tmp_path / ("hellaswag_test.jsonl" if kind == "choose" else "synth_test.jsonl"), rows)
    flags = ["--model_name", folder, "--input_file", data, "--output_file", tmp_path / "out" / "p.jsonl"]
    flags += ["--similarity"] if kind == "embed" else ["--max_new_tokens", 2] if kind == "generate" else []
    done = call("evaluate", *flags)
    assert done.code == 2 and f"{data.name}:2: " in done.err and not (tmp_path / "out").exists()
    done = call("evaluate", *flags, "--skip_bad_examples")
    assert done.code == 0 and f"skipped 1 bad examples: {data}:2: " in done.err
    written = tmp_path / "out" / ("p.jsonl" if kind == "embed" else "metrics.json")
    metrics = json.loads(written.read_text())
    assert (metrics["n"], metrics["skipped_examples"]) == (1, 1)


def test_likelihoods_that_are_not_finite_are_no_answer(model, tmp_path):
    folder = copy_model(model, tmp_path / "broken", {})
    tensors = weights(folder)
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    data = write_rows(tmp_path / "hellaswag_test.jsonl", [message_row("which?", "A")])
    done = call("evaluate", "--model_name", folder, "--input_file", data, "--output_file", tmp_path / "out" / "p.jsonl")
    assert done.code == 2 and f"{data}:1: the likelihoods of the choices are not finite" in done.err
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_text_is_no_name_of_a_task_unless_it_is_asked_for(model, tmp_path):
    data = write_rows(tmp_path / "text_test.jsonl", [message_row("a", "b")])
    flags = ("--model_name", model, "--input_file", data, "--output_file", tmp_path / "p.jsonl", "--max_new_tokens", 1)
    done = call("evaluate", *flags)
    assert done.code == 2 and "does not name its task" in done.err
    assert call("evaluate", *flags, "--task", "text").code == 0


def test_a_file_that_was_split_for_training_is_not_scored_whole_unasked(tmp_path):
    data = write_rows(tmp_path / "synth_all.jsonl", [message_row(f"q{i}", f"a{i}") for i in range(10)])
    base = ("--model_name", GOLDEN / "models" / "llama3", "--output_dir", tmp_path / "run")
    assert call("finetune", *base, "--data_file", data, "--max_steps", 1, "--regular").code == 0
    flags = ("--model_name", tmp_path / "run", "--input_file", data, "--task", "synth", "--max_new_tokens", 1)
    done = call("evaluate", *flags)
    assert done.code == 2 and "was trained on a part of" in done.err and "--process_split test" in done.err
    for extra, n in (("--process_split", "test"), 2), (("--nosplit_data",), 10):
        done = call("evaluate", *flags, *extra, "--overwrite")
        assert done.code == 0 and metrics_of(tmp_path / "run" / "eval" / "synth_all")["n"] == n, done.err
