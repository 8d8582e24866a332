#!/usr/bin/env bash
# Everything that has to be measured on a GPU, in at most ten minutes on one card:
#
#   bench/gpu.sh OUT           # on CUDA
#   DEVICE=cpu bench/gpu.sh OUT    # at the smallest sizes, to see that all of it runs
#
# Each step writes OUT/STEP.txt and has a time limit; a step that fails does not stop the others. The exit code is the
# number of steps that failed. Needs the extras bench and report, and CUDA's build of torch; flash-attn is optional.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
out=${1:?name a folder for the results}
device=${DEVICE:-cuda}
python=${PYTHON:-python}
export TQDM_DISABLE=1 HF_HUB_OFFLINE=1 LOCAUDIT_CACHE=off
mkdir -p "$out"
failed=0

step() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2 started=$SECONDS code=0
    shift 2
    timeout "$limit" "$@" >"$out/$name.txt" 2>&1 || code=$?
    [ "$code" -eq 0 ] || failed=$((failed + 1))
    echo "$name: exit code $code, $((SECONDS - started)) s of $limit"
}

if [ "$device" = cpu ]; then
    small=(--smoke --model random-9m) few=2 large=random-9m large_dtype=float32 limit=600
else
    small=(--rounds 1) few=8 large=random-7b large_dtype=bfloat16 limit=0
fi

step equality $((limit + 60)) "$python" -W ignore -m bench.card equality --device "$device" --questions "$few"
step memory $((limit + 60)) "$python" -W ignore -m bench.card memory --device "$device" --questions "$few"
step training $((limit + 90)) "$python" -W ignore -m bench training --peer trl --device "$device" "${small[@]}"
step training_head $((limit + 90)) \
    "$python" -W ignore -m bench training --peer trl --where middle --device "$device" "${small[@]}"
step decoding $((limit + 60)) "$python" -W ignore -m bench generating --peer hook --device "$device" "${small[@]}"
step trial $((limit + 90)) "$python" -W ignore -m bench.card trial --device "$device" --questions "$few" \
    --model "$large" --dtype "$large_dtype"
step paper $((limit + 150)) "$python" -W ignore -m locaudit paper --preset smoke --device "$device" --out "$out/paper"
exit "$failed"
