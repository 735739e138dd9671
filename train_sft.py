"""Stage 1: teach strategies by supervised fine-tuning on worked solutions.

    python train_sft.py                          # the tiny model, from nothing, either strategy for either type
    python train_sft.py --strategy forward       # forward solutions only: inversion must begin with a guess
    python train_sft.py --model Qwen/Qwen2.5-1.5B-Instruct --out runs/qwen-sft    # the paper's recipe
    torchrun --nproc-per-node 2 train_sft.py     # two processes share each batch

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

from checkpoint import choose_precision, load_model, load_policy, load_training, new_model, read_config
from data.finite_field import Problem, Task, choose_strategies
from eval import evaluate, percent, summarise, token_budget, validation_problems
from lora import check_lora, dropout_key
from model import Transformer, refresh, trained, working_copy
from packed import Packed, add_gradients, describe, pack, pad, response_log_probs
from run_folder import Log, find_checkpoint, fingerprint, load_optimizer, newest_checkpoint, open_run, save_checkpoint
from runtime import (
    Signals,
    World,
    at_least,
    clip_gradient,
    count_skipped,
    n_threads,
    parse_flags,
    places,
    processes,
    refusals,
    require,
    stream,
    torch_stream,
)
from sharding import check_shard, shard
from tokenizer import Tokenizer, load_tokenizer, word_tokenizer


@dataclass
class SftConfig:
    model: str = "tiny"  # tiny: random at first; or a folder or hub name: Qwen2, Qwen2.5, Qwen3, Llama 3, SmolLM2
    strategy: Literal["forward", "backward", "mixed"] = "mixed"  # of the solutions; mixed: either for either type
    difficulty: Literal["easy", "hard", "extreme"] = "easy"  # easy (2-5 steps), hard (6-9) or extreme (6-15)
    steps: str = ""  # such as 3-7, instead of --difficulty
    parts: str = "1"  # parts of a problem, such as 1-2: two or more make a composition
    field: int = 11  # number of elements of the field, a prime
    relabel: Literal["fixed", "shown"] = "fixed"  # one hidden naming of the elements, or one shown in each prompt
    examples: int | None = None  # distinct problems, 0 for fresh ones always [tiny 0, pretrained 2048]
    epochs: int | None = None  # passes over the examples [pretrained 20]
    updates: int | None = None  # instead of --epochs [tiny 1600]
    batch_size: int | None = None  # examples an update, over all processes [tiny 32, pretrained 16]
    lr: float | None = None  # peak learning rate of AdamW [tiny 3e-3, pretrained 2e-4]
    weight_decay: float = 0.01  # of AdamW
    warmup: int = 100  # updates of linear warm-up, times a cosine decay from the peak to zero
    clip_gradient: float = 1.0  # a gradient of a larger norm is scaled down to this
    position_gap: int | None = None  # longest sum of random gaps in the positions [tiny 130, pretrained 0]
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of the computation; auto measures. Weights stay fp32
    lora: int | None = None  # rank of LoRA adapters, 0 to train all the weights [tiny 0, pretrained 64]
    lora_alpha: int = 128  # adapters are scaled by this over their rank
    lora_dropout: float = 0.05  # share of the adapters' inputs that is dropped in training
    shard: bool = False  # split weights, gradients and optimizer over all processes (FSDP), to save memory
    no_chat_template: bool = False  # prompts as plain text, though the model has a chat template
    seed: int = 0  # of weights, problems and everything else
    eval_every: int = 200  # updates between validations
    save_every: int = 400  # updates between checkpoints
    keep: int | None = None  # newest checkpoints that are kept, 0 for all [tiny 0, pretrained 2]
    out: str = ""  # run folder [runs/sft-STRATEGY-gfFIELD, pretrained also -MODEL]
    resume: bool = False  # continue the newest checkpoint of the run folder


def default_place(strategy: str, field: int, relabel: str) -> Path:
    return Path("runs") / f"sft-{strategy}-gf{field}{'-shown' if relabel == 'shown' else ''}"


def complete(config: SftConfig, tiny: bool) -> SftConfig:
    """The config with the defaults that depend on the model, and checked."""
    defaults = {"examples": 0, "updates": 1600, "batch_size": 32, "lr": 3e-3, "position_gap": 130}
    if not tiny:
        defaults = {"examples": 2048, "batch_size": 16, "lr": 2e-4, "position_gap": 0}
        if config.updates is None:
            defaults["epochs"] = 20
    defaults |= {"lora": 0, "keep": 0} if tiny else {"lora": 64, "keep": 2}
    for name, value in defaults.items():
        if getattr(config, name) is None and not (name == "updates" and config.epochs is not None):
            setattr(config, name, value)
    place = default_place(config.strategy, config.field, config.relabel)
    if config.model != "tiny":  # not where train_grpo.py looks for the tiny one
        place = place.with_name(f"{place.name}-{Path(config.model).name}")
    config.out = config.out or str(place)

    at_least(config, batch_size=1, epochs=1, updates=1, eval_every=1, save_every=1)
    at_least(config, examples=0, weight_decay=0, warmup=0, position_gap=0, keep=0)
    check_lora(config)
    require(config.epochs is None or config.updates is None, "give --epochs or --updates, not both")
    with_data = config.epochs is None or config.examples > 0
    require(with_data, "--epochs needs a number of --examples; with fresh ones give --updates")
    require(0 < config.lr < 1, "--lr must lie between 0 and 1")
    require(config.clip_gradient > 0, "--clip-gradient must be above 0")
    require(tiny or config.position_gap == 0, "--position-gap needs the word-level tokenizer of the tiny model")
    require(config.model != "tiny" or config.lora == 0, "--lora needs a trained --model: the tiny one is random")
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
    return [example("data set", i) for i in places(config.seed, config.examples, first, config.batch_size)]


def make_batch(
    tokenizer: Tokenizer,
    examples: list[tuple[Problem, str]],
    device: torch.device,
    longest_gap: int = 0,
    keys: list[tuple] | None = None,
) -> Packed:
    """Pack prompts and solutions; with `longest_gap`, at the positions that `spread` draws by each example's key.

    Without gaps, what all prompts begin with (a word at least, or a template's and an explanation) is computed once.
    """
    prompts = [tokenizer.prompt(problem) for problem, _ in examples]
    solutions = [tokenizer.solution(solution) for _, solution in examples]
    if longest_gap:
        starts = torch.tensor(tokenizer.line_starts())
        spreads = [spread(p, s, starts, longest_gap, torch_stream(*k)) for p, s, k in zip(prompts, solutions, keys)]
        positions = tuple(pad(list(rows), device)[0] for rows in zip(*spreads))
        parents = torch.arange(len(examples), device=device)
        return pack(*pad(prompts, device), *pad(solutions, device), parents, positions)

    differ = (i for i, tokens in enumerate(zip(*prompts)) if len(set(tokens)) > 1)
    shared = next(differ, min(map(len, prompts)))
    rests, lengths = pad([prompt[shared:] + solution for prompt, solution in zip(prompts, solutions)], device)
    scored = torch.tensor([len(solution) for solution in solutions], device=device)
    return pack(*pad([prompts[0][:shared]], device), rests, lengths, torch.zeros_like(lengths), scored=scored)


def spread(
    prompt: list[int], response: list[int], starts: Tensor, longest: int, generator: torch.Generator
) -> tuple[list[int], list[int]]:
    """Positions of both with random gaps, up to `longest` in all, before the tokens `starts`.

    A model that learns on short chains finds the steps of its prompt by their distance and counts lines to know when
    to stop, and fails on longer chains. With gaps it must go by the labels. (Randomised positions: arXiv 2305.16843.)
    """
    tokens = torch.tensor(prompt + response)
    weights = torch.rand(len(tokens), generator=generator) * torch.isin(tokens, starts)
    total = torch.rand(1, generator=generator) * longest
    gaps = (weights.cumsum(0) / weights.sum() * total).long()
    positions = (torch.arange(len(tokens)) + gaps).tolist()
    return positions[: len(prompt)], positions[len(prompt) :]


def loss_sum(model: Transformer, batch: Packed, dropout_key: int | None = None) -> Tensor:
    """-log p summed over the response tokens."""
    return -response_log_probs(model, batch, dropout_key=dropout_key)[0].sum()


def add_gradient(
    model: Transformer, computing: Transformer, batches: list[Packed], config: SftConfig, world: World, update: int
) -> tuple[float, float]:
    """Add this process's share of the gradient of the loss to the model's; its share of the loss, and how many tokens
    all processes have."""
    (n_tokens,) = world.sum(sum(len(batch.targets) for batch in batches))

    def loss(i: int, batch: Packed) -> tuple[Tensor, float]:
        value = loss_sum(computing, batch, dropout_key(config, update, world.rank, i)) / n_tokens
        return value, value.item()

    return sum(add_gradients(model, computing, loss, batches)), n_tokens


def learning_rate(config: SftConfig, update: int, updates: int) -> float:
    warm = min(1.0, (update + 1) / max(1, config.warmup))
    return config.lr * warm * 0.5 * (1 + math.cos(math.pi * update / updates))


# ------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def validate(
    model: Transformer, tokenizer: Tokenizer, config: SftConfig, problems: list[Problem], budget: int
) -> dict[str, float | None]:
    """Loss on validation solutions; accuracy of one sampled response each."""
    rng = stream(config.seed, "validation strategies")
    examples = [(p, p.solution(choose_strategies(p, config.strategy, rng))) for p in problems]
    batch = make_batch(tokenizer, examples, model.device)
    figures = summarise(evaluate(model, tokenizer, problems, budget, 1, 1.0, config.seed))["overall"]
    return {
        "validation_loss": loss_sum(model, batch).item() / len(batch.targets),
        "accuracy": figures["pass@1"],
        "accuracy_given_fit": figures["accuracy_given_fit"],
    }


def main(config: SftConfig, world: World) -> Path:
    """Train, and return the final checkpoint."""
    given = None if config.model == "tiny" else find_checkpoint(config.model)
    tokenizer = load_tokenizer(given, not config.no_chat_template) if given else word_tokenizer(config.field)
    config = complete(config, tokenizer.word_level)
    tokenizer.check(config.field)
    with refusals():
        task = Task.from_flags(config.difficulty, config.steps, config.field, config.relabel, config.parts)
        problems = validation_problems(task, 128, config.seed)
    require(config.batch_size >= world.size, f"--batch-size must be at least the number of processes, {world.size}")
    check_shard(config, world)
    run = Path(config.out)
    source = newest_checkpoint(run) if config.resume else None
    begin = open_run(run, source, config, "sft", world)
    updates = config.updates or math.ceil(config.epochs * config.examples / config.batch_size)

    if given is None:
        model, tokenizer = load_model(source) if source else new_model(config.field, config.seed)
        model.to(world.device)
        precision = choose_precision(config.precision, model.config, source, world)
    else:
        given = Path(load_training(source)["start"]) if source else given.resolve()
        precision = choose_precision(config.precision, read_config(given), source, world)
        model, tokenizer = load_policy(config, given, source, precision, world.device)
    copy = shard(model, precision, world) if config.shard else working_copy(model, precision)
    computing = model if config.shard else copy
    optimizer = torch.optim.AdamW(
        trained(model), lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay, fused=True
    )
    if source:
        load_optimizer(source, optimizer)

    made = asdict(config) | {"stage": "sft", "total": updates, "computed_in": precision}
    made |= {"start": str(given), "start_sha256": fingerprint(given)} if given else {}
    budget = token_budget(model.config, tokenizer, task)
    n_parts = 1 if config.shard else n_threads(world.device)
    if world.leads:
        print(describe(copy))
    log = Log(run, begin) if world.leads else None
    bar = tqdm(range(begin, updates), initial=begin, total=updates, desc="SFT", disable=not world.leads)
    shown: dict[str, str] = {}  # accuracy in percent, as last measured
    signals, skipped = Signals(), 0
    for update in signals.during(bar):
        clock = time.perf_counter()
        mine = range(world.rank, config.batch_size, world.size)
        examples = draw_examples(config, task, update)
        batches = []
        for piece in torch.tensor(mine).tensor_split(min(n_parts, len(mine))):
            chosen, keys = zip(*((examples[i], (config.seed, "gaps", update, i)) for i in piece.tolist()))
            batches.append(make_batch(tokenizer, chosen, world.device, config.position_gap, keys))
        loss, n_tokens = add_gradient(model, computing, batches, config, world, update)
        world.sum_gradients(model)
        norm = clip_gradient(model, config.clip_gradient)
        loss, stopping = world.sum(loss, signals.caught)
        skipped = count_skipped(skipped, loss, norm, run)
        lr = learning_rate(config, update, updates)
        for group in optimizer.param_groups:
            group["lr"] = lr
        if not skipped:
            optimizer.step()
            refresh(copy, model)
        optimizer.zero_grad()

        row = {"update": update + 1, "loss": loss, "gradient_norm": norm, "skipped": bool(skipped), "lr": lr}
        row["tokens_per_second"] = n_tokens / (time.perf_counter() - clock)
        last = update + 1 == updates
        if world.leads:
            if (update + 1) % config.eval_every == 0 or last:
                figures = validate(copy, tokenizer, config, problems, budget)
                shown = {"right": percent(figures["accuracy"])}
                shown["right if fit"] = percent(figures["accuracy_given_fit"])
                row |= figures
            log.write(row)
            bar.set_postfix({"loss": f"{loss:.3f}"} | shown)
        if (update + 1) % config.save_every == 0 or last or stopping:
            save_checkpoint(run, update + 1, model, tokenizer, optimizer, made, world.leads)
        world.wait()
        if stopping and not last:
            signals.leave(run)
    return run / f"step-{updates}"


if __name__ == "__main__":
    config = parse_flags(SftConfig, __doc__)
    with processes() as world:
        main(config, world)
