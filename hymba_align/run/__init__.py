"""What a run leaves on disk: its folder, its lock, manifests and metrics, and what happens when the disk fails."""
