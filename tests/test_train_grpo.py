"""The GRPO loss and step, by bugs that public trainers have had; defaults and warnings."""

import copy
import dataclasses
import json
import math
import os
import random
from types import SimpleNamespace

import pytest
import torch
from conftest import backward, refusal, same_weights, small_model, start_processes

import train_grpo
import train_sft
from data.finite_field import Problem, Task, is_validation
from eval import rollout_metrics
from lib.checkpoint import load_model, new_model
from lib.diagnose import diagnose
from lib.distributed import World, init_distributed
from lib.flags import parse_flags, set_missing
from lib.packing import micro_batches, pack, pad, response_logps
from lib.training import accumulate_gradients, optimizer_step, update_metrics
from rollout import Rollout, Sampler
from strategies import score_rollout
from train_grpo import (
    USUAL,
    GrpoConfig,
    draw_problems,
    fill_defaults,
    group_advantages,
    grpo_loss,
)

ONE = World(0, 1, torch.device("cpu"))
CONFIG = GrpoConfig(temperature=0.8, beta=0.05)


def gradient(model) -> torch.Tensor:
    return torch.cat([w.grad.flatten() for w in model.parameters()])


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


class Batch:
    """Six ragged prompts, groups of four sampled from a slightly different model, mixed rewards."""

    def __init__(self):
        self.model = small_model(0)
        self.reference = small_model(1).requires_grad_(False)
        rng = random.Random(0)
        self.rows = [[rng.randrange(3, 60) for _ in range(rng.randrange(1, 9))] for _ in range(6)]
        generator = torch.Generator().manual_seed(0)
        sampler = small_model(0)
        with torch.no_grad():
            for w in sampler.parameters():
                w.add_(0.02 * torch.randn(w.shape, generator=generator))
        stops = list(range(1, 30))  # so that lengths differ
        self.rollout = Sampler(sampler, stops, 4, 20, CONFIG.temperature).sample(
            self.rows, [(i,) for i in range(6)]
        )
        self.rewards = torch.tensor(
            [[1.0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 1], [1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]]
        )

    def gradient(
        self, config=CONFIG, world=ONE, order=range(6), groups=slice(None)
    ) -> torch.Tensor:
        """Return the gradient with the groups in another order, or of some groups (a rank's)."""
        order = list(order)[groups]
        rows = torch.arange(24).view(6, 4)[order].flatten()
        r = self.rollout
        prompts = pad([self.rows[i] for i in order])
        rollout = Rollout(*prompts, r.tokens[rows], r.lengths[rows], r.logps[rows], r.stopped[rows])
        rollout.rewards = self.rewards[order]
        rollout.advantages = group_advantages(rollout.rewards, config.advantage)
        self.model.zero_grad()
        run = SimpleNamespace(
            config=config, master=self.model, policy=self.model, reference=self.reference
        )
        self.metrics = backward(run, rollout, torch.arange(len(order)), 0, world)
        world.all_reduce_gradients(self.model)
        return gradient(self.model)


@pytest.fixture(scope="module")
def batch() -> Batch:
    return Batch()


def plain_gradient(batch: Batch) -> torch.Tensor:
    """Write the loss out: one response at a time, no padding, normalised by all tokens."""
    batch.model.zero_grad()
    total = sum(batch.rollout.lengths.tolist())
    advantages = (batch.rewards - batch.rewards.mean(1, keepdim=True)) / (
        batch.rewards.std(1, keepdim=True) + 1e-6
    )
    for i in range(24):
        if batch.rewards[i // 4].unique().numel() == 1:
            continue
        n = int(batch.rollout.lengths[i])
        r, row = batch.rollout, slice(i, i + 1)
        prompt = pad([batch.rows[i // 4]])
        packed = pack(*prompt, r.tokens[row], r.lengths[row], torch.tensor([0]))
        log_probs, _ = response_logps(batch.model, packed, CONFIG.temperature)
        with torch.no_grad():
            reference, _ = response_logps(batch.reference, packed, CONFIG.temperature)
        for t in range(n):
            ratio = (log_probs[t] - batch.rollout.logps[i, t]).exp()
            a = advantages.flatten()[i]
            clipped = ratio.clamp(1 - CONFIG.clip_low, 1 + CONFIG.clip_high)
            kl = (reference[t] - log_probs[t]).exp() - (reference[t] - log_probs[t]) - 1
            ((-torch.min(ratio * a, clipped * a) + CONFIG.beta * kl) / total).backward(
                retain_graph=True
            )
    return gradient(batch.model)


def test_gradient_is_that_of_the_loss_written_out(batch):
    assert relative_difference(batch.gradient(), plain_gradient(batch)) < 1e-6
    assert batch.metrics["frac_reward_zero_std"] == pytest.approx(2 / 6)
    assert 0 < batch.metrics["clip_ratio"] < 0.5, "the test needs clipped and unclipped tokens"


@pytest.mark.parametrize("micro_batch_tokens", [1, 60, 150])
def test_micro_batches_leave_the_gradient_as_it_is(batch, micro_batch_tokens):
    """Bug: token counts taken for each micro-batch (nano-aha-moment, trl #3021)."""
    whole, metrics = batch.gradient(), batch.metrics
    split = batch.gradient(dataclasses.replace(CONFIG, micro_batch_tokens=micro_batch_tokens))
    assert relative_difference(split, whole) < 1e-6
    for name, value in metrics.items():
        assert batch.metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_packing_order_leaves_the_gradient_as_it_is(batch, seed):
    """Bug: rewards of the wrong prompt (nanoGRPO). A group keeps its advantages in any order."""
    order = random.Random(seed).sample(range(6), 6)
    assert relative_difference(batch.gradient(order=order), batch.gradient()) < 1e-6


def _process(rank: int, size: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "CUDA_VISIBLE_DEVICES": "",
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    world = init_distributed()
    batch = Batch()
    torch.save(
        (batch.gradient(world=world, groups=slice(rank, None, size)), batch.metrics),
        f"{folder}/{rank}",
    )


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_the_number_of_processes_leaves_the_gradient_as_it_is(batch, tmp_path, size, free_port):
    """Bug: token counts taken on each process (trl #3231, open-instruct #1161)."""
    start_processes(_process, (size, free_port, str(tmp_path)), size)
    whole, metrics = batch.gradient(), batch.metrics
    for rank in range(size):
        theirs, their_metrics = torch.load(tmp_path / str(rank))
        assert relative_difference(theirs, whole) < 1e-6
        assert their_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)


def metrics_of_equal_rewards(batch, advantages: torch.Tensor) -> dict:
    """What the log says of the batch if all rewards are 1 and these are the advantages (6, 4)."""
    rollout = dataclasses.replace(batch.rollout, rewards=torch.ones(6, 4), advantages=advantages)
    models = dict.fromkeys(("master", "policy", "reference"), batch.model)
    run = SimpleNamespace(config=CONFIG, **models)
    return backward(run, rollout, torch.arange(6), 0, ONE)


def test_what_was_not_measured_is_not_logged_as_zero(batch):
    """Without a group with signal nothing is forwarded: no entropy, no ratio, no KL."""
    metrics = metrics_of_equal_rewards(batch, torch.zeros(6, 4))
    assert metrics["frac_reward_zero_std"] == 1 and metrics["trained_tokens"] == 0
    assert all(metrics[name] is None for name in ("entropy", "ratio", "clip_ratio", "kl"))


def test_an_advantage_of_ones_own_trains_groups_of_equal_rewards(batch):
    """Bug: with a baseline over the batch such groups have an advantage, and were left out."""
    metrics = metrics_of_equal_rewards(batch, torch.ones(6, 4))
    assert metrics["trained_tokens"] == int(batch.rollout.lengths.sum())


def loss_of(logps, old_logps, ref_logps, advantages, **flags):
    """The loss of tokens of one response, summed."""
    rows, whole = torch.zeros(len(logps), dtype=torch.long), torch.zeros(len(logps)).bool()
    config = GrpoConfig(**({"beta": 0.0} | flags))
    return grpo_loss(config, logps, old_logps, ref_logps, advantages, rows, whole, {"tokens": 1})


@pytest.mark.parametrize(
    "ratio, advantage, loss, slope",
    [
        (0.5, 1.0, -0.5, -0.5),  # good but less likely than before: pushed up, unclipped
        (1.5, 1.0, -1.3, 0.0),  # good and already likelier: clipped above
        (0.5, -1.0, 0.8, 0.0),  # bad and already less likely: clipped below
        (1.5, -1.0, 1.5, 1.5),  # bad but likelier: pushed down, unclipped
        (1.0, 1.0, -1.0, -1.0),
        (1.0, -1.0, 1.0, 1.0),
    ],
)
def test_clipping(ratio, advantage, loss, slope):
    """Bug: the clip inverted for negative advantages. Bounds 0.2 below and 0.3 above."""
    log_probs = torch.tensor([ratio]).log().requires_grad_()
    value, _ = loss_of(log_probs, torch.zeros(1), None, torch.tensor([advantage]), clip_high=0.3)
    value.backward()
    assert value.item() == pytest.approx(loss) and log_probs.grad.item() == pytest.approx(slope)


def test_the_stop_token_and_every_other_gets_a_gradient(batch):
    """Bug: the stop token masked out because it looks like padding (tiny-grpo, trl #2708)."""
    rollout = dataclasses.replace(batch.rollout, advantages=torch.zeros(6, 4))
    packed, *_ = rollout.pack(torch.arange(6))
    rows = torch.arange(24)
    assert len(packed.targets) == batch.rollout.lengths.sum()
    ends = batch.rollout.lengths[rows].cumsum(0) - 1
    last = batch.rollout.tokens[rows, batch.rollout.lengths[rows] - 1]
    assert torch.equal(packed.targets[ends], last) and batch.rollout.stopped.any()
    log_probs, _ = response_logps(batch.model, packed, 1.0)
    for i in (int(ends[0]), int(ends[5])):
        (slopes,) = torch.autograd.grad(
            log_probs[i], [batch.model.model.norm.weight], retain_graph=True
        )
        assert slopes.abs().max() > 0


def test_a_token_equal_to_the_padding_counts(batch):
    """Masks come from lengths: a response of token 0, the padding's, is trained on too."""
    tokens = torch.zeros(2, 5, dtype=torch.long)
    rollout = Rollout(
        *pad([[0, 0, 3]]),
        tokens,
        torch.tensor([5, 3]),
        torch.zeros(2, 5),
        torch.tensor([True, True]),
    )
    rollout.advantages = torch.zeros(1, 2)
    packed, *_ = rollout.pack(torch.tensor([0]))
    assert len(packed.targets) == 8 and len(packed.tokens) == 3 + 4 + 2


def test_advantages():
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]])
    z = group_advantages(rewards)
    torch.testing.assert_close(z.mean(1), torch.zeros(3))
    torch.testing.assert_close(z.std(1), torch.tensor([1.0, 0, 1]), atol=1e-4, rtol=0)
    assert (z[1] == 0).all() and z[0, 0] > z[2, 0]
    torch.testing.assert_close(
        group_advantages(rewards, "mean")[0], torch.tensor([0.75, -0.25, -0.25, -0.25])
    )


def test_groups_of_equal_rewards_have_no_advantage():
    """The mean of eight times 10.1 is not 10.1 in fp32, nor is the std of it zero."""
    for reward, size in ((10.1, 8), (0.1, 7), (0.3, 8)):
        for kind in ("z-score", "mean", "leave-one-out"):
            assert not group_advantages(torch.full((2, size), reward), kind).any()


def kl_of(logps: torch.Tensor, ref_logps: torch.Tensor) -> torch.Tensor:
    """The KL term of each token, (M,)."""
    zeros = torch.zeros_like(logps)
    return loss_of(logps, logps, ref_logps, zeros, beta=1.0)[1]["kl"]


def test_kl_is_zero_at_the_reference_and_else_positive():
    p = torch.tensor([-1.0, -2.0, -0.1])
    assert (kl_of(p, p) == 0).all()
    assert (kl_of(p, p + torch.tensor([0.5, -0.5, 0.01])) > 0).all()


def test_kl_estimates_the_divergence():
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 8, generator=generator).log_softmax(-1)
    tokens = torch.multinomial(p.exp(), 200_000, replacement=True, generator=generator)
    expected = (p.exp() * (p - q)).sum()
    torch.testing.assert_close(kl_of(p[tokens], q[tokens]).mean(), expected, rtol=0.02, atol=0)


def test_micro_batches_cover_the_chosen_groups_in_order_within_the_budget():
    generator = torch.Generator().manual_seed(0)
    responses = torch.randint(10, 40, (30, 4), generator=generator)
    prompts, chosen = torch.full((30,), 10), torch.arange(30)[torch.arange(30) % 7 > 0]
    costs = prompts + responses.sum(1)
    for budget in (120, 400, 1000, 9999):
        for workers in (1, 2, 3):
            runs = micro_batches(prompts, responses, chosen, budget, workers)
            assert torch.equal(torch.cat(runs), chosen)
            totals = [int(costs[run].sum()) for run in runs]
            assert max(totals) <= budget or len(runs) == len(chosen)
            if budget >= 400:
                assert len(runs) % workers == 0, "each worker gets equally many"
                assert max(totals) - min(totals) <= costs.max(), "of like size"
    assert [len(run) for run in micro_batches(prompts, responses, chosen[:3], 1)] == [1, 1, 1]
    assert micro_batches(prompts, responses, chosen[:0], 180) == []


class Texts:
    """A tokenizer whose tokens are whole responses."""

    def __init__(self, texts: list[str]):
        self.texts = texts

    def prefix(self, problem) -> list[int]:
        return []

    def decode(self, rows: list[list[int]]) -> list[str]:
        return [self.texts[row[0]] for row in rows]


def score(problems: list, texts: list[str], stopped: list[bool] | None = None) -> Rollout:
    """Return a rollout of these responses, those to each problem in a row, as scored."""
    B = len(texts)
    tokens, ones = torch.arange(B)[:, None], torch.ones(B, dtype=torch.long)
    stopped = torch.tensor(stopped or [True] * B)
    rollout = Rollout(*pad([[3]] * len(problems)), tokens, ones, torch.zeros(B, 1), stopped)
    rollout.response_tokens = lambda: tokens.tolist()  # the tests' have no stop tokens
    score_rollout(rollout, problems, Texts(texts))
    return rollout


def test_rewards_belong_to_their_prompt():
    """Each response is scored against its own group's problem."""
    rng = random.Random(0)
    problems = [Task((6, 9)).sample(rng, "train") for _ in range(20)]
    texts = [problem.solution("forward") for problem in problems]
    for i, answered in enumerate(([0, 1, 2], [1, 2, 0], [0, 2, 1])):  # whose solution each gets
        some = problems[3 * i : 3 * i + 3]
        of_groups = [texts[3 * i + j] for j in answered for _ in range(4)]
        rollout = score(some, of_groups)
        expected = [[some[j].answer == problem.answer] * 4 for j, problem in zip(answered, some)]
        assert rollout.rewards.tolist() == expected
        assert [[r.correct for r in group] for group in rollout.scored] == expected
        assert [group[0].kind for group in rollout.scored] == [p.kind for p in some]


@pytest.mark.usefixtures("undrawn")
def test_small_updates_move_the_weights(tmp_path):
    """Bug: bf16 weights swallow small updates (tiny-grpo, AReaL #1369). Master weights are fp32."""
    flags = {"field": 3, "steps": "1-2", "updates": 1, "batch_size": 4, "precision": "bf16"}
    config = train_sft.SftConfig(out=str(tmp_path / "run"), lr=1e-6, warmup=0, **flags)
    trained, tokenizer = load_model(train_sft.main(config, ONE))
    for (name, w), old in zip(
        trained.named_parameters(), new_model(len(tokenizer), seed=0).parameters(), strict=True
    ):
        assert w.dtype == torch.float32 and (w != old).float().mean() > 0.9, name


def test_defaults_follow_the_model():
    """The paper's for a pretrained model; what is given stands."""
    tiny, paper = (fill_defaults(GrpoConfig(), tiny) for tiny in (True, False))
    names = ("updates", "lr", "beta", "temperature", "examples", "lora")
    assert [getattr(tiny, name) for name in names] == [300, 3e-4, 0.0, 1.0, 0, 0]
    assert [getattr(paper, name) for name in names] == [500, 1e-5, 0.05, 0.7, 1024, 64]
    set_missing(paper, USUAL)
    assert (paper.prompts_per_update, paper.group_size, paper.save_every) == (32, 8, 25)
    assert (paper.lora_alpha, paper.lora_dropout, paper.eval_problems) == (128, 0.05, 256)
    given = fill_defaults(GrpoConfig(lora=0, beta=0.0, lr=1e-3), tiny=False)
    assert (given.lora, given.beta, given.lr, given.temperature) == (0, 0.0, 1e-3, 0.7)


@pytest.mark.usefixtures("undrawn")
def test_a_laptop_has_defaults_of_its_own(tmp_path, pretrained, capsys):
    """They train, are printed and recorded; what is given stands."""
    flags = {"init": str(pretrained), "out": str(tmp_path / "run"), "updates": 1, "group_size": 2}
    flags |= {"eval_problems": 2, "steps": "1-2", "field": 3, "max_new_tokens": 8, "lora": 2}
    train_grpo.main(GrpoConfig(laptop=True, **flags), ONE)
    line = "--laptop: --prompts-per-update 8 --eval-problems 2 --lora-dropout 0 --updates 1 "
    assert line + "--lr 0.0002 --beta 0\n" in capsys.readouterr().out
    meta = json.loads((tmp_path / "run/step-1/training.json").read_text())
    names = ("laptop", "prompts_per_update", "lora_dropout", "lr", "beta", "temperature")
    assert [meta[name] for name in names] == [True, 8, 0.0, 2e-4, 0.0, 0.7]


def test_problems_are_fresh_or_come_round():
    task = Task()
    fresh = fill_defaults(GrpoConfig(prompts_per_update=8), tiny=True)
    drawn = [draw_problems(fresh, task, update) for update in range(5)]
    assert len({p.prompt() for problems in drawn for p in problems}) == 40
    assert drawn[3] == draw_problems(fresh, task, 3)

    fixed = fill_defaults(GrpoConfig(prompts_per_update=8, examples=20), tiny=True)
    rounds = [p.prompt() for update in range(5) for p in draw_problems(fixed, task, update)]
    assert sorted(rounds[:20]) == sorted(rounds[20:]) and len(set(rounds)) == 20
    assert rounds[:20] != rounds[20:], "each epoch has its own order"


def rows(n: int = 20, **changes) -> list[dict]:
    sound = {"reward": 0.5, "frac_truncated": 0.1, "frac_reward_zero_std": 0.5, "entropy": 0.1}
    return [sound | changes for _ in range(n)]


@pytest.mark.parametrize(
    "changes, says",
    [
        ({}, None),
        ({"frac_truncated": 1.0, "reward": 0.0}, "--max-new-tokens"),
        ({"frac_reward_zero_std": 1.0, "reward": 0.0}, "easier problems"),
        ({"frac_reward_zero_std": 1.0, "reward": 0.6}, "easier problems"),
        ({"frac_reward_zero_std": 1.0, "reward": 1.0}, "harder problems"),
        ({"frac_reward_zero_std": 1.0, "reward": 3.0, "accuracy": 0.2}, "easier problems"),
        ({"entropy": 1e-4}, "--beta"),
        ({"entropy": 1e-4, "reward": 0.98}, None),
        ({"entropy": 0.0, "frac_reward_zero_std": 1.0, "reward": 1.0}, "harder problems"),
        ({"entropy": None}, None),  # advantages of one's own may leave out all groups
    ],
)
def test_trouble_is_put_in_words(changes, says):
    assert not diagnose(rows(19, **changes))
    assert not diagnose([*rows(19, **changes), *rows(1)]), "it has to last"
    found = diagnose([*rows(50), *rows(20, **changes)])
    assert len(found) == (says is not None) and all(says in message for message in found)


def test_a_skipped_update_is_put_in_words_at_once():
    skipped = rows(20, entropy=None, skipped=True)
    for log in (skipped, [*rows(50), skipped[0]], skipped[:1]):
        (message,) = diagnose(log)
        assert "skipped" in message
    assert not diagnose([*skipped, *rows(1)])


@pytest.fixture
def graded(monkeypatch):
    """A reward of 0.1 for wrong responses that reach an answer."""

    def reward(problem, response, stopped):
        right = problem.is_correct(response, stopped)
        return 1.0 if right else 0.1 if "answer" in response else 0.0

    monkeypatch.setattr(Problem, "reward", reward)


def test_a_graded_reward_trains_as_graded(graded):
    """Bug: a reward cast to right or wrong. Accuracy in tables stays exact match."""
    problem = Task().sample(random.Random(0), "train")
    wrong = next(name for name in ("e0", "e1") if name != problem.answer)
    texts = [problem.solution("forward"), f"answer {wrong}", "", f"answer {wrong}"]
    rollout = score([problem], texts)
    assert rollout.rewards.tolist() == [pytest.approx([1.0, 0.1, 0.0, 0.1])]
    advantages = group_advantages(rollout.rewards)[0]
    assert advantages[0] > advantages[1] == advantages[3] > advantages[2]
    assert [r.correct for r in rollout.scored[0]] == [True, False, False, False]
    metrics = rollout_metrics(rollout.scored)
    assert metrics["reward"] == pytest.approx(0.3) and metrics[f"accuracy/{problem.kind}"] == 0.25


def test_rewards_may_be_large_and_differ_by_little(monkeypatch):
    """Bug: in fp32 they were equal, so nothing was trained on."""
    earned = iter([2.0**40, 2.0**40 + 1, 2.0**40, 2.0**40 + 1])
    monkeypatch.setattr(Problem, "reward", lambda *_: next(earned))
    rollout = score([Task().sample(random.Random(0), "train")], [""] * 4)
    assert rollout.has_signal().all()
    for kind, size in (("mean", 0.5), ("z-score", 0.5 / 0.57735), ("leave-one-out", 2 / 3)):
        advantages = group_advantages(rollout.rewards, kind)
        assert advantages.dtype == torch.float32
        assert advantages[0].tolist() == pytest.approx([-size, size, -size, size], rel=1e-4)


def test_a_line_changed_in_the_loss_changes_the_gradient(batch, monkeypatch):
    """grpo_loss holds the whole objective: what is changed there changes the gradient."""
    whole = batch.gradient()

    def changed(*args, **kwargs):
        _, logps, old_logps, _, advantages, *_, totals = args
        ratio = (logps - old_logps).exp()
        _, per_token = grpo_loss(*args, **kwargs)
        return -(ratio * advantages).sum() / totals["tokens"], per_token

    monkeypatch.setattr(train_grpo, "grpo_loss", changed)
    assert relative_difference(batch.gradient(), whole) > 0.01
    monkeypatch.setattr(
        train_grpo, "grpo_loss", lambda *args: (args[1].sum() * 0, grpo_loss(*args)[1])
    )
    assert batch.gradient().norm() == 0


def test_short_flags_are_accepted(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train_grpo.py", "--group", "4", "--prompts", "6"])
    config = parse_flags(GrpoConfig, "")
    assert (config.group_size, config.prompts_per_update) == (4, 6)


def test_problems_are_of_the_training_split_and_of_the_seed():
    """Fresh ones, and those of a set."""
    for examples in (0, 200):
        flags = {"prompts_per_update": 200, "examples": examples}
        drawn = [draw_problems(GrpoConfig(seed=i, **flags), Task((2, 2)), 0) for i in (0, 1)]
        assert not any(map(is_validation, drawn[0] + drawn[1]))
        prompts = [{problem.prompt() for problem in problems} for problems in drawn]
        assert len(prompts[0] & prompts[1]) < 20


def test_the_log_tells_the_largest_difference_of_log_probs_to_either_side(batch):
    models = dict.fromkeys(("master", "policy", "reference"), batch.model)
    run, ones = SimpleNamespace(config=CONFIG, **models), torch.ones(6, 4)
    for shift in (3.0, -3.0):
        logps = batch.rollout.logps + shift
        rollout = dataclasses.replace(batch.rollout, logps=logps, rewards=ones, advantages=ones)
        metrics = backward(run, rollout, torch.arange(6), 0, ONE)
        assert metrics["logp_diff_max"] == pytest.approx(3, abs=1)


def test_each_step_process_and_micro_batch_drops_other_inputs(batch, monkeypatch):
    seen, ones = [], torch.ones(6, 4)
    monkeypatch.setattr(train_grpo, "dropout_key", lambda _, *place: seen.append(place))
    models = dict.fromkeys(("master", "policy", "reference"), batch.model)
    config = dataclasses.replace(CONFIG, micro_batch_tokens=1)
    rollout = dataclasses.replace(batch.rollout, rewards=ones, advantages=ones)
    world = World(1, 1, torch.device("cpu"))
    backward(SimpleNamespace(config=config, **models), rollout, torch.arange(6), 7, world)
    assert sorted(seen) == [(7, 1, i) for i in range(6)]


def test_what_was_cut_off_is_scored_as_such():
    """Each response by its own end, in two groups."""
    problems = [Task().sample(random.Random(i), "train") for i in (0, 1)]
    texts = [problem.solution("forward") for problem in problems for _ in range(2)]
    rollout = score(problems, texts, [True, False, False, True])
    assert rollout.rewards.tolist() == [[1, 0], [0, 1]]
    assert [[r.stopped for r in group] for group in rollout.scored] == [
        [True, False],
        [False, True],
    ]


def test_a_budget_is_used_up():
    prompts, responses = torch.tensor([10, 10]), torch.full((2, 4), 10)
    assert [len(some) for some in micro_batches(prompts, responses, torch.arange(2), 100)] == [2]


def stepping(optimizer=torch.optim.SGD, **flags) -> SimpleNamespace:
    """What optimizer_step needs of a run."""
    model = small_model()
    run = SimpleNamespace(config=GrpoConfig(**flags), master=model, policy=model, folder="run")
    run.optimizer, run.nonfinite = optimizer(model.parameters(), lr=1.0), 0
    return run


def set_gradient(model, norm: float) -> None:
    n = sum(w.numel() for w in model.parameters())
    for w in model.parameters():
        w.grad = torch.full_like(w, norm / n**0.5)


@pytest.mark.parametrize("norm", [0.5, 8.0])
def test_a_gradient_is_scaled_down_to_its_largest_norm(norm):
    """The log has its norm before that."""
    run = stepping(max_grad_norm=2.0)
    before = copy.deepcopy(run.master)
    set_gradient(run.master, norm)
    assert optimizer_step(run, 0.0, 1.0, ONE)["grad_norm"] == pytest.approx(norm, rel=1e-4)
    pairs = zip(run.master.parameters(), before.parameters())
    moved = torch.cat([(a - b).flatten() for a, b in pairs]).norm()
    assert moved.item() == pytest.approx(min(norm, 2.0), rel=1e-3)


def test_momentum_alone_moves_no_weight():
    run = stepping(torch.optim.AdamW)
    set_gradient(run.master, 1.0)
    optimizer_step(run, 0.0, 1e-3, ONE)
    before = copy.deepcopy(run.master)
    set_gradient(run.master, 0.0)
    optimizer_step(run, 0.0, 1e-3, ONE)
    assert same_weights(run.master, before)


def test_five_updates_in_a_row_are_ten_steps_with_two_minibatches(capsys):
    run = stepping(minibatches=2)
    for _ in range(9):
        set_gradient(run.master, 1.0)
        assert optimizer_step(run, math.nan, 1.0, ONE)["skipped"]
    line = refusal(lambda: optimizer_step(run, math.nan, 1.0, ONE), capsys)
    assert "not finite" in line


def test_a_step_gives_back_what_it_has_freed(monkeypatch):
    """Before a validation adds to it: SFT of SmolLM2 peaked 0.3 GB higher there."""
    run, gradients = stepping(), []
    weight = run.master.lm_head.weight
    monkeypatch.setattr("lib.training.return_memory", lambda: gradients.append(weight.grad))
    set_gradient(run.master, 1.0)
    optimizer_step(run, 0.0, 1.0, ONE)
    assert gradients == [None]


def test_threads_add_up_their_gradients(model, monkeypatch):
    monkeypatch.setattr("lib.training.n_threads", lambda device: 2)
    packed = pack(*pad([[3, 4]]), *pad([[5, 6, 1]]), torch.tensor([0]))
    response_logps(model, packed)[0].sum().backward()
    expected = 3 * gradient(model)
    model.zero_grad()
    loss_fn = lambda i, batch: (response_logps(model, batch)[0].sum(), {})  # noqa: E731
    assert len(accumulate_gradients(model, model, loss_fn, [packed] * 3, ONE)) == 3
    assert relative_difference(gradient(model), expected) < 1e-6


def test_the_log_tells_loss_and_entropy(batch):
    batch.gradient()
    rollout, active = batch.rollout, torch.tensor([0, 2, 3, 5])
    packed, old_logps, rows = rollout.pack(active)
    logps, entropy = response_logps(batch.model, packed, CONFIG.temperature, entropy=True)
    ref_logps, _ = response_logps(batch.reference, packed, CONFIG.temperature)
    given = group_advantages(batch.rewards).flatten()[rows], rows, ~rollout.stopped[rows]
    totals = {"tokens": int(rollout.lengths.sum())}
    loss, _ = train_grpo.grpo_loss(CONFIG, logps, old_logps, ref_logps, *given, totals)
    assert batch.metrics["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert batch.metrics["entropy"] == pytest.approx(entropy.mean().item(), rel=1e-4)


def test_speeds_are_of_their_parts(batch):
    batch.gradient()
    ones = torch.ones(6, 4)
    rollout = dataclasses.replace(batch.rollout, rewards=ones, advantages=ones)
    models = dict.fromkeys(("master", "policy", "reference"), batch.model)
    run = SimpleNamespace(config=CONFIG, **models)
    step = train_grpo.grpo_backward(run, rollout, torch.arange(6), 0, ONE)
    step |= {"grad_norm": 0.0, "skipped": False}
    n = int(rollout.lengths.sum())
    found = update_metrics([step], rollout, [rollout], [2.0, 4.0], ONE)
    assert found["rollout_tokens_per_second"] == n / 2
    assert found["training_tokens_per_second"] == n / 4
    assert 0.05 < found["peak_memory_gb"] < 50


class Numbered:
    """A task whose problems are their numbers."""

    sample = staticmethod(lambda rng, split, index=None: index)
    solution = staticmethod(lambda *_: "")


def test_an_epoch_draws_each_row_of_a_file_once():
    grpo = GrpoConfig(prompts_per_update=8, examples=20)
    sft = train_sft.SftConfig(batch_size=8, epochs=2, examples=20)
    draws = [train_grpo.draw_problems(grpo, Numbered, update) for update in range(5)]
    examples = [train_sft.draw_examples(sft, Numbered, update) for update in range(5)]
    for drawn in (sum(draws, []), [problem for problem, _ in sum(examples, [])]):
        assert sorted(drawn[:20]) == sorted(drawn[20:]) == [*range(20)]
