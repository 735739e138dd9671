"""Time our rollout and update beside peers' in one process, and against the machine's limit.

    python -m paper.bench                      # all rows of this machine: the CPU's, or a GPU's
    python -m paper.bench --json bench.json    # also the rows as JSON: ours and peer in seconds
    python -m paper.bench --plot linear.png    # also an update's time against its tokens

Ours and the peer take turns on the same random weights and the same numbers of tokens; the best of
a few rounds counts, which is what an idle machine would show. Responses always run to their full
length. The tiny rows compute the main job's model. The peers are transformers' `generate` and TRL,
where it is installed (pip install trl==1.16.0).

The limit is a roofline: a step's minimum bytes and operations over the bandwidth and matmul rate
measured at the start. A decoding step reads the weights and the cached keys and values once, and a
token costs two operations a weight; training costs six.
"""

import importlib.util
import os
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

from data.finite_field import MATCHING_STRATEGY, Task, vocabulary
from lib import checkpoint
from lib.distributed import World, distributed
from lib.flags import parse_flags, require, require_min, require_writable, user_errors, write_json
from lib.policy import DTYPES, detect_dtype, make_policy, sync_weights
from lib.tokenizer import word_tokenizer
from lib.transformer import ModelConfig, Transformer, hf_weights
from rollout import Rollout, Sampler
from train_grpo import GrpoConfig, group_advantages, grpo_backward


@dataclass
class BenchConfig:
    rounds: int = 4  # timings of ours and of the peer, in turn; the best counts
    only: str = ""  # a row, such as cpu-tiny-rollout, alone
    small: bool = False  # tiny sizes, to see that everything runs
    json: str = ""  # write the rows to this file
    plot: str = ""  # draw the time of updates of 3 to 9 steps to this PNG


@dataclass(frozen=True)
class Work:
    """What an update does: P prompts of `prompt` tokens, G responses of `new` tokens to each."""

    shape: ModelConfig
    prompts: int
    group: int
    prompt: int
    new: int

    @property
    def tokens(self) -> int:
        return self.prompts * self.group * self.new

    def __str__(self) -> str:
        return f"{self.prompts} x {self.group}, prompt {self.prompt}, {self.new} new"


WORDS = word_tokenizer(vocabulary(11))
TINY = Work(replace(checkpoint.TINY, vocab_size=len(WORDS)), 32, 8, 45, 80)
SMALL = Work(ModelConfig(64, 32, 48, 2), 2, 2, 5, 6)
SMOLLM2 = Work(ModelConfig(49152, 576, 1536, 30, 9, 3), 8, 8, 45, 64)  # 135M
QWEN = Work(ModelConfig(151936, 1536, 8960, 28, 12, 2), 32, 8, 128, 256)  # Qwen2.5-1.5B


def best(function: Callable[[], object], rounds: int) -> float:
    """Return the seconds of the fastest of some calls; wait for the device after each."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def in_turn(ours: Callable, peer: Callable, rounds: int) -> tuple[float, float]:
    """Return the best seconds of both, timed in turn after one call each to warm up."""
    best(ours, 1), best(peer, 1)
    times = [(best(ours, 1), best(peer, 1)) for _ in range(rounds)]
    return min(a for a, _ in times), min(b for _, b in times)


# ------------------------------------------------------------------------------------------------
# The machine


@dataclass(frozen=True)
class Rates:
    bandwidth: float  # bytes a second read from memory
    operations: float  # operations a second of a large matrix product, at the precision used

    def decode_seconds(self, work: Work, itemsize: int) -> float:
        """Return the least time of decoding: each step reads weights, prompts and responses."""
        c, steps = work.shape, work.new - 1
        weights = matrix_weights(c)
        kv = 2 * c.num_hidden_layers * c.kv_size
        cached = work.prompts * (steps * work.prompt + work.group * steps * (steps + 1) / 2)
        moved = itemsize * (steps * weights + cached * kv)
        return max(moved / self.bandwidth, 2 * weights * work.tokens / self.operations)

    def training_seconds(self, work: Work) -> float:
        """Return the least time of forward and backward on all tokens, each prompt once."""
        tokens = work.tokens + work.prompts * work.prompt
        return 6 * matrix_weights(work.shape) * tokens / self.operations


def matrix_weights(c: ModelConfig) -> int:
    """Return the number of weights in matrix products; the vocabulary's count once."""
    layer = c.hidden_size * (2 * c.hidden_size + 2 * c.kv_size + 3 * c.intermediate_size)
    return c.num_hidden_layers * layer + c.vocab_size * c.hidden_size


def measure_rates(dtype: torch.dtype, device: torch.device) -> Rates:
    size, n = (8192, 2**30) if device.type == "cuda" else (1024, 2**24)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    large = torch.zeros(n, dtype=torch.int64, device=device)
    F.linear(a, b), large.sum()
    operations = 2 * size**3 / best(lambda: F.linear(a, b), 10)
    return Rates(large.numel() * 8 / best(large.sum, 10), operations)


@dataclass(frozen=True)
class Machine:
    """What is measured on, and how."""

    world: World
    precision: str
    rates: Rates
    rounds: int


# ------------------------------------------------------------------------------------------------
# Ours and the peers


class Ours:
    """A model of random weights; its update is train_grpo.py's, on made-up rewards."""

    def __init__(self, work: Work, machine: Machine, beta: float = 0.0):
        self.work, self.world, device = work, machine.world, machine.world.device
        self.config = GrpoConfig(beta=beta, temperature=1.0)
        torch.manual_seed(0)
        with device:
            self.model = Transformer(work.shape)
        with torch.no_grad():
            for weight in self.model.parameters():
                if weight.ndim == 2:
                    weight.normal_(0, 0.02)
        self.policy = make_policy(self.model, machine.precision)
        self.reference = make_policy(self.model, machine.precision) if beta else None
        self.sampler = Sampler(self.policy, [], work.group, work.new)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.prompts = torch.randint(3, work.shape.vocab_size, (work.prompts, work.prompt)).tolist()
        rewards = torch.tensor([0.0, 1.0]).repeat(work.prompts, work.group)
        self.rewards = rewards[:, : work.group].to(device)

    def rollout(self) -> Rollout:
        return self.sampler.sample(self.prompts, [("bench", i) for i in range(self.work.prompts)])

    def train(self, rollout: Rollout) -> None:
        rollout.rewards, rollout.advantages = self.rewards, group_advantages(self.rewards)
        models = self.model, self.policy, self.reference
        grpo_backward(*models, rollout, self.config, self.world)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0).item()
        self.optimizer.step()
        sync_weights(self.policy, self.model)
        self.optimizer.zero_grad()

    def update(self) -> None:
        self.train(self.rollout())


def peer_model(ours: Ours, eos_token_id: int | None) -> Qwen2ForCausalLM:
    """Return transformers' model of the same shape and weights."""
    shape = checkpoint.hf_config(ours.work.shape, WORDS)
    with ours.world.device:
        config = Qwen2Config(**shape | {"eos_token_id": eos_token_id, "pad_token_id": 0})
        peer = Qwen2ForCausalLM(config)
    peer.load_state_dict(dict(hf_weights(ours.model)), strict=False)  # tied: without the head
    return peer


def generate(ours: Ours, dtype: torch.dtype, static: bool = False) -> Callable[[], object]:
    """Return a call of transformers' generate that does the same work with the same weights."""
    work, device = ours.work, ours.world.device
    peer = peer_model(ours, None).eval().to(device, dtype)
    prompts = torch.tensor(ours.prompts, device=device).repeat_interleave(work.group, 0)
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}
    options |= {"max_new_tokens": work.new, "min_new_tokens": work.new}
    options |= {"cache_implementation": "static"} if static else {}
    return lambda: peer.generate(prompts, attention_mask=torch.ones_like(prompts), **options)


def trl_update_seconds(ours: Ours, precision: str, rounds: int) -> float:
    """Return the seconds of the fastest update of TRL's GRPOTrainer but the first."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            seconds.append(time.perf_counter() - self.start)

    def random_reward(completions, **_):
        return [float(hash(str(completion)) % 2) for completion in completions]

    work, seconds = ours.work, []
    # Three words of our tokenizer's own and the others make the vocabulary.
    tokenizer = word_tokenizer([f"w{i}" for i in range(work.shape.vocab_size - 3)]).inner
    tokenizer.padding_side = "left"
    prompts = [{"prompt": " ".join(["w5"] * work.prompt)}] * (work.prompts * (rounds + 2))
    batch_size = work.prompts * work.group
    options = {"use_cpu": not torch.cuda.is_available(), "bf16": precision == "bf16"}
    options |= {"per_device_train_batch_size": min(batch_size, 64)}
    options |= {"gradient_accumulation_steps": max(1, batch_size // 64)}
    options |= {"num_generations": work.group, "max_completion_length": work.new}
    options |= {"generation_kwargs": {"min_new_tokens": work.new}, "max_steps": 1 + rounds}
    options |= {"learning_rate": 1e-5, "beta": ours.config.beta, "temperature": 1.0, "top_k": 0}
    options |= {"save_strategy": "no", "report_to": [], "disable_tqdm": True}
    options |= {"gradient_checkpointing": False, "logging_steps": 1000}
    with tempfile.TemporaryDirectory() as folder:
        peer_model(ours, 1).save_pretrained(folder)  # TRL loads its reference model by name
        peer = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
        trainer = GRPOTrainer(
            model=peer,
            reward_funcs=random_reward,
            args=GRPOConfig(output_dir=folder, **options),
            train_dataset=Dataset.from_list(prompts),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        trainer.train()
    return min(seconds[1:])


# ------------------------------------------------------------------------------------------------
# Rows


def row(name: str, what: str, ours: float, peer: float | None, limit: float | None = None) -> dict:
    """Return a row of seconds; the ratio is the peer's over ours, `of_limit` the limit's."""
    times = {"name": name, "what": what, "ours": ours, "peer": peer}
    return times | {"ratio": peer and peer / ours, "of_limit": limit and limit / ours}


def rollout_rows(name: str, work: Work, machine: Machine) -> Iterator[dict]:
    ours, own, rounds = Ours(work, machine), DTYPES[machine.precision], machine.rounds
    limit = machine.rates.decode_seconds(work, own.itemsize)
    on_gpu = machine.world.device.type == "cuda"
    for static in (False, True) if on_gpu else (False,):
        dtypes = {own} if on_gpu else {own, torch.float32}
        timed = [in_turn(ours.rollout, generate(ours, dtype, static), rounds) for dtype in dtypes]
        seconds, peer = (min(times) for times in zip(*timed))
        kind = "static cache" if static else "dynamic cache"
        kind += ", its better of 2" * (len(dtypes) > 1)
        what = f"rollout in {machine.precision}, {work}; transformers generate, {kind}"
        yield row(name + "-static" * static, what, seconds, peer, limit)


def update_rows(name: str, work: Work, machine: Machine) -> Iterator[dict]:
    ours, rounds, peer = Ours(work, machine, beta=0.05), machine.rounds, None
    ours.update()
    seconds = best(ours.update, rounds)
    if importlib.util.find_spec("trl"):
        # TRL computes in our precision, a small model also in fp32, where that may be faster.
        precisions = {machine.precision} | ({"fp32"} if work.shape.hidden_size < 512 else set())
        peer = min(trl_update_seconds(ours, precision, rounds) for precision in precisions)
        seconds = min(seconds, best(ours.update, rounds))
    yield row(name, f"GRPO update in {machine.precision}, KL 0.05, {work}; TRL", seconds, peer)


def training_rows(name: str, work: Work, machine: Machine) -> Iterator[dict]:
    ours = Ours(work, machine)
    rollout = ours.rollout()
    ours.train(rollout)
    seconds = best(lambda: ours.train(rollout), machine.rounds)
    what = f"training half in {machine.precision}, {work}; of the limit: of a matrix product's rate"
    yield row(name, what, seconds, None, machine.rates.training_seconds(work))


ROWS = {
    "gpu-qwen-training": (training_rows, QWEN),
    "gpu-qwen-rollout": (rollout_rows, QWEN),
    "cpu-tiny-rollout": (rollout_rows, TINY),
    "cpu-tiny-update": (update_rows, TINY),
    "cpu-tiny-training": (training_rows, TINY),
    "cpu-smollm2-update": (update_rows, SMOLLM2),
}


def plot_lengths(work: Work, machine: Machine, path: Path) -> float:
    """Draw the time of updates of 3 to 9 steps over their tokens; return R^2 of a straight line."""
    from lib.plots import new_figure, save  # matplotlib takes a second to import

    tokens, seconds = [], []
    for steps in range(3, 10):
        problem = Task((steps, steps)).sample(random.Random(0), "train")
        solution = WORDS.solution(problem.solution(MATCHING_STRATEGY[problem.kind]))
        ours = Ours(replace(work, prompt=len(WORDS.prompt(problem)), new=len(solution)), machine)
        ours.update()
        tokens.append(ours.work.tokens)
        seconds.append(best(ours.update, machine.rounds))
    slope, start = np.polyfit(tokens, seconds, 1)
    line = start + slope * np.array(tokens)
    explained = 1 - ((seconds - line) ** 2).sum() / (len(seconds) * np.var(seconds))
    figure, (axes,) = new_figure(6, 4, 1, 1)
    axes.plot(tokens, line, color="0.7", label=f"straight line, R² = {explained:.3f}")
    axes.plot(tokens, seconds, "o", color="tab:blue", label="updates of 3 to 9 steps")
    for steps, point in enumerate(zip(tokens, seconds), 3):
        axes.annotate(str(steps), point, (0, 7), textcoords="offset points", ha="center")
    axes.set(xlabel="tokens generated", ylabel="seconds an update", xlim=(0, None), ylim=(0, None))
    axes.legend(loc="lower right")
    save(figure, path)
    return float(explained)


HEADER = """| row | what | ours, s | peer, s | ratio | of the limit |
| --- | --- | ---: | ---: | ---: | ---: |"""


def line(r: dict) -> str:
    peer, ratio = (f"{r['peer']:.3f}", f"{r['ratio']:.1f}x") if r["peer"] else ("", "")
    limit = f"{100 * r['of_limit']:.0f}%" if r["of_limit"] else ""
    return f"| {r['name']} | {r['what']} | {r['ours']:.3f} | {peer} | {ratio} | {limit} |"


def name_of(world: World) -> str:
    if world.device.type == "cuda":
        return torch.cuda.get_device_name(world.device)
    file = Path("/proc/cpuinfo")  # on Linux
    name = re.search(r"model name\s*: (.*)", file.read_text()) if file.exists() else None
    return f"{name[1] if name else 'CPU'}, {torch.get_num_threads()} threads"


def main(config: BenchConfig, world: World) -> None:
    require_min(config, rounds=1)
    known = config.only in ("", *ROWS)
    require(known, f"--only takes one of {', '.join(ROWS)}, not {config.only!r}")
    require_writable(config.json, config.plot)
    precision = detect_dtype(TINY.shape, world.device)
    rates = measure_rates(DTYPES[precision], world.device)
    machine = Machine(world, precision, rates, config.rounds)
    print(f"{name_of(world)}, torch {torch.__version__}; computing in {precision}")
    speed = f"matrix products {rates.operations / 1e12:.2f} TFLOP/s"
    print(f"memory {rates.bandwidth / 1e9:.0f} GB/s, {speed}\n\n{HEADER}", flush=True)
    timed = []
    for name, (rows, work) in ROWS.items():
        if name.startswith(config.only or ("gpu" if world.device.type == "cuda" else "cpu")):
            for r in rows(name, SMALL if config.small else work, machine):
                timed.append(r)
                print(line(r), flush=True)
    if config.plot:
        explained = plot_lengths(SMALL if config.small else TINY, machine, Path(config.plot))
        print(f"\na straight line explains {100 * explained:.1f}% of the time of 3 to 9 steps")
    if config.json:
        with user_errors():
            write_json(Path(config.json), timed)


if __name__ == "__main__":
    config = parse_flags(BenchConfig, __doc__)
    with distributed() as world:
        main(config, world)
