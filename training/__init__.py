"""What all trainings share: configuration, the run and its loop, ranks, engine, checkpoints, monitoring."""

from priorclip.common.late_imports import late_within

late_within("deepspeed.autotuning.autotuner", "mlflow")
