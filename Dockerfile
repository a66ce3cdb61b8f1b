# facefast in a container: built once, run by Docker, Slurm (enroot, Apptainer) and Kubernetes alike.
#
#   docker build --tag registry.example.com/facefast:0.1.0 .
#   docker run --rm --gpus all --shm-size 4g -v PHOTOS:/data:ro -v RUNS:/runs registry.example.com/facefast:0.1.0 \
#     train --data.root /data --out /runs/first
#
# BUILD has the compiler for the CUDA kernels, RUN none; both bring Ubuntu 24.04 with Python 3.12. torch brings its own
# CUDA libraries, so the second needs no more than the driver's hooks.
ARG BUILD=nvidia/cuda:13.0.2-devel-ubuntu24.04
ARG RUN=nvidia/cuda:13.0.2-base-ubuntu24.04

FROM ${BUILD} AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# The distribution's packages are those of the base image's tag.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/facefast
ENV PATH=/opt/facefast/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /source

# What it depends on, in the versions that are tested, changes less often than facefast: a layer of its own.
COPY pyproject.toml ./
COPY .ci/constraints.txt .ci/requirements.py .ci/
RUN python .ci/requirements.py build-system,detect,keras,onnx > requirements.txt \
    && pip install --constraint .ci/constraints.txt --requirement requirements.txt

COPY setup.py MANIFEST.in README.md LICENSE ./
COPY csrc csrc
COPY facefast facefast
# Architectures: A100, RTX 30, RTX 40 and L4, H100; the newest also as PTX. FACEFAST_CUDA=0 leaves the kernels out.
ARG FACEFAST_CUDA=1
ARG FACEFAST_CUDA_ARCHS="80 86 89 90"
RUN FACEFAST_CUDA="${FACEFAST_CUDA}" FACEFAST_CUDA_ARCHS="${FACEFAST_CUDA_ARCHS}" \
      pip wheel --no-build-isolation --no-deps --wheel-dir wheels . \
    && pip install --no-index --no-deps wheels/*.whl \
    && pip check

FROM ${RUN}
LABEL org.opencontainers.image.title="facefast" \
      org.opencontainers.image.description="Face recognition by transfer learning" \
      org.opencontainers.image.licenses="MIT"
# The distribution's packages are those of the base image's tag.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/* \
    && (userdel --remove ubuntu 2>/dev/null || true) \
    && useradd --uid 1000 --user-group --create-home facefast \
    && install --directory --owner=facefast --group=facefast /runs
COPY --from=build /opt/facefast /opt/facefast
ENV PATH=/opt/facefast/bin:$PATH PYTHONUNBUFFERED=1 NVIDIA_DRIVER_CAPABILITIES=compute,utility,video
# By number, so that Kubernetes sees that it is not root.
USER 1000:1000
WORKDIR /runs
ENTRYPOINT ["facefast"]
CMD ["--help"]
