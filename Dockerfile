# An image for hosts of GPUs or TPUs, of any base with Python 3.11 to 3.13 (docs/hosts.md):
#     docker build -t bigmac .                                   docker build -t bigmac-tpu --build-arg EXTRAS=tpu,gcs .
ARG BASE=python:3.12-slim
FROM ${BASE}
ARG EXTRAS=gpu,gcs
WORKDIR /opt/bigmac
COPY LICENSE README.md pyproject.toml setup.py ./
COPY bigmac_jax ./bigmac_jax
COPY configs ./configs
# CUDA, or libtpu, comes with jax; of the host only the driver is used.
RUN pip install --no-cache-dir ".[${EXTRAS}]"
# Nothing is read from the sources any more.
WORKDIR /work
RUN bigmac --version && bigmac plan --config=tiny
# What NVIDIA's runtime lends to the container; elsewhere nobody reads it.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
# Where GKE puts the driver, which has no such runtime.
ENV LD_LIBRARY_PATH=/usr/local/nvidia/lib64
CMD ["bigmac", "--help"]
