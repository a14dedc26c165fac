#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Tests and measures the operators on the GPU of this machine. Needs no network and installs nothing.
#
#   bash benchmarks/validate_gpu.sh OUTDIR [tests|tune|forward|backward|full|matmul_t|muon|autotune|ladder]
#
# Without a stage all run in turn, each for at most nine minutes. OUTDIR gets a log and a JUnit or CSV file
# of each, and tune's table, which the stages after it read. All but the tests need rich, tune and muon also
# tyro, and the ladder also Numba, torchvision and matplotlib; a stage is left out without what it needs. The
# status is 0 if all stages passed, 1 if one failed, 2 if there is nothing to run on.
# TORCHPAR_COMMIT names the commit where the checkout has no .git. No setting of the GPU is touched.
set -uo pipefail

stages=(tests tune forward backward full matmul_t muon autotune ladder)
outdir=${1:-}
if [[ -z $outdir || $# -gt 2 || ($# == 2 && " ${stages[*]} " != *" $2 "*) ]]; then
    echo "usage: bash benchmarks/validate_gpu.sh OUTDIR [$(IFS="|"; echo "${stages[*]}")]" >&2
    exit 2
fi
[[ $# == 2 ]] && stages=("$2")
mkdir -p "$outdir" && outdir=$(cd "$outdir" && pwd) && cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH=. TORCHPAR_CACHE=$outdir/tuned

if ! python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "validate_gpu.sh: python3 has no PyTorch that finds a CUDA GPU" >&2
    exit 2
fi

has() { # the modules a stage needs
    python3 -c "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]" "$@" && return
    echo "left out"
    return 1
}

run_stage() {
    case $1 in
        tests)
            timeout -k 10 530 python3 -m pytest -q -p no:cacheprovider --junitxml="$outdir/tests.xml" \
                tests/test_operators*.py tests/test_kernels*.py tests/test_registration.py tests/test_harness.py \
                tests/test_nn.py tests/test_parallel_layers.py tests/test_readme.py tests/test_symmetric*.py \
                tests/test_optim.py tests/test_tun*.py tests/test_autotune.py
            ;;
        tune)
            has tyro rich || return 0
            timeout -k 10 530 python3 -m torchpar tune --minutes 8 --output "$outdir/tuned"
            ;;
        muon)
            has tyro rich || return 0
            timeout -k 10 530 python3 -m benchmarks.muon --epochs 0 --output "$outdir"
            ;;
        matmul_t)
            has rich || return 0
            timeout -k 10 530 python3 -m benchmarks.matmul_t --device cuda --csv "$outdir/matmul_t.csv"
            ;;
        autotune)
            has rich || return 0
            timeout -k 10 530 python3 -m benchmarks.autotune --csv "$outdir/autotune.csv"
            ;;
        ladder)
            has matplotlib numba rich torchvision || return 0
            timeout -k 10 530 python3 -m benchmarks.ladder --output "$outdir"
            ;;
        *)
            has rich || return 0
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
