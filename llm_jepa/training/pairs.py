"""What the pairs of a micro-batch are contrasted with: the pairs of all ranks, and a queue of earlier ones."""

from pathlib import Path

import torch
from accelerate.utils import gather, pad_across_processes
from safetensors.torch import load_file, save_file

from llm_jepa.losses import ContrastSet, find_not_negatives

FILE = "queue.safetensors"  # in a checkpoint


def gather_pairs(views: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The pairs of all ranks in rank order: views (2, P, D) and view_ids (3, P) → the same with the sum of all P.

    Ranks may have different P. Only this rank's own views have a gradient.
    """
    counts = gather(torch.tensor([views.shape[1]], device=views.device)).tolist()
    parts, all_ids = (
        [x[:, :n] for x, n in zip(gather(pad_across_processes(y, dim=1)).split(len(y)), counts, strict=True)]
        for y in (views.detach().contiguous(), ids)  # gathered: (2 · ranks, …) and (3 · ranks, …)
    )
    parts[torch.distributed.get_rank()] = views
    return torch.cat(parts, dim=1), torch.cat(all_ids, dim=1)


class Contrast:
    """Makes the ContrastSet of a micro-batch, and keeps the queue of --negatives_queue, which is equal on all ranks."""

    def __init__(self, queue_size: int):
        self.queue_size = queue_size
        self.queue: dict[str, torch.Tensor] = {}  # views (2, Q, D) and ids (3, Q), newest first

    def __call__(self, views: torch.Tensor, ids: torch.Tensor, *, training: bool) -> ContrastSet:
        """From views (2, P, D) and view_ids (3, P). `training`: also with the queue, to which these pairs are added."""
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            views, ids = gather_pairs(views, ids)
        own = ids
        if training and self.queue_size:
            if self.queue:
                views, ids = (torch.cat([x, self.queue[n].to(x)], dim=1) for n, x in (("views", views), ("ids", ids)))
            self.queue = {"views": views.detach()[:, : self.queue_size], "ids": ids[:, : self.queue_size]}
        return ContrastSet(views, find_not_negatives(own, ids))

    def save(self, folder: Path) -> None:
        """Writes the queue to a file in the checkpoint."""
        if self.queue:
            save_file({name: tensor.contiguous() for name, tensor in self.queue.items()}, folder / FILE)

    def load(self, folder: Path) -> None:
        """Reads the queue from a file in the checkpoint."""
        self.queue = load_file(folder / FILE) if (folder / FILE).is_file() else {}
