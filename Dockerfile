# TPUs:         docker build --build-arg EXTRAS=tpu,gcs --tag moe_jax:tpu .
# NVIDIA GPUs:  docker build --build-arg EXTRAS=cuda12,gcs --tag moe_jax:cuda .
# jax's wheels bring libtpu or CUDA; from the host come /dev/accel* or /dev/vfio, or the driver by NVIDIA's container toolkit.
FROM python:3.12-slim
ARG EXTRAS=tpu,gcs
WORKDIR /moe_jax
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY moe_jax moe_jax
COPY configs configs
COPY experiments experiments
RUN pip install --no-cache-dir --editable ".[${EXTRAS}]"
ENV PYTHONUNBUFFERED=1
