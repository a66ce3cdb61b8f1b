"""How a run is launched on a cluster, and what a cluster gets wrong."""
