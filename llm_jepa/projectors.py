"""The projectors of --nitp and --sigreg: parts of the model while it trains, but not of the model that is saved."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

FILE = "projectors.safetensors"  # in a checkpoint


class Projector(torch.nn.Module):
    """A SwiGLU block D → 4D → D: down(silu(gate(x)) · up(x)), without biases."""

    def __init__(self, size: int):
        super().__init__()
        self.gate, self.up = (torch.nn.Linear(size, 4 * size, bias=False) for _ in range(2))
        self.down = torch.nn.Linear(4 * size, size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, D) → (…, D)."""
        x = x.to(self.gate.weight.dtype)  # trained parameters are float32 even if frozen ones are not
        return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


def add_projectors(model: Any, names: list[str], seed: int) -> None:
    """Adds projectors for the last hidden states as `model.projectors`, on the model's device and in its precision.

    They are drawn from a generator of their own, so that everything else is drawn as without them.
    """
    if not names:
        return
    weight = model.get_output_embeddings().weight  # (V, D)
    trained = next((p.dtype for p in model.parameters() if p.requires_grad), weight.dtype)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        projectors = torch.nn.ModuleDict({name: Projector(weight.shape[1]) for name in names})
    model.projectors = projectors.to(weight.device, trained)


@contextlib.contextmanager
def without_projectors(model: Any) -> Iterator[None]:
    """The model as it is saved."""
    projectors = model._modules.pop("projectors", None)
    try:
        yield
    finally:
        if projectors is not None:
            model.projectors = projectors


def save_projectors(model: Any, folder: Path) -> None:
    """Writes the projectors, if there are any, to a file in the checkpoint; shards are gathered on the main process."""
    if projectors := getattr(model, "projectors", None):
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        if gathered := get_model_state_dict(projectors, options=options):  # empty on other processes
            save_file(gathered, folder / FILE)


def load_projectors(model: Any, folder: Path) -> None:
    """Reads the projectors, if there are any, from a file in the checkpoint."""
    if projectors := getattr(model, "projectors", None):
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(projectors, load_file(folder / FILE), options=options)
