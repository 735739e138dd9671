"""What tests share: small random models, made-up responses, and processes beside the tests."""

import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import no_cuda
import pytest
import torch
import torch.multiprocessing
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from data.finite_field import vocabulary
from lib import tokenizer as tokenizers_of_lib
from lib.responses import Response
from lib.training import update_metrics
from lib.transformer import ModelConfig, Transformer
from strategies import score_response
from train_grpo import grpo_backward

torch.set_num_threads(1)  # in models so small, threads would wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")  # and in other processes
ROOT = Path(__file__).parents[1]
downloads = tempfile.TemporaryDirectory()
BESIDE = {  # what fixtures wait for, by their names: Python's command lines
    "complaints": ("tests/pretended_gpu.py faults", "tests/pretended_gpu.py cases"),
    "smollm2": (f"-m data.smollm2 {downloads.name}/smollm2",),
}
beside = ThreadPoolExecutor(1)  # one process at a time: the tests have the other core
running: list[subprocess.Popen] = []
outputs: dict[str, Future] = {}  # by command line


def run(command: str) -> str:
    """Run Python in the repository's root; return what it prints."""
    words, env = [sys.executable, *command.split()], os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(words, cwd=ROOT, env=env, **pipes)
    running.append(process)
    printed, errors = process.communicate(timeout=600)
    assert process.returncode == 0, printed[-3000:] + errors[-3000:]
    return printed


def start(fixture: str) -> list[Future]:
    """Queue a fixture's commands, unless that is done; return what they will print."""
    for command in BESIDE[fixture]:
        if command not in outputs:
            outputs[command] = beside.submit(run, command)
    return [outputs[command] for command in BESIDE[fixture]]


def pytest_collection_finish(session) -> None:
    """Start beside the tests what takes half a minute in processes of its own."""
    wanted = {name for item in session.items for name in getattr(item, "fixturenames", ())}
    if not session.config.option.collectonly and not no_cuda.why_not():
        for name in filter(wanted.__contains__, BESIDE):
            start(name)


def pytest_unconfigure() -> None:
    """Kill processes whose output no test has read."""
    beside.shutdown(wait=False, cancel_futures=True)
    for process in running:
        process.kill()


def printed_by(fixture: str) -> str:
    """Return what a fixture's processes have printed."""
    return "".join(output.result() for output in start(fixture))


CC = """#!/bin/sh
# Build as COMPILER does, or copy what it has built from the same sources by the same command, in
# which the output's name is last.
for output; do :; done
sources() { for word; do case $word in *.c) cat "$word" ;; esac; done; }
kept=FOLDER/$( (printf "%s " "$@" | sed "s| -o $output ||"; sources "$@") | cksum | tr " " -)
[ -e "$kept" ] && exec cp "$kept" "$output"
COMPILER "$@" && cp "$output" "$kept.$$" && mv "$kept.$$" "$kept"
"""


@pytest.fixture(scope="session", autouse=True)
def kernels_are_built_once(tmp_path_factory) -> None:
    """Let all processes of the tests share the CPU's kernels, each of which takes cc a second."""
    if compiler := shutil.which("cc"):
        folder = tmp_path_factory.mktemp("cc")
        (folder / "cc").write_text(CC.replace("COMPILER", compiler).replace("FOLDER", str(folder)))
        (folder / "cc").chmod(0o755)
        os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"


def word_tokenizer(p: int) -> tokenizers_of_lib.Tokenizer:
    """The tiny model's tokenizer for GF(p)."""
    return tokenizers_of_lib.word_tokenizer(vocabulary(p))


def score_groups(problems: list, texts: list[str], stopped: list[bool]) -> list[list]:
    """Score the responses to each problem, which follow one another."""
    group = len(texts) // len(problems)
    scored = [score_response(problems[i // group], t, stopped[i]) for i, t in enumerate(texts)]
    return [scored[i : i + group] for i in range(0, len(scored), group)]


def response(kind, steps, strategy, matches, correct, error=None, stopped=True) -> Response:
    """A scored response without a text."""
    difficulty = f"{steps} step{'s' * (steps != 1)}"
    taken = {"strategy": strategy, "matches": matches, "error": error}
    return Response("", kind, difficulty, correct, stopped, **taken)


def small_model(seed: int = 0, **shape) -> Transformer:
    """Return a model with random weights, so large that its distributions are not uniform."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2} | shape
    model = Transformer(ModelConfig(vocab_size=len(word_tokenizer(11)), **sizes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(1.0 if weight.ndim == 1 else 0.0, 0.2, generator=generator)
    return model


def with_large_biases(model: Transformer, size: float = 30.0) -> Transformer:
    """Raise attention scores above 100 in the first layer, as Qwen2's key biases do."""
    c = model.config
    biases = model.model.layers[0].self_attn.qkv_proj.bias.view(-1, c.head_dim)
    # In the pair that rotates slowest, so that attention weights hardly change.
    with torch.no_grad():
        biases[: c.num_attention_heads + c.num_key_value_heads, c.head_dim // 2 - 1] += size
    return model


def backward(run, rollout, groups, step, world) -> dict:
    """Accumulate the gradient of GRPO; return the loss and the log's metrics of this one step."""
    step = grpo_backward(run, rollout, groups, step, world) | {"grad_norm": 0.0, "skipped": False}
    metrics = update_metrics([step], rollout, [rollout], [1.0, 1.0], world)
    del metrics["peak_memory_gb"]
    return metrics | {"trained_tokens": metrics["training_tokens_per_second"]}  # in one second


CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_pretrained(
    folder: Path, model_type: str = "llama", shard_size: str = "5GB", **shape
) -> Path:
    """Write a random checkpoint as transformers does: byte tokenizer, chat template, two stops."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = {
        letter: i + 3 for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    vocabulary = {word: i for i, word in enumerate(special)} | letters
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    options = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "chat_template": CHAT}
    PreTrainedTokenizerFast(tokenizer_object=backend, **options).save_pretrained(folder)

    sizes = {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
    }
    sizes |= {
        "num_key_value_heads": 1,
        "head_dim": 16,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    sizes |= {"vocab_size": len(vocabulary), "eos_token_id": 2}
    config = AutoConfig.for_model(model_type, **(sizes | shape))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size=shard_size)
    stops = json.loads((folder / "generation_config.json").read_text()) | {"eos_token_id": [2, 0]}
    (folder / "generation_config.json").write_text(json.dumps(stops))
    return folder


@pytest.fixture
def pretrained(tmp_path) -> Path:
    return make_pretrained(tmp_path / "pretrained")


@pytest.fixture
def model() -> Transformer:
    return small_model()


@pytest.fixture
def tokenizer():
    return word_tokenizer(11)


@pytest.fixture
def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def draw_nothing(patch: pytest.MonkeyPatch) -> None:
    for name in ("plot_evaluation", "plot_training"):
        patch.setattr(f"lib.plots.{name}", lambda *_: None)


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """Draw no plots, which take seconds, in tests of something else."""
    draw_nothing(monkeypatch)


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def start_processes(function, args: tuple, size: int) -> None:
    """Call function(rank, *args) in processes of their own, and wait for them.

    They are forked from a process that has imported the libraries, which takes each 4 seconds.
    """
    libraries = ["torch.distributed.tensor", "transformers.modeling_utils", "sympy", "pytest"]
    multiprocessing.set_forkserver_preload(libraries)
    torch.multiprocessing.start_processes(function, args, size, start_method="forkserver")


def same_weights(a: Transformer, b: Transformer) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def refusal(function, capsys) -> str:
    """Call a function that exits with status 2; return its line on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        function()
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    return line
