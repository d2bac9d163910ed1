"""The words of the house: Grid, errors, dtype rules, the registry and its facts."""
