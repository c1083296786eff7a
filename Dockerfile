# The same installation as `make serve` makes, on an NVIDIA Triton image, whose own server program is used.
#
#   docker build -t distserve .
#   docker run --init --gpus all --shm-size=1g --ulimit memlock=-1 -p 8000-8002:8000-8002 -p 9000:9000 \
#       -v "$PWD/models:/models" distserve /models/opt-1.3b --prefill-devices cuda:0 --decode-devices cuda:1
#
# deploy/ has a compose file and a Helm chart.
#
# /models is only read, except that without --model, or with the name of a model on the Hub, the model is fetched into
# /models/.cache, which the user below (uid 10001) must then be able to write. Both stages share a container, so CUDA IPC
# needs no --ipc=host.
#
# Unproven: no Docker engine has built this file, no server of an NVIDIA image has run these models, and this installation
# has not used a GPU from within a container. Proven, without a GPU: the commands below, run one by one in a chroot of
# Ubuntu 24.04 (Python 3.12) that has the server, Python backend and 3.12 stub of the nvidia-pytriton 0.7.0 wheel (release
# 24.10) at /opt/tritonserver, where NVIDIA's image has its own. They installed torch 2.15 for CUDA 13.2 with
# nvidia-nccl-cu13, and no other server. `python -m tools.serve`, which `distserve serve` calls, as uid 10001 with a
# /dev/shm of 1 GiB, answered from a read-only
# folder of models and, with a writable one, from the default model. It ended on SIGINT, and as process 1 on SIGTERM, in
# less than 5 s, with nothing left in /dev/shm. TORCH='torch<2.11' was resolved (torch 2.10, nvidia-nccl-cu12), not run. The
# bootstrap installs in another way since (a newer pip, what was planned by its addresses), and was not run there again.

# Triton server 2.71, Python 3.12, CUDA 13, as torch's default wheels, which bring their own runtime and NCCL.
# For CUDA 12: --build-arg BASE_IMAGE=nvcr.io/nvidia/tritonserver:25.06-py3 --build-arg TORCH='torch<2.11', whose default
# wheels are of CUDA 12 and bring nvidia-nccl-cu12.
ARG BASE_IMAGE=nvcr.io/nvidia/tritonserver:26.07-py3
FROM ${BASE_IMAGE}
ARG TORCH=torch
# run, or ray for servers over several nodes
ARG EXTRA=run

# What the server reads and writes is UTF-8, whatever its texts.
ENV LANG=C.UTF-8 LC_ALL=C.UTF-8 PYTHONUNBUFFERED=1

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 distserve \
    && install -d -o distserve /opt/distserve /models
USER 10001
WORKDIR /opt/distserve
COPY --chown=distserve . .
RUN echo "${TORCH}" > /tmp/constraints.txt \
    && PIP_NO_CACHE_DIR=1 PIP_CONSTRAINT=/tmp/constraints.txt python3 tools/bootstrap.py "${EXTRA}" \
    && rm /tmp/constraints.txt
ENV XDG_CACHE_HOME=/models/.cache
VOLUME /models
EXPOSE 8000 8001 8002 9000
# Healthy: requests can be served. Loading, a download included, may take long.
HEALTHCHECK --interval=10s --timeout=6s --start-period=30m --retries=3 \
    CMD [".venv/bin/python", "-c", "import os, urllib.request; urllib.request.urlopen(f'http://127.0.0.1:{os.environ.get(\"HTTP_PORT\", 8000)}/v2/health/ready', timeout=5)"]
ENTRYPOINT [".venv/bin/distserve", "serve", "--host", "0.0.0.0", "--log", "/tmp/server.log"]
