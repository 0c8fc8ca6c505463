"""The models: belief, progressive attention encoders, CLIP, PriorCLIP, PriorITR and the scene classifier."""
