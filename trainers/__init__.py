"""Training and evaluation: what turns logits and labels into a loss, a step, and a score."""
