"""What gradwatch costs and how right it is, measured; never part of the tests."""
