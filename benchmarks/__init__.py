"""What is measured, and how: scripts whose tables docs/performance.md carries."""
