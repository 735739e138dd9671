"""What the two training scripts share: loading a run, gradients, the optimizer step, saving.

And, at the end, what GRPO's log holds.
"""

import math
import os
import signal
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from lib import checkpoint, fsdp, run_dir
from lib.attention import describe
from lib.diagnose import LEARNED, UNLEARNED, diagnose
from lib.distributed import Signals, World, full_tensor, in_threads, is_fsdp, n_threads, peak_memory
from lib.flags import flag_name, require, require_min, user_errors, warn
from lib.limits import return_memory, save_memory
from lib.lora import without_adapters
from lib.policy import DTYPES, make_policy, sync_weights, trainable_parameters
from lib.responses import RESPONSES, response_rows
from lib.tables import percent
from lib.tokenizer import Tokenizer, load_tokenizer, word_tokenizer
from lib.transformer import Transformer

LONG = 600  # seconds: a run that will take longer says so


@dataclass
class Run:
    """A run in progress."""

    config: object  # the script's
    folder: Path
    updates: int  # in all
    first_update: int  # above 0 where it is resumed
    init: Path | None  # the checkpoint that it starts from; None for a new model
    meta: dict  # what makes its checkpoints, for training.json
    tokenizer: Tokenizer
    master: Transformer  # the weights that are trained: lib/policy.py
    policy: Transformer  # the weights that compute
    optimizer: torch.optim.Optimizer
    log: run_dir.Log | None  # on rank 0
    responses: run_dir.JsonLines | None  # on rank 0, in GRPO
    reference: Transformer | None = None  # the start, for a KL term
    saving: Future | None = None  # on rank 0: the checkpoint that a thread writes
    first_seconds: float = 0.0  # what the first update of this process took
    nonfinite: int = 0  # steps in a row whose loss or gradient was not finite
    warned: set = field(default_factory=set)  # what the last row of the log was warned of


def find_tokenizer(config, task, source: Path | None) -> Tokenizer:
    """Return a checkpoint's tokenizer, or a new one of the task's words."""
    if source is None:
        return word_tokenizer(task.words)
    return load_tokenizer(source, not config.no_chat_template)


def validate(config, tokenizer: Tokenizer, source, task, problems: list, world: World) -> int:
    """Refuse impossible flags that both scripts have, and a model that does not suit the task.

    `source` is the model's checkpoint, None for a new one. Return the longest response in tokens.
    """
    tiny = "--laptop is for a pretrained model: the tiny one trains in minutes without it"
    require(not (config.laptop and tokenizer.word_level), tiny)
    require_min(config, updates=1, save_every=1, keep=0, examples=0, warmup=0, max_new_tokens=0)
    require(0 < config.lr < 1, "--lr must lie between 0 and 1")
    require(config.max_grad_norm > 0, "--max-grad-norm must be above 0")
    require_min(config, lora=0, lora_alpha=1)
    require(0 <= config.lora_dropout < 1, "--lora-dropout must lie between 0 and 1")
    is_sft = hasattr(config, "batch_size")
    per_update = "batch_size" if is_sft else "prompts_per_update"
    what, n = "the number of processes", world.world_size
    if getattr(config, "minibatches", 1) > 1:
        what, n = f"{what} times --minibatches", n * config.minibatches
    require(getattr(config, per_update) >= n, f"{flag_name(per_update)} is below {n}, {what}")
    if config.fsdp:
        require(world.world_size > 1, "--fsdp needs several processes: torchrun --nproc-per-node N")
        require(not config.lora, "--fsdp shards the weights that are trained: it needs --lora 0")
    meta = checkpoint.load_meta(source) if source and not is_sft else {}
    for flag in ("field", "relabel") if not (config.data or meta.get("data")) else ():
        then, now = meta.get(flag), getattr(config, flag)
        require(then in (None, now), f"{source} was trained with --{flag} {then}, not {now}")
    if tokenizer.word_level or not config.data:  # each prompt of a file is checked by itself
        tokenizer.require_vocabulary(task.words)
    shape = checkpoint.read_config(source) if source else checkpoint.TINY
    limits, given = (task, shape.max_position_embeddings), config.max_new_tokens
    if given and is_sft:  # which reads whole solutions, however short these are
        tokenizer.max_response_tokens(*limits, 0, problems)
    return tokenizer.max_response_tokens(*limits, given, problems)


def load_run(
    config, stage: str, updates: int, first_update: int, init, resume_from, tokenizer, world: World
) -> Run:
    """Load weights, optimizer and log of a run that `open_run` has opened.

    The weights are those of the checkpoint `resume_from`, else of `init` (both folders or None),
    else of a new tiny model over the tokenizer's words.
    """
    if world.device.type == "cpu" and not tokenizer.word_level:
        save_memory()
    folder, log, responses, start = Path(config.out), None, None, {}
    if init:  # first: it may change while it is loaded
        named = run_dir.named_start(config)
        moved = resume_from and checkpoint.load_meta(resume_from).get("init_name") != named
        with user_errors():
            start = run_dir.describe_start(init, "" if moved else named, folder)
    source = init or resume_from
    shape = checkpoint.read_config(source) if source else checkpoint.TINY
    precision = checkpoint.choose_dtype(config.precision, shape, resume_from, world)
    if source:
        master = checkpoint.load_master(config, init, resume_from, precision, world.device)
    else:
        master = checkpoint.new_model(len(tokenizer), config.seed)
    if config.fsdp:  # which takes the weights to the device once they are sharded
        policy = fsdp.shard(master, precision, world)
    else:
        policy = make_policy(master.to(world.device), precision)
    computes = master if config.fsdp else policy
    computes.gradient_checkpointing = getattr(config, "gradient_checkpointing", False)
    options = {"betas": (0.9, 0.95), "weight_decay": getattr(config, "weight_decay", 0.0)}
    options |= {"lr": config.lr, "fused": True}
    optimizer = torch.optim.AdamW(trainable_parameters(master), **options)
    if resume_from:
        run_dir.load_optimizer(resume_from, optimizer)

    meta = asdict(config) | {"stage": stage, "total": updates, "compute_dtype": precision} | start
    if inputs := run_dir.hash_inputs(config):
        meta["inputs"] = inputs
    if world.is_master:
        print(f"Starting from {init}.\n" * bool(init) + describe(policy))
        log = run_dir.Log(folder, first_update)
        if stage == "grpo":
            responses = run_dir.JsonLines(folder / RESPONSES)
            responses.rewind(first_update)
    return Run(
        config=config,
        folder=folder,
        updates=updates,
        first_update=first_update,
        init=init,
        meta=meta,
        tokenizer=tokenizer,
        master=master,
        policy=policy,
        optimizer=optimizer,
        log=log,
        responses=responses,
    )


def print_laptop(config, defaults: dict, world: World) -> None:
    """Print, as flags, the values of all that --laptop changes."""
    values = {flag_name(name): getattr(config, name) for name in defaults}
    if config.laptop and world.is_master:
        print("--laptop:", *(f"{flag} {x:g}" for flag, x in values.items() if x is not None))


def initial_policy(run: Run) -> Transformer:
    """Return the policy before RL: the frozen base under the adapters, or the start reloaded."""
    if run.meta["lora"]:
        return without_adapters(run.master)
    start = checkpoint.find_start(run.folder, run.meta)
    require(start is not None, f"{run.init}, where this run started, is gone or has changed")
    dtype = DTYPES[run.meta["compute_dtype"]]
    return checkpoint.load_model(start, run.master.device, dtype)[0].requires_grad_(False)


def progress_bar(run: Run, name: str, world: World) -> tqdm:
    """Return a bar over the numbers of the updates that are still to do."""
    updates = range(run.first_update, run.updates)
    bar = {"initial": run.first_update, "total": run.updates, "disable": not world.is_master}
    return ProgressBar(updates, desc=name, **bar)


class ProgressBar(tqdm):
    def display(self, *args, **kwargs) -> bool | None:
        """Fall silent where stderr takes no more, as after `2>&1 | head`; training goes on."""
        try:
            return super().display(*args, **kwargs)
        except OSError:
            self.disable, self.fp = True, open(os.devnull, "w")  # noqa: SIM115


def say_how_long(run: Run, update: int, bar: tqdm) -> None:
    """Say after the second update how long a run of such updates takes; the first also compiles."""
    if update == run.first_update:
        run.first_seconds = bar.format_dict["elapsed"]
    seconds = bar.format_dict["elapsed"] - run.first_seconds
    left = run.updates - update - 1
    if update == run.first_update + 1 and seconds * left > LONG:
        minutes = f"{left} updates at {seconds:.1f} s: about {seconds * left / 60:.0f} minutes"
        warn(f"{minutes}; Ctrl-C saves, train_{run.meta['stage']}.py --resume continues")


def linear_decay(config, update: int, updates: int) -> float:
    """Return the learning rate: linear warm-up to the peak, then linear decay to zero."""
    remaining = (updates - update) / max(1, updates - config.warmup)
    return config.lr * min(1.0, (update + 1) / (config.warmup + 1), remaining)


def cosine_decay(config, update: int, updates: int) -> float:
    """Return the learning rate: linear warm-up times cosine decay to zero."""
    warm = min(1.0, (update + 1) / max(1, config.warmup))
    return config.lr * warm * 0.5 * (1 + math.cos(math.pi * update / updates))


def split_groups(config, numbers: Sequence[int]) -> list[Tensor]:
    """Return which of a rank's groups each minibatch takes, as indices.

    `numbers` are its groups' numbers among those of all ranks. These are split, so that a minibatch
    holds the same groups however many ranks there are.
    """
    mine, of_all = torch.tensor(numbers), torch.arange(config.prompts_per_update)
    parts = of_all.tensor_split(config.minibatches)
    return [torch.isin(mine, part).nonzero()[:, 0] for part in parts]


def accumulate_gradients(
    master: Transformer, policy: Transformer, loss_fn, items: list, world: World
) -> list:
    """Add the gradient of the summed losses to master.grad, in fp32; return `loss_fn`'s metrics.

    `loss_fn(i, items[i])` returns a micro-batch's loss and metrics, computed by the policy (under
    FSDP by the master). Metrics come in thread order, not input order; no sum depends on timing.
    """
    metrics = []
    if is_fsdp(master):  # the model itself runs forward and backward, in lockstep on all ranks
        n_passes = max(world.all_gather([len(items)]))
        nothing = torch.zeros(1, dtype=torch.long, device=master.device)
        for i in range(n_passes):  # a rank with fewer items runs group 0, with weight 0
            loss, of_item = loss_fn(i, items[i] if i < len(items) else nothing)
            weight = dist.get_world_size() * (i < len(items))  # FSDP averages over the processes
            (loss * weight).backward()
            metrics += [of_item] * (i < len(items))
        return metrics

    weights = trainable_parameters(policy)

    def worker(numbers: range) -> tuple[list[Tensor], list]:
        total, of_items = [], []
        for i in numbers:
            loss, of_item = loss_fn(i, items[i])
            gradients = torch.autograd.grad(loss, weights)
            of_items.append(of_item)
            if total:
                torch._foreach_add_(total, gradients)
            else:
                total = [gradient.float() for gradient in gradients]
            del gradients  # the next micro-batch's need their memory
        return total, of_items

    n = min(n_threads(master.device), len(items))
    shares = [range(i, len(items), n) for i in range(n)]
    for total, of_worker in in_threads(worker, shares, master.device):
        metrics += of_worker
        for weight, gradient in zip(trainable_parameters(master), total):
            weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)
    return metrics


def optimizer_step(run: Run, loss: float, lr: float, world: World) -> dict[str, float | bool]:
    """Sum gradients over the ranks, clip, step, sync the policy's weights; return metrics.

    Skips steps without signal (momentum alone must not move the weights) and those whose loss or
    gradient is not finite (metric `skipped`). Five updates of the latter in a row end the run.
    """
    world.all_reduce_gradients(run.master)
    weights = trainable_parameters(run.master)
    norm = nn.utils.clip_grad_norm_(weights, run.config.max_grad_norm)
    grad_norm = full_tensor(norm).item()
    finite = math.isfinite(loss) and math.isfinite(grad_norm)
    run.nonfinite = 0 if finite else run.nonfinite + 1
    message = "the loss or the gradient was not finite in five updates in a row, which were skipped"
    advice = "start a new run, from its newest checkpoint, with a lower --lr or --precision fp32"
    patience = 5 * getattr(run.config, "minibatches", 1)
    require(run.nonfinite < patience, f"{message}: {advice}")
    if grad_norm > 0 and not run.nonfinite:
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        run.optimizer.step()
        sync_weights(run.policy, run.master)
    run.optimizer.zero_grad()
    return_memory()  # before a validation adds to it
    return {"grad_norm": grad_norm, "skipped": bool(run.nonfinite)}


# ------------------------------------------------------------------------------------------------
# Logging and saving


def batch_metrics(loss: Tensor, per_token: dict[str, Tensor], log_ratio: Tensor) -> dict:
    """Return what the log needs of a micro-batch of M tokens, with the sums of `per_token`."""
    metrics = {"sums": {name: values.sum().item() for name, values in per_token.items()}}
    metrics |= {"loss": loss.item(), "trained_tokens": len(log_ratio)}
    return metrics | {"logp_diff_max": log_ratio.abs().max().item()}


def mean_metrics(of_batches: list[dict]) -> dict[str, float | None]:
    """Return the means over all tokens of what grpo_loss returns for each of them.

    What was not measured, since nothing was trained on or there is no reference, is None.
    """
    n = sum(of_batch["trained_tokens"] for of_batch in of_batches)
    means = dict.fromkeys(("entropy", "ratio", "clip_ratio", "kl"))
    for name in of_batches[0]["sums"] if of_batches else ():
        means[name] = sum(of_batch["sums"][name] for of_batch in of_batches) / n
    return means


def update_metrics(steps: list[dict], rollout, sampled: list, seconds: list, world: World) -> dict:
    """Return the metrics of an update's steps together, with lengths and speeds.

    `rollout` was trained on, `sampled` are all that were drawn for it, `seconds` those of sampling
    and scoring, and of the rest. Sampler and trainer agree until the first step that trains, so
    `logp_diff_max` is of that one.
    """
    signal = rollout.has_signal()  # (P,)
    lengths = torch.cat([one.lengths for one in sampled])
    counts = (int(lengths.sum()), len(lengths), int(signal.sum()), len(signal))
    n_tokens, n_responses, n_signal, n_groups = world.all_reduce(*counts)
    metrics = {name: fmean(step[name] for step in steps) for name in ("loss", "grad_norm")}
    of_batches = [of_batch for step in steps for of_batch in step["batches"]]
    metrics |= mean_metrics(of_batches)
    first = next((step["batches"] for step in steps if step["batches"]), [])
    return metrics | {
        "logp_diff_max": max((of_batch["logp_diff_max"] for of_batch in first), default=None),
        "frac_reward_zero_std": 1 - n_signal / n_groups,
        "skipped": any(step["skipped"] for step in steps),
        "response_length": n_tokens / n_responses,
        "rollout_tokens_per_second": n_tokens / seconds[0],
        "training_tokens_per_second": sum(x["trained_tokens"] for x in of_batches) / seconds[1],
        "peak_memory_gb": peak_memory(world.device),
    }


def log_sft_update(run: Run, row: dict, bar: tqdm) -> None:
    """Write an SFT update's row, show it beside the bar, and warn if SFT ends too weak for RL."""
    run.log.write(row)
    validated = next((r for r in reversed(run.log.rows) if "accuracy" in r), {})
    names = {"right": "accuracy", "right if matching": "accuracy_given_match"}
    shown = {name: percent(validated[key]) for name, key in names.items() if validated}
    bar.set_postfix({"loss": f"{row['loss']:.3f}"} | shown)
    of_paper = row["update"] == run.updates and not run.config.data
    if of_paper and (validated["accuracy_given_match"] or 0) < LEARNED:  # None: none matches
        warn(" ".join(UNLEARNED.split()))


def log_update(run: Run, row: dict, bar: tqdm) -> None:
    """Write a GRPO update's row, show it beside the bar, and warn of what has gone wrong."""
    run.log.write(row)
    shown = {"reward": row["reward"], "no signal": row["frac_reward_zero_std"]}
    by_type = (key for key in row if key.startswith("accuracy/"))
    shown |= {key.removeprefix("accuracy/"): row[key] for key in by_type}
    shown["grad norm"] = row["grad_norm"]
    bar.set_postfix({name: f"{value:.2f}" for name, value in shown.items()})
    messages = diagnose(run.log.rows)
    for message in messages - run.warned:
        warn(message)
    run.warned = messages


def keep_responses(run: Run, update: int, problems, validation: list, rollout=None) -> None:
    """Append scored groups to responses.jsonl: the same validation problems, a rollout's first."""
    rows = response_rows(problems, validation, update=update, split="validation")
    if rollout:
        scored = rollout.scored[: run.config.keep_responses]
        of_groups = (rollout.problems, scored, rollout.advantages)
        rows += response_rows(*of_groups, update=update, split="train")
    run.responses.write(*rows)


def save_is_due(run: Run, update: int) -> bool:
    """Whether a checkpoint is due after an update."""
    return (update + 1) % run.config.save_every == 0 or update + 1 == run.updates


def end_update(run: Run, update: int, signals: Signals, world: World) -> None:
    """Save a checkpoint if it is time; exit if any process has caught a signal.

    A thread writes it while the next update runs. The run waits for the thread before it exits, and
    fails if the thread has failed. A pretrained model on the CPU waits at once: the copy to be
    written (0.2 GB of SmolLM2's adapters) would add to the next update's memory.
    """
    return_memory()
    (stopping,) = world.all_reduce(signals.caught)
    last, due = update + 1 == run.updates, save_is_due(run, update) or stopping
    if run.saving and (due or run.saving.done()):
        run.saving.result()
    if due:
        state = (run.master, run.tokenizer, run.optimizer, run.meta)
        run.saving = run_dir.save_checkpoint(run.folder, update + 1, *state, world.is_master)
    copy_is_large = run.policy.device.type == "cpu" and not run.tokenizer.word_level
    if run.saving and (last or stopping or copy_is_large):
        run.saving.result()
    (late,) = world.all_reduce(signals.caught)  # a barrier, too: all ranks leave together
    if stopping or (last and late):  # late: while the last save was written, before evaluation
        script = f"train_{run.meta['stage']}.py"  # train_grpo.py may have been training its start
        warn(f"stopped and saved; {script} --resume continues {run.folder}")
        raise SystemExit(128 + (signals.caught or signal.SIGTERM))  # another rank may have it
    say_how_long(run, update, signals.bar)
