#!/usr/bin/env bash
# Tests and measurements that need a GPU. Each part needs no other part.
#
#   experiments/gpu.sh OUT correct    all tests, large pools against float64, a memory checker, NCCL, training
#   experiments/gpu.sh OUT fast       the speed of the search, of GPT-2's size with memory and dense, and of the kernels
#   experiments/gpu.sh OUT others     the speed of a layer and of a pool, beside plain PyTorch, and of small models
#   experiments/gpu.sh OUT evidence   the experiments facts-large and code, four minutes each. Repeated, the command
#                                     continues them. STEPS=500 before it gives shorter runs
#
# OUT is a folder for the results: the log of each command, and numbers as JSON lines.

set -u
[ $# -eq 2 ] || { sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2; }
mkdir -p "$1"
OUT=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
FAILED=0

run() {  # run NAME SECONDS COMMAND...: runs the command with a time limit. Its output goes to OUT/NAME.txt
    local name=$1 limit=$2
    shift 2
    timeout --foreground -k 30 "$limit" "$@" > "$OUT/$name.txt" 2>&1 && echo "$name: passed" && return
    echo "$name: FAILED or stopped, status $?. The end of $OUT/$name.txt:"
    tail -n 5 "$OUT/$name.txt"
    FAILED=1
}

correct() {
    run large_pools 160 $PYTHON -m pytest tests/test_gpu.py -m "slow or not slow" -v
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 run memory_checker 90 compute-sanitizer --error-exitcode=1 \
        $PYTHON -m pytest tests/test_gpu.py -k "float64 and small"
    local train="train.py --keep=1 --mem_dtype=bfloat16 --value_stochastic_rounding --mem_num_keys=256"
    rm -rf "$OUT"/run_*
    run torchrun 90 $PYTHON -m torch.distributed.run --nproc_per_node=1 $train --max_steps=30 \
        --out_dir="$OUT/run_torchrun"
    for options in "" --compile; do
        for steps in 30 60; do  # the second run resumes
            run "train$options-$steps" 100 $PYTHON $train $options --max_steps=$steps --resume \
                --out_dir="$OUT/run_$options"
        done
    done
    rm -rf "$OUT"/run_*
    run tests 400 $PYTHON -m pytest
}

fast() {
    local size="--n_layer=12 --mem_layers=3,6,9 --mem_dtype=bfloat16 --n_head=12 --n_embd=768
        --vocab_size=50304 --block_size=1024 --batch_size=16 --mem_num_keys=1024 --mem_key_dim=256"  # of GPT-2
    run search 60 $PYTHON -m experiments.speed search --json="$OUT/search.jsonl"
    for options in "" --compile; do
        run "gpt2$options" 90 $PYTHON -m experiments.speed model --models=dense --repeats=3 $size $options \
            --json="$OUT/gpt2$options.jsonl"
    done
    run operations 60 $PYTHON -m experiments.speed operations --json="$OUT/operations.jsonl"
    grep -h "of a copy\|times as fast\|times dense" "$OUT"/*.txt
}

others() {
    for name in layer step model; do
        run $name 150 $PYTHON -m experiments.speed $name --json="$OUT/$name.jsonl"
    done
    for dtype in float32 bfloat16; do  # goal: 6 times as fast as embedding_bag + AdamW
        run step_1024_$dtype 60 $PYTHON -m experiments.speed step --value_dim=1024 --dtype=$dtype --rows=1048576 \
            --reads=uniform --tokens=2048,4096 --json="$OUT/step_1024_$dtype.jsonl"
    done
    grep -h "times as fast\|times as long\|times dense" "$OUT"/*.txt
}

evidence() {
    for experiment in facts-large code; do
        run $experiment 240 $PYTHON -m experiments.compare $experiment --lrs=2e-3 --seeds=1 --jobs=4 \
            --results="$OUT" --max_steps="${STEPS:-0}"
    done
}

case $2 in
    correct | fast | others | evidence) $2 ;;
    *) echo "error: the parts are correct, fast, others and evidence"; exit 2 ;;
esac
exit $FAILED
