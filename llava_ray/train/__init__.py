"""Training: full, LoRA or projector, on any number of workers, with DeepSpeed's ZeRO.

    settings      read the run's YAML and the overrides of the command line
    preflight     check the packages, the model and the template before a worker starts
    survey        try the samples: which cannot be used, and how long they are
    find_checkpoint  which checkpoints are whole, and so can be resumed from
    stop          save and end on Ctrl-C or SIGTERM
    dry_run       describe the run instead of starting it (`--dry-run`)
    launch        start Ray Train; afterwards export the best or last checkpoint
    worker        one Ray Train worker: connects the loop to Ray
    loop          the steps of one worker
      deepspeed_engine   load the model and build the engine (deepspeed_config, param_groups)
      train_step         forward, backward and update (inputs, schedule)
      evaluation         held-out loss and sample answers
      log                train_log.jsonl, the console and the trackers (trackers, flops)
      checkpoint         save and resume (save_weights)
    run_folder    the files of a run, on disk or in object storage; the export
    best          choose the best checkpoint

Only `launch`, `worker`, `stop` and `trackers` import Ray. The loop runs in any process that has
joined a torch.distributed group.
"""

from typing import TYPE_CHECKING

from llava_ray.lazy import make_lazy

if TYPE_CHECKING:
    from llava_ray.evaluate.during_training import train_model

__all__ = ["train_model"]

__getattr__, __dir__ = make_lazy(
    __name__,
    {"train_model": "llava_ray.evaluate.during_training"},
)
