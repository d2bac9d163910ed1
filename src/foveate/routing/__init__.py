"""Routers: who attends to whom, chosen from content. A router returns a Selection; kernels do the rest."""
