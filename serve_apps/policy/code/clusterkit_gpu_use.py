"""For an app's own code: `class Mine(GpuUse)` says how busy the GPUs of its replica are, as `gpu_use`, 0 to 100."""

from __future__ import annotations

import importlib


class GpuUse:
    """PyTorch asks the driver of NVIDIA's and of AMD's; it needs nvidia-ml-py, or amdsmi, beside it."""

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve calls it every few seconds."""
        torch = importlib.import_module("torch")
        count = torch.cuda.device_count()
        return {"gpu_use": sum(torch.cuda.utilization(number) for number in range(count)) / count} if count else {}
