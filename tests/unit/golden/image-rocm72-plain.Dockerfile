# vLLM 0.29.0 for rocm, built from source at 0123456789abcdef0123456789abcdef01234567; Ray comes last.
# The context: source/ (patched) and kit/.
FROM clusterkit/base-rocm:198f5d5b6dd50076 AS base
SHELL ["/bin/bash", "-eo", "pipefail", "-c"]
ENV PYTORCH_ROCM_ARCH="gfx942"
COPY kit /kit
# What must stay as the base has it: everything later is installed under these versions.
RUN . /kit/env.sh \
 && mkdir -p /usr/share/clusterkit \
 && python3 -m pip uninstall --yes vllm \
 && cp -r /opt/rocm/share/amd_smi /tmp/amd_smi \
 && python3 -m pip install --no-deps --force-reinstall /tmp/amd_smi && rm -r /tmp/amd_smi \
 && python3 /kit/held.py write torch > /usr/share/clusterkit/held.txt \
 && echo "ray==2.60.0" >> /usr/share/clusterkit/held.txt
COPY source/requirements /requirements
RUN . /kit/env.sh \
 && python3 -m pip install --constraint /usr/share/clusterkit/held.txt --requirement /requirements/rocm.txt

FROM base AS build
RUN . /kit/env.sh \
 && { command -v git >/dev/null \
   || { apt-get update && apt-get install --yes --no-install-recommends git && rm -rf /var/lib/apt/lists/*; }; }
COPY source/pyproject.toml /pyproject.toml
RUN . /kit/env.sh \
 && python3 /kit/held.py needs /pyproject.toml > /tmp/needs.txt \
 && python3 -m pip install --constraint /usr/share/clusterkit/held.txt --requirement /tmp/needs.txt
COPY source /src
WORKDIR /src
ENV VLLM_TARGET_DEVICE="rocm" SETUPTOOLS_SCM_PRETEND_VERSION="0.29.0"
ARG MAX_JOBS=1
RUN . /kit/env.sh \
 && python3 setup.py bdist_wheel --dist-dir=/dist

# The end has nothing of what the build installed.
FROM base AS engine
COPY --from=build /dist /dist
RUN . /kit/env.sh \
 && python3 -m pip install --constraint /usr/share/clusterkit/held.txt /dist/vllm-*.whl \
 && python3 /kit/held.py write torch vllm > /usr/share/clusterkit/held.txt
RUN . /kit/env.sh \
 && python3 -m pip install --constraint /usr/share/clusterkit/held.txt "ray[serve]==2.60.0" "pyarrow" \
 && python3 /kit/held.py check /usr/share/clusterkit/held.txt \
 && python3 -m pip list --format=freeze > /usr/share/clusterkit/versions.txt \
 && rm -r /dist /kit /requirements
# With these set, every replica sees all GPUs of its host. An image cannot unset what its base sets; empty is off.
ENV RAY_EXPERIMENTAL_NOSET_HIP_VISIBLE_DEVICES="" \
    RAY_EXPERIMENTAL_NOSET_ROCR_VISIBLE_DEVICES="" \
    RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES=""
ENV HIP_FORCE_DEV_KERNARG=1 SAFETENSORS_FAST_GPU=1 TOKENIZERS_PARALLELISM=false
WORKDIR /
ENTRYPOINT []
CMD ["python3"]
