"""Backend `cpu`: a C++ core that executes any Schedule whose queries stand in one cell each."""
