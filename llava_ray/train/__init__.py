"""Training: any LLaVA, on any number of workers, with DeepSpeed's ZeRO.

settings (a YAML) -> launch (Ray Train: workers, failures, storage) -> loop: batches from
`data.stream` -> token-weighted loss -> DeepSpeed -> checkpoint: resume | export

Only `launch` knows Ray; the loop runs in any process that torch.distributed knows of.
"""
