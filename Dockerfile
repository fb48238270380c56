# tip_exp with its test tools in /tip_exp/.venv.
#   docker build -t tip_exp . && docker run tip_exp demo
#   docker build -t tip_exp:cuda --build-arg BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04 --build-arg GPU=1 .
#   docker run --gpus all --ipc=host -v "$PWD/outputs:/tip_exp/outputs" -v "$PWD/results/gpu:/tip_exp/results/gpu" tip_exp:cuda gpu-check
ARG BASE=python:3.12-slim
FROM ${BASE}
ARG GPU=""
RUN apt-get update && apt-get install -y --no-install-recommends g++ git make python3-dev python3-venv && rm -rf /var/lib/apt/lists/*
WORKDIR /tip_exp
COPY . .
RUN make install GPU=${GPU}
ENV PATH=/tip_exp/.venv/bin:$PATH
ENTRYPOINT ["make"]
CMD ["help"]
