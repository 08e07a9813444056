"""From files to micro-batches: examples, rendering, segments, batching."""
