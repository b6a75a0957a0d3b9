"""The engines a checkpoint is sampled and scored with."""
