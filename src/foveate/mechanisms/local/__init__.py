"""Static neighbourhoods and windows on a grid."""
