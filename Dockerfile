# The training server in an image, for a CPU or for an NVIDIA GPU:
#   docker build -t vllm-zo .
#   docker build -t vllm-zo:cuda --build-arg DEVICE=cuda .
#   docker run -p 8000:8000 -v vllm-zo-state:/state -v /path/to/model:/model:ro vllm-zo /model
# What follows the image's name are the arguments of `vllm-zo serve`. docs/server.md has all flags.
FROM python:3.12-slim-bookworm

# cpu or cuda
ARG DEVICE=cpu
# Where PyTorch comes from on a CPU: the package index has CUDA builds only.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

# A compiler: vLLM and torch compile at run time. libnuma: vLLM's CPU build. bubblewrap: isolates Python graders.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends bubblewrap g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY vllm_zo ./vllm_zo
# hadolint ignore=DL3013
RUN if [ "$DEVICE" = cpu ]; then set -- --extra-index-url "$TORCH_INDEX"; else set --; fi \
    && pip install --no-cache-dir ".[$DEVICE,arrow,graders,plot]" "$@" \
    # On a CPU these come with CUDA builds that do not import beside its torch, and vLLM imports them if they are there.
    && if [ "$DEVICE" = cpu ]; then pip uninstall -y torchvision torchaudio torchcodec; fi

# Not root: a client with a grader, or a hole in a parser, has no more rights than this user.
RUN useradd --create-home --uid 1000 zo && mkdir /state && chown zo:zo /state && chmod 700 /state
USER 1000
WORKDIR /home/zo
ENV HF_HOME=/home/zo/.cache/huggingface
VOLUME /state
EXPOSE 8000

# A large model takes minutes to load.
HEALTHCHECK --start-period=15m --interval=10s --timeout=5s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]

# The flags stand before the model, so that flags of `docker run` come after them and win.
ENTRYPOINT ["vllm-zo", "serve", "--zo-state-dir", "/state", "--host", "0.0.0.0", "--port", "8000"]
