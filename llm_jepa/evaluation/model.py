"""Loads a model for evaluation, and reads its logits and hidden states."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from transformers import BitsAndBytesConfig, set_seed

from llm_jepa.cli import UsageError, first_line
from llm_jepa.data.rendering import Renderer
from llm_jepa.data.segments import Encoder, Item, Segment
from llm_jepa.evaluation import generation, vllm_engine
from llm_jepa.evaluation.settings import EvaluationSettings, check_run
from llm_jepa.forward import LMHeadSelector
from llm_jepa.layouts import Collator
from llm_jepa.model import LOADING_ERRORS, load_adapter, load_config, load_pretrained, load_tokenizer, tokenizer_options
from llm_jepa.scoring.tasks import find_task
from llm_jepa.settings import adapter_config


def load(name: str, s: EvaluationSettings) -> tuple[Any, Encoder]:
    """The model on its device in evaluation mode (only a description of it for vLLM, which loads it), and its encoder.

    Raises UsageError if it cannot be loaded, or is a run that is not finished or was trained in another format.
    """
    folder, trained = Path(name), check_run(name, s)
    adapter = adapter_config(name)
    moved = None if s.split_tune_untune else s.original_model_name  # with --split_tune_untune it is another model
    base = (moved or adapter["base_model_name_or_path"]) if adapter else name
    has_tokenizer = (folder / "tokenizer_config.json").is_file() or not folder.is_dir()
    source = name if has_tokenizer else moved or base
    tokenizer = load_tokenizer(source, s.revision, predictors=False, **tokenizer_options(s))
    labels = "answer_text" if s.task and find_task(s.task).choices else "answer"
    flags = trained if labels == "answer" else {}  # views are embedded as in training; choices have no views
    views = {k: flags[k] for k in ("predictors", "front_pred", "reverse_pred") if k in flags}
    places = {k: flags[k] for k in ("last_token", "text_view") if k in flags}
    encoder = Encoder(Renderer(tokenizer, plain=s.plain, **views), labels, max_length=sys.maxsize, **places)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    auto = "bfloat16" if device == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    dtype = auto if s.dtype == "auto" else s.dtype
    if s.engine == "vllm":
        return vllm_engine.describe(name, s.revision, dtype), encoder
    revision = adapter.get("revision") if adapter and s.revision is None else s.revision
    code = {"trust_remote_code": s.trust_remote_code}
    try:
        load_config(base, revision, **code)
    except UsageError as error:
        hint = f"; the base of the adapter {name} can also be given as --original_model_name" if adapter else ""
        raise UsageError(f"{error}{hint}") from None
    options = {"dtype": getattr(torch, dtype), "revision": revision, "device_map": s.device_map} | code
    if s.attn_implementation:
        options["attn_implementation"] = s.attn_implementation
    if s.load_in_8bit or s.load_in_4bit:
        bits = {"load_in_8bit": s.load_in_8bit, "load_in_4bit": s.load_in_4bit}
        options["quantization_config"] = BitsAndBytesConfig(**bits, bnb_4bit_compute_dtype=options["dtype"])
        options["device_map"] = s.device_map or device  # quantized parameters cannot move between devices
    set_seed(42)  # embeddings of tokens that a model lacks (--plain) are drawn at random
    try:
        model = load_pretrained(base, **options)
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer))
    except LOADING_ERRORS as error:
        raise UsageError(f"{base} cannot be loaded: {first_line(error)}") from None
    model = load_adapter(model, name) if adapter else model
    return (model if options["device_map"] else model.to(device)).eval(), encoder


def weight_files(name: str) -> list[list[Any]]:
    """[name, size in bytes, time of the last change in ns] of a model folder's weights and configurations.

    They tell whether the model is still the same, without reading it; [] of a hub name. Those of an adapter's base
    folder follow.
    """
    files = [p for p in Path(name).glob("*model*") if p.suffix in (".safetensors", ".bin")]
    files += [p for p in (Path(name) / "config.json", Path(name) / "adapter_config.json") if p.is_file()]
    found, adapter = sorted([p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files), adapter_config(name)
    base = adapter and adapter["base_model_name_or_path"]
    return found + (weight_files(base) if base else [])


@contextlib.contextmanager
def label_logits(model: Any, pad_id: int) -> Iterator[Callable[[list[Item]], torch.Tensor]]:
    """A function of items: the logits (N, V) at their labels."""
    collator = Collator("separate", pad_id, sys.maxsize)
    with generation.float32_logits(model), contextlib.closing(LMHeadSelector(model)) as selector:
        yield lambda items: selector.read(model, send_to_device(collator(items), model.device)).logits


@contextlib.contextmanager
def layer_states(model: Any, pad_id: int, layer: int) -> Iterator[Callable[[list[Segment]], torch.Tensor]]:
    """A function of segments: a layer's hidden states (R, T, D), one segment per row, as training reads them."""
    collator = Collator("separate", pad_id, sys.maxsize)
    with contextlib.closing(LMHeadSelector(model, layer, "embedding_layer")) as selector:

        def read(segments: list[Segment]) -> torch.Tensor:
            batch = collator([(dataclasses.replace(segment, view=None),) for segment in segments])  # in no pairs
            batch["path_at"] = torch.stack(torch.where(batch["input_ids"] >= 0)).unflatten(1, batch["input_ids"].shape)
            batch["label_at"] = batch["path_at"][:, :, 0]  # (2, R): logits of other tokens would need much memory
            return selector.read(model, send_to_device(batch, model.device)).path

        yield read
