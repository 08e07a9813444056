"""The forward pass of a batch: logits at labels only, and the hidden states that the auxiliary losses read.

Letters in shape comments: R rows, T tokens in a row, D hidden size, V vocabulary, N label tokens, P pairs, S spans of K
points each, M tokens with a next token, U random directions.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from llm_jepa.cli import UsageError
from llm_jepa.layouts import attention_mask
from llm_jepa.losses import ContrastSet, lm_loss, shuffled
from llm_jepa.model import MAX_LOGITS, blocks_after


class States(NamedTuple):
    """What the losses read: outputs of a forward pass, and from `contrast_set` on what the Trainer adds to them."""

    logits: torch.Tensor  # (N, V), or in their place the cross-entropy of each label (N, 1) if logits are sliced
    views: torch.Tensor  # (2, P, D) last hidden states at the view tokens of the first and the second view
    path: torch.Tensor  # (K, S, D) hidden states at the spans' points
    predicted: torch.Tensor | None = None  # (M, D) with --nitp: the projection of each chat token's state
    target: torch.Tensor | None = None  # (M, D) with --nitp: the next token's state of a lower layer
    projected: torch.Tensor | None = None  # (2, P, D) with --sigreg: the projections of the views
    contrast_set: ContrastSet | None = None  # what the pairs are contrasted with
    rest_of_step: tuple[torch.Tensor, int] | None = None  # with --sigreg: moments of N other pairs, and N
    directions: torch.Tensor | None = None  # (D, U) with --sigreg


class InnerLayer:
    """The hidden states that a layer's block receives, kept by a pre-hook on it, so that no other layer's are kept."""

    def __init__(self, model: torch.nn.Module, layer: int, flag: str):
        """Raises UsageError if the model has no such layer; `flag` is the one that asks for it."""
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.name, self.where = type(base).__name__, f"--{flag} {layer}"
        self.ids: torch.Tensor | None = None  # (R, T) during a forward pass; a shape would be compiled as a constant
        self.states = self._block = None
        self.blocks = blocks_after(model, layer, flag)
        self.hooks = [block.register_forward_pre_hook(self._keep, with_kwargs=True) for block in self.blocks]

    def begin(self, ids: torch.Tensor | None) -> None:
        """Forgets the last pass. `ids`: input_ids (R, T) of the pass that begins, None outside of one."""
        self.ids, self.states, self._block = ids, None, None

    def read(self, last: torch.Tensor) -> torch.Tensor:
        """The states (R, T, D), on the device of the last layer's, which they are if no block receives them."""
        if self.blocks and self.states is None:
            raise UsageError(f"{self.where}: the layers of {self.name} are not found; leave it out")
        return last if self.states is None else self.states.to(last.device)  # a model may be on several devices

    def _keep(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.ids is None or (self._block is not None and self._block is not module):
            return
        hidden = args[0] if args else kwargs.get("hidden_states")
        shape = getattr(hidden, "shape", ())  # R, T, D
        if self._block is module or len(shape) != 3 or shape[:2] != self.ids.shape:
            raise UsageError(f"{self.where}: {self.name} has no single state of a token there")
        self._block, self.states = module, hidden


class LMHeadSelector:
    """Runs the model on a batch so that its output layer receives the hidden states of labels only.

    A forward pre-hook on the output layer selects them: everything before it runs as in any forward of the (wrapped)
    model. Outside of `read` and `lm_sum` the hook does nothing, so generation is not affected.

    Layer k is what the k-th block receives, 0 the embeddings, −1 what the output layer receives: the last hidden state,
    after the final norm, and after the transform that some models have before the output layer. Views are read from −1,
    paths from `layer`, the targets of --nitp from `target_layer`. The projectors of --nitp and --sigreg
    (llm_jepa/projectors.py) are part of the model's forward pass, so that wrappers shard and synchronize them.
    """

    def __init__(
        self, model: torch.nn.Module, layer: int = -1, flag: str = "stp_layer", *, target_layer: int | None = None,
        targets: str = "states",
    ):  # fmt: skip
        """Raises UsageError if the model has no such layer; `flag` is the one that asks for `layer`.

        `targets` is a value of --nitp_targets.
        """
        config = model.config.get_text_config()
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        parameters = inspect.signature(base.forward).parameters
        self.batch: dict[str, Any] | None = None
        self.states: dict[str, torch.Tensor] = {}
        self.model_name = type(base).__name__
        self.vocab_size, self.max_logits = config.vocab_size, MAX_LOGITS
        self.slices = False  # set by inspect_model if sliced logits give the same loss
        self.accepts_positions, self.accepts_kwargs = "position_ids" in parameters, "kwargs" in parameters
        self.attn_implementation = getattr(config, "_attn_implementation", None) or ""
        self.windowed = any(getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
        self.path_layer, self.target_layer = InnerLayer(model, layer, flag), None
        if target_layer is not None:
            self.target_layer, self.targets, self.table = InnerLayer(model, target_layer, "nitp_layer"), targets, None
        self.inner = [x for x in (self.path_layer, self.target_layer) if x]
        self.projectors = getattr(model, "projectors", {})
        self._layer = model.get_output_embeddings()
        self._hooks = [self._layer.register_forward_pre_hook(self._select), *(h for x in self.inner for h in x.hooks)]
        if self.projectors:
            self._hooks.append(model.register_forward_hook(self._add_output))

    def close(self) -> None:
        """Removes the hooks from the model."""
        for hook in self._hooks:
            hook.remove()

    def _select(self, module: torch.nn.Module, args: tuple) -> tuple | None:
        if self.batch is None:
            return None
        hidden = args[0]  # (R, T, D)
        if hidden.dim() != 3 or hidden.shape[:2] != self.batch["input_ids"].shape:
            raise UsageError(f"the output layer of {self.model_name} does not receive one state per token")
        at = {n: self.batch[n].to(hidden.device) for n in ("label_at", "view_at", "path_at", "next_at")}
        at = {name: tuple(places) for name, places in at.items()}  # (rows, columns)
        views, path = hidden[at["view_at"]], self.path_layer.read(hidden)[at["path_at"]]  # (2, P, D), (K, S, D)
        self.states = {"views": views, "path": path}
        if self.target_layer:
            self.states["predicted"] = self.projectors["nitp"](hidden[at["next_at"]])  # (M, D)
            self.states["target"] = self._target(hidden, *at["next_at"])
        if "sigreg" in self.projectors:
            self.states["projected"] = self.projectors["sigreg"](views)
        return (hidden[at["label_at"]][None], *args[1:])  # (R, T, D) → (N, D) → (1, N, D)

    @torch.no_grad()
    def _target(self, hidden: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        """The targets (M, D) of --nitp for the tokens at (row, column), (M,) each."""
        if self.targets == "random":  # a fixed vector per token, so the target tells no more than the label
            if self.table is None:
                generator = torch.Generator().manual_seed(0)
                self.table = torch.randn(self.vocab_size, hidden.shape[-1], generator=generator)
            self.table = self.table.to(hidden)
            return self.table[self.batch["input_ids"][row, column + 1]]
        states = self.target_layer.read(hidden)[row, column + 1]
        if states.shape[1] != hidden.shape[2]:
            sizes = f"{states.shape[1]} dimensions there, {hidden.shape[2]} before its output layer"
            raise UsageError(f"{self.target_layer.where}: the states of {self.model_name} have {sizes}")
        return shuffled(states) if self.targets == "shuffled" else states

    def _add_output(self, module: torch.nn.Module, args: tuple, output: Any) -> Any:
        """Adds the projections to the output, where DistributedDataParallel finds which parameters were used."""
        if self.batch is not None:
            output.hidden_states = tuple(self.states[n] for n in ("predicted", "projected") if n in self.states)
        return output

    def _inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the model's forward.

        transformers separates packed segments by position_ids only if attention_mask is None and use_cache is False.
        Finding the boundaries makes the host wait for the device in each forward pass, so flash kernels get them here.
        """
        used, ids = batch["segment_ids"] >= 0, batch["input_ids"]  # (R, T)
        # The embedding of the padding token is often zero, where the norms of some models have no gradient.
        inputs = {"input_ids": torch.where(used, ids, ids[:, :1]), "attention_mask": None, "use_cache": False}
        if self.accepts_positions:
            inputs["position_ids"] = batch["position_ids"]
        if batch["mask"] == "padding":
            inputs["attention_mask"] = used.long()  # (R, T)
        elif batch["mask"] == "dense" or (self.attn_implementation == "sdpa" and not self.windowed):
            mask = attention_mask(batch["segment_ids"], batch["branches"])[:, None]  # (R, 1, T, T)
            lowest = torch.finfo(torch.float32).min  # eager attention adds the mask to its scores
            inputs["attention_mask"] = mask if self.attn_implementation == "sdpa" else torch.where(mask, 0.0, lowest)
        elif "flash" in self.attn_implementation and self.accepts_kwargs:
            inputs |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), batch["boundaries"])
            inputs |= dict.fromkeys(("max_length_q", "max_length_k"), batch["longest"])
        return inputs

    def read(self, model: torch.nn.Module, batch: dict[str, Any]) -> States:
        """One forward pass of the (wrapped) `model` on a batch of the Collator."""
        self.batch = batch
        try:
            for layer in self.inner:
                layer.begin(batch["input_ids"])
            logits = model(**self._inputs(batch)).logits[0]  # (1, N, V) → (N, V), sliced: (1, N, 1) → (N, 1)
            return States(logits, **self.states)
        finally:
            self.batch, self.states = None, {}
            for layer in self.inner:
                layer.begin(None)

    def lm_sum(self, model: torch.nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, States]:
        """The cross-entropy summed over the labels, and the states, from one forward pass.

        If `slices` is set, more than `max_logits` logits are computed slice by slice, and again in the backward pass.
        """
        if not (self.slices and len(batch["label_ids"]) * self.vocab_size > self.max_logits):
            states = self.read(model, batch)
            return lm_loss(states.logits, batch["label_ids"])[0], states
        # The slices are computed inside the layer's call: wrappers that shard its parameters gather them for that call.
        forward, own = self._layer.forward, vars(self._layer).get("forward")  # `own`: set by such a wrapper
        self._layer.forward = partial(self._sliced, forward)
        try:
            states = self.read(model, batch)
        finally:
            del self._layer.forward
            if own is not None:
                self._layer.forward = own
        return states.logits.sum(), states

    def _sliced(self, layer: Callable, hidden: torch.Tensor) -> torch.Tensor:
        """The cross-entropy of each label (1, N, 1) in place of logits, from hidden states (1, N, D)."""

        def nll(states: torch.Tensor, label_ids: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(layer(states).float(), label_ids, reduction="none")  # (n, D) → (n, V) → (n,)

        size = max(1, self.max_logits // self.vocab_size)
        chunks = zip(hidden[0].split(size), self.batch["label_ids"].split(size), strict=True)  # (≤ size, D), (≤ size,)
        return torch.cat([checkpoint(nll, *chunk, use_reentrant=False) for chunk in chunks])[None, :, None]  # (1, N, 1)
