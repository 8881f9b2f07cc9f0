# Twinview and all that it needs, on Debian 12 with Python 3.11:
#   docker build -t twinview .
#   docker run --gpus all --ipc=host -v /data:/data -it twinview
# PyTorch's packages bring CUDA; the host brings the driver and the NVIDIA Container Toolkit. Runs on CPUs as well.
FROM debian:12-slim AS base
# What tools/setup.sh would install, and git for the commit that results name. --ipc=host above: ranks share memory.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates g++ git libopencv-dev libturbojpeg0-dev make openssh-client pkg-config python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /twinview
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility,video PATH=/twinview/.venv/bin:$PATH

# For .devcontainer: the checkout is mounted, and installs into itself.
FROM base AS dev

FROM base AS twinview
# Packages first: they change seldom, and are several GB.
COPY Makefile constraints.txt requirements.txt requirements-bench.txt requirements-dev.txt requirements-export.txt requirements-formats.txt ./
COPY tools/setup.sh tools/
RUN make setup && .venv/bin/pip install --no-cache-dir -r requirements-formats.txt -r requirements-export.txt -c constraints.txt \
    && rm -rf /root/.cache
COPY . .
CMD ["bash"]
