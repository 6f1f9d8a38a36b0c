"""Downloads what a GPU machine without network lacks for benchmarks/gpu.py, as wheels of at most 64 MiB together.

    python scripts/gpu_wheels.py runs/wheels [--python 3.12] [--cuda 130]

The machine needs torch for CUDA, transformers and lightning. There:

    pip install --no-index --no-deps --find-links runs/wheels -r runs/wheels/requirements.txt

pip leaves packages that are installed as they are. Of bitsandbytes only the library for one version of CUDA is kept.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import zipfile
from pathlib import Path

LIMIT = 64 * 2**20
"""Most bytes of all wheels together."""
PACKAGES = (
    *("jsonargparse", "typeshed_client", "importlib_resources", "docstring_parser"),
    *("datasets", "dill", "multiprocess", "xxhash", "pandas", "torchdata"),
    *("peft", "accelerate", "bitsandbytes", "liger-kernel", "scipy"),
    *("rich", "markdown-it-py", "mdurl", "pygments"),
)
"""Packages without their dependencies, which are in this list or on the machine."""
CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"


def download(folder: Path, python: str) -> None:
    """Downloads the wheels with pip, in the versions that rlmt was tested with."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--python-version", python, "--dest", str(folder), "--constraint", str(CONSTRAINTS)]
    for platform in ("manylinux2014_x86_64", "manylinux_2_24_x86_64", "manylinux_2_27_x86_64", "manylinux_2_28_x86_64"):
        command += ["--platform", platform]
    subprocess.run([*command, *PACKAGES], check=True)


def cut_bitsandbytes(wheel: Path, cuda: str) -> None:
    """Removes the libraries of a bitsandbytes wheel, in place, that are not for one version of CUDA.

    Args:
        wheel: The wheel.
        cuda: Version of CUDA, such as 130 for 13.0.

    Raises:
        SystemExit: The wheel has no library for this version.
    """
    kept = f"bitsandbytes/libbitsandbytes_cuda{cuda}.so"
    with zipfile.ZipFile(wheel) as source:
        names = source.namelist()
        if kept not in names:
            raise SystemExit(f"{wheel.name} has no {kept}: pass another --cuda.")
        removed = {n for n in names if n.startswith("bitsandbytes/libbitsandbytes_") and n != kept}
        cut = wheel.with_suffix(".cut")
        with zipfile.ZipFile(cut, "w", zipfile.ZIP_DEFLATED) as target:
            for name in names:
                data = source.read(name)
                if name.endswith(".dist-info/RECORD"):
                    lines = data.decode().splitlines(keepends=True)
                    data = "".join(line for line in lines if line.split(",")[0] not in removed).encode()
                if name not in removed:
                    target.writestr(source.getinfo(name), data, zipfile.ZIP_DEFLATED)
    cut.replace(wheel)


def main(argv: list[str] | None = None) -> int:
    """Downloads and cuts the wheels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="version of Python on the GPU machine")
    parser.add_argument("--cuda", default="130", help="version of CUDA that its torch is built for, without the dot")
    args = parser.parse_args(argv)
    download(args.folder, args.python)
    (wheel,) = args.folder.glob("bitsandbytes-*.whl")
    cut_bitsandbytes(wheel, args.cuda)
    (args.folder / "requirements.txt").write_text("".join(f"{name}\n" for name in PACKAGES))
    size = sum(path.stat().st_size for path in args.folder.glob("*.whl"))
    print(f"{len(PACKAGES)} wheels in {args.folder}, {size / 2**20:.1f} MiB")
    if size > LIMIT:
        print(f"more than {LIMIT // 2**20} MiB: leave out a package that the machine has")
    return size > LIMIT


if __name__ == "__main__":
    sys.exit(main())
