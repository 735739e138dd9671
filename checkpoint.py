"""Models, tokenizers and logs on disk. A checkpoint is a Hugging Face folder `RUN/step-N`.

Beside the model lie `training.json` (what made it) and `training_state.pt` (the optimizer, for an exact resume; all
random streams are made from the update's number). A folder is written under another name and renamed when complete,
so a checkpoint that was interrupted does not exist. Nothing loaded here can run code.
"""

import json
import os
import re
import shutil
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from data.finite_field import vocabulary
from model import ModelConfig, Transformer, init_weights, measure_precision
from runtime import World, fail, refusals, require, torch_stream

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"

# ------------------------------------------------------------------------------------------------------------------
# Tokenizers


def word_tokenizer(p: int) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the vocabulary of GF(p); white space of any kind separates words."""
    words = {word: i for i, word in enumerate([PAD, EOS, UNKNOWN, *vocabulary(p)])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN)


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def decode(tokenizer: PreTrainedTokenizerFast, rows: list[list[int]]) -> list[str]:
    return tokenizer.batch_decode(rows)


def is_word_level(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the tokenizer is that of a model made here from scratch, and not a pretrained model's."""
    return isinstance(tokenizer.backend_tokenizer.model, models.WordLevel)


def check_tokenizer(tokenizer: PreTrainedTokenizerFast, p: int) -> None:
    """Refuse a tokenizer that cannot write the problems of GF(p)."""
    text = " ".join(vocabulary(p))
    if decode(tokenizer, [encode(tokenizer, text)])[0].split() != text.split():
        known = set(decode(tokenizer, [encode(tokenizer, text)])[0].split())
        missing = next(word for word in text.split() if word not in known)
        fail(f"the model's tokenizer has no word for {missing!r}, which problems of GF({p}) need")


# ------------------------------------------------------------------------------------------------------------------
# Models


def new_model(p: int, seed: int) -> tuple[Transformer, PreTrainedTokenizerFast]:
    """The tiny model, random, and its tokenizer."""
    tokenizer = word_tokenizer(p)
    model = Transformer(ModelConfig(vocab_size=len(tokenizer)))
    init_weights(model, torch_stream(seed, "weights"))
    return model, tokenizer


def hf_config(config: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> dict:
    """The config.json of a model."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        **asdict(config),
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        fail(f"cannot read {path}: {error}")
    require(isinstance(value, dict), f"cannot read {path}: it holds no JSON object")
    return value


def read_config(folder: Path) -> ModelConfig:
    raw = read_json(folder / "config.json")
    if raw.get("model_type") != "qwen2":
        fail(f"{folder} holds a {raw.get('model_type')!r} model; supported: qwen2 (Qwen2, Qwen2.5)")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or raw.get("use_sliding_window") or raw.get("hidden_act", "silu") != "silu":
        fail(f"{folder} uses scaled RoPE, sliding-window attention or an activation other than SiLU: not supported")
    raw = {"rope_theta": rope.get("rope_theta", 10000.0), "tie_word_embeddings": False, **raw}
    missing = [field.name for field in fields(ModelConfig) if field.name not in raw]
    require(not missing, f"{folder / 'config.json'} lacks {', '.join(missing)}")
    for field in fields(ModelConfig):
        sound = isinstance(raw[field.name], field.type | int if field.type is float else field.type)
        require(sound and (field.type is bool or raw[field.name] > 0), f"{folder / 'config.json'}: bad {field.name}")
    return ModelConfig(**{field.name: raw[field.name] for field in fields(ModelConfig)})


JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def join_projections(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a Hugging Face checkpoint -> weights of our model, which joins some matrices into one."""
    joined = dict(weights)
    for whole, parts in JOINED.items():
        for name in [name for name in weights if f".{parts[0]}." in name]:
            pieces = [joined.pop(other) for part in parts if (other := name.replace(parts[0], part)) in joined]
            joined[name.replace(parts[0], whole)] = torch.cat(pieces)
    return joined


def split_projections(weights: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The way back."""
    kv = config.num_key_value_heads * config.head_dim
    sizes = {
        "qkv_proj": (config.num_attention_heads * config.head_dim, kv, kv),
        "gate_up_proj": (config.intermediate_size,) * 2,
    }
    split = {}
    for name, weight in weights.items():
        whole = next((whole for whole in JOINED if f".{whole}." in name), None)
        names = [name.replace(whole, part) for part in JOINED[whole]] if whole else [name]
        split |= zip(names, weight.split(sizes[whole]) if whole else [weight])
    return split


def load_model(folder: Path, device: torch.device | str = "cpu") -> tuple[Transformer, PreTrainedTokenizerFast]:
    """A model in fp32, and its tokenizer, from a Hugging Face folder."""
    require(folder.is_dir(), f"there is no folder {folder}")
    config = read_config(folder)
    shards = [folder / "model.safetensors"]
    if (index := folder / "model.safetensors.index.json").exists():
        shards = [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
    weights = {}
    for shard in shards:
        try:
            weights |= load_file(shard)
        except (OSError, SafetensorError) as error:
            fail(f"cannot read the weights in {shard}: {error}")
    model = Transformer(config)
    weights = join_projections(weights)
    if config.tie_word_embeddings and "model.embed_tokens.weight" in weights:
        weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        fail(f"the weights in {folder} are not those of its config.json: {str(error)[:300]}")
    try:
        # AutoTokenizer would put Qwen2's own BPE in the place of whatever tokenizer.json says.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises no narrower one
        fail(f"cannot read the tokenizer in {folder}: {str(error)[:300]}")
    require(len(tokenizer) <= config.vocab_size, f"the tokenizer in {folder} has more words than the model")
    return model.to(device), tokenizer


def stop_tokens(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    require(tokenizer.eos_token_id is not None, "the model's tokenizer names no end-of-sequence token")
    return [tokenizer.eos_token_id]


# ------------------------------------------------------------------------------------------------------------------
# Runs


MAY_DIFFER = {"out", "resume", "eval_every", "save_every"}  # flags that a resumed run may change


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


def choose_precision(config, model: Transformer, source: Path | None, world: World) -> str:
    """The precision to compute in, the same on all processes and, in a run resumed from `source`, as at its start."""
    if source:
        return load_training(source).get("computed_in", "fp32")
    return world.gather([measure_precision(model) if config.precision == "auto" else config.precision])[0]


def save_checkpoint(
    run: Path,
    update: int,
    model: Transformer,
    tokenizer: PreTrainedTokenizerFast,
    optimizer: torch.optim.Optimizer,
    training: dict,
) -> Path:
    """Write RUN/step-UPDATE whole or not at all; `training` says what made it, as JSON."""
    folder, draft = run / f"step-{update}", run / f".step-{update}.part"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        _write_checkpoint(draft, model, tokenizer, optimizer, {"update": update, **training})
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(draft, folder)
    except (OSError, SafetensorError, RuntimeError) as error:  # a full disk, mostly
        shutil.rmtree(draft, ignore_errors=True)
        fail(f"cannot write the checkpoint {folder}: {error}")
    return folder


def _write_checkpoint(
    draft: Path,
    model: Transformer,
    tokenizer: PreTrainedTokenizerFast,
    optimizer: torch.optim.Optimizer,
    training: dict,
) -> None:
    draft.mkdir(parents=True)
    weights = split_projections({name: w.detach() for name, w in model.state_dict().items()}, model.config)
    weights = {name: w.contiguous() for name, w in weights.items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    save_file(weights, draft / "model.safetensors", {"format": "pt"})
    tokenizer.save_pretrained(draft)
    write_json(draft / "config.json", hf_config(model.config, tokenizer))
    stops = {"eos_token_id": stop_tokens(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    write_json(draft / "generation_config.json", stops)
    write_json(draft / "training.json", training)
    torch.save(optimizer.state_dict(), draft / "training_state.pt")


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def newest_checkpoint(run: Path) -> Path | None:
    """RUN/step-N with the largest N; None where there is none."""
    steps = {int(m[1]): p for p in run.glob("step-*") if (m := re.fullmatch(r"step-(\d+)", p.name))}
    return steps[max(steps)] if steps else None


def find_checkpoint(path: Path) -> Path:
    """A checkpoint folder, or the newest checkpoint of a run folder."""
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
        self.path.write_text("".join(json.dumps(row) + "\n" for row in rows if row["update"] <= update))

    def write(self, row: dict) -> None:
        with self.path.open("a") as file:
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
