"""Stage 2: GRPO on hard problems, from an SFT checkpoint. Reward: 1 if the answer is right, else 0.

    torchrun train_grpo.py --difficulty hard                        # the main job
    torchrun --nproc-per-node 8 train_grpo.py --difficulty hard     # one process per GPU
    python train_grpo.py --init ckpt/sft-forward-gf11 --out ckpt/forward

Without an SFT checkpoint at its default place, one is trained first. Read `main` for the loop and
`grpo_loss` for the objective. Differences from DeepSeekMath (arXiv 2402.03300):

1. The loss is the mean over the tokens of the whole batch, not of each response (DAPO,
   arXiv 2503.14476). Clipping bounds may differ below and above (DAPO).
2. Advantages may do without the standard deviation (Dr. GRPO, arXiv 2503.20783).
3. A group whose rewards are all equal has no advantage and is not trained on, not even by the KL.
4. There is one step per rollout, so ratios differ from 1 only by rounding, or by LoRA's dropout.
"""

import contextlib
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import eval
import train_sft
from data.finite_field import Problem, Task, validation_problems, vocabulary
from lib import checkpoint, training
from lib.checkpoint import load_meta, read_config
from lib.diagnose import diagnose
from lib.distributed import Signals, World, distributed, is_fsdp, peak_memory_gb
from lib.flags import parse_flags, require, require_min, set_missing, user_errors, warn
from lib.lora import dropout_key
from lib.packing import micro_batches, response_logps
from lib.rng import epoch_indices, rng
from lib.run_dir import newest_checkpoint, open_run
from lib.tokenizer import load_tokenizer, word_tokenizer
from lib.training import Run
from lib.transformer import Transformer
from rollout import Rollout, Sampler
from strategies import score_rollout


@dataclass
class GrpoConfig:
    # Run
    init: str = ""  # SFT checkpoint or run [ckpt/sft-mixed-gfFIELD, trained first if it is missing]
    out: str = ""  # run folder [ckpt/grpo-DIFFICULTY-gfFIELD]
    seed: int = 0  # of problems, sampling and everything else
    resume: bool = False  # continue the newest checkpoint of the run folder
    save_every: int = 25  # updates between checkpoints
    keep: int | None = None  # newest checkpoints that are kept, 0 for all [tiny 0, pretrained 2]
    eval_every: int = 0  # updates between evaluations on validation problems [0: only at the end]
    eval_problems: int = 256  # validation problems of an evaluation
    # Problems
    difficulty: Literal["easy", "hard", "extreme"] = "hard"  # 2-5, 6-9 or 6-15 steps
    steps: str = ""  # such as 3-7, instead of --difficulty
    parts: str = "1"  # parts of a problem, such as 3-5: two or more make a composition
    field: int = 11  # number of elements of the field, a prime
    relabel: Literal["fixed", "shown"] = "fixed"  # one hidden naming of the elements, or shown ones
    evaluation_share: float = 0.5  # share of evaluation among the problems; the rest is inversion
    examples: int | None = None  # distinct problems, 0: always fresh ones [tiny 0, pretrained 1024]
    no_chat_template: bool = False  # prompts as plain text, though the model has a chat template
    # Sampling
    prompts_per_update: int = 32  # problems per update, over all processes
    group_size: int = 8  # responses to each
    temperature: float | None = None  # of the sampling [tiny 1.0, pretrained 0.7]
    max_new_tokens: int = 0  # longest response [0: the longest solution and a little more]
    # Objective
    advantage: Literal["z-score", "mean"] = "z-score"  # rewards minus the mean, over the std or not
    beta: float | None = None  # weight of the KL from the start [tiny 0, pretrained 0.05]
    clip_low: float = 0.2  # bad responses get no gradient where their ratio is below 1 - this
    clip_high: float = 0.2  # good responses get no gradient where their ratio is above 1 + this
    # Optimizer
    updates: int | None = None  # optimizer steps [tiny 300, pretrained 500]
    lr: float | None = None  # peak learning rate of AdamW [tiny 3e-4, pretrained 1e-5]
    warmup: int = 10  # updates of linear warm-up, then linear decay to zero
    max_grad_norm: float = 1.0  # the gradient is scaled down to this norm
    # Memory and precision
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of the computation; weights stay fp32
    micro_batch_tokens: int = 0  # tokens of a forward pass [0: 16384 on a GPU, 2048 on the CPU]
    gradient_checkpointing: bool = False  # recompute activations in the backward pass
    lora: int | None = None  # rank of LoRA adapters, 0: train all weights [tiny 0, pretrained 64]
    lora_alpha: int = 128  # adapters are scaled by this over their rank
    lora_dropout: float = 0.05  # share of the adapters' inputs that is dropped in training
    fsdp: bool = False  # shard weights, gradients and optimizer over all processes


TINY = {"examples": 0, "updates": 300, "lr": 3e-4, "beta": 0.0, "temperature": 1.0}
TINY |= {"lora": 0, "keep": 0}
PRETRAINED = {"examples": 1024, "updates": 500, "lr": 1e-5, "beta": 0.05, "temperature": 0.7}
PRETRAINED |= {"lora": 64, "keep": 2}  # the paper's


def fill_defaults(config: GrpoConfig, tiny: bool) -> GrpoConfig:
    """Fill in the defaults that depend on the model, and refuse impossible flags."""
    set_missing(config, TINY if tiny else PRETRAINED)
    require_min(config, prompts_per_update=1, eval_problems=1, beta=0, eval_every=0)
    require_min(config, max_new_tokens=0, micro_batch_tokens=0)
    require(config.group_size >= 2, "--group-size must be at least 2: its responses are compared")
    require(0 < config.clip_low < 1, "--clip-low must lie between 0 and 1")
    require(config.clip_high > 0, "--clip-high must be above 0")
    sane = 1e-3 <= config.temperature <= 1e3
    require(sane, "--temperature must lie between 0.001 and 1000")
    return config


def group_advantages(rewards: Tensor, kind: str = "z-score") -> Tensor:
    """Return rewards (P, G) minus their group's mean and, for "z-score", over its std.

    A group of equal rewards gets zeros. Source: DeepSeekMath, section 4.1.2; "mean": Dr. GRPO,
    arXiv 2503.20783.
    """
    advantages = rewards - rewards.mean(1, keepdim=True)
    if kind == "z-score":
        advantages = advantages / (rewards.std(1, keepdim=True) + 1e-6)
    return advantages


def grpo_loss(
    logps: Tensor,
    old_logps: Tensor,
    ref_logps: Tensor | None,
    advantages: Tensor,
    n_tokens: float,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    beta: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The whole objective: return the loss of M tokens, and what it is made of, (M,) each.

    All tensors are (M,): log-probs under the policy, under the sampler, and under the reference
    (None without a KL term), and each token's advantage. `n_tokens` are the response tokens of the
    whole batch, on all ranks and in all micro-batches, so that the losses of these add up to it.
    Sources: PPO, arXiv 1707.06347, equation 7; the KL estimate k3: joschu.net/blog/kl-approx.html.
    """
    ratio = (logps - old_logps).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    per_token_loss = -torch.minimum(ratio * advantages, clipped * advantages)
    per_token = {"ratio": ratio, "clip_ratio": ratio != clipped}
    if ref_logps is not None:
        log_ratio = ref_logps - logps
        kl = log_ratio.exp() - log_ratio - 1  # unbiased, and never negative
        per_token_loss = per_token_loss + beta * kl
        per_token["kl"] = kl
    return per_token_loss.sum() / n_tokens, {"loss": per_token_loss, **per_token}


def grpo_backward(
    master: Transformer,
    policy: Transformer,
    reference: Transformer | None,
    rollout: Rollout,
    config: GrpoConfig,
    world: World,
    update: int = 0,
) -> dict[str, float | None]:
    """Accumulate this rank's GRPO gradient into `master`. Return metrics over the global batch.

    `policy` are the weights that compute; `rollout` has its rewards and advantages (P, G).
    """
    P, G = rollout.rewards.shape
    has_signal = (rollout.rewards != rollout.rewards[:, :1]).any(1)  # (P,)
    active = has_signal.nonzero()[:, 0]
    # Groups without signal count in the mean over tokens, though their part of the loss is zero and
    # they are never forwarded. A policy of NaN earns no reward, so it shows in the log-probs alone.
    counts = (int(rollout.lengths.sum()), P, len(active), not rollout.logps.isfinite().all())
    n_tokens, n_groups, n_active, n_broken = world.all_reduce(*counts)
    model = master if is_fsdp(master) else policy

    def loss_fn(i: int, groups: Tensor) -> tuple[Tensor, dict[str, float]]:
        batch, old_logps, advantages = rollout.pack(groups)  # (M,) each
        key = dropout_key(config, update, world.rank, i)
        logps, entropy = response_logps(model, batch, config.temperature, True, key)
        ref_logps = None
        if reference is not None:
            with torch.no_grad():
                ref_logps, _ = response_logps(reference, batch, config.temperature)
        bounds = (config.clip_low, config.clip_high, config.beta)
        loss, per_token = grpo_loss(logps, old_logps, ref_logps, advantages, n_tokens, *bounds)
        per_token["entropy"] = entropy
        metrics = {name: values.sum().item() for name, values in per_token.items()}
        metrics["tokens"] = len(logps)
        metrics["logp_diff_max"] = (logps - old_logps).abs().max().item()
        return loss * (i < n_micro), metrics

    budget = config.micro_batch_tokens or (16384 if world.device.type == "cuda" else 2048)
    lengths = rollout.lengths.view(P, G)
    batches = list(micro_batches(rollout.prompt_lengths, lengths, active, budget))
    n_micro = len(batches)
    if is_fsdp(master):  # every rank needs as many passes: pad with dummy batches of weight 0
        dummy = torch.zeros(1, dtype=torch.long, device=active.device)
        batches += [dummy] * (max(world.all_gather([n_micro])) - n_micro)
    metrics = training.accumulate_gradients(master, policy, loss_fn, batches)[:n_micro]
    metrics = world.all_gather(metrics)

    names = ["loss", "tokens", "entropy", "ratio", "clip_ratio"] + ["kl"] * (reference is not None)
    total = {name: sum(of_batch[name] for of_batch in metrics) for name in names}
    loss, trained_tokens = total.pop("loss") / n_tokens, total.pop("tokens")
    return {
        "loss": math.nan if n_broken else loss,
        "frac_reward_zero_std": 1 - n_active / n_groups,
        "trained_tokens": trained_tokens,
        "logp_diff_max": max((of_batch["logp_diff_max"] for of_batch in metrics), default=0.0),
        **{name: x / trained_tokens if trained_tokens else None for name, x in total.items()},
    }


def draw_problems(config: GrpoConfig, task: Task, update: int) -> list[Problem]:
    """Return the problems of an update, for all processes together."""
    n, seed = config.prompts_per_update, config.seed
    if config.examples == 0:
        stream = rng(seed, "problems", update)
        return [task.sample(stream, "train") for _ in range(n)]
    indices = epoch_indices(seed, config.examples, update * n, n)
    return [task.sample(rng(seed, "RL data set", i), "train") for i in indices]


def main(config: GrpoConfig, world: World) -> None:
    run, task, problems, max_new_tokens = set_up(config, world)
    tokenizer, master, policy = run.tokenizer, run.master, run.policy
    reference = training.initial_policy(run) if config.beta else None
    sampling = (config.group_size, max_new_tokens, config.temperature)
    sampler = Sampler(policy, tokenizer.stops, *sampling)

    def evaluate(model: Transformer, samples: int) -> eval.Scored:
        how = (max_new_tokens, samples, config.temperature, config.seed)
        return eval.evaluate(model, tokenizer, problems, *how)

    signals, bar, warned = Signals(), training.progress_bar(run, "GRPO", world), set()
    for update in signals.during(bar):
        start = time.perf_counter()

        # 1. Draw problems: this rank takes every world_size-th of the update's
        drawn = draw_problems(config, task, update)[world.rank :: world.world_size]
        numbers = range(config.prompts_per_update)[world.rank :: world.world_size]

        # 2. Sample a group of responses to each
        keys = [(config.seed, "sampling", update, i) for i in numbers]
        with user_errors():  # a prompt too long for the model
            rollout = sampler.sample([tokenizer.prompt(problem) for problem in drawn], keys)
        sampled = time.perf_counter()

        # 3. Score them: reward, strategy, first error
        score_rollout(rollout, drawn, tokenizer)

        # 4. Compare each reward with its group's
        rollout.advantages = group_advantages(rollout.rewards, config.advantage)

        # 5. Compute the loss and its gradient
        metrics = grpo_backward(master, policy, reference, rollout, config, world, update)

        # 6. Step, sync the sampler's weights, log
        loss, has_signal = metrics["loss"], metrics["frac_reward_zero_std"] < 1
        lr = training.linear_decay(config, update, run.updates)
        metrics |= training.optimizer_step(run, loss, lr, config.max_grad_norm, world, has_signal)
        seconds = (sampled - start, time.perf_counter() - sampled)
        row = log_row(update, rollout, metrics, seconds, world)
        if world.is_master:
            if config.eval_every and (update + 1) % config.eval_every == 0:
                by_type = eval.summarise(evaluate(policy, 1))["by_type"]
                row |= {f"validation/{kind}": m["pass@1"] for kind, m in by_type.items()}
            run.log.write(row)
            shown = {"reward": row["reward"], "no signal": row["frac_reward_zero_std"]}
            shown |= {key[9:]: row[key] for key in row if key.startswith("accuracy/")}
            shown["grad norm"] = row["grad_norm"]
            bar.set_postfix({name: f"{value:.2f}" for name, value in shown.items()})
            messages = diagnose(run.log.rows)
            for message in messages - warned:
                warn(message)
            warned = messages
        training.end_update(run, update, config.save_every, signals, world)

    if world.is_master:
        from lib.plots import plot_training  # matplotlib takes a second to import

        folder, final = run.folder, run.folder / f"step-{config.updates}"
        models = {str(final): policy}
        with contextlib.suppress(SystemExit):  # a line says that the start is gone
            models = {str(run.init): reference or training.initial_policy(run)} | models
        scored = {name: evaluate(model, 4) for name, model in models.items()}
        table = eval.report(scored, folder / "evaluation.json", folder / "evaluation.png")
        plot_training({folder.name: run.log.rows}, folder / "training.png")
        print(f"\nbefore -> after RL, 4 samples each at temperature {config.temperature}; in %")
        print(f"{table}\n\ncheckpoint  {final}\nlog, plots  {folder}")
    world.barrier()


def set_up(config: GrpoConfig, world: World) -> tuple[Run, Task, list[Problem], int]:
    """Check everything before any work, fill in the config's defaults, and load the run.

    Return it, the task, its validation problems, and the longest response in tokens.
    """
    steps, shown = config.steps or config.difficulty, config.relabel == "shown"
    config.out = config.out or f"ckpt/grpo-{steps}-gf{config.field}{'-shown' * shown}"
    folder, words = Path(config.out), vocabulary(config.field)
    resume_from = newest_checkpoint(folder) if config.resume else None
    init = resume_from or train_sft.find_start(config)
    tokenizer, meta = word_tokenizer(words), {}
    if init:
        tokenizer, meta = load_tokenizer(init, not config.no_chat_template), load_meta(init)
    fill_defaults(config, tokenizer.word_level)
    for name in ("field", "relabel"):
        now, then = getattr(config, name), meta.get(name, getattr(config, name))
        require(then == now, f"{init} was trained with --{name} {then}, not {now}")
    tokenizer.require_vocabulary(words)
    training.validate(config, "prompts_per_update", world)
    with user_errors():
        task, stream = Task.from_flags(config), rng(config.seed, "validation problems")
        problems = validation_problems(task, config.eval_problems, stream)
    shape = read_config(init) if init else checkpoint.TINY
    limits = (shape.max_position_embeddings, config.max_new_tokens)
    max_new_tokens = tokenizer.max_response_tokens(task, *limits, problems)
    first_update, start = open_run(folder, resume_from, config, "grpo", world)
    init = start or init or train_sft.train_start(config, world)
    where = (first_update, init, resume_from, words, world)
    run = training.load_run(config, "grpo", config.updates, *where)
    model = run.master if config.fsdp else run.policy
    model.gradient_checkpointing = config.gradient_checkpointing
    return run, task, problems, max_new_tokens


def log_row(update: int, rollout: Rollout, metrics: dict, seconds: tuple, world: World) -> dict:
    """Return the log's row; `seconds` are those of the rollout and of the rest."""
    scored = world.all_gather(rollout.scored)
    (n_tokens,) = world.all_reduce(int(rollout.lengths.sum()))
    row = {"update": update + 1} | eval.rollout_metrics(scored) | metrics
    row["response_length"] = n_tokens / sum(map(len, scored))
    row["rollout_tokens_per_second"] = n_tokens / seconds[0]
    row["training_tokens_per_second"] = row.pop("trained_tokens") / seconds[1]
    row["peak_memory_gb"] = peak_memory_gb(world.device)
    return row


if __name__ == "__main__":
    config = parse_flags(GrpoConfig, __doc__)
    with distributed() as world:
        main(config, world)
