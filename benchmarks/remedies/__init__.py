"""Before and after: what each remedy does to small nets that need it."""
