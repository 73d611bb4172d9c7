"""TPAW on Ray: team-based self-play with dual adaptive weighting."""

__version__ = "0.1.0"
