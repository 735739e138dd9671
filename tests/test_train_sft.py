"""SFT: which tokens count, which problems come, position gaps, and exact resume."""

import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import refusal, same_weights, small_model

import eval as evaluation
import train_grpo
import train_sft
from data.finite_field import MATCHING_STRATEGY, Problem, Task, is_validation
from data.parse import parse_lines
from lib import training
from lib.checkpoint import load_model, new_model
from lib.distributed import World
from lib.packing import random_position_gaps
from lib.rng import rng
from lib.run_dir import read_log
from strategies import split_parts, tag
from train_grpo import GrpoConfig
from train_sft import (
    SftConfig,
    draw_examples,
    fill_defaults,
    loss_sum,
    main,
    make_batch,
)

ONE = World(0, 1, torch.device("cpu"))
TINY_RUN = {
    "steps": "1-2",
    "batch_size": 4,
    "updates": 4,
    "eval_every": 100,
    "warmup": 0,
    "lr": 1e-3,
}


def examples(n: int = 6, **flags):
    return draw_examples(fill_defaults(SftConfig(batch_size=n, **flags), tiny=True), Task(), 0)


def keys(chosen: list) -> list[tuple]:
    return [(i,) for i in range(len(chosen))]


def test_loss_counts_every_token_of_the_response_and_no_other(tokenizer):
    """The stop token is the last target; prompts are no targets."""
    chosen = examples()
    batch = make_batch(tokenizer, chosen, torch.device("cpu"))
    expected = [tokenizer.solution(solution) for _, solution in chosen]
    assert batch.targets.tolist() == sum(expected, [])
    read = [len(tokenizer.prompt(p)) + len(r) - 1 for (p, _), r in zip(chosen, expected)]
    assert len(batch.tokens) == sum(read)
    assert loss_sum(small_model(), batch).item() / len(batch.targets) > 1


def test_a_window_leaves_the_last_parts_to_solve(tokenizer):
    """What comes before them is solved as it matches, in the prompt, and is no target."""
    config = fill_defaults(SftConfig(batch_size=60), tiny=True)
    chosen = draw_examples(config, Task((1, 3), parts=(1, 4), window=2), 0)
    for problem, rest in chosen:
        solved = max(0, len(problem.parts) - 2)
        matching = [MATCHING_STRATEGY[part.kind] for part in problem.parts]
        assert problem.solution(matching).startswith(problem.prefix)
        tagged = tag(problem, problem.prefix + rest)
        assert tagged.error is None and list(tagged.parts[:solved]) == matching[:solved]
        assert len(split_parts(parse_lines(rest))) == min(2, len(problem.parts))
        prompt = tokenizer.decode([tokenizer.prompt(problem)])[0].split()
        assert prompt == f"{problem.prompt()} {problem.prefix}".split()
    batch = make_batch(tokenizer, chosen, torch.device("cpu"))
    assert batch.targets.tolist() == sum((tokenizer.solution(rest) for _, rest in chosen), [])
    ways = {tag(p, p.prefix + rest).parts[-1] for p, rest in chosen if len(p.parts) == 4}
    assert ways == {"forward", "backward"}, "the last parts take either"
    with pytest.raises(ValueError, match="window"):
        Task(window=-1)


def test_what_prompts_share_is_computed_once_and_changes_nothing(tokenizer):
    """Compare with prompts packed whole; gaps below one position are none."""
    model, chosen = small_model(), examples(5)
    longer = [
        (Problem(p.field, p.parts, 7), p.solution("forward")) for p, _ in chosen[:1]
    ] * 3 + chosen
    results = []
    for longest_gap in (0, 1):
        model.zero_grad()
        batch = make_batch(tokenizer, longer, torch.device("cpu"), longest_gap, keys(longer))
        loss = loss_sum(model, batch)
        loss.backward()
        results.append((loss, [w.grad.clone() for w in model.parameters()]))
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


def test_gaps_keep_lines_together_and_order(tokenizer):
    chosen = examples(20)
    # Gaps below 1 are none.
    plain = make_batch(tokenizer, chosen, torch.device("cpu"), 1, keys(chosen))
    gapped = make_batch(tokenizer, chosen, torch.device("cpu"), 130, keys(chosen))
    assert torch.equal(plain.tokens, gapped.tokens) and torch.equal(plain.targets, gapped.targets)
    moved = gapped.positions - plain.positions
    assert moved.min() == 0 and 100 < moved.max() <= 130
    vocabulary = {i: word for word, i in tokenizer.inner.get_vocab().items()}
    first = jumps = 0  # the prompts come first, one after the other
    for problem, _ in chosen:
        n = len(tokenizer.prompt(problem))
        words = [vocabulary[int(t)] for t in plain.tokens[first : first + n]]
        steps = moved[first : first + n].diff(prepend=torch.zeros(1, dtype=torch.long))
        assert (steps >= 0).all()
        jumps += int((steps > 0).sum())
        assert all(
            word[-1] == ":" or word in ("start", "end")
            for word, step in zip(words, steps)
            if step > 0
        )
        first += n
    assert jumps > 60


def test_gaps_start_at_any_line_of_the_prompt_and_of_the_response():
    seen = set()
    for seed in range(50):
        p, r = random_position_gaps(
            [9, 5, 9], [9, 5], torch.tensor([9]), 100, torch.Generator().manual_seed(seed)
        )
        assert p[1] == p[0] + 1 and r[1] == r[0] + 1
        seen |= {("prompt", p[2] > p[1] + 1), ("response", r[0] > p[2] + 1)}
    assert {("prompt", True), ("response", True)} <= seen
    nowhere = random_position_gaps([9, 5], [9], torch.tensor([7]), 100, torch.Generator())
    assert nowhere == ([0, 1], [2]), "another task's texts have no such lines"


def test_fresh_examples_never_repeat_and_a_data_set_comes_round():
    task = Task()
    fresh = fill_defaults(SftConfig(batch_size=8), tiny=True)
    drawn = [draw_examples(fresh, task, update) for update in range(5)]
    assert len({p.prompt() for batch in drawn for p, _ in batch}) == 40
    assert drawn[3] == draw_examples(fresh, task, 3)

    fixed = fill_defaults(SftConfig(batch_size=8, examples=20, epochs=2), tiny=True)
    rounds = [e for update in range(5) for e in draw_examples(fixed, task, update)]
    first, second = rounds[:20], rounds[20:]
    key = lambda e: e[0].prompt() + e[1]  # noqa: E731
    assert sorted(map(key, first)) == sorted(map(key, second)) and len(set(map(key, first))) == 20
    assert first != second, "each epoch has its own order"
    assert not any(is_validation(p) for p, _ in rounds)


@pytest.mark.parametrize(
    "strategy, guesses", [("forward", "inversion"), ("backward", "evaluation")]
)
def test_one_strategy_guesses_where_it_does_not_fit(strategy, guesses):
    for problem, solution in examples(40, strategy=strategy):
        assert ("guess" in solution) == (problem.kind == guesses)


def test_paper_defaults_for_a_pretrained_model():
    config = fill_defaults(SftConfig(model="somewhere"), tiny=False)
    assert (config.examples, config.epochs, config.batch_size, config.lr) == (2048, 20, 16, 2e-4)
    assert config.updates is None and config.position_gap == 0


def test_a_larger_field_is_trained_longer():
    updates = [fill_defaults(SftConfig(field=p), tiny=True).updates for p in (7, 11, 13, 17)]
    assert updates == [1600, 1600, 2400, 2400]
    assert fill_defaults(SftConfig(field=13, updates=9), tiny=True).updates == 9


def test_a_laptop_has_defaults_of_its_own():
    config = fill_defaults(SftConfig(model="somewhere", laptop=True), tiny=False)
    assert (config.epochs, config.lr, config.eval_every, config.lora) == (4, 1e-3, 128, 64)
    given = SftConfig(model="somewhere", laptop=True, updates=2, lr=5e-4)
    config = fill_defaults(given, tiny=False)
    assert (config.epochs, config.updates, config.lr, config.eval_every) == (None, 2, 5e-4, 128)


def test_a_laptops_run_says_what_it_does_and_resumes(tmp_path, pretrained, monkeypatch, capsys):
    """It says how long it will take after two updates, and goes on with the same flag alone."""
    flags = {"model": str(pretrained), "out": str(tmp_path / "run"), "steps": "1-2", "updates": 4}
    flags |= {"field": 3, "batch_size": 2, "max_new_tokens": 8, "lora": 2, "save_every": 2}
    main(SftConfig(laptop=True, **flags), ONE)
    out, err = capsys.readouterr()
    assert "\n--laptop: --lr 0.001 --eval-every 128\n" in out and "Ctrl-C" not in err
    shutil.rmtree(tmp_path / "run" / "step-4")
    other = refusal(lambda: main(SftConfig(resume=True, **flags), ONE), capsys)
    assert "was started with --laptop True, not without" in other
    monkeypatch.setattr(training, "LONG", -1)  # seconds
    main(SftConfig(laptop=True, resume=True, **flags), ONE)
    assert len(read_log(tmp_path / "run" / "metrics.jsonl")) == 4
    (line,) = (x for x in capsys.readouterr().err.splitlines() if "Ctrl-C" in x)
    assert re.search(
        r"0 updates at \d+\.\d s: about 0 minutes; Ctrl-C saves, train_sft.py --res", line
    )


@pytest.mark.parametrize(
    "given, data, warned",
    [(0.49, "", True), (0.0, "", True), (None, "", True), (0.5, "", False), (None, "own", False)],
)
def test_an_end_that_is_no_start_for_rl_is_warned_of(given, data, warned, capsys):
    """Once, at the last update; a task of one's own has no matching strategy."""
    rows, shown = [], []
    log = SimpleNamespace(rows=rows, write=rows.append)
    run = SimpleNamespace(updates=3, log=log, config=SimpleNamespace(data=data))
    bar = SimpleNamespace(set_postfix=shown.append)
    validated = {"accuracy": 0.25, "accuracy_given_match": given}
    for update, more in ((1, {}), (2, validated), (3, validated)):
        assert not capsys.readouterr().err
        training.log_sft_update(run, {"update": update, "loss": 0.5} | more, bar)
    assert ("SFT has not learned" in capsys.readouterr().err) == warned
    assert [row["right"] for row in shown if "right" in row] == ["25.0", "25.0"]
    assert len(rows) == 3 and shown[0] == {"loss": "0.500"}


def test_the_time_that_is_left_goes_by_the_second_update(capsys):
    about = {"first_update": 100, "updates": 512, "meta": {"stage": "sft"}}
    run, bar = SimpleNamespace(**about), SimpleNamespace()
    for update, elapsed in ((100, 30.0), (101, 35.5), (102, 41.0)):
        bar.format_dict = {"elapsed": elapsed}
        training.say_how_long(run, update, bar)
    (line,) = capsys.readouterr().err.splitlines()
    assert "410 updates at 5.5 s: about 38 minutes;" in line
    assert line.endswith("train_sft.py --resume continues")


@pytest.mark.parametrize("script", ["sft", "grpo"])
def test_a_laptops_defaults_are_refused_for_the_tiny_model(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config, run = {"sft": (SftConfig, main), "grpo": (GrpoConfig, train_grpo.main)}[script]
    assert "a pretrained model" in refusal(lambda: run(config(laptop=True), ONE), capsys)
    assert not any(tmp_path.iterdir())


def test_training_goes_on_from_a_given_checkpoint(tmp_path):
    """As for a pretrained model: a data set, in epochs, without position gaps."""
    main(SftConfig(out=str(tmp_path / "first"), **TINY_RUN), ONE)
    flags = {"examples": 5, "epochs": 2, "batch_size": 4, "steps": "1-2", "warmup": 0}
    main(SftConfig(model=str(tmp_path / "first"), out=str(tmp_path / "second"), **flags), ONE)
    rows = [read_log(tmp_path / name / "metrics.jsonl") for name in ("first", "second")]
    assert len(rows[1]) == 3, "ten examples in batches of at most four"
    assert rows[1][0]["loss"] < rows[0][0]["loss"], "it begins with what the first run learned"


def test_resume_is_exact(tmp_path):
    """Four updates equal two, a stop, and two more: to the last bit, in weights and log."""
    main(SftConfig(out=str(tmp_path / "whole"), **TINY_RUN), ONE)
    main(SftConfig(out=str(tmp_path / "parts"), save_every=2, **TINY_RUN), ONE)
    shutil.rmtree(tmp_path / "parts" / "step-4")  # as if killed after the second update
    main(SftConfig(out=str(tmp_path / "parts"), resume=True, **TINY_RUN), ONE)
    whole, parts = (load_model(tmp_path / name / "step-4")[0] for name in ("whole", "parts"))
    assert same_weights(whole, parts)
    rows = [
        [(r["update"], r["loss"]) for r in read_log(tmp_path / n / "metrics.jsonl")]
        for n in ("whole", "parts")
    ]
    assert rows[0] == rows[1] and [update for update, _ in rows[0]] == [1, 2, 3, 4]


@pytest.mark.usefixtures("undrawn")
def test_the_loop_goes_by_the_seed(tmp_path, monkeypatch):
    """Gaps are drawn anew for each update and example, dropout for each update and batch."""
    gaps, places, real = [], [], train_sft.make_batch

    def spy(tokenizer, chosen, device, *args):
        gaps.extend(args[1:] and [(args[0], key) for key in args[1]])
        return real(tokenizer, chosen, device, *args)

    monkeypatch.setattr(train_sft, "make_batch", spy)
    monkeypatch.setattr(train_sft, "dropout_key", lambda _, *place: places.append(place))
    monkeypatch.setattr(train_sft, "n_threads", lambda device: 2)
    flags = TINY_RUN | {"updates": 2, "seed": 5, "position_gap": 9, "lr": 1e-9}
    trained, tokenizer = load_model(main(SftConfig(out=str(tmp_path / "run"), **flags), ONE))
    assert sorted(gaps) == [(9, (5, "gaps", update, i)) for update in (0, 1) for i in range(4)]
    assert sorted(places) == [(update, 0, i) for update in (0, 1) for i in (0, 1)]
    for seed, same in ((5, True), (0, False)):
        weights = trained.lm_head.weight, new_model(len(tokenizer), seed).lm_head.weight
        assert torch.allclose(*weights, atol=1e-6) == same


def test_examples_are_of_the_seed():
    """Fresh ones, and those of a set."""
    for flags in ({}, {"examples": 100, "epochs": 1}):
        prompts = [{p.prompt() for p, _ in examples(50, seed=i, **flags)} for i in (0, 1)]
        assert len(prompts[0] & prompts[1]) < 5


def test_validation_is_that_written_out(tokenizer, monkeypatch):
    """The loss is a mean over all tokens, accuracy of one response to each problem."""
    asked, real = [], evaluation.evaluate
    monkeypatch.setattr(evaluation, "evaluate", lambda *args: asked.append(args) or real(*args))
    model, task, config = small_model(), Task((1, 4)), SftConfig(seed=3)
    problems = task.validation(11, rng(0, "some"))
    run = SimpleNamespace(config=config, policy=model, tokenizer=tokenizer)
    metrics = train_sft.validation_metrics(run, task, problems, 7)
    stream = rng(3, "validation strategies")
    chosen = [(problem, task.solution(problem, "mixed", stream)) for problem in problems]
    batch = make_batch(tokenizer, chosen, torch.device("cpu"))
    expected = loss_sum(model, batch).item() / len(batch.targets)
    assert metrics["validation_loss"] == pytest.approx(expected, rel=1e-4)
    ((sampler, _, sampled, seed),) = asked
    assert (sampler.model, sampler.group_size, sampler.temperature) == (model, 1, 1.0)
    assert (sampler.max_new_tokens, sampled, seed) == (7, problems, 3)


def test_the_loss_is_the_mean_over_all_tokens_of_all_batches(tokenizer):
    model, chosen, cpu = small_model(), examples(5), torch.device("cpu")
    run = SimpleNamespace(config=SftConfig(lora=0, batch_size=5), master=model, policy=model)
    batches = [make_batch(tokenizer, some, cpu) for some in (chosen[:1], chosen[1:])]
    loss, n_tokens = train_sft.sft_backward(run, batches, ONE, 0)
    whole = make_batch(tokenizer, chosen, cpu)
    expected = loss_sum(model, whole) / len(whole.targets)
    assert n_tokens == len(whole.targets) and loss == pytest.approx(expected.item(), rel=1e-5)
    slopes = torch.autograd.grad(expected, list(model.parameters()))
    torch.testing.assert_close([w.grad for w in model.parameters()], list(slopes))
