"""Loading checkpoints: shards, dtypes, memory, the hub's cache; refusal of broken ones."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_pretrained, refusal, small_model
from transformers import AutoModelForCausalLM

from lib import checkpoint, policy, training
from lib.attention import packed_attention
from lib.checkpoint import choose_dtype, find_checkpoint, load_model
from lib.distributed import World
from lib.packing import pack_prompts, pad, response_logps
from lib.run_dir import save_checkpoint
from lib.transformer import ModelConfig
from rollout import Sampler

ONE = World(0, 1, torch.device("cpu"))
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
KINDS = {
    "qwen2": {"model_type": "qwen2"},
    "qwen2 tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3"},
    "llama": {
        "model_type": "llama",
        "rope_parameters": LLAMA3 | {"original_max_position_embeddings": 64},
    },
    "smollm2": {"model_type": "llama", "tie_word_embeddings": True, "rope_theta": 1e5},
    "many shards": {"model_type": "llama", "shard_size": "20KB"},
}


def logits(model, rows):
    batch = pack_prompts(*pad(rows))
    return model.logits(model(batch.tokens, batch.positions, packed_attention(batch, model)))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_what_transformers_wrote_computes_the_same_here(kind, tmp_path):
    """Compare logits, and a greedy continuation token by token."""
    folder = make_pretrained(tmp_path / "model", **kind)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == ("shard_size" in kind)
    reference = AutoModelForCausalLM.from_pretrained(folder).eval()
    model, tokenizer = load_model(folder)
    row = torch.randint(3, 250, (100,), generator=torch.Generator().manual_seed(0))
    expected = reference(row[None]).logits[0]
    assert expected.std() > 0.1
    torch.testing.assert_close(logits(model, [row.tolist()]), expected, atol=1e-4, rtol=0)
    rollout = Sampler(model, tokenizer.stops, 1, 40, 0.0).sample([row.tolist()], [()])
    theirs = reference.generate(row[None], max_new_tokens=40, do_sample=False)[0, len(row) :]
    assert rollout.tokens[0].tolist() == theirs.tolist()


@torch.no_grad()
def test_weights_come_in_the_type_asked_for(pretrained):
    exact, lowered = (
        load_model(pretrained, dtype=dtype)[0] for dtype in (torch.float32, torch.bfloat16)
    )
    assert lowered.dtype == torch.bfloat16 and lowered.model.norm.weight.dtype == torch.float32
    for name, weight in exact.named_parameters():
        other = lowered.get_parameter(name)
        assert torch.equal(weight.to(other.dtype), other), name
        assert weight.requires_grad


MEASURE = """
import os, re, sys, threading, time, torch
from pathlib import Path
from lib.checkpoint import load_model

def resident():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmRSS:\\s+(\\d+)", status)[1]) / 1e3
def watch():
    global peak
    while True: peak = max(peak, resident()); time.sleep(0.0005)
torch.set_num_threads(1)  # so that this process can be forked
for dtype in (torch.float32, torch.bfloat16):
    if os.fork():
        assert os.wait()[1] == 0
        continue
    load_model(Path(sys.argv[2]))  # warm up the libraries
    peak = before = resident()
    threading.Thread(target=watch, daemon=True).start()
    model, _ = load_model(Path(sys.argv[1]), dtype=dtype)
    time.sleep(0.01)
    n_bytes = sum(w.numel() * w.element_size() for w in model.parameters())
    print((peak - before) * 1e6 / n_bytes, flush=True)
    os._exit(0)
"""


def test_loading_holds_the_weights_once(tmp_path, pretrained):
    """In fp32 and in bf16 loading adds at most a fifth, though it maps, converts and joins them."""
    sizes = {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
    }
    folder = make_pretrained(tmp_path / "large", shard_size="40MB", **sizes)
    command = [sys.executable, "-c", MEASURE, str(folder), str(pretrained)]
    here = Path(checkpoint.__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=here)
    assert done.returncode == 0, done.stderr
    added = list(map(float, done.stdout.split()))
    assert len(added) == 2 and all(0.9 < share < 1.2 for share in added), added


def rewrite(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"model_type": []}, "supported"),
        ({"rope_parameters": "linear"}, "no model's"),
        ({"layer_types": 3}, "no model's"),
        ({"model_type": "smollm3"}, "supported"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "scaling"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "factor"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": "x"}, "rope_theta": "x"},
            "no model's",
        ),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "sliding"),
        ({"num_key_value_heads": 2}, "do not go together"),
        ({"head_dim": 15}, "head"),
        ({"head_dim": 8}, "shape"),
        ({"num_hidden_layers": 3}, "lack"),
        ({"num_hidden_layers": 1}, "which its config.json has not"),
        ({"model_type": "qwen3"}, "k_norm"),
        ({"model_type": "qwen2"}, "bias"),
        ({"vocab_size": 200}, "more words"),
    ],
)
def test_what_this_transformer_does_not_compute_is_refused(changes, says, pretrained, capsys):
    rewrite(pretrained / "config.json", **changes)
    assert says in refusal(lambda: load_model(pretrained), capsys)


@pytest.mark.parametrize("how", ["missing shard", "cut shard", "no weights"])
def test_shards_that_are_not_whole_are_refused(how, tmp_path, capsys):
    folder = make_pretrained(tmp_path / "model", shard_size="20KB")
    index, shard = (
        folder / "model.safetensors.index.json",
        sorted(folder.glob("model-*.safetensors"))[1],
    )
    if how == "missing shard":
        shard.unlink()
    elif how == "cut shard":
        shard.write_bytes(shard.read_bytes()[:-100])
    else:
        index.unlink()
    line = refusal(lambda: load_model(folder), capsys)
    assert str(folder) in line and (shard.name in line or how == "no weights")


def test_a_model_of_the_hub_is_found_in_its_cache(tmp_path, monkeypatch, capsys):
    """Run offline: a cached model is found, an unknown name is refused in one line."""
    cache = tmp_path / "models--someone--small"
    folder = make_pretrained(cache / "snapshots" / "abc")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    monkeypatch.chdir(tmp_path)
    script = "from lib import checkpoint as c\n"
    script += "for name in ('small', 'large'): print(c.find_checkpoint(f'someone/{name}'))"
    here = Path(checkpoint.__file__).parent.parent
    environment = {"PYTHONPATH": str(here), "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    options = {"capture_output": True, "text": True, "env": environment, "cwd": tmp_path}
    done = subprocess.run([sys.executable, "-c", script], **options)
    assert done.stdout.strip() == str(folder)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "someone/large" in done.stderr
    (tmp_path / "ckpt").mkdir()
    assert "there is no folder ckpt/mistyped" in refusal(
        lambda: find_checkpoint("ckpt/mistyped"), capsys
    )


def test_the_precision_is_that_of_training_unless_a_flag_sets_it(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "detect_dtype", lambda *_: "bf16")
    shape = ModelConfig(100)
    (tmp_path / "training.json").write_text('{"compute_dtype": "fp32"}')
    assert choose_dtype("auto", shape, tmp_path, ONE) == "fp32"
    assert choose_dtype("bf16", shape, tmp_path, ONE) == "bf16"
    (tmp_path / "training.json").write_text('{"compute_dtype": "a file from elsewhere"}')
    assert choose_dtype("auto", shape, tmp_path, ONE) == "bf16"
    assert choose_dtype("auto", shape, None, ONE) == "bf16"


@pytest.mark.parametrize("tied", [False, True])
def test_rows_that_no_token_has_get_no_probability_and_no_gradient(tied, tmp_path):
    """Sampler, trainer and reference share one distribution over the tokenizer's tokens."""
    folder = make_pretrained(
        tmp_path / "model", vocab_size=320, tie_word_embeddings=tied, initializer_range=0.02
    )
    model, tokenizer = load_model(folder)
    known = set(tokenizer.inner.get_vocab().values())
    rollout = Sampler(model, tokenizer.stops, 16, 40, 2.0).sample([[5, 6, 7]], [(0,)])
    mask = torch.arange(rollout.tokens.shape[1]) < rollout.lengths[:, None]
    sampled = rollout.tokens[mask].tolist()
    assert set(sampled) <= known and len(set(sampled)) > 100
    reference = AutoModelForCausalLM.from_pretrained(folder).eval()
    index = torch.tensor(sorted(known))
    with torch.no_grad():
        theirs = (reference(torch.tensor([[5, 6, 7]])).logits[0, -1] / 2.0)[index].log_softmax(-1)
    first = dict(zip(index.tolist(), theirs.tolist()))
    for token, logp in zip(rollout.tokens[:, 0].tolist(), rollout.logps[:, 0].tolist()):
        assert logp == pytest.approx(first[token], abs=1e-4)

    rollout.advantages = torch.ones(1, 16)
    batch, old_logps, _ = rollout.pack(torch.tensor([0]))
    logps, entropy = response_logps(model, batch, 2.0, entropy=True)
    torch.testing.assert_close(logps, old_logps, atol=1e-4, rtol=0)
    assert entropy.isfinite().all() and entropy.max() <= math.log(len(known)) + 1e-4
    (gradient,) = torch.autograd.grad(logps.sum(), [model.lm_head.weight])
    unknown = [i for i in range(320) if i not in known]
    assert gradient[unknown].abs().sum() == 0 and (gradient[index].abs().sum(1) > 0).all()

    optimizer = torch.optim.AdamW(model.parameters())
    saved = save_checkpoint(tmp_path, 1, model, tokenizer, optimizer, {}).result()
    again = AutoModelForCausalLM.from_pretrained(saved)
    assert torch.equal(again.lm_head.weight, reference.lm_head.weight), "the rows stay"


def test_a_token_beyond_the_models_rows_is_refused(pretrained, capsys):
    """Though there are as many rows as tokens: ids may have gaps."""
    file = pretrained / "tokenizer.json"
    backend = json.loads(file.read_text())
    vocabulary = backend["model"]["vocab"]
    vocabulary[next(word for word, i in vocabulary.items() if i == 200)] = 5000
    file.write_text(json.dumps(backend))
    assert "more words in tokenizer" in refusal(lambda: load_model(pretrained), capsys)


def test_all_processes_compute_in_the_same_precision(monkeypatch):
    monkeypatch.setattr(World, "all_gather", lambda self, rows: ["fp32", *rows])
    assert choose_dtype("bf16", None, None, ONE) == "fp32"


def test_the_precision_is_the_one_that_is_clearly_faster(monkeypatch):
    threads = torch.get_num_threads()
    for seconds, says in (((1.0, 0.79), "bf16"), ((1.0, 0.81), "fp32")):
        monkeypatch.setattr(policy, "fastest", lambda *_, seconds=seconds: seconds)
        assert policy.detect_dtype(checkpoint.TINY, torch.device("cpu")) == says
    assert torch.get_num_threads() == threads


def test_the_reference_computes_as_the_run_does(pretrained, monkeypatch):
    monkeypatch.setattr(checkpoint, "find_start", lambda *_: pretrained)
    meta = {"lora": 0, "compute_dtype": "bf16"}
    run = SimpleNamespace(meta=meta, folder=None, init=None, master=small_model())
    reference = training.initial_policy(run)
    assert reference.dtype == torch.bfloat16
    assert not any(weight.requires_grad for weight in reference.parameters())
