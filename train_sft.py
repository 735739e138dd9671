"""Stage 1: teach strategies by supervised fine-tuning on worked solutions.

    python train_sft.py                          # the tiny model, new; either strategy for any type
    python train_sft.py --strategy forward       # forward only: inversion must begin with a guess
    python train_sft.py --model Qwen/Qwen2.5-1.5B-Instruct --out ckpt/qwen  # the paper's recipe

The loss is the mean of -log p over the tokens of the responses, the stop token included. A tiny
model (random at first) sees fresh problems at every update, a pretrained one a set in each epoch.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import eval
from data import load_problems
from lib import training
from lib.checkpoint import checkpoints, find_checkpoint, load_meta, newest_checkpoint
from lib.distributed import Signals, World, distributed, is_fsdp, n_threads, peak_memory
from lib.flags import parse_flags, require, require_min, set_missing
from lib.lora import dropout_key
from lib.packing import Packed, pack_examples, response_logps
from lib.rng import epoch_indices, rng, torch_rng
from lib.run_dir import changed_flags, open_run
from lib.tokenizer import Tokenizer
from lib.transformer import Transformer
from rollout import Sampler


@dataclass
class SftConfig:
    # Run
    model: str = "tiny"  # tiny, or a folder or hub name: Qwen2, Qwen2.5, Qwen3, Llama 3, SmolLM2
    out: str = ""  # run folder [ckpt/sft-STRATEGY-gfFIELD or sft-FILE, pretrained also -MODEL]
    seed: int = 0  # of weights, problems and everything else
    resume: bool = False  # continue the newest checkpoint of the run folder
    save_every: int = 400  # updates between checkpoints
    keep: int | None = None  # newest checkpoints that are kept, 0 for all [tiny 0, pretrained 2]
    eval_every: int | None = None  # updates between validations [200]
    laptop: bool = False  # defaults for a pretrained model without a GPU; the start prints them
    # Problems
    strategy: Literal["forward", "backward", "mixed"] = "mixed"  # mixed: either for either type
    difficulty: Literal["easy", "hard", "extreme"] = "easy"  # 2-5, 6-9 or 6-15 steps
    steps: str = ""  # such as 3-7, instead of --difficulty
    parts: str = "1"  # parts of a problem, such as 1-2: two or more make a composition
    window: int = 0  # parts in a solution; those before stand solved in the prompt [0: all]
    field: int = 11  # number of elements of the field, a prime
    relabel: Literal["fixed", "shown"] = "fixed"  # one hidden naming of the elements, or shown ones
    examples: int | None = None  # distinct problems, 0: fresh [tiny 0, pretrained 2048; --data all]
    no_chat_template: bool = False  # prompts as plain text, though the model has a chat template
    data: str = ""  # JSON lines with prompt and response: data/jsonl.py
    answer_pattern: str = ""  # regular expression: where the answer lies in a response [all of it]
    max_new_tokens: int = 0  # longest response in validations [0: the longest solution, and more]
    # Optimizer
    epochs: int | None = None  # passes over the examples [pretrained 20]
    updates: int | None = None  # instead of --epochs [tiny 1600, above GF(11) 2400: seeds need it]
    batch_size: int | None = None  # examples per update, all processes [tiny 32, pretrained 16]
    lr: float | None = None  # peak learning rate of AdamW [tiny 3e-3, pretrained 2e-4]
    weight_decay: float = 0.01  # of AdamW
    warmup: int = 100  # updates of linear warm-up, times a cosine decay from the peak to zero
    max_grad_norm: float = 1.0  # the gradient is scaled down to this norm
    position_gap: int | None = None  # largest sum of random position gaps [tiny 130, pretrained 0]
    # Memory and precision
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of the computation; weights stay fp32
    lora: int | None = None  # rank of LoRA adapters, 0: train all weights [tiny 0, pretrained 64]
    lora_alpha: int = 128  # adapters are scaled by this over their rank
    lora_dropout: float = 0.05  # share of the adapters' inputs that is dropped in training
    fsdp: bool = False  # shard weights, gradients and optimizer over all processes


TINY = dict(updates=1600, batch_size=32, lr=3e-3, examples=0, position_gap=130, lora=0, keep=0)
PRETRAINED = dict(epochs=20, batch_size=16, lr=2e-4, examples=2048, position_gap=0, lora=64, keep=2)
TINY["eval_every"] = PRETRAINED["eval_every"] = 200
LAPTOP = dict(epochs=4, lr=1e-3, eval_every=128)  # what --laptop changes of these


def default_folder(config: SftConfig) -> Path:
    shown = "-shown" * (config.relabel == "shown")
    model = f"-{Path(config.model).name}" * (config.model != "tiny")  # where GRPO does not look
    name = Path(config.data).stem or f"{config.strategy}-gf{config.field}{shown}"
    return Path("ckpt") / f"sft-{name}{model}"


def fill_defaults(config: SftConfig, tiny: bool) -> SftConfig:
    """Fill in the defaults that depend on the model, and refuse impossible flags."""
    defaults = TINY if tiny else PRETRAINED | (LAPTOP if config.laptop else {})
    defaults = defaults | {"updates": 2400} if tiny and config.field > 11 else defaults
    if (config.epochs, config.updates) != (None, None):  # either replaces both defaults
        defaults = defaults | {"epochs": None, "updates": None}
    set_missing(config, defaults)
    config.out = config.out or str(default_folder(config))
    require_min(config, batch_size=1, epochs=1, eval_every=1, weight_decay=0, position_gap=0)
    require(config.epochs is None or config.updates is None, "give --epochs or --updates, not both")
    require(config.epochs is None or config.examples > 0, "--epochs needs a number of --examples")
    require(tiny or config.position_gap == 0, "--position-gap needs the tiny model's tokenizer")
    require(not (tiny and config.model == "tiny" and config.lora), "--lora needs a trained --model")
    return config


def draw_examples(config: SftConfig, task, update: int) -> list[tuple[object, str]]:
    """Return the problems and solutions of an update, for all processes together."""
    n = config.batch_size
    key, indices, examples = "fresh", range(update * n, update * n + n), []
    if config.examples:
        key, indices = "data set", epoch_indices(config.seed, config.examples, update * n, n)
    for i in indices:
        stream = rng(config.seed, "sft", key, i)
        problem = task.sample(stream, "train", i if config.examples else None)
        examples.append((problem, task.solution(problem, config.strategy, stream)))
    return examples


def make_batch(tokenizer: Tokenizer, examples: list, device, position_gap=0, keys=None) -> Packed:
    """Pack problems and solutions; with `position_gap`, at random positions drawn by `keys`."""
    prompts = [tokenizer.prompt(problem) for problem, _ in examples]
    solutions = [tokenizer.solution(solution) for _, solution in examples]
    gaps = None
    if position_gap:  # gaps come before start, end and what ends in :
        words = tokenizer.inner.get_vocab().items()
        starts = [i for word, i in words if word in ("start", "end") or word[-1] == ":"]
        gaps = [(torch.tensor(starts), position_gap, torch_rng(*key)) for key in keys]
    return pack_examples(prompts, solutions, device, gaps)


def loss_sum(model: Transformer, batch: Packed, dropout_key: int | None = None) -> Tensor:
    """Return -log p summed over the response tokens."""
    return -response_logps(model, batch, dropout_key=dropout_key)[0].sum()


def sft_backward(run: training.Run, batches: list, world: World, update: int) -> tuple:
    """Accumulate this rank's gradient into run.master. Return the global loss and its tokens."""
    (n_tokens,) = world.all_reduce(sum(len(batch.targets) for batch in batches))
    model = run.master if is_fsdp(run.master) else run.policy

    def loss_fn(i: int, batch: Packed) -> tuple[Tensor, float]:
        loss = loss_sum(model, batch, dropout_key(run.config, update, world.rank, i)) / n_tokens
        return loss, loss.item()

    losses = training.accumulate_gradients(run.master, run.policy, loss_fn, batches, world)
    return world.all_reduce(sum(losses))[0], n_tokens


@torch.no_grad()
def validation_metrics(run: training.Run, task, problems: list, max_new_tokens: int) -> dict:
    """Return the loss on validation solutions, and accuracy of one sampled response each."""
    stream = rng(run.config.seed, "validation strategies")
    examples = [(x, task.solution(x, run.config.strategy, stream)) for x in problems]
    n = min(8, len(examples))  # passes: a single one would take more memory than training
    batches = [make_batch(run.tokenizer, examples[i::n], run.policy.device) for i in range(n)]
    losses, tokens = zip(*((loss_sum(run.policy, x).item(), len(x.targets)) for x in batches))
    sampler = Sampler(run.policy, run.tokenizer.stops, 1, max_new_tokens)
    metrics = eval.metrics_of(eval.evaluate(sampler, run.tokenizer, problems, run.config.seed))
    right = {"accuracy": metrics["pass@1"], "accuracy_given_match": metrics["accuracy_given_match"]}
    return {"validation_loss": sum(losses) / sum(tokens)} | right


def main(config: SftConfig, world: World) -> Path:
    """Train, and return the final checkpoint."""
    run, task, problems, max_new_tokens = set_up(config, world)
    n_batches = config.batch_size // world.world_size // 32  # of some 32 examples, for memory
    n_batches = 1 if config.fsdp else max(n_threads(world.device), n_batches)
    signals, bar = Signals(), training.progress_bar(run, "SFT", world)
    for update in signals.during(bar):
        start = time.perf_counter()

        # 1. Draw examples: this rank takes every world_size-th, a batch for each thread
        examples = draw_examples(config, task, update)
        mine = torch.arange(world.rank, config.batch_size, world.world_size)
        batches = []
        for indices in mine.tensor_split(min(n_batches, len(mine))):
            chosen = [examples[i] for i in indices]
            gaps = config.position_gap, [(config.seed, "gaps", update, int(i)) for i in indices]
            batches.append(make_batch(run.tokenizer, chosen, world.device, *gaps))

        # 2. Compute the loss and its gradient
        loss, n_tokens = sft_backward(run, batches, world, update)

        # 3. Step and log
        lr = training.cosine_decay(config, update, run.updates)
        row = {"update": update + 1, "loss": loss, "lr": lr}
        row |= training.optimizer_step(run, loss, lr, world)
        row["tokens_per_second"] = n_tokens / (time.perf_counter() - start)
        if world.is_master:
            if (update + 1) % config.eval_every == 0 or update + 1 == run.updates:
                row |= validation_metrics(run, task, problems, max_new_tokens)
            row["peak_memory_gb"] = peak_memory(world.device)
            training.log_sft_update(run, row, bar)
        training.end_update(run, update, signals, world)
    return run.folder / f"step-{run.updates}"


def set_up(config: SftConfig, world: World) -> tuple[training.Run, object, list, int]:
    """Check everything before any work, fill in the config's defaults, and load the run.

    Return it, the task, its validation problems, and the longest response in tokens.
    """
    folder = Path(config.out or default_folder(config))
    task, problems = load_problems(config, 128)
    for problem in (*task.train, *problems) if config.data else ():
        require("response" in problem.row, f"{problem.where}: SFT needs a 'response'")
    source = resume_from = newest_checkpoint(folder) if config.resume else None
    if not resume_from and config.model != "tiny":
        source = find_checkpoint(config.model)
    tokenizer = training.find_tokenizer(config, task, source)
    fill_defaults(config, tokenizer.word_level)
    first_update, start = open_run(folder, resume_from, config, "sft", world)
    max_new_tokens = training.validate(config, tokenizer, source, task, problems, world)
    init = start if resume_from else source
    in_epochs = math.ceil((config.epochs or 0) * config.examples / config.batch_size)
    origin = (config.updates or in_epochs, first_update, init, resume_from, tokenizer, world)
    run = training.load_run(config, "sft", *origin)
    training.print_laptop(config, LAPTOP, world)
    return run, task, problems, max_new_tokens


def find_init(config) -> Path | None:
    """Return the checkpoint to start GRPO from; None if the default run is not finished."""
    if config.init:
        return find_checkpoint(config.init)
    require(not config.data, "--data needs a model to start from: --init")
    usual = SftConfig(field=config.field, relabel=config.relabel)
    folder = default_folder(usual)
    if (newest := newest_checkpoint(folder)) is None:
        return None
    meta = load_meta(newest)
    for flag, then, _ in changed_flags(meta, fill_defaults(usual, tiny=True)):
        message = f"{folder} was trained with {flag} {then}: name it by --init if meant"
        require(flag == "--precision", message)
    return newest if meta.get("update") == meta.get("total") else None


def train_start(config, world: World) -> Path:
    """Train the checkpoint to start GRPO from at its default place, or finish training it."""
    usual = SftConfig(field=config.field, relabel=config.relabel)
    folder = default_folder(usual)
    if world.is_master:
        print(f"There is no finished SFT checkpoint in {folder}: training one first.")
    usual.resume = bool(checkpoints(folder))
    return main(usual, world)


if __name__ == "__main__":
    config = parse_flags(SftConfig, __doc__)
    with distributed() as world:
        main(config, world)
