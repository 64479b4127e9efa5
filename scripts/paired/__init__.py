"""Paired differences of rules on the same probabilities: read (scores), infer (inference), draw (plots)."""
