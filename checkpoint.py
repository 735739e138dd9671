"""Models on disk: a Hugging Face folder and back. Nothing loaded here can run code."""

from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from lora import add_lora, load_adapters, weight_deltas
from model import (
    PRECISIONS,
    ModelConfig,
    RopeScaling,
    Transformer,
    empty_model,
    init_weights,
    measure_precision,
    plain_weights,
)
from runtime import World, fail, read_json, require, torch_stream
from tokenizer import Tokenizer, load_tokenizer, word_tokenizer

TINY = ModelConfig(vocab_size=0)  # but for its vocabulary, which follows from the field
FAMILIES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}


def new_model(p: int, seed: int) -> tuple[Transformer, Tokenizer]:
    """The tiny model, random, and its tokenizer."""
    tokenizer = word_tokenizer(p)
    model = Transformer(replace(TINY, vocab_size=len(tokenizer)))
    init_weights(model, torch_stream(seed, "weights"))
    return model, tokenizer


def hf_config(config: ModelConfig, tokenizer: Tokenizer) -> dict:
    """The config.json of a model."""
    special = {f"{name}_token_id": getattr(tokenizer.inner, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return {
        "architectures": [FAMILIES[config.model_type]],
        **asdict(config),
        **special,
        "hidden_act": "silu",
        "attention_bias": config.model_type == "qwen2",
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "dtype": "float32",
    }


def read_config(folder: Path) -> ModelConfig:
    """The shape of the model in a Hugging Face folder; refuses what this transformer does not compute."""
    raw, path = read_json(folder / "config.json"), folder / "config.json"
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        fail(f"{folder} holds a {kind!r} model; supported: qwen2 (Qwen2, Qwen2.5), qwen3, llama (Llama 3, SmolLM2)")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    require(isinstance(rope, dict) and isinstance(raw.get("layer_types") or [], list), f"{path} is no model's")
    scaled = rope.get("rope_type", rope.get("type", "default"))
    biased = (kind != "qwen2" and raw.get("attention_bias")) or raw.get("mlp_bias")
    other = any(layer != "full_attention" for layer in raw.get("layer_types") or []) or raw.get("use_sliding_window")
    if scaled not in ("default", "llama3") or biased or other or raw.get("hidden_act", "silu") != "silu":
        fail(f"{path} asks for a RoPE scaling, biases, sliding windows or an activation that are not supported")
    raw = {"rope_theta": rope.get("rope_theta", 10000.0), "tie_word_embeddings": False, **raw}
    raw["head_dim"] = raw.get("head_dim") or 0
    raw["rope_scaling"] = sound_fields(RopeScaling, rope, path) if scaled == "llama3" else None
    config = sound_fields(ModelConfig, raw, path)
    sizes = config.hidden_size % config.num_attention_heads == 0 or raw["head_dim"]
    sound = sizes and config.num_attention_heads % config.num_key_value_heads == 0 and config.head_dim % 2 == 0
    require(sound, f"{path}: its numbers of heads and its sizes do not go together")
    return config


def sound_fields(kind: type, raw: dict, path: Path):
    """A data class from the fields of a JSON object, which have to be there, of the right type and positive."""
    missing = [field.name for field in fields(kind) if field.name not in raw]
    require(not missing, f"{path} lacks {', '.join(missing)}")
    for field in fields(kind):
        value, number = raw[field.name], field.type in (int, float)
        sound = not number or (isinstance(value, int | field.type) and not isinstance(value, bool) and value > 0)
        sound = sound or (field.name == "head_dim" and value == 0)
        require(sound and (field.type is not bool or isinstance(value, bool)), f"{path}: bad {field.name}")
    return kind(**{field.name: raw[field.name] for field in fields(kind)})


def load_model(
    folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, chat_template: bool = True
) -> tuple[Transformer, Tokenizer]:
    """A model, its matrices in `dtype`, and its tokenizer, from a Hugging Face folder.

    Weights are read one at a time to their place: no second copy of the model is in memory.
    """
    require(folder.is_dir(), f"there is no folder {folder}")
    config = read_config(folder)
    tokenizer = load_tokenizer(folder, chat_template)
    require(len(tokenizer) <= config.vocab_size, f"the tokenizer in {folder} has more words than the model")
    places = find_weights(folder)
    needed = dict(plain_weights(empty_model(config, dtype, "meta"))).keys()
    missing, unknown = needed - places.keys(), places.keys() - needed - {"lm_head.weight"}
    unknown = {name for name in unknown if not name.endswith("rotary_emb.inv_freq")}  # of old Llama checkpoints
    require(not missing, f"the weights in {folder} lack {min(missing, default='')} and {len(missing) - 1} others")
    require(not unknown, f"the weights in {folder} hold {min(unknown, default='')}, which its config.json has not")

    model = empty_model(config, dtype, device)
    for name, weight in plain_weights(model):
        found = read_weight(places[name], name, device)
        require(found.shape == weight.shape, f"the weight {name} in {folder} has not the shape of its config.json")
        weight.copy_(found)
    return model, tokenizer


def find_weights(folder: Path) -> dict[str, Path]:
    """In which file each weight lies. Every file has to be there, and whole."""
    files = [folder / "model.safetensors"]
    if (index := folder / "model.safetensors.index.json").exists():
        weight_map = read_json(index).get("weight_map")
        require(isinstance(weight_map, dict) and bool(weight_map), f"{index} names no weights")
        files = [folder / Path(str(name)).name for name in sorted(set(map(str, weight_map.values())))]
    places = {}
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                places |= dict.fromkeys(opened.keys(), file)
        except (OSError, SafetensorError) as error:
            fail(f"cannot read the weights in {file}: {error}")
    return places


def read_weight(file: Path, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
    with safe_open(file, "pt", device=str(device)) as opened:  # opened for each anew, which lets go of what was read
        return opened.get_tensor(name)


def load_policy(
    config, start: Path, source: Path | None, precision: str, device: torch.device
) -> tuple[Transformer, Tokenizer]:
    """The model that training changes, and its tokenizer: all the weights in fp32 or, with --lora, adapters on the
    start; those of `source` where a run is resumed.
    """
    template = not config.no_chat_template
    if not config.lora:
        return load_model(source or start, "cpu" if config.shard else device, chat_template=template)
    base, tokenizer = load_model(start, device, PRECISIONS[precision], template)
    generator = torch_stream(config.seed, "adapters")
    policy = add_lora(base, config.lora, config.lora_alpha, config.lora_dropout, generator)
    if source:
        load_adapters(policy, source / "adapter")
    return policy, tokenizer


def weights_to_save(model: Transformer, training: dict, leads: bool = True) -> dict[str, torch.Tensor]:
    """The weights in fp32; with LoRA those of the start as they lie on disk, to which the adapters are added.

    Of a sharded model a collective: all processes have to call it, and the one that `leads` gets the weights.
    """
    if training.get("lora"):
        places = find_weights(Path(training["start"]))
        weights = {name: read_weight(places[name], name).float() for name, _ in plain_weights(model)}
        for name, added in weight_deltas(model):
            weights[name] += added
        return weights
    return {name: weight.float().cpu().contiguous() for name, weight in plain_weights(model) if leads}


def load_training(checkpoint: Path) -> dict:
    """What made the checkpoint; empty for one that was not made here."""
    path = checkpoint / "training.json"
    return read_json(path) if path.exists() else {}


def choose_precision(flag: str, model: ModelConfig, source: Path | None, world: World) -> str:
    """The precision to compute in: the same on all processes and as what made the checkpoint `source` computed in."""
    made_in = load_training(source).get("computed_in") if source and flag == "auto" else None
    if made_in in PRECISIONS:
        return made_in
    return world.gather([measure_precision(model, world.device) if flag == "auto" else flag])[0]
