"""Models on disk: a Hugging Face folder and back. Nothing loaded here can run code.

    python -m lib.checkpoint merge ckpt/qwen merged    # a model of a run that stopped midway

While a run trains LoRA adapters, its checkpoints hold these alone. Whatever loads such a checkpoint
adds them to the model that the run started from. The command writes the merged model to a new
folder and leaves the checkpoint: another run may have started from it and find it by its hash.
"""

import hashlib
import os
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import CONFIG_MAPPING

from lib.distributed import World
from lib.files import MANIFEST, sha256, verify_manifest, written_whole
from lib.flags import (
    fail,
    parse_flags,
    parse_json,
    quiet_pipes,
    read_json,
    require,
    user_errors,
    warn,
    write_json,
)
from lib.lora import adapters_alone, add_adapters, add_lora, load_adapters, read_adapters
from lib.policy import DTYPES, detect_dtype, empty_model
from lib.rng import torch_rng
from lib.tokenizer import Tokenizer, load_tokenizer
from lib.transformer import ModelConfig, RopeScaling, Transformer, hf_weights, init_weights

TINY = ModelConfig(vocab_size=0)  # the task's vocabulary sets the size
FAMILIES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}


def new_model(vocab_size: int, seed: int) -> Transformer:
    """Return the tiny model, with random weights."""
    model = Transformer(replace(TINY, vocab_size=vocab_size))
    init_weights(model, torch_rng(seed, "weights"))
    return model


def hf_config(config: ModelConfig, tokenizer: Tokenizer) -> dict:
    """Return the config.json of a model."""
    raw = {"architectures": [FAMILIES[config.model_type]], **asdict(config)}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        raw[name] = getattr(tokenizer.inner, name)
    raw |= {"hidden_act": "silu", "attention_bias": config.model_type == "qwen2"}
    raw |= {"attention_dropout": 0.0, "use_sliding_window": False, "dtype": "float32"}
    return raw | {"transformers_version": transformers.__version__}


def read_config(folder: Path) -> ModelConfig:
    """Read a Hugging Face folder's config.json; refuse what this transformer does not compute.

    Other biases or layers than ours have other weights, which `load_model` refuses.
    """
    path = folder / "config.json"
    raw = read_json(path)
    kind = raw.get("model_type")
    supported = "qwen2 (Qwen2, Qwen2.5), qwen3, llama (Llama 3, SmolLM2)"
    require(kind in [*FAMILIES], f"{folder} holds a {kind!r} model; supported: {supported}")
    try:
        config = CONFIG_MAPPING[kind].from_dict(raw | {"dtype": "float32"})  # checks types, too
        config.standardize_rope_params()  # as its models do once more: outer values win now
        rope, layers = config.rope_parameters, getattr(config, "layer_types", None) or ()
        scaling = rope["rope_type"]
        known = scaling in ("default", "llama3") and rope.get("partial_rotary_factor", 1) == 1
        require(known, f"{path}: this kind of RoPE scaling is not supported")
        sliding = any(layer != "full_attention" for layer in layers)
        sliding = sliding or getattr(config, "use_sliding_window", False)
        require(not sliding, f"{path}: sliding windows are not supported")
        require(config.hidden_act == "silu", f"{path}: the activation has to be silu")

        values = {field.name: getattr(config, field.name, 0) for field in fields(ModelConfig)}
        values |= {"rope_theta": float(rope["rope_theta"]), "rope_scaling": None}
        if scaling == "llama3":
            scaled = {field.name: rope[field.name] for field in fields(RopeScaling)}
            values["rope_scaling"] = RopeScaling(**scaled)
        ours = ModelConfig(**values)
        sound = ours.num_attention_heads % ours.num_key_value_heads == 0 and ours.head_dim % 2 == 0
        require(sound, f"{path}: its numbers of heads and its sizes do not go together")
        return ours
    except Exception as error:  # whatever transformers trips over, or what is missing
        fail(f"{path} is no model's config: {type(error).__name__}: {str(error)[:300]}")


def load_model(
    folder: Path, device: torch.device | str = "cpu", dtype=torch.float32, chat_template=True
) -> tuple[Transformer, Tokenizer]:
    """Load a model, its matrices in `dtype`, and its tokenizer from a Hugging Face folder.

    Weights are read one at a time into place: memory never holds a second copy of the model.
    """
    require(folder.is_dir(), f"there is no folder {folder}")
    adapters = folder / "adapter_config.json"  # transformers would add these
    require(not adapters.exists(), f"{adapters}: merge these adapters into their model first")
    config = read_config(folder)
    tokenizer = load_tokenizer(folder, chat_template)
    tokens = set(tokenizer.inner.get_vocab().values())
    require(max(tokens) < config.vocab_size, f"{folder}: more words in tokenizer than model")
    with user_errors():
        files, adapters = find_parts(folder)
    names = dict(hf_weights(empty_model(config, dtype, "meta"))).keys()
    missing, unknown = names - files.keys(), files.keys() - names - {"lm_head.weight"}
    example = min(missing or unknown, default="")
    require(not missing, f"the weights in {folder} lack {example} and {len(missing) - 1} others")
    require(not unknown, f"the weights in {folder} hold {example}, which its config.json has not")

    head, embeddings = "lm_head.weight", "model.embed_tokens.weight"
    if config.tie_word_embeddings and head in files:
        both = [read_weight(files[name], name).float() for name in (head, embeddings)]
        config = replace(config, tie_word_embeddings=torch.equal(*both))  # as transformers 5 does
    model = empty_model(config, dtype, device)
    for name, weight in hf_weights(model):
        loaded = read_weight(files[name], name, "cpu" if adapters else device)
        for of_checkpoint, scale in adapters:
            loaded = add_adapters(name, loaded, of_checkpoint, scale)
        require(loaded.shape == weight.shape, f"{folder}: the shape of {name} is not config.json's")
        weight.copy_(loaded)
    model.n_logits = max(tokens) + 1
    return model, tokenizer


def save_configs(folder: Path, config: ModelConfig, tokenizer: Tokenizer, meta: dict) -> None:
    """Write a Hugging Face folder without weights, and its training.json."""
    tokenizer.save(folder)
    stops = {"eos_token_id": tokenizer.stops, "pad_token_id": tokenizer.inner.pad_token_id}
    write_json(folder / "config.json", hf_config(config, tokenizer))
    write_json(folder / "generation_config.json", stops)
    write_json(folder / "training.json", meta)


def save_weights(weights: dict[str, Tensor], folder: Path) -> None:
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def holds_adapters_alone(folder: Path) -> bool:
    """Whether a checkpoint holds LoRA adapters without the model that they are merged into."""
    return (folder / "adapter").is_dir() and not any(folder.glob("model.safetensors*"))


def find_parts(folder: Path) -> tuple[dict[str, Path], list[tuple[dict[str, Tensor], float]]]:
    """Return the file of each weight, and the adapters to add in turn, with their scales.

    Raises ValueError if there are no weights; refuses adapters whose start is gone.
    """
    if not holds_adapters_alone(folder):
        return find_weights(folder), []
    meta = load_meta(folder)
    start = find_start(folder.parent, meta)
    require(start is not None, adapters_alone(folder, meta["init_from"]))
    files, adapters = find_parts(start)  # the start may hold adapters alone, too
    ours = read_adapters(folder / "adapter"), meta["lora_alpha"] / meta["lora"]
    return files, [*adapters, ours]


def find_weights(folder: Path) -> dict[str, Path]:
    """Return the file of each weight. Raises ValueError if one cannot be read."""
    files, index = [folder / "model.safetensors"], folder / "model.safetensors.index.json"
    if not files[0].exists() and index.exists():
        names = parse_json(index).get("weight_map", {})  # none: all weights are missing
        if not isinstance(names, dict) or not all(isinstance(x, str) for x in names.values()):
            raise ValueError(f"cannot read {index}: its weight_map names no files")
        files = [folder / name for name in sorted(set(names.values()))]
    weight_files: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                weight_files |= dict.fromkeys(opened.keys(), file)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"cannot read the weights in {file}: {error}") from None
    return weight_files


def read_weight(file: Path, name: str, device: torch.device | str = "cpu") -> Tensor:
    # Reopened per weight, so that earlier pages of the mmap can be released.
    with safe_open(file, "pt", device=str(device)) as opened:
        return opened.get_tensor(name)


def load_master(
    config, init: Path, resume_from: Path | None, precision: str, device: torch.device
) -> Transformer:
    """Load the weights that training changes, from `resume_from` where given.

    These are all weights in fp32 or, with --lora, adapters on the frozen `init`.
    """
    template = not config.no_chat_template
    if not config.lora:
        device = "cpu" if config.fsdp else device
        return load_model(resume_from or init, device, chat_template=template)[0]
    base, _ = load_model(init, device, DTYPES[precision], template)
    if resume_from:
        same = base.config == read_config(resume_from)
        require(same, f"{init / 'config.json'} is not the one that {resume_from} started from")
    generator = torch_rng(config.seed, "adapters")
    master = add_lora(base, config.lora, config.lora_alpha, config.lora_dropout, generator)
    if resume_from:
        load_adapters(master, resume_from / "adapter")
    return master


def load_meta(checkpoint: Path) -> dict:
    """Return what made the checkpoint; empty for one that was not made here."""
    path = checkpoint / "training.json"
    return read_json(path) if path.exists() else {}


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


# ------------------------------------------------------------------------------------------------
# Where checkpoints are


def find_start(run: Path, meta: dict) -> Path | None:
    """Return the folder with the weights from which a run started; None if they are gone.

    They are looked for where they were, and beside the run if both were moved together. Adapters
    alone are gone with their own start.
    """
    if "init_sha256" not in meta:
        return None
    for folder in (Path(meta["init_from"]), run / meta.get("init_beside", "")):
        if holds_start(folder, meta):
            whole = not holds_adapters_alone(folder) or find_start(folder.parent, load_meta(folder))
            return folder if whole else None
    return None


def holds_start(folder: Path, meta: dict) -> bool:
    """Whether a folder holds the weights from which a run started."""
    try:
        return weights_sha256(folder) == meta["init_sha256"]
    except (OSError, ValueError):  # none that can be read
        return False


def weights_sha256(folder: Path) -> str:
    """Return the SHA-256 of a model's weights on disk. Raises ValueError if there are none.

    That of adapters alone is made of theirs and their start's.
    """
    if holds_adapters_alone(folder):
        start = str(parse_json(folder / "training.json").get("init_sha256"))
        files = sorted((folder / "adapter").iterdir())
    else:
        start, files = "", sorted(set(find_weights(folder).values()))
    return hashlib.sha256("".join([start, *map(sha256, files)]).encode()).hexdigest()


def checkpoints(run: Path, first: int = 0) -> list[Path]:
    """Return the folders RUN/step-N from N = `first` on, ordered by N."""
    names = re.compile(r"step-[0-9]+")
    found = [(int(p.name[5:]), p) for p in run.glob("step-*") if names.fullmatch(p.name)]
    return [folder for n, folder in sorted(found) if n >= first]


@user_errors()
def newest_checkpoint(run: Path) -> Path | None:
    """Return the sound RUN/step-N with the largest N, or None; refuse a run if all are broken."""
    faults = []
    for folder in reversed(checkpoints(run)):
        if not (fault := verify_manifest(folder)):
            for line in faults:
                warn(f"{line}; it is passed over")
            return folder
        faults.append(f"{folder} is broken: {fault}")
    require(not faults, "; ".join(faults))
    return None


def is_hub_name(name: str) -> bool:
    """Whether this is the name of a model of the hub: no folder here, and none of a run."""
    is_local = Path(name).exists() or name.startswith(("ckpt/", "models/"))
    return not is_local and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


@user_errors()  # names that no file system takes, folders that nobody may read
def find_checkpoint(name: str) -> Path:
    """Return a checkpoint, a run's newest one, or a model from the hub or its cache."""
    path = Path(name)
    if is_hub_name(name):
        try:
            patterns = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "tokenizer.model"]
            return Path(snapshot_download(name, allow_patterns=patterns))
        except Exception as error:  # no such model, no permission, no network: dozens of kinds
            reason = str(error)[:300]
            fail(f"there is no folder {name}, nor can the hub be asked for that model: {reason}")
    if (path / "config.json").exists() or (path / MANIFEST).exists():
        fault = verify_manifest(path)
        require(not fault, f"{path} is broken: {fault}")
        return path
    require(path.is_dir(), f"there is no folder {path}")
    newest = newest_checkpoint(path)
    require(newest is not None, f"{path} holds no checkpoint: no config.json, no step-N folder")
    return newest


# ------------------------------------------------------------------------------------------------
# The command


@dataclass
class MergeConfig:
    words: tuple = ()  # merge, a run or checkpoint, and a new folder


def main(config: MergeConfig) -> None:
    usage = "say: python -m lib.checkpoint merge RUN NEW_FOLDER (RUN or one of its checkpoints)"
    require(len(config.words) == 3 and config.words[0] == "merge", usage)
    source, folder = find_checkpoint(config.words[1]), Path(config.words[2])
    require(holds_adapters_alone(source), f"{source} holds a whole model: nothing is to be merged")
    require(not os.path.lexists(folder), f"{folder} exists already")
    model, tokenizer = load_model(source)
    with written_whole(folder) as draft:
        save_configs(draft, model.config, tokenizer, load_meta(source))
        save_weights(dict(hf_weights(model)), draft)
    print(folder)


if __name__ == "__main__":
    config = parse_flags(MergeConfig, __doc__, positional="words")
    with quiet_pipes():
        main(config)
