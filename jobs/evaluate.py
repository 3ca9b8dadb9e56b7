"""Evaluates: `ray job submit -- python jobs/evaluate.py --tasks pope --data DIR --output DIR`.

The same as `llava-ray evaluate`.
"""

import sys

from llava_ray import cli

if __name__ == "__main__":
    sys.argv.insert(1, "evaluate")
    cli.main()
