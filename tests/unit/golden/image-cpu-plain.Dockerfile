# vLLM and Ray on CPUs, from released wheels. The context holds wheels/: one wheel per pin, and pins.txt.
ARG BASE
FROM ${BASE} AS build
COPY wheels /wheels
RUN python3 -m venv --without-pip /opt/engine \
 && /opt/engine/bin/python /wheels/$(basename /wheels/pip-*.whl)/pip install --quiet --no-cache-dir \
    --no-index --no-deps --find-links /wheels --requirement /wheels/pins.txt

FROM ${BASE}
ARG INPUTS
COPY --from=build /opt/engine /opt/engine
ENV PATH=/opt/engine/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
# An image that cannot import its engine is no image.
RUN python -c "import ray, torch, vllm; from importlib.metadata import version; print(ray.__version__, torch.__version__, version('vllm'))"
LABEL clusterkit.image=vllm clusterkit.inputs=${INPUTS}
CMD ["python3"]
