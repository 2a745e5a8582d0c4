# mlra_jax for Google's TPUs, v5e and later.
# From the repository's root: docker build -f containers/tpu.Dockerfile -t mlra-tpu .
FROM python:3.12.12-slim-bookworm
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /mlra_jax
COPY LICENSE README.md pyproject.toml ./
COPY containers/constraints.txt containers/
COPY configs configs
COPY mlra_jax mlra_jax
RUN pip install --constraint containers/constraints.txt '.[gcs,gpt2,prometheus,tokenizers,tpu]'
CMD ["mlra-train", "--help"]
