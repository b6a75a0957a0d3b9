"""Where a round's prompts come from."""
