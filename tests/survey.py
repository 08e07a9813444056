"""Trains and evaluates every causal-LM architecture of transformers in a tiny size and writes docs/architectures.md.

    nice python tests/survey.py                  # all architectures, about 20 minutes on one core
    python tests/survey.py table.md llama mamba  # some of them

Each architecture has a child process with a time limit. PAGE describes what is done.
"""

import inspect
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from conftest import ROOT, call
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

from llm_jepa.cli import first_line
from llm_jepa.files import write_text

# Values of a configuration's fields, where it has them.
SIZES = {
    0: "pad_token_id num_kv_shared_layers",
    1: "bos_token_id eos_token_id n_group topk_group first_k_dense_replace n_shared_experts mamba_ngroups n_groups",
    2: "num_hidden_layers num_layers decoder_layers encoder_layers num_encoder_layers num_decoder_layers moe_topk "
       "moe_k num_blocks num_experts_per_tok num_experts_per_token linear_num_key_heads n_mamba_heads",
    4: "num_attention_heads num_key_value_heads num_heads num_kv_heads kv_heads decoder_attention_heads laurel_rank "
       "encoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads num_experts num_local_experts "
       "n_routed_experts moe_num_experts time_step_rank linear_num_value_heads",
    8: "head_dim rotary_dim qk_nope_head_dim qk_rope_head_dim v_head_dim kv_channels state_size ssm_state_size "
       "mamba_n_heads mamba_d_head mamba_d_state mamba_num_heads mamba_head_dim mamba_headdim linear_key_head_dim "
       "linear_value_head_dim hidden_size_per_layer_input mlstm_chunksize",
    16: "moe_intermediate_size shared_expert_intermediate_size q_lora_rank kv_lora_rank expert_ffn_hidden_size",
    32: "hidden_size d_model embedding_size word_embed_proj_dim attention_hidden_size lru_width dim_model",
    48: "intermediate_size intermediate_size_mlp ffn_dim ffn_hidden_size decoder_ffn_dim encoder_ffn_dim dim_ff",
    28: "image_size", 14: "patch_size", 64: "mamba_d_ssm", 128: "sliding_window local_attention",
    256: "max_position_embeddings max_seq_len max_target_positions", 512: "vocab_size",
}  # fmt: skip
MORE = {  # what an architecture needs besides
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "moshi": {"audio_vocab_size": 64},
    "reformer": {"axial_pos_embds_dim": (16, 16)},
    "zaya": {"num_experts_per_tok": 1},
    "zamba": {"layers_block_type": ["hybrid", "hybrid"]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
}


def tiny_config(kind: type[PreTrainedConfig]) -> PreTrainedConfig:
    """The configuration of a tiny model, of its parts too."""
    fields = inspect.signature(kind.__init__).parameters
    values = {name: size for size, names in SIZES.items() for name in names.split()}
    if "kv_lora_rank" not in fields:
        values |= {"num_key_value_heads": 2, "num_kv_heads": 2}
    values = {kind.attribute_map.get(name, name): size for name, size in values.items()}
    parts = {name: part for name, part in (kind.sub_configs or {}).items() if issubclass(part, PreTrainedConfig)}
    values |= {name: tiny_config(part).to_dict() for name, part in parts.items()}
    kept = {name: value for name, value in values.items() if name in fields or name in ("bos_token_id", "pad_token_id")}
    return kind(**kept | MORE.get(kind.model_type, {}))


def make_model(name: str, folder: Path) -> None:
    """Writes a random model of this architecture. Raises ValueError if it is large."""
    config = tiny_config(CONFIG_MAPPING[name])
    if "is_decoder" in vars(config):
        config.is_decoder = True  # BERT and its like
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > 2e8:
        raise ValueError(f"{size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "models" / "tiny").save_pretrained(folder)


def run(script: str, *flags: object) -> str:
    """Runs a script in this process: "ok", "refused: …" or "fault: …"."""
    try:
        done = call(script, *flags)
    except Exception as error:  # what a user would see as a traceback
        return f"fault: {type(error).__name__}: {first_line(error)}"
    reason = first_line(ValueError(done.err.rpartition("error: ")[2].strip()))
    return "ok" if done.code == 0 else f"{'refused' if done.code == 2 else 'fault'}: {reason}"


def survey(name: str, folder: Path) -> dict[str, str]:
    """The outcome of each column for one architecture."""
    data, model, tuned = (folder / x for x in ("rows.jsonl", "model", "run"))
    lines = (ROOT / "datasets" / "synth_train.jsonl").read_text().splitlines(keepends=True)
    data.write_text("".join(lines[:2]))
    try:
        make_model(name, model)
    except Exception as error:  # of transformers, not of this repository
        return {"training": f"not built: {type(error).__name__}: {first_line(error)}"}
    flags = ["--train_file", data, "--model_name", model, "--predictors", 1, "--lbd", 1, "--batch_size", 2]
    flags += ["--grad_accum", 1, "--max_steps", 2, "--save_strategy", "no"]

    def fine_tune(*more: object) -> str:
        outcome = run("finetune", *flags, *more)
        if outcome.startswith("refused") and "--layout separate" in outcome:
            outcome = run("finetune", *flags, *more, "--layout", "separate").replace("ok", "ok, separate rows")
        return outcome

    found = {"training": fine_tune("--output_dir", tuned)}
    found["with --nitp"] = fine_tune("--output_dir", folder / "nitp", "--nitp", "--jepa_loss", "clip")
    found["with --lora"] = fine_tune("--output_dir", folder / "lora", "--lora", "--lora_rank", 2)
    if found["training"].startswith("ok"):
        files = ["--model_name", tuned, "--input_file", data, "--output_file", folder / "out" / "predictions.jsonl"]
        found["evaluation"] = run("evaluate", *files, "--task", "text", "--max_new_tokens", 8)
    return {column: outcome.replace(str(folder), "…") for column, outcome in found.items()}


def in_child(name: str) -> dict[str, str]:
    """The same in a process of its own, which ends after LIMIT seconds."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        if (child := os.fork()) == 0:
            signal.alarm(LIMIT)
            try:
                result.write_text(json.dumps(survey(name, Path(folder))))
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        return json.loads(result.read_text()) if result.exists() else {"training": f"not finished in {LIMIT} s"}


LIMIT = 300  # seconds
COLUMNS = ("training", "with --nitp", "with --lora", "evaluation")
PAGE = """# Architectures

Every architecture for causal language models of transformers {version}, as a random model with two layers of 32
values and the tokenizer of `models/tiny`. That shows that the code runs, not that a published model learns.

- training: two steps with `--predictors 1 --lbd 1`. *separate rows*: the packed layout is refused, because the model
  carries state along a row or counts positions by row, and `--layout separate` works.
- with --nitp, with --lora: the same with `--nitp --jepa_loss clip` or `--lora`. evaluation: the trained model generates
  8 tokens for two prompts.
- *refused*: an error message of one line and exit code 2. *fault*: a traceback or another exit code, which is a bug.
  *not built*: transformers makes no tiny model from the script's settings.

`nice python tests/survey.py` makes this page in about 20 minutes on one core.

{table}
"""


def page(found: dict[str, dict[str, str]]) -> str:
    """The page with the table: a row for the architectures of the same outcomes."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, outcomes in sorted(found.items()):
        groups.setdefault(tuple(outcomes.get(c, "").replace("|", "/") for c in COLUMNS), []).append(name)
    rows = [[", ".join(names), *outcomes] for outcomes, names in groups.items()]
    rows = [["architectures", *COLUMNS], ["---"] * (1 + len(COLUMNS)), *rows]
    return PAGE.format(version=transformers.__version__, table="\n".join(f"| {' | '.join(row)} |" for row in rows))


def main(page_file: Path, *names: str) -> None:
    """Writes the page about these architectures, by default all."""
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    found = {}
    for name in names or NAMES:
        found[name] = in_child(name)
        print(name, "; ".join(found[name].values()), flush=True)
    write_text(page_file, page(found))


if __name__ == "__main__":
    main(*(Path(sys.argv[1]), *sys.argv[2:]) if len(sys.argv) > 1 else (ROOT / "docs" / "architectures.md",))
