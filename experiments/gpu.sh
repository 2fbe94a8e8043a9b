#!/usr/bin/env bash
# Tests and measurements that need a GPU. Each part takes less than 8 minutes, and needs no other part.
#
#   experiments/gpu.sh OUT correct    all tests, large pools against float64, a memory checker, NCCL, training
#   experiments/gpu.sh OUT fast       the speed of the kernels, a step of the pool, and the models; a profile
#   experiments/gpu.sh OUT evidence   the experiments facts-large and code, see evidence.sh
#
# OUT is a folder for the results: the log of each command, and numbers as JSON lines. Without a GPU, a part
# does a small version of what a CPU can do, and says what it skipped. All tests take longer there.

set -u
cd "$(dirname "$0")/.."
[ $# -eq 2 ] || { sed -n '2,9s/^# \{0,1\}//p' experiments/gpu.sh; exit 2; }
mkdir -p "$1"
OUT=$(cd "$1" && pwd)
PART=$2
export PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
GPU=$($PYTHON -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")')
FAILED=0

run() {  # run NAME SECONDS COMMAND...: runs the command with a time limit. Its output goes to OUT/NAME.txt
    local name=$1 limit=$2 begin=$SECONDS
    shift 2
    if timeout -k 10 "$limit" "$@" > "$OUT/$name.txt" 2>&1; then
        echo "$name: passed, $((SECONDS - begin)) s"
    else
        echo "$name: FAILED with status $?, $((SECONDS - begin)) s. The end of $OUT/$name.txt:"
        tail -n 5 "$OUT/$name.txt"
        FAILED=1
    fi
}

skip() { echo "$1: skipped, $2"; }

correct() {
    local parallel="" device="cpu" size="--people=200 --exposures=40"
    $PYTHON -c 'import xdist' 2> /dev/null && parallel="-n $(($(nproc) > 4 ? $(nproc) - 4 : 1))"
    [ "$GPU" ] && device="cuda"
    run large_pools 160 $PYTHON -m pytest tests/test_gpu.py -m "slow or not slow" -v -rf --tb=short
    if [ "$GPU" ] && command -v compute-sanitizer > /dev/null; then
        run memory_checker 90 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode=1 \
            $PYTHON -m pytest tests/test_gpu.py -k "float64 and small"
    else
        skip memory_checker "it needs a GPU and compute-sanitizer"
    fi

    # another corpus, so your data/facts does not change
    run facts 60 $PYTHON -m data.prepare facts --name=gpu-facts $size
    local train="train.py --dataset=gpu-facts --device=$device --eval_interval=30 --warmup_steps=10 --keep=1"
    [ "$GPU" ] && train="$train --mem_dtype=bfloat16 --value_stochastic_rounding --mem_num_keys=256"
    rm -rf "$OUT"/run_*
    run torchrun 90 $PYTHON -m torch.distributed.run --nproc_per_node=1 $train --max_steps=30 \
        --out_dir="$OUT/run_torchrun"
    for options in "" "--compile"; do
        [ "$options" ] && [ ! "$GPU" ] && { skip compile "too slow without a GPU"; continue; }
        local name=train$(echo $options | tr -d -)
        run $name 100 $PYTHON $train $options --max_steps=30 --out_dir="$OUT/run_$name"
        run ${name}_resumed 100 $PYTHON $train $options --max_steps=60 --out_dir="$OUT/run_$name" --resume
    done
    rm -rf data/gpu-facts "$OUT"/run_*
    run tests $([ "$GPU" ] && echo 240 || echo 1200) $PYTHON -m pytest $parallel -o addopts="-m 'not slow'" -v -rf --tb=short
    grep -a "^FAILED" "$OUT/tests.txt" | sort -u
}

fast() {
    local repeats=9 gpt2_repeats=3  # a model is measured three times as often
    local gpt2="--n_layer=12 --mem_layers=3,6,9 --mem_dtype=bfloat16 --n_head=12 --n_embd=768
        --vocab_size=50304 --block_size=1024 --batch_size=16 --mem_num_keys=1024 --mem_key_dim=256"
    [ "$GPU" ] || { repeats=1; gpt2_repeats=1; gpt2="--n_layer=12 --mem_layers=3,6,9 --mem_dtype=bfloat16"; }
    run operations 100 $PYTHON -m experiments.speed operations --repeats=$repeats \
        --json="$OUT/operations.jsonl"
    if [ "$GPU" ]; then
        run step 150 $PYTHON -m experiments.speed step --json="$OUT/step.jsonl"
        for dtype in float32 bfloat16; do  # goal: 6 times as fast as embedding_bag + AdamW
            run step_1024_$dtype 60 $PYTHON -m experiments.speed step --value_dim=1024 --dtype=$dtype \
                --rows=1048576 --reads=uniform --tokens=2048,4096 --json="$OUT/step_1024_$dtype.jsonl"
        done
    else
        skip "step at full size" "no GPU"
        run step 100 $PYTHON -m experiments.speed step --rows=65536 --tokens=512 --repeats=$repeats \
            --json="$OUT/step.jsonl"
    fi
    run gpt2 60 $PYTHON -m experiments.speed model --models=dense,memory+ --repeats=$gpt2_repeats $gpt2 \
        --json="$OUT/gpt2.jsonl"
    run model 150 $PYTHON -m experiments.speed model --repeats=$repeats --json="$OUT/model.jsonl"
    [ "$GPU" ] || { skip compiled "too slow without a GPU"; return; }
    run compiled 150 $PYTHON -m experiments.speed model --models memory+ --compile --repeats=$repeats \
        --json="$OUT/compiled.jsonl"
    grep -h "of a copy\|copies run\|times as fast\|times dense" "$OUT"/{operations,step*,gpt2,model,compiled}.txt
}

evidence() {
    if [ "$GPU" ]; then
        run evidence 470 bash experiments/evidence.sh "$OUT/evidence" 450
    else
        skip evidence "no GPU"
    fi
}

echo "$PART on ${GPU:-a CPU (commands that need a GPU are skipped)}"
case $PART in
    correct | fast | evidence) $PART ;;
    *) echo "error: the parts are correct, fast and evidence"; exit 2 ;;
esac
exit $FAILED
