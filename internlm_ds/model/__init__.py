"""InternLM models as lists of layer entries: parts, initial values, loss and metrics."""
