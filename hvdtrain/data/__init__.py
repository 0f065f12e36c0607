"""Data sets, their split over ranks, and loaders."""
