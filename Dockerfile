# For a machine with an NVIDIA GPU. How to use it: docs/containers.md
#   docker build -t sft .
#   docker run --rm --gpus all -v sft-cache:/cache -v sft-outputs:/app/outputs sft model=llama3_8b dataset=ruozhiba
#
# torch's wheel brings CUDA's libraries and Triton's brings its compiler, so a base with CUDA would only hold them twice.
FROM python:3.12.12-slim-bookworm

# Triton compiles a small C file for each kernel it launches. Debian keeps no older versions, so none is pinned.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc g++ libgomp1 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app

# The packages alone, so that this layer stays until a version in setup.cfg changes.
COPY setup.cfg .
RUN python -c "import configparser; p = configparser.ConfigParser(interpolation=None); p.read('setup.cfg'); \
print(p['options']['install_requires'], p['options.extras_require']['unsloth'], sep='\n')" > /tmp/requirements.txt \
    && pip install --no-cache-dir -r /tmp/requirements.txt

COPY pyproject.toml README.md LICENSE train.py ./
COPY hydra_plugins hydra_plugins
COPY scripts scripts
COPY sft sft
COPY conf conf
# The project itself, and llama.cpp's parts for GGUF exports.
RUN pip install --no-cache-dir --no-deps -e . && PIP_NO_CACHE_DIR=1 python scripts/install_gguf.py

# Weights and tokens under /cache, runs under /app/outputs; both outlive the container.
ENV HF_HOME=/cache/huggingface SFT_CACHE=/cache/sft TRITON_CACHE_DIR=/cache/triton TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN useradd --create-home --uid 1000 sft && mkdir -p /cache outputs && chown sft:sft /cache outputs
USER 1000:1000
VOLUME ["/cache", "/app/outputs"]

ENTRYPOINT ["python", "train.py"]
