"""What the Trainer's own callbacks for W&B, MLflow and TensorBoard leave out: projects, errors and tables."""

from __future__ import annotations

import os
from typing import Any

from transformers.integrations import MLflowCallback, TensorBoardCallback, WandbCallback

from llm_jepa.cli import UsageError, first_line


def start_trackers(trainer: Any, project: str | None) -> None:
    """Starts W&B and MLflow before a run writes anything; only on the main process. Raises UsageError if one fails."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    if project:
        os.environ |= dict.fromkeys(("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME"), project)
    for name, kind in (("wandb", WandbCallback), ("mlflow", MLflowCallback)):
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, kind):
                try:
                    callback.setup(trainer.args, trainer.state, trainer.model)
                except Exception as error:  # of any kind, from the tracker's own code
                    raise UsageError(f"--report_to {name}: {first_line(error)}") from None


def log_table(callbacks: list[Any], name: str, rows: list[dict[str, Any]], step: int) -> None:
    """Logs rows as a table to the trackers among the Trainer's callbacks; only on the main process."""
    import pandas

    table = pandas.DataFrame(rows)
    mixed = table.columns[table.dtypes == "object"]  # W&B refuses numbers beside True or False
    table[mixed] = table[mixed].map(lambda value: float(value) if isinstance(value, bool) else value)
    for callback in callbacks:
        if isinstance(callback, WandbCallback):
            import wandb

            wandb.log({name: wandb.Table(dataframe=table), "train/global_step": step})
        elif isinstance(callback, MLflowCallback):
            import mlflow

            mlflow.log_table(table, f"{name}.json")  # appends
        elif isinstance(callback, TensorBoardCallback) and callback.tb_writer:
            callback.tb_writer.add_text(name, table.to_html(index=False), step)
