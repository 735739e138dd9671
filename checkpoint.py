"""Models and logs on disk. A checkpoint is a Hugging Face folder `RUN/step-N`.

Beside the model lie `training.json` (what made it) and `training_state.pt` (the optimizer, for an exact resume; all
random streams are made from the update's number); with LoRA the model has its adapters merged, and `adapter/` holds
them by themselves. A folder is written under another name and renamed when complete, so a checkpoint that was
interrupted does not exist. Nothing loaded here can run code.
"""

import json
import os
import re
import shutil
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lora import add_lora, load_adapters, save_adapters, updates
from model import (
    PRECISIONS,
    ModelConfig,
    RopeScaling,
    Transformer,
    init_weights,
    lower,
    measure_precision,
    plain_weights,
)
from runtime import World, fail, read_json, refusals, require, torch_stream, write_json
from tokenizer import Tokenizer, load_tokenizer, word_tokenizer

TINY = ModelConfig(vocab_size=0)  # but for its vocabulary, which follows from the field
FAMILIES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}

# ------------------------------------------------------------------------------------------------------------------
# Models


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
    other = set(raw.get("layer_types") or []) - {"full_attention"} or raw.get("use_sliding_window")
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
    with torch.device("meta"):  # shapes without memory
        model = lower(Transformer(config), dtype)
    places = find_weights(folder)
    needed = plain_weights(model)
    missing, unknown = needed.keys() - places, places.keys() - needed - {"lm_head.weight"}
    unknown = {name for name in unknown if not name.endswith("rotary_emb.inv_freq")}  # of old Llama checkpoints
    require(not missing, f"the weights in {folder} lack {min(missing, default='')} and {len(missing) - 1} others")
    require(not unknown, f"the weights in {folder} hold {min(unknown, default='')}, which its config.json has not")

    model.to_empty(device=device)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    for name, weight in plain_weights(model).items():
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
        return load_model(source or start, device, chat_template=template)
    base, tokenizer = load_model(start, device, PRECISIONS[precision], template)
    generator = torch_stream(config.seed, "adapters")
    policy = add_lora(base, config.lora, config.lora_alpha, config.lora_dropout, generator)
    if source:
        load_adapters(policy, source / "adapter")
    return policy, tokenizer


# ------------------------------------------------------------------------------------------------------------------
# Runs


MAY_DIFFER = {"out", "resume", "eval_every", "save_every", "keep"}  # flags that a resumed run may change


def open_run(run: Path, config, stage: str, world: World) -> int:
    """Make the run folder, or with `config.resume` find where it stopped; the number of updates done.

    Refuses to start where a run already lies, and to resume it with other flags or on other processes.
    """
    newest = newest_checkpoint(run)
    if not config.resume:
        require(newest is None, f"{run} holds a run already: --resume continues it, --out names another place")
        with refusals():
            run.mkdir(parents=True, exist_ok=True)
        return 0
    require(newest is not None, f"{run} holds no checkpoint to resume")
    training = load_training(newest)
    require(training.get("stage") == stage, f"{newest} is no checkpoint of this script")
    then, now = training["processes"], world.size
    require(then == now, f"{run} was started on {then} processes and cannot go on with {now}")
    for name, value in asdict(config).items():
        if name not in MAY_DIFFER and name in training and training[name] != value:
            fail(f"{run} was started with --{name.replace('_', '-')} {training[name]}, not {value}")
    return training["update"]


def choose_precision(flag: str, model: ModelConfig, source: Path | None, world: World) -> str:
    """The precision to compute in: the same on all processes and as what made the checkpoint `source` computed in."""
    made_in = load_training(source).get("computed_in") if source and flag == "auto" else None
    if made_in in PRECISIONS:
        return made_in
    return world.gather([measure_precision(model, world.device) if flag == "auto" else flag])[0]


def save_checkpoint(
    run: Path,
    update: int,
    model: Transformer,
    tokenizer: Tokenizer,
    optimizer: torch.optim.Optimizer,
    training: dict,
) -> Path:
    """Write RUN/step-UPDATE whole or not at all; `training` says what made it, as JSON.

    Of the run's checkpoints the newest training["keep"] stay, or all where that is 0.
    """
    folder, draft = run / f"step-{update}", run / f".step-{update}.part"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        _write_checkpoint(draft, model, tokenizer, optimizer, {"update": update, **training})
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(draft, folder)
    except (OSError, SafetensorError, RuntimeError) as error:  # a full disk, mostly
        fail(f"cannot write the checkpoint {folder}: {error}")
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    if keep := training.get("keep", 0):
        for old in checkpoints(run)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    return folder


def _write_checkpoint(
    draft: Path,
    model: Transformer,
    tokenizer: Tokenizer,
    optimizer: torch.optim.Optimizer,
    training: dict,
) -> None:
    draft.mkdir(parents=True)
    save_file(weights_to_save(model, training), draft / "model.safetensors", {"format": "pt"})
    tokenizer.inner.save_pretrained(draft)
    write_json(draft / "config.json", hf_config(model.config, tokenizer))
    stops = {"eos_token_id": tokenizer.stops, "pad_token_id": tokenizer.inner.pad_token_id}
    write_json(draft / "generation_config.json", stops)
    write_json(draft / "training.json", training)
    torch.save(optimizer.state_dict(), draft / "training_state.pt")
    if training.get("lora"):
        save_adapters(model, training["start"], draft / "adapter")


def weights_to_save(model: Transformer, training: dict) -> dict[str, torch.Tensor]:
    """The weights in fp32; with LoRA those of the start as they lie on disk, to which the adapters are added."""
    weights = plain_weights(model)
    if training.get("lora"):
        places = find_weights(Path(training["start"]))
        weights = {name: read_weight(places[name], name).float() for name in weights}
        for name, added in updates(model):
            weights[name] += added
        return weights
    return {name: weight.float().cpu().contiguous() for name, weight in weights.items()}


def checkpoints(run: Path) -> list[Path]:
    """The folders RUN/step-N, by N."""
    steps = {int(m[1]): p for p in run.glob("step-*") if (m := re.fullmatch(r"step-(\d+)", p.name))}
    return [steps[n] for n in sorted(steps)]


def newest_checkpoint(run: Path) -> Path | None:
    """RUN/step-N with the largest N; None where there is none."""
    return next(reversed(checkpoints(run)), None)


def find_checkpoint(name: str) -> Path:
    """A checkpoint folder, the newest checkpoint of a run folder, or a model from the Hugging Face hub or its cache."""
    path = Path(name)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not path.exists() and path.parts[0] not in ("runs", "models"):
        try:
            return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
        except Exception as error:  # no such model, no permission, no network: dozens of kinds
            fail(f"there is no folder {name}, nor can the hub be asked for that model: {str(error)[:300]}")
    if (path / "config.json").exists():
        return path
    require(path.is_dir(), f"there is no folder {path}")
    found = newest_checkpoint(path)
    require(found is not None, f"{path} holds no checkpoint: neither config.json nor step-N folders")
    return found


def load_training(checkpoint: Path) -> dict:
    """What made the checkpoint; empty for one that was not made here."""
    path = checkpoint / "training.json"
    return read_json(path) if path.exists() else {}


def load_optimizer(checkpoint: Path, optimizer: torch.optim.Optimizer) -> None:
    try:
        state = torch.load(checkpoint / "training_state.pt", weights_only=True, map_location="cpu")
        optimizer.load_state_dict(state)
    except Exception as error:  # a cut file fails in many ways
        fail(f"cannot read the optimizer in {checkpoint / 'training_state.pt'}: {str(error)[:200]}")


class Log:
    """metrics.jsonl of a run: a row an update. Rows after `update`, of a run that resumes there, are dropped."""

    def __init__(self, run: Path, update: int):
        self.path = run / "metrics.jsonl"
        rows = read_log(self.path) if self.path.exists() else []
        with refusals():
            self.path.write_text("".join(json.dumps(row) + "\n" for row in rows if row["update"] <= update))

    def write(self, row: dict) -> None:
        with refusals(), self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def read_log(path: Path) -> list[dict]:
    """The rows of a log; a last line that a crash cut short is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
