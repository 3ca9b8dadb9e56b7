"""Check that a wheel holds every file of the package: recipes, the demo's weights, py.typed.

usage: python .ci/check_wheel.py WHEEL
"""

import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

held = set(zipfile.ZipFile(sys.argv[1]).namelist())
files = [
    path.relative_to(ROOT).as_posix()
    for path in sorted((ROOT / "llava_ray").rglob("*"))
    if path.is_file() and "__pycache__" not in path.parts
]
assert any(file.startswith("llava_ray/recipes/") for file in files)
if missing := [file for file in files if file not in held]:
    sys.exit(f"not in {sys.argv[1]}, see package-data in pyproject.toml: {', '.join(missing)}")
print(f"{len(files)} files are in {sys.argv[1]}")
