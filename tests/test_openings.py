"""Forced openings: access, execution and the split of a gain on policies where all is known."""

import functools
import json
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import response, small_model, word_tokenizer

import eval
from data.finite_field import BACKWARD, EVALUATION, FORWARD, INVERSION, MATCHING_STRATEGY, Task
from lib.checkpoint import load_model
from lib.distributed import World
from lib.gain import decompose_gain
from lib.openings import Openings, compare, measure, summarise
from lib.rng import rng
from lib.run_dir import save_checkpoint
from lib.tokenizer import load_tokenizer
from rollout import Sampler
from strategies import GUESS, MIXED, score_response

ONE = World(0, 1, torch.device("cpu"))
X, SAMPLES = 256, 4
MATCHING = 0  # columns of the arrays of a policy; every problem here is an evaluation problem
OTHER = 1


def alike(z):
    """Half of the time the matching strategy, which is right six times in ten."""
    return np.full_like(z, 0.5), np.stack((np.full_like(z, 0.6), np.full_like(z, 1 / 11)), 1)


def selected(z):
    return np.full_like(z, 0.97), np.stack((np.full_like(z, 0.9), np.full_like(z, 1 / 11)), 1)


def routing(z):
    """The matching strategy on easy problems (small z), on which it is right; else the other."""
    return 0.95 - 0.9 * z, np.stack((0.95 - 0.9 * z, np.full_like(z, 0.3)), 1)


def routing_back(z):
    """The matching strategy on hard problems, though it is right on easy ones."""
    return 0.05 + 0.9 * z, np.stack((0.95 - 0.5 * z, np.full_like(z, 0.3)), 1)


def never(z):
    return np.zeros_like(z), np.stack((1 - 0.5 * z, np.full_like(z, 0.4)), 1)


def nearly_perfect(z):
    """The matching strategy, and right on all problems but one in twenty."""
    return np.ones_like(z), np.stack((np.where(z < 0.95, 1.0, 0.0), np.full_like(z, 0.5)), 1)


def perfect(z):
    return np.ones_like(z), np.stack((np.where(z < 0.99, 1.0, 0.0), np.full_like(z, 0.5)), 1)


MADE = {
    (s, right): response(EVALUATION, 6, way, s == MATCHING, right, None, True)
    for s, way in enumerate((FORWARD, BACKWARD))
    for right in (False, True)
}


def sampled(policy, z, draw):
    """Return free responses of a policy to problems of difficulty z (X,), and those that it lacks.

    These are, of each strategy that a problem's free responses do not take, as many forced ones.
    """
    access, execution = policy(z)
    columns = (draw.random((len(z), SAMPLES)) >= access[:, None]).astype(int)  # (X, G)
    right = draw.random((len(z), SAMPLES)) < np.take_along_axis(execution, columns, 1)
    free = [[MADE[s, r] for s, r in zip(*row)] for row in zip(columns.tolist(), right.tolist())]
    right = (draw.random((len(z), 2, SAMPLES)) < execution[:, :, None]).tolist()
    forced = [
        [MADE[s, r] for s in (MATCHING, OTHER) if s not in row for r in right[x][s]]
        for x, row in enumerate(columns.tolist())
    ]
    return free, forced


def openings_of(policy, z, draw):
    """Return a policy's measured openings on problems of difficulty z (X,)."""
    access, execution = policy(z)
    taken = draw.binomial(SAMPLES, access) / SAMPLES
    forced = draw.binomial(SAMPLES, execution) / SAMPLES
    taken = np.stack((taken, 1 - taken), 1)
    return Openings([FORWARD, BACKWARD], [EVALUATION] * len(z), taken, forced, forced)


def truth(before, after):
    """Return the parts of the gain in the population: difficulties are uniform."""
    z = (np.arange(100_000) + 0.5) / 100_000
    (a, skill), (b, skill_after) = before(z), after(z)
    a, b = np.stack((a, 1 - a), 1), np.stack((b, 1 - b), 1)
    return {
        "selection": ((b - a) * (skill + skill_after) / 2).sum(1).mean(),
        "improvement": ((a + b) / 2 * (skill_after - skill)).sum(1).mean(),
        "access": a[:, MATCHING].mean(),
        "execution": skill[:, MATCHING].mean(),
        "change": (skill_after - skill)[:, MATCHING].mean(),
    }


POLICIES = [(alike, selected), (routing, selected), (routing, routing_back), (never, alike)]
NAMES = [f"{a.__name__}-{b.__name__}" for a, b in POLICIES]
RARE = (nearly_perfect, perfect)


def holds(interval, value) -> bool:
    return interval[0] - 1e-9 <= value <= interval[1] + 1e-9


@pytest.mark.parametrize("before, after", [*POLICIES, RARE], ids=[*NAMES, "rare-changes"])
def test_access_and_execution_are_held_93_to_97_times_in_100(before, after):
    draw, expected, held = np.random.default_rng(0), truth(before, after), []
    for _ in range(2000):
        z = draw.random(X)
        a, b = (openings_of(policy, z, draw) for policy in (before, after))
        of_a, change = (of[EVALUATION][FORWARD] for of in (summarise(a), summarise(b, a)))
        intervals = [of_a["access"], of_a["execution"], change["execution"]]
        names = ("access", "execution", "change")
        held.append([holds(x["ci95"], expected[name]) for x, name in zip(intervals, names)])
    access, *others = np.mean(held, 0)
    assert access == 1 if before in (never, nearly_perfect) else 0.93 <= access <= 0.97
    assert all(0.93 <= share <= 0.97 for share in others), others


@pytest.mark.parametrize("before, after", [*POLICIES, RARE], ids=[*NAMES, "rare-changes"])
def test_the_split_with_forced_responses_is_right_and_the_imputed_one_is_not(before, after):
    """On average within half a point; with wider bounds than above, for fewer draws.

    What imputing cannot know is the accuracy of a strategy on the problems where it is not taken.
    """
    draw, expected, errors, held = np.random.default_rng(1), truth(before, after), [], []
    for _ in range(100):
        z = draw.random(X)
        (free_a, forced_a), (free_b, forced_b) = (sampled(x, z, draw) for x in (before, after))
        measured = decompose_gain(free_a, free_b, (forced_a, forced_b), resamples=30)["overall"]
        imputed = decompose_gain(free_a, free_b, resamples=2)["overall"]
        found = [of["selection"]["mean"] for of in (measured, imputed)]
        errors.append(np.array(found) - expected["selection"])
        parts = ("selection", "improvement")
        held.append([holds(measured[part]["ci95"], expected[part]) for part in parts])
    of_measured, of_imputed = np.abs(np.mean(errors, 0))
    assert of_measured < 0.005
    selection, improvement = np.mean(held, 0)
    if (before, after) == RARE:  # whose selection is zero, always
        assert selection == 1 and improvement >= 0.88
    else:
        assert min(selection, improvement) >= 0.89 and max(selection, improvement) <= 0.99
    if before in (routing, never):
        assert of_imputed > 0.02, "the policies are to mislead it"


def test_forced_responses_count_only_where_no_free_one_took_their_strategy():
    """And the parts add up to the gain of the free ones."""
    draw = np.random.default_rng(2)
    (a, lacking_a), (b, lacking_b) = (sampled(x, draw.random(X), draw) for x in (routing, selected))
    found = decompose_gain(a, b, (lacking_a, lacking_b))
    everywhere = [[*forced, MADE[MATCHING, True]] for forced in lacking_a]
    taken = [{r.strategy for r in group} for group in a]
    only_taken = [m if FORWARD in t else x for m, t, x in zip(everywhere, taken, lacking_a)]
    assert decompose_gain(a, b, (only_taken, lacking_b)) == found
    assert decompose_gain(a, b, (everywhere, lacking_b)) != found != decompose_gain(a, b)
    parts = found["overall"]
    gain = np.mean([[r.correct for r in y] for y in b]) - np.mean(
        [[r.correct for r in y] for y in a]
    )
    total = parts["selection"]["mean"] + parts["improvement"]["mean"]
    assert total == pytest.approx(gain) == parts["gain"]["mean"]


def problems(n=40, **task):
    return Task(**task).validation(n, rng(0, "validation problems"))


def test_measure_counts_what_a_hand_counts():
    """Two problems, two responses each: right, wrong in its last line; a guess, and no opening."""
    one, other = problems(2)
    wrong = (other.parts[0].asked + 1) % 11
    matching, way = MATCHING_STRATEGY[one.kind], MATCHING_STRATEGY[other.kind]
    against = {FORWARD: BACKWARD, BACKWARD: FORWARD}[way]
    right = one.solution(matching)
    faulty = right.replace(right.split()[-1], "e0" if right.split()[-1] != "e0" else "e1")
    texts = [[right, faulty], [other.solution(against, [wrong]), f"answer {other.answer}"]]
    pairs = list(zip((one, other), texts))
    free = [[score_response(problem, text) for text in group] for problem, group in pairs]
    opened = [[problem.opening_strategy(text, 0) for text in group] for problem, group in pairs]
    assert opened == [[matching, matching], [against, ""]]
    forced = {
        s: [[score_response(p, p.solution(s, [wrong]))] for p in (one, other)]
        for s in (FORWARD, BACKWARD)
    }
    found = measure([one, other], free, forced)
    i, j = (found.strategies.index(s) for s in (matching, way))
    assert found.access[0, i] == 1 and found.access[1].sum() == 0.5
    assert found.execution[0, i] == found.execution[1, j] == 1
    assert found.execution[1, 1 - j] == 0, "the guess is wrong"
    assert (found.faultless == 1).all(), "and yet carried through"
    assert free[1][0].error == GUESS and free[1][0].faultless and not free[1][0].verified
    assert free[0][0].verified and not free[0][1].verified


def test_openings_are_those_of_worked_solutions():
    for problem in problems():
        for strategy in (FORWARD, BACKWARD):
            solution = problem.solution(strategy)
            assert solution.startswith(problem.make_prefix(0, strategy) + " ")
            assert problem.opening_strategy(solution, 0) == strategy
        assert problem.make_prefix(0) == "" and problem.opening_strategy("answer e1", 0) == ""


def test_given_parts_are_the_beginning_of_a_matching_solution():
    for problem in problems(parts=(3, 4)):
        ways = [MATCHING_STRATEGY[part.kind] for part in problem.parts]
        solution = problem.solution(ways)
        for parts in (1, 2):
            assert solution.startswith(problem.make_prefix(parts) + "\n")
            assert solution.startswith(problem.make_prefix(parts, ways[parts]) + " ")
            assert problem.opening_strategy(solution, parts) == ways[parts]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    for update in (1, 2):
        model = small_model(update)
        saved = (run, update, model, word_tokenizer(11), torch.optim.AdamW(model.parameters()))
        save_checkpoint(*saved, {"field": 11}).result()
    return [str(run / "step-1"), str(run / "step-2")]


FEW = {"problems": 10, "samples": 16, "steps": "1-2"}


def test_command_forces_openings(checkpoints, tmp_path, capsys):
    files = {"json": str(tmp_path / "a.json"), "plot": str(tmp_path / "a.png")}
    eval.main(eval.EvalConfig(checkpoints, force="both", **FEW, **files), ONE)
    found, out = json.loads((tmp_path / "a.json").read_text()), capsys.readouterr().out
    assert set(found["openings"]) == {"before", "after"}
    for of_one in found["openings"].values():
        assert set(of_one["evaluation"]) == {FORWARD, BACKWARD}
    assert "right if forced" in out
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    eval.main(eval.EvalConfig(checkpoints[:1], force=FORWARD, **FEW), ONE)
    out = capsys.readouterr().out
    assert "evaluation, forward" in out and "evaluation, backward" not in out


def test_a_sampler_of_ones_own_samples_forced_responses_too():
    """Such as one with a new attribute, say top_p: it and its settings are those of free ones."""
    seen = []

    class Mine(Sampler):
        def sample(self, prompts, keys):
            seen.append((self.top_p, self.temperature, self.max_new_tokens))
            return super().sample(prompts, keys)

    tokenizer, some = word_tokenizer(11), dict(enumerate(problems(2)))
    sampler = Mine(small_model(), tokenizer.stops, 2, 12, 0.5)
    sampler.top_p = 0.9
    eval.force(sampler, tokenizer, some, 0, FORWARD)
    assert seen == [(0.9, 0.5, 11 if all(p.kind == EVALUATION for p in some.values()) else 10)]
    assert sampler.max_new_tokens == 12


def test_command_forces_a_part_of_compositions_and_compares_two(checkpoints, tmp_path, capsys):
    files = {"json": str(tmp_path / "a.json"), "plot": str(tmp_path / "a.png")}
    few = {"problems": 10, "steps": "1-2", "parts": "2-3", "given": 1, "greedy": True}
    eval.main(eval.EvalConfig(checkpoints, force=FORWARD, **few, **files), ONE)
    found, out = json.loads((tmp_path / "a.json").read_text()), capsys.readouterr().out
    assert "parts given: 1, greedy" in out and found["before"]["overall"]["samples"] == 1
    for of_one in (*found["openings"].values(), found["openings_change"]):
        assert {*of_one} == {"evaluation", "inversion"}  # of the part that is opened
        assert all([*of_kind] == [FORWARD] for of_kind in of_one.values())
    changes = found["openings_change"]["evaluation"][FORWARD]["execution"]
    before, after = (found["openings"][x]["evaluation"][FORWARD] for x in ("before", "after"))
    difference = after["execution"]["mean"] - before["execution"]["mean"]
    assert changes["mean"] == pytest.approx(difference)
    assert found["reasons"] == found["imputed"], "the strategies of compositions are not forced"
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_forced_responses_begin_with_their_opening(checkpoints, monkeypatch):
    """It stands in the prompt and counts in the score; each stream has its own random numbers."""
    asked, scored = [], []
    sample, score = eval.Sampler.sample, eval.score_rollout

    def spy_on_sample(self, prompts, keys):
        asked.append((prompts, keys))
        return sample(self, prompts, keys)

    def spy_on_score(rollout, problems, tokenizer):
        score(rollout, problems, tokenizer)
        scored.append((problems, rollout.scored))

    monkeypatch.setattr(eval.Sampler, "sample", spy_on_sample)
    monkeypatch.setattr(eval, "score_rollout", spy_on_score)
    few = FEW | {"parts": "2-3", "samples": 2}
    eval.main(eval.EvalConfig(checkpoints[:1], force="both", given=1, **few), ONE)
    tokenizer, all_keys = word_tokenizer(11), [key for _, keys in asked for key in keys]
    assert len(asked) == 3 and len({*all_keys}) == len(all_keys) == 3 * FEW["problems"]
    for (prompts, _), (begun, groups), strategy in zip(asked, scored, ("", FORWARD, BACKWARD)):
        for prompt, problem, group in zip(prompts, begun, groups):
            text = problem.make_prefix(1, strategy)
            assert prompt == tokenizer.question(problem) + tokenizer.solution(text)[:-1]
            words = text.split()
            assert all(r.response.split()[: len(words)] == words for r in group)


def test_strategies_that_are_lacking_are_forced(checkpoints, monkeypatch, tmp_path, capsys):
    """On each problem those that no free response took; of compositions none."""
    evaluations, report, score = [], eval.report, eval.score_rollout
    updates = iter((1, 2, 1, 2, 1, 2))  # the policy that answers: free, forced, then compositions

    def obey(rollout, problems, tokenizer):
        """As if policies took forward alone, then backward, which a forced start gets wrong."""
        update = next(updates)
        score(rollout, problems, tokenizer)
        for i, problem in enumerate(problems):
            way = FORWARD if update == 1 else BACKWARD
            if problem.prefix:
                way = FORWARD if problem.prefix.endswith("start") else BACKWARD
            solved = score_response(problem, problem.solution([way] * len(problem.parts)))
            if problem.prefix and update == 1:
                solved = replace(solved, correct=False, error="arithmetic")
            rollout.scored[i] = [solved, replace(solved, strategy=MIXED)][: len(rollout.scored[i])]

    def spy(found, *files):
        evaluations.append([*found.values()])
        return report(found, *files)

    monkeypatch.setattr(eval, "score_rollout", obey)
    monkeypatch.setattr(eval, "report", spy)
    few = {"problems": 12, "samples": 2, "steps": "1-2"}
    eval.main(eval.EvalConfig(checkpoints, json=str(tmp_path / "a.json"), **few), ONE)
    found, out = json.loads((tmp_path / "a.json").read_text()), capsys.readouterr().out
    pairs = ((FORWARD, BACKWARD), (BACKWARD, FORWARD))
    for evaluation, (taken, lacked) in zip(evaluations[0], pairs, strict=True):
        for free, forced in zip(evaluation.free, evaluation.forced, strict=True):
            assert {r.strategy for r in free} == {taken, MIXED}
            assert [r.strategy for r in forced] == [lacked], "one of two is tagged otherwise"
    assert found["reasons"] != found["imputed"] and "were forced; with imputed accuracies" in out
    measured, imputed = (found[name]["overall"] for name in ("reasons", "imputed"))
    assert measured["improvement"]["mean"] > imputed["improvement"]["mean"] + 0.2
    eval.main(eval.EvalConfig(checkpoints, parts="2", **few), ONE)
    assert not any(forced for of_one in evaluations[1] for forced in of_one.forced)
    assert "forced" not in capsys.readouterr().out


def test_one_policy_at_a_time_is_in_memory(checkpoints):
    """Also where strategies are forced, for which the first policy is loaded again."""
    models, alive = [], []

    def load(path: str) -> eval.Policy:
        alive.append(sum(model() is not None for model in models))
        model, tokenizer = load_model(Path(path), "cpu")
        models.append(weakref.ref(model))
        return Sampler(model, tokenizer.stops, 1, 40), tokenizer

    policies = {path: functools.partial(load, path) for path in checkpoints}
    eval.evaluate_policies(policies, problems(3), 0, [FORWARD])
    assert alive == [0, 0, 0, 0]


def test_what_neither_policy_takes_is_not_forced():
    """Nor what both take; a policy alone lacks nothing."""
    some = problems(3)
    ways = ([FORWARD, FORWARD, BACKWARD], [FORWARD, BACKWARD, BACKWARD])
    mine, theirs = (
        [[score_response(x, x.solution(way))] for x, way in zip(some, of_one)] for of_one in ways
    )
    lacking = [eval.lacking(some, *pair, FORWARD) for pair in ((mine, theirs), (theirs, mine))]
    assert lacking == [[], [1]] and eval.lacking(some, mine, theirs, BACKWARD) == [1]
    assert eval.lacking(some, mine, mine, FORWARD) == []


def test_an_opening_counts_among_the_tokens_of_a_response(checkpoints, monkeypatch):
    """So it fits where a free response does, and is cut off where that would be."""
    model, tokenizer = load_model(Path(checkpoints[0]))
    sampler, seen = eval.Sampler(model, tokenizer.stops, 2, 30), []
    monkeypatch.setattr(eval, "evaluate", lambda sampler, *_: seen.append(sampler) or [])
    for strategy in (FORWARD, BACKWARD):
        begun = {3: problems()[3]}
        eval.force(sampler, tokenizer, begun, 0, strategy)
        words = begun[3].make_prefix(0, strategy).split()
        assert seen[-1].max_new_tokens == 30 - len(words)


def test_responses_do_not_depend_on_how_many_are_sampled_at_once(checkpoints, monkeypatch):
    texts = []
    for at_once in (8192, 32):
        monkeypatch.setattr(eval, "AT_ONCE", at_once)
        model, tokenizer = load_model(Path(checkpoints[0]))
        sampler = eval.Sampler(model, tokenizer.stops, 16, 30)
        scored = eval.evaluate(sampler, tokenizer, problems(9, steps=(1, 2)), 0)
        texts.append([[r.response for r in group] for group in scored])
    assert texts[0] == texts[1] and len(texts[0]) == 9


def test_a_begun_text_and_its_rest_are_the_tokens_of_the_whole(pretrained):
    """A pretrained model's tokenizer, with a chat template: the prefix follows the template."""
    tokenizer = load_tokenizer(pretrained)
    for problem in problems(20, parts=(2, 3)):
        solution = problem.solution([MATCHING_STRATEGY[part.kind] for part in problem.parts])
        for text in (
            problem.make_prefix(1),
            problem.make_prefix(1, MATCHING_STRATEGY[problem.parts[1].kind]),
        ):
            begun = replace(problem, prefix=text)
            prompt = tokenizer.prompt(begun)
            assert prompt[: len(tokenizer.prompt(problem))] == tokenizer.prompt(problem)
            rest = tokenizer.solution(solution.removeprefix(text))
            assert tokenizer.prefix(begun) + rest == tokenizer.solution(solution)


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"given": 1}, "--given 1 needs problems of at least 2 --parts"),
        ({"given": 3, "parts": "3-5"}, "--given 3 needs"),
        ({"given": -1}, "--given must be at least 0"),
        ({"force": "both", "data": "own.jsonl"}, "--force is of the paper's task"),
    ],
)
def test_what_cannot_be_forced_is_refused(checkpoints, flags, words, capsys, tmp_path):
    if "data" in flags:
        flags = flags | {"data": str(tmp_path / "own.jsonl"), "steps": ""}
        rows = [f'{{"prompt": "start e1 {i}:", "answer": "e2"}}\n' for i in range(1, 41)]
        (tmp_path / "own.jsonl").write_text("".join(rows))
    with pytest.raises(SystemExit) as error:
        eval.main(eval.EvalConfig(checkpoints, **FEW | flags), ONE)
    assert error.value.code == 2 and words in capsys.readouterr().err


def test_the_part_behind_the_given_ones_is_measured(checkpoints, monkeypatch):
    """Its type, and the strategy with which it opens."""
    seen, real = [], eval.openings.measure

    def solve(rollout, problems, tokenizer):
        ways = [[MATCHING_STRATEGY[part.kind] for part in x.parts] for x in problems]
        rollout.scored = [[score_response(x, x.solution(way))] for x, way in zip(problems, ways)]

    def measure(*args):
        seen.append(real(*args))
        return seen[-1]

    monkeypatch.setattr(eval, "score_rollout", solve)
    monkeypatch.setattr(eval.openings, "measure", measure)
    few = FEW | {"parts": "2-3", "given": 1, "samples": 1}
    eval.main(eval.EvalConfig(checkpoints[:1], force=FORWARD, **few), ONE)
    kinds = [problem.parts[1].kind for problem in problems(10, steps=(1, 2), parts=(2, 3))]
    (found,) = seen
    assert found.kinds == kinds and {*kinds} == {EVALUATION, INVERSION}
    assert found.access[:, 0].tolist() == [MATCHING_STRATEGY[kind] == FORWARD for kind in kinds]


def test_a_change_is_what_was_gained_since_the_first():
    kinds = [EVALUATION] * 2
    first, second = (Openings([FORWARD], kinds, *[np.full((2, 1), x)] * 3) for x in (0, 0.5))
    change = compare({"before": first, "after": second})["openings_change"]
    assert [part["mean"] for part in change[EVALUATION][FORWARD].values()] == [0.5] * 3
