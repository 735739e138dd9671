"""What training changed beside its task: losses, KL divergence and answers, before and after."""

import json
from pathlib import Path

import pytest
import torch
from conftest import (
    draw_nothing,
    make_pretrained,
    refusal,
    small_model,
    word_tokenizer,
)

import train_grpo
import train_sft
from data.finite_field import Task
from lib.checkpoint import load_model
from lib.distributed import World
from lib.packing import response_logps
from lib.rng import rng
from lib.run_dir import read_log
from lib.transformer import ModelConfig
from paper.forgetting import QUESTIONS, ForgettingConfig, answers, find_chain, kl_per_token, main
from rollout import Sampler

ONE = World(0, 1, torch.device("cpu"))
SMALL = {"field": 3, "steps": "1-2", "updates": 2, "precision": "fp32", "max_new_tokens": 12}
SFT = {"batch_size": 4, "eval_every": 2, "lr": 1e-2, "warmup": 0}
GRPO = {"prompts_per_update": 2, "group_size": 4, "eval_problems": 2, "lr": 1e-2, "warmup": 0}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """SFT and RL of a pretrained model and of a tiny one, two updates each."""
    place = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        smaller = ModelConfig(0, hidden_size=32, intermediate_size=48, num_hidden_layers=1)
        patch.setattr("lib.checkpoint.TINY", smaller)
        pretrained = str(make_pretrained(place / "pretrained"))
        for kind, model, lora in (("large", pretrained, 4), ("tiny", "tiny", 0)):
            flags = SMALL | {"model": model, "out": str(place / f"{kind}-sft"), "lora": lora}
            train_sft.main(train_sft.SftConfig(**flags, **SFT), ONE)
            flags = SMALL | {"init": flags["out"], "out": str(place / f"{kind}-rl"), "lora": lora}
            train_grpo.main(train_grpo.GrpoConfig(**flags, **GRPO), ONE)
        for name, init in (("again", place / "tiny-rl"), ("no-sft", pretrained)):
            flags |= {"init": str(init), "out": str(place / name)}
            train_grpo.main(train_grpo.GrpoConfig(**flags, **GRPO), ONE)
    return {folder.name: folder for folder in place.iterdir()}


def test_start_sft_and_rl_in_a_row(runs, tmp_path, capsys):
    out = tmp_path / "out.json"
    names = [str(runs["large-sft"]), str(runs["large-rl"])]
    main(ForgettingConfig(names, json=str(out)), ONE)
    start, sft, rl = json.loads(out.read_text())
    assert start["checkpoint"] == str(runs["pretrained"]) and rl["checkpoint"].endswith("step-2")
    logged = read_log(runs["large-sft"] / "metrics.jsonl")[-1]["validation_loss"]
    assert sft["losses"]["SFT's own"] == pytest.approx(logged, abs=1e-5), "that of SFT's own log"
    assert sft["losses"]["SFT's own"] < start["losses"]["SFT's own"] - 0.1
    mean = sum(value for name, value in sft["losses"].items() if name != "SFT's own") / 4
    assert mean == pytest.approx(sft["losses"]["SFT's own"], rel=0.1), "either strategy for either"
    assert "kl" not in start and sft["kl"] > 1e-3

    legend, _, *lines = capsys.readouterr().out.splitlines()
    assert legend == " -> ".join([str(runs["pretrained"]), *(f"{name}/step-2" for name in names)])
    assert lines[0] == "|  | start | SFT | RL |" and f"{logged:.3f}" in lines[2]
    rows = [line for line in lines if line.startswith(tuple(f"| {q} |" for q in QUESTIONS))]
    assert len(rows) == 10 and len(lines) == 2 + 6 + 1 + 2 + 10
    assert all(row.replace("\\|", "").count("|") == 5 and row.isprintable() for row in rows)


def test_one_run_of_the_tiny_model_gets_no_questions(runs, capsys):
    main(ForgettingConfig([str(runs["tiny-rl"] / "step-2")], problems=16), ONE)
    out = capsys.readouterr().out
    assert "| SFT | RL |" in out and "forward for inversion" in out and "France" not in out


def test_rl_that_goes_on_from_rl_is_measured_on_its_sfts_problems(runs, tmp_path):
    """Bug: the problems were those of SFT's default flags where the chain held RL alone."""
    losses = []
    for names in (["tiny-rl"], ["tiny-rl", "again"]):
        out = tmp_path / "losses.json"
        names = [str(runs[name]) for name in names]
        main(ForgettingConfig(names, problems=16, json=str(out)), ONE)
        losses.append([model["losses"] for model in json.loads(out.read_text())])
    assert losses[1][:2] == losses[0] and len(losses[1]) == 3


def test_the_kl_is_that_of_all_tokens_written_out():
    model, before, tokenizer = small_model(0), small_model(1), word_tokenizer(11)
    flags, task = train_sft.SftConfig(max_new_tokens=8), Task()
    problems = [task.sample(rng(0, "test", i), "validation") for i in range(6)]
    found = kl_per_token(before, model, tokenizer, flags, task, problems)
    keys = [(flags.seed, "forgetting", i) for i in range(6)]
    rollout = Sampler(model, tokenizer.stops, 1, 8).sample([*map(tokenizer.prompt, problems)], keys)
    batch, *_ = rollout.pack(torch.arange(6))
    n, total = len(batch.targets), 0.0
    for token in range(len(tokenizer)):
        batch.targets = torch.full_like(batch.targets, token)
        p, q = (response_logps(one, batch)[0] for one in (model, before))
        total += (p.exp() * (p - q)).sum().item()
    assert found == pytest.approx(total / n, rel=1e-4) and found > 0.1
    assert kl_per_token(model, model, tokenizer, flags, task, problems) == 0


def test_answers_are_greedy_and_in_the_chat_template(runs):
    model, tokenizer = load_model(runs["pretrained"])
    given = answers(model, tokenizer)
    assert list(given) == list(QUESTIONS)
    question = QUESTIONS[3]
    text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    tokens = tokenizer.inner.encode(text, add_special_tokens=False)
    rollout = Sampler(model, tokenizer.stops, 1, 40, temperature=0).sample([tokens], [("other",)])
    (expected,) = tokenizer.decode(rollout.response_tokens())
    assert given[question] == expected + "..." * (not rollout.stopped.item())


def test_what_cannot_be_compared_is_refused(runs, tmp_path, capsys):
    def refused(*names, **flags) -> str:
        return refusal(lambda: main(ForgettingConfig([*map(str, names)], **flags), ONE), capsys)

    assert "name one run" in refused()
    assert "there is no folder nowhere" in refused("nowhere")
    assert "did not start from a checkpoint" in refused(runs["tiny-sft"])
    assert "did not start from" in refused(runs["tiny-rl"], runs["large-rl"])
    assert all("there was no SFT among" in refused(runs[x]) for x in ("no-sft", "again"))
    assert "--problems must be at least 1" in refused(runs["tiny-rl"], problems=0)
    assert "missing or read-only" in refused(runs["tiny-rl"], json=str(tmp_path / "no/x.json"))
    assert find_chain([str(runs["tiny-rl"])])[0].parent.resolve() == runs["tiny-sft"].resolve()
