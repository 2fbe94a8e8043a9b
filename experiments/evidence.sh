#!/bin/bash
# Does memory help at a scale that is too large for a laptop? Needs a GPU.
#
#     bash experiments/evidence.sh FOLDER [SECONDS]
#
# Runs two experiments of experiments/compare.py, first facts-large and then code. Four models train at the
# same time. The other models of facts-large are last. SECONDS is the time limit: by default two hours, enough
# for full runs. Each experiment begins with runs of 60 steps, which show how many steps fit into the time.
#
# FOLDER gets the lines of finished runs and the figures. The logs of unfinished runs go to FOLDER/unfinished.
# If you repeat the command, it continues from the checkpoints in out/compare.
python=${PYTHON:-python3}
mkdir -p "$1" && folder=$(realpath "$1") && cd "$(dirname "$0")/.." || exit 2
end=$((SECONDS + ${2:-7200} - 30))  # 30 seconds are for the last checkpoints and figures
first_four=dense,memory+,tokens,hash

compare() {  # compare UNTIL EXPERIMENT OPTIONS: runs an experiment until the second UNTIL of this script
    seconds_left=$(($1 - SECONDS))
    # --foreground: only compare gets the signal, and then it stops its runs
    [ $seconds_left -gt 0 ] && timeout --foreground $seconds_left "$python" -m experiments.compare "${@:2}" \
        --results="$folder" --jobs=4
}

keep_logs() {
    for log in out/compare/{facts-large,code}/*/log.jsonl; do
        [ -e "$log" ] || continue
        name=${log#out/compare/} name=${name%/log.jsonl} name=${name/\//_}  # EXPERIMENT_RUN
        mkdir -p "$folder/unfinished" && cp "$log" "$folder/unfinished/$name.jsonl" &&
            cp "${log%log.jsonl}printed.txt" "$folder/unfinished/$name.txt"
    done
}
trap keep_logs EXIT

steps_that_fit() {  # steps_that_fit EXPERIMENT SECONDS STEPS_OF_A_FULL_RUN
    [ -s "$folder/$1.jsonl" ] && "$python" - "$folder/$1.jsonl" "$2" "$3" << 'END'
import json, sys
path, seconds, full = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
rows = [row for row in map(json.loads, open(path)) if row["curve"]]
steps_per_second = min(row["tokens_per_second"] * row["curve"][-1]["step"] / row["curve"][-1]["tokens"]
                       for row in rows)
print(max(60, min(full, int(0.7 * seconds * steps_per_second))))  # 30% is for start and evaluation
END
}

stage() {  # stage UNTIL EXPERIMENT STEPS_OF_A_FULL_RUN: short runs first, then runs as long as time allows
    compare "$1" "$2" --models=$first_four --max_steps=60
    # a file keeps the number of steps: runs with another number would not continue from the checkpoints
    [ -s "$folder/$2.steps" ] || steps_that_fit "$2" $(($1 - SECONDS)) "$3" > "$folder/$2.steps"
    [ -s "$folder/$2.steps" ] && compare "$1" "$2" --models=$first_four --max_steps="$(< "$folder/$2.steps")"
    keep_logs
    "$python" -m experiments.plots "$folder/$2.jsonl"
}

# make the second corpus while the first models train
[ -e data/code/meta.json ] || "$python" -m data.prepare code > "$folder/prepare.txt" 2>&1 &
stage $((SECONDS + (end - SECONDS) * 3 / 5)) facts-large 4600
wait
stage $end code 1600
[ -s "$folder/facts-large.steps" ] &&
    compare $end facts-large --max_steps="$(< "$folder/facts-large.steps")"
"$python" -m experiments.plots "$folder/facts-large.jsonl"
exit 0
