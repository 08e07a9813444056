"""LLM-JEPA fine-tuning of models of some eight billion weights, on one large GPU or on nodes of them.

    python finetune8bh200.py --model_name MODEL --train_file ROWS --predictors 1 --lbd 1            one GPU
    torchrun --nproc_per_node 8 finetune8bh200.py …                                              all GPUs of a node

The method, its flags and the run folder are finetune.py's; this file changes only how the weights are held. With
several processes FSDP2 shards weights, gradients and optimiser states over them: the main process reads the weights,
once, and hands out the shards; checkpoints are sharded too, and can be gone on with by another number above one; at
the end one whole model is saved, and the checkpoints are removed. Started again by torchrun (--max-restarts), it goes
on from the last whole one.

Memory of full fine-tuning, in bytes a weight, shared out over the processes:

    master weights     4 (float32) or 2 (--param_dtype bfloat16)
    gradients          as the master weights
    AdamW's moments    twice the master weights; 2 with an 8-bit optimiser
    gathered           2 (bfloat16) of two decoder layers and the output layer; a process alone: of all, by autocast

and beside them one hidden state a layer and token (activations are recomputed) and 2^26 logits. Of 8.03e9 weights that
is 128 GB in float32, 96 GB with an 8-bit optimiser and autocast's copies on one GPU, 16 GB on each of eight.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from peft import PeftModel
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import BitsAndBytesConfig, TrainerCallback, TrainingArguments, set_seed

import finetune
from finetune import Engine, JepaTrainer, Parts, training_arguments
from llm_jepa.cli import UsageError
from llm_jepa.files import read_json
from llm_jepa.large.settings import DTYPES, LargeSettings, check_large_settings
from llm_jepa.model import load_model
from llm_jepa.run_folder import launch, processes


def restarted() -> bool:
    """Whether torchrun has started this job before: on any node, since each counts its own restarts alone."""
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT")
    return count is not None and any(gather_object([count != "0"]))


def computes(s: LargeSettings, device: torch.device) -> torch.dtype:
    """Precision of the computation."""
    return DTYPES["bfloat16" if s.param_dtype == "bfloat16" or finetune.WHOLE.half(s, device) else "float32"]


class LargeTrainer(JepaTrainer):
    """JepaTrainer on a model that FSDP2 shards."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves one whole model; within a checkpoint nothing, which has the shards."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
        elif not _internal_call:
            weights = self.accelerator.get_state_dict(self.model)  # gathered on the main process
            if self.args.should_save:
                for name in self.accelerator.unwrap_model(self.model).all_tied_weights_keys or ():
                    weights.pop(name, None)  # gathered apart from the weight that it is tied to
                self._save(output_dir or self.args.output_dir, state_dict=weights)

    def load_checkpoint(self, folder: Path) -> None:
        """Takes the weights of a checkpoint; they are sharded, so the model has to be first."""
        if not self.is_fsdp_enabled:
            super().load_checkpoint(folder)
        else:
            self._prepare_for_training(self.state.max_steps or 1, self.get_train_dataloader(), str(folder))

    def merged_model(self) -> Any:
        """The model with its adapter merged in, from the whole adapter that was saved; on the main process alone."""
        if not (self.is_fsdp_enabled or self.s.load_in_4bit):
            return super().merged_model()
        set_seed(self.s.finetune_seed)  # the rows of added tokens are drawn again
        base = load_model(replace(self.s, lora=False), self.processing_class, dtype=computes(self.s, self.args.device))
        return PeftModel.from_pretrained(base, self.args.output_dir).merge_and_unload()


class Inspection(TrainerCallback):
    """Looks at the model when its shards are in place, before the first step."""

    def __init__(self, s: LargeSettings, parts: Parts, half: bool):
        self.s, self.parts, self.half = s, parts, half

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Raises UsageError, on every process, where the model cannot be laid out as asked."""
        finetune.inspect_model(self.s, self.parts, self.half)


class Sharded(Engine):
    """Weights shared out over the processes by FSDP2; of a process alone whole, in the precision asked for."""

    name, doc, settings, trainer = "finetune8bh200.py", __doc__, LargeSettings, LargeTrainer

    def check(self, s: LargeSettings, given: set[str]) -> LargeSettings:
        """The resolved settings. Raises UsageError naming all that is wrong or inapplicable."""
        s = check_large_settings(s, given, processes() > 1)
        if restarted():
            folder = Path(s.output_dir)
            path = folder / "run.json"
            before = read_json(path) if path.is_file() else {}
            mine = not before or before["attempts"][-1].get("launch") == launch()  # not a folder that was there before
            begun = (folder / "args.json").is_file()
            before, mine, begun = broadcast_object_list([before, mine, begun])  # as the main process finds it
            if mine and before.get("status") == "finished":
                raise SystemExit(0)  # a process failed behind the end
            if mine and before.get("repeats"):
                raise UsageError(f"{before['error']} (not tried again)")
            if mine and begun:
                s = replace(s, resume=True, overwrite=False)
        return s

    def half(self, s: LargeSettings, device: torch.device) -> bool:
        """Whether the Trainer computes in bfloat16 on float32 weights; bfloat16 weights need no autocast."""
        return super().half(s, device) and s.param_dtype == "float32"

    def load(self, s: LargeSettings, tokenizer: Any, device: torch.device) -> Any:
        """The model on its device; to be shared out, on the main process's CPU, and the others' without memory."""
        if s.dry_run:
            return super().load(s, tokenizer, device)
        shared, dtype = s.sharding == "fsdp2", DTYPES[s.param_dtype]
        if s.lora:
            dtype = computes(s, device)  # nothing but the adapter, which is float32, takes small steps
        options: dict[str, Any] = {"dtype": dtype}
        if s.load_in_4bit:
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            )
            options["device_map"] = {"": device}
        model = load_model(s, tokenizer, empty=shared and not PartialState().is_main_process, **options)
        return model if shared or s.load_in_4bit else model.to(device)

    def inspect(self, s: LargeSettings, parts: Parts) -> None:
        """Of shards later, by `Inspection`."""
        if s.sharding != "fsdp2" or s.dry_run:
            dtype = next(p for p in parts.model.parameters() if p.is_floating_point()).dtype
            finetune.inspect_model(s, parts, half=dtype != torch.float32)

    def arguments(self, s: LargeSettings, bf16: bool, steps: int, device: torch.device) -> TrainingArguments:
        """The Trainer's own settings."""
        if s.sharding != "fsdp2":
            return training_arguments(s, bf16, steps, device)
        # Activations are recomputed by the model itself: accelerate's way would draw other dropout the second time.
        arguments = training_arguments(s, bf16, steps, device, sharding={
            "version": 2,
            "state_dict_type": "SHARDED_STATE_DICT",
            "cpu_ram_efficient_loading": True,
        })  # fmt: skip
        dtype = computes(s, device)
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        arguments.fsdp_plugin_args["mixed_precision_policy"] = policy
        if device.type == "cpu":  # accelerate shards between processes that it takes for ones with GPUs alone
            arguments.distributed_state.distributed_type = DistributedType.MULTI_GPU
        return arguments

    def callbacks(self, s: LargeSettings, parts: Parts, device: torch.device) -> list[TrainerCallback]:
        """What follows the training besides the run folder."""
        return [Inspection(s, parts, computes(s, device) != torch.float32)] if s.sharding == "fsdp2" else []

    def clean_up(self, s: LargeSettings) -> None:
        """Removes a finished run's checkpoints, each three times as large as its model."""
        for folder in () if s.keep_checkpoints else Path(s.output_dir).glob("checkpoint-*"):
            shutil.rmtree(folder, ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
    """Exit codes as of finetune.py."""
    return finetune.main(argv, Sharded())


if __name__ == "__main__":
    sys.exit(main())
