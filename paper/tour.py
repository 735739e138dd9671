"""Follow one problem through an update of GRPO, with the functions that do it. Under a minute.

python -m paper.tour                      # after the main job, with its SFT model
python -m paper.tour --init ckpt/sft-forward-gf11 --seed 3
"""

from copy import deepcopy
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch import Tensor

from data.finite_field import Task, parse_range
from lib import training
from lib.checkpoint import find_checkpoint, load_meta, load_model
from lib.distributed import World, distributed
from lib.flags import parse_flags, require, user_errors
from lib.packing import response_logps
from lib.responses import response_rows, show
from lib.rng import rng
from lib.tables import format_table
from rollout import Rollout, Sampler
from strategies import lines_of, score_rollout
from train_grpo import TINY, GrpoConfig, group_advantages, grpo_backward, grpo_loss

ONLY = torch.tensor([0])  # the one group


@dataclass
class TourConfig:
    init: str = "ckpt/sft-mixed-gf11"  # SFT checkpoint or run of the tiny model
    steps: str = "6-9"  # of the problem
    seed: int = 0  # of the problem and of the sampling


def say(title: str, functions: str, *lines: str) -> None:
    print(f"\n{'-' * 80}\n{title}\n    {functions}\n", *lines, sep="\n")


@torch.no_grad()
def log_probs(model, rollout: Rollout) -> Tensor:
    """Return the log-prob of each whole response, (G,)."""
    batch, _, rows = rollout.pack(ONLY)
    logps, _ = response_logps(model, batch)
    return torch.zeros(len(rollout.lengths)).index_add(0, rows, logps)


def take_step(master, rollout: Rollout, world: World, lr: float, temperature: float = 1.0):
    """Return a copy of the model after one step on the group, and the gradient's norm."""
    model, config = deepcopy(master), GrpoConfig(**(TINY | {"temperature": temperature}))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    run = SimpleNamespace(config=config, master=model, policy=model, optimizer=optimizer)
    run.reference, run.nonfinite, run.folder = None, 0, ""
    metrics = grpo_backward(run, rollout, ONLY, 0, world)
    return model, training.optimizer_step(run, metrics["loss"], lr, world)["grad_norm"]


def loss_terms(model, rollout: Rollout, tokenizer, row: int) -> str:
    """Return the loss of the first tokens of a response, term by term."""
    batch, old_logps, rows = rollout.pack(ONLY)
    logps, _ = response_logps(model, batch)
    tokens = (rollout.advantages.flatten()[rows], rows, ~rollout.stopped[rows])
    totals, config = {"tokens": len(rows)}, GrpoConfig(**TINY)
    loss, per_token = grpo_loss(config, logps, old_logps, None, *tokens, totals)
    lines = [["token", "log-prob: sampler", "trainer", "ratio", "advantage", "-ratio * advantage"]]
    for i in (rows == row).nonzero()[:8, 0]:
        values = [x[i].item() for x in (old_logps, logps, per_token["ratio"], tokens[0])]
        word = tokenizer.decode([[int(batch.targets[i])]])[0]
        cells = [f"{x:.4f}" for x in (*values, -values[2] * values[3])]
        lines.append([word, *cells])
    mean = f"The loss is their mean over {len(rows)} tokens: {loss:+.4f}."
    return f"{format_table(lines)}\n...\n{mean}"


def experiments(rollout: Rollout, lr: float) -> list[tuple]:
    """Return changes to try: where, a line, what it becomes, and what the step then works with."""
    uncentred = rollout.rewards.float() / (rollout.rewards.float().std() + 1e-6)
    uncentred = replace(rollout, advantages=uncentred)
    flipped = replace(rollout, advantages=-rollout.advantages)
    no_guess = torch.tensor([[float("guess" not in one.response) for one in rollout.scored[0]]])
    other_reward = replace(rollout, rewards=no_guess, advantages=group_advantages(no_guess))
    return [
        ("train_grpo.py, group_advantages", "(rewards - rewards.mean(1, keepdim=True)).float()",
         "rewards.float()", uncentred, lr),
        ("train_grpo.py, grpo_loss", "per_token_loss = -torch.minimum(...)",
         "per_token_loss = torch.minimum(...)", flipped, lr),
        ("data/finite_field.py, Problem.reward", "return float(self.is_correct(...))",
         "return float('guess' not in response)", other_reward, lr),
        ("train_grpo.py, grpo_backward", "response_logps(model, batch, config.temperature, ...)",
         "response_logps(model, batch, 2.0, ...)", rollout, lr, 2.0),
        ("train_grpo.py, TINY", "lr=3e-4", "lr=3e-2", rollout, 100 * lr),
    ]  # fmt: skip


def main(config: TourConfig, world: World) -> None:
    with user_errors():
        start = find_checkpoint(config.init)
        meta, (model, tokenizer) = load_meta(start), load_model(start)
        require(tokenizer.word_level and "field" in meta, "the tour is of a tiny model of ours")
        task = Task(parse_range(config.steps), meta["field"], meta["relabel"])
    limit = tokenizer.max_response_tokens(task, model.config.max_position_embeddings)
    sampler, stream = Sampler(model, tokenizer.stops, 8, limit), rng(config.seed, "tour")
    lr = training.linear_decay(GrpoConfig(**TINY), 0, TINY["updates"])  # of the first update

    def sample(policy) -> Rollout:
        """Sample eight responses to the problem, with the same random numbers at each call."""
        sampler.model = policy
        rollout = sampler.sample([tokenizer.prompt(problem)], [(config.seed, "tour")])
        score_rollout(rollout, [problem], tokenizer)
        rollout.advantages = group_advantages(rollout.rewards)
        return rollout

    def what_changed(after, norm: float) -> str:
        change, again = log_probs(after, rollout) - log_probs(model, rollout), sample(after)
        n, right_now = int(right.sum()), sum(one.correct for one in again.scored[0])
        right_change, wrong_change = change[right].mean(), change[~right].mean()
        text = f"gradient's norm {norm:.3f}; log-prob of right responses {right_change:+.2f}, of"
        text += f" wrong ones {wrong_change:+.2f};\nsampled again with the same random"
        return f"{text} numbers, right are {right_now} of 8 instead of {n}"

    for _ in range(50):
        problem = task.sample(stream, "validation")
        rollout = sample(model)
        if rollout.has_signal().item():
            break
    require(rollout.has_signal().item(), f"{start} answers each of 50 problems alike: no signal")
    right, scored = rollout.rewards[0].bool(), rollout.scored[0]

    facts = f"{problem.kind}, {problem.difficulty}, answer {problem.answer}"
    say("1. Draw a problem", "data/finite_field.py: Task.sample, prompt", facts, problem.prompt())
    lengths = ", ".join(map(str, rollout.lengths.tolist()))
    facts = f"A prompt of {rollout.prompt_lengths.item()} tokens, eight responses of {lengths}."
    say("2. Sample a group of responses", "rollout.py: Sampler.sample", facts)
    lines = [["response", "strategy", "matches", "first error", "reward", "advantage"]]
    for one, advantage in zip(scored, rollout.advantages[0]):
        cells = (one.strategy, str(one.matches), one.error or "-", f"{one.reward:g}")
        lines.append([str(len(lines) - 1), *cells, f"{advantage:+.3f}"])
    say("3. Score them", "strategies.py: score_rollout, tag", format_table(lines))
    chosen = [int(right.nonzero()[0]), int((~right).nonzero()[0])]
    rows = response_rows([problem], [[scored[i] for i in chosen]], rollout.advantages[:, chosen])
    print(f"\nResponses {chosen[0]} and {chosen[1]}, by lib/responses.py, show:\n")
    print(*show(rows, lines_of), sep="\n")
    mean, std = rollout.rewards.mean(), rollout.rewards.std()
    advantages = [f"{x:+.3f}" for x in rollout.advantages[0, chosen]]
    facts = f"a right response: (1 - {mean:.3f}) / {std:.3f} = {advantages[0]}"
    facts += f"\na wrong one: (0 - {mean:.3f}) / {std:.3f} = {advantages[1]}"
    say("4. Compare each reward with its group's", "train_grpo.py: group_advantages", facts)
    facts = loss_terms(model, rollout, tokenizer, chosen[0])
    say("5. Compute the loss and its gradient", "train_grpo.py: grpo_loss, grpo_backward", facts)
    print("Every ratio is 1, so the loss says nothing. Its gradient does.")
    facts = what_changed(*take_step(model, rollout, world, lr))
    say("6. Step, and sample again", "lib/training.py: optimizer_step", facts)
    say("Change this line to ...", "and the same step then does this to a copy")
    for where, line, changed, other, *settings in experiments(rollout, lr):
        print(f"{where}:\n    {line}\n--> {changed}")
        print(what_changed(*take_step(model, other, world, *settings)), "\n")


if __name__ == "__main__":
    config = parse_flags(TourConfig, __doc__)
    with distributed() as world:
        main(config, world)
