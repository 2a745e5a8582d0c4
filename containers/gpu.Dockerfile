# mlra_jax for NVIDIA GPUs of the Ampere generation and later; the host needs a driver for CUDA 13 (580 or later).
# From the repository's root: docker build -f containers/gpu.Dockerfile -t mlra-gpu .
FROM python:3.12.12-slim-bookworm
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /mlra_jax
COPY LICENSE README.md pyproject.toml ./
COPY containers/constraints.txt containers/
COPY configs configs
COPY mlra_jax mlra_jax
RUN pip install --constraint containers/constraints.txt '.[cuda,gcs,gpt2,prometheus,tokamax,tokenizers,triton]'
CMD ["mlra-train", "--help"]
