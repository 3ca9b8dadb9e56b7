"""Turns raw data into shards: `ray job submit -- python jobs/convert.py SOURCE -i DIR -o DIR`.

The same as `llava-ray convert`.
"""

import sys

from llava_ray import cli

if __name__ == "__main__":
    sys.argv.insert(1, "convert")
    cli.main()
