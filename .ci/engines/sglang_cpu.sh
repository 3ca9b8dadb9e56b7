#!/usr/bin/env bash
# An environment in which SGLang's wheel computes LLaVA on the CPU (3 GB), for `engine: sglang` and its tests.
#   usage: sglang_cpu.sh DIR      then: LLAVA_RAY_SGLANG_PYTHON=DIR/bin/llava-ray-python
# No file of SGLang is changed. sglang_cpu_compat/ holds two small modules, which llava-ray-python puts on PYTHONPATH: a
# stand-in for the package of CUDA kernels, whose functions raise when called (none is), and a shim that lets a CUDA
# build of torchvision import.
set -euo pipefail
venv=${1:?usage: sglang_cpu.sh DIR}
here=$(dirname "$(readlink -f "$0")")
. "$here/environment.sh"
install torch==2.13.0 transformers==5.19.0 'tokenizers==0.23.2' 'ray[serve]==2.60.0' aiohttp einops fastapi 'uvicorn>=0.51' uvloop \
  psutil pyzmq orjson msgspec pybase64 pydantic requests pillow numpy scipy sentencepiece setproctitle tqdm watchfiles xxhash zstandard \
  python-multipart partial_json_parser prometheus-client packaging regex distro interegular 'llguidance<2,>=1.7.6' openai==2.8.0 \
  openai-harmony==0.0.4 tiktoken compressed-tensors==0.18.0 apache-tvm-ffi==0.1.11 gguf easydict blobfile==3.0.0 'python-dateutil<3' \
  IPython dill jsonschema 'soundfile<0.14'
install --no-deps sglang==0.5.23 torchvision==0.28.0 xgrammar==0.2.7 triton==3.9.0
printf '#!/bin/sh\nPYTHONPATH=%s/sglang_cpu_compat exec %s/bin/python "$@"\n' "$here" "$(readlink -f "$venv")" > "$venv/bin/llava-ray-python"
chmod +x "$venv/bin/llava-ray-python"
"$venv/bin/llava-ray-python" -c 'import sglang, torchvision; print("sglang", sglang.__version__)'
