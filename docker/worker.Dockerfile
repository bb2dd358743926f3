# A worker with torch. Build from the repository's root:
#   docker build -f docker/worker.Dockerfile -t nibble-worker .
# For GPUs give the index of CUDA wheels and run with --gpus:
#   --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130
FROM python:3.12.12-slim-bookworm

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN useradd --create-home --uid 10001 nibble && install -d -o nibble -g nibble /var/lib/nibble
# The CPU kernels are compiled on first use, for the processor that they meet.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++=4:12.2.0-3 \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /srv/nibble

# torch first: it is the largest layer and changes least. Its build may ask for a triton of its own.
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" 'torch>=2.11,<2.14'
COPY pyproject.toml constraints.txt README.md ./
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
print('\n'.join(p['dependencies'] + p['optional-dependencies']['worker']))" > requirements.txt \
    && grep -v '^triton==' constraints.txt > recorded.txt \
    && pip install --no-cache-dir -c recorded.txt -r requirements.txt \
    && rm requirements.txt recorded.txt
COPY app app
COPY workers workers
COPY kernels kernels
RUN pip install --no-cache-dir --no-deps .
COPY docker/entrypoint.sh /usr/local/bin/nibble-entrypoint

USER 10001
# Compiled kernels and the device's profile lie in ~/.cache: with HOME on the volume they outlive the container.
ENV NIBBLE_STATE_DIR=/var/lib/nibble HOME=/var/lib/nibble PYTHONUNBUFFERED=1
VOLUME /var/lib/nibble
HEALTHCHECK --interval=60s --timeout=20s --start-period=60s CMD ["nibble-entrypoint", "worker", "--check"]
ENTRYPOINT ["nibble-entrypoint"]
CMD ["worker"]
