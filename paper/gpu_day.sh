#!/usr/bin/env bash
# Find out on a GPU what this project claims of one: 25 minutes at most, without network.
#
#     paper/gpu_day.sh [FOLDER]              # [ckpt/gpu_day]
#     paper/gpu_day.sh --rehearse [FOLDER]   # the same at tiny sizes, on a pretended GPU
#
# It runs the tests for a GPU, times rollouts and training beside transformers and takes SmolLM2
# through SFT, and RL on 2-5 and on 6-9 steps (paper/README.md, "Select and improve"), if it is in
# models/smollm2 (python -m data.smollm2 models/smollm2). Where there are two cards it compares one
# process with two. A command has 9 minutes at most; its output lies in FOLDER/NAME.log.
# FOLDER/page.md says what has passed, and what that changes in the READMEs.
set -uo pipefail
cd "$(dirname "$0")/.."

rehearse=""
[ "${1:-}" = --rehearse ] && rehearse=yes && shift
out="${1:-ckpt/gpu_day}" failed=0 cards=$(python -c 'import torch; print(torch.cuda.device_count())')
[ "$cards" -gt 0 ] || [ -n "$rehearse" ] || { echo "there is no GPU: give --rehearse" >&2 && exit 2; }
mkdir -p "$(dirname "$out")" && mkdir "$out" || exit 2  # an older day is not overwritten

write() { echo "$@" | tee -a "$out/page.md"; }

step() { # NAME, what it changes if it passes, and a command of Python's
    local name=$1 changes=$2 left=$((1500 - SECONDS)) start=$SECONDS result=passed
    shift 2
    local limit=$((left < 540 ? left : 540)) command=(python "$@")
    if [ -n "$rehearse" ]; then
        [ "$1" = -m ] && shift
        command=(env PYTHONPATH=. python tests/pretend.py "$@")
    fi
    if [ $limit -le 0 ]; then
        result="not started: the time is over" failed=1
    elif ! timeout --kill-after=30 $limit "${command[@]}" >"$out/$name.log" 2>&1; then
        result="failed, or stopped after $limit s" failed=1
    fi
    write "| $name | $result | $((SECONDS - start)) | $changes | \`${command[*]}\` |"
}

small=() sft=(--model models/smollm2 --laptop --epochs 5) problems=(--temperature 0.7)
rl=(--laptop --prompts-per-update 32 --beta 0.05 --updates 80 --save-every 10 --keep 0) at=/step-50
few=(--updates 10 --save-every 5)
if [ -n "$rehearse" ]; then
    small=(--small --rounds 1) sft=(--updates 2 --batch-size 4) problems=(--problems 2 --samples 1)
    rl=(--updates 2 --prompts-per-update 2 --group-size 2 --eval-problems 2) few=(--save-every 1) at=
fi

write "# A day on a GPU${rehearse:+, rehearsed on none}"
write
write "$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null || echo no card)"
write "$(python -c 'import torch; print("torch", torch.__version__)'), commit $(git rev-parse --short HEAD)"
write "$(python -c 'import flash_attn; print("flash-attn", flash_attn.__version__)' 2>/dev/null || echo no flash-attn)"
write
write "| step | result | s | if it passed | command |"
write "| --- | --- | ---: | --- | --- |"
step tests 'paper/SPEED.md names the card, and the tests that passed' -m pytest -q -m gpu tests/test_gpu.py
step bench "paper/SPEED.md takes bench.json's rows" -m paper.bench --json "$out/bench.json" "${small[@]}"
if [ -d models/smollm2 ] || [ -n "$rehearse" ]; then
    step sft "" train_sft.py "${sft[@]}" --out "$out/sft"
    for difficulty in easy hard; do
        step $difficulty "" train_grpo.py --init "$out/sft" "${rl[@]}" --difficulty $difficulty \
            --out "$out/$difficulty"
        step eval-$difficulty 'a run more of "Select and improve"' \
            eval.py "$out/sft" "$out/$difficulty$at" "${problems[@]}" --json "$out/$difficulty.json"
    done
    part=(--init "$out/sft" "${rl[@]}" "${few[@]}" --keep 0 --out "$out/part")
    step checkpointing "--gradient-checkpointing has run" train_grpo.py "${part[@]}" --gradient-checkpointing
    rm -rf "$(ls -d "$out"/part/step-* | sort -V | tail -1)"  # so that the next step goes on halfway
    step resume "--resume has run" train_grpo.py "${part[@]}" --resume
    for n in 1 2; do
        [ "$cards" -ge 2 ] && step processes-$n "NCCL has run; compare the logs' speeds" \
            -m torch.distributed.run --nproc-per-node $n train_grpo.py --init "$out/sft" \
            "${rl[@]}" "${few[@]}" --out "$out/processes-$n"
    done
    [ "$cards" -ge 2 ] && step fsdp "--fsdp has run" -m torch.distributed.run --nproc-per-node 2 \
        train_grpo.py --init "$out/sft" "${rl[@]}" "${few[@]}" --lora 0 --fsdp --out "$out/fsdp"
fi
exit $failed
