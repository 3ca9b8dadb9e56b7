"""`python -m llava_ray.cli`: the same as `llava-ray`."""

from llava_ray.cli import main

if __name__ == "__main__":
    main()
