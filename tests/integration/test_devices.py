"""A training step on other devices: on tensors without values, and on a GPU compared with the CPU in float32.

The tests marked gpu also run on the CPU with REHEARSE=1, to try them out (benchmarks/gpu.sh).
"""

import importlib.util
import os
import weakref
from dataclasses import replace

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import send_to_device
from conftest import JEPA, ROOT, column, interrupted, message_row, train, write_rows
from templates import LLAMA_1B, LLAMA_8B
from test_terms import ARMS, prepared
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import finetune
from llm_jepa.files import read_json
from llm_jepa.large import memory
from llm_jepa.large.settings import LargeSettings
from llm_jepa.layouts import LAYOUTS

REHEARSE = bool(os.environ.get("REHEARSE"))
DEVICE = torch.device("cpu" if REHEARSE else "cuda")
STEPS = {
    "regular": {},
    "cosine": {"predictors": 2},
    "clip": {"predictors": 2, "jepa_loss": "clip"},
    **{name: flags for name, flags in ARMS.items() if "jepa_ratio" not in flags},
}
PLACES = [*((layout, "alone") for layout in LAYOUTS), ("packed", "in_chat")]
in_each_layout = pytest.mark.parametrize(("layout", "text_view"), PLACES, ids=map("-".join, PLACES))
for_each_term = pytest.mark.parametrize("arm", STEPS)


def on_gpu(test):
    """A test that needs a GPU."""
    missing = not (REHEARSE or torch.cuda.is_available())
    return pytest.mark.gpu(pytest.mark.skipif(missing, reason="needs a GPU")(test))


def step_of(eight, arm: str, text_view: str, layout: str, **flags: object) -> tuple[finetune.Parts, dict]:
    parts = prepared(eight, layout, **STEPS[arm], **flags, lbd=1.0, text_view=text_view)
    parts.model.train()
    return parts, parts.collator(parts.train_set[0, range(8)])


# ---------------------------------------------------------------------------------------------- without values

needs_cuda_build = pytest.mark.skipif(torch.version.cuda is None, reason="torch has no GPU support")


def remove_values(model: torch.nn.Module, device: str) -> torch.nn.Module:
    """Replaces all parameters and buffers by fake tensors, inside FakeTensorMode."""
    made = {}
    for module in model.modules():
        for name, p in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            fake = torch.empty(p.shape, dtype=p.dtype, device=device)
            made.setdefault(p, torch.nn.Parameter(fake, p.requires_grad) if isinstance(p, torch.nn.Parameter) else fake)
            setattr(module, name, made[p])  # once if tied
    return model


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda_build)])
@in_each_layout
@for_each_term
def test_step_reads_no_value_and_stays_on_its_device(eight, arm, layout, text_view, device):
    """Fake tensors have shapes and a device, but no values: a read would make the host wait for the GPU."""
    parts, batch = step_of(eight, arm, text_view, layout)
    with FakeTensorMode() as mode:
        remove_values(parts.model, device)
        loss = parts.objective(tree_map_only(torch.Tensor, lambda x: mode.from_tensor(x).to(device), batch), 1.0)[0]
        loss.backward()
    assert loss.shape == () and loss.device.type == device
    for name, p in parts.model.named_parameters():
        assert p.grad is not None and (p.grad.shape, p.grad.device.type) == (p.shape, device), name


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that exist, and the most that existed at once."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.counted = 0, 0, set()

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.counted:
            self.counted.add(storage._cdata)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.drop, storage._cdata, storage.nbytes())

    def drop(self, key: int, size: int) -> None:
        self.counted.remove(key)
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.add, out)
        return out


@pytest.mark.parametrize(
    ("shape", "flags"),
    [(LLAMA_1B, {}), (LLAMA_8B, {"param_dtype": "bfloat16"}), (LLAMA_8B, {"lora": True, "lora_rank": 64})],
    ids=["1b", "8b-bfloat16", "8b-lora"],
)
def test_memory_plan_is_that_of_a_step_without_values(tmp_path, shape, flags):
    """A micro-batch with gradient checkpointing, when gradients and moments of an earlier one exist."""
    AutoTokenizer.from_pretrained(ROOT / "models" / "tiny").save_pretrained(tmp_path)
    LlamaConfig(**shape, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    data = write_rows(tmp_path / "rows.jsonl", [message_row("a number " * 9, "(.*) " * 12) for _ in range(20)])
    s = LargeSettings(
        train_file=str(data), model_name=str(tmp_path), predictors=1, lbd=1.0, layout="packed", tokens_per_row=4096,
        lm_labels="all", optim="adamw_torch_fused", lora_dropout=0.0, **flags,
    )  # fmt: skip
    mode, width = FakeTensorMode(), torch.bfloat16 if flags else torch.float32

    def load(s: LargeSettings, tokenizer: object, device: torch.device) -> torch.nn.Module:
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(s.model_name), dtype=width)
            base.new_rows = []  # the vocabulary is larger than the tokenizer's
            model = finetune.adapted(base, s, tokenizer)
        with mode:
            return remove_values(model, "cpu")

    parts = finetune.prepare(s, PartialState(cpu=True), load)
    parts.selector.slices = True
    parts.model.activation_checkpointing_enable()
    parts.model.enable_input_require_grads()
    batch = parts.collator(parts.train_set.items)
    with mode, LiveBytes() as counter:
        batch = tree_map_only(torch.Tensor, mode.from_tensor, batch)
        for p in parts.model.train().parameters():
            counter.add(p)
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        moments = [torch.zeros_like(p.grad) for p in parts.model.parameters() if p.requires_grad for _ in range(2)]
        with torch.autocast("cpu", torch.bfloat16, enabled="param_dtype" not in flags):
            loss = parts.objective(batch, s.gamma)[0]
        loss.backward()
    s = replace(s, tokens_per_batch=batch["input_ids"].numel())
    (plan,) = memory.plan(s, [1])["on"]
    del moments  # kept until here, as by an optimizer
    assert sum(plan[name] for name in memory.PARTS) == pytest.approx(counter.peak, rel=0.05)


# --------------------------------------------------------------------------------------------------- on a GPU


def loss_and_gradient(parts: finetune.Parts, batch: dict, device: torch.device, bf16: bool = False) -> tuple:
    """The loss () and the gradient of all parameters (P,), on the CPU."""
    parts.model.to(device).zero_grad()
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        loss = parts.objective(send_to_device(batch, device), 1.0)[0]
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten().cpu() for p in parts.model.parameters() if p.grad is not None])


@on_gpu
@in_each_layout
@for_each_term
def test_gpu_gives_the_loss_and_gradient_of_the_cpu(eight, arm, layout, text_view):
    parts, batch = step_of(eight, arm, text_view, layout)
    loss, gradient = loss_and_gradient(parts, batch, torch.device("cpu"))
    other_loss, other = loss_and_gradient(parts, batch, DEVICE)
    assert other_loss == pytest.approx(loss, rel=1e-4)
    assert (other - gradient).norm() <= 1e-3 * gradient.norm()


@on_gpu
@pytest.mark.parametrize("kernel", ["sdpa", "flex_attention", "flash_attention_2"])
def test_kernels_in_bfloat16_are_close_to_the_cpu_in_float32(eight, kernel):
    if kernel != "sdpa" and REHEARSE:
        pytest.skip("needs a GPU")
    if kernel == "flash_attention_2" and not importlib.util.find_spec("flash_attn"):
        pytest.skip("flash-attn, a package for GPUs, is not installed")
    parts, batch = step_of(eight, "cosine", "alone", "packed")
    loss, gradient = loss_and_gradient(parts, batch, torch.device("cpu"))
    parts, batch = step_of(eight, "cosine", "alone", "packed", attn_implementation=kernel)
    other_loss, other = loss_and_gradient(parts, batch, DEVICE, bf16=True)
    assert other_loss == pytest.approx(loss, rel=0.02)
    assert (other - gradient).norm() <= 0.1 * gradient.norm()


@on_gpu
def test_run_on_a_gpu_learns_resumes_and_compiles(eight, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)  # other tests of this process have chosen the CPU
    flags = (*JEPA, "--num_epochs", 8, "--save_strategy", "steps", "--save_steps", 4, "--keep_checkpoints",
             "--save_total_limit", 9)  # fmt: skip
    run = train(eight, tmp_path / "run", *flags)
    assert REHEARSE or "peak_memory_bytes" in read_json(run / "run.json"), "it ran on the CPU"
    assert column(run, "lm_loss")[-1] < column(run, "lm_loss")[0]
    cut = interrupted(run, 4, tmp_path / "cut")
    train(eight, cut, *flags, "--resume")
    assert column(cut, "loss") == pytest.approx(column(run, "loss"), rel=1e-3)
    if not REHEARSE:
        compiled = train(eight, tmp_path / "compiled", *flags, "--torch_compile")
        assert column(compiled, "loss") == pytest.approx(column(run, "loss"), rel=0.02)
