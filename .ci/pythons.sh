# Choose an interpreter, for other scripts to source.

newer_python() { # PYTHON: the newest one of a later minor version, of those that pyproject.toml names, or nothing
    local version python minor='import sys; print(sys.version_info.minor)'
    for version in $(grep -oP 'Python :: 3\.\K\d+' pyproject.toml); do
        [ "$version" -gt "$("$1" -c "$minor")" ] || continue
        # Those on PATH, of which pyenv's stand-ins may not start, and those of pyenv.
        for python in $(type -ap "python3.$version") "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/"python3.$version"; do
            "$python" -c 'import ensurepip, platform, sys; print(platform.python_version(), sys.executable)' 2>/dev/null || true
        done
    done | sort -V | tail -n 1 | cut -d ' ' -f 2-
}
