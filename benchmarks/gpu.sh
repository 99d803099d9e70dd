#!/usr/bin/env bash
# The tests of tests/gpu and all benchmarks on a machine with a GPU and nothing but Python, torch and its CUDA.
#
#   benchmarks/gpu.sh wheels DIR       with a network: fill DIR with wheels, under 10 MB, for Python 3.12 on x86_64 Linux
#   benchmarks/gpu.sh run DIR OUT      without one: install from DIR, run everything, logs and figures go to OUT
#
# Only pip's wheels are carried over; torch, CUDA and numpy are expected there. Left out, because they are large: numba
# (benchmarks on token files are skipped without it), transformers (the Hugging Face peer is skipped; `TRANSFORMERS=1`
# adds it with what it needs, 20 MB more), sentencepiece, boto3, flash-attn (its tests are skipped; torch's own kernels are measured).
#
# Variables: PYTHON (default python3) for `run`, and for `wheels` to call pip; PYTHON_VERSION (default 3.12) and PLATFORM
# (default x86_64) of the wheels; LIMIT_S (default 1800), seconds a benchmark may take; QUICK=1 for small ones.
#
# What fails is named at the end and makes the exit code 1; the rest still runs. Without a GPU the tests are collected and
# skipped, with the reason, and no benchmark runs.
set -uo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python3}

usage() {
    sed -n '2,17s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
}

wheels() {
    local dir=$1 version=${PYTHON_VERSION:-3.12} machine=${PLATFORM:-x86_64}
    mkdir -p "$dir" || exit 1
    local packages=(
        # DeepSpeed needs
        einops hjson msgpack packaging psutil py-cpuinfo tqdm
        pydantic annotated-types typing-extensions typing-inspection
        # we need
        pyyaml safetensors
        # the tests need; a later pytest would need pygments, too
        "pytest<8.4" pytest-timeout pluggy iniconfig hypothesis sortedcontainers attrs
    )
    [ "${TRANSFORMERS:-0}" = 1 ] && packages+=("transformers>=4.46,<5" "tokenizers>=0.21,<0.23" "huggingface-hub<1"
        regex requests urllib3 idna certifi charset-normalizer filelock fsspec hf-xet)
    local target=(--only-binary=:all: --python-version "$version" --implementation cp
        --abi "cp${version/./}" --abi abi3 --abi none
        --platform "manylinux_2_28_$machine" --platform "manylinux_2_17_$machine" --platform "manylinux2014_$machine")
    "$PYTHON" -m pip download --quiet --no-deps --dest "$dir" "${target[@]}" "${packages[@]}" || exit 1
    # pydantic fits one version of its core only: the one that it names
    local core
    core=$("$PYTHON" - "$dir" <<'PY'
import glob, re, sys, zipfile
wheel = zipfile.ZipFile(glob.glob(f"{sys.argv[1]}/pydantic-*.whl")[0])
metadata = wheel.read(next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))).decode()
print(re.search(r"Requires-Dist: (pydantic-core==[0-9.]+)", metadata)[1])
PY
    ) || exit 1
    "$PYTHON" -m pip download --quiet --no-deps --dest "$dir" "${target[@]}" "$core" || exit 1
    # pure Python: no operator is built, so the wheel fits any torch and any CUDA
    local deepspeed
    deepspeed=$(grep -o 'deepspeed==[0-9.]*' "$ROOT/pyproject.toml")
    DS_BUILD_OPS=0 "$PYTHON" -m pip wheel --quiet --no-deps --no-binary=deepspeed --wheel-dir "$dir" "$deepspeed" || exit 1
    echo "$(ls "$dir"/*.whl | wc -l) wheels, $(du -csh "$dir"/*.whl | tail -1 | cut -f1), in $dir"
}

# A virtual environment that sees the machine's torch, with the wheels of DIR in front of it.
install() {
    local dir=$1 venv=$2
    "$PYTHON" -m venv --system-site-packages "$venv" || return 1
    # where PYTHON is of a virtual environment itself, its packages are not the system's
    "$PYTHON" - >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/beside.pth" <<'PY'
import sys, sysconfig
if sys.prefix != sys.base_prefix:
    print(sysconfig.get_paths()["purelib"])
PY
    shopt -s nullglob
    local found=("$dir"/*.whl)
    if [ ${#found[@]} -gt 0 ]; then
        "$venv/bin/python" -m pip install --quiet --no-index --no-deps --disable-pip-version-check "${found[@]}" || return 1
    fi
}

# NAME COMMAND…: runs it, its output also in OUT/NAME.log; notes NAME if it fails.
note() {
    local name=$1
    shift
    echo "== $name: $*"
    "$@" 2>&1 | tee "$OUT/$name.log"
    local code=${PIPESTATUS[0]}
    if [ "$code" -ne 0 ]; then
        failed+=("$name (exit code $code)")
    else
        passed+=("$name")
    fi
}

run() {
    local dir=$1
    mkdir -p "$2" || exit 1
    OUT=$(cd "$2" && pwd)
    local venv=$OUT/venv passed=() failed=() left_out=()
    install "$dir" "$venv" || { echo "installing from $dir failed" >&2; exit 1; }
    local python=$venv/bin/python
    export PYTHONPATH=$ROOT
    local device
    device=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")') || exit 1
    echo "device: ${device:-none}"
    export DS_ACCELERATOR=cpu
    [ -n "$device" ] && DS_ACCELERATOR=cuda
    cd "$ROOT" || exit 1
    note tests "$python" -m pytest -rs -p no:cacheprovider tests/gpu
    local file name options
    for file in benchmarks/*.py; do
        name=$(basename "$file" .py)
        grep -q '"--json"' "$file" || continue # imported or started by another
        if [ -z "$device" ]; then
            left_out+=("$name (no GPU)")
            continue
        fi
        if grep -q '"numba"' "$file" && # measures token files, and its report names numba
             ! "$python" -c 'import numba' 2>/dev/null; then
            left_out+=("$name (needs numba)")
            continue
        fi
        options=(--json "$OUT/$name.json")
        grep -q '"--device"' "$file" && options+=(--device cuda)
        [ "${QUICK:-0}" = 1 ] && options+=(--quick)
        note "$name" timeout "${LIMIT_S:-1800}" "$python" "$file" "${options[@]}"
    done
    echo "passed: ${passed[*]:-nothing}"
    echo "left out: ${left_out[*]:-nothing}"
    echo "failed: ${failed[*]:-nothing}"
    [ ${#failed[@]} -eq 0 ]
}

case "${1:-}" in
    wheels) [ $# -eq 2 ] || usage; wheels "$2" ;;
    run) [ $# -eq 3 ] || usage; run "$2" "$3" ;;
    *) usage ;;
esac
