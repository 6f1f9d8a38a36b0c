# One image for CPU or GPU, set up by the same script as a checkout:
#
#   docker build --build-arg DEVICE=cpu  -t rlmt .        (the default)
#   docker build --build-arg DEVICE=cuda -t rlmt-cuda .   (needs the NVIDIA container toolkit to run: --gpus all)
#   docker run --rm --shm-size 1g -v "$PWD/runs:/home/rlmt/app/runs" rlmt fit --config configs/base.yaml ...
#
# User 1000 must be able to write to the mounted runs folder (or pass --user).
ARG DEVICE=cpu

# libnuma1: vLLM's CPU kernels link it. g++: vLLM compiles models with it if a config sets enforce_eager to false.
FROM python:3.11-slim AS cpu
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/*

# The wheels include CUDA's runtime libraries; the "devel" image adds nvcc, which compiles kernels on first use.
# python3.12-dev: Triton compiles against Python.h. Ubuntu's image has a user with id 1000, which is replaced.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS cuda
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3.12 python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/* \
    && userdel --remove ubuntu

FROM ${DEVICE}
ARG DEVICE
RUN useradd --create-home --uid 1000 rlmt && install --directory --owner rlmt --group rlmt /home/rlmt/app
USER rlmt
WORKDIR /home/rlmt/app
COPY --chown=rlmt:rlmt . .
RUN mkdir runs && PIP_NO_CACHE_DIR=1 RLMT_DEVICE=${DEVICE} scripts/setup.sh
ENTRYPOINT ["/home/rlmt/app/.venv/bin/rlmt"]
CMD ["--help"]
