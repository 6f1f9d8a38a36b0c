"""Packs what a GPU machine without network lacks for benchmarks/gpu.py into an archive of at most 64 MiB.

    python scripts/gpu_packages.py runs/packages.tar.xz [--python 3.12] [--cuda 130] [--vllm 90]

The machine needs torch for CUDA with torchvision, transformers, lightning and common packages of data: pandas, SciPy,
requests, Pillow, uvloop, OpenCV. There:

    mkdir packages && tar -xJf packages.tar.xz -C packages && export PYTHONPATH=$PWD/packages

Of bitsandbytes only the library for one version of CUDA is kept. `--vllm` adds vLLM with the kernels of one compute
capability alone (90 for an H100), without FlashInfer and without the kernels of a few models. Its libraries use torch's
stable ABI: vLLM 0.32 asks for torch 2.13, and samples with torch 2.11.
"""

from __future__ import annotations

import argparse
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

LIMIT = 64 * 2**20
"""Most bytes of the archive."""
PACKAGES = (
    *("jsonargparse", "typeshed_client", "importlib_resources", "docstring_parser"),
    *("datasets", "dill", "multiprocess", "torchdata"),
    *("peft", "accelerate", "bitsandbytes", "liger-kernel", "rich"),
)
"""Packages without their dependencies, which are in this list or on the machine."""
VLLM_PACKAGES = (
    *("vllm==0.32.0", "apache-tvm-ffi", "xgrammar", "llguidance", "compressed-tensors", "openai-harmony"),
    *("cachetools", "cbor2", "loguru", "msgspec", "partial-json-parser", "py-cpuinfo", "pybase64", "pyzmq"),
    *(
        "fastapi",
        "starlette",
        "python-multipart",
        "email-validator",
        "dnspython",
        "openai",
        "jiter",
        "distro",
        "sniffio",
    ),
    *("httpx2", "httpcore2", "truststore", "jsonschema", "jsonschema-specifications", "referencing", "rpds-py"),
    *("pydantic", "pydantic-core", "annotated-types", "typing-inspection"),
)
"""What vLLM needs to sample in the process that imports it."""
VLLM_LEFT_OUT = (
    *("vllm-rs", "third_party/deep_gemm", "third_party/fmha_sm100", "third_party/tml_fa4"),
    *("_deepselect_C.abi3.so", "_flashmla_C.abi3.so", "_flashmla_extension_C.abi3.so"),
    *("_flashkda_C.abi3.so", "_qutlass_C.abi3.so"),
)
"""Files and folders of vLLM for its servers, or for the attention of a few models."""
CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
PLATFORMS = ("manylinux2014", "manylinux_2_24", "manylinux_2_27", "manylinux_2_28", "manylinux_2_31", "manylinux_2_34")
FATBIN = b"\x50\xed\x55\xba"
"""The first bytes of a container of GPU code in a library; version, size of the header and of the entries follow."""


def download(folder: Path, python: str, packages: tuple[str, ...]) -> None:
    """Downloads wheels with pip, in the versions that rlmt was tested with."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--python-version", python, "--dest", str(folder), "--constraint", str(CONSTRAINTS)]
    for platform in PLATFORMS:
        command += ["--platform", f"{platform}_x86_64"]
    subprocess.run([*command, *packages], check=True)


def cut_bitsandbytes(site: Path, cuda: str) -> None:
    """Removes the libraries of bitsandbytes that are not for one version of CUDA.

    Args:
        site: Folder of packages.
        cuda: Version of CUDA, such as 130 for 13.0.

    Raises:
        SystemExit: It has no library for this version.
    """
    kept = site / "bitsandbytes" / f"libbitsandbytes_cuda{cuda}.so"
    if not kept.exists():
        raise SystemExit(f"bitsandbytes has no {kept.name}: pass another --cuda.")
    for path in kept.parent.glob("libbitsandbytes_*"):
        if path != kept:
            path.unlink()


def cut_vllm(site: Path, capability: int) -> None:
    """Removes what sampling does not need, and all GPU code but that for one compute capability."""
    for name in VLLM_LEFT_OUT:
        path = site / "vllm" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in (site / "vllm").rglob("*.so"):
        path.write_bytes(cut_gpu_code(path.read_bytes(), capability))


def cut_gpu_code(library: bytes, capability: int) -> bytes:
    """Overwrites the GPU code of other compute capabilities by zeros, which compress to nothing.

    A container holds entries with a header each: kind (1 PTX, 2 machine code), size of the header and of the code, and
    at byte 28 the compute capability. The driver takes the entry of its own.

    Args:
        library: A shared library.
        capability: The compute capability, such as 90 for 9.0.
    """
    data, start = bytearray(library), library.find(FATBIN)
    while start >= 0:
        header, size = struct.unpack_from("<HQ", data, start + 6)
        entry, end = start + header, start + header + size
        while entry < end:
            kind, _, entry_header, code = struct.unpack_from("<HHIQ", data, entry)
            (built_for,) = struct.unpack_from("<I", data, entry + 28)
            if (kind, built_for) != (2, capability):
                data[entry + entry_header : entry + entry_header + code] = bytes(code)
            entry += entry_header + code
        start = library.find(FATBIN, end)
    return bytes(data)


def main(argv: list[str] | None = None) -> int:
    """Downloads, cuts and packs the packages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path)
    parser.add_argument("--python", default="3.12", help="version of Python on the GPU machine")
    parser.add_argument("--cuda", default="130", help="version of CUDA that its torch is built for, without the dot")
    parser.add_argument("--vllm", type=int, help="add vLLM for this compute capability, without the dot")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        wheels, site = Path(temporary) / "wheels", Path(temporary) / "site"
        download(wheels, args.python, PACKAGES + VLLM_PACKAGES if args.vllm else PACKAGES)
        for wheel in wheels.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
        cut_bitsandbytes(site, args.cuda)
        if args.vllm:
            cut_vllm(site, args.vllm)
        args.archive.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(args.archive, "w:xz") as archive:
            archive.add(site, ".")
    size = args.archive.stat().st_size
    print(f"{args.archive}: {size / 2**20:.1f} MiB")
    if size > LIMIT:
        print(f"more than {LIMIT // 2**20} MiB: leave out a package that the machine has")
    return size > LIMIT


if __name__ == "__main__":
    sys.exit(main())
