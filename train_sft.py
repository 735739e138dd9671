"""Stage 1: teach strategies by supervised fine-tuning on worked solutions.

    python train_sft.py                          # the tiny model, from nothing, either strategy for either type
    python train_sft.py --strategy forward       # forward solutions only: inversion must begin with a guess
    torchrun --nproc-per-node 2 train_sft.py     # the same gradient, from two processes

The loss is the mean of -log p over the tokens of the responses, the stop token included, prompts excluded. A tiny
model (random at first) sees fresh problems at every update; a pretrained one sees `--examples` of them over and over.
"""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from checkpoint import (
    Log,
    check_tokenizer,
    encode,
    load_model,
    load_optimizer,
    load_training,
    new_model,
    newest_checkpoint,
    open_run,
    save_checkpoint,
    stop_tokens,
)
from data.finite_field import Problem, Task, choose_strategies
from eval import evaluate, percent, summarise, validation_problems
from model import Packed, Transformer, pack, pad, response_log_probs
from runtime import World, clip_gradient, parse_flags, refusals, require, start, stream, torch_stream


@dataclass
class SftConfig:
    model: str = "tiny"  # tiny: random at first; or the folder of a Qwen2 / Qwen2.5 checkpoint
    strategy: Literal["forward", "backward", "mixed"] = "mixed"  # of the solutions; mixed: either for either type
    difficulty: Literal["easy", "hard", "extreme"] = "easy"  # easy (2-5 steps), hard (6-9) or extreme (6-15)
    steps: str = ""  # such as 3-7, instead of --difficulty
    parts: str = "1"  # parts of a problem, such as 1-2: two or more make a composition
    field: int = 11  # number of elements of the field, a prime
    relabel: Literal["fixed", "shown"] = "fixed"  # one hidden naming of the elements, or one shown in each prompt
    examples: int | None = None  # distinct problems, 0 for fresh ones always [tiny 0, pretrained 2048]
    epochs: int | None = None  # passes over the examples [pretrained 20]
    updates: int | None = None  # instead of --epochs [tiny 800]
    batch_size: int | None = None  # examples an update, over all processes [tiny 64, pretrained 16]
    lr: float | None = None  # peak learning rate of AdamW [tiny 2e-3, pretrained 2e-4]
    weight_decay: float = 0.01  # of AdamW
    warmup: int = 50  # updates to reach the peak; a cosine leads down to zero
    clip_gradient: float = 1.0  # longest gradient
    position_gap: int | None = None  # longest gap between prompt and response in positions [tiny 100, pretrained 0]
    seed: int = 0  # of weights, problems and everything else
    eval_every: int = 200  # updates between validations
    save_every: int = 400  # updates between checkpoints
    out: str = ""  # run folder [runs/sft-STRATEGY-gfFIELD]
    resume: bool = False  # continue the newest checkpoint of the run folder


def default_place(strategy: str, field: int, relabel: str) -> Path:
    return Path("runs") / f"sft-{strategy}-gf{field}{'-shown' if relabel == 'shown' else ''}"


def complete(config: SftConfig) -> SftConfig:
    """The config with the defaults that depend on the model, and checked."""
    tiny = config.model == "tiny"
    defaults = {"examples": 0, "updates": 800, "batch_size": 64, "lr": 2e-3, "position_gap": 100}
    if not tiny:
        defaults = {"examples": 2048, "batch_size": 16, "lr": 2e-4, "position_gap": 0}
        if config.updates is None:
            defaults["epochs"] = 20
    for name, value in defaults.items():
        if getattr(config, name) is None and not (name == "updates" and config.epochs is not None):
            setattr(config, name, value)
    config.out = config.out or str(default_place(config.strategy, config.field, config.relabel))

    require(config.examples >= 0, "--examples must not be negative")
    require(config.batch_size >= 1, "--batch-size must be at least 1")
    require(config.epochs is None or config.updates is None, "give --epochs or --updates, not both")
    if config.epochs is not None:
        require(config.examples > 0, "--epochs needs a number of --examples; with fresh ones give --updates")
        require(config.epochs >= 1, "--epochs must be at least 1")
    require(config.updates is None or config.updates >= 1, "--updates must be at least 1")
    require(0 < config.lr < 1, "--lr must lie between 0 and 1")
    require(config.weight_decay >= 0 and config.warmup >= 0, "--weight-decay and --warmup must not be negative")
    require(config.clip_gradient > 0, "--clip-gradient must be above 0")
    require(config.position_gap >= 0, "--position-gap must not be negative")
    require(config.eval_every >= 1 and config.save_every >= 1, "--eval-every and --save-every must be at least 1")
    return config


# ------------------------------------------------------------------------------------------------------------------
# Batches


def draw_examples(config: SftConfig, task: Task, update: int) -> list[tuple[Problem, str]]:
    """The problems and solutions of an update, for all processes together."""

    def example(key: int | str, i: int) -> tuple[Problem, str]:
        rng = stream(config.seed, "sft", key, i)
        problem = task.sample(rng, "train")
        return problem, problem.solution(choose_strategies(problem, config.strategy, rng))

    first = update * config.batch_size
    if config.examples == 0:
        return [example("fresh", i) for i in range(first, first + config.batch_size)]
    chosen = []
    for i in range(first, first + config.batch_size):
        epoch, place = divmod(i, config.examples)
        order = list(range(config.examples))
        stream(config.seed, "order", epoch).shuffle(order)
        chosen.append(example("data set", order[place]))
    return chosen


def make_batch(
    tokenizer: PreTrainedTokenizerFast, examples: list[tuple[Problem, str]], gaps: Tensor | None, device: torch.device
) -> Packed:
    """Pack prompts and solutions. `gaps` (B,) moves each response that many positions away from its prompt.

    A model that learns on short chains finds the steps in its prompt by their distance, and fails on longer ones;
    gaps between prompt and response make it go by the labels instead.
    """
    prompts, prompt_lengths = pad([encode(tokenizer, problem.prompt()) for problem, _ in examples], device)
    stop = stop_tokens(tokenizer)[:1]
    responses, lengths = pad([encode(tokenizer, solution) + stop for _, solution in examples], device)
    return pack(prompts, prompt_lengths, responses, lengths, torch.arange(len(examples), device=device), gaps)


def loss_sum(model: Transformer, batch: Packed) -> Tensor:
    """-log p summed over the response tokens."""
    return -response_log_probs(model, batch)[0].sum()


def learning_rate(config: SftConfig, update: int, updates: int) -> float:
    warm = min(1.0, (update + 1) / max(1, config.warmup))
    return config.lr * warm * 0.5 * (1 + math.cos(math.pi * update / updates))


# ------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def validate(
    model: Transformer, tokenizer: PreTrainedTokenizerFast, config: SftConfig, problems: list[Problem]
) -> dict[str, float | None]:
    """Loss on validation solutions; accuracy of one sampled response each."""
    rng = stream(config.seed, "validation strategies")
    examples = [(p, p.solution(choose_strategies(p, config.strategy, rng))) for p in problems]
    batch = make_batch(tokenizer, examples, None, model.lm_head.weight.device)
    figures = summarise(evaluate(model, tokenizer, problems, 1, 1.0, config.seed))["overall"]
    return {
        "validation_loss": loss_sum(model, batch).item() / len(batch.targets),
        "accuracy": figures["pass@1"],
        "accuracy_given_fit": figures["accuracy_given_fit"],
    }


def main(config: SftConfig, world: World) -> Path:
    """Train, and return the final checkpoint."""
    config = complete(config)
    with refusals():
        task = Task.from_flags(config.difficulty, config.steps, config.field, config.relabel, config.parts)
    run = Path(config.out)
    begin = open_run(run, config, world)
    updates = config.updates or math.ceil(config.epochs * config.examples / config.batch_size)

    source = newest_checkpoint(run) if begin else None
    if source is None and config.model == "tiny":
        model, tokenizer = new_model(config.field, config.seed)
        model.to(world.device)
    else:
        model, tokenizer = load_model(source or Path(config.model), world.device)
    check_tokenizer(tokenizer, config.field)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay, fused=True
    )
    if source:
        load_optimizer(source, optimizer)

    problems = validation_problems(task, 128, config.seed)
    log = Log(run, begin) if world.leads else None
    bar = tqdm(range(begin, updates), initial=begin, total=updates, desc="SFT", disable=not world.leads)
    figures: dict = {}
    for update in bar:
        clock = time.perf_counter()
        examples = draw_examples(config, task, update)[world.rank :: world.size]
        gaps = torch.randint(
            0, config.position_gap + 1, (len(examples),), generator=torch_stream(config.seed, "gaps", update, world.rank)
        )
        batch = make_batch(tokenizer, examples, gaps.to(world.device), world.device)
        (n_tokens,) = world.sum(len(batch.targets))
        loss = loss_sum(model, batch) / n_tokens
        loss.backward()
        world.sum_gradients(model)
        norm = clip_gradient(model, config.clip_gradient)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, update, updates)
        optimizer.step()
        optimizer.zero_grad()

        (total_loss,) = world.sum(loss.item())
        row = {"update": update + 1, "loss": total_loss, "gradient_norm": norm.item()}
        row |= {"lr": optimizer.param_groups[0]["lr"], "tokens_per_second": n_tokens / (time.perf_counter() - clock)}
        last = update + 1 == updates
        if world.leads:
            if (update + 1) % config.eval_every == 0 or last:
                figures = validate(model, tokenizer, config, problems)
            log.write(row | (figures if "validation_loss" in figures else {}))
            shown = {"loss": f"{total_loss:.3f}"}
            if figures:
                shown["right"] = percent(figures["accuracy"]) + "%"
                shown["right if fit"] = percent(figures["accuracy_given_fit"]) + "%"
            bar.set_postfix(shown)
            if (update + 1) % config.save_every == 0 or last:
                training = asdict(config) | {"stage": "sft", "total": updates}
                save_checkpoint(run, update + 1, model, tokenizer, optimizer, training)
        world.wait()
    return newest_checkpoint(run)


if __name__ == "__main__":
    main(parse_flags(SftConfig, __doc__), start())
