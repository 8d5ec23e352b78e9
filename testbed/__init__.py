"""What tests and benchmarks share: slow oracles, small nets, tasks and layouts.

The package never imports it.
"""
