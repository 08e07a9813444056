"""LLM-JEPA fine-tuning of models of about eight billion parameters, on one large GPU or on nodes of them.

    python finetune8bh200.py --model_name MODEL --train_file FILE --predictors 1 --lbd 1             one GPU
    torchrun --nproc_per_node 8 finetune8bh200.py …                                               all GPUs of a node

The method, its flags and the run folder are finetune.py's; this file changes only how the parameters are stored. With
several processes FSDP2 shards parameters, gradients and optimizer states, and checkpoints are sharded too. Training can
resume from them with another number of processes (at least two). At the end one complete model is saved and the
checkpoints are removed. If torchrun restarts the job (--max-restarts), training resumes from the last complete
checkpoint. `python -m llm_jepa.memory` predicts the memory; its --help has the formula.
"""

import gc
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from llm_jepa.cli import UsageError, parse_flags
from llm_jepa.data.examples import require_files
from llm_jepa.distributed import processes, start
from llm_jepa.large.settings import LargeSettings, check_large_settings

if __name__ == "__main__":  # before the slow imports, so that --help and mistakes are fast
    check = partial(check_large_settings, several=processes() > 1)
    start("finetune8bh200.py", lambda: require_files(check(*parse_flags(LargeSettings, __doc__))))

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import BitsAndBytesConfig, set_seed

from finetune import JepaTrainer, adapted, fine_tune, load_base, load_on_device
from llm_jepa.files import read_json
from llm_jepa.model import load_adapter
from llm_jepa.run_folder import launch_id
from llm_jepa.training.arguments import Arguments, training_arguments, uses_bfloat16
from llm_jepa.training.process import run_script


def compute_dtype(s: LargeSettings, device: torch.device) -> torch.dtype:
    """Precision of the computation."""
    return torch.bfloat16 if s.param_dtype == "bfloat16" or uses_bfloat16(s, device) else torch.float32


# ------------------------------------------------------------------------------------------------------- sharding


def load(s: LargeSettings, tokenizer: Any, device: torch.device) -> Any:
    """The model on its device. To be sharded: on the main process's CPU, and without memory on the others."""
    if s.dry_run:
        return load_on_device(s, tokenizer, device)
    sharded = s.sharding == "fsdp2"
    # With LoRA only the adapter, which is float32, is updated in small steps.
    options: dict[str, Any] = {"dtype": compute_dtype(s, device) if s.lora else getattr(torch, s.param_dtype)}
    if s.load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=options["dtype"],
        )
        options["device_map"] = {"": device}
    model = load_base(s, tokenizer, empty=sharded and not PartialState().is_main_process, **options)
    model = adapted(model, s, tokenizer)
    return model if sharded or s.load_in_4bit else model.to(device)


def sharded_arguments(s: LargeSettings, device: torch.device, *, bf16: bool) -> Arguments:
    """The Trainer's arguments for FSDP2."""
    # The model recomputes activations itself: accelerate's way would draw other dropout the second time.
    config = {"version": 2, "state_dict_type": "SHARDED_STATE_DICT", "cpu_ram_efficient_loading": True}
    arguments = training_arguments(s, device, bf16=bf16, fsdp_config=config)
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype(s, device), reduce_dtype=torch.float32)
    arguments.fsdp_plugin_args["mixed_precision_policy"] = policy
    if device.type == "cpu":  # accelerate shards only between processes that it believes to have GPUs
        arguments.distributed_state.distributed_type = DistributedType.MULTI_GPU
    return arguments


# ---------------------------------------------------------------------------------------------------- checkpoints


class LargeTrainer(JepaTrainer):
    """JepaTrainer on a model that FSDP2 shards."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves one complete model; within a checkpoint nothing, because that has the shards."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
        elif not _internal_call:
            weights = self.accelerator.get_state_dict(self.model)  # gathered on the main process
            if self.args.should_save:
                for name in self.accelerator.unwrap_model(self.model).all_tied_weights_keys or ():
                    weights.pop(name, None)  # gathered separately from the weight that it is tied to
                self._save(output_dir or self.args.output_dir, state_dict=weights)

    def load_checkpoint(self, folder: Path) -> None:
        """Loads the parameters of a checkpoint; they are sharded, so the model must be sharded first."""
        if not self.is_fsdp_enabled:
            super().load_checkpoint(folder)
        else:
            self._prepare_for_training(self.state.max_steps or 1, self.get_train_dataloader(), str(folder))

    def merged_model(self) -> Any:
        """The model with its adapter merged in, from the saved adapter; only on the main process."""
        if not self.is_fsdp_enabled and not getattr(self.model, "is_loaded_in_4bit", False):
            return super().merged_model()
        s, dtype = self.settings, compute_dtype(self.settings, self.args.device)
        set_seed(s.finetune_seed)  # the rows of added tokens are drawn again
        base = load_base(s, self.processing_class, dtype=dtype)
        return load_adapter(base, self.args.output_dir).merge_and_unload()


# ----------------------------------------------------------------------------------------------------------- main


def resume_after_restart(s: LargeSettings) -> LargeSettings | None:
    """The settings, with --resume if torchrun has restarted this job and its run had begun; None if it is finished.

    Raises UsageError if the run failed in a way that a restart would repeat.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT")  # each node counts only its own
    if restarts is None or not any(gather_object([restarts != "0"])):
        return s
    folder = Path(s.output_dir)
    path = folder / "run.json"
    before = read_json(path) if path.is_file() else {}
    mine = not before or before["attempts"][-1].get("launch") == launch_id()  # not a folder that existed before
    begun = (folder / "args.json").is_file()
    before, mine, begun = broadcast_object_list([before, mine, begun])  # as the main process finds it
    if mine and before.get("status") == "finished":  # a process failed after the end
        return None
    if mine and before.get("repeats"):
        raise UsageError(f"{before['error']} (not tried again)")
    return replace(s, resume=True, overwrite=False) if mine and begun else s


def main(argv: list[str] | None = None) -> int:
    """Exit codes as of finetune.py."""
    settings, given = parse_flags(LargeSettings, __doc__, argv)

    def work(state: PartialState) -> None:
        s = resume_after_restart(check_large_settings(settings, given, processes() > 1))
        if s is None:
            return
        sharded, dtype = s.sharding == "fsdp2" and not s.dry_run, compute_dtype(s, state.device)
        in_half = (dtype if s.lora or sharded else getattr(torch, s.param_dtype)) != torch.float32
        autocast = uses_bfloat16(s, state.device) and s.param_dtype == "float32"
        fine_tune(
            s, state,
            load=load,
            half=in_half and not s.dry_run,
            sharded=sharded,
            trainer_class=LargeTrainer,
            make_arguments=partial(sharded_arguments if sharded else training_arguments, bf16=autocast),
        )  # fmt: skip

    return run_script("finetune8bh200.py", work)


if __name__ == "__main__":
    gc.freeze()  # otherwise each collection examines all imported modules: 1 s of the start with 8000 examples
    sys.exit(main())
