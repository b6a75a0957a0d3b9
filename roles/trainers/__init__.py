"""How examples become a checkpoint."""
