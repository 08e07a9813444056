"""The Trainer's own arguments from the flags of finetune.py."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from llm_jepa.settings import Settings


def uses_bfloat16(s: Settings, device: torch.device) -> bool:
    """Whether float32 parameters are computed with in bfloat16 (autocast)."""
    on_gpu = device.type == "cuda"
    return s.dtype == "bfloat16" or (s.dtype == "auto" and on_gpu and torch.cuda.is_bf16_supported())


class Arguments(TrainingArguments):
    """The Trainer's arguments; what trackers record of them includes the run's settings, as llm_jepa/<flag>."""

    settings: Settings

    def to_dict(self) -> dict[str, Any]:
        """The arguments and the settings by name."""
        return super().to_dict() | {f"llm_jepa/{k}": v for k, v in dataclasses.asdict(self.settings).items()}


def training_arguments(
    s: Settings, device: torch.device, *, bf16: bool | None = None, fsdp_config: dict[str, Any] | None = None
) -> Arguments:
    """The arguments of a run. `fsdp_config`: for a model that is sharded over the processes.

    `bf16`: whether float32 parameters are autocast to bfloat16; None follows --dtype.
    """
    default_workers = (1 if s.streaming else 2) if device.type == "cuda" else 0
    own_names = (
        "output_dir learning_rate weight_decay lr_scheduler_type max_grad_norm optim adam_beta2 use_liger_kernel "
        "max_steps eval_strategy eval_steps eval_on_start save_strategy save_steps logging_steps"
    ).split()
    arguments = Arguments(
        **{name: getattr(s, name) for name in own_names},
        # The items of the dataset are complete micro-batches.
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=s.grad_accum,
        num_train_epochs=s.num_epochs,
        warmup_steps=s.warmup_steps if s.warmup_steps < 1 else int(s.warmup_steps),
        seed=s.finetune_seed,
        use_cpu=device.type == "cpu",
        bf16=uses_bfloat16(s, device) if bf16 is None else bf16,
        fp16=s.dtype == "float16",
        activation_checkpointing=s.gradient_checkpointing,
        fsdp=bool(fsdp_config) or None,
        fsdp_config=fsdp_config,
        load_best_model_at_end=s.save_best,
        metric_for_best_model=s.best_metric,
        greater_is_better=s.best_metric and s.best_metric != "eval_lm_loss",  # a task file may be called my_loss.py
        restore_callback_states_from_checkpoint=s.early_stopping_patience is not None,
        logging_nan_inf_filter=False,
        disable_tqdm=False,
        log_level="error",
        report_to=s.report_to.split(","),
        run_name=s.run_name or Path(s.output_dir).name,
        project=s.project or TrainingArguments.project,
        remove_unused_columns=False,
        dataloader_num_workers=default_workers if s.dataloader_num_workers is None else s.dataloader_num_workers,
        dataloader_pin_memory=device.type == "cuda",
        accelerator_config={
            "non_blocking": device.type == "cuda",
            # Deferring the reduction would keep unsharded gradients.
            "gradient_accumulation_kwargs": {"sync_each_batch": bool(fsdp_config)},
        },
        ignore_data_skip=s.streaming,  # a stream resumes by itself
        ddp_find_unused_parameters=True,
        label_names=["label_ids"],
    )
    # One device without torchrun: torch's DataParallel would split packed rows.
    arguments._n_gpu = min(1, arguments.n_gpu)
    arguments.settings = s
    return arguments
