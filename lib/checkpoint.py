"""Models on disk: a Hugging Face folder and back. Nothing loaded here can run code."""

from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from lib.distributed import World
from lib.flags import fail, parse_json, read_json, require, user_errors
from lib.lora import adapters_alone, add_lora, load_adapters, weight_deltas
from lib.policy import DTYPES, detect_dtype, empty_model
from lib.rng import torch_rng
from lib.tokenizer import Tokenizer, load_tokenizer, word_tokenizer
from lib.transformer import ModelConfig, RopeScaling, Transformer, hf_weights, init_weights

TINY = ModelConfig(vocab_size=0)  # the task's vocabulary sets the size
FAMILIES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
CONFIGS = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}
# By these transformers would read other files, or make other layers.
FOREIGN = ("quantization_config", "transformers_weights", "configuration_files", "text_config")
FOREIGN += ("per_layer_config", "fusion_config", "decoder", "generator", "text_encoder")
FOREIGN += ("attribute_map",)


def new_model(words: list[str], seed: int) -> tuple[Transformer, Tokenizer]:
    """Return the tiny model, with random weights, and a tokenizer over `words`."""
    tokenizer = word_tokenizer(words)
    model = Transformer(replace(TINY, vocab_size=len(tokenizer)))
    init_weights(model, torch_rng(seed, "weights"))
    return model, tokenizer


def hf_config(config: ModelConfig, tokenizer: Tokenizer) -> dict:
    """Return the config.json of a model."""
    raw = {"architectures": [FAMILIES[config.model_type]], **asdict(config)}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        raw[name] = getattr(tokenizer.inner, name)
    raw |= {"hidden_act": "silu", "attention_bias": config.model_type == "qwen2"}
    raw |= {"attention_dropout": 0.0, "use_sliding_window": False, "dtype": "float32"}
    return raw | {"transformers_version": transformers.__version__}


def read_config(folder: Path) -> ModelConfig:
    """Read a Hugging Face folder's config.json; refuse what this transformer does not compute."""
    path = folder / "config.json"
    raw = read_json(path)
    config = parse_config(raw, path)
    rope = config.rope_parameters
    scaling = rope.get("rope_type") if isinstance(rope, dict) else None
    supported = scaling in ("default", "llama3") and rope.get("partial_rotary_factor", 1) == 1
    require(supported, f"{path}: this kind of RoPE scaling is not supported")
    biases = config.model_type != "qwen2" and config.attention_bias
    require(not biases and not getattr(config, "mlp_bias", False), f"{path}: no such biases here")
    layers = getattr(config, "layer_types", None) or ()
    sliding = any(layer != "full_attention" for layer in layers)
    sliding = sliding or getattr(config, "use_sliding_window", False)
    if config.model_type == "llama":  # transformers has no mask for it, but its cache forgets
        windows = raw.get("sliding_window"), raw.get("attention_chunk_size")
        sliding = sliding or windows != (None, None)
    require(not sliding, f"{path}: sliding windows are not supported")
    require(raw.get("is_causal", True) is True, f"{path}: only causal attention is supported")
    require(config.hidden_act == "silu", f"{path}: the activation has to be silu")

    values = {field.name: getattr(config, field.name, None) for field in fields(ModelConfig)}
    H, K, V = config.num_attention_heads, config.num_key_value_heads, config.vocab_size
    values["head_dim"] = getattr(config, "head_dim", H and config.hidden_size // H)
    values |= {"rope_theta": rope.get("rope_theta"), "rope_scaling": None}
    if scaling == "llama3":
        llama3 = values["rope_scaling"] = parse_dataclass(RopeScaling, rope, path)
        ordered = llama3.low_freq_factor < llama3.high_freq_factor and llama3.factor >= 1
        require(ordered, f"{path}: bad factors of RoPE")
    ours, pad = parse_dataclass(ModelConfig, values, path), config.pad_token_id
    require(1 < ours.rope_theta < 1e18, f"{path}: bad rope_theta")
    sound = H % K == 0 and ours.head_dim % 2 == 0
    require(sound, f"{path}: its numbers of heads and its sizes do not go together")
    require(pad is None or -V <= pad < V, f"{path}: pad_token_id is no token")
    return ours


def parse_config(raw: dict, path: Path) -> PretrainedConfig:
    """Let transformers parse a config.json: its types, defaults and the spellings of RoPE."""
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        supported = "qwen2 (Qwen2, Qwen2.5), qwen3, llama (Llama 3, SmolLM2)"
        fail(f"{path.parent} holds a {kind!r} model; supported: {supported}")
    foreign = min((name for name in FOREIGN if raw.get(name) is not None), default="")
    require(not foreign, f"{path}: {foreign} is not supported")
    try:
        config = CONFIGS[kind].from_dict(raw | {"dtype": "float32"})
        config.standardize_rope_params()  # as its models do once more: outer values win now
    except Exception as error:  # whatever it trips over
        fail(f"{path} is no model's config to transformers: {str(error)[:300]}")
    return config


def parse_dataclass(kind: type, raw: dict, path: Path):
    """Make a data class of a JSON object's fields; refuse missing, mistyped and negative ones."""
    missing = [field.name for field in fields(kind) if field.name not in raw]
    require(not missing, f"{path} lacks {', '.join(missing)}")
    for field in fields(kind):
        value = raw[field.name]
        sound = field.type is not bool or isinstance(value, bool)
        if field.type in (int, float):
            number = isinstance(value, int | field.type) and not isinstance(value, bool)
            sound = number and value > 0
        require(sound, f"{path}: bad {field.name}")
    return kind(**{field.name: raw[field.name] for field in fields(kind)})


def load_model(
    folder: Path, device: torch.device | str = "cpu", dtype=torch.float32, chat_template=True
) -> tuple[Transformer, Tokenizer]:
    """Load a model, its matrices in `dtype`, and its tokenizer from a Hugging Face folder.

    Weights are read one at a time into place: memory never holds a second copy of the model.
    """
    require(folder.is_dir(), f"there is no folder {folder}")
    adapters = folder / "adapter_config.json"
    require(not adapters.exists(), f"{adapters}: merge these adapters into their model first")
    config = read_config(folder)
    tokenizer = load_tokenizer(folder, chat_template)
    tokens = set(tokenizer.inner.get_vocab().values())
    require(max(tokens) < config.vocab_size, f"{folder}: more words in tokenizer than model")
    alone = (folder / "adapter").is_dir() and not (folder / "model.safetensors").exists()
    require(not alone, adapters_alone(folder))
    with user_errors():
        files = find_weights(folder)
    names = dict(hf_weights(empty_model(config, dtype, "meta"))).keys()
    missing, unknown = names - files.keys(), files.keys() - names - {"lm_head.weight"}
    unknown = {n for n in unknown if not n.endswith("rotary_emb.inv_freq")}  # old Llama checkpoints
    example = min(missing or unknown, default="")
    require(not missing, f"the weights in {folder} lack {example} and {len(missing) - 1} others")
    require(not unknown, f"the weights in {folder} hold {example}, which its config.json has not")

    head, embeddings = "lm_head.weight", "model.embed_tokens.weight"
    if config.tie_word_embeddings and head in files:
        both = [read_weight(files[name], name).float() for name in (head, embeddings)]
        config = replace(config, tie_word_embeddings=torch.equal(*both))  # as transformers 5 does
    model = empty_model(config, dtype, device)
    for name, weight in hf_weights(model):
        loaded = read_weight(files[name], name, device)
        require(loaded.shape == weight.shape, f"{folder}: the shape of {name} is not config.json's")
        weight.copy_(loaded)
    model.allow_tokens(tokens)
    return model, tokenizer


def find_weights(folder: Path) -> dict[str, Path]:
    """Return the file of each weight. Raises ValueError unless every file is there, and whole."""
    files = [folder / "model.safetensors"]
    if any(folder.glob("shard-*-model-*.safetensors")):  # transformers would take these
        raise ValueError(f"{folder} holds a checkpoint of torch.distributed")
    index = folder / "model.safetensors.index.json"
    if index.exists():
        if files[0].exists():  # the index may be left over; transformers would not say so
            raise ValueError(f"{folder} holds both {files[0].name} and {index.name}: delete one")
        content = parse_json(index)
        weight_map = content.get("weight_map")
        sound = isinstance(weight_map, dict) and isinstance(content.get("metadata"), dict)
        if not sound or not all(str(x).endswith(".safetensors") for x in weight_map.values()):
            raise ValueError(f"{index} names no weights")
        files = [folder / str(name) for name in sorted(set(map(str, weight_map.values())))]
    weight_files: dict[str, Path] = {}
    for file in files:
        if file.parent != folder:
            raise ValueError(f"{index} names {file}, which does not lie in {folder}")
        try:
            with safe_open(file, "pt") as opened:
                names = opened.keys()
        except (OSError, SafetensorError) as error:
            raise ValueError(f"cannot read the weights in {file}: {error}") from None
        for name in names:
            if name in weight_files:
                raise ValueError(f"{name} lies in {weight_files[name]} and again in {file}")
            weight_files[name] = file
    return weight_files


def read_weight(file: Path, name: str, device: torch.device | str = "cpu") -> Tensor:
    # Reopened per weight, so that earlier pages of the mmap can be released.
    with safe_open(file, "pt", device=str(device)) as opened:
        return opened.get_tensor(name)


def load_master(
    config, init: Path, resume_from: Path | None, precision: str, device: torch.device
) -> tuple[Transformer, Tokenizer]:
    """Load the weights that training changes, from `resume_from` where given, and the tokenizer.

    These are all weights in fp32 or, with --lora, adapters on the frozen `init`.
    """
    template = not config.no_chat_template
    if not config.lora:
        device = "cpu" if config.fsdp else device
        return load_model(resume_from or init, device, chat_template=template)
    base, tokenizer = load_model(init, device, DTYPES[precision], template)
    if resume_from:
        same = base.config == read_config(resume_from)
        require(same, f"{init / 'config.json'} is not the one that {resume_from} started from")
    generator = torch_rng(config.seed, "adapters")
    master = add_lora(base, config.lora, config.lora_alpha, config.lora_dropout, generator)
    if resume_from:
        load_adapters(master, resume_from / "adapter")
    return master, tokenizer


def weights_to_save(model: Transformer, meta: dict, is_master: bool) -> dict[str, Tensor] | None:
    """Return the weights in fp32; with LoRA, the start's as they lie on disk plus the adapters.

    None if the start is gone or has changed. Of a sharded model a collective: all processes have
    to call it, and rank 0 gets the weights.
    """
    if meta.get("lora") and is_master:
        return merged_weights(model, Path(meta["init_from"]))
    weights = hf_weights(model)
    return {name: weight.float().cpu().contiguous() for name, weight in weights if is_master}


def merged_weights(model: Transformer, start: Path) -> dict[str, Tensor] | None:
    """Return the weights in `start` plus the adapters, in fp32; None if it has others or none.

    They are read again, since the model may hold them in bf16.
    """
    try:
        files, weights = find_weights(start), {}
        for name, loaded in hf_weights(model):
            weights[name] = read_weight(files[name], name).float()
            if not torch.equal(weights[name].to(loaded.dtype), loaded.cpu()):
                return None
    except (OSError, ValueError, KeyError, SafetensorError):
        return None
    for name, delta in weight_deltas(model):
        weights[name] += delta
    return weights


def load_meta(checkpoint: Path) -> dict:
    """Return what made the checkpoint; empty for one that was not made here."""
    path = checkpoint / "training.json"
    meta = read_json(path) if path.exists() else {}
    texts = ("stage", "relabel", "init_from", "init_beside", "init_name", "init_sha256")
    kinds = {str: (*texts, "data", "answer_pattern"), bool: ("no_chat_template",)}
    kinds |= {int: ("field", "update", "total", "lora", "max_new_tokens"), dict: ("inputs",)}
    for kind, names in kinds.items():
        wrong = [name for name in names if type(meta.get(name, kind())) is not kind]
        require(not wrong, f"{path}: bad {', '.join(wrong)}")
    return meta


def choose_dtype(flag: str, config: ModelConfig, checkpoint: Path | None, world: World) -> str:
    """Return the precision to compute in, "fp32" or "bf16", the same on all processes.

    `--precision auto` keeps that of the run that made `checkpoint`, else measures.
    """
    if flag == "auto" and checkpoint:
        trained_in = load_meta(checkpoint).get("compute_dtype")
        if trained_in in DTYPES:
            return trained_in
    choice = detect_dtype(config, world.device) if flag == "auto" else flag
    return world.all_gather([choice])[0]
