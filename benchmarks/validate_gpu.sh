#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Tests and measures the operators on the GPU of this machine. Needs no network and installs nothing.
#
#   bash benchmarks/validate_gpu.sh OUTDIR [STAGE ...]
#   STAGE: of `stages` below
#   bash benchmarks/validate_gpu.sh --wheels DIR
#
# Without a stage all but nccl run in turn; none needs the files of another. What matters most comes first: values,
# by Python and by C++, the published hash, calls by both, the rule and the model of times, Muon, graphs, what a
# capture forbids, Nsight's counts, kernels of CUDA C++ and of numba.cuda, and exact products take at most eight
# minutes, the compilation before them included. It fills Triton's cache on all cores but one, and C++ is compiled
# beside it and the values. Later stages may take nine minutes each, so that Ctrl-C ends the script wherever there
# is no more time. A stage that reaches its limit is interrupted, and what it has measured is kept. On an H200 with
# 16 cores the values took under 150 s.
#
# The stage nccl is for a machine with two GPUs or more. It runs if it is named, and takes at most eight minutes.
#
# OUTDIR gets validate.log, {values,by_cpp,cuda_cpp,exact,huge}.xml, and what the benchmarks write into a folder of the
# stage's name; validate.tar.gz has all of it after each stage. The log, the XML and the CSV name the commit, which is
# $TORCHPAR_COMMIT where the checkout has no .git, the versions and the clocks. PYTHONPATH is kept. No setting
# of the GPU is touched.
# The status is 0 if all stages passed, 1 if one failed, 2 if there is nothing to run on.
#
# With --wheels it collects what a machine with torch lacks (CPython 3.12, Linux x86-64) and prints how to
# install it there: all that the stages need, and matplotlib and pandas, which draw.
set -uo pipefail
unset -v CDPATH # with it `cd` prints

stages=(compile values by_cpp verify host rule muon graphs captures counters cuda_cpp exact
    compiled_steps ladder matmul_t linear_sigmoid operators autotune autotune_float32 max_autotune huge)
every="${stages[*]} nccl"
# The most seconds that a stage may take: the first twelve make eight minutes.
declare -A limits=([compile]=30 [values]=85 [by_cpp]=30 [verify]=25 [host]=40 [rule]=50 [muon]=25 [graphs]=60
    [captures]=40 [counters]=50 [cuda_cpp]=25 [exact]=20 [compiled_steps]=60 [ladder]=50 [matmul_t]=60 [nccl]=480)
known() { # whether each argument is a stage
    for one in "$@"; do [[ $one != *" "* && " $every " == *" $one "* ]] || return; done
}
if ! case $#,${1:-} in
    2,--wheels) true ;;
    *,-*) false ;;
    *,?*) known "${@:2}" ;;
    *) false ;;
esac; then
    echo "usage: bash benchmarks/validate_gpu.sh OUTDIR [STAGE ...] | --wheels DIR; STAGE: $every" >&2
    exit 2
fi

if [[ $1 == --wheels ]]; then
    python3 -m pip download --quiet --dest "$2" --only-binary :all: --implementation cp \
        --python-version 3.12 --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 \
        pytest pytest-xdist expecttest rich tyro numba 'numba-cuda[cu13]' matplotlib pandas || exit 1
    du -ch "$2"/*.whl | tail -n 1
    echo "python3 -m pip install --no-index --no-deps --target SITE '$2'/*.whl && export PYTHONPATH=SITE"
    exit
fi

outdir=$1
(($# > 1)) && stages=("${@:2}")
mkdir -p "$outdir" && outdir=$(cd "$outdir" && pwd) || exit 2
given=
while IFS= read -r -d : folder; do
    case $folder in '') ;; /*) given+=:$folder ;; *) given+=:$PWD/$folder ;; esac
done <<<"${PYTHONPATH:-}:"
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH=$PWD:$PWD/nogpu/src$given
export TRITON_DEFAULT_FP_FUSION=1 # the default; Triton's cache has an entry for each value that is set
workers=$(nproc)
((workers > 2)) && workers=$((workers > 15 ? 14 : workers - 1))

origin=$(python3 -c '
import sys, torch
from benchmarks.results import provenance
if not torch.cuda.is_available():
    sys.exit("PyTorch finds no CUDA GPU")
origin = provenance(torch.device("cuda"))
if not origin["commit"]:
    sys.exit("there is no .git; TORCHPAR_COMMIT must name the commit")
print(*(f"{name} {value}" for name, value in origin.items()), sep=", ")
') || { echo "validate_gpu.sh: there is nothing to run on" >&2; exit 2; }

needs() { # import the modules that a stage needs
    python3 -c 'import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]' "$@"
}

limited() { # a command, interrupted at the limit of the stage; pytest still writes what it has
    local left=$((began + ${limits[$stage]:-540} - SECONDS))
    timeout -s INT -k 20 "$((left > 0 ? left : 1))" "$@" &
    wait $!
}
build_cpp() { # before the limit of a stage begins: where all stages run in turn, it is there already
    python3 -m torchpar build
    local status=$?
    began=$SECONDS
    return "$status"
}
# `timeout` leads a process group of its own, which a terminal's Ctrl-C does not reach. A job ignores SIGINT.
trap 'trap "" INT TERM; kill ${builder:-} 2>/dev/null; kill -s INT $(jobs -p) 2>/dev/null; wait; exit 130' INT TERM

run_tests() { # FILE.xml, then arguments of pytest
    local report=$1
    shift
    needs expecttest iniconfig numpy packaging pluggy pygments pytest triton &&
        TORCHINDUCTOR_COMPILE_THREADS=1 limited python3 -m pytest -q -p no:cacheprovider -p no:benchmark --tb short \
            -o faulthandler_timeout=120 \
            --junitxml "$outdir/$report" -o junit_suite_name="$origin" "$@"
}

measure_operators() { # arguments of the benchmark
    needs rich triton &&
        limited python3 -m benchmarks.operators --device cuda --output "$outdir/$stage" --operators "$@"
}

tune() { # arguments of the benchmark; without matplotlib and pandas it draws nothing
    needs rich triton && limited python3 -m benchmarks run autotune --output "$outdir/$stage" "$@"
}

time_steps() { # ways, each in a process of its own: on an H100 all in one process crashed
    limited bash -c '
        ends=0
        for way in "${@:1}"; do
            mkdir -p "$0/$way"
            python3 -X faulthandler -m benchmarks run train --device cuda --ways "$way" --output "$0/$way" || ends=1
        done
        exit "$ends"' "$outdir/$stage" "$@"
}

run_stage() {
    case $1 in
        compile) # the configurations that the benchmarks launch; and C++, beside this and the next stage
            python3 -m torchpar build &
            builder=$!
            # It ends after 18 s, and has until the limit for its start and end on a slow CPU.
            needs triton && limited python3 -m benchmarks.compile_kernels "$capability" 18
            ;;
        values) # on the GPU, by Python: its own kernels first, then what runs on every device
            needs execnet xdist && run_tests values.xml -p unplayed -n "$workers" --dist worksteal -k "cuda or another_stream" \
                tests/kernels/test_kernels_cuda.py tests/ops/test_operators_{values,errors,autograd,compile}.py tests/ops/test_our_operators.py \
                tests/ops/test_symmetric_*.py tests/optim/test_launches.py tests/test_nn.py tests/training/test_{graphed,training}.py tests/benchmarks/test_compare.py
            ;;
        by_cpp) # the operators' values by C++, which waits for its compilation
            needs execnet xdist && build_cpp && run_tests by_cpp.xml -p played -n "$workers" --dist worksteal -k cuda \
                    tests/ops/test_operators_{values,autograd}.py tests/ops/test_our_operators.py
            ;;
        cuda_cpp) # kernels of CUDA C++, which nogpu launches by the driver, and of numba.cuda
            needs execnet xdist && run_tests cuda_cpp.xml -n "$workers" -k on_a_gpu \
                nogpu/tests/test_{on_gpu,numba_programs}.py || return
            needs numba_cuda 2>/dev/null || echo "numba-cuda is not installed, so that its kernels were not tried"
            ;;
        exact) # exact products, in bfloat16 and float16, too: the CPU's bits, and times beside torch.mm
            needs rich triton && run_tests exact.xml -k cuda tests/ops/test_exact_matmul.py tests/exact/test_exact_narrow.py &&
                limited python3 -m benchmarks run exact --parts products --device cuda --output "$outdir/$1"
            ;;
        huge) # one after the other: a test takes up to 32 GiB
            run_tests huge.xml tests/ops/test_operators_huge.py
            ;;
        operators)
            measure_operators linear_sigmoid_backward maximum --modes forward backward
            ;;
        matmul_t) # beside torch.mm alone
            measure_operators matmul_t --modes forward
            ;;
        host) # what the host takes for a call by Python and by C++, beside ATen's
            build_cpp || echo "the calls by C++ are left out: it was not built"
            needs rich triton && limited python3 -m benchmarks run host --device cuda --rounds 15 --output "$outdir/$1"
            ;;
        rule) # all configurations beside the library, what the rule chose, and the model's times
            tune --operators matmul_t linear_sigmoid --configurations
            ;;
        captures) # what CUDA forbids and allows in a graph, beside what the emulator says
            needs pytest triton && PYTHONPATH=nogpu/tests:$PYTHONPATH limited python3 -m graphs_on_gpu
            ;;
        counters) # what Nsight Compute counts, and what the emulator counts; $CASE is the only launch
            needs triton && mkdir -p "$outdir/$1" && limited bash -e -c '
                python3 tests/measured.py emulated ${CASE:+"$CASE"} >"$0/emulated.jsonl" &
                trap "kill $! 2>/dev/null || true" EXIT # if the profiler fails
                ncu --clock-control none --profile-from-start off --csv --metrics "$1" \
                    python3 tests/measured.py real ${CASE:+"$CASE"} >"$0/nsight.csv"
                wait $!
                grep -c "" "$0/nsight.csv" "$0/emulated.jsonl"' "$outdir/$1" "$(IFS=,; echo "${metrics[*]}")"
            ;;
        muon) # beside torch.optim.Muon; under 20 s on an H200
            needs rich triton && limited python3 -m benchmarks run muon --quick --output "$outdir/$1"
            ;;
        graphs) # a step as one launch: the lessons, the speedrun's records, and two ways to capture
            needs rich triton tyro && mkdir -p "$outdir/$1" && limited bash -e -c '
                python3 examples/train_ddp.py --metrics "$0/train_ddp.jsonl"
                python3 examples/train_ddp.py --graph --metrics "$0/train_ddp_graph.jsonl"
                python3 examples/train_fast.py --metrics "$0/train_fast.jsonl"
                python3 -m benchmarks run speedrun --recipe gpu --seeds 3 --output "$0"' "$outdir/$1" &&
                time_steps torchpar.training.graphed make_graphed_callables
            ;;
        compiled_steps) # the same steps by PyTorch's compiler
            needs rich triton && time_steps torch.compile "torch.compile, reduce-overhead"
            ;;
        nccl) # ranks that have a GPU each, beside the same ranks on CPUs; $PART is the only program
            needs rich triton tyro && limited python3 tests/ranks_on_gpus.py "$outdir/$1" ${PART:+--parts "$PART"}
            ;;
        linear_sigmoid) # beside addmm alone
            measure_operators linear_sigmoid --modes forward backward
            ;;
        autotune) # in bfloat16, also at the borders of the rule in docs/tuning.md
            tune
            ;;
        autotune_float32) # IEEE, whose operands are copied by columns
            tune --operators matmul_t linear_sigmoid --dtype float32
            ;;
        max_autotune) # beside torch.mm and addmm with a sigmoid, as Inductor's own search makes them
            tune --operators matmul_t linear_sigmoid --max-autotune
            ;;
        ladder) # the GPU's rows beside pure Python; without matplotlib it draws nothing
            needs rich triton && limited python3 -m benchmarks run ladder --gpu --output "$outdir/$1"
            ;;
        verify) # exact training ends at the bits that CPUs have
            limited python3 -m torchpar verify --device cuda
            ;;
    esac
}

metrics=(
    l1tex__t_{requests,sectors}_pipe_lsu_mem_global_op_{ld,st}.sum
    l1tex__data_pipe_lsu_wavefronts_mem_shared_op_{ld,st}.sum
    l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_{ld,st}.sum
    launch__registers_per_thread smsp__inst_executed.sum gpu__time_duration.sum
    dram__bytes_{read,write}.sum lts__t_sectors_op_{read,write}.sum
)
capability=$(python3 -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
log=$outdir/validate.log
failed=()
for stage in "${stages[@]}"; do
    start=$SECONDS began=$SECONDS
    {
        echo "== $stage, $origin"
        nvidia-smi --query-gpu=driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu --format=csv
        run_stage "$stage"
    } >>"$log" 2>&1
    status=$?
    [[ $status == 0 ]] || failed+=("$stage (status $status)")
    printf '%s: status %s, %s s, %s\n' "$stage" "$status" $((SECONDS - start)) "$(tail -n 1 "$log")"
    [[ $stage == verify ]] && grep "^SHA-256 of the weights" "$log" | tail -n 1
    [[ $stage == ladder ]] && grep "times as fast as pure Python" "$log"
    # The shell opens the archive before tar reads its folder, which would otherwise change meanwhile.
    tar -C "$outdir" --exclude validate.tar.gz -cz . >"$outdir/validate.tar.gz"
done

wait # for the C++, if no stage has

if ((${#failed[@]})); then
    echo "failed: ${failed[*]}"
    exit 1
fi
echo "passed: ${stages[*]}"
