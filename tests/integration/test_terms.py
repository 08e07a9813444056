"""The auxiliary losses in training: their gradients by hand, their weights, their projectors, and their figures."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import PartialState
from conftest import JEPA, MODEL, column, make_model, metrics, same_weights, start, train, weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import finetune
from llm_jepa import projectors
from llm_jepa.data.batching import MicroBatches
from llm_jepa.layouts import LAYOUTS
from llm_jepa.losses import jepa_loss, nitp_loss, sigreg_loss, stp_loss
from llm_jepa.training.diagnostics import gradient_statistics

NITP = ("--regular", "--nitp")
SIGREG = (*JEPA, "--sigreg", 0.3)
# One step of SGD with rate 1: the parameters show the gradient.
SGD = ("--gamma", 0, "--optim", "sgd", "--learning_rate", 1, "--lr_scheduler_type", "constant", "--max_grad_norm", 0,
       "--max_steps", 1, "--save_strategy", "steps", "--save_steps", 1, "--keep_checkpoints")  # fmt: skip


def prepared(data: Path, layout: str = "packed", **flags: object) -> finetune.Parts:
    """A run's parts before training."""
    options = {"train_file": str(data), "model_name": str(MODEL), "lm_labels": "answer", "layout": layout,
               "batch_size": 8, "max_steps": 1}  # fmt: skip
    return finetune.prepare(finetune.Settings(**options | flags), PartialState(cpu=True))


# ------------------------------------------------------------------------------------------------ gradients by hand


class Read:
    """What each loss reads of the first eight examples, from the model's own forward pass of each segment."""

    def __init__(self, parts: finetune.Parts):
        self.model, self.projectors = parts.model, getattr(parts.model, "projectors", {})
        self.items = parts.train_set[0, range(8)]

    def states(self, segment: object) -> list[torch.Tensor]:
        """The hidden states (T, D) of a segment at each layer."""
        return [h[0] for h in self.model(torch.tensor(segment.ids)[None], output_hidden_states=True).hidden_states]

    def views(self) -> torch.Tensor:
        """(2, P, D)"""
        pairs = [item[1:] for item in self.items if len(item) == 3]
        return torch.stack([torch.stack([self.states(s)[-1][s.view] for s in pair]) for pair in pairs], dim=1)

    def project(self, name: str, x: torch.Tensor) -> torch.Tensor:
        p = self.projectors[name]
        return (F.silu(x @ p.gate.weight.T) * (x @ p.up.weight.T)) @ p.down.weight.T


def jepa(name: str = "cosine", **options: object) -> Callable[[Read], torch.Tensor]:
    return lambda r: jepa_loss(r.views(), name, **options)[0] / 8


def sigreg(r: Read) -> torch.Tensor:
    """With --sigreg 0.3."""
    points = r.project("sigreg", r.views())
    drawn = torch.randn(points.shape[2], 256, generator=torch.Generator().manual_seed(0))  # of step 0
    return (0.7 * jepa_loss(points, "cosine")[0] + 0.3 * sigreg_loss(points, F.normalize(drawn, dim=0))[0]) / 8


def stp(r: Read, variant: str = "geodesic") -> torch.Tensor:
    """With --stp_layer 1."""
    paths = [r.states(item[0])[1][item[0].path.T] for item in r.items]  # (3, S, D) each
    total, count = stp_loss(torch.cat(paths, dim=1), variant)
    return total / count


def nitp(r: Read, layer: int = 0) -> torch.Tensor:
    states = [r.states(item[0]) for item in r.items]
    predicted = torch.cat([r.project("nitp", h[-1][:-1]) for h in states])
    total, count = nitp_loss(predicted, torch.cat([h[layer][1:] for h in states]))
    return total / count


# The flags of each loss, and its mean over the step (unit/test_losses.py has the formulas of the losses themselves).
# Losses that contrast pairs need the step in one micro-batch.
PAIRS = {"predictors": 1, "lbd": 3, "jepa_ratio": 0.5, "batch_size": 2, "grad_accum": 4}
ONE_BATCH = PAIRS | {"batch_size": 8, "grad_accum": 1}
CHATS = {"regular": True, "batch_size": 2, "grad_accum": 4}
BY_HAND = {
    "cosine": (PAIRS, jepa()),
    "stop-text": (PAIRS | {"stop_gradient": "text"}, jepa(stop_gradient=0)),
    "stop-code": (PAIRS | {"stop_gradient": "code"}, jepa(stop_gradient=1)),
    "stop-text-reverse": (PAIRS | {"stop_gradient": "text", "reverse_pred": True}, jepa(stop_gradient=1)),
    "stop-code-reverse": (PAIRS | {"stop_gradient": "code", "reverse_pred": True}, jepa(stop_gradient=0)),
    "infonce": (ONE_BATCH | {"jepa_loss": "infonce"}, jepa("infonce")),
    "clip": (ONE_BATCH | {"jepa_loss": "clip"}, jepa("clip")),
    "vicreg": (ONE_BATCH | {"jepa_loss": "vicreg"}, jepa("vicreg")),
    "center": (ONE_BATCH | {"center": True}, jepa(center=True)),
    "sigreg": (PAIRS | {"sigreg": 0.3}, sigreg),
    "stp": (CHATS | {"stp": "geodesic", "stp_layer": 1, "stp_spans": 2, "stp_lbd": 3}, stp),
    "stp-patch": (CHATS | {"stp": "patch", "stp_layer": 1, "stp_lbd": 3}, partial(stp, variant="patch")),
    "nitp": (CHATS | {"nitp": True, "nitp_lbd": 3}, nitp),
    "nitp-layer-1": (CHATS | {"nitp": True, "nitp_lbd": 3, "nitp_layer": 1}, lambda r: nitp(r, 1)),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_gradient_of_a_step_is_weight_times_that_of_the_mean_over_the_step(eight, tmp_path, name):
    flags, by_hand = BY_HAND[name]
    parts = prepared(eight, **flags)
    before = {n: p.detach().clone() for n, p in parts.model.named_parameters()}
    loss = 3 * by_hand(Read(parts))
    loss.backward()
    argv = [x for k, v in flags.items() for x in ([f"--{k}"] if v is True else [f"--{k}", v])]
    run = train(eight, tmp_path / "run", *argv, *SGD)
    after = weights(run)
    if hasattr(parts.model, "projectors"):
        projected = weights(run / "checkpoint-1", projectors.FILE)
        after |= {f"projectors.{n}": p for n, p in projected.items()}
    assert column(run, "loss") == [pytest.approx(loss.item(), rel=1e-5)]
    assert len(after) == len(before)
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in parts.model.named_parameters()}
    scale = torch.cat([g.flatten() for g in gradients.values()]).norm()
    assert scale > 1e-2
    for n, gradient in gradients.items():
        torch.testing.assert_close(before[n] - after[n], gradient, rtol=1e-3, atol=1e-5 * float(scale), msg=n)


RATE, LBD = 1e-2, 2.0
# SGD at a constant rate: the parameters show the gradients.
REFERENCE = ("--reference_grad_scale", "--lbd", LBD, "--batch_size", 2, "--grad_accum", 5, "--num_epochs", 1, "--optim",
             "sgd", "--learning_rate", RATE, "--lr_scheduler_type", "constant", "--max_grad_norm", 0)  # fmt: skip


def sums_of_means(data: Path, lm_labels: str) -> tuple[dict[str, torch.Tensor], list[float], list[float]]:
    """(parameters, gradient norm of each step, loss of each step) for the sum of the micro-batches' mean losses."""
    parts, norms, totals = prepared(data, lbd=LBD, lm_labels=lm_labels), [], []
    model, items = parts.model.train(), parts.train_set.items
    micro_batches = [part for _, part in MicroBatches(items.lengths, 42, True, batch_size=2)]
    for step in (micro_batches[:5], micro_batches[5:10], micro_batches[10:]):
        totals.append(0.0)
        for part in step:
            batch = parts.collator([items[i] for i in part])
            states = parts.selector.read(model, batch)
            loss = F.cross_entropy(states.logits.float(), batch["label_ids"])
            loss = loss + LBD * (1 - F.cosine_similarity(*states.views)).mean()
            loss.backward()
            totals[-1] += loss.item()
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item())
        with torch.no_grad():
            for p in model.parameters():
                p -= RATE * p.grad if p.grad is not None else 0
        model.zero_grad()
    return model.state_dict(), norms, totals


@pytest.mark.parametrize("lm_labels", ["answer", "reference"])
def test_reference_grad_scale_sums_the_means_of_the_micro_batches(data, tmp_path, lm_labels):
    """Two steps of five micro-batches and one of two."""
    run = train(data, tmp_path / "run", *REFERENCE, "--lm_labels", lm_labels)
    expected, norms, totals = sums_of_means(data, lm_labels)
    for name, value in weights(run).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    assert column(run, "loss") == pytest.approx(totals, rel=1e-4)
    assert column(run, "grad_norm") == pytest.approx(norms, rel=1e-3)


# ------------------------------------------------------------------------------------------------------- invariance


def test_projector_changes_no_other_random_draw(trained):
    flags = ("--regular", "--max_steps", 3, "--lora", "--lora_dropout", 0.3)
    same_weights(trained(*flags), trained(*flags, "--nitp", "--nitp_lbd", 1e-30))  # too small to change a gradient


ARMS = {
    "vicreg": {"jepa_loss": "vicreg", "center": True, "predictors": 2},
    "sigreg-nitp": {"sigreg": 0.3, "nitp": True, "predictors": 1},
    "dropout-stp": {"stp": "patch", "predictors": 1, "jepa_ratio": 0.5},
    "stp-layer-1": {"stp": "geodesic", "stp_layer": 1},
    "shuffled-nitp-layer-1": {"shuffle_pairs": True, "jepa_loss": "infonce", "nitp": True, "nitp_layer": 1},
}


@pytest.mark.parametrize("text_view", ["alone", "in_chat"])
@pytest.mark.parametrize("arm", ARMS)
def test_layouts_agree(eight, arm, text_view):
    flags = ARMS[arm] | {"lbd": 1.0, "text_view": text_view}
    found = {}
    for layout in LAYOUTS:
        parts = prepared(eight, layout, **flags)
        batch = parts.collator(parts.train_set[0, range(8)])
        loss, _, sums, _ = parts.objective(batch, 1.0)
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in parts.model.parameters() if p.grad is not None])
        found[layout] = (batch["counts"].tolist(), [x.item() for x in sums.values()], gradient)
    counts, sums, gradient = found.pop("separate")
    for other_counts, other_sums, other in found.values():
        assert other_counts == counts and other_sums == pytest.approx(sums, rel=1e-5)
        assert (other - gradient).abs().max() <= 1e-4 * gradient.norm()


@pytest.mark.parametrize("flags", [(*NITP, "--nitp_layer", 1), SIGREG], ids=["nitp", "sigreg"])
def test_gradient_checkpointing_and_measuring_change_nothing(trained, flags):
    flags = (*flags, "--max_steps", 3)
    run = trained(*flags, "--gradient_stats", 0)
    same_weights(run, measured := trained(*flags, "--gradient_stats", 1))
    name = "nitp" if "--nitp" in flags else "jepa"
    assert not column(run, f"{name}_grad_ratio") and len(column(measured, f"{name}_grad_ratio")) == 3
    assert all(-1 <= x <= 1 for x in column(measured, f"{name}_grad_cosine"))
    checkpointed = trained(*flags, "--gradient_checkpointing", "--gradient_stats", 1)
    same_weights(run, checkpointed, rtol=1e-5, atol=1e-6)
    ratios = column(measured, f"{name}_grad_ratio")
    assert column(checkpointed, f"{name}_grad_ratio") == pytest.approx(ratios, rel=1e-3)


def test_gradients_are_compared_only_where_both_losses_have_one(trained):
    """If the step has no pair, in a later step."""
    few = ("--jepa_ratio", 0.3, "--batch_size", 1, "--grad_accum", 4, "--max_steps", 14)
    for every in (1, 5):
        run, due, expected = trained(*JEPA, *few, "--gradient_stats", every), False, []
        for line in metrics(run):
            due |= (line["step"] - 1) % every == 0
            if due and line["pairs"]:
                due = False
                expected.append(line["step"])
        measured = {line["step"]: line["jepa_grad_ratio"] for line in metrics(run, "jepa_grad_ratio")}
        assert [*measured] == expected and min(measured.values()) > 0 and 0 in column(run, "pairs")
        assert any((step - 1) % every for step in expected) == (every > 1)
    assert not column(trained(*JEPA, "--gamma", 0, "--max_steps", 1), "jepa_grad_ratio")


def test_gradient_figures_are_those_of_the_first_micro_batch(eight, tmp_path):
    """Without a projector in the norm: it has no gradient of the language-model loss."""
    flags = {"predictors": 1, "lbd": 3.0, "nitp": True}
    run = train(eight, tmp_path / "run", "--predictors", 1, "--lbd", 3, "--nitp", "--batch_size", 8, "--grad_accum", 1,
                "--max_steps", 1)  # fmt: skip
    parts = prepared(eight, **flags)
    batch = parts.collator(parts.train_set[0, range(8)])
    lm_sum, states = parts.selector.lm_sum(parts.model, batch)
    parameters = [p for n, p in parts.model.named_parameters() if "projectors" not in n]

    want = gradient_statistics({
        "lm": lm_sum / batch["counts"][0],
        "jepa": 3 * jepa_loss(states.views, "cosine")[0] / 8,
        "nitp": 0.8 * nitp_loss(states.predicted, states.target)[0] / batch["counts"][3],
    }, parameters)  # fmt: skip
    assert {name: metrics(run)[0][name] for name in want} == pytest.approx(want, rel=1e-3, abs=1e-3)


def test_logged_loss_is_the_formula_under_a_warmup(trained):
    flags = (*JEPA, "--gamma", 0.5, "--lbd", 2, "--stp", "geodesic", "--stp_lbd", 3, "--max_steps", 4)
    run = trained(*flags, "--stp_warmup", 0.75, "--stp_min_lbd", 1)
    assert column(run, "stp_lbd") == pytest.approx([1 + 2 / 3, 1 + 4 / 3, 3, 3])
    for m in metrics(run):
        total = 0.5 * m["lm_loss"] + 2 * m["jepa_loss"] + m["stp_lbd"] * m["stp_loss"]
        assert m["loss"] == pytest.approx(total, rel=1e-5)
        assert m["jepa_loss"] == pytest.approx(1 - m["cosine"], abs=1e-5)


def test_stp_adds_no_forward_pass_and_no_token(trained):
    flags = (*JEPA, "--track_flop", "--max_steps", 2)
    without, run = trained(*flags), trained(*flags, "--stp", "patch", "--stp_spans", 5, "--stp_layer", 1)
    assert column(run, "spans") == [40] * 2
    for key in ("tokens", "flops"):
        assert column(run, key) == column(without, key) and len(column(run, key)) == 2


SAVED = ("--max_steps", 6, "--save_strategy", "steps", "--save_steps", 2, "--save_total_limit", 9, "--keep_checkpoints")


@pytest.mark.parametrize("lora", [(), ("--lora", "--merge")], ids=["full", "lora"])
def test_saved_models_have_no_projector(trained, lora):
    run = trained(*SIGREG, "--nitp", *lora, *SAVED)
    folders = [run / "merged"] if lora else [run, run / "checkpoint-6"]
    for folder in folders:
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()) and not hasattr(model, "projectors")
    saved = [f for f in run.rglob("*.safetensors") if f.name not in (projectors.FILE, "queue.safetensors")]
    assert len(saved) >= 3
    for file in saved:
        assert not any("projector" in name or ".gate." in name for name in load_file(file)), file
    assert (run / "checkpoint-6" / projectors.FILE).is_file() and not (run / projectors.FILE).exists()
    assert "projectors" not in "".join(f.read_text() for f in run.rglob("*.json") if "config" in f.name)


# -------------------------------------------------------------------------------------------------- targets and models


def targets(data: Path, **flags: object) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids of the next tokens (M,) and their targets (M, D)."""
    parts = prepared(data, regular=True, nitp=True, **flags)
    batch = parts.collator(parts.train_set[0, range(8)])
    row, at = batch["next_at"]
    return batch["input_ids"][row, at + 1], parts.selector.read(parts.model, batch).target


def test_targets_are_embeddings_and_the_controls_what_they_say(eight):
    ids, states = targets(eight)
    embeddings = prepared(eight, regular=True).model.get_input_embeddings().weight
    assert states.equal(embeddings[ids].detach())
    _, shuffled = targets(eight, nitp_targets="shuffled")
    assert sorted(map(tuple, shuffled.tolist())) == sorted(map(tuple, states.tolist()))
    same = (shuffled == states).all(dim=1)
    assert same.float().mean() < 0.3, "equal tokens only"
    _, fixed = targets(eight, nitp_targets="random")
    assert fixed.equal(targets(eight, nitp_targets="random", finetune_seed=7)[1])
    by_id = {i: fixed[ids == i] for i in set(ids.tolist())}
    assert all(x.eq(x[0]).all() for x in by_id.values())
    different = torch.stack([x[0] for x in by_id.values()])
    cosines = F.cosine_similarity(different[:, None], different[None], dim=-1)
    assert (cosines - torch.eye(len(different))).abs().mean() < 0.3, "of independent directions"
    assert F.cosine_similarity(fixed, states, dim=-1).mean().abs() < 0.2


def test_next_tokens_are_those_of_the_chat_before_its_predictors(eight):
    parts = prepared(eight, nitp=True, predictors=2, text_view="in_chat")
    items = parts.train_set[0, range(8)]
    batch = parts.collator(items)
    row, at = batch["next_at"]
    expected = [int(i) for item in items for i in item[0].without_view.ids[1:]]
    assert batch["counts"][3] == len(expected) and batch["input_ids"][row, at + 1].tolist() == expected


def test_model_whose_inner_states_have_another_size_is_refused_in_one_line(data, tmp_path):
    opt = partial(make_model, kind="opt", tokenizer="llama3", vocab_size=531, hidden_size=32, num_hidden_layers=2,
                  num_attention_heads=4, ffn_dim=48)  # fmt: skip
    model = opt(tmp_path / "model", word_embed_proj_dim=16)
    done = start(data, tmp_path / "run", *NITP, model=model)
    assert done.code == 2 and "--nitp_layer 0" in done.err and done.err.count("\n") == 1, done.err
    assert not (tmp_path / "run").exists()
    train(data, tmp_path / "last", *NITP, "--nitp_layer", -1, "--max_steps", 1, model=model)
    train(data, tmp_path / "sigreg", *SIGREG, "--max_steps", 1, model=model)
    train(data, tmp_path / "same", *NITP, "--max_steps", 1, model=opt(tmp_path / "other", word_embed_proj_dim=32))
