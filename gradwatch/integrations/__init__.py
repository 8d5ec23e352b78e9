"""Training frameworks: one line each, over the public API alone.

A room a framework; it imports the framework, so none is imported before it is used.
"""

from gradwatch.integrations.fit import Fit, needs

__all__ = ["Fit", "needs"]
