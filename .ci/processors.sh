# Kinds of processors that this one can stand in for, for other scripts to source.
# all: this one; avx512: AVX-512 without AMX; avx2: AVX2 alone; sse: without AVX.

has() { grep -qw "$1" /proc/cpuinfo; }

kinds() { # the kinds, from the most instructions to the fewest
    echo all
    if has amx_tile || has avx512_bf16; then echo avx512; fi
    if has avx512f; then echo avx2; fi
    if has avx2; then echo sse; fi
}

# The settings limit PyTorch's libraries. torchpar still asks the processor whether it has AMX.
settings_of() { # KIND: the variables that limit the instructions of PyTorch, oneDNN and MKL to it
    case $1 in
        all) ;;
        avx512) echo ONEDNN_MAX_CPU_ISA=AVX512_CORE ;;
        avx2) echo ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 ;;
        sse) echo ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2 ;;
        *) echo "$1 is no kind of processor, expected all, avx512, avx2 or sse" >&2; return 2 ;;
    esac
}
