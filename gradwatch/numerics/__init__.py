"""Functions on tensors: no modules, no hooks, no input or output."""
