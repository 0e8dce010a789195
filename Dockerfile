# Environment of a run; the code is fetched when the container starts (`lvm/launch/start.py`).
#   docker build --tag IMAGE .                                          TPUs
#   docker build --tag IMAGE --build-arg PACKAGES="jax[cuda13]" .       GPUs
FROM python:3.12-slim
ARG PACKAGES="jax[tpu]"
COPY requirements.txt /opt/lvm/
RUN pip install --no-cache-dir --requirement /opt/lvm/requirements.txt ${PACKAGES}
COPY lvm/launch/start.py /opt/lvm/
ENTRYPOINT ["python", "/opt/lvm/start.py"]
