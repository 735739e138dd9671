"""Stage 2: reinforce an SFT model on problems it does not solve yet, by GRPO with an outcome reward alone.

    torchrun train_grpo.py --difficulty hard                        # the main job
    torchrun --nproc-per-node 8 train_grpo.py --difficulty hard     # one process a GPU
    python train_grpo.py --init runs/sft-forward-gf11 --out runs/forward

Without an SFT checkpoint at its default place, one is trained first. Each update: draw prompts, sample a group of
responses to each, reward those that end in the right answer, compare each with its group, take one step.

What is and what is not in it, against DeepSeekMath (arXiv 2402.03300): group advantages, clipped ratios and the k3
estimate of the KL divergence are there; bounds may differ below and above (DAPO, arXiv 2503.14476); the loss is the
mean over the *tokens* of the whole batch and not of each response (DAPO; no bias to short answers); a group whose
rewards are all equal has no advantage and is not trained on at all, not even towards the reference. There is one step
a rollout, so ratios differ from 1 by rounding alone, or by LoRA's dropout, and clipping is a guard.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

import train_sft
from checkpoint import TINY, choose_precision, load_model, load_policy, load_training, read_config
from data.finite_field import Problem, Task
from eval import behaviour, evaluate, judge_groups, report, summarise, token_budget, validation_problems
from lora import check_lora, dropout_key, without_adapters
from model import PRECISIONS, Transformer, refresh, trained, working_copy
from packed import Packed, add_gradients, describe, pack, pad, response_log_probs
from rollout import Rollout, Sampler
from run_folder import (
    Log,
    checkpoints,
    find_checkpoint,
    fingerprint,
    load_optimizer,
    newest_checkpoint,
    open_run,
    other_flags,
    read_log,
    save_checkpoint,
)
from runtime import (
    Signals,
    World,
    at_least,
    clip_gradient,
    count_skipped,
    is_sharded,
    parse_flags,
    places,
    processes,
    refusals,
    require,
    stream,
    warn,
)
from sharding import check_shard, shard
from tokenizer import Tokenizer, load_tokenizer, word_tokenizer


@dataclass
class GrpoConfig:
    init: str = ""  # SFT checkpoint or run [runs/sft-mixed-gfFIELD, trained first where it is missing]
    out: str = ""  # run folder [runs/grpo-DIFFICULTY-gfFIELD]
    difficulty: Literal["easy", "hard", "extreme"] = "hard"  # easy (2-5 steps), hard (6-9) or extreme (6-15)
    steps: str = ""  # such as 3-7, instead of --difficulty
    parts: str = "1"  # parts of a problem, such as 3-5: two or more make a composition
    field: int = 11  # number of elements of the field, a prime
    relabel: Literal["fixed", "shown"] = "fixed"  # one hidden naming of the elements, or one shown in each prompt
    evaluation_share: float = 0.5  # share of evaluation among the problems; the rest is inversion
    examples: int | None = None  # distinct problems, 0 for fresh ones always [tiny 0, pretrained 1024]
    updates: int | None = None  # optimizer steps [tiny 300, pretrained 500]
    prompts: int = 32  # problems an update, over all processes
    group: int = 8  # responses to each
    lr: float | None = None  # peak learning rate of AdamW [tiny 3e-4, pretrained 1e-5]
    warmup: int = 10  # updates to reach the peak; a straight line leads down to zero
    beta: float | None = None  # weight of the KL divergence from the SFT model [tiny 0, pretrained 0.05]
    clip_low: float = 0.2  # bad responses get no gradient where their ratio is below 1 - this
    clip_high: float = 0.2  # good responses get no gradient where their ratio is above 1 + this
    clip_gradient: float = 1.0  # a gradient of a larger norm is scaled down to this
    advantage: Literal["z-score", "mean"] = "z-score"  # rewards minus the group's mean, divided by its deviation or not
    temperature: float | None = None  # of the sampling [tiny 1.0, pretrained 0.7]
    max_new_tokens: int = 0  # longest response [0: the longest solution and a little more]
    micro_tokens: int = 0  # tokens of a forward pass [0: 16384 on a GPU, 2048 on the CPU]
    recompute: bool = False  # keep fewer activations for the backward pass and compute them again: less memory
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of the computation; auto measures. Weights stay fp32
    lora: int | None = None  # rank of LoRA adapters, 0 to train all the weights [tiny 0, pretrained 64]
    lora_alpha: int = 128  # adapters are scaled by this over their rank
    lora_dropout: float = 0.05  # share of the adapters' inputs that is dropped in training
    shard: bool = False  # split weights, gradients and optimizer over all processes (FSDP), to save memory
    no_chat_template: bool = False  # prompts as plain text, though the model has a chat template
    seed: int = 0  # of problems, sampling and everything else
    eval_every: int = 0  # updates between evaluations on validation problems [0: only at the end]
    eval_problems: int = 256  # validation problems of an evaluation
    save_every: int = 25  # updates between checkpoints
    keep: int | None = None  # newest checkpoints that are kept, 0 for all [tiny 0, pretrained 2]
    resume: bool = False  # continue the newest checkpoint of the run folder


def complete(config: GrpoConfig, tiny: bool) -> GrpoConfig:
    """The config with the defaults that depend on the model, and checked."""
    defaults = {"examples": 0, "updates": 300, "lr": 3e-4, "beta": 0.0, "temperature": 1.0}
    if not tiny:
        defaults = {"examples": 1024, "updates": 500, "lr": 1e-5, "beta": 0.05, "temperature": 0.7}
    defaults |= {"lora": 0, "keep": 0} if tiny else {"lora": 64, "keep": 2}
    for name, value in defaults.items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    at_least(config, updates=1, prompts=1, eval_problems=1, save_every=1)
    at_least(config, keep=0, examples=0, warmup=0, beta=0, max_new_tokens=0, micro_tokens=0, eval_every=0)
    check_lora(config)
    require(config.group >= 2, "--group must be at least 2: a response is compared with the others of its group")
    require(0 < config.lr < 1, "--lr must lie between 0 and 1")
    require(0 < config.clip_low < 1, "--clip-low must lie between 0 and 1")
    require(config.clip_high > 0, "--clip-high must be above 0")
    require(config.clip_gradient > 0, "--clip-gradient must be above 0")
    require(0 < config.temperature < math.inf, "--temperature must be above 0, and finite")
    return config


# ------------------------------------------------------------------------------------------------------------------
# The algorithm


def group_advantages(rewards: Tensor, kind: str = "z-score") -> Tensor:
    """Rewards (P, G) relative to their group: minus its mean and, for "z-score", over its standard deviation.

    A group of equal rewards gets zeros. Source: DeepSeekMath, section 4.1.2; "mean": Dr. GRPO, arXiv 2503.20783.
    """
    advantages = rewards - rewards.mean(1, keepdim=True)
    if kind == "z-score":
        advantages = advantages / (rewards.std(1, keepdim=True) + 1e-6)
    return advantages


def policy_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """-min(ratio A, clip(ratio, 1 - low, 1 + high) A) of each token; all (M,). Source: PPO, arXiv 1707.06347, eq. 7."""
    ratio = (log_probs - old_log_probs).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def kl_divergence(log_probs: Tensor, reference: Tensor) -> Tensor:
    """Schulman's estimate k3 of KL(policy || reference), of each token (M,): unbiased and never negative."""
    difference = reference - log_probs
    return difference.exp() - difference - 1


def micro_batches(prompt_lengths: Tensor, response_lengths: Tensor, chosen: Tensor, budget: int) -> Iterator[Tensor]:
    """Split the groups `chosen` into runs of at most `budget` tokens; a larger group stands alone.

    prompt_lengths (P,), response_lengths (P, G), chosen indices into P; yields indices.
    """
    costs = (prompt_lengths + response_lengths.sum(1))[chosen].tolist()
    first, total = 0, 0
    for i, cost in enumerate(costs):
        if total + cost > budget and i > first:
            yield chosen[first:i]
            first, total = i, 0
        total += cost
    if first < len(costs):
        yield chosen[first:]


def pack_groups(prompts: Tensor, prompt_lengths: Tensor, rollout: Rollout, groups: Tensor) -> tuple[Packed, Tensor]:
    """Pack the groups `groups` of prompts (P, Tp) and their rollout; also which rows (b,) of the rollout they are."""
    rows = torch.arange(len(rollout.tokens), device=groups.device).view(len(prompts), -1)[groups]  # (p, G)
    parents = torch.arange(len(groups), device=groups.device).repeat_interleave(rows.shape[1])
    rows = rows.flatten()
    Tp, T = prompt_lengths[groups].max(), rollout.lengths[rows].max()
    batch = pack(prompts[groups, :Tp], prompt_lengths[groups], rollout.tokens[rows, :T], rollout.lengths[rows], parents)
    return batch, rows


def add_gradient(
    model: Transformer,
    computing: Transformer,
    reference: Transformer | None,
    prompts: tuple[Tensor, Tensor],
    rollout: Rollout,
    rewards: Tensor,
    config: GrpoConfig,
    world: World,
    update: int = 0,
) -> dict[str, float]:
    """Add this process's share of the gradient of the GRPO loss to the model's; the figures of the whole batch.

    `computing` is the model's working copy, or the model where it is sharded; prompts (P, Tp) with their lengths (P,),
    the rollout of P * G responses, rewards (P, G).
    """
    P, G = rewards.shape
    advantages = group_advantages(rewards, config.advantage).flatten()
    chosen = (rewards != rewards[:, :1]).any(1).nonzero()[:, 0]  # groups with a signal
    # The mean is over all response tokens of the batch, on every process and in every micro-batch. Those of groups
    # without signal count, though their share of the loss is zero and they are never forwarded.
    n_tokens, n_groups, n_chosen = world.sum(int(rollout.lengths.sum()), P, len(chosen))

    def loss(i: int, groups: Tensor) -> tuple[Tensor, dict[str, float]]:
        batch, rows = pack_groups(*prompts, rollout, groups)
        mask = torch.arange(rollout.tokens.shape[1], device=rows.device) < rollout.lengths[rows, None]  # (b, T)
        old = rollout.log_probs[rows][mask]
        token_advantages = advantages[rows].repeat_interleave(rollout.lengths[rows])
        key = dropout_key(config, update, world.rank, i)
        log_probs, entropy = response_log_probs(computing, batch, config.temperature, entropy=True, dropout_key=key)
        losses = policy_loss(log_probs, old, token_advantages, config.clip_low, config.clip_high)
        ratio = (log_probs - old).detach().exp()
        outside = (ratio < 1 - config.clip_low) | (ratio > 1 + config.clip_high)
        per_token = {"entropy": entropy, "ratio": ratio, "clipped_share": outside}
        if reference is not None:
            with torch.no_grad():
                reference_log_probs, _ = response_log_probs(reference, batch, config.temperature)
            per_token["kl"] = kl_divergence(log_probs, reference_log_probs)
            losses = losses + config.beta * per_token["kl"]
        sums = {name: values.sum().item() for name, values in (per_token | {"loss": losses}).items()}
        difference = (log_probs - old).abs().max().item()
        return losses.sum() * (i < own) / n_tokens, sums | {"tokens": len(losses), "logprob_difference": difference}

    budget = config.micro_tokens or (16384 if world.device.type == "cuda" else 2048)  # caches of a CPU are small
    pieces = list(micro_batches(prompts[1], rollout.lengths.view(P, G), chosen, budget))
    own = len(pieces)
    if is_sharded(model):  # all processes have to make as many passes: those from `own` on count nothing
        first = torch.zeros(1, dtype=torch.long, device=rewards.device)
        pieces += [first] * (max(world.gather([own])) - own)
    parts = add_gradients(model, computing, loss, pieces)[:own]
    names = ["loss", "tokens", "entropy", "ratio", "clipped_share"] + ["kl"] * (reference is not None)
    total = dict(zip(names, world.sum(*(sum(part[name] for part in parts) for name in names))))
    loss_sum, trained_tokens = total.pop("loss"), total.pop("tokens")
    differences = world.gather([part["logprob_difference"] for part in parts])
    return {
        "loss": loss_sum / n_tokens,
        "groups_without_signal": 1 - n_chosen / n_groups,
        "trained_tokens": trained_tokens,
        "logprob_difference": max(differences, default=0.0),
        **{name: value / trained_tokens if trained_tokens else None for name, value in total.items()},
    }


# ------------------------------------------------------------------------------------------------------------------
# The loop


def learning_rate(config: GrpoConfig, update: int) -> float:
    """Up to the peak over the warm-up, then straight down to zero."""
    left = (config.updates - update) / max(1, config.updates - config.warmup)
    return config.lr * min(1.0, (update + 1) / (config.warmup + 1), left)


def find_sft(config: GrpoConfig) -> Path | None:
    """The checkpoint to start from; None where the default place has none that is finished."""
    if config.init:
        return find_checkpoint(config.init)
    found = newest_checkpoint(place := train_sft.default_place("mixed", config.field, config.relabel))
    training = load_training(found) if found else {}
    usual = train_sft.complete(train_sft.SftConfig(field=config.field, relabel=config.relabel), True)
    for flag, then, _ in other_flags(training, usual):
        require(flag == "--precision", f"{place} was trained with {flag} {then}: name it by --init if meant")
    return found if found and training.get("update") == training.get("total") else None


def train_sft_first(config: GrpoConfig, world: World) -> Path:
    """Train a checkpoint to start from in the default place, or go on training it."""
    place = train_sft.default_place("mixed", config.field, config.relabel)
    if world.leads:
        print(f"There is no finished SFT checkpoint in {place}: training one first (train_sft.py, mixed strategies).")
    resume = bool(checkpoints(place))
    return train_sft.main(train_sft.SftConfig(field=config.field, relabel=config.relabel, resume=resume), world)


def draw_problems(config: GrpoConfig, task: Task, update: int) -> list[Problem]:
    """The problems of an update, for all processes together."""
    if config.examples == 0:
        rng = stream(config.seed, "problems", update)
        return [task.sample(rng, "train") for _ in range(config.prompts)]
    chosen = places(config.seed, config.examples, update * config.prompts, config.prompts)
    return [task.sample(stream(config.seed, "RL data set", i), "train") for i in chosen]


def main(config: GrpoConfig, world: World) -> None:
    where = config.steps or config.difficulty
    config.out = config.out or f"runs/grpo-{where}-gf{config.field}{'-shown' if config.relabel == 'shown' else ''}"
    run = Path(config.out)
    source = newest_checkpoint(run) if config.resume else None
    known = source or find_sft(config)
    tokenizer = load_tokenizer(known, not config.no_chat_template) if known else word_tokenizer(config.field)
    config = complete(config, tokenizer.word_level)
    taught = load_training(known) if known else {}
    for name in ("field", "relabel"):
        given = getattr(config, name)
        require(taught.get(name, given) == given, f"{known} was trained with --{name} {taught.get(name)}, not {given}")
    tokenizer.check(config.field)
    require(config.prompts >= world.size, f"--prompts must be at least the number of processes, {world.size}")
    check_shard(config, world)
    with refusals():
        flags = (config.difficulty, config.steps, config.field, config.relabel, config.parts, config.evaluation_share)
        task = Task.from_flags(*flags)
        problems = validation_problems(task, config.eval_problems, config.seed)
    shape = read_config(known) if known else TINY
    max_new_tokens = token_budget(shape, tokenizer, task, config.max_new_tokens)
    begin = open_run(run, source, config, "grpo", world)
    init = Path(load_training(source)["start"]) if source else known or train_sft_first(config, world)
    precision = choose_precision(config.precision, shape, source, world)
    model, tokenizer = load_policy(config, init, source, precision, world.device)

    def start() -> Transformer:
        """The model before RL: what lies under the adapters, or else loaded anew."""
        return without_adapters(model) if config.lora else load_model(init, world.device, PRECISIONS[precision])[0]

    reference = start() if config.beta else None
    copy = shard(model, precision, world) if config.shard else working_copy(model, precision)
    computing = model if config.shard else copy
    computing.recompute = config.recompute
    optimizer = torch.optim.AdamW(trained(model), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    if begin:
        load_optimizer(source, optimizer)

    made = asdict(config) | {"stage": "grpo", "total": config.updates, "computed_in": precision}
    made |= {"start": str(init.resolve()), "start_sha256": fingerprint(init)}
    sampler = Sampler(copy, tokenizer.stops, config.group, max_new_tokens, config.temperature)
    if world.leads:
        print(f"Starting from {init}.\n{describe(copy)}")
    log = Log(run, begin) if world.leads else None
    bar = tqdm(range(begin, config.updates), initial=begin, total=config.updates, desc="GRPO", disable=not world.leads)
    signals, skipped, warned = Signals(), 0, set()
    for update in signals.during(bar):
        clock = time.perf_counter()
        mine = range(world.rank, config.prompts, world.size)
        drawn = draw_problems(config, task, update)[world.rank :: world.size]
        prompts = [tokenizer.prompt(problem) for problem in drawn]
        rollout = sampler.sample(prompts, [(config.seed, "sampling", update, i) for i in mine])
        sampled = time.perf_counter()
        judged = judge_groups(drawn, tokenizer.decode(rollout.responses()), rollout.stopped.tolist())
        rewards = torch.tensor([[float(r.correct) for r in group] for group in judged], device=world.device)

        padded = pad(prompts, world.device)
        n_sampled, n_broken, stopping = world.sum(
            int(rollout.lengths.sum()), not rollout.log_probs.isfinite().all(), signals.caught
        )
        figures = add_gradient(model, computing, reference, padded, rollout, rewards, config, world, update)
        world.sum_gradients(model)
        figures["gradient_norm"] = clip_gradient(model, config.clip_gradient)
        loss = math.nan if n_broken else figures["loss"]  # a policy of NaN gets no reward, hence no gradient
        skipped = count_skipped(skipped, loss, figures["gradient_norm"], run)
        figures["skipped"] = bool(skipped)
        if figures["groups_without_signal"] < 1 and not skipped:
            for parameters in optimizer.param_groups:
                parameters["lr"] = learning_rate(config, update)
            optimizer.step()
            refresh(copy, model)
        optimizer.zero_grad()
        done = time.perf_counter()

        judged = world.gather(judged)
        responses = [r for group in judged for r in group]
        row = {"update": update + 1, "reward": fmean(r.correct for r in responses)}
        row |= behaviour(judged) | figures
        row["response_length"] = n_sampled / len(responses)
        row["truncated_share"] = fmean(not r.stopped for r in responses)
        row["rollout_tokens_per_second"] = n_sampled / (sampled - clock)
        row["training_tokens_per_second"] = row.pop("trained_tokens") / (done - sampled)
        row["peak_memory_gb"] = peak_memory(world)
        last = update + 1 == config.updates
        if world.leads:
            if config.eval_every and (update + 1) % config.eval_every == 0:
                validated = evaluate(copy, tokenizer, problems, max_new_tokens, 1, config.temperature, config.seed)
                row |= {f"validation/{kind}": c["pass@1"] for kind, c in summarise(validated)["by_type"].items()}
            log.write(row)
            bar.set_postfix(progress(row))
            for message in (found := trouble(log.rows)) - warned:
                warn(message)
            warned = found
        if (update + 1) % config.save_every == 0 or last or stopping:
            save_checkpoint(run, update + 1, model, tokenizer, optimizer, made, world.leads)
        world.wait()
        if stopping and not last:
            signals.leave(run)
    if world.leads:
        models = {str(init): reference or start(), str(run / f"step-{config.updates}"): copy}
        closing_report(run, models, tokenizer, problems, max_new_tokens, config)
    world.wait()


WINDOW = 20  # updates over which trouble has to last


def trouble(rows: list[dict]) -> set[str]:
    """What has gone wrong for some time, by the last rows of a log, in words that say what to try."""
    recent = rows[-WINDOW:]
    if len(recent) < WINDOW:
        return set()
    found, reward = set(), fmean(row["reward"] for row in recent)
    if all(row["truncated_share"] == 1 for row in recent):
        found.add(
            "every response is cut off before its end: give more --max-new-tokens, or train the start longer by SFT"
        )
    if all(row["groups_without_signal"] == 1 for row in recent):
        wrong = "all responses to a problem are alike right or wrong, so nothing is learned: try easier problems "
        wrong += "(--steps), a larger --group, a higher --temperature or more SFT"
        right = "every response is right, so nothing is learned any more: stop here, or go on with harder problems "
        right += "(--steps, --difficulty extreme)"
        found.add(right if reward > 0.99 else wrong)
    taken = [row for row in recent if row["groups_without_signal"] < 1 and not row.get("skipped")]
    entropies = [row["entropy"] for row in taken]
    if entropies and max(entropies) < 1e-3 and reward < 0.9:
        found.add(
            "the policy has collapsed: its entropy is near zero though many responses are wrong. Start again with a "
            "lower --lr, a KL term (--beta 0.05) or a larger --clip-high"
        )
    return found


def progress(row: dict) -> dict[str, str]:
    """What the progress bar shows."""
    shown = {"reward": f"{row['reward']:.2f}"}
    shown |= {kind.split("/")[1]: f"{row[kind]:.2f}" for kind in row if kind.startswith("accuracy/")}
    return shown | {"no signal": f"{row['groups_without_signal']:.2f}", "norm": f"{row['gradient_norm']:.2f}"}


def closing_report(
    run: Path,
    models: dict[str, Transformer],
    tokenizer: Tokenizer,
    problems: list[Problem],
    budget: int,
    config: GrpoConfig,
) -> None:
    """Evaluate the start and the end of the run, by name, on the same problems; print, write and draw it."""
    from plot import plot_training  # matplotlib, which takes a second

    judged = {
        name: evaluate(model, tokenizer, problems, budget, 4, config.temperature, config.seed)
        for name, model in models.items()
    }
    print(f"\n{len(problems)} validation problems, 4 samples each at temperature {config.temperature}; figures in %")
    report(judged, run / "evaluation.json", run / "evaluation.png")
    plot_training({run.name: read_log(run / "metrics.jsonl")}, run / "training.png")
    print(f"checkpoint  {run / f'step-{config.updates}'}\nlog         {run / 'metrics.jsonl'}")
    print(f"plots       {run / 'training.png'}\n            {run / 'evaluation.png'}")


def peak_memory(world: World) -> float:
    """Largest memory this process has held so far, in GB: the GPU's, or else the machine's."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kilobytes on Linux


if __name__ == "__main__":
    config = parse_flags(GrpoConfig, __doc__)
    with processes() as world:
        main(config, world)
