"""The choices of the loss, against TRL and against values worked by hand; the loop around it."""

import dataclasses
import shutil
import zlib
from collections import defaultdict
from itertools import chain, product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    backward,
    draw_nothing,
    refusal,
    same_weights,
    word_tokenizer,
)
from test_end_to_end import SMALL, Alone
from test_train_grpo import CONFIG, ONE, Batch, gradient, relative_difference
from torch import Tensor

import eval as evaluation
import train_grpo
import train_sft
from data.finite_field import Problem, Task
from lib import training
from lib.checkpoint import load_model
from lib.distributed import World
from lib.memory import still_to_come
from lib.packing import pack, pad, response_logps
from lib.rng import rng
from lib.run_dir import read_log
from lib.training import split_groups
from lib.transformer import ModelConfig
from rollout import Rollout, Sampler
from train_grpo import GrpoConfig, group_advantages, grpo_backward, grpo_loss

CLIPS = {"clip_low": 0.2, "clip_high": 0.3}
NORMALISE = ("tokens", "responses", "constant")
RATIO_OF = ("token", "sequence")


# Against TRL.


class Ragged:
    """Six responses of 1 to 6 tokens, (6, 6); the longest is truncated. Some ratios clip."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        normal = {"generator": generator, "dtype": torch.float64}
        self.lengths = torch.tensor([1, 3, 6, 4, 2, 4])
        self.stopped = self.lengths < 6
        self.advantages = torch.tensor([1.5, -1.0, 0.5, -0.5, 2.0, -1.5]).double()
        self.logps = (-2 * torch.rand(6, 6, **normal)).requires_grad_()
        shift = torch.tensor([1.0, -0.6, 0.1, 0.6, -0.6, 0.1])[:, None]
        self.old_logps = self.logps.detach() - shift - 0.3 * torch.randn(6, 6, **normal)
        self.ref_logps = self.logps.detach() + 0.5 * torch.randn(6, 6, **normal)
        self.mask = torch.arange(6) < self.lengths[:, None]
        self.rows = torch.arange(6).repeat_interleave(self.lengths)

    def ours(self, config: GrpoConfig) -> tuple[Tensor, dict]:
        counted = self.mask & self.stopped[:, None] if config.mask_truncated else self.mask
        totals = {"tokens": int(counted.sum()), "responses": 6, "constant": 6 * 6}
        ref_logps = self.ref_logps[self.mask] if config.beta else None
        of_rows = (self.advantages[self.rows], self.rows, ~self.stopped[self.rows])
        logps, old_logps = self.logps[self.mask], self.old_logps[self.mask]
        return grpo_loss(config, logps, old_logps, ref_logps, *of_rows, totals)

    def trl(self, config: GrpoConfig, loss_type: str) -> tuple[Tensor, dict]:
        """Call TRL's method on a stand-in for its trainer; return the loss and its metrics."""
        trainer = SimpleNamespace(
            _get_per_token_logps_and_entropies=lambda *_, **__: (self.logps, self.logps, None),
            loss_type=loss_type,
            importance_sampling_level=config.ratio_of,
            beta=config.beta,
            epsilon_low=config.clip_low,
            epsilon_high=config.clip_high + (loss_type == "cispo"),  # there the bound itself
            max_completion_length=6,
            args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
            current_gradient_accumulation_steps=1,
            model=SimpleNamespace(training=True),
            accelerator=SimpleNamespace(
                num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
            ),
            aux_loss_enabled=False,
            top_entropy_quantile=1.0,
            off_policy_mask_threshold=None,
            use_vllm=False,
            _entropy_bonus_enabled=False,
            _metrics={"train": defaultdict(list)},
        )
        mask = self.mask & self.stopped[:, None] if config.mask_truncated else self.mask
        tokens = torch.zeros(6, 6, dtype=torch.long)
        inputs = {"prompt_ids": tokens, "prompt_mask": tokens, "completion_ids": tokens}
        inputs |= {"completion_mask": mask.int(), "num_items_in_batch": mask.sum()}
        inputs |= {"old_per_token_logps": self.old_logps, "ref_per_token_logps": self.ref_logps}
        inputs["advantages"] = self.advantages
        grpo_trainer = pytest.importorskip("trl").GRPOTrainer
        return grpo_trainer._compute_loss(trainer, None, inputs), trainer._metrics["train"]


@pytest.mark.parametrize("beta", [0.0, 0.05])
@pytest.mark.parametrize("mask_truncated", [False, True])
@pytest.mark.parametrize("ratio_of", RATIO_OF)
@pytest.mark.parametrize(
    "loss_type, normalise, clip",
    [
        ("grpo", "responses", "ratio"),
        ("dapo", "tokens", "ratio"),
        ("bnpo", "tokens", "ratio"),
        ("dr_grpo", "constant", "ratio"),
        ("cispo", "tokens", "weight"),
    ],
)
def test_loss_and_gradient_are_those_of_trl(
    loss_type, normalise, clip, ratio_of, mask_truncated, beta
):
    """For five of its loss types, at both levels of the ratio, with bounds that differ."""
    flags = {"normalise": normalise, "clip": clip, "ratio_of": ratio_of, "beta": beta}
    config = GrpoConfig(mask_truncated=mask_truncated, **flags, **CLIPS)
    batch = Ragged()
    (ours, per_token), (theirs, metrics) = batch.ours(config), batch.trl(config, loss_type)
    torch.testing.assert_close(ours, theirs)
    slopes = (torch.autograd.grad(loss, batch.logps)[0] for loss in (ours, theirs))
    torch.testing.assert_close(*slopes)

    if (clip, ratio_of) == ("ratio", "token"):
        counted = batch.stopped[batch.rows] | (not mask_truncated)
        (share,) = metrics["clip_ratio/region_mean"]
        assert per_token["clip_ratio"][counted].double().mean().item() == pytest.approx(share)

    good, ratio = batch.advantages[batch.rows] > 0, per_token["ratio"]
    for side in (good, ~good):
        assert (side & (ratio > 1.3)).any() and (side & (ratio < 0.8)).any(), "a ratio has to clip"
        assert (side & (ratio > 0.8) & (ratio < 1.3)).any()


# By hand: a response of one token and one of three. Bounds 0.2 below and 0.3 above.

RATIOS = torch.tensor([1.1, 0.5, 1.0, 1.5])
ADVANTAGES = torch.tensor([2.0, -1.0, -1.0, -1.0])
GEOMETRIC = (0.5 * 1.0 * 1.5) ** (1 / 3)  # their arithmetic mean is 1


def by_hand(
    ratios=RATIOS, advantages=ADVANTAGES, tokens=4, truncated=False, **flags
) -> tuple[float, Tensor, dict]:
    """Return the loss, its gradient and the ratios; the second response may be truncated."""
    logps = torch.full((4,), -0.7, requires_grad=True)
    rows = torch.tensor([0, 1, 1, 1])
    config = GrpoConfig(**({"beta": 0.0} | CLIPS | flags))
    totals = {"tokens": tokens, "responses": 2, "constant": 2 * 5}
    of_rows = (advantages, rows, (rows == 1) & truncated)
    old_logps = logps.detach() - ratios.log()
    loss, per_token = grpo_loss(config, logps, old_logps, None, *of_rows, totals)
    (slopes,) = torch.autograd.grad(loss, logps)
    return loss.item(), slopes, per_token


@pytest.mark.parametrize(
    "normalise, loss, slopes",
    [
        ("tokens", (-2.2 + 3.3) / 4, [-2.2 / 4, 0, 1 / 4, 1.5 / 4]),
        ("responses", (-2.2 + 3.3 / 3) / 2, [-2.2 / 2, 0, 1 / 6, 1.5 / 6]),
        ("constant", (-2.2 + 3.3) / 10, [-2.2 / 10, 0, 1 / 10, 1.5 / 10]),
    ],
)
def test_normalisations(normalise, loss, slopes):
    """The sum is divided by 4 tokens, 2 responses after their lengths, or 2 times 5 tokens."""
    value, gradient, _ = by_hand(normalise=normalise)
    assert value == pytest.approx(loss)
    assert gradient.tolist() == pytest.approx(slopes)


def test_the_ratio_of_a_sequence_is_a_geometric_mean():
    """All tokens of a response share one ratio, and each gets the mean gradient."""
    value, slopes, per_token = by_hand(ratio_of="sequence")
    assert per_token["ratio"].tolist() == pytest.approx([1.1, *[GEOMETRIC] * 3])
    assert not per_token["clip_ratio"].any()
    assert value == pytest.approx((-2.2 + 3 * GEOMETRIC) / 4)
    assert slopes.tolist() == pytest.approx([-2.2 / 4, *[GEOMETRIC / 4] * 3])


def test_a_sequence_is_clipped_as_a_whole():
    ratios = torch.tensor([1.1, 0.5, 0.5, 1.2])
    _, slopes, per_token = by_hand(ratios, ratio_of="sequence")
    assert per_token["clip_ratio"].tolist() == [False, True, True, True]
    assert slopes.tolist() == pytest.approx([-2.2 / 4, 0, 0, 0])
    _, slopes, per_token = by_hand(ratios, -ADVANTAGES, ratio_of="sequence")
    assert (slopes != 0).all() and not per_token["clip_ratio"].any(), "good ones, less likely"


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_clipped_weight_still_teaches(sign):
    """CISPO: the gradient is the ratio, at most 1.3, times A, where the min-clip gives zero."""
    ratios, advantages = torch.tensor([1.5, 0.5, 1.0, 1.5]), sign * torch.tensor([2.0, 1, 1, 1])
    value, slopes, per_token = by_hand(ratios, advantages, clip="weight")
    weights = [1.3 * 2, 0.5, 1.0, 1.3]
    assert slopes.tolist() == pytest.approx([-sign * weight / 4 for weight in weights])
    assert value == pytest.approx(0.7 * sign * sum(weights) / 4)
    assert per_token["clip_ratio"].tolist() == [True, False, False, True]
    _, slopes, per_token = by_hand(ratios, advantages)
    assert (slopes == 0).tolist() == [sign > 0, sign < 0, False, sign > 0]
    assert torch.equal(per_token["clip_ratio"], slopes == 0)


@pytest.mark.parametrize(
    "normalise, loss", [("tokens", -2.2), ("responses", -1.1), ("constant", -0.22)]
)
def test_a_truncated_response_teaches_nothing(normalise, loss):
    """It still counts as a response, but its tokens do not."""
    flags = {"truncated": True, "tokens": 1, "normalise": normalise}
    value, slopes, _ = by_hand(mask_truncated=True, **flags)
    assert value == pytest.approx(loss) and slopes.tolist() == pytest.approx([loss, 0, 0, 0])
    assert by_hand(**flags)[1][2] > 0, "unless it is masked, it does"


def test_leave_one_out_compares_a_reward_with_the_mean_of_the_others():
    advantages = group_advantages(torch.tensor([[1.0, 0, 0, 2], [3, 3, 3, 3]]), "leave-one-out")
    assert advantages[0].tolist() == pytest.approx([1 - 2 / 3, -1, -1, 2 - 1 / 3])
    assert (advantages[1] == 0).all()


# The gradient of real log-probs, summed over micro-batches.

ALL = torch.arange(6)
CHOICES = [
    dict(zip(("normalise", "ratio_of", "clip", "mask_truncated"), values))
    for values in product(NORMALISE, RATIO_OF, ("ratio", "weight"), (False, True))
]


def with_bounds(flags: dict) -> GrpoConfig:
    """Bounds of a sequence are finer: its ratio, a mean, lies nearer to 1."""
    finer = {name: x / 3 for name, x in CLIPS.items()}
    bounds = finer if flags.get("ratio_of") == "sequence" else CLIPS
    return dataclasses.replace(CONFIG, **bounds, **flags)


class Choices(Batch):
    """A Batch with some truncated responses, and with log-probs of each response by itself."""

    def __init__(self):
        super().__init__()
        self.rollout.stopped[::5] = False
        r, self.alone = self.rollout, []
        for i in range(24):
            one = (pad([self.rows[i // 4]]), r.tokens[i : i + 1], r.lengths[i : i + 1])
            packed = pack(*one[0], *one[1:], torch.tensor([0]))
            logps, ref_logps = (
                response_logps(model, packed, CONFIG.temperature)[0]
                for model in (self.model, self.reference)
            )
            self.alone.append((logps, r.logps[i, : len(logps)], ref_logps))

    def gradient(self, groups=ALL, order=ALL, world=ONE, **flags) -> Tensor:
        """Return the gradient of `groups`, after the rollout was put in another order."""
        r, rows = self.rollout, torch.arange(24).view(6, 4)[order].flatten()
        prompts = {"prompts": r.prompts[order], "prompt_lengths": r.prompt_lengths[order]}
        responses = {n: getattr(r, n)[rows] for n in ("tokens", "lengths", "logps", "stopped")}
        rollout = dataclasses.replace(r, **prompts, **responses, rewards=self.rewards[order])
        rollout.advantages = group_advantages(rollout.rewards)
        config = with_bounds(flags)
        models = {"master": self.model, "policy": self.model, "reference": self.reference}
        self.model.zero_grad()
        run = SimpleNamespace(config=config, **models)
        self.metrics = backward(run, rollout, groups, 0, world)
        return gradient(self.model)

    def written_out(self, groups=ALL, **flags) -> Tensor:
        """Return the same gradient from a loss that is written out, one token at a time."""
        config = with_bounds(flags)
        advantages = group_advantages(self.rewards).flatten().tolist()
        masked = config.mask_truncated * ~self.rollout.stopped
        loss, rows = 0.0, [i for i in range(24) if i // 4 in groups.tolist()]
        n_tokens = sum(len(self.alone[i][0]) for i in rows if not masked[i])
        for i in rows:
            (logps, old_logps, ref_logps), a = self.alone[i], advantages[i]
            if masked[i] or a == 0:
                continue
            for t in range(len(logps)):
                ratio = (logps[t] - old_logps[t]).exp()
                if config.ratio_of == "sequence":
                    ratio = (logps - old_logps).mean().exp()
                low, high = 1 - config.clip_low, 1 + config.clip_high
                if config.clip == "weight":
                    term = -min(ratio.item(), high) * a * logps[t]
                else:
                    term = -torch.min(ratio * a, ratio.clamp(low, high) * a)
                kl = (ref_logps[t] - logps[t]).exp() - (ref_logps[t] - logps[t]) - 1
                share = {"tokens": 1 / n_tokens, "constant": 1 / (20 * len(rows))}
                share["responses"] = 1 / len(logps) / len(rows)
                loss = loss + (term + config.beta * kl) * share[config.normalise]
        slopes = torch.autograd.grad(loss, list(self.model.parameters()), retain_graph=True)
        return torch.cat([slope.flatten() for slope in slopes])


@pytest.fixture(scope="module")
def batch() -> Choices:
    return Choices()


@pytest.mark.parametrize("flags", CHOICES, ids=lambda flags: "-".join(map(str, flags.values())))
def test_gradient_is_that_of_the_loss_written_out(batch, flags):
    """Bug: counts of one micro-batch. Neither these nor the order of groups change the gradient."""
    whole = batch.gradient(**flags)
    assert relative_difference(whole, batch.written_out(**flags)) < 3e-6
    assert 0 < batch.metrics["clip_ratio"] < 0.5, "the test needs clipped and unclipped tokens"
    assert relative_difference(batch.gradient(**flags, micro_batch_tokens=1), whole) < 1e-6
    order = torch.tensor([4, 2, 0, 5, 3, 1])
    split = batch.gradient(order=order, **flags, micro_batch_tokens=90)
    assert relative_difference(split, whole) < 1e-6


@pytest.mark.parametrize("normalise", NORMALISE)
def test_a_minibatch_counts_its_own_groups_only(batch, normalise):
    """Bug: a step normalised by the whole rollout is as small as the number of minibatches."""
    flags = {"normalise": normalise, "mask_truncated": True}
    for groups in ALL.tensor_split([2]):
        part = batch.gradient(groups, **flags)
        assert relative_difference(part, batch.written_out(groups, **flags)) < 3e-6


@pytest.mark.parametrize("normalise", NORMALISE)
def test_processes_add_up_to_the_gradient_of_one(batch, normalise, monkeypatch):
    """Bug: counts of one process. This test sums those of two by hand."""
    flags, parts = {"normalise": normalise, "mask_truncated": True}, ALL.tensor_split([2])
    whole, counts = batch.gradient(**flags), []
    monkeypatch.setattr(World, "all_reduce", lambda _, *values: counts.append(values) or values)
    for part in parts:
        batch.gradient(part, **flags)
    totals = counts[::2]  # those of the loss; the others are the log's
    sums = [sum(map(float, of_ranks)) for of_ranks in zip(*totals)]
    monkeypatch.setattr(World, "all_reduce", lambda _, *x: sums if len(x) == len(sums) else x)
    total = sum(batch.gradient(part, **flags) for part in parts)
    assert relative_difference(total, whole) < 1e-6


# The loop.


def test_replaced_groups_come_whole(batch):
    """Bug: a refill that keeps the old rewards. Narrow and wide rollouts replace each other."""

    def rollout(problems: list[int], width: int) -> Rollout:
        """All about problem n, whose prompt and responses have `width` tokens, is n."""
        n = torch.tensor(problems)
        prompts = n[:, None].repeat(1, width)
        rows = n.repeat_interleave(2)[:, None].repeat(1, width)
        lengths, stopped = torch.full((len(rows),), width), rows[:, 0] % 2 == 0
        scored = [[f"{i}a", f"{i}b"] for i in problems]
        scores = (problems, scored, n[:, None] + torch.tensor([0.0, 0.5]))
        where = (lengths[: len(n)], rows, lengths, -rows.float(), stopped)
        return Rollout(prompts, *where, 5, *scores)

    for width, other_width in ((2, 3), (3, 2)):
        mine, other = rollout([1, 2, 3, 4], width), rollout([7, 8], other_width)
        new = mine.with_groups([3, 1], other)
        assert new.problems == [1, 8, 3, 7] and mine.problems == [1, 2, 3, 4]
        assert new.scored == [[f"{i}a", f"{i}b"] for i in new.problems]
        assert new.rewards.tolist() == [[i, i + 0.5] for i in new.problems]
        widths = [other_width if i > 4 else width for i in new.problems]
        padded = [[i] * n + [0] * (3 - n) for i, n in zip(new.problems, widths)]
        assert new.prompts.tolist() == padded and new.prompt_lengths.tolist() == widths
        rows = [row for row in padded for _ in range(2)]
        assert new.tokens.tolist() == rows and (-new.logps).tolist() == rows
        assert new.lengths.tolist() == [n for n in widths for _ in range(2)]
        assert new.stopped.tolist() == [row[0] % 2 == 0 for row in rows]
        assert new.max_new_tokens == 5
        logps = new.pack(torch.tensor([1, 2]))[1]
        assert (-logps).tolist() == [8] * 2 * other_width + [3] * 2 * width


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A model that has hardly been trained."""
    out = tmp_path_factory.mktemp("sft")
    flags = {"field": 3, "steps": "1-2", "updates": 1, "batch_size": 2, "precision": "fp32"}
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        smaller = ModelConfig(0, hidden_size=32, intermediate_size=48, num_hidden_layers=1)
        patch.setattr("lib.checkpoint.TINY", smaller)
        train_sft.main(train_sft.SftConfig(out=str(out), **flags), ONE)
    return out


@pytest.fixture
def watch(monkeypatch, undrawn):
    """Any response may earn something, except to hopeless problems. Records what a run does."""
    sample, real, step = Sampler.sample, grpo_backward, training.optimizer_step
    seen = SimpleNamespace(draws=[], steps=[], rates=[])
    seen.hopeless = lambda prompt: zlib.crc32(prompt.encode()) % 2 == 0

    def reward(problem, response, stopped):
        earned = zlib.crc32(response.encode()) % 100 / 100
        return 0.0 if seen.hopeless(problem.prompt()) else earned

    def watched_sample(self, prompts, keys):
        fresh = sample(self, prompts, keys)
        if keys[0][1] == "sampling":
            seen.draws.append((prompts, keys, fresh))
        return fresh

    def watched_backward(run, rollout, groups, number, world):
        metrics = real(run, rollout, groups, number, world)
        of_batches = metrics["batches"]
        means = training.mean_metrics(of_batches)
        means["logp_diff_max"] = max((x["logp_diff_max"] for x in of_batches), default=None)
        seen.steps.append((rollout, groups.tolist(), number, metrics | means))
        return metrics

    def watched_step(run, loss, lr, world):
        seen.rates.append(lr)
        return step(run, loss, lr, world)

    monkeypatch.setattr(Problem, "reward", reward)
    monkeypatch.setattr(Sampler, "sample", watched_sample)
    monkeypatch.setattr(train_grpo, "grpo_backward", watched_backward)
    monkeypatch.setattr(training, "optimizer_step", watched_step)
    return seen


def grpo(out: Path, start: Path, world: World = ONE, **flags) -> list[dict]:
    small = SMALL | {"eval_problems": 1, "keep_responses": 0, "max_new_tokens": 6, "warmup": 0}
    config = GrpoConfig(init=str(start), out=str(out), **(small | flags))
    train_grpo.main(config, world)
    return read_log(out / "metrics.jsonl") if world.is_master else []


def test_each_minibatch_takes_a_step_against_the_samplers_log_probs(start, tmp_path, watch):
    """Bug: old log-probs recomputed between the steps, so that all ratios are 1."""
    watch.hopeless = lambda prompt: False
    sizes = {"prompts_per_update": 5, "minibatches": 2, "lr": 1e-2}
    rows = grpo(tmp_path, start, updates=2, **sizes)
    assert watch.rates == [1e-2, 1e-2, 5e-3, 5e-3], "two steps an update"
    rollouts, groups, numbers, metrics = zip(*watch.steps)
    assert groups == ([0, 1, 2], [3, 4]) * 2
    assert len(set(numbers)) == 4, "each step has its own dropout"
    for update, row in enumerate(rows):
        (first, second), fresh = metrics[2 * update : 2 * update + 2], watch.draws[update][2]
        assert rollouts[2 * update] is rollouts[2 * update + 1] is fresh
        assert first["ratio"] == pytest.approx(1, abs=1e-5) and first["logp_diff_max"] < 1e-4
        assert abs(second["ratio"] - 1) > 1e-4 and second["logp_diff_max"] > 1e-2
        assert row["logp_diff_max"] == first["logp_diff_max"]
        assert row["loss"] == pytest.approx((first["loss"] + second["loss"]) / 2)


@pytest.mark.parametrize("n", [6, 10, 13])
def test_minibatches_hold_the_same_groups_on_any_number_of_ranks(n):
    config = GrpoConfig(prompts_per_update=n, minibatches=2)
    found = []
    for ranks in (1, 2, 3):
        shares = [range(n)[rank::ranks] for rank in range(ranks)]
        of_ranks = [split_groups(config, numbers) for numbers in shares]
        found.append([
            sorted(numbers[i] for numbers, parts in zip(shares, of_ranks) for i in parts[step])
            for step in range(2)
        ])  # fmt: skip
        assert all(len(part) for parts in of_ranks for part in parts)
    assert found[0] == found[1] == found[2] == [[*range((n + 1) // 2)], [*range((n + 1) // 2, n)]]


REFILLED = {"updates": 2, "prompts_per_update": 6, "refills": 2, "save_every": 1}


def draws_of(watch, update: int) -> list[tuple]:
    """Return what the rounds of an update drew: prompts, places and rollout, in their order."""
    n = REFILLED["updates"]
    draws = [(p, keys, fresh) for p, keys, fresh in watch.draws if keys[0][2] % n == update]
    for i, (_, keys, _) in enumerate(draws):
        assert {key[:3] for key in keys} == {(0, "sampling", update + i * n)}, "a stream of its own"
    return [(prompts, [key[3] for key in keys], fresh) for prompts, keys, fresh in draws]


def test_groups_without_signal_are_replaced(start, tmp_path, watch):
    """At most twice, by fresh problems; prompts, responses and rewards stay in line."""
    rows, tokenizer = grpo(tmp_path, start, **REFILLED), word_tokenizer(3)
    for update, (rollout, *_) in enumerate(watch.steps):
        draws, missing, newest = draws_of(watch, update), list(range(6)), {}
        for prompts, places, fresh in draws:
            assert places == missing
            newest |= {place: (prompts[k], k, fresh) for k, place in enumerate(places)}
            signal = fresh.has_signal().tolist()
            missing = [place for place, has_signal in zip(places, signal) if not has_signal]
        assert len(draws) == 3 or (len(draws) == 2 and not missing), "the seed needs refills"
        assert len(missing) < len(draws[1][1]), "and some of them help"
        assert rows[update]["frac_reward_zero_std"] == pytest.approx(len(missing) / 6)
        drawn = torch.cat([fresh.rewards for _, _, fresh in draws])
        assert rows[update]["reward"] == pytest.approx(drawn.mean().item(), abs=1e-6)

        for place, (prompt, k, fresh) in newest.items():
            assert rollout.problems[place] is fresh.problems[k]
            assert tokenizer.prompt(rollout.problems[place]) == prompt
            assert rollout.scored[place] is fresh.scored[k]
            assert rollout.rewards[place].tolist() == fresh.rewards[k].tolist()
            (mine, logps, _), (theirs, their_logps, _) = (
                r.pack(torch.tensor([i])) for r, i in ((rollout, place), (fresh, k))
            )
            assert torch.equal(mine.tokens, theirs.tokens) and torch.equal(logps, their_logps)
            assert torch.equal(mine.targets, theirs.targets)
            assert mine.tokens[: len(prompt)].tolist() == prompt
            assert torch.equal(rollout.stopped.view(6, -1)[place], fresh.stopped.view(-1, 4)[k])
        torch.testing.assert_close(rollout.advantages, group_advantages(rollout.rewards))
    prompts = [tuple(prompt) for prompts, *_ in watch.draws for prompt in prompts]
    assert len(set(prompts)) > 0.9 * len(prompts), "fresh problems"


def test_refills_end_where_no_problem_has_signal(start, tmp_path, watch):
    watch.hopeless = lambda prompt: True
    (row,) = grpo(tmp_path, start, **REFILLED | {"updates": 1})
    assert [len(prompts) for prompts, *_ in watch.draws] == [6, 6, 6]
    assert row["frac_reward_zero_std"] == 1 and row["loss"] == 0


def test_a_resumed_run_refills_as_before(start, tmp_path, watch):
    flags = REFILLED | {"minibatches": 2}
    grpo(tmp_path / "whole", start, **flags)
    whole = draws_of(watch, 1)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "step-2")
    watch.draws.clear()
    grpo(tmp_path / "parts", start, resume=True, **flags)
    parts = draws_of(watch, 1)
    assert len(parts) == len(watch.draws) > 1
    assert [draw[:2] for draw in parts] == [draw[:2] for draw in whole]
    assert same_weights(*(load_model(tmp_path / name / "step-2")[0] for name in ("whole", "parts")))


def test_processes_refill_with_other_problems(start, tmp_path, watch, monkeypatch):
    """Two processes together draw what one process draws, each for its own places."""
    Alone(monkeypatch)
    drawn = []
    for rank, size in ((0, 1), (0, 2), (1, 2)):
        watch.draws.clear()
        world = World(rank, size, torch.device("cpu"))
        grpo(tmp_path / f"{size}-{rank}", start, world, **REFILLED | {"updates": 1})
        chosen = [zip(keys, map(tuple, prompts)) for prompts, keys, _ in watch.draws]
        drawn.append(set(chain.from_iterable(chosen)))
    whole, *parts = drawn
    assert len(whole) > 6 and all(len(part) > 3 for part in parts), "both refill"
    assert not parts[0] & parts[1] and parts[0] | parts[1] == whole
    prompts = [[prompt for _, prompt in part] for part in parts]
    assert not set(prompts[0]) & set(prompts[1])


@pytest.mark.parametrize(
    "flags, size, says",
    [
        ({"minibatches": 0}, 1, "--minibatches must be at least 1, not 0"),
        ({"minibatches": 5}, 1, "--prompts-per-update is below 5"),
        ({"minibatches": 3}, 2, "--prompts-per-update is below 6"),
        ({"refills": -1}, 1, "--refills must be at least 0, not -1"),
    ],
)
def test_impossible_choices_are_refused(start, tmp_path, capsys, flags, size, says):
    """A minibatch without a group, on any process, would divide by zero."""
    world = World(0, size, torch.device("cpu"))
    line = refusal(lambda: grpo(tmp_path / "run", start, world, updates=1, **flags), capsys)
    assert says in line and not (tmp_path / "run").exists()


def test_a_rollout_that_was_all_cut_off_teaches_nothing(batch, monkeypatch):
    """Its loss is zero, not 0 / 0."""
    monkeypatch.setattr(batch.rollout, "stopped", torch.zeros(24, dtype=torch.bool))
    assert batch.gradient(mask_truncated=True).eq(0).all() and batch.metrics["loss"] == 0


def test_the_flags_of_seed_temperature_and_advantage_reach_the_loop(
    start, tmp_path, watch, monkeypatch
):
    made, real = [], train_grpo.Sampler
    monkeypatch.setattr(train_grpo, "Sampler", lambda *how: made.append(real(*how)) or made[-1])
    flags = {"seed": 3, "temperature": 0.7, "advantage": "mean"}
    grpo(tmp_path, start, updates=1, eval_every=1, **flags)
    assert len(made) > 2 and {sampler.temperature for sampler in made} == {0.7}
    assert {key[0] for _, keys, _ in watch.draws for key in keys} == {3}
    rollout = watch.steps[0][0]
    assert torch.equal(rollout.advantages, group_advantages(rollout.rewards, "mean"))
    assert rollout.advantages.any()


def test_the_length_of_responses_counts_all_that_were_sampled(start, tmp_path, watch):
    for update, row in enumerate(grpo(tmp_path, start, **REFILLED)):
        lengths = torch.cat([fresh.lengths for *_, fresh in draws_of(watch, update)]).float()
        assert row["response_length"] == pytest.approx(lengths.mean().item())


def test_the_loop_evaluates_validation_problems(start, tmp_path, monkeypatch, undrawn):
    asked, made, evaluate, sampler = [], [], evaluation.evaluate, train_grpo.Sampler

    def make_sampler(*how):
        made.append(how)
        return sampler(*how)

    def note(of, *what):
        asked.append((of.group_size, *what[1:3]))
        return evaluate(of, *what)

    monkeypatch.setattr(train_grpo, "Sampler", make_sampler)
    monkeypatch.setattr(evaluation, "evaluate", note)
    flags = SMALL | {"eval_problems": 3, "keep_responses": 0, "max_new_tokens": 6, "warmup": 0}
    flags |= {"seed": 3, "updates": 1, "eval_every": 1}
    train_grpo.main(GrpoConfig(init=str(start), out=str(tmp_path), **flags), ONE)
    held_out = Task((1, 2), p=3).validation(3, rng(3, "validation problems"))
    asked = [of_one for of_one in asked if of_one[1]]  # none are kept
    assert asked == [(1, held_out, 3), (4, held_out, 3), (4, held_out, 3)]
    assert made[0][-1].func is still_to_come, "the cache leaves room for training"


def test_what_the_loss_returns_for_each_token_is_logged(start, tmp_path, monkeypatch):
    """A name that is new in grpo_loss, too."""

    def with_margin(*args):
        loss, per_token = grpo_loss(*args)
        return loss, per_token | {"margin": torch.full_like(args[1], 0.25)}

    monkeypatch.setattr(train_grpo, "grpo_loss", with_margin)
    monkeypatch.setattr(Problem, "reward", lambda self, text, stopped=True: float(len(text)))
    flags = SMALL | {"updates": 1, "keep_responses": 0}
    train_grpo.main(GrpoConfig(init=str(start), out=str(tmp_path), **flags), ONE)
    (row,) = read_log(tmp_path / "metrics.jsonl")
    assert row["margin"] == pytest.approx(0.25) and row["ratio"] == pytest.approx(1, abs=1e-3)


def test_gradient_checkpointing_is_a_flag(start, tmp_path):
    flags = SMALL | {"updates": 1, "gradient_checkpointing": True}
    run, *_ = train_grpo.set_up(GrpoConfig(init=str(start), out=str(tmp_path), **flags), ONE)
    assert run.policy.gradient_checkpointing
