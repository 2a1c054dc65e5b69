"""Training stages: each turns a starting checkpoint and data into `<stage>/final`."""
