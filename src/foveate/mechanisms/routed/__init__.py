"""Mechanisms that choose from content which keys a query sees."""
