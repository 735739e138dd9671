"""Run test_pretended_gpu.py's faults and cases; print a name and a complaint for each, as JSON."""

import pretend  # isort: skip (before torch)

import collections
import copy
import functools
import gc
import json
import os
import shutil
import sys
import tempfile
import traceback
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from conftest import small_model, with_large_biases
from test_pretended_gpu import CASES, FAULTS, KEPT, NO_FAULTS, ROOT, SHORT

import lib.attention
import lib.fused
import rollout
from lib.distributed import World
from lib.lora import add_lora, without_adapters
from lib.memory import activation_bytes, keys_per_token
from lib.packing import pack, response_logps
from lib.policy import DTYPES, cast_matmuls, make_policy, trainable_parameters
from lib.training import optimizer_step
from rollout import Rollout, Sampler
from train_grpo import GrpoConfig, group_advantages, grpo_backward

CPU, GPU = torch.device("cpu"), pretend.GPU
PROMPTS = [[3, 4, 5, 6, 7], [8], [9, 10, 11], [12, 13], [14, 15, 16, 17]]
KEYS = [(i,) for i in range(len(PROMPTS))]
rollout.BLOCK = 16  # tokens are sampled as from a large vocabulary
STOPS = [1, 4, 9, 13, 22]  # of 45 tokens: groups end at different steps
G = 2


def use_flash(on: bool) -> None:
    """Have flash-attn or not, as where it is installed or not."""
    for name in ("flash_attn_varlen_func", "flash_attn_with_kvcache"):
        setattr(lib.attention, name, getattr(pretend, name) if on else None)


def make_run(case: str, device: torch.device) -> SimpleNamespace:
    """Return what an update needs, as lib.training.load_run does."""
    _, precision, trained, family, *short = case.split()
    config = GrpoConfig(temperature=1.0, beta=0.05, lora=4 * (trained != "whole"))
    config.lora_dropout = 0.1 * (trained == "dropout")
    config.micro_batch_tokens = 100 * bool(config.lora)  # several micro-batches, or the default
    shape = {"num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 16} if short else {}
    master = small_model(hidden_size=64, model_type=family, **shape)
    if family == "qwen2":
        master = with_large_biases(master, 30.0 if precision == "bf16" else 10.0)
    master = master.to(device)
    if config.lora:
        master = cast_matmuls(master, DTYPES[precision])
        generator = torch.Generator().manual_seed(0)
        master = add_lora(master, config.lora, 8, config.lora_dropout, generator)
    policy = make_policy(master, precision)
    run = SimpleNamespace(config=config, master=master, policy=policy, nonfinite=0, folder="")
    run.reference = without_adapters(master) if config.lora else copy.deepcopy(policy)
    weights = trainable_parameters(master)
    run.optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return run


def two_updates(case: str, device: torch.device, rollouts: list[dict] = ()) -> dict:
    """Take two updates, on these rollouts or on its own; return what they gave, on the CPU."""
    run, world, short = make_run(case, device), World(0, 1, device), "tokens" in case
    sampler = Sampler(run.policy, STOPS, G, int(case.split()[4]) if short else 20)
    weights, out = trainable_parameters(run.master), collections.defaultdict(list)
    for step in range(2):
        if rollouts:
            sampled = Rollout(**rollouts[step])
        else:
            prompts = [row + [20] * (step * i % 3) for i, row in enumerate(PROMPTS)]
            sampled = sampler.sample(prompts, [(step, *key) for key in KEYS])
            rows = torch.arange(len(sampled.tokens), device=device)
            sampled.rewards = (rows % G * (rows < 8)).float().view(-1, G)  # the last: no signal
            sampled.advantages = group_advantages(sampled.rewards)
        metrics = grpo_backward(run, sampled, torch.arange(len(PROMPTS)), step, world)
        out["gradients"].append(torch.cat([w.grad.flatten() for w in weights]).cpu())
        out["logp_diffs"].append(max(batch["logp_diff_max"] for batch in metrics["batches"]))
        optimizer_step(run, metrics["loss"], 1e-2, world)
        for ours, weight in zip(trainable_parameters(run.policy), weights):
            assert torch.equal(ours, weight.to(ours.dtype)), "the policy is not the master's copy"
        if sampler.use_graphs and not short and step:
            captured = {P for (P, _), graph in sampler.batch.graphs.items() if graph}
            out["sizes"].append(len(captured))
        fields = vars(sampled).items()
        out["rollouts"].append({k: x.cpu() if hasattr(x, "cpu") else x for k, x in fields})
    other = Sampler(run.policy, STOPS, 3, sampler.max_new_tokens)
    longer = [[3] * 40, *PROMPTS[1:3]]  # the cache grows; the two alone take a part of it
    for one, prompts in ((sampler, PROMPTS[1:3]), (sampler, longer), (other, PROMPTS)):
        again = one.sample(prompts, KEYS[: len(prompts)])
        out["rollouts"].append({"tokens": again.tokens.cpu()})
    return dict(out)


def on_the_gpu(case: str) -> dict:
    use_flash(case.startswith("flash"))
    with pretend.gpu:
        return two_updates(case, GPU)


def complaints(case: str, ours: dict, theirs: dict, same_tokens: bool) -> str:
    """Say what is wrong with two updates; "" if nothing is.

    The second gradient follows a step of Adam, which magnifies what is near zero.
    """
    bound = 1e-4 if "fp32" in case else 0.2  # as in test_gpu.py
    diff_bounds = bound, 0.5 if "dropout" in case else bound  # which the sampler does not have
    gradient_bounds = (1e-4, 1e-3) if same_tokens else (0.05,)
    wrong = []
    for x, y, most in zip(ours["gradients"], theirs["gradients"], gradient_bounds):
        difference = float((x - y).norm() / y.norm())
        wrong += [f"gradients differ by {difference:.1e}"] * (not difference < most)
    for difference, most in zip(ours["logp_diffs"], diff_bounds):
        wrong += [f"sampler and trainer differ by {difference:.1e}"] * (not difference < most)
    wrong += ["no groups have left while steps were replayed"] * any(
        n < 2 for n in ours.get("sizes", ())
    )
    for i, (x, y) in enumerate(zip(ours["rollouts"], theirs["rollouts"])):
        if same_tokens and not torch.equal(x["tokens"], y["tokens"]):
            wrong.append(f"tokens {i} differ")
    return "; ".join(wrong)


def compare(case: str) -> str:
    """Compare the pretended GPU with the CPU."""
    ours = on_the_gpu(case)
    use_flash(False)
    same_tokens = "fp32" in case
    theirs = two_updates(case, CPU, () if same_tokens else ours["rollouts"])
    return complaints(case, ours, theirs, same_tokens)


def waits(T: int) -> int:
    """Count what waits for the device while responses of T tokens are sampled from graphs."""
    use_flash(False)
    with pretend.gpu:
        sampler = Sampler(make_run(CASES[0], GPU).policy, [], G, T)
        for _ in range(2):
            pretend.gpu.syncs.clear()
            sampler.sample(PROMPTS, KEYS)
    return pretend.gpu.syncs.total()


class Region(torch.autograd.Function):
    """Stand in for a compiled function: keep its inputs alone until the backward pass."""

    @staticmethod
    def forward(ctx, function, *args):
        ctx.save_for_backward(*(x for x in args if isinstance(x, torch.Tensor)))
        return function(*args)


def kept_per_token(case: str, layers: int) -> tuple[float, int]:
    """Return the bytes of a token that are kept for the backward pass, and those planned."""
    lora, again = 8 * ("lora" in case), "checkpointing" in case
    shape = {"hidden_size": 256, "intermediate_size": 1024, "head_dim": 64}
    master = small_model(num_hidden_layers=layers, **shape)
    if lora:
        generator = torch.Generator().manual_seed(0)
        master = add_lora(cast_matmuls(master, torch.bfloat16), lora, 8, 0.1, generator)
    with pretend.gpu:
        policy = make_policy(master.to(GPU), "bf16")
        policy.gradient_checkpointing = again
        prompts = torch.arange(32, device=GPU).view(2, 16) % 20
        responses = torch.arange(256, device=GPU).view(8, 32) % 20
        lengths = [torch.full((n,), T, device=GPU) for n, T in ((2, 16), (8, 32))]
        rows = prompts, lengths[0], responses, lengths[1]
        batch = pack(*rows, torch.arange(8, device=GPU) // 4)
        response_logps(policy, batch, dropout_key=0)  # so that what it caches is there
        before = set(pretend.MEMORY)
        logps, _ = response_logps(policy, batch, dropout_key=0)
        gc.collect()
        kept = sum(n for storage, n in pretend.MEMORY.items() if storage not in before)
        del logps  # with what its backward pass needs
        keys = keys_per_token(lengths[0], lengths[1].view(2, 4))
    planned = activation_bytes(policy.config, lora, lora > 0, again, keys)
    return kept / len(batch.tokens), planned


def compare_memory(case: str) -> str:
    """Compare what a layer keeps with what is planned; a compiled function keeps its inputs."""
    compiled = {"has_triton": lambda: True}
    compiled["compiled"] = lambda function, *_: functools.partial(Region.apply, function)
    with mock.patch.multiple(lib.fused, **compiled):
        (kept, planned), (kept_by_two, planned_by_two) = (kept_per_token(case, n) for n in (1, 2))
    kept, planned = kept_by_two - kept, planned_by_two - planned
    return "" if abs(kept / planned - 1) < 0.01 else f"{kept:.0f} bytes kept, {planned} planned"


def tell(name: str, function, *args) -> None:
    """Print what the function complains of, or the error it raises."""
    try:
        complaint = function(*args)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if "/torch/" not in f.filename and f.filename != pretend.__file__]
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
        complaint = f"{where}: {type(error).__name__}: {error}"
    print(json.dumps([name, complaint]), flush=True)


def run_copy(code: Path, case: str, expected: Path) -> str:
    """Run a case with a copy of the code; compare it with what the first such run gave."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        stays = name in ("pretend", "no_cuda", "__main__")
        if file.startswith(str(ROOT)) and not stays:
            del sys.modules[name]
    sys.path.insert(0, str(code))
    import pretended_gpu

    assert pretended_gpu.lib.attention.__file__.startswith(str(code))
    ours = pretended_gpu.on_the_gpu(case)
    if not expected.exists():
        torch.save(ours, expected)
    return complaints(case, ours, torch.load(expected), True)


def run_faults() -> None:
    """Run each fault in a fork of this process, which has imported all that they need."""
    import torch._dynamo  # here, or each fork would
    import torch.nn.attention.varlen  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        for i, (name, (case, file, old, new, _)) in enumerate((NO_FAULTS | FAULTS).items()):
            code = Path(folder) / str(i)
            code.mkdir()
            shutil.copytree(ROOT / "lib", code / "lib")
            for script in ROOT.glob("*.py"):
                shutil.copy2(script, code)
            text = (code / file).read_text()
            (code / file).write_text(text.replace(old, new))
            if (child := os.fork()) == 0:
                tell(name, run_copy, code, case, Path(folder) / f"{case}.pt")
                os._exit(0)
            os.waitpid(child, 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.backends.mkldnn.enabled = False  # it compiles each shape of a product in 16 bits
    pretend.start()
    if sys.argv[1] == "faults":  # alone: a process whose autograd has run cannot be forked
        run_faults()
    else:
        for case in (*CASES, *SHORT):
            tell(case, compare, case)
        for case in KEPT:
            tell(case, compare_memory, case)
        tell("16 steps more", lambda: f"{waits(33) - waits(17)} waits more")
