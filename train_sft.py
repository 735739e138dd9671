"""Stage 1: teach strategies by supervised fine-tuning on worked solutions.

    python train_sft.py                          # the tiny model, new; either strategy for any type
    python train_sft.py --strategy forward       # forward only: inversion must begin with a guess
    python train_sft.py --model Qwen/Qwen2.5-1.5B-Instruct --out ckpt/qwen  # the paper's recipe
    torchrun --nproc-per-node 2 train_sft.py     # two processes share each batch

The loss is the mean of -log p over the tokens of the responses, the stop token included, prompts
excluded. A tiny model (random at first) sees fresh problems at every update; a pretrained one sees
`--examples` of them again in each epoch.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

import eval
from data.finite_field import Problem, Task, choose_strategies, validation_problems, vocabulary
from lib import checkpoint
from lib.checkpoint import load_meta, read_config
from lib.distributed import Signals, World, distributed, is_fsdp, n_threads
from lib.flags import parse_flags, require, require_min, user_errors
from lib.lora import dropout_key, validate_lora
from lib.packing import Packed, pack, pad, random_position_gaps, response_logps
from lib.policy import accumulate_gradients
from lib.rng import epoch_indices, rng, torch_rng
from lib.run_dir import changed_flags, checkpoints, find_checkpoint, newest_checkpoint, open_run
from lib.tokenizer import Tokenizer, load_tokenizer, word_tokenizer
from lib.training import Run, end_update, load_run, optimizer_step, validate_processes
from lib.transformer import Transformer


@dataclass
class SftConfig:
    # Run
    model: str = "tiny"  # tiny, or a folder or hub name: Qwen2, Qwen2.5, Qwen3, Llama 3, SmolLM2
    out: str = ""  # run folder [ckpt/sft-STRATEGY-gfFIELD, pretrained also -MODEL]
    seed: int = 0  # of weights, problems and everything else
    resume: bool = False  # continue the newest checkpoint of the run folder
    save_every: int = 400  # updates between checkpoints
    keep: int | None = None  # newest checkpoints that are kept, 0 for all [tiny 0, pretrained 2]
    eval_every: int = 200  # updates between validations
    # Problems
    strategy: Literal["forward", "backward", "mixed"] = "mixed"  # mixed: either for either type
    difficulty: Literal["easy", "hard", "extreme"] = "easy"  # 2-5, 6-9 or 6-15 steps
    steps: str = ""  # such as 3-7, instead of --difficulty
    parts: str = "1"  # parts of a problem, such as 1-2: two or more make a composition
    field: int = 11  # number of elements of the field, a prime
    relabel: Literal["fixed", "shown"] = "fixed"  # one hidden naming of the elements, or shown ones
    examples: int | None = None  # distinct problems, 0: always fresh ones [tiny 0, pretrained 2048]
    no_chat_template: bool = False  # prompts as plain text, though the model has a chat template
    # Optimizer
    epochs: int | None = None  # passes over the examples [pretrained 20]
    updates: int | None = None  # instead of --epochs [tiny 1600]
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


def default_out(strategy: str, field: int, relabel: str) -> Path:
    return Path("ckpt") / f"sft-{strategy}-gf{field}{'-shown' * (relabel == 'shown')}"


def fill_defaults(config: SftConfig, tiny: bool) -> SftConfig:
    """Fill in the defaults that depend on the model, and refuse impossible flags."""
    defaults = {"examples": 0, "batch_size": 32, "lr": 3e-3, "position_gap": 130}
    defaults |= {"lora": 0, "keep": 0}
    if not tiny:  # the paper's
        defaults = {"examples": 2048, "batch_size": 16, "lr": 2e-4, "position_gap": 0}
        defaults |= {"lora": 64, "keep": 2}
    if config.epochs is None and config.updates is None:
        defaults |= {"updates": 1600} if tiny else {"epochs": 20}
    for name, value in defaults.items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    out = default_out(config.strategy, config.field, config.relabel)
    if config.model != "tiny":  # not where train_grpo.py looks for the tiny one
        out = out.with_name(f"{out.name}-{Path(config.model).name}")
    config.out = config.out or str(out)

    require_min(config, batch_size=1, epochs=1, updates=1, eval_every=1, save_every=1)
    require_min(config, examples=0, weight_decay=0, warmup=0, position_gap=0, keep=0)
    validate_lora(config)
    both = config.epochs is not None and config.updates is not None
    require(not both, "give --epochs or --updates, not both")
    with_data = config.epochs is None or config.examples > 0
    require(with_data, "--epochs needs a number of --examples; with fresh ones give --updates")
    require(0 < config.lr < 1, "--lr must lie between 0 and 1")
    require(config.max_grad_norm > 0, "--max-grad-norm must be above 0")
    message = "--position-gap needs the word-level tokenizer of the tiny model"
    require(tiny or config.position_gap == 0, message)
    message = "--lora needs a trained --model: the tiny one is random"
    require(config.model != "tiny" or config.lora == 0, message)
    return config


# ------------------------------------------------------------------------------------------------
# Batches and the loss


def draw_examples(config: SftConfig, task: Task, update: int) -> list[tuple[Problem, str]]:
    """Return the problems and solutions of an update, for all processes together."""

    def example(key: int | str, i: int) -> tuple[Problem, str]:
        stream = rng(config.seed, "sft", key, i)
        problem = task.sample(stream, "train")
        return problem, problem.solution(choose_strategies(problem, config.strategy, stream))

    n = config.batch_size
    first = update * n
    if config.examples == 0:
        return [example("fresh", i) for i in range(first, first + n)]
    return [example("data set", i) for i in epoch_indices(config.seed, config.examples, first, n)]


def make_batch(
    tokenizer: Tokenizer,
    examples: list[tuple[Problem, str]],
    device: torch.device,
    position_gap: int = 0,
    keys: list[tuple] | None = None,
) -> Packed:
    """Pack prompts and solutions; with `position_gap`, at random positions drawn by `keys`.

    Without gaps, the prefix that all prompts share (a word at least, or a template and an
    explanation) is computed once.
    """
    prompts = [tokenizer.prompt(problem) for problem, _ in examples]
    solutions = [tokenizer.solution(solution) for _, solution in examples]
    if position_gap:
        starts = torch.tensor(tokenizer.line_starts())
        positions = [
            random_position_gaps(prompt, solution, starts, position_gap, torch_rng(*key))
            for prompt, solution, key in zip(prompts, solutions, keys)
        ]
        positions = tuple(pad(list(rows), device)[0] for rows in zip(*positions))
        index = torch.arange(len(examples), device=device)
        return pack(*pad(prompts, device), *pad(solutions, device), index, positions)

    differ = (i for i, tokens in enumerate(zip(*prompts)) if len(set(tokens)) > 1)
    shared = next(differ, min(map(len, prompts)))
    rests = [prompt[shared:] + solution for prompt, solution in zip(prompts, solutions)]
    rests, lengths = pad(rests, device)
    scored = torch.tensor([len(solution) for solution in solutions], device=device)
    index = torch.zeros_like(lengths)
    return pack(*pad([prompts[0][:shared]], device), rests, lengths, index, scored=scored)


def loss_sum(model: Transformer, batch: Packed, dropout_key: int | None = None) -> Tensor:
    """Return -log p summed over the response tokens."""
    return -response_logps(model, batch, dropout_key=dropout_key)[0].sum()


def sft_backward(
    run: Run, batches: list[Packed], config: SftConfig, world: World, update: int
) -> tuple[float, int]:
    """Accumulate this rank's gradient into run.master. Return the global loss and its tokens."""
    (n_tokens,) = world.all_reduce(sum(len(batch.targets) for batch in batches))
    model = run.master if is_fsdp(run.master) else run.policy

    def loss_fn(i: int, batch: Packed) -> tuple[Tensor, float]:
        key = dropout_key(config, update, world.rank, i)
        loss = loss_sum(model, batch, key) / n_tokens
        return loss, loss.item()

    (loss,) = world.all_reduce(sum(accumulate_gradients(run.master, run.policy, loss_fn, batches)))
    return loss, n_tokens


def learning_rate(config: SftConfig, update: int, updates: int) -> float:
    """Return linear warm-up times cosine decay to zero."""
    warm = min(1.0, (update + 1) / max(1, config.warmup))
    return config.lr * warm * 0.5 * (1 + math.cos(math.pi * update / updates))


@torch.no_grad()
def validate(run: Run, config: SftConfig, problems: list[Problem], max_new_tokens: int) -> dict:
    """Return the loss on validation solutions, and accuracy of one sampled response each."""
    stream = rng(config.seed, "validation strategies")
    strategies = [choose_strategies(problem, config.strategy, stream) for problem in problems]
    examples = [(problem, problem.solution(s)) for problem, s in zip(problems, strategies)]
    batch = make_batch(run.tokenizer, examples, run.policy.device)
    sampling = (problems, max_new_tokens, 1, 1.0, config.seed)
    metrics = eval.summarise(eval.evaluate(run.policy, run.tokenizer, *sampling))["overall"]
    return {
        "validation_loss": loss_sum(run.policy, batch).item() / len(batch.targets),
        "accuracy": metrics["pass@1"],
        "accuracy_given_match": metrics["accuracy_given_match"],
    }


# ------------------------------------------------------------------------------------------------
# The loop


def main(config: SftConfig, world: World) -> Path:
    """Train, and return the final checkpoint."""
    run, task, problems, max_new_tokens = set_up(config, world)
    n_parts = 1 if config.fsdp else n_threads(world.device)
    updates = range(run.first_update, run.updates)
    bar = {"initial": run.first_update, "total": run.updates, "disable": not world.is_master}
    bar = tqdm(updates, desc="SFT", **bar)
    signals, accuracy = Signals(), {}
    for update in signals.during(bar):
        start = time.perf_counter()

        # 1. Draw examples: this rank takes every world_size-th, a batch for each thread
        examples = draw_examples(config, task, update)
        mine = torch.arange(world.rank, config.batch_size, world.world_size)
        batches = []
        for indices in mine.tensor_split(min(n_parts, len(mine))):
            indices = indices.tolist()
            keys = [(config.seed, "gaps", update, i) for i in indices]
            chosen = [examples[i] for i in indices]
            gaps = (config.position_gap, keys)
            batches.append(make_batch(run.tokenizer, chosen, world.device, *gaps))

        # 2. Compute the loss and its gradient
        loss, n_tokens = sft_backward(run, batches, config, world, update)

        # 3. Step and log
        lr = learning_rate(config, update, run.updates)
        row = {"update": update + 1, "loss": loss}
        row |= optimizer_step(run, loss, lr, config.max_grad_norm, world) | {"lr": lr}
        row["tokens_per_second"] = n_tokens / (time.perf_counter() - start)
        if world.is_master:
            if (update + 1) % config.eval_every == 0 or update + 1 == run.updates:
                metrics = validate(run, config, problems, max_new_tokens)
                row |= metrics
                accuracy = {
                    "right": eval.percent(metrics["accuracy"]),
                    "right if matching": eval.percent(metrics["accuracy_given_match"]),
                }
            run.log.write(row)
            bar.set_postfix({"loss": f"{loss:.3f}"} | accuracy)
        end_update(run, update, config.save_every, signals, world)
    return run.folder / f"step-{run.updates}"


def set_up(config: SftConfig, world: World) -> tuple[Run, Task, list[Problem], int]:
    """Check everything before any work, then load the run; fill in the config's defaults.

    Return the run, the task, its validation problems, and the longest response in tokens.
    """
    words = vocabulary(config.field)
    tokenizer, init, shape = word_tokenizer(words), None, checkpoint.TINY
    if config.model != "tiny":
        init = find_checkpoint(config.model)
        tokenizer = load_tokenizer(init, not config.no_chat_template)
        shape = read_config(init)
    fill_defaults(config, tokenizer.word_level)
    tokenizer.require_vocabulary(words)
    with user_errors():
        flags = (config.difficulty, config.steps, config.field, config.relabel, config.parts)
        task = Task.from_flags(*flags)
        problems = validation_problems(task, 128, rng(config.seed, "validation problems"))
    longest = task.longest_examples(rng("token budget"))
    max_new_tokens = tokenizer.max_response_tokens(*longest, shape.max_position_embeddings)
    validate_processes(config, "batch_size", world)
    folder = Path(config.out)
    resume_from = newest_checkpoint(folder) if config.resume else None
    first_update = open_run(folder, resume_from, config, "sft", world)

    if init and resume_from:
        init = Path(load_meta(resume_from)["init_from"])
    n_batches = math.ceil((config.epochs or 0) * config.examples / config.batch_size)
    updates = config.updates or n_batches
    where = (updates, first_update, init and init.resolve(), resume_from, words, world)
    run = load_run(config, "sft", *where, weight_decay=config.weight_decay)
    return run, task, problems, max_new_tokens


# ------------------------------------------------------------------------------------------------
# The checkpoint that train_grpo.py starts from


def find_start(config) -> Path | None:
    """Return the checkpoint to start GRPO from; None if the default run is not finished."""
    if config.init:
        return find_checkpoint(config.init)
    folder = default_out("mixed", config.field, config.relabel)
    newest = newest_checkpoint(folder)
    if newest is None:
        return None
    meta = load_meta(newest)
    usual = fill_defaults(SftConfig(field=config.field, relabel=config.relabel), True)
    for flag, then, _ in changed_flags(meta, usual):
        message = f"{folder} was trained with {flag} {then}: name it by --init if meant"
        require(flag == "--precision", message)
    return newest if meta.get("update") == meta.get("total") else None


def train_start(config, world: World) -> Path:
    """Train the checkpoint to start GRPO from at its default place, or finish training it."""
    folder = default_out("mixed", config.field, config.relabel)
    if world.is_master:
        print(f"There is no finished SFT checkpoint in {folder}: training one first.")
    resume = bool(checkpoints(folder))
    return main(SftConfig(field=config.field, relabel=config.relabel, resume=resume), world)


if __name__ == "__main__":
    config = parse_flags(SftConfig, __doc__)
    with distributed() as world:
        main(config, world)
