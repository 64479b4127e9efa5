"""Training and evaluation: losses, updates and scores from logits and labels."""
