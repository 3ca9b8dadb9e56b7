"""Trains a LLaVA: `ray job submit --working-dir . -- python jobs/train.py CONFIG key=value ...`.

The same as `llava-ray train`.
"""

import sys

from llava_ray import cli

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    cli.main()
