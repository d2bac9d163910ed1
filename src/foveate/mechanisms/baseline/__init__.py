"""What everything is compared with: dense attention."""
