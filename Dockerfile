# syntax=docker/dockerfile:1
# Build:  docker build -t perseid .
# Run:    docker run --gpus all -p 8000:8000 -p 50051:50051 -v perseid:/var/lib/perseid \
#             -v ./keys.toml:/keys.toml:ro -e PERSEID_API_KEYS=/keys.toml perseid
# Without keys it refuses to listen beyond the container; -e PERSEID_INSECURE_LISTEN=true says that all may use it.

FROM nvidia/cuda:13.0.1-base-ubuntu24.04 AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/perseid
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY protos protos
COPY kernels kernels
COPY router router
COPY server server
COPY loadtest loadtest
RUN /opt/perseid/bin/pip install --no-cache-dir -c constraints.txt ".[gpu,tracing]"

FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04
# A C compiler: Triton builds its launchers and the CPU path its kernels with it, both on first use.
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-dev g++ \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --create-home --home-dir /var/lib/perseid perseid
COPY --from=build /opt/perseid /opt/perseid
USER perseid
WORKDIR /var/lib/perseid
ENV PATH=/opt/perseid/bin:$PATH \
    PERSEID_CACHE_DIR=/var/lib/perseid/cache \
    PERSEID_STORE=/var/lib/perseid/store \
    PERSEID_HOST=0.0.0.0
VOLUME /var/lib/perseid
EXPOSE 8000 50051
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=2)"]
ENTRYPOINT ["perseid"]
CMD ["serve"]
