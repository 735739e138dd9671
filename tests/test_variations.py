"""Variations of checkpoints of the four families: ours against transformers.

Either both load the same logits, or ours refuses in one line.
"""

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_pretrained
from safetensors.torch import load_file, save_file
from test_checkpoint import LLAMA3, logits
from transformers import AutoModelForCausalLM

from lib.checkpoint import load_model

LLAMA3 = LLAMA3 | {"original_max_position_embeddings": 64}
SIZES = {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16}
FAMILIES = {
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True},
    "llama3": {"model_type": "llama", "rope_parameters": LLAMA3},
    "smollm2": {"model_type": "llama", "tie_word_embeddings": True, "rope_theta": 1e5},
}
ROW = torch.randint(3, 250, (80,), generator=torch.Generator().manual_seed(0))
GONE = object()


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: make_pretrained(folder / name, **shape) for name, shape in FAMILIES.items()}


@torch.no_grad()
def theirs(folder: Path) -> torch.Tensor | None:
    """Return transformers' logits; None if it rejects the folder, or draws weights of its own."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            options = {"dtype": torch.float32, "output_loading_info": True}
            model, info = AutoModelForCausalLM.from_pretrained(folder, **options)
            drawn = info["missing_keys"] or info["mismatched_keys"]
            return None if drawn else model.eval()(ROW[None]).logits[0]
    except Exception:
        return None


@torch.no_grad()
def ours(folder: Path, capsys) -> torch.Tensor | None:
    """Return our logits; None if the folder is refused, in one line."""
    capsys.readouterr()
    try:
        return logits(load_model(folder)[0], [ROW.tolist()])
    except SystemExit as stop:
        assert stop.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
        return None


def compare(folder: Path, capsys) -> str:
    expected, found = theirs(folder), ours(folder, capsys)
    if found is not None:
        assert expected is not None, "ours loads what transformers does not"
        tolerance = 1e-4 * max(1.0, float(expected.abs().max()) / 10)  # rounding of large weights
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
        return "equal"
    return "both refuse" if expected is None else "ours refuses"


# Changes of config.json. A value of GONE removes the field.
CONFIGS = [
    *({name: GONE} for name in ("rms_norm_eps", "head_dim", "num_key_value_heads", "hidden_act")),
    *({name: GONE} for name in ("rope_parameters", "max_position_embeddings", "architectures")),
    *({name: GONE} for name in ("tie_word_embeddings", "vocab_size", "dtype", "attention_bias")),
    *({name: None} for name in ("num_key_value_heads", "rope_parameters")),
    *({name: None} for name in ("tie_word_embeddings", "attention_bias", "layer_types", "dtype")),
    *({"rms_norm_eps": value} for value in (0.3, 1, 0, -1e-6, "1e-6")),
    *({"hidden_act": value} for value in ("swish", "gelu", None)),
    *({"head_dim": value} for value in (8, 15, 24)),
    *({"num_key_value_heads": value} for value in (3, 2, 0, "1")),
    *({"pad_token_id": value} for value in (0, 258, -1, "0", [0])),
    *({"eos_token_id": value} for value in (None, [2, 0])),
    *({"attention_bias": value} for value in (0, "false")),
    {"mlp_bias": None},
    *({"attention_dropout": value} for value in (0.5, None, "0")),
    *({"layer_types": value} for value in (["full_attention"], ["full_attention"] * 2, [])),
    {"layer_types": ["full_attention", "sliding_attention"]},
    {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0},
    {"sliding_window": 16},
    {"is_decoder": True},
    {"use_cache": False},
    {"initializer_range": "0.02"},
    {"num_hidden_layers": 1},
    {"num_hidden_layers": 3},
    {"hidden_size": 47},
    {"vocab_size": 258},
    {"vocab_size": 300},
    {"architectures": ["LlamaForSequenceClassification"]},
    {"model_type": "mistral"},
    {"model_type": "Llama"},
    {"quantization_config": {"quant_method": "fp8"}},
    {"torch_dtype": "float16", "dtype": GONE},
    {"dtype": "nonsense"},
    {"auto_map": {"AutoModelForCausalLM": "code.Model"}},
    {"rope_theta": 5e5},
    {"rope_theta": 5e5, "rope_parameters": GONE},
    {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}},
    {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    {"rope_theta": 0.5, "rope_parameters": GONE},
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": LLAMA3},
    {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    {"rope_scaling": {"type": "default"}, "rope_parameters": LLAMA3},
    {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    *({"rope_parameters": LLAMA3 | {"factor": value}} for value in (1, 0.5)),
    {"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}},
    {"rope_parameters": LLAMA3 | {"partial_rotary_factor": 0.5}},
    {"rope_parameters": LLAMA3, "original_max_position_embeddings": 16},
    {"rope_parameters": {k: v for k, v in LLAMA3.items() if "original" not in k}},
    {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    {"partial_rotary_factor": 0.5},
]
FIELDS = ("rms_norm_eps", "hidden_act", "rope_parameters", "max_position_embeddings", "dtype")
EQUAL = [  # what ours loads, too, in each family
    *({name: GONE} for name in (*FIELDS, "architectures", "attention_bias")),
    *({name: None} for name in ("rope_parameters", "layer_types", "dtype")),
    *({"pad_token_id": value} for value in (0, 258, -1)),
    *({"eos_token_id": value} for value in (None, [2, 0])),
    {"attention_dropout": 0.5},
    {"is_decoder": True},
    {"use_cache": False},
    {"architectures": ["LlamaForSequenceClassification"]},
    {"torch_dtype": "float16", "dtype": GONE},
    {"auto_map": {"AutoModelForCausalLM": "code.Model"}},
    {"rope_theta": 5e5, "rope_parameters": GONE},
    {"rope_scaling": LLAMA3},
]


@pytest.mark.parametrize(
    "changes", CONFIGS, ids=lambda changes: json.dumps(changes, default=lambda _: "GONE")
)
def test_configs(changes, bases, tmp_path, capsys):
    for family, base in bases.items():
        folder = Path(shutil.copytree(base, tmp_path / family))
        config = json.loads((folder / "config.json").read_text()) | changes
        kept = {name: value for name, value in config.items() if value is not GONE}
        (folder / "config.json").write_text(json.dumps(kept))
        assert compare(folder, capsys) == "equal" or changes not in EQUAL


HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


def cast(dtype):
    return lambda weights: {name: weight.to(dtype) for name, weight in weights.items()}


WEIGHTS = {  # what is done to the weights; what has to come out, or None for either
    "as they are": (lambda w: w, "equal"),
    "fp16": (cast(torch.float16), "equal"),
    "bf16": (cast(torch.bfloat16), "equal"),
    "fp64": (cast(torch.float64), "equal"),
    "mixed": (lambda w: {n: x.half() if "mlp" in n else x for n, x in w.items()}, "equal"),
    "fp8": (cast(torch.float8_e4m3fn), None),
    "integers": (
        lambda w: {n: (x * 3).to(torch.int8) if "mlp" in n else x for n, x in w.items()},
        "equal",
    ),
    "a head equal to the embeddings": (lambda w: w | {HEAD: w[EMBEDDINGS].clone()}, "equal"),
    "a head of its own": (lambda w: w | {HEAD: w[EMBEDDINGS].flip(0).clone()}, "equal"),
    "a head like the embeddings": (lambda w: w | {HEAD: w[EMBEDDINGS] + 0.1}, "equal"),
    "a head of another shape": (lambda w: w | {HEAD: w[EMBEDDINGS][:100].clone()}, "both refuse"),
    "a head alone": (
        lambda w: {n: x for n, x in (w | {HEAD: w[EMBEDDINGS].clone()}).items() if n != EMBEDDINGS},
        None,
    ),
    "no embeddings": (
        lambda w: {n: x for n, x in w.items() if n not in (EMBEDDINGS, HEAD)},
        "both refuse",
    ),
    "one missing": (lambda w: {n: x for n, x in w.items() if "1.mlp.up" not in n}, "both refuse"),
    "one of another shape": (
        lambda w: {n: x.T.contiguous() if "0.mlp.up" in n else x for n, x in w.items()},
        "both refuse",
    ),
    "one too many": (lambda w: w | {"model.layers.0.extra.weight": torch.ones(3)}, None),
    "without the prefix": (lambda w: {n.removeprefix("model."): x for n, x in w.items()}, None),
    "with a prefix more": (lambda w: {f"model.{n}": x for n, x in w.items()}, None),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(name, tied, bases, tmp_path, capsys):
    change, expected = WEIGHTS[name]
    for family, base in bases.items():
        folder = Path(shutil.copytree(base, tmp_path / family))
        config = json.loads((folder / "config.json").read_text())
        was_tied = config["tie_word_embeddings"]
        (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": tied}))
        weights = load_file(folder / "model.safetensors")
        if tied:
            weights.pop(HEAD, None)
        elif was_tied:
            weights[HEAD] = weights[EMBEDDINGS].clone()
        save_file(change(weights), folder / "model.safetensors", {"format": "pt"})
        assert compare(folder, capsys) == expected or expected is None, family


def test_a_head_of_its_own_is_kept(bases, tmp_path):
    """transformers 5 does not tie it, though config.json says so; 4 would."""
    folder = Path(shutil.copytree(bases["smollm2"], tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    weights[HEAD] = weights[EMBEDDINGS].flip(0).clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    model, _ = load_model(folder)
    assert not model.config.tie_word_embeddings
    assert torch.equal(model.lm_head.weight, weights[HEAD])


def shard(folder: Path, names: list[str], where: list[str] | None = None, **index) -> None:
    """Split the weights over files called `names` in the index, which lie at `where`."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: names[i % len(names)] for i, name in enumerate(weights)}
    for name, place in zip(names, where or names):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        part = {n: weights[n] for n, shard in weight_map.items() if shard == name}
        save_file(part, folder / place, {"format": "pt"})
    content = {"metadata": {"total_size": 1}, "weight_map": weight_map} | index
    content = {name: value for name, value in content.items() if value is not GONE}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def adapters_beside(folder: Path) -> None:
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4}
    config |= {"target_modules": ["o_proj"], "base_model_name_or_path": str(folder)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    prefix = "base_model.model.model.layers.0.self_attn.o_proj.lora"
    weights = {f"{prefix}_A.weight": torch.ones(2, 48), f"{prefix}_B.weight": torch.ones(48, 2)}
    save_file(weights, folder / "adapter_model.safetensors")


def other_weights(folder: Path, file: str) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({n: x + 0.1 for n, x in weights.items()}, folder / file, {"format": "pt"})


def whole_and_shards(folder: Path) -> None:
    other_weights(folder, "whole.safetensors")
    shard(folder, ["a.safetensors", "b.safetensors"])
    (folder / "whole.safetensors").rename(folder / "model.safetensors")


def in_two_shards(folder: Path) -> None:
    shard(folder, ["a.safetensors", "b.safetensors"])
    a, b = (load_file(folder / f"{name}.safetensors") for name in "ab")
    name = next(iter(a))
    save_file(b | {name: a[name] + 1}, folder / "b.safetensors", {"format": "pt"})


def linked(folder: Path) -> None:
    shard(folder, ["a.safetensors", "b.safetensors"])
    for file in ("a.safetensors", "b.safetensors", "config.json", "tokenizer.json"):
        (folder / file).rename(folder.with_name(f"{folder.name}-{file}"))
        (folder / file).symlink_to(f"../{folder.name}-{file}")


def rename(old: str, new: str):
    return lambda folder: (folder / old).rename(folder / new)


TWO = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
FILES = {
    "two shards": (lambda f: shard(f, TWO), "equal"),
    "shards of other names": (lambda f: shard(f, ["a.safetensors", "ä b.safetensors"]), "equal"),
    "links": (linked, "equal"),
    "an index of nothing": (lambda f: shard(f, TWO, weight_map={}), None),
    "an index of numbers": (lambda f: shard(f, TWO, weight_map={"a": 5}), None),
    "an index that is a list": (lambda f: shard(f, TWO, weight_map=["a"]), None),
    "an index in UTF-16": (
        lambda f: [
            shard(f, TWO),
            (f / "model.safetensors.index.json").write_bytes(
                (f / "model.safetensors.index.json").read_text().encode("utf-16")
            ),
        ],
        None,
    ),
    "shards in a folder": (lambda f: shard(f, ["sub/a.safetensors", "sub/b.safetensors"]), None),
    "a shard missing": (lambda f: [shard(f, TWO), (f / TWO[0]).unlink()], "both refuse"),
    "a whole file beside shards": (whole_and_shards, None),
    "a weight in two shards": (in_two_shards, None),
    "adapters beside the weights": (adapters_beside, None),
    "another file beside": (lambda f: other_weights(f, "consolidated.safetensors"), "equal"),
    "another name": (rename("model.safetensors", "weights.safetensors"), None),
    "a PyTorch file alone": (
        lambda f: [
            torch.save(load_file(f / "model.safetensors"), f / "pytorch_model.bin"),
            (f / "model.safetensors").unlink(),
        ],
        None,
    ),
    "an empty file": (lambda f: (f / "model.safetensors").write_bytes(b""), "both refuse"),
    "weights of MLX": (
        lambda f: save_file(
            load_file(f / "model.safetensors"), f / "model.safetensors", {"format": "mlx"}
        ),
        "equal",
    ),
    "no format": (
        lambda f: save_file(load_file(f / "model.safetensors"), f / "model.safetensors"),
        "equal",
    ),
    "a config in UTF-8 with its mark": (
        lambda f: (f / "config.json").write_bytes(
            b"\xef\xbb\xbf" + (f / "config.json").read_bytes()
        ),
        "both refuse",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_files(name, bases, tmp_path, capsys):
    change, expected = FILES[name]
    for family in ("qwen3", "llama3"):
        folder = Path(shutil.copytree(bases[family], tmp_path / family / family))
        change(folder)
        assert compare(folder, capsys) == expected or expected is None, family
