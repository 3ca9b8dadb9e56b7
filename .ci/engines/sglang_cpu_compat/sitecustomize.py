"""Lets a CUDA build of torchvision import beside a CPU torch, whose operators it describes."""

import importlib.abc
import sys

NMS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class DeclareTorchvisionOps(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path, target=None):
        if fullname != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        if not torch.cuda.is_available():
            for operator in ("nms", "qnms"):
                torch.library.define(f"torchvision::{operator}", NMS)


sys.meta_path.insert(0, DeclareTorchvisionOps())
