"""Stage 2: GRPO on hard problems, from an SFT checkpoint. Reward: 1 if the answer is right, else 0.

    torchrun train_grpo.py --difficulty hard                        # the main job
    torchrun --nproc-per-node 8 train_grpo.py --difficulty hard     # one process per GPU
    python train_grpo.py --init ckpt/sft-forward-gf11 --out ckpt/forward

Without an SFT checkpoint at its default place, one is trained first. Read `main` for the loop and
`grpo_loss` for the objective. The defaults differ from DeepSeekMath (GRPO, arXiv 2402.03300): the
loss is the mean over the tokens of the whole batch, a group of equal rewards is not trained on, not
even by the KL, and one step per rollout leaves ratios at 1 but for rounding and LoRA's dropout.
Published methods combine a few choices (paper/README.md has a table):

    --normalise   tokens: DAPO, arXiv 2503.14476; responses: GRPO; constant: Dr. GRPO, 2503.20783
    --ratio-of    token: PPO, 1707.06347; sequence, their geometric mean: GSPO, 2507.18071
    --clip        ratio: PPO, its bounds apart: DAPO; weight: CISPO, 2506.13585
    --advantage   z-score: GRPO; mean: Dr. GRPO; leave-one-out: RLOO, 2402.14740
    --mask-truncated, --refills: DAPO's overlong filter and dynamic sampling
"""

import contextlib
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import eval
import train_sft
from data import load_problems
from lib import training
from lib.checkpoint import newest_checkpoint
from lib.distributed import Signals, World, distributed, is_fsdp
from lib.flags import parse_flags, require, require_min, set_missing, user_errors
from lib.lora import dropout_key
from lib.memory import micro_batches_that_fit, still_to_come
from lib.packing import response_logps
from lib.rng import epoch_indices, rng
from lib.run_dir import open_run
from lib.training import Run
from lib.transformer import Transformer
from rollout import Rollout, Sampler
from strategies import score_rollout


@dataclass
class GrpoConfig:
    # Run
    init: str = ""  # SFT checkpoint or run [ckpt/sft-mixed-gfFIELD, trained first if it is missing]
    out: str = ""  # run folder [such as ckpt/grpo-hard-gf11; with --data ckpt/grpo-FILE]
    seed: int = 0  # of problems, sampling and everything else
    resume: bool = False  # continue the newest checkpoint of the run folder
    save_every: int = 25  # updates between checkpoints
    keep: int | None = None  # newest checkpoints that are kept, 0 for all [tiny 0, pretrained 2]
    eval_every: int = 0  # updates between evaluations on validation problems [0: only at the end]
    eval_problems: int | None = None  # validation problems of an evaluation [256]
    laptop: bool = False  # defaults for a pretrained model without a GPU; the start prints them
    keep_responses: int = 2  # groups of each split written to responses.jsonl at saves, evaluations
    # Problems
    difficulty: Literal["easy", "hard", "extreme"] = "hard"  # 2-5, 6-9 or 6-15 steps
    steps: str = ""  # such as 3-7, instead of --difficulty
    parts: str = "1"  # parts of a problem, such as 3-5: two or more make a composition
    field: int = 11  # number of elements of the field, a prime
    relabel: Literal["fixed", "shown"] = "fixed"  # one hidden naming of the elements, or shown ones
    evaluation_share: float = 0.5  # share of evaluation among the problems; the rest is inversion
    examples: int | None = None  # distinct problems, 0: fresh [tiny 0, pretrained 1024; --data all]
    no_chat_template: bool = False  # prompts as plain text, though the model has a chat template
    data: str = ""  # JSON lines with prompt and answer: data/jsonl.py
    answer_pattern: str = ""  # regular expression: where the answer lies in a response [all of it]
    reward: str = ""  # FILE.py:function, (row, response, correct) -> the reward, any float
    tagger: str = ""  # FILE.py:function, (row, response) -> the strategy of a response, any text
    # Sampling
    prompts_per_update: int | None = None  # problems per update, over all processes [32]
    group_size: int = 8  # responses to each
    temperature: float | None = None  # of the sampling [tiny 1.0, pretrained 0.7]
    max_new_tokens: int = 0  # longest response [0: longest solution and a line; none known: 256]
    refills: int = 0  # times that groups without signal are replaced by fresh problems
    # Objective
    advantage: Literal["z-score", "mean", "leave-one-out"] = "z-score"  # how rewards are compared
    normalise: Literal["tokens", "responses", "constant"] = "tokens"  # what the loss is a mean of
    ratio_of: Literal["token", "sequence"] = "token"  # importance ratio per token or per response
    clip: Literal["ratio", "weight"] = "ratio"  # clip the ratio, or weight log p by it, clipped
    mask_truncated: bool = False  # leave responses that the token limit cut off out of the loss
    minibatches: int = 1  # steps per rollout, each on a share of its groups
    beta: float | None = None  # weight of the KL from the start [tiny 0, pretrained 0.05]
    clip_low: float = 0.2  # advantage < 0: no gradient at ratios below 1 - this (--clip ratio)
    clip_high: float = 0.2  # advantage > 0: no gradient above 1 + this; cap of --clip weight
    # Optimizer
    updates: int | None = None  # rollouts that are trained on [tiny 300, pretrained 500]
    lr: float | None = None  # peak learning rate of AdamW [tiny 3e-4, pretrained 1e-5]
    warmup: int = 10  # updates of linear warm-up, then linear decay to zero
    max_grad_norm: float = 1.0  # the gradient is scaled down to this norm
    # Memory and precision
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of the computation; weights stay fp32
    micro_batch_tokens: int = 0  # tokens of a pass [0: as many as fit a GPU; on the CPU up to 2048]
    gradient_checkpointing: bool = False  # recompute activations in the backward pass
    lora: int | None = None  # rank of LoRA adapters, 0: train all weights [tiny 0, pretrained 64]
    lora_alpha: int = 128  # adapters are scaled by this over their rank
    lora_dropout: float | None = None  # share of the adapters' inputs dropped in training [0.05]
    fsdp: bool = False  # shard weights, gradients and optimizer over all processes


TINY = dict(updates=300, lr=3e-4, beta=0.0, temperature=1.0, examples=0, lora=0, keep=0)
PRETRAINED = dict(updates=500, lr=1e-5, beta=0.05, temperature=0.7, examples=1024, lora=64, keep=2)
USUAL = dict(prompts_per_update=32, eval_problems=256, lora_dropout=0.05)  # of either model
LAPTOP = dict(prompts_per_update=8, eval_problems=128, lora_dropout=0.0)  # with --laptop
LAPTOP |= dict(updates=40, lr=2e-4, beta=0.0)


def fill_defaults(config: GrpoConfig, tiny: bool) -> GrpoConfig:
    """Fill in the defaults that depend on the model, and refuse impossible flags."""
    set_missing(config, TINY if tiny else PRETRAINED)
    require_min(config, group_size=2, prompts_per_update=1, eval_problems=1, beta=0, eval_every=0)
    require_min(config, micro_batch_tokens=0, keep_responses=0, refills=0, minibatches=1)
    require(0 < config.clip_low < 1, "--clip-low must lie between 0 and 1")
    require(config.clip_high > 0, "--clip-high must be above 0")
    require(1e-3 <= config.temperature <= 1e3, "--temperature must lie between 0.001 and 1000")
    return config


def group_advantages(rewards: Tensor, kind: str = "z-score") -> Tensor:
    """Return rewards (P, G) minus their group's mean and, for "z-score", over its std.

    A group of equal rewards gets exact zeros. "leave-one-out": minus the mean of the others.
    """
    advantages = (rewards - rewards.mean(1, keepdim=True)).float()
    if kind == "z-score":
        advantages = advantages / (advantages.std(1, keepdim=True) + 1e-6)
    if kind == "leave-one-out":
        advantages = advantages * rewards.shape[1] / (rewards.shape[1] - 1)
    return torch.where((rewards != rewards[:, :1]).any(1, keepdim=True), advantages, 0.0)


def grpo_loss(
    config: GrpoConfig,
    logps: Tensor,
    old_logps: Tensor,
    ref_logps: Tensor | None,
    advantages: Tensor,
    response_index: Tensor,
    truncated: Tensor,
    totals: dict[str, float],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of M tokens, which is the whole objective, and per-token metrics, (M,) each.

    All tensors are (M,): log-probs under the policy, under the sampler, and under the reference
    (None without a KL term); each token's advantage, the number of its response, and whether that
    response was cut off. `totals` holds what the sum is divided by for each --normalise, counted
    over all ranks and micro-batches, so that micro-batches' losses add up. Sources: the list at the
    top of this file; for the KL estimate k3, joschu.net/blog/kl-approx.html.
    """
    log_ratio = logps - old_logps
    lengths = response_index.bincount().clamp(min=1)  # (max + 1,) tokens of each response here
    if config.ratio_of == "sequence":
        sums = log_ratio.new_zeros(len(lengths)).index_add(0, response_index, log_ratio)
        log_ratio = (sums / lengths)[response_index]
    ratio = log_ratio.exp()
    if config.clip == "ratio":
        clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        per_token_loss = -torch.minimum(ratio * advantages, clipped * advantages)
        is_clipped = ratio * advantages > clipped * advantages  # no gradient but a KL term's
    else:
        clipped = ratio.clamp(max=1 + config.clip_high)
        per_token_loss = -clipped.detach() * advantages * logps
        is_clipped = ratio > clipped
    per_token = {"ratio": ratio, "clip_ratio": is_clipped}
    if ref_logps is not None:
        d = ref_logps - logps
        kl = d.exp() - d - 1  # k3: never negative; its gradient is that of KL(ref || policy)
        per_token_loss = per_token_loss + config.beta * kl
        per_token["kl"] = kl
    if config.mask_truncated:
        per_token_loss = per_token_loss * ~truncated
    if config.normalise == "responses":
        per_token_loss = per_token_loss / lengths[response_index]
    return per_token_loss.sum() / totals[config.normalise], per_token


def grpo_backward(run: Run, rollout: Rollout, groups: Tensor, step: int, world: World) -> dict:
    """Accumulate this rank's gradient of some groups (p,) into run.master.

    Return the loss and the metrics of all ranks' micro-batches. `rollout` has its rewards and
    advantages (P, G); `step` numbers the random stream of dropout.
    """
    groups = groups.to(rollout.rewards.device)
    config, lengths = run.config, rollout.lengths.view(rollout.rewards.shape)  # (P, G)
    active = groups[rollout.advantages[groups].any(1)]  # the others only count in `totals`
    counted = lengths * rollout.stopped.view_as(lengths) if config.mask_truncated else lengths
    broken = not rollout.logps.isfinite().all()  # a policy of NaN earns no reward: it shows here
    counts = (int(counted[groups].sum()), lengths[groups].numel(), broken)
    n_tokens, n_responses, n_broken = world.all_reduce(*counts)
    totals = {"tokens": max(1, n_tokens), "responses": n_responses}
    totals["constant"] = n_responses * rollout.max_new_tokens
    model = run.master if is_fsdp(run.master) else run.policy

    def loss_fn(i: int, some: Tensor) -> tuple[Tensor, dict[str, float]]:
        batch, old_logps, response_index = rollout.pack(some)  # (M,) each
        key = dropout_key(config, step, world.rank, i)
        logps, entropy = response_logps(
            model, batch, config.temperature, entropy=True, dropout_key=key
        )
        ref_logps = None
        if run.reference is not None:
            with torch.no_grad():
                ref_logps, _ = response_logps(run.reference, batch, config.temperature)
        advantages = rollout.advantages.flatten()[response_index]  # (M,)
        truncated = ~rollout.stopped[response_index]  # (M,)
        loss, per_token = grpo_loss(
            config, logps, old_logps, ref_logps, advantages, response_index, truncated, totals
        )
        per_token["entropy"] = entropy  # for the log: it carries no gradient (lib/packing.py)
        return loss, training.batch_metrics(loss, per_token, logps - old_logps)

    batches = micro_batches_that_fit(run, world, rollout.prompt_lengths, lengths, active)
    metrics = training.accumulate_gradients(run.master, run.policy, loss_fn, batches, world)
    metrics = world.all_gather(metrics)  # of all ranks' micro-batches
    loss = math.nan if n_broken else sum(of_batch["loss"] for of_batch in metrics)
    return {"loss": loss, "batches": metrics}


def draw_problems(config: GrpoConfig, task, update: int) -> list:
    """Return the problems of an update, for all processes together."""
    n, seed = config.prompts_per_update, config.seed
    if config.examples == 0:
        stream = rng(seed, "problems", update)
        return [task.sample(stream, "train") for _ in range(n)]
    indices = epoch_indices(seed, config.examples, update * n, n)
    return [task.sample(rng(seed, "RL data set", i), "train", i) for i in indices]


def draw_and_score(config, task, sampler: Sampler, tokenizer, draw: int, numbers) -> Rollout:
    """Return scored responses to the problems `numbers` of a draw, which keys random streams."""
    # 1. Draw problems
    of_all_ranks = draw_problems(config, task, draw)
    problems = [of_all_ranks[i] for i in numbers]

    # 2. Sample a group of responses to each
    keys = [(config.seed, "sampling", draw, i) for i in numbers]
    with user_errors():  # a prompt too long for the model
        rollout = sampler.sample([tokenizer.prompt(problem) for problem in problems], keys)

    # 3. Score them: reward, strategy, first error
    score_rollout(rollout, problems, tokenizer)
    return rollout


def main(config: GrpoConfig, world: World) -> None:
    run, task, problems, max_new_tokens = set_up(config, world)
    tokenizer, policy = run.tokenizer, run.policy
    run.reference = training.initial_policy(run) if config.beta else None
    sampling = (config.group_size, max_new_tokens, config.temperature)
    sampler = Sampler(policy, tokenizer.stops, *sampling, partial(still_to_come, run, world))
    numbers = range(config.prompts_per_update)[world.rank :: world.world_size]  # of this rank
    minibatches = training.split_groups(config, numbers)

    def prepare(model: Transformer, G: int) -> eval.Policy:  # G responses to each problem
        return Sampler(model, tokenizer.stops, G, max_new_tokens, config.temperature), tokenizer

    followed = (tokenizer, problems[: config.keep_responses], config.seed)
    if world.is_master and run.first_update == 0:
        training.keep_responses(run, 0, problems, eval.evaluate(sampler, *followed))
    signals, bar = Signals(), training.progress_bar(run, "GRPO", world)
    draw_rollout = partial(draw_and_score, config, task, sampler, tokenizer)
    for update in signals.during(bar):
        # 1 to 3. Draw problems, sample a group of responses to each, score them
        start = time.perf_counter()
        rollout = draw_rollout(update, numbers)
        sampled = [rollout]
        for refill in range(1, config.refills + 1):  # groups without signal, by fresh problems
            dull = (~rollout.has_signal()).nonzero()[:, 0].tolist()
            if dull:
                draw = update + refill * run.updates
                sampled.append(draw_rollout(draw, [numbers[i] for i in dull]))
                rollout = rollout.with_groups(dull, sampled[-1])
        seconds = [time.perf_counter() - start]

        # 4. Compare each reward with its group's
        rollout.advantages = group_advantages(rollout.rewards, config.advantage)

        lr, steps = training.linear_decay(config, update, run.updates), []
        for i, minibatch in enumerate(minibatches):
            # 5. Compute the loss and its gradient, with dropout's streams numbered like the draws
            metrics = grpo_backward(run, rollout, minibatch, update + i * run.updates, world)

            # 6. Step, sync the sampler's weights, log
            steps.append(metrics | training.optimizer_step(run, metrics["loss"], lr, world))
        seconds.append(time.perf_counter() - start - seconds[0])
        scored = [group for fresh in sampled for group in fresh.scored]
        row = {"update": update + 1, "lr": lr} | eval.rollout_metrics(world.all_gather(scored))
        row |= training.update_metrics(steps, rollout, sampled, seconds, world)
        if world.is_master:
            if evaluating := config.eval_every and (update + 1) % config.eval_every == 0:
                row |= eval.validation_metrics(prepare(policy, 1), problems, config.seed)
            training.log_update(run, row, bar)
            if evaluating or training.save_is_due(run, update):
                validation = eval.evaluate(sampler, *followed)
                training.keep_responses(run, update + 1, problems, validation, rollout)
        training.end_update(run, update, signals, world)

    if world.is_master:
        models = {str(run.folder / f"step-{run.updates}"): policy}
        with contextlib.suppress(SystemExit):  # a line says that the start is gone
            models = {str(run.init): run.reference or training.initial_policy(run)} | models
        policies = {name: partial(prepare, model, 4) for name, model in models.items()}
        evaluations = eval.evaluate_policies(policies, problems, config.seed)
        how = f"4 samples each at temperature {config.temperature}; in %"
        eval.report_run(how, evaluations, run.folder, run.log.rows)
    world.barrier()


def set_up(config: GrpoConfig, world: World) -> tuple[Run, object, list, int]:
    """Check everything before any work, fill in the config's defaults, and load the run.

    Return it, the task, its validation problems, and the longest response in tokens.
    """
    name = Path(config.data).stem or f"{config.steps or config.difficulty}-gf{config.field}"
    config.out = config.out or f"ckpt/grpo-{name}" + "-shown" * (config.relabel == "shown")
    folder = Path(config.out)
    resume_from = newest_checkpoint(folder) if config.resume else None
    set_missing(config, LAPTOP if config.laptop else USUAL)  # before problems are drawn
    task, problems = load_problems(config, config.eval_problems)
    source = resume_from or train_sft.find_init(config)
    tokenizer = training.find_tokenizer(config, task, source)
    fill_defaults(config, tokenizer.word_level)
    max_new_tokens = training.validate(config, tokenizer, source, task, problems, world)
    first_update, start = open_run(folder, resume_from, config, "grpo", world)
    init = start or source or train_sft.train_start(config, world)
    origin = (first_update, init, resume_from, tokenizer, world)
    run = training.load_run(config, "grpo", config.updates, *origin)
    training.print_laptop(config, LAPTOP, world)
    return run, task, problems, max_new_tokens


if __name__ == "__main__":
    config = parse_flags(GrpoConfig, __doc__)
    with distributed() as world:
        main(config, world)
