"""Stage one: PriorCLIP pretrained on image-text shards under DeepSpeed ZeRO."""
