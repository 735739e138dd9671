"""Time our rollout and update beside peers' in one process, and against the machine's limit.

    python -m paper.bench                      # all rows of this machine: the CPU's, or a GPU's
    python -m paper.bench --json bench.json    # also the rows as JSON: ours and peer in seconds
    python -m paper.bench --plot linear.png    # also an update's time against its tokens

Ours and the peer have the same random weights and numbers of tokens, and take turns where both
sample on the CPU; the best of a few rounds counts, as on an idle machine. Responses always run to
their full length. The tiny rows use the main job's model. Peers, in paper/peers.py: transformers,
and where installed TRL and llama.cpp.

The limit is a roofline: a step's minimum bytes and FLOPs over measured bandwidth and matmul rate.
A decoding step reads weights and KV cache once; a token costs two FLOPs a weight, in training six.
"""

import functools
import importlib.util
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn

from data.finite_field import MATCHING_STRATEGY, Task, vocabulary
from lib import checkpoint
from lib.distributed import World, distributed, in_threads, n_threads
from lib.flags import parse_flags, require, require_min, require_writable, user_errors, write_json
from lib.lora import add_lora, without_adapters
from lib.policy import (
    DTYPES,
    cast_matmuls,
    detect_dtype,
    fastest,
    make_policy,
    trainable_parameters,
)
from lib.tokenizer import word_tokenizer
from lib.training import optimizer_step
from lib.transformer import ModelConfig, Transformer
from paper import peers
from rollout import Rollout, Sampler
from train_grpo import GrpoConfig, group_advantages, grpo_backward


@dataclass
class BenchConfig:
    rounds: int = 4  # timings of ours and of the peer; the best counts
    only: str = ""  # a row, such as cpu-tiny-rollout, alone
    small: bool = False  # tiny sizes, to see that everything runs
    json: str = ""  # write the rows to this file
    plot: str = ""  # draw the time of updates of 3 to 9 steps to this PNG


@dataclass(frozen=True)
class Work:
    """The sizes of an update: those of the model, of the prompts and of the responses."""

    shape: ModelConfig
    prompts: int
    group: int  # responses to each prompt
    prompt_len: int
    new_tokens: int  # the length of every response
    shared: int = 0  # tokens that all prompts begin with
    lora: int = 0  # rank of adapters, over weights that are frozen then

    @property
    def tokens(self) -> int:
        return self.prompts * self.group * self.new_tokens

    @property
    def matrix_weights(self) -> int:
        """Return how many weights matrix products use; the embedding counts only as the head."""
        shape, D = self.shape, self.shape.hidden_size
        layer = D * (2 * D + 2 * shape.kv_size + 3 * shape.intermediate_size)
        return shape.num_hidden_layers * layer + shape.vocab_size * D

    def __str__(self) -> str:
        shared = f" ({self.shared} shared)" * (self.shared > 0)
        sizes = f"prompt {self.prompt_len}{shared}, {self.new_tokens} new"
        return f"{self.prompts} x {self.group}, {sizes}" + f", LoRA {self.lora}" * (self.lora > 0)


WORDS = word_tokenizer(vocabulary(11))
TINY = Work(replace(checkpoint.TINY, vocab_size=len(WORDS)), 32, 8, 45, 80)
SMALL = Work(ModelConfig(64, 32, 48, 2), 2, 2, 5, 6)
# SmolLM2-135M with problems of 2-5 steps: most of a prompt is chat template and explanation.
SMOLLM2 = Work(ModelConfig(49152, 576, 1536, 30, 9, 3), 8, 8, 113, 56, shared=75, lora=64)
QWEN = Work(ModelConfig(151936, 1536, 8960, 28, 12, 2), 32, 8, 128, 256)  # Qwen2.5-1.5B


@dataclass(frozen=True)
class Machine:
    """A device, the precision and the number of rounds to time with, and the device's rates."""

    world: World
    precision: str
    rounds: int
    bandwidth: float  # bytes per second read from memory
    flops: float  # FLOP/s of a large matrix product in this precision

    def decode_seconds(self, work: Work) -> float:
        """Return the least time of decoding: each step reads weights, prompts and responses."""
        steps = work.new_tokens - 1  # prefill samples the first token
        kv_size = 2 * work.shape.num_hidden_layers * work.shape.kv_size
        cached = work.prompts * (steps * work.prompt_len + work.group * steps * (steps + 1) / 2)
        n_bytes = DTYPES[self.precision].itemsize * (steps * work.matrix_weights + cached * kv_size)
        return max(n_bytes / self.bandwidth, 2 * work.matrix_weights * work.tokens / self.flops)


def measure(world: World, rounds: int, precision: str) -> Machine:
    """Measure the machine's rates; on the CPU of a product in each thread, as ours computes."""
    device, products = world.device, range(n_threads(world.device))
    size, n = (8192, 2**30) if device.type == "cuda" else (1024, 2**24)
    a, b = (torch.randn(size, size, device=device).to(DTYPES[precision]) for _ in range(2))
    large = torch.zeros(n, dtype=torch.int64, device=device)
    (seconds,) = fastest(
        10, lambda: in_threads(lambda _: nn.functional.linear(a, b), products, device)
    )
    (read,) = fastest(10, large.sum)
    flops = len(products) * 2 * size**3 / seconds
    return Machine(world, precision, rounds, large.nbytes / read, flops)


class Ours:
    """A model of random weights, and an update like train_grpo.py's on made-up rewards."""

    def __init__(self, work: Work, machine: Machine, beta: float = 0.0):
        self.work, self.world, device = work, machine.world, machine.world.device
        self.folder, self.nonfinite = None, 0  # as a lib.training.Run has them
        self.config = GrpoConfig(beta=beta, temperature=1.0, lora=work.lora, lora_dropout=0.0)
        torch.manual_seed(0)
        with device:
            self.master = Transformer(work.shape)
        for weight in self.master.parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=0.02)
        if work.lora:
            cast_matmuls(self.master, DTYPES[machine.precision])
            generator = torch.Generator().manual_seed(0)
            self.master = add_lora(self.master, work.lora, 2 * work.lora, 0.0, generator)
        self.policy, reference = make_policy(self.master, machine.precision), None
        if beta:
            start = without_adapters(self.master) if work.lora else self.master
            reference = make_policy(start, machine.precision)
        self.reference = reference
        self.sampler = Sampler(self.policy, [], work.group, work.new_tokens)
        trained = trainable_parameters(self.master)
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
        prompts = torch.randint(3, work.shape.vocab_size, (work.prompts, work.prompt_len))
        prompts[:, : work.shared] = prompts[0, : work.shared]
        self.prompts = prompts.tolist()
        self.rewards = (torch.arange(work.group, device=device) % 2.0).repeat(work.prompts, 1)

    def rollout(self) -> Rollout:
        return self.sampler.sample(self.prompts, [("bench", i) for i in range(self.work.prompts)])

    def train(self, rollout: Rollout) -> None:
        rollout.rewards, rollout.advantages = self.rewards, group_advantages(self.rewards)
        groups = torch.arange(self.work.prompts)
        loss = grpo_backward(self, rollout, groups, 0, self.world)["loss"]
        optimizer_step(self, loss, 1e-5, self.world)

    def update(self) -> None:
        self.train(self.rollout())


# ------------------------------------------------------------------------------------------------
# Rows, as tuples: name, text, and the seconds of ours, of the peer and of the limit


def rollout_rows(name: str, work: Work, machine: Machine) -> Iterator[tuple]:
    rounds, own = machine.rounds, DTYPES[machine.precision]
    on_gpu = machine.world.device.type == "cuda"
    dtypes = {own} if on_gpu else {own, torch.float32}
    better = ", its better of 2" if len(dtypes) > 1 else ""
    alone = " without adapters" * (work.lora > 0)
    for cache in ("dynamic", "static") if on_gpu else ("dynamic",):
        ours = Ours(work, machine)
        calls = [peers.generate(ours, dtype, cache) for dtype in dtypes]
        if on_gpu:  # not in turn: compiling the peer frees memory that our CUDA graphs use
            of_peers = fastest(rounds, *calls, warmup=2)
            (seconds,) = fastest(rounds, ours.rollout, warmup=2)
        else:
            seconds, *of_peers = fastest(rounds, ours.rollout, *calls)
        peer = f"transformers generate{alone}, {cache} cache"
        what = f"rollout in {machine.precision}, {work}; {peer}"
        row = name + "-static" * (cache == "static")
        yield row, what + better, seconds, min(of_peers), machine.decode_seconds(work)
    if not on_gpu and importlib.util.find_spec("llama_cpp"):
        calls = peers.llama_cpp_rollouts(ours, machine.precision)
        seconds, *of_peers = fastest(rounds, ours.rollout, *calls)
        what = f"rollout in {machine.precision}, {work}; llama.cpp{alone}, its best setting of 4"
        yield f"{name}-llama-cpp", what, seconds, min(of_peers), machine.decode_seconds(work)


def update_rows(name: str, work: Work, machine: Machine) -> Iterator[tuple]:
    rounds = machine.rounds
    for beta in (0.05, 0.0) if work.lora else (0.05,):
        ours, peer = Ours(work, machine, beta), None
        (seconds,) = fastest(rounds, ours.update)
        if importlib.util.find_spec("trl"):
            # TRL computes in our precision; a small model also in fp32, which may be faster.
            small = {"fp32"} if work.shape.hidden_size < 512 else set()
            precisions = {machine.precision} | small
            peer = min(peers.trl_update_seconds(ours, x, 2 * rounds) for x in precisions)
            seconds = min(seconds, *fastest(rounds, ours.update, warmup=0))
        what = f"GRPO update in {machine.precision}, KL {beta}, {work}; TRL"
        yield name + "-no-kl" * (beta == 0), what, seconds, peer, None


def training_rows(name: str, work: Work, machine: Machine) -> Iterator[tuple]:
    ours = Ours(work, machine)
    rollout = ours.rollout()
    (seconds,) = fastest(machine.rounds, lambda: ours.train(rollout))
    flops = 6 * work.matrix_weights * (work.tokens + work.prompts * work.prompt_len)
    what = f"training half in {machine.precision}, {work}; of the limit: of a matrix product's rate"
    yield name, what, seconds, None, flops / machine.flops


ROWS = {
    "gpu-qwen-training": (training_rows, QWEN),
    "gpu-qwen-update": (update_rows, replace(QWEN, lora=64)),
    "gpu-qwen-rollout": (rollout_rows, QWEN),
    "cpu-tiny-rollout": (rollout_rows, TINY),
    "cpu-tiny-update": (update_rows, TINY),
    "cpu-tiny-training": (training_rows, TINY),
    "cpu-smollm2-rollout": (rollout_rows, SMOLLM2),
    "cpu-smollm2-update": (update_rows, SMOLLM2),
}
HEADER = """| row | what | ours, s | peer, s | ratio | of the limit |
| --- | --- | ---: | ---: | ---: | ---: |"""


def as_dict(name: str, what: str, ours: float, peer: float | None, limit: float | None) -> dict:
    """Return a row by its columns' names; ratios are the peer's and the limit's over ours."""
    row = {"name": name, "what": what, "ours": ours, "peer": peer}
    return row | {"ratio": peer and peer / ours, "of_limit": limit and limit / ours}


def format_row(row: dict) -> str:
    formats = ("{}", "{}", "{:.3f}", "{:.3f}", "{:.1f}x", "{:.0%}")
    cells = [cell.format(value) if value else "" for cell, value in zip(formats, row.values())]
    return f"| {' | '.join(cells)} |"


def plot_lengths(work: Work, machine: Machine, path: Path) -> None:
    """Draw the time of updates of 3 to 9 steps over their tokens; print R^2 of a straight line."""
    from lib.plots import new_figure, save  # matplotlib takes a second to import

    tokens, seconds = [], []
    for steps in range(3, 10):
        problem = Task((steps, steps)).sample(random.Random(0), "train")
        solution = WORDS.solution(problem.solution(MATCHING_STRATEGY[problem.kind]))
        lengths = {"prompt_len": len(WORDS.prompt(problem)), "new_tokens": len(solution)}
        ours = Ours(replace(work, **lengths), machine)
        tokens.append(ours.work.tokens)
        seconds += fastest(machine.rounds, ours.update)
    line = np.polyval(np.polyfit(tokens, seconds, 1), tokens)
    r2 = np.corrcoef(tokens, seconds)[0, 1] ** 2
    figure, (axes,) = new_figure(6, 4, 1, 1)
    axes.plot(tokens, line, color="0.7", label=f"straight line, R² = {r2:.3f}")
    axes.plot(tokens, seconds, "o", color="tab:blue", label="updates of 3 to 9 steps")
    for steps, point in enumerate(zip(tokens, seconds), 3):
        axes.annotate(str(steps), point, (0, 7), textcoords="offset points", ha="center")
    axes.set(xlabel="tokens generated", ylabel="seconds an update", xlim=(0, None), ylim=(0, None))
    axes.legend(loc="lower right")
    save(figure, path)
    print(f"\ntime of updates of 3 to 9 steps against tokens: a straight line explains {r2:.1%}")


def name_of(world: World) -> str:
    if world.device.type == "cuda":
        return torch.cuda.get_device_name(world.device)
    file = Path("/proc/cpuinfo")  # on Linux
    name = re.search(r"model name\s*: (.*)", file.read_text()) if file.exists() else None
    return f"{name[1] if name else 'CPU'}, {torch.get_num_threads()} threads"


def main(config: BenchConfig, world: World) -> None:
    require_min(config, rounds=1)
    require(config.only in ("", *ROWS), f"--only is one of {', '.join(ROWS)}, not {config.only!r}")
    require_writable(config.json, config.plot)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    found = {"machine": name_of(world), "versions": versions, "rounds": config.rounds}
    found |= {"rates": {}, "rows": []}
    print(f"{found['machine']}, {versions}")

    @functools.cache
    def machine_in(precision: str) -> Machine:
        machine = measure(world, config.rounds, precision)
        rates = f"{machine.bandwidth / 1e9:.0f} GB/s, {machine.flops / 1e12:.2f} TFLOP/s"
        found["rates"][precision] = rates
        print(f"\n{precision}: memory {rates} in matrix products\n\n{HEADER}", flush=True)
        return machine

    prefix = config.only or ("gpu" if world.device.type == "cuda" else "cpu")
    for name, (rows, work) in ROWS.items():
        if name.startswith(prefix):
            machine = machine_in(detect_dtype(work.shape, world.device))
            for row in rows(name, SMALL if config.small else work, machine):
                found["rows"].append(as_dict(*row))
                if config.json:
                    with user_errors():
                        write_json(Path(config.json), found)
                print(format_row(found["rows"][-1]), flush=True)
    if config.plot:
        machine = machine_in(detect_dtype(TINY.shape, world.device))
        plot_lengths(SMALL if config.small else TINY, machine, Path(config.plot))


if __name__ == "__main__":
    config = parse_flags(BenchConfig, __doc__)
    with distributed() as world:
        main(config, world)
