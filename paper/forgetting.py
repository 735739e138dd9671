"""What training changed beside its task: a run's newest checkpoint and its start, compared.

    python -m paper.forgetting ckpt/rl            # the SFT model and what RL made of it
    python -m paper.forgetting ckpt/sft ckpt/rl   # the pretrained model, SFT and RL

Each further run must have started from the one before, and one of the models is that of SFT. All
compute in fp32 on its validation problems:

- the loss on worked solutions: SFT's own, as in its log, and by strategy and problem type;
- the KL divergence from the model before, per token of this model's own responses at temperature 1,
  exact over the vocabulary: k3, as in train_grpo.py, hardly sees what is no longer sampled;
- greedy answers to ten plain questions, of at most 40 tokens; the tiny model has no words for them.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from data import load_problems
from data.finite_field import MATCHING_STRATEGY, WRITTEN
from lib.attention import packed_attention
from lib.checkpoint import find_checkpoint, find_start, holds_start, load_meta, load_model
from lib.distributed import World, distributed
from lib.flags import parse_flags, require, require_min, require_writable, user_errors, write_json
from lib.packing import Packed
from lib.responses import printable
from lib.rng import rng
from lib.tables import markdown
from rollout import Sampler
from train_sft import SftConfig, loss_sum, make_batch

QUESTIONS = (
    "What is the capital of France?", "What is 2 + 3?", "What is the opposite of hot?",
    "How many days does a week have?", "Who wrote Romeo and Juliet?", "What do bees make?",
    "Which planet do we live on?", "Translate 'good morning' into Spanish.",
    "Name three colours.", "Write one sentence about a cat.",
)  # fmt: skip


@dataclass
class ForgettingConfig:
    runs: list = field(default_factory=list)  # runs or checkpoints, each the start of the next
    problems: int = 128  # validation problems; a validation of SFT has 128
    json: str = ""  # write what was measured to this file


def find_chain(names: list[str]) -> list[Path]:
    """Return the start of the first run, and the newest checkpoint of each."""
    require(bool(names), "name one run, or several of which each started from the one before")
    chain: list[Path] = []
    for newest in map(find_checkpoint, names):
        meta = load_meta(newest)
        start = chain[-1] if chain else find_start(newest.parent, meta)
        known = start is not None and "init_sha256" in meta and holds_start(start, meta)
        require(known, f"{newest} did not start from {start or 'a checkpoint, or that is gone'}")
        chain += [newest] if chain else [start, newest]
    return chain


def solution_losses(model, tokenizer, flags: SftConfig, task, problems: list) -> dict[str, float]:
    """Return the mean of -log p over the tokens of solutions, by what they are."""

    def loss(some: list, strategy: str) -> float:
        stream = rng(flags.seed, "validation strategies")  # as in train_sft.validation_metrics
        examples = [(problem, task.solution(problem, strategy, stream)) for problem in some]
        batch = make_batch(tokenizer, examples, model.device)
        return loss_sum(model, batch).item() / len(batch.targets)

    losses = {"SFT's own": loss(problems, flags.strategy)}
    for kind, matching in MATCHING_STRATEGY.items():
        some = [problem for problem in problems if problem.kind == kind]
        for strategy in WRITTEN if some else ():
            name = f"{strategy} for {kind}" + " (matches)" * (strategy == matching)
            losses[name] = loss(some, strategy)
    return losses


def log_probs(model, batch: Packed) -> Tensor:
    """Return the log-probs of the whole vocabulary (M, V) at each response token."""
    hidden = model(batch.tokens, batch.positions, packed_attention(batch, model))
    return model.logits(hidden[batch.logit_indices]).log_softmax(-1)


def kl_per_token(before, model, tokenizer, flags: SftConfig, task, problems: list) -> float:
    """Return the mean of KL(model, before) over the tokens of the model's own responses."""
    limits = (model.config.max_position_embeddings, flags.max_new_tokens, problems)
    sampler = Sampler(model, tokenizer.stops, 1, tokenizer.max_response_tokens(task, *limits))
    keys = [(flags.seed, "forgetting", i) for i in range(len(problems))]
    rollout, total = sampler.sample([tokenizer.prompt(x) for x in problems], keys), 0.0
    for groups in torch.arange(len(problems), device=model.device).split(4):  # few logits at a time
        batch, *_ = rollout.pack(groups)
        both = log_probs(before, batch), log_probs(model, batch)
        total += F.kl_div(*both, reduction="sum", log_target=True).item()
    return total / int(rollout.lengths.sum())


def answers(model, tokenizer) -> dict[str, str]:
    """Return the greedy answers by question, with dots where the token limit cut one off."""
    plain = {"explanation": "", "system": "", "prefix": ""}
    asked = [SimpleNamespace(prompt=lambda q=q: q, **plain) for q in QUESTIONS]
    sampler = Sampler(model, tokenizer.stops, 1, 40, temperature=0)
    rollout = sampler.sample([*map(tokenizer.prompt, asked)], [(i,) for i in range(len(asked))])
    texts = zip(tokenizer.decode(rollout.response_tokens()), rollout.stopped.tolist())
    return {q: text + "..." * (not stopped) for q, (text, stopped) in zip(QUESTIONS, texts)}


def tables(models: list[dict]) -> str:
    """Return what was measured of each model, and its answers, as Markdown."""
    head = ["", *({"sft": "SFT", "grpo": "RL"}.get(model["stage"], "start") for model in models)]
    rows = [[f"loss: {x}", *(f"{m['losses'][x]:.3f}" for m in models)] for x in models[0]["losses"]]
    kls = [f"{model['kl']:.4f}" if "kl" in model else "" for model in models]
    text = markdown(head, [*rows, ["KL from the model before", *kls]])
    rows = [[q, *(" ".join(m["answers"][q].split()) for m in models)] for q in models[0]["answers"]]
    rows = [[printable(cell).replace("|", "\\|") for cell in row] for row in rows]
    return text + (f"\n\n{markdown(head, rows)}" if rows else "")


@torch.no_grad()
def main(config: ForgettingConfig, world: World) -> None:
    require_min(config, problems=1)
    require_writable(config.json, "")
    chain = find_chain(config.runs)
    metas, models, before = [*map(load_meta, chain)], [], None
    own_data = any(meta.get("data") for meta in metas)
    require(not own_data, "this compares models on the paper's task, not on --data")
    known = next((meta for meta in reversed(metas) if meta.get("stage") == "sft"), {})
    require(bool(known), f"there was no SFT among {', '.join(map(str, chain))}: name its run, too")
    flags = SftConfig(**{x.name: known[x.name] for x in fields(SftConfig) if x.name in known})
    task, problems = load_problems(flags, config.problems)
    for path, meta in zip(chain, metas):
        template = not metas[-1].get("no_chat_template")
        model, tokenizer = load_model(path, world.device, chat_template=template)
        what = (tokenizer, flags, task, problems)
        models.append({"checkpoint": str(path), "stage": meta.get("stage")})
        models[-1]["losses"] = solution_losses(model, *what)
        models[-1]["answers"] = {} if tokenizer.word_level else answers(model, tokenizer)
        if before:
            models[-1]["kl"] = kl_per_token(before, model, *what)
        before = model
    if config.json:
        with user_errors():
            write_json(Path(config.json), models)
    print(f"{' -> '.join(map(str, chain))}\n\n{tables(models)}")


if __name__ == "__main__":
    config = parse_flags(ForgettingConfig, __doc__, positional="runs")
    with distributed() as world:
        main(config, world)
