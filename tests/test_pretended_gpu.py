"""The GPU's path without a GPU: updates on pretend.py's, against those on the CPU.

They run in processes of their own (pretended_gpu.py), since a CUDA of no-ops loads before torch.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import no_cuda
import pytest
from conftest import printed_by

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(bool(no_cuda.why_not()), reason=no_cuda.why_not())

# How a step decodes, in which precision; what is trained; the family. Each pair occurs.
FAMILIES = ("qwen2", "qwen3", "llama")
CASES = [
    f"{decode} {trained} {FAMILIES[(i + j) % 3]}"
    for i, decode in enumerate(("matmul fp32", "matmul bf16", "flash bf16"))
    for j, trained in enumerate(("whole", "lora", "dropout"))
]
SHORT = [f"flash bf16 whole llama {T} tokens" for T in (2, 3, 5)]  # 6 heads on 1 key head

KEPT = [f"memory: {x}" for x in ("whole", "whole checkpointing", "lora", "lora checkpointing")]

FP32, VARLEN = "matmul fp32 lora qwen3", "matmul bf16 whole qwen2"
FLASH = "flash bf16 dropout qwen3"
NEXT = "self.cache.t += 1  # in place"
WINDOW = "(t // quarter + 1) * quarter)"
KEEP = "self.prompt_lengths[: self.P] = self.prompt_lengths[groups]"
KEEP_NEW = "x = self.prompt_lengths; self.prompt_lengths = torch.cat((x[groups], x[self.P :]))"
KV_INT32 = "self.prompt_lengths[: self.P].int()"
CU_INT32 = "F.pad(n_keys.cumsum(0), (1, 0)).int()"
LONGEST = "max_seqlens = max(2, int(batch.lengths.max())), int(n_keys.max())"
SPLIT = "split_heads(qkv, rope, config)\n        k, v = k.index"
SPLIT_FP32 = SPLIT.replace(")", ", torch.float32)", 1)
SIZES = "torch.tensor([len(row) for row in rows], device=device)"
STALE = "mark_stale(policy)"
SYNC = "torch._foreach_copy_(list(mine), list(weights))"
SAMPLER, ATTENTION, LORA = "rollout.py", "lib/attention.py", "lib/lora.py"
POLICY, PACKING, FUSED = "lib/policy.py", "lib/packing.py", "lib/fused.py"
FOR_SCORES = "(q, k, out_dtype=torch.float32)"
WAITS, MIXED, TOKENS = "while a graph is captured", "must be on one device", "tokens 0 differ"
FAULTS = {  # name: the case that shows it, the file, a text in it, its replacement, the complaint
    "a step waits": (FP32, SAMPLER, NEXT, f"int(self.cache.t); {NEXT}", WAITS),
    "a step takes a mask": (FP32, SAMPLER, NEXT, f"hidden[hidden > 0]; {NEXT}", WAITS),
    "stop tokens on the CPU": (FP32, SAMPLER, "long, device=model.device", "long", MIXED),
    "uniforms on the CPU": (FP32, SAMPLER, "cat(uniforms).to(device)", "cat(uniforms)", MIXED),
    "a step counts on the host": (FP32, SAMPLER, "+ self.cache.t  #", "+ t  #", TOKENS),
    "tokens in a new tensor": (FP32, SAMPLER, "last_tokens[:B] =", "last_tokens =", TOKENS),
    "lengths in a new tensor": (FP32, ATTENTION, KEEP, KEEP_NEW, "tokens"),
    "a window too small": (FP32, ATTENTION, WINDOW, WINDOW.replace("1", "(t < 16)"), TOKENS),
    "graphs without window": (FP32, SAMPLER, "key = self.P, window", "key = self.P, 0", TOKENS),
    "graphs without groups": (FP32, SAMPLER, "key = self.P,", "key = 0,", "tokens 1 differ"),
    "no replay": (FP32, SAMPLER, "pool()  # graphs", "pool(); return  #", TOKENS),
    "dropout on the CPU": (FLASH, LORA, ", device=x.device) >=", ") >=", "another device"),
    "policy not synced": (FLASH, POLICY, SYNC, "pass", "not the master's copy"),
    "adapters not refreshed": (FP32, POLICY, STALE, "pass", "tokens 1 differ"),
    "adapters in a new tensor": (FP32, LORA, "self.block.copy_(block)", "block", "tokens 1 differ"),
    "no gradient of the head": (VARLEN, FUSED, "if ctx.", "if 0 and ctx.", "gradients"),
    "int64 for the cache": (FLASH, ATTENTION, KV_INT32, KV_INT32[:-6], "cache_seqlens"),
    "strided lengths": (FLASH, ATTENTION, ".expand(B).contiguous()", ".expand(B)", "cache_seqlens"),
    "int64 for varlen": (VARLEN, ATTENTION, CU_INT32, CU_INT32[:-6], "cu_seqlens"),
    "no Python ints": (FLASH, ATTENTION, LONGEST, LONGEST.replace("int(n", "(n"), "max_seqlens"),
    "fp32 for varlen": (VARLEN, ATTENTION, SPLIT, SPLIT_FP32, "float32"),
    "padded lengths on the CPU": (VARLEN, PACKING, SIZES, SIZES[:-16] + ")", MIXED),
    "scores in 16 bits": (VARLEN, ATTENTION, FOR_SCORES, "(q, k)", "trainer"),
}
NO_FAULTS = {f"none: {case}": (case, SAMPLER, "", "", "") for case in (FP32, VARLEN, FLASH)}


def python(command: str) -> str:
    """Run Python with this command line; return what it prints."""
    command, env = [sys.executable, *command.split()], os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def complaints() -> dict[str, str]:
    """Return what is wrong with each case and fault, "" where nothing is."""
    return dict(map(json.loads, printed_by("complaints").splitlines()))


@pytest.mark.parametrize("case", CASES)
def test_updates_equal_the_cpus(complaints, case):
    """Sampling, reference, gradient, optimizer; again with the new weights; a second sampler.

    In fp32 tokens are the same. In bf16 the CPU trains on the GPU's tokens.
    """
    assert complaints[case] == ""


@pytest.mark.parametrize("case", SHORT)
def test_short_responses_by_flash(complaints, case):
    """Its check counts the heads that share a key head as queries: no more than the cache has."""
    assert complaints[case] == ""


@pytest.mark.parametrize("case", KEPT)
def test_a_layer_keeps_the_memory_that_is_planned(complaints, case):
    assert complaints[case] == ""


def test_only_every_fourth_step_waits_for_the_device(complaints):
    assert complaints["16 steps more"] == "4 waits more"


@pytest.mark.parametrize("case", NO_FAULTS)
def test_a_copy_without_fault_passes(complaints, case):
    assert complaints[case] == ""


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_noticed(complaints, fault):
    _, file, text, _, expected = FAULTS[fault]
    assert text in (ROOT / file).read_text(), f"{file} has no {text!r} any more: adapt FAULTS"
    assert expected in complaints[fault]


@pytest.mark.slow
def test_the_scripts_log_what_they_log_on_the_cpu(tmp_path):
    """In fp32, to rounding; the second update after --resume."""
    task, sft = "--field 3 --steps 1-2 --precision fp32", tmp_path / "sft"
    python(f"train_sft.py {task} --updates 100 --batch-size 24 --out {sft}")
    flags = f"{task} --init {sft} --prompts-per-update 4 --group-size 4 --eval-problems 8"
    flags += " --updates 2 --save-every 1 --eval-every 1 --beta 0.05"
    rows = {}
    for device, where in ("cuda", "tests/pretend.py"), ("cpu", ""):
        out = tmp_path / device
        printed = python(f"{where} train_grpo.py {flags} --out {out}")
        assert f"Computing on {device} in fp32" in printed
        shutil.rmtree(out / "step-2")
        python(f"{where} train_grpo.py {flags} --out {out} --resume")
        python(f"{where} eval.py {out}")
        rows[device] = list(map(json.loads, (out / "metrics.jsonl").read_text().splitlines()))
    for gpu, cpu in zip(rows["cuda"], rows["cpu"], strict=True):
        assert cpu["grad_norm"] > 0 and gpu["response_length"] == cpu["response_length"]
        for name in ("loss", "grad_norm", "entropy", "reward"):
            assert gpu[name] == pytest.approx(cpu[name], rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_the_tests_for_a_gpu_can_be_rehearsed():
    for flash in ("", "--flash"):
        out = python(f"tests/pretend.py {flash} pytest -q -m gpu tests/test_gpu.py")
        assert " passed" in out and ("skipped" in out) == (not flash)
