# SPDX-License-Identifier: MIT
"""Compile CUDA C++ to PTX by NVRTC, which comes with PyTorch's wheel."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nogpu.cpp.declarations import COMMENT, blank

# Headers of the C library that files include for their host code, or for names that NVRTC knows.
INTEGERS = "\n".join(
    f"typedef signed {kind} int{bits}_t;\ntypedef unsigned {kind} uint{bits}_t;"
    for bits, kind in ((8, "char"), (16, "short"), (32, "int"), (64, "long long"))
)
INTEGERS += """
typedef unsigned long long uintptr_t;
typedef long long intptr_t;
#define INT32_MAX 2147483647
#define INT32_MIN (-INT32_MAX - 1)
#define UINT32_MAX 4294967295u
#define INT64_MAX 9223372036854775807ll
#define UINT64_MAX 18446744073709551615ull
"""
IN_STD = " ".join(f"using ::{sign}int{bits}_t;" for sign in ("", "u") for bits in (8, 16, 32, 64))
LIMITS = """
#define CHAR_BIT 8
#define INT_MAX 2147483647
#define INT_MIN (-INT_MAX - 1)
#define UINT_MAX 4294967295u
#define LLONG_MAX 9223372036854775807ll
#define LLONG_MIN (-LLONG_MAX - 1)
"""
FLOATS = """
#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.175494351e-38f
#define FLT_EPSILON 1.192092896e-07f
#define DBL_MAX 1.7976931348623158e+308
#define DBL_MIN 2.2250738585072014e-308
#define DBL_EPSILON 2.2204460492503131e-016
"""
MATH = """
#define INFINITY __int_as_float(0x7f800000)
#define NAN __int_as_float(0x7fffffff)
#define HUGE_VAL __longlong_as_double(0x7ff0000000000000ll)
#define M_PI 3.14159265358979323846
#define M_E 2.7182818284590452354
"""
ALGORITHM = """
namespace std {
template <class T> __host__ __device__ constexpr const T& min(const T& a, const T& b)
{ return b < a ? b : a; }
template <class T> __host__ __device__ constexpr const T& max(const T& a, const T& b)
{ return a < b ? b : a; }
template <class T> __host__ __device__ void swap(T& a, T& b) { T c = a; a = b; b = c; }
}
"""
NOTHING = ("stdio", "stdlib", "assert", "string", "time")
OF_HOST = (
    *("array", "chrono", "cuda.h", "exception", "fstream", "functional", "iomanip"),
    *("iostream", "map", "memory", "numeric", "random", "set", "sstream", "stdexcept", "string"),
    *("thread", "utility", "vector", "curand.h", "cublas_v2.h"),
)
HEADERS = {
    **{f"{name}.h": "" for name in NOTHING},
    **{f"c{name}": "" for name in NOTHING},
    **dict.fromkeys(OF_HOST, ""),
    "math.h": MATH,
    "cmath": MATH,
    "algorithm": ALGORITHM,
    "limits.h": LIMITS,
    "climits": LIMITS,
    "float.h": FLOATS,
    "cfloat": FLOATS,
    "stdint.h": INTEGERS,
    "cstdint": f"{INTEGERS}\nnamespace std {{ {IN_STD} }}",
}


# What an error of NVRTC means here, by a part of its text
REASONS = {
    'cannot open source file "nv/target"': (
        "this header of CUDA needs libcu++, which nogpu does not have"
    ),
    "device-side kernel launch": (
        "nogpu executes no kernel that a kernel launches: launch it from Python"
    ),
}

IN_PLACE_OF_GROUPS = (
    "; in place of cooperative_groups take __syncthreads(), __syncwarp() and shuffles"
)


class CompileError(Exception):
    """NVRTC refuses a file; each line of the message has a file and a line."""


def _nvrtc() -> Any:
    """Return NVRTC's Python module.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        from cuda.bindings import nvrtc  # type: ignore[import-untyped]  # it has no types
    except ModuleNotFoundError:
        message = (
            "CUDA C++ is compiled by NVRTC, which is not installed: pip install cuda-bindings "
            "nvidia-cuda-nvrtc (PyTorch's wheel for CUDA brings both)"
        )
        raise ModuleNotFoundError(message) from None
    return nvrtc


@lru_cache(1)
def include_folders() -> list[str]:
    """Return where wheels have CUDA's headers, such as cuda_fp16.h and mma.h."""
    found = []
    spec = find_spec("nvidia")
    for root in spec.submodule_search_locations or [] if spec else []:
        found += [str(one.parent) for one in sorted(Path(root).glob("*/include/cuda_fp16.h"))]
    if (spec := find_spec("triton")) and spec.origin:  # which has crt/mma.h, too
        folder = Path(spec.origin).parent / "backends" / "nvidia" / "include"
        found += [str(folder)] if (folder / "cuda_fp16.h").exists() else []
    return found


# Errors of NVRTC that tell of code for the CPU; the first one at the line where a function begins.
OF_HOST_CODE = "|".join(
    (
        "considered a host (?:function|variable)",
        'namespace "std" has no',
        'name followed by "::" must be a class or namespace',
    )
)
# What ends no declaration: comments, strings, and lines of the preprocessor.
TEXT = re.compile(
    r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'|^[ \t]*#(?:\\\n|[^\n])*',
    re.DOTALL | re.MULTILINE,
)
OF_DEVICE = re.compile(r"__(?:device|global|constant|shared|managed)__")
OPENS = re.compile(r"\s*(?:inline\s+)?namespace\b[^;{]*|\s*extern\s+")  # strings are blank
TYPE = re.compile(
    r"\s*(?:template\s*<.*>\s*)?(?:class|struct|union|enum|typedef)\b[^(]*$", re.DOTALL
)


@lru_cache(64)
def compiled(
    source: str, path: str, arch: str, names: tuple[str, ...], options: tuple[str, ...]
) -> tuple[str, dict[str, str]]:
    """Return what `_compiled` does, of a source that may have functions for the CPU, such as main.

    Those are left out; lines keep their numbers.
    """
    for _ in range(100):
        try:
            return _compiled(source, path, arch, names, options)
        except CompileError as e:
            missing = re.findall(r'cannot open source file "(.+?)"', str(e))
            system = [
                f"<{one}>"
                for one in missing
                if re.search(rf"#\s*include\s*<{re.escape(one)}>", source)
            ]
            if system:  # of the host's code, such as <unistd.h>
                source = re.sub(
                    "|".join(rf"#\s*include\s*{re.escape(one)}" for one in system), blank, source
                )
                continue
            rest = _without_host_code(source, path, str(e))
            if rest == source:
                raise
            source = rest
    raise CompileError(f"{Path(path).name} has too many functions for the CPU")


def _without_host_code(source: str, path: str, said: str) -> str:
    """Return a source without the declarations that errors call the host's, such as main.

    A class is left out as a whole. Whatever names a memory of the device, or a kernel, stays.
    """
    name = re.escape(Path(path).name)
    lines = {
        int(n) for n in re.findall(rf"^{name}:(\d+): .*(?:{OF_HOST_CODE})", said, re.MULTILINE)
    }
    code = TEXT.sub(blank, source)
    for start, end in _items(code):
        begin = start + len(code[start:end]) - len(code[start:end].lstrip())
        first, last = (source.count("\n", 0, at) + 1 for at in (begin, end))
        if lines & set(range(first, last + 1)) and not OF_DEVICE.search(code[start:end]):
            source = source[:begin] + blank(source[begin:end]) + source[end:]
    return source


def _items(code: str) -> Iterator[tuple[int, int]]:
    """Yield where the declarations of a file begin and end; those of a namespace one by one."""
    start = depth = 0
    for n, sign in enumerate(code):
        if sign == "{" and not depth and OPENS.fullmatch(code[start:n]):
            start = n + 1
        elif sign == "{":
            depth += 1
        elif sign == "}" and not depth:  # of a namespace
            start = n + 1
        elif sign == "}":
            depth -= 1
            if not depth and _is_function(code[start:n].partition("{")[0]):
                yield start, n + 1
                start = n + 1
        elif sign == ";" and not depth:
            yield start, n + 1
            start = n + 1


def _is_function(head: str) -> bool:
    """Return whether braces after this text are the body of a function, without ";" behind them."""
    return not TYPE.match(head) and "=" not in re.sub(r"\([^()]*\)", "", head)


def _compiled(
    source: str, path: str, arch: str, names: tuple[str, ...], options: tuple[str, ...]
) -> tuple[str, dict[str, str]]:
    """Return the PTX of a source, and the names in it of name expressions.

    Args:
        path: of the file, for lines in messages.
        arch: such as "sm_90".
        names: instances of templates, such as "gemm<float, 16>".

    Raises:
        CompileError: the source has an error.
    """
    nvrtc = _nvrtc()
    headers = [one for one in HEADERS.items() if f"<{one[0]}>" in source or f'"{one[0]}"' in source]
    status, program = nvrtc.nvrtcCreateProgram(
        source.encode(),
        path.encode(),
        len(headers),
        [text.encode() for _, text in headers],
        [name.encode() for name, _ in headers],
    )
    _check(nvrtc, status)
    try:
        for name in names:
            _check(nvrtc, *nvrtc.nvrtcAddNameExpression(program, name.encode()))
        folders = [str(Path(path).parent), *include_folders()]
        given = [
            "-lineinfo",
            f"--gpu-architecture={arch.replace('sm_', 'compute_')}",
            "--std=c++17",
            *(f"--include-path={folder}" for folder in folders),
            *options,
        ]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(given), [one.encode() for one in given])
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompileError(_message(_text(nvrtc, program, "ProgramLog"), path, source))
        ptx = _text(nvrtc, program, "PTX")
        lowered = {}
        for name in names:
            status, found = nvrtc.nvrtcGetLoweredName(program, name.encode())
            _check(nvrtc, status)
            lowered[name] = found.decode()
        return ptx, lowered
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _check(nvrtc: Any, status: Any) -> None:
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CompileError(f"NVRTC ends with {status.name}")


def _text(nvrtc: Any, program: Any, what: str) -> str:
    _, size = getattr(nvrtc, f"nvrtcGet{what}Size")(program)
    text = b" " * size
    getattr(nvrtc, f"nvrtcGet{what}")(program, text)
    return str(text.decode(errors="replace")).rstrip("\0")


NAMES = "__nv_name_map"  # the file in which NVRTC looks for the instances of templates


def _message(log: str, path: str, source: str) -> str:
    """Return NVRTC's errors, one in a line, each with its file and line."""
    has_groups = "cooperative_groups" in COMMENT.sub("", source) + log
    found = re.findall(r"^(.+?)\((\d+)\): (?:catastrophic )?error: (.*)$", log, re.MULTILINE)
    if found and {file for file, *_ in found} == {NAMES}:
        name = "".join(re.findall(r'Input name expression was: "\s*(.*?)\s*"', log)[:1])
        return (
            f"{Path(path).name} has no instance {name}: {found[0][2]}; give an argument for each "
            "parameter of the template, in their order"
        )
    lines = []
    for file, line, what in found:
        why = next((text for sign, text in REASONS.items() if sign in what), "")
        why += IN_PLACE_OF_GROUPS if "libcu++" in why and has_groups else ""
        lines.append(f"{Path(file).name}:{line}: {what}{why and f'; {why}'}")
    return "\n".join(lines or [log.strip() or f"NVRTC refuses {path}"])
