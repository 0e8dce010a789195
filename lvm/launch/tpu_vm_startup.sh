#!/bin/bash
# Run {{name}}: every host runs this at every boot; the run resumes from what it has saved.
set -uo pipefail
exec >>{{log}} 2>&1
mkdir -p /opt/lvm/{{name}}
cd /opt/lvm/{{name}} || exit 1
export HOME=/root UV_INSTALL_DIR=/opt/lvm/bin
if [ -e ended ]; then exit 0; fi
prepare() {
{{secrets}}
  if [ -e ready ]; then return 0; fi
  gcloud storage rm {{folder}}/ended-"$(hostname)"
  rm -rf code environment && mkdir code || return 1
  gcloud storage cp {{archive}} code.tar.gz || return 1
  tar -xzf code.tar.gz -C code || return 1
  curl -LsSf https://astral.sh/uv/install.sh | sh || return 1
  /opt/lvm/bin/uv venv --python 3.12 environment || return 1
  /opt/lvm/bin/uv pip install --python environment/bin/python -r code/requirements.txt 'jax[tpu]' || return 1
  touch ready
}
until prepare; do echo "this host is not ready; retrying"; sleep 60; done
{{exports}}
cd code || exit 1
../environment/bin/python {{command}}
code=$?
echo "ended with exit code $code"
echo "$code" >../ended
gcloud storage cp ../ended {{folder}}/ended-"$(hostname)"
