"""Data of the bundled demo model; README.md in this folder is its card."""
