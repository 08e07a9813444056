"""What the pairs of a micro-batch are contrasted with: the pairs of all ranks, and a queue of earlier ones."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate.utils import pad_across_processes
from safetensors.torch import load_file, save_file
from torch.distributed.nn.functional import all_gather

from llm_jepa.losses import Others, find_equal

FILE = "queue.safetensors"  # in a checkpoint


def gather_pairs(views: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(views of all ranks, their ids, where this rank's begin): (2, P, D) and (2, P) → (2, A, D) and (2, A).

    Ranks may have different P. Gradients of the gathered views flow back to the rank that they come from.
    """
    count = views.shape[1]
    counts = [int(n) for n in all_gather(torch.tensor([count], device=views.device))]
    padded_views, padded_ids = (pad_across_processes(x, dim=1) for x in (views.contiguous(), ids.contiguous()))
    views = torch.cat([x[:, :n] for x, n in zip(all_gather(padded_views), counts, strict=True)], dim=1)
    ids = torch.cat([x[:, :n] for x, n in zip(all_gather(padded_ids), counts, strict=True)], dim=1)
    return views, ids, sum(counts[: torch.distributed.get_rank()])


class Contrast:
    """Finds what pairs are contrasted with, and keeps the queue of --negatives_queue, which is equal on all ranks."""

    def __init__(self, queue_size: int):
        self.queue_size = queue_size
        self.queue: dict[str, torch.Tensor] = {}  # views (2, Q, D) and ids (2, Q), newest first

    def __call__(self, views: torch.Tensor, ids: torch.Tensor, *, keep: bool) -> Others:
        """The others of a micro-batch's views (2, P, D) with view_ids (2, P); `keep`: add these pairs to the queue."""
        first, count = 0, views.shape[1]
        own_ids = ids
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            views, ids, first = gather_pairs(views, ids)
        now = {"views": views.detach(), "ids": ids}
        queued = 0
        if self.queue:
            queued = self.queue["ids"].shape[1]
            views = torch.cat([views, self.queue["views"].to(views)], dim=1)
            ids = torch.cat([ids, self.queue["ids"].to(ids.device)], dim=1)
        if keep and self.queue_size:
            joined = {k: torch.cat([now[k], self.queue[k].to(now[k])], 1) if self.queue else now[k] for k in now}
            self.queue = {name: tensor[:, : self.queue_size] for name, tensor in joined.items()}
        place = first + torch.arange(count, device=views.device)
        return Others(views, place, find_equal(own_ids, ids), queued)

    def save(self, folder: Path) -> None:
        """Writes the queue to a file in the checkpoint."""
        if self.queue:
            save_file({name: tensor.contiguous() for name, tensor in self.queue.items()}, folder / FILE)

    def load(self, folder: Path) -> None:
        """Reads the queue from a file in the checkpoint."""
        self.queue = load_file(folder / FILE) if (folder / FILE).is_file() else {}
