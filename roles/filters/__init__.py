"""How judgements become examples."""
