"""Training: DeepSpeed engine, optimiser, objectives, checkpoints, monitoring and the loop."""
