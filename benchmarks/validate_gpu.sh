#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Tests and measures the operators on the GPU of this machine. Needs no network and installs nothing.
#
#   bash benchmarks/validate_gpu.sh OUTDIR [tests|forward|backward|full|ladder]
#
# Without a stage all run in turn, each for at most nine minutes. OUTDIR gets a log and a JUnit or CSV file
# of each. The ladder needs Numba, torchvision and matplotlib too, and is left out without them. The status is
# 0 if all stages passed, 1 if one failed, 2 if there is nothing to run on.
# TORCHPAR_COMMIT names the commit where the checkout has no .git. No setting of the GPU is touched.
set -uo pipefail

stages=(tests forward backward full ladder)
outdir=${1:-}
if [[ -z $outdir || $# -gt 2 || ($# == 2 && " ${stages[*]} " != *" $2 "*) ]]; then
    echo "usage: bash benchmarks/validate_gpu.sh OUTDIR [tests|forward|backward|full|ladder]" >&2
    exit 2
fi
[[ $# == 2 ]] && stages=("$2")
mkdir -p "$outdir" && outdir=$(cd "$outdir" && pwd) && cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH=.

if ! python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "validate_gpu.sh: python3 has no PyTorch that finds a CUDA GPU" >&2
    exit 2
fi

run_stage() {
    case $1 in
        tests)
            timeout -k 10 530 python3 -m pytest -q -p no:cacheprovider --junitxml="$outdir/tests.xml" \
                tests/test_operators*.py tests/test_kernels*.py tests/test_registration.py tests/test_harness.py \
                tests/test_nn.py tests/test_parallel_layers.py tests/test_readme.py
            ;;
        ladder)
            if ! python3 -c 'import matplotlib, numba, rich, torchvision'; then
                echo "left out"
                return 0
            fi
            timeout -k 10 530 python3 -m benchmarks.ladder --output "$outdir"
            ;;
        *)
            timeout -k 10 530 python3 -m benchmarks.operators --device cuda --modes "$1" \
                --csv "$outdir/$1.csv"
            ;;
    esac
}

failed=()
for stage in "${stages[@]}"; do
    log=$outdir/$stage.log
    nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu \
        --format=csv >"$log" 2>&1
    run_stage "$stage" >>"$log" 2>&1
    status=$?
    [[ $status == 0 ]] || failed+=("$stage (status $status)")
    printf '%s: status %s, %s\n' "$stage" "$status" "$(tail -n 1 "$log")"
done

if ((${#failed[@]})); then
    echo "failed: ${failed[*]}"
    exit 1
fi
echo "passed: ${stages[*]}"
