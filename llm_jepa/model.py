"""Loads the tokenizer with the method's special tokens, the model, and a LoRA adapter on it."""

import re
from collections.abc import Iterable
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from huggingface_hub.file_download import repo_folder_name
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from llm_jepa.cli import UsageError, first_line
from llm_jepa.data.rendering import END_OF_TURN, PERCEPTION, predictor_token

LOADING_ERRORS = (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError, StrictDataclassError)
MAX_LOGITS = 2**26  # logits held at once: 256 MiB in float32, and as much again for their gradient and the softmax
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


def check_name(name: str, flag: str = "model_name") -> None:
    """Raises UsageError if a model's name is a path without a folder, or a folder without a model."""
    folder = Path(name)
    if folder.is_dir():
        known = ("config.json", "adapter_config.json", "tokenizer_config.json", "run.json")
        if not any((folder / file).is_file() for file in known):
            raise UsageError(f"--{flag} {name} is not a model folder: it has neither config.json nor a tokenizer")
        return
    beside_runs = "/" in name and any(folder.parent.glob("*/run.json"))  # otherwise it is a name on the hub
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or beside_runs:
        raise UsageError(f"--{flag} {name}: there is no such folder")
    if reason := unreachable(name):
        raise UsageError(f"--{flag} {name}: there is no such folder, and the hub cannot be reached ({reason})")


@cache
def unreachable(name: str) -> str | None:
    """Why a hub model that was never downloaded cannot be; huggingface_hub itself tries for a minute."""
    downloaded = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model") / "snapshots"
    if not (constants.HF_HUB_OFFLINE or downloaded.is_dir()):
        try:
            get_hf_file_metadata(hf_hub_url(name, "config.json"))
        except (HfHubHTTPError, ValueError):  # the hub has answered, or it is not a name
            return None
        except Exception as error:  # of the HTTP library, which is an internal choice of huggingface_hub
            return first_line(error)
    return None


def load_tokenizer(
    name: str, revision: str | None = None, *, plain: bool = False, predictors: bool = True,
    tokenizer_name: str | None = None, chat_template: str | None = None, trust_remote_code: bool = False,
) -> Any:  # fmt: skip
    """The model's tokenizer, or another one, with the special tokens that the method needs.

    Its `new_tokens` are those that it lacked. `chat_template`: a file that replaces its chat template. Raises
    UsageError if one of them cannot be loaded.
    """
    flag = "tokenizer_name" if tokenizer_name else "model_name"
    name, revision = (tokenizer_name, None) if tokenizer_name else (name, revision)
    check_name(name, flag)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except LOADING_ERRORS as error:
        what = ("" if Path(name).exists() else "there is no such folder, and ") + "its tokenizer cannot be loaded"
        raise UsageError(f"--{flag} {name}: {what} ({loading_reason(error)})") from None
    if not tokenizer.is_fast:
        raise UsageError(f"--{flag} {name}: its tokenizer gives no character offsets (it is not a fast tokenizer)")
    if chat_template:
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--chat_template {chat_template} cannot be read ({first_line(error)})") from None
    # Always all ten, in both arms: a softmax over another vocabulary would be another loss.
    wanted = [predictor_token(i) for i in range(1, 11)] if predictors else []
    wanted += [PERCEPTION, END_OF_TURN] if plain else []
    missing = [t for t in wanted if t not in tokenizer.get_vocab()]
    tokenizer.add_tokens(missing, special_tokens=True)
    tokenizer.new_tokens = missing
    if tokenizer.pad_token is None:  # padding is masked, so any special token will do
        specials = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        if not (tokenizer.eos_token or specials):
            raise UsageError(f"--{flag} {name}: its tokenizer_config.json has neither pad_token nor eos_token")
        tokenizer.pad_token = tokenizer.eos_token or specials[0]
    return tokenizer


def tokenizer_options(s: Any) -> dict[str, Any]:
    """The options of load_tokenizer that a script's flags describe."""
    return {name: getattr(s, name) for name in ("plain", "tokenizer_name", "chat_template", "trust_remote_code")}


def loading_reason(error: Exception) -> str:
    """Why transformers cannot load something: often because the code is in the model's repository."""
    return "it needs --trust_remote_code" if "trust_remote_code" in str(error) else first_line(error)


def load_pretrained(name: str, **options: Any) -> Any:
    """A pretrained causal language model. Raises ValueError if parameters are missing, else one of LOADING_ERRORS."""
    model, loading = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **options)
    if loading["missing_keys"]:  # transformers fills them with random numbers
        raise ValueError(f"weights are missing ({', '.join(sorted(loading['missing_keys'])[:3])} …)")
    return model


def load_adapter(model: Any, name: str, **options: Any) -> Any:
    """The model with the adapter of a folder or hub name; `options` as of PeftModel.from_pretrained.

    Raises UsageError if the adapter does not fit it.
    """
    from peft import PeftModel

    if Path(name).is_dir() and not any(Path(name).glob("adapter_model.*")):
        raise UsageError(f"--model_name {name}: the adapter's weights are missing (adapter_model.safetensors)")
    try:
        return PeftModel.from_pretrained(model, name, **options)
    except LOADING_ERRORS as error:
        reason = next((x.strip() for x in str(error).splitlines() if "size mismatch" in x), first_line(error))
        raise UsageError(f"the adapter {name} does not fit the base {model.name_or_path}: {reason}") from None


def load_config(name: str, revision: str | None = None, *, trust_remote_code: bool = False) -> Any:
    """The model's configuration.

    Raises UsageError if there is none, the folder contains an adapter, or the model is not a causal language model.
    """
    check_name(name)
    if (Path(name) / "adapter_config.json").is_file():
        merge = f"python -m llm_jepa.export merged {name} {name}/merged"
        raise UsageError(f"--model_name {name} is an adapter; merge it first: {merge}")
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except LOADING_ERRORS as error:
        raise UsageError(f"--model_name {name} cannot be loaded: {loading_reason(error)}") from None
    if kind := not_causal(config):
        raise UsageError(f"--model_name {name} is {kind}, not a causal language model: {config.model_type}")
    return config


def not_causal(config: Any) -> str | None:
    """What a model is whose tokens attend to later ones, by its configuration; None for a causal one."""
    if config.is_encoder_decoder:
        return "an encoder-decoder model"
    found = {"attn_type": "bi", "use_bidirectional_attention": True, "is_causal": False}
    if config.model_type in (*MODEL_FOR_MASKED_LM_MAPPING_NAMES, "bert-generation"):
        found |= {"is_decoder": False, "causal": False}
    text = config.get_text_config()
    fields = [f"{name}: {value}" for name, value in found.items() if getattr(text, name, None) == value]
    return f"an encoder ({fields[0]} in its config.json)" if fields else None


def context_length(config: Any) -> int | None:
    """The longest text of a model in tokens, None if its configuration does not say."""
    text = config.get_text_config()
    limits = (getattr(text, name, None) for name in ("max_position_embeddings", "max_target_positions", "max_seq_len"))
    return next((limit for limit in limits if limit and limit > 0), None)  # XLNet has −1


def attention_window(config: Any) -> int | None:
    """The shortest window or chunk that a layer's attention is limited to, in tokens; None if no layer's is."""
    text, marks = config.get_text_config(), {"sliding_window": "sliding|compressed", "attention_chunk_size": "chunk"}
    kinds = getattr(text, "layer_types", None)
    used = [name for name in marks if kinds is None or any(re.search(marks[name], kind) for kind in kinds)]
    return min((size for name in used if (size := getattr(text, name, None) or 0) > 0), default=None)


def check_generation_config(name: str, config: GenerationConfig) -> None:
    """Resets sampling settings that have no effect, because transformers refuses to save some published combinations.

    Raises UsageError if the configuration still cannot be saved: before training, not at the first checkpoint.
    """
    if config.do_sample is not True:
        for setting in SAMPLING:
            setattr(config, setting, None)
    try:
        config.validate(strict=True)
    except ValueError as error:
        reason = " ".join(line for line in str(error).splitlines() if line.startswith("- ")) or first_line(error)
        raise UsageError(f"--model_name {name}: its generation_config.json cannot be saved ({reason})") from None


def new_rows(tokenizer: Any, rows: int, predictors: int = 10) -> list[int]:
    """Ids of the tokens in use that have no trained row in a matrix of so many: the run makes their rows."""
    unused = {predictor_token(i) for i in range(predictors + 1, 11)}
    used = [(t, i) for t, i in tokenizer.get_vocab().items() if t not in unused]
    return sorted(i for t, i in used if i >= rows or t in tokenizer.new_tokens)


@torch.no_grad()
def start_at_mean(model: Any, tokenizer: Any, rows: int, new: list[int]) -> None:
    """Gives new tokens the mean of the rows of the others if some of the `rows` belonged to no token.

    Otherwise resize_token_embeddings has done it. It would count the unused rows, and does not touch spare ones.
    """
    used = sorted(i for t, i in tokenizer.get_vocab().items() if i < rows and t not in tokenizer.new_tokens)
    if not new or len(used) == rows:
        return
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    for matrix in {id(p): p for layer in layers for p in layer.parameters(recurse=False)}.values():
        matrix[new] = matrix[used].mean(dim=0)


def load_model(
    name: str, revision: str | None, tokenizer: Any, *, pretrain: bool = False, attn_implementation: str | None = None,
    empty: bool = False, predictors: int = 10, trust_remote_code: bool = False, **options: Any,
) -> Any:  # fmt: skip
    """The causal language model, with embeddings for all tokens of the tokenizer.

    In float32 unless transformers' `options` say otherwise. `pretrain`: random parameters. `empty`: another process
    sends the parameters. `predictors`: spare rows of further predictor tokens stay as they are, for an adapter that
    does not store them. The model's `new_rows` are the ids of the tokens whose rows were made. Raises UsageError if it
    cannot be loaded.
    """
    options = {"dtype": torch.float32, "trust_remote_code": trust_remote_code} | options
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    config = load_config(name, revision, trust_remote_code=trust_remote_code)
    text = config.get_text_config()
    rows = text.vocab_size
    try:
        if empty:
            text.vocab_size = max(rows, len(tokenizer))  # resizing later would touch the memory
        if empty or pretrain:
            with no_init_weights() if empty else nullcontext():  # memory that is not written to uses no RAM
                model = AutoModelForCausalLM.from_config(config, **options)
            model.tie_weights()
        else:
            model = load_pretrained(name, revision=revision, **options)
            rows = model.get_input_embeddings().num_embeddings
    except LOADING_ERRORS as error:
        hint = "" if pretrain else " (without weights, give --pretrain)"
        raise UsageError(f"--model_name {name} cannot be loaded{hint}: {first_line(error)}") from None
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=not empty)
    model.new_rows = new_rows(tokenizer, rows, predictors)
    if not (empty or pretrain):
        start_at_mean(model, tokenizer, rows, model.new_rows)
    train_padding_row(model.get_input_embeddings(), random=pretrain and not empty)
    if model.config.get_text_config() is not model.config:
        # A multimodal model's other towers get no gradient, and DDP would wait for it.
        text = {id(p) for part in (model.get_decoder(), model.get_output_embeddings()) for p in part.parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in text)
    check_generation_config(name, model.generation_config)
    return model


@torch.no_grad()
def train_padding_row(layer: Any, *, random: bool) -> None:
    """Lets the padding token's embedding train, which torch excludes: it may also end turns, and padding is masked."""
    padding, layer.padding_idx = getattr(layer, "padding_idx", None), None
    if random and padding is not None and not layer.weight[padding].any():
        generator = torch.Generator().manual_seed(padding)  # torch's own would draw other numbers from here on
        layer.weight[padding] = layer.weight.std() * torch.randn(layer.weight.shape[1], generator=generator)


def text_modules(model: Any) -> list[tuple[str, torch.nn.Module]]:
    """The modules of the text decoder by name, without its output layer and the towers of a multimodal model."""
    decoder, kind = model.get_decoder(), type(model.config.get_text_config())
    others = [m for m in decoder.modules() if isinstance(m, PreTrainedModel) and not isinstance(m.config, kind)]
    towers = [m for m in others if model.get_input_embeddings() not in m.modules()]
    outside = {id(m) for part in (*towers, model.get_output_embeddings()) for m in part.modules()}
    inside = {id(m) for m in decoder.modules()} - outside
    return [(name, m) for name, m in model.named_modules() if id(m) in inside]


def adapter_targets(model: Any) -> tuple[list[str], list[str]]:
    """(linear layers, single parameters) that LoRA adapts, by name: all of the text decoder that PEFT can."""
    from peft import LoraConfig
    from peft.utils import transformers_weight_conversion as conversion

    layers, parameters, modules = [], [], dict(text_modules(model))
    for name, module in modules.items():
        if isinstance(module, (torch.nn.Linear, Conv1D)):
            parent, _, own = name.rpartition(".")
            # Mamba reads these two weights past an adapter; such routers and groups return other tensors than a layer.
            bypassed = own in ("out_proj", "dt_proj") and hasattr(modules.get(parent), "ssm_state_size")
            other = re.search("Router|Grouped", type(module).__name__)
            layers += [] if bypassed or other else [name]
        elif "expert" in f"{name} {type(module).__name__}".lower():  # fused: (experts, in, out) or (experts, out, in)
            parameters += [f"{name}.{own}" for own, p in module.named_parameters(recurse=False) if p.dim() == 3]
    # In some architectures PEFT takes gate_proj and others for the names of experts before they were fused.
    config = LoraConfig(target_modules=layers, target_parameters=parameters)
    conversion.convert_peft_config_for_transformers(config, model, None)
    renamed = [name for name in layers if name not in config.target_modules]
    # When PEFT loads an adapter it renames some layers as if they came from an old checkpoint, and loses their weights.
    keys = {f"base_model.model.{name}.lora_A.weight": name for name in layers if name not in renamed}
    saved = dict.fromkeys(keys, torch.zeros(1, 1))
    loaded = conversion.convert_peft_adapter_state_dict_for_transformers(model, config, saved)
    layers = [name for key, name in keys.items() if key in loaded]
    return layers, parameters + [f"{name}.weight" for name in renamed]


def ends_with(name: str, ends: Iterable[str]) -> bool:
    """Whether a module's name, or its end after a dot, is one of these."""
    return any(f".{name}".endswith(f".{end}") for end in ends)


def add_adapter(
    model: Any, tokenizer: Any, *, rank: int, dropout: float, predictors: int, plain: bool, revision: str | None = None,
    lora_alpha: int | None = None, target_modules: list[str] | None = None, modules_to_save: list[str] | None = None,
    adapter: str | None = None, **peft_options: Any,
) -> Any:  # fmt: skip
    """The model with a LoRA adapter on its text decoder; the rows of added tokens train too.

    These rows are those that load_model has made, the embeddings of the `predictors` predictor tokens in use, and with
    `plain` the embeddings and output rows of the tokens that are labels. Saved are LoRA's weights, these rows, and
    modules of which `modules_to_save` has the ends of the names, as `target_modules` of the weights to adapt (or it is
    ["all-linear"], without fused experts).
    `adapter`: a folder whose adapter is continued, with its own configuration. Raises UsageError if PEFT cannot.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer, ParamWrapper

    names = {module: name for name, module in model.named_modules()}
    embedding, output = names[model.get_input_embeddings()], names[model.get_output_embeddings()]
    ids = tokenizer.convert_tokens_to_ids
    views = ids([predictor_token(i) for i in range(1, predictors + 1)])
    labels = ids([PERCEPTION, END_OF_TURN]) if plain else []
    # Otherwise predictor tokens would keep their random start, and a new end-of-turn token would never be learned.
    rows = {embedding: list(dict.fromkeys(labels + views + model.new_rows))}
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    rows[output] = [] if tied else list(dict.fromkeys(labels + model.new_rows))
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        rows[output] = [i for i in rows[output] if i not in views]  # they are never labels
        if rows[embedding if tied else output]:
            flag = "--lora with --plain" if plain else "--lora"
            why = f"the output layer of {type(model).__name__} has a bias"  # which PEFT would leave out
            raise UsageError(f"{flag}: the rows of new tokens cannot train, because {why}")
    config = LoraConfig.from_pretrained(adapter) if adapter else None
    saved = config.modules_to_save if config else modules_to_save
    rows = {name: found for name, found in rows.items() if found and not ends_with(name, saved or ())}
    if config:
        stored, parameters = config.trainable_token_indices or {}, config.target_parameters
        if any(set(found) - set(stored.get(name, ())) for name, found in rows.items()):
            raise UsageError(f"--model_name {adapter}: the adapter lacks rows of tokens in use; give its --predictors")
        config.lora_dropout = 0.0 if parameters else dropout
        model = load_adapter(model, adapter, is_trainable=True, config=config)
    else:
        layers, parameters = adapter_targets(model)
        if target_modules == ["all-linear"]:
            target_modules, parameters = None, [n for n in parameters if model.get_parameter(n).dim() == 2]
        for end in target_modules or ():
            if not any(ends_with(name, [end]) for name in layers + parameters):
                raise UsageError(f"--target_modules {end}: {type(model).__name__} has no such weights to adapt")
        for end in modules_to_save or ():
            if not any(ends_with(name, [end]) for name in names.values()):
                raise UsageError(f"--modules_to_save {end}: {type(model).__name__} has no such module")
        if tied and any(ends_with(name, modules_to_save or ()) for name in (embedding, output)):
            raise UsageError("--modules_to_save: not the embeddings of a model with tied embeddings")
        if target_modules:
            layers, parameters = ([n for n in found if ends_with(n, target_modules)] for found in (layers, parameters))
        layers = [name for name in layers if not ends_with(name, modules_to_save or ())]
        # In full, because PEFT would also take input_layernorm for norm.
        saved = [name for name in names.values() if ends_with(name, modules_to_save or ())]
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=rank,
            lora_alpha=lora_alpha or 2 * rank,
            lora_dropout=0.0 if parameters else dropout,  # PEFT refuses to have it before single parameters
            target_modules=layers,
            target_parameters=parameters or None,
            trainable_token_indices=rows or None,
            modules_to_save=saved or None,
            **peft_options,
        )
        try:
            model = get_peft_model(model, config, revision=revision)
        except (ValueError, TypeError, AttributeError) as error:  # the last: fused experts have no attribute weight
            raise UsageError(f"--lora: PEFT refuses these options ({first_line(error)})") from None
    for layer in model.modules() if parameters and dropout else ():
        if isinstance(layer, LoraLayer) and not isinstance(layer, ParamWrapper):
            layer.lora_dropout["default"] = torch.nn.Dropout(dropout)
    model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)
    return model


def not_adapted(model: Any) -> list[str]:
    """The weight matrices of the text decoder that an adapter does not reach, with N for the numbers of layers."""
    from peft.tuners.lora import LoraLayer, ParamWrapper
    from peft.utils import ModulesToSaveWrapper

    base = model.get_base_model()
    saved = [m for m in model.modules() if isinstance(m, ModulesToSaveWrapper)]
    ends = (base.get_input_embeddings(), base.get_output_embeddings(), *saved)
    reached = {id(p) for module in ends for p in module.parameters()}
    for m in model.modules():
        if isinstance(m, LoraLayer):
            reached.add(id(m.get_param() if isinstance(m, ParamWrapper) else m.get_base_layer().weight))
    found = {
        re.sub(r"\.\d+(?=\.)", ".N", f"{name}.{own}".replace(".base_layer", "")): None
        for name, module in text_modules(base)
        for own, p in module.named_parameters(recurse=False)
        if p.dim() > 1 and "lora_" not in name and id(p) not in reached
    }
    return list(found)


def blocks_after(model: torch.nn.Module, layer: int, flag: str) -> list[torch.nn.Module]:
    """The block that receives a layer's hidden states: 0 is the embedding layer, −1 the last, which no block receives.

    There are several if a model has towers of equal depth, or lists of a block's parts (XLM): a forward pass shows
    which one receives a text's states first. Raises UsageError if the model has no such layer.
    """
    if layer == -1:
        return []
    lists, inside = [], ()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) and not name.startswith(inside):
            lists.append(module)
            inside += (f"{name}.",)
    lists = [m for m in lists if isinstance(m[0], GradientCheckpointingLayer)] or lists
    count = getattr(model.config.get_text_config(), "num_hidden_layers", 0)  # BLT has several kinds
    if len(lists) == 1:  # LongCat counts each block twice, decoders of encoder-decoder models the encoder's
        count = len(lists[0])
    if not -count - 1 <= layer <= count:
        raise UsageError(f"--{flag} {layer} is not in {-count - 1} to {count}, the layers of {type(model).__name__}")
    if layer == count:
        return []
    blocks = [m[layer % (count + 1)] for m in lists if len(m) == count]
    if not blocks:
        raise UsageError(f"--{flag} {layer}: the layers of {type(model).__name__} are not found; leave it out")
    return blocks


def stop_tokens(config: GenerationConfig, *tokens: int | None) -> list[int]:
    """Ids of the tokens that end generation by its configuration, and of these."""
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return sorted({*known, *tokens} - {None})
