# The same installation as `make serve` makes, on an NVIDIA Triton image, whose own server program is used.
#
#   docker build -t distserve .
#   docker run --init --gpus all --shm-size=1g --ulimit memlock=-1 -p 8000-8002:8000-8002 \
#       -v "$PWD/models:/models" distserve --model /models/opt-1.3b --prefill-devices cuda:0 --decode-devices cuda:1
#
# Without --model the default model is fetched into /models/.cache, which the user below (uid 10001) must be able to write.
# Both stages share a container, so CUDA IPC needs no --ipc=host.
#
# Unproven: this file has not been built, for want of a Docker engine. Proven is the path that it takes, tools/bootstrap.py
# and tools.serve in a fresh virtual environment on Debian 12, there with the server of the nvidia-pytriton wheel.

# Triton server 2.62, Python 3.12, CUDA 13: torch's default wheels bring the CUDA 13 runtime and NCCL that fit it.
# With an image of CUDA 12 take a CUDA 12 build of torch (PIP_EXTRA_INDEX_URL), which brings nvidia-nccl-cu12.
ARG BASE_IMAGE=nvcr.io/nvidia/tritonserver:25.10-py3
FROM ${BASE_IMAGE}

RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 distserve \
    && install -d -o distserve /opt/distserve /models
USER distserve
WORKDIR /opt/distserve
COPY --chown=distserve . .
RUN PIP_NO_CACHE_DIR=1 python3 tools/bootstrap.py run
ENV XDG_CACHE_HOME=/models/.cache
VOLUME /models
EXPOSE 8000 8001 8002
ENTRYPOINT [".venv/bin/python", "-m", "tools.serve", "--host", "0.0.0.0"]
