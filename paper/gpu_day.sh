#!/usr/bin/env bash
# Find out on a GPU what this project claims of one: 25 minutes at most, without network.
#
#     paper/gpu_day.sh [FOLDER]              # [ckpt/gpu_day]
#     paper/gpu_day.sh --rehearse [FOLDER]   # the same at tiny sizes, on a GPU that is pretended
#
# Give it a new folder. It runs the GPU's tests, times rollouts and training beside transformers,
# compares one process with two where there are two cards, and takes SmolLM2 through SFT and RL where
# models/smollm2 is there (python -m data.smollm2 models/smollm2). A command has at most 9 minutes and
# its output lies in FOLDER/NAME.log. FOLDER/page.md says what each showed, and which sentences of the
# READMEs that changes.
set -uo pipefail
cd "$(dirname "$0")/.."

rehearsal=""
if [ "${1:-}" = --rehearse ]; then
    rehearsal="-m paper.pretend" && shift
fi
out="${1:-ckpt/gpu_day}"
mkdir -p "$(dirname "$out")" && mkdir "$out" || exit 2  # an older day is not overwritten
page="$out/page.md"

step() { # NAME, what it shows if it passes, and a command of python's
    local name="$1" shows="$2" left=$((1500 - SECONDS)) start=$SECONDS
    shift 2
    local limit=$((left < 540 ? left : 540)) status="not started: the 25 minutes are over"
    if [ "$limit" -gt 0 ]; then
        # SIGTERM lets a training save what it has.
        timeout --kill-after=20 "$limit" python $rehearsal "$@" >"$out/$name.log" 2>&1
        status=$?
    fi
    [ "$status" = 0 ] && status=passed
    [ "$status" = 124 ] && status="stopped after $limit s"
    echo "| $name | $status | $((SECONDS - start)) | $shows | \`python $*\` |" | tee -a "$page"
}

{
    echo "# A day on a GPU${rehearsal:+: a rehearsal, on no GPU}"
    echo
    python $rehearsal -c 'import torch; print(torch.cuda.get_device_name(), "torch", torch.__version__)'
    python -c 'import flash_attn; print("flash-attn", flash_attn.__version__)' 2>/dev/null || echo "no flash-attn"
    echo "commit $(git rev-parse --short HEAD 2>/dev/null)"
    echo
    echo "| step | result | s | if it passed | command |"
    echo "| --- | --- | ---: | --- | --- |"
} | tee "$page"

small=() sft=(--epochs 4 --lr 1e-3) rl=(--updates 60 --lr 2e-4) model=models/smollm2 eval=(--problems 128)
if [ -n "$rehearsal" ]; then
    small=(--small --rounds 1) model=tiny eval=(--problems 2 --samples 1)
    sft=(--updates 2 --batch-size 4) rl=(--updates 2 --prompts-per-update 2 --group-size 2 --eval-problems 2)
fi
cards=$(python $rehearsal -c 'import torch; print(torch.cuda.device_count())')

step tests "README.md's \"Nothing has been run on a GPU yet\" goes" -m pytest -q -m gpu tests/test_gpu.py
step bench "paper/README.md takes these rows" -m paper.bench --json "$out/bench.json" "${small[@]}"
if [ -d "$model" ] || [ -n "$rehearsal" ]; then
    for name in FB F; do
        strategy=$([ $name = FB ] && echo mixed || echo forward)
        step "sft-$name" "SmolLM2 learns to solve" \
            train_sft.py --model $model --strategy $strategy "${sft[@]}" --out "$out/sft-$name"
        step "rl-$name" "table 1's row of SmolLM2 $name" \
            train_grpo.py --init "$out/sft-$name" "${rl[@]}" --out "$out/rl-$name"
        step "eval-$name" "its numbers" \
            eval.py "$out/sft-$name" "$out/rl-$name" "${eval[@]}" --json "$out/eval-$name.json"
    done
    if [ "$cards" -gt 1 ]; then
        for n in 1 2; do
            step "processes-$n" "one process beside two: NCCL works; compare the logs' speeds" \
                -m torch.distributed.run --nproc-per-node $n train_grpo.py --init "$out/sft-FB" \
                "${rl[@]}" --updates 10 --out "$out/processes-$n"
        done
    fi
fi
echo "Where no step failed, \"none of it has run on a GPU\" goes from paper/README.md, too." >>"$page"
! grep -E '^\| [a-zA-Z0-9-]+ \| [0-9]+ \|' "$page" >/dev/null  # an exit status: something failed
