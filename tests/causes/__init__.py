"""Small sick runs, one and more for each cause of the catalogue, and their twins."""
